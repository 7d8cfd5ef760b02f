/** NodeUnpublishVolume on a machine of loop devices. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { mib, node, nodeTest, other } from "../../support/loop_node.ts";
import { blockCapability, rejects } from "../../support/node_calls.ts";

nodeTest("promise 4: NodeUnpublishVolume of a block volume succeeds after the device has gone", async () => {
  await using n = await node();
  await n.stage(n.stageRequest(blockCapability()));
  await n.publish(n.publishRequest(blockCapability()));
  await n.machine.hide(n.namespace);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual(await n.machine.mounts(), []);
});

nodeTest(
  "promise 5: NodeUnpublishVolume of a target with files on it answers FAILED_PRECONDITION and keeps them",
  async () => {
    await using n = await node();
    await Deno.mkdir(n.target);
    await Deno.writeTextFile(join(n.target, "precious"), "data");

    await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /it holds "precious", which are left alone/);

    assert.equal(await Deno.readTextFile(join(n.target, "precious")), "data");
  },
);

nodeTest("promise 5: NodeUnpublishVolume leaves the user's files on the volume", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await Deno.mkdir(join(n.target, "a/b"), { recursive: true });

  await n.unpublish(n.unpublishRequest);

  assert((await Deno.stat(join(n.staging, "a/b"))).isDirectory);
});

nodeTest("promise 5: NodeUnpublishVolume leaves the mount of another volume alone", async () => {
  await using n = await node();
  const stranger = await n.machine.addNamespace(other, 64 * mib);
  await n.machine.tool("mkfs.ext4", "-q", stranger.path);
  await Deno.mkdir(n.target);
  await n.machine.tool("mount", stranger.path, n.target);

  await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /ext4 of .* is mounted at .* not this volume/);

  assert.deepEqual(await n.machine.mounts(), [n.target]);
});

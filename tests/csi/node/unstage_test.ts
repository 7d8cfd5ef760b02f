/** NodeUnstageVolume, alone and together with NodeUnpublishVolume. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { node, nodeTest, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import { rejects } from "../../support/node_calls.ts";

nodeTest(
  "NodeUnstageVolume of a volume that is still published answers FAILED_PRECONDITION and keeps it attached",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    await n.publish(n.publishRequest());

    await rejects(
      n.unstage(n.unstageRequest),
      "FAILED_PRECONDITION",
      /still mounted at ".*pod1", unpublish it there first/,
    );
    assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
    await n.unpublish(n.unpublishRequest);
    await n.unstage(n.unstageRequest);

    assert.deepEqual([...Deno.readDirSync(n.discovery)], []);
  },
);

nodeTest("promise 4: NodeUnstageVolume detaches no volume that is mounted in another mount namespace", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  // Where the kernel lists a mounted file system; this machine's sysfs does not follow it.
  const listed = join(n.machine.host.roots.sysfs, "fs/ext4", n.namespace.name);
  await Deno.mkdir(listed, { recursive: true });
  const leak = new Deno.Command("unshare", {
    args: ["--mount", "--propagation", "private", "sh", "-c", "echo ready && read -r line"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  try {
    await leak.stdout.getReader().read();

    await rejects(
      n.unstage(n.unstageRequest),
      "FAILED_PRECONDITION",
      new RegExp(`its ext4 is still in use by the mount at "${n.staging}" of process ${leak.pid} \\(sh\\)$`),
    );
  } finally {
    await leak.stdin.close();
    await leak.status;
  }
  await rejects(
    n.unstage(n.unstageRequest),
    "FAILED_PRECONDITION",
    /its ext4 is still in use by something that this process cannot see: a mount of another container, or a freeze/,
  );
  assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
  await Deno.remove(listed);
  await n.unstage(n.unstageRequest);

  assert.deepEqual([...Deno.readDirSync(n.discovery)], []);
}, !needs("unshare"));

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume succeed after the device has gone", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await n.machine.hide(n.namespace);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);
  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
});

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume unmount stacked mounts", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await n.machine.tool("mount", "--bind", n.staging, n.target);
  await n.machine.tool("mount", "--bind", n.staging, n.staging);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual(await n.machine.mounts(), []);
});

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume succeed where nothing was ever done", async () => {
  await using n = await node();

  await n.unpublish(n.unpublishRequest);
  await n.unpublish({ ...n.unpublishRequest, targetPath: "/no/such/directory/mount" });
  await Deno.mkdir(n.target);
  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);
  await Deno.remove(n.staging);
  await n.unstage(n.unstageRequest);

  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
});

nodeTest(
  "promise 4: NodeUnstageVolume of a busy mount answers FAILED_PRECONDITION naming the process, and works afterwards",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    {
      using _open = await Deno.open(join(n.staging, "held"), { create: true, write: true });

      await rejects(
        n.unstage(n.unstageRequest),
        "FAILED_PRECONDITION",
        new RegExp(`is in use by process ${Deno.pid} \\(\\w+\\) with ".*/held"`),
      );
    }
    await n.unstage(n.unstageRequest);

    assert.deepEqual(await n.machine.mounts(), []);
  },
);

for (const call of ["unpublish", "unstage"] as const) {
  nodeTest(`promise 5: ${call} leaves a foreign mount alone and names it`, async () => {
    await using n = await node();
    const path = call === "unpublish" ? n.target : n.staging;
    await Deno.mkdir(path, { recursive: true });
    await n.machine.tool("mount", "-t", "tmpfs", "foreign", path);
    await Deno.writeTextFile(join(path, "precious"), "data");

    const done = call === "unpublish" ? n.unpublish(n.unpublishRequest) : n.unstage(n.unstageRequest);

    await rejects(done, "FAILED_PRECONDITION", /tmpfs of foreign .* which is not this volume, .* left as it is/);
    assert.equal(await Deno.readTextFile(join(path, "precious")), "data");
  });
}

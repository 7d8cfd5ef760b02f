/**
 * NodePublishVolume repairs broken staging. Kubelet stages a volume once per node and unstages it only when no pod of
 * the node uses it, so no other call would repair it.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { type LoopNamespace, subsystemNqn } from "../../support/loop_machine.ts";
import { exists, node, nodeTest, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import {
  blockCapability,
  callContext,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

type Node = Awaited<ReturnType<typeof node>>;

/** The kernel gives up the last path and removes the device; the storage comes back, under another name and number. */
async function comeBack(n: Node, namespace: LoopNamespace = n.namespace): Promise<AsyncDisposable> {
  await n.machine.hide(namespace);
  const loop = (await n.machine.tool("losetup", "--show", "--find", namespace.file)).trim();
  await n.machine.show({ ...namespace, loop }, { name: "nvme1n1" });
  return {
    async [Symbol.asyncDispose]() {
      for (const path of (await n.machine.mounts()).toReversed()) await n.machine.tool("umount", path);
      await n.machine.tool("losetup", "--detach", loop);
    },
  };
}

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  nodeTest(
    `promise 25: the next pod on a node gets its ${fsType} volume back after all paths were lost for long`,
    async () => {
      await using n = await node({ sizeMib: fsType === "ext4" ? 64 : 320 });
      const capability = mountCapability(fsType);
      await n.stage(n.stageRequest(capability));
      await n.publish(n.publishRequest(capability));
      await Deno.writeTextFile(join(n.target, "kept"), "by the first pod");
      await n.machine.tool("sync", "--file-system", n.target);
      await using _back = await comeBack(n);
      await n.unpublish(n.unpublishRequest);
      const next = join(n.base, "pod2");

      for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(capability, false, next));

      assert.equal(await Deno.readTextFile(join(next, "kept")), "by the first pod");
      await Deno.writeTextFile(join(next, "new"), "by the second");
      assert.equal(n.machine.commands.filter((program) => program.startsWith("mkfs")).length, 1);
      await n.unpublish({ volumeId: volumeId(uuid), targetPath: next });
      await n.unstage(n.unstageRequest);
      assert.deepEqual(await n.machine.mounts(), []);
    },
    !needs(`mkfs.${fsType}`),
  );
}

for (const fsType of ["ext4", "xfs"]) {
  nodeTest(
    `promise 25: a second pod gets its ${fsType} volume back while the first one still hangs on the lost device`,
    async () => {
      await using n = await node({ sizeMib: fsType === "ext4" ? 64 : 320 });
      const capability = mountCapability(fsType);
      await n.stage(n.stageRequest(capability));
      await n.publish(n.publishRequest(capability));
      await Deno.writeTextFile(join(n.target, "kept"), "by the first pod");
      await n.machine.tool("sync", "--file-system", n.target);
      await using _back = await comeBack(n);
      const next = join(n.base, "pod2");

      await n.publish(n.publishRequest(capability, false, next));

      assert.equal(await Deno.readTextFile(join(next, "kept")), "by the first pod");
      await n.unpublish(n.unpublishRequest);
      await n.unpublish({ volumeId: volumeId(uuid), targetPath: next });
      await n.unstage(n.unstageRequest);
      assert.deepEqual(await n.machine.mounts(), []);
    },
    !needs(`mkfs.${fsType}`),
  );
}

nodeTest(
  "promise 25: the next pod on a node gets its raw block volume back after all paths were lost for long",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest(blockCapability()));
    await n.publish(n.publishRequest(blockCapability()));
    await n.machine.hide(n.namespace);
    const next = join(n.base, "pod2");
    const waiting = new AbortController();
    const early = n.publish(n.publishRequest(blockCapability(), false, next), callContext(waiting.signal));
    waiting.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time"));
    await rejects(early, "UNAVAILABLE", /Cannot find a block device of namespace/);
    await n.machine.show(n.namespace, { name: "nvme1n1" });

    await n.publish(n.publishRequest(blockCapability(), false, next));

    assert.equal((await Deno.stat(next)).rdev, (await Deno.stat(n.namespace.loop)).rdev);
    await n.unpublish(n.unpublishRequest);
    await n.unpublish({ volumeId: volumeId(uuid), targetPath: next });
    await n.unstage(n.unstageRequest);
  },
);

nodeTest(
  "promise 25: NodePublishVolume goes on by itself when the device comes back later than its caller waits",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    await n.machine.hide(n.namespace);
    const waiting = new AbortController();
    const early = n.publish(n.publishRequest(), callContext(waiting.signal));
    waiting.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time"));
    await rejects(early, "UNAVAILABLE", /Cannot find a block device of namespace .* Discovery-Client/);
    await n.machine.show(n.namespace, { name: "nvme1n1" });

    await n.publish(n.publishRequest());

    assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
  },
);

nodeTest(
  "promise 25: NodePublishVolume repairs a file system that the kernel made read-only after an error",
  async () => {
    await using n = await node();
    const capability = mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["errors=remount-ro"]);
    await n.stage(n.stageRequest(capability));
    await n.publish(n.publishRequest(capability));
    const loop = n.namespace.loop.replace("/dev/", "");
    await Deno.writeTextFile(`/sys/fs/ext4/${loop}/trigger_fs_error`, "test\n");
    const next = join(n.base, "pod2");

    await rejects(
      n.publish(n.publishRequest(capability, false, next)),
      "FAILED_PRECONDITION",
      /(takes no writes|is read-only).*; it is still in use at ".*\/pod1", the pods there have to end first/,
    );
    await n.unpublish(n.unpublishRequest);
    await n.publish(n.publishRequest(capability, false, next));

    await Deno.writeTextFile(join(next, "x"), "writable");
    assert(n.machine.commands.includes("e2fsck"));
  },
  !exists("/sys/fs/ext4/features/lazy_itable_init"),
);

nodeTest("promise 6: NodePublishVolume never shows a plain directory of the root disk", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.machine.tool("umount", n.staging);
  await Deno.writeTextFile(join(n.staging, "precious"), "data of the node");

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /nothing is mounted at the staging path, and the staging path ".*" holds files of the node's own disk/,
  );
  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
  assert.equal(await Deno.readTextFile(join(n.staging, "precious")), "data of the node");
  await Deno.remove(join(n.staging, "precious"));
  await n.publish(n.publishRequest());

  assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
});

nodeTest("promise 1: NodePublishVolume formats nothing, not even a blank volume that was never staged", async () => {
  await using n = await node();

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /nvme0n1 is blank, and publish makes none: if the volume was used before, its data is gone .* has to be staged first$/,
  );

  assert.deepEqual([n.machine.commands.filter((program) => program !== "blkid"), await n.machine.mounts()], [[], []]);
});

nodeTest(
  "NodePublishVolume without a publish context of this driver says that the volume has to be staged",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    await n.machine.hide(n.namespace);

    await rejects(
      n.publish({ ...n.publishRequest(), publishContext: {} }),
      "FAILED_PRECONDITION",
      /this node has no block device of it, it has to be staged first/,
    );
  },
);

nodeTest("NodePublishVolume with the publish context of another volume is an error", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const context = publishContext("1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e");

  await rejects(
    n.publish({ ...n.publishRequest(), publishContext: context }),
    "INVALID_ARGUMENT",
    /the publish context is of namespace 1b7e2c44/,
  );
});

Deno.test("promise 25: an encrypted volume whose device was lost says what to do when the call brings no passphrase", async () => {
  const host = new FakeHost();
  host.addNamespace(uuid, subsystemNqn);
  const attacher = createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: "nqn.host" });
  const calls = nodeCalls({ host, attacher });
  const secrets = { "host-encryption-passphrase": "open sesame" };
  const volume = {
    volumeId: `${volumeId(uuid)}|hostcrypto:luks2`,
    stagingTargetPath: "/staging",
    publishContext: publishContext(uuid),
    volumeCapability: mountCapability(),
  };
  await calls.stage({ ...volume, secrets });
  await calls.publish({ ...volume, targetPath: "/pods/one" });
  host.loseDevices();
  host.connect(subsystemNqn);

  await rejects(
    calls.publish({ ...volume, targetPath: "/pods/two", secrets }),
    "FAILED_PRECONDITION",
    /is of a device that has gone, and still mounted at "\/pods\/one"; the pods there have to end first/,
  );
  await calls.unpublish({ volumeId: volume.volumeId, targetPath: "/pods/one" });
  await rejects(
    calls.publish({ ...volume, targetPath: "/pods/two" }),
    "FAILED_PRECONDITION",
    /the call brings no passphrase; end every pod on this node .*\(scale it to zero, or drain the node\).*node-publish-secret-name/,
  );
  assert.equal(host.mappers.length, 1);

  await calls.publish({ ...volume, targetPath: "/pods/two", secrets });

  assert.deepEqual(host.mounts.map(({ path }) => path), ["/staging", "/pods/two"]);
});

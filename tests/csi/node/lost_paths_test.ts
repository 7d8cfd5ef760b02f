/**
 * The node service when connections are lost, on a FakeHost; tests/vm/scenarios/paths.ts is the real one.
 */
import assert from "node:assert/strict";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import {
  blockCapability,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const neighbour = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const staging = "/staging";
const target = "/pods/x";
const stage = {
  volumeId: volumeId(uuid),
  stagingTargetPath: staging,
  publishContext: publishContext(uuid),
  volumeCapability: mountCapability("ext4"),
};
const publish = { ...stage, targetPath: target };

function node() {
  const host = new FakeHost();
  const locks = new KeyedLock();
  const attacher = createDirectAttacher({ host, hostNqn: hostNqn("n1.node"), hostId: "1", locks });
  const setStates = (state: string) => host.controllers.forEach((controller) => controller.state = state);
  return { host, setStates, ...nodeCalls({ host, attacher, locks }) };
}

Deno.test("promise 4: without a live path nothing is started that would hang, and unstage goes on when one is back", async () => {
  const { host, setStates, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  await calls.stage(stage);
  await calls.publish(publish);
  setStates("connecting");
  const before = host.commands.length;

  const noPath = /\/dev\/nvme0n1 has no live path \(nvme0 connecting\), what was not yet written waits for one/;
  await rejects(calls.stage(stage), "UNAVAILABLE", noPath);
  await rejects(calls.publish(publish), "UNAVAILABLE", noPath);
  assert.equal(host.commands.length, before);
  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });
  await rejects(calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging }), "UNAVAILABLE", noPath);
  assert.deepEqual(host.commands.slice(before), [`umount ${target}`]);
  setStates("live");
  await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });

  assert.deepEqual([host.mounts, host.controllers], [[], []]);
});

Deno.test("promise 4: without a live path no target that is the last mount of its volume is unmounted either", async () => {
  const { host, setStates, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  await calls.stage(stage);
  await calls.publish(publish);
  // By hand, for example.
  host.mounts.shift();
  setStates("connecting");
  const before = host.commands.length;

  const noPath = /Cannot unpublish the volume .*: \/dev\/nvme0n1 has no live path \(nvme0 connecting\)/;
  await rejects(calls.unpublish({ volumeId: volumeId(uuid), targetPath: target }), "UNAVAILABLE", noPath);
  assert.equal(host.commands.length, before);
  setStates("live");
  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });

  assert.deepEqual(host.leftovers(), []);
});

Deno.test("promise 4: a volume whose device the kernel has given up is unstaged at once", async () => {
  const { host, setStates, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  await calls.stage(stage);
  setStates("connecting");
  host.devices.splice(0);
  host.controllers.splice(0);

  await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });

  assert.deepEqual(host.mounts, []);
});

Deno.test("one live path of two is enough for every call", async () => {
  const { host, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  await calls.stage(stage);
  host.connect(subsystemNqn, hostNqn("n1.node"), "192.0.2.2");
  const [first] = host.controllers;
  assert(first);
  first.state = "connecting";

  await calls.publish(publish);
  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });
  await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });

  assert.deepEqual(host.mounts, []);
});

Deno.test("promise 14: a namespace whose announcement was lost is found, because the kernel is asked to look", async () => {
  const { host, ...calls } = node();
  host.addNamespace(neighbour, subsystemNqn);
  host.connect(subsystemNqn, hostNqn("n1.node"));
  host.addNamespace(uuid, subsystemNqn);

  await calls.stage(stage);

  assert(host.commands.includes("nvme ns-rescan /dev/nvme0"));
  assert.equal(host.mounts.length, 1);
});

Deno.test("promise 4: a device node that went to another namespace under the bind mount is not left at the target", async () => {
  const { host, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  const volumeCapability = blockCapability();
  await calls.stage({ ...stage, volumeCapability });
  const [device] = host.devices;
  assert(device);
  const stranger = { ...device, number: "259:9", namespace: host.addNamespace(neighbour, subsystemNqn) };
  const run = host.run.bind(host);
  host.run = (program, ...rest) => {
    if (program === "mount") host.devices.splice(0, 1, stranger);
    return run(program, ...rest);
  };

  const published = calls.publish({ ...publish, volumeCapability });

  await rejects(published, "UNAVAILABLE", /devtmpfs .* is at "\/pods\/x" instead of \/dev\/nvme0n1/);
  assert.deepEqual(host.mounts, []);
  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });
  assert.deepEqual(host.leftovers(), []);
});

Deno.test("a volume is a file system or a block device on a node, and never both at once", async () => {
  const { host, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  const volumeCapability = blockCapability();
  const asBlock = { ...stage, volumeCapability, stagingTargetPath: "/pods/staging" };
  await calls.stage(stage);

  const mounted = /as a block device: ext4 of \/dev\/nvme0n1 .* is mounted at "\/staging", which has to end first/;
  await rejects(calls.stage(asBlock), "FAILED_PRECONDITION", mounted);
  await rejects(calls.publish({ ...asBlock, targetPath: target }), "FAILED_PRECONDITION", mounted);
  await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });
  await calls.stage(asBlock);
  await calls.publish({ ...asBlock, targetPath: target });
  await rejects(
    calls.stage(stage),
    "FAILED_PRECONDITION",
    /\/dev\/nvme0n2 is in use as a block device at "\/pods\/x", a file system is damaged by that/,
  );
  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });
  await calls.stage(stage);

  assert.deepEqual(host.mounts.map(({ path, isNode }) => ({ path, isNode })), [{ path: staging, isNode: false }]);
});

Deno.test("promise 8: NodeStageVolume gives no final answer while its file system is mounted and cannot be grown", async () => {
  const { host, ...calls } = node();
  const namespace = host.addNamespace(uuid, subsystemNqn);
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes / 2n };
  host.answers.set("resize2fs", { code: 1, stderr: "resize2fs: Permission denied to resize filesystem" });

  const staged = calls.stage(stage);

  await rejects(staged, "UNAVAILABLE", /Cannot grow the ext4 of namespace .*: resize2fs failed with exit 1/);
  assert.deepEqual(host.mounts.map(({ path }) => path), [staging]);
  await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });
  assert.deepEqual(host.mounts, []);
});

Deno.test("promise 8: NodePublishVolume gives no final answer while half of its mount is there", async () => {
  const { host, ...calls } = node();
  host.addNamespace(uuid, subsystemNqn);
  await calls.stage(stage);
  const failure = { code: 32, stdout: "", stderr: "mount: /pods/x: filesystem was mounted, but failed to remount." };
  const run = host.run.bind(host);
  let isHalf = false;
  host.run = async (program, args, options) => {
    const result = isHalf || program !== "mount" ? await run(program, args, options) : failure;
    return program === "mount" ? failure : result;
  };

  await rejects(calls.publish(publish), "FAILED_PRECONDITION", /mount failed with exit 32 \(mount: \/pods\/x/);
  isHalf = true;
  await rejects(calls.publish(publish), "UNAVAILABLE", /mount failed with exit 32 \(mount: \/pods\/x/);

  await calls.unpublish({ volumeId: volumeId(uuid), targetPath: target });
  assert.deepEqual(host.leftovers(), ["mount /staging"]);
});

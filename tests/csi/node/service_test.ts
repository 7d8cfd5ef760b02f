/** The node service as a whole: volumes from stage to unstage, and what every call does first. */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { Attacher } from "../../../lib/host/attach/attacher.ts";
import { VolumeCapability_AccessMode_Mode as Mode, VolumeUsage_Unit as Unit } from "../../../proto/gen/csi_pb.ts";
import { mib, node, nodeTest, other, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import { blockCapability, mountCapability, publishContext, rejects, volumeId } from "../../support/node_calls.ts";

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  nodeTest(`node service takes a ${fsType} volume through its whole life, each call twice`, async () => {
    await using n = await node({ sizeMib: fsType === "ext4" ? 64 : 320 });
    const capability = mountCapability(fsType);

    for (let round = 0; round < 2; round++) await n.stage(n.stageRequest(capability));
    assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
    for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(capability));
    await Deno.writeTextFile(join(n.target, "kept"), "by the pod");
    assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
    for (let round = 0; round < 2; round++) await n.unpublish(n.unpublishRequest);
    await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
    for (let round = 0; round < 2; round++) await n.unstage(n.unstageRequest);
    assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);

    await n.stage(n.stageRequest(capability));
    assert.equal(await Deno.readTextFile(join(n.staging, "kept")), "by the pod");
    const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.staging });
    assert.equal(usage?.length, 2);
  }, !needs(`mkfs.${fsType}`));
}

nodeTest("node service takes a raw block volume through its whole life, each call twice", async () => {
  await using n = await node();
  const capability = blockCapability();

  for (let round = 0; round < 2; round++) await n.stage(n.stageRequest(capability));
  assert.deepEqual(await n.machine.mounts(), []);
  for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(capability));
  const stat = await Deno.stat(n.target);
  assert.deepEqual([stat.isBlockDevice, stat.rdev], [true, (await Deno.stat(n.namespace.loop)).rdev]);
  const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });
  assert.deepEqual(usage, [{ unit: Unit.BYTES, total: 64n * BigInt(mib) }]);
  for (let round = 0; round < 2; round++) await n.unpublish(n.unpublishRequest);
  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
  for (let round = 0; round < 2; round++) await n.unstage(n.unstageRequest);

  assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);
});

nodeTest("node calls spawn no more commands than the bounds allow", async () => {
  await using n = await node();
  const spawned = async (act: () => Promise<unknown>) => {
    const before = n.machine.commands.length;
    await act();
    return n.machine.commands.slice(before);
  };

  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), ["blkid", "mkfs.ext4", "mount"]);
  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), []);
  assert.deepEqual(await spawned(() => n.publish(n.publishRequest())), ["mount"]);
  assert.deepEqual(await spawned(() => n.publish(n.publishRequest())), []);
  assert.deepEqual(await spawned(() => n.unpublish(n.unpublishRequest)), ["umount"]);
  assert.deepEqual(await spawned(() => n.unstage(n.unstageRequest)), ["umount"]);
  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), ["blkid", "e2fsck", "mount"]);
});

nodeTest("node calls answer INVALID_ARGUMENT for each missing required field before anything else", async () => {
  await using n = await node();
  const unknown = "fake-vol-id-1a2b3c4d-5";
  const cases: [Promise<unknown>, RegExp][] = [
    [n.stage({ ...n.stageRequest(), volumeId: "" }), /volume_id is missing/],
    [n.stage({ ...n.stageRequest(), volumeId: unknown, stagingTargetPath: "" }), /staging_target_path is missing/],
    [n.stage({ volumeId: unknown, stagingTargetPath: n.staging }), /volume_capability is missing/],
    [n.stage({ ...n.stageRequest(), stagingTargetPath: "relative" }), /not a plain absolute path/],
    [n.unstage({ ...n.unstageRequest, volumeId: "" }), /volume_id is missing/],
    [n.unstage({ ...n.unstageRequest, stagingTargetPath: "" }), /staging_target_path is missing/],
    [n.publish({ ...n.publishRequest(), volumeId: "" }), /volume_id is missing/],
    [n.publish({ ...n.publishRequest(), volumeId: unknown, targetPath: "" }), /target_path is missing/],
    [n.publish({ volumeId: unknown, targetPath: n.target }), /volume_capability is missing/],
    [n.unpublish({ ...n.unpublishRequest, volumeId: "" }), /volume_id is missing/],
    [n.unpublish({ ...n.unpublishRequest, targetPath: "" }), /target_path is missing/],
    [n.stats({ volumePath: n.target }), /volume_id is missing/],
    [n.stats({ volumeId: unknown }), /volume_path is missing/],
    [n.expand({ volumePath: n.target }), /volume_id is missing/],
    [n.expand({ volumeId: unknown }), /volume_path is missing/],
    [
      n.expand({ volumeId: unknown, volumePath: n.target, capacityRange: { requiredBytes: 2n, limitBytes: 1n } }),
      /from 2 to 1 bytes makes no sense/,
    ],
    [n.stage(n.stageRequest(mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["loop"]))), /mount flag "loop"/],
    [
      n.stage({ ...n.stageRequest(), publishContext: publishContext(other) }),
      /the publish context is of namespace 1b7e2c44/,
    ],
  ];

  for (const [call, message] of cases) await rejects(call, "INVALID_ARGUMENT", message);

  assert.deepEqual(n.machine.commands, []);
});

nodeTest("node calls for an unknown volume ID answer NOT_FOUND, or OK where there is nothing to undo", async () => {
  await using n = await node();
  const volumeId = "fake-vol-id-1a2b3c4d-5";

  await rejects(n.stage({ ...n.stageRequest(), volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.publish({ ...n.publishRequest(), volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.stats({ volumeId, volumePath: "some/path" }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.expand({ volumeId, volumePath: "some/path" }), "NOT_FOUND", /its ID is not one of this driver/);
  await n.unstage({ ...n.unstageRequest, volumeId });
  await n.unpublish({ ...n.unpublishRequest, volumeId });
  await n.machine.tool("mount", "-t", "tmpfs", "foreign", n.staging);
  await rejects(n.unstage({ ...n.unstageRequest, volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
});

nodeTest(
  "promise 9: a second call for a volume fails naming the one that runs, and calls for other volumes go on",
  async () => {
    const started = Promise.withResolvers<void>();
    const slow = Promise.withResolvers<void>();
    const attach: Attacher = {
      hint: "",
      takesKeys: false,
      async attach(_ctx, namespace) {
        if (namespace.uuid !== uuid) return;
        started.resolve();
        await slow.promise;
      },
      detach: () => Promise.resolve(),
    };
    await using n = await node({ attach });
    await n.machine.addNamespace(other, 64 * mib);
    const first = n.stage(n.stageRequest());
    await started.promise;

    const busy = /Cannot start Node\w+ for volume 0f2c6a5e-\S+: NodeStageVolume has been running for \d+ s/;
    await rejects(n.stage(n.stageRequest()), "ABORTED", busy);
    await rejects(n.unstage(n.unstageRequest), "ABORTED", busy);
    await rejects(n.publish(n.publishRequest()), "ABORTED", busy);
    const staging = join(n.machine.directory, "globalmount2");
    await Deno.mkdir(staging);
    await n.stage({
      ...n.stageRequest(),
      volumeId: volumeId(other),
      stagingTargetPath: staging,
      publishContext: publishContext(other),
    });
    slow.resolve();
    await first;

    assert.deepEqual(await n.machine.mounts(), [staging, n.staging]);
  },
);

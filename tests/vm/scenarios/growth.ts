/** Growth while in use, late devices, clones of a larger size: what the file system and the kernel really show. */
import assert from "node:assert/strict";
import { Controller } from "../../../proto/gen/csi_pb.ts";
import { type Check, scenario as of } from "../scenario.ts";
import { devicesWith, read, tool, until } from "../testbed.ts";

const gib = 1 << 30;

const fileSystems = (["ext4", "xfs", "btrfs"] as const).map((use): Check => ({
  name: `promise 16: a mounted ${use} grows, and the answer is the size measured after it`,
  async run(testbed) {
    const volume = await testbed.volume({ use });
    await volume.stage();
    await volume.publish();
    await Deno.writeTextFile(`${volume.target}/file`, use);
    const before = BigInt((await volume.stats()).usage[0]?.total ?? 0n);

    const answered = await volume.expand(3n * BigInt(gib));
    const again = await volume.expand(3n * BigInt(gib));

    assert.deepEqual([answered, again], [3n * BigInt(gib), 3n * BigInt(gib)]);
    assert.equal(read(`/sys/class/block/${volume.device.slice(5)}/size`), String(3 * gib / 512));
    const after = BigInt((await volume.stats()).usage[0]?.total ?? 0n);
    assert(after > 2n * before, `${use} had ${before} bytes and has ${after}`);
    assert.equal(await Deno.readTextFile(`${volume.target}/file`), use);
    await tool("dd", "if=/dev/zero", `of=${volume.target}/more`, "bs=1M", "count=8", "conv=fsync", "status=none");
    await volume.end();
    await testbed.nothingLeft();
  },
}));

export const scenario = of([
  ...fileSystems,
  {
    name: "promise 16: a block volume in use grows, and its user sees the new size",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();
      await volume.publish();
      const file = await Deno.open(volume.target, { read: true, write: true });
      try {
        assert.equal(await volume.expand(2n * BigInt(gib)), 2n * BigInt(gib));
        assert.equal(await file.seek(0, Deno.SeekMode.End), 2 * gib);
      } finally {
        file.close();
      }
      await volume.end();
    },
  },
  {
    name: "promise 15: a larger clone of a volume in use has its data and its own size at the first mount",
    async run(testbed) {
      const origin = await testbed.volume();
      await origin.stage();
      await origin.publish();
      await Deno.writeTextFile(`${origin.target}/file`, "before the snapshot");
      await tool("sync", "-f", origin.target);
      const { snapshot } = await testbed.controllerCall(Controller.method.createSnapshot, {
        name: "snapshot",
        sourceVolumeId: origin.id,
        secrets: testbed.secrets,
      });
      const source = { case: "snapshot" as const, value: { snapshotId: snapshot?.snapshotId ?? "" } };
      const clone = await testbed.volume({ sizeBytes: 2n * BigInt(gib), source });
      await clone.stage();
      await clone.publish();

      assert.equal(await Deno.readTextFile(`${clone.target}/file`), "before the snapshot");
      const total = BigInt((await clone.stats()).usage[0]?.total ?? 0n);
      assert(total > 18n * BigInt(gib) / 10n, `the clone's file system has ${total} bytes`);
      assert.deepEqual([devicesWith(origin.uuid).length, devicesWith(clone.uuid).length], [1, 1]);
      await clone.end();
      await testbed.controllerCall(Controller.method.deleteSnapshot, {
        snapshotId: snapshot?.snapshotId ?? "",
        secrets: testbed.secrets,
      });
      await origin.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "promise 14: a device that comes late is noticed within a fraction of a second of its arrival",
    async run(testbed) {
      const first = await testbed.volume({ use: "block" });
      await first.stage();
      const late = await testbed.volume({ use: "block" });
      await testbed.processes.ask("GET", "/settled");
      const enable = `${testbed.targetOf(late.uuid)}/enable`;
      await Deno.writeTextFile(enable, "0");
      await until("the device is away", () => devicesWith(late.uuid).length === 0);

      let answeredAt = 0;
      const staged = late.stage().then(() => answeredAt = performance.now());
      await until("the driver has the kernel look again", () => testbed.logOf("node").includes("nvme ns-rescan"));
      assert.equal(answeredAt, 0);
      await Deno.writeTextFile(enable, "1");
      await until("the device arrives", () => devicesWith(late.uuid).length === 1);
      const arrivedAt = performance.now();
      await staged;

      const ms = Math.round(answeredAt - arrivedAt);
      testbed.measured("late device", `NodeStageVolume of a block volume answered ${ms} ms after its arrival in sysfs`);
      assert(ms < 3000, `${ms} ms`);
      await late.end();
      await first.end();
      await testbed.nothingLeft();
    },
  },
]);

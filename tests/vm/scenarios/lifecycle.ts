/** Volumes from creation to deletion over real NVMe/TCP, with every file system and as block devices. */
import assert from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import { type Check, scenario as of } from "../scenario.ts";
import { controllers, deviceOf, devicesWith, mountsBelow, nodeId, read, tool, until } from "../testbed.ts";

const fileSystems = (["ext4", "xfs", "btrfs"] as const).map((use): Check => ({
  name: `a volume with ${use} lives from creation to deletion, each call made twice, and leaves nothing`,
  async run(testbed) {
    const volume = await testbed.volume({ use });
    for (const call of [() => volume.stage(), () => volume.publish()]) {
      await call();
      await call();
    }
    assert.equal(
      read(`/sys/class/block/${volume.device.slice(5)}/nguid`)?.replaceAll("-", ""),
      volume.uuid.replaceAll("-", ""),
    );
    await Deno.writeTextFile(`${volume.target}/file`, use);
    const { usage, volumeCondition } = await volume.stats();
    assert.equal(volumeCondition?.message, "healthy");
    assert(Number(usage[0]?.total) > 0.8 * 2 ** 30);

    for (
      const call of [() => volume.unpublish(), () => volume.unstage(), () => volume.stage(), () => volume.publish()]
    ) {
      await call();
      await call();
    }
    assert.equal(await Deno.readTextFile(`${volume.target}/file`), use);
    await volume.end();

    await testbed.nothingLeft();
    assert.deepEqual(devicesWith(volume.uuid), []);
  },
}));

export const scenario = of([
  ...fileSystems,
  {
    name: "a raw block volume shows the volume's own bytes, and no other process keeps it",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();
      await volume.publish();

      await Deno.writeTextFile(volume.target, "block");
      await tool("sync", volume.target);
      const [first] = (await tool("dd", `if=${testbed.contentOf(volume.uuid)}`, "bs=5", "count=1", "status=none"))
        .split(
          "\n",
        );
      await volume.unpublish();
      await volume.publish();

      assert.equal(first, "block");
      assert.equal((await Deno.lstat(volume.target)).isBlockDevice, true);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "two volumes share the connections, and the last one to go takes them along",
    async run(testbed) {
      const one = await testbed.volume();
      const two = await testbed.volume({ use: "block" });
      await Promise.all([one.stage(), two.stage()]);
      const before = controllers();
      assert.equal(before.length, 2);
      assert.deepEqual(before.map((controller) => controller.hostNqn), [hostNqn(nodeId), hostNqn(nodeId)]);

      await one.unstage();
      assert.deepEqual(controllers(), before);
      await one.revoke();
      await until("the device of the revoked volume goes", () => devicesWith(one.uuid).length === 0);
      assert(deviceOf(two.uuid));
      await two.unstage();

      assert.deepEqual(controllers(), []);
      await two.revoke();
      await Promise.all([one.delete(), two.delete()]);
      await testbed.nothingLeft();
      assert.deepEqual(mountsBelow(testbed.home), []);
    },
  },
]);

/** Devices that go, come back and change names under the driver: whose they are is what counts. */
import assert from "node:assert/strict";
import { scenario as of } from "../scenario.ts";
import {
  assertCallFails,
  controllers,
  devicesWith,
  type GuestTestbed,
  mountsBelow,
  read,
  tool,
  until,
  type Volume,
} from "../testbed.ts";

async function enable(testbed: GuestTestbed, volume: Volume, enabled: boolean): Promise<void> {
  await Deno.writeTextFile(`${testbed.targetOf(volume.uuid)}/enable`, enabled ? "1" : "0");
  const count = enabled ? 1 : 0;
  await until(`namespace ${volume.uuid} has ${count} devices`, () => devicesWith(volume.uuid).length === count);
}

async function firstBytes(path: string): Promise<string> {
  return (await tool("dd", `if=${path}`, "bs=9", "count=1", "status=none", "iflag=nonblock")).replaceAll("\0", "");
}

export const scenario = of([
  {
    name: "promise 3: after two namespaces have swapped their device names, each target shows its own volume",
    async run(testbed) {
      const one = await testbed.volume({ use: "block" });
      const two = await testbed.volume({ use: "block" });
      await testbed.processes.ask("GET", "/settled");
      await one.stage();
      await two.stage();
      for (const volume of [one, two]) {
        await tool("sh", "-c", `printf ${volume.uuid.slice(0, 8)} | dd of=${volume.device} conv=fsync status=none`);
      }
      const names = [one.device, two.device];

      await enable(testbed, one, false);
      await enable(testbed, two, false);
      // The kernel gives the lowest free number to the first device that comes.
      if (names[0] === undefined || names[1] === undefined || names[0] < names[1]) {
        await enable(testbed, two, true);
        await enable(testbed, one, true);
      } else {
        await enable(testbed, one, true);
        await enable(testbed, two, true);
      }
      assert.deepEqual([one.device, two.device], names.toReversed());
      await one.publish();
      await two.publish();

      assert.equal(await firstBytes(one.target), one.uuid.slice(0, 8));
      assert.equal(await firstBytes(two.target), two.uuid.slice(0, 8));
      await one.end();
      await two.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "promise 2: a mount whose device went and came back under another name is unmounted and made again",
    async run(testbed) {
      const volume = await testbed.volume();
      const other = await testbed.volume({ use: "block" });
      await other.stage();
      await volume.stage();
      await volume.publish();
      await tool("sh", "-c", `echo kept >${volume.target}/file && sync -f ${volume.target}`);
      const before = volume.device;
      await enable(testbed, volume, false);
      await assertCallFails(() => volume.publish(10), "UNAVAILABLE", /Cannot find a block device of namespace/);
      await enable(testbed, volume, true);
      assert.notEqual(volume.device, before);

      const { volumeCondition } = await volume.stats();
      assert.equal(volumeCondition?.abnormal, true);
      assert.match(volumeCondition?.message ?? "", /has lost its device/);
      await volume.unpublish();
      await volume.stage();
      await volume.publish();

      assert.equal(await Deno.readTextFile(`${volume.target}/file`), "kept\n");
      await tool("sh", "-c", `echo more >${volume.target}/more && sync -f ${volume.target}`);
      await volume.end();
      await other.end();
      await testbed.nothingLeft();
    },
  },
  {
    name:
      "promise 4: a volume whose device is gone is unpublished and unstaged, file system and block, and nothing hangs",
    async run(testbed) {
      const keeper = await testbed.volume({ use: "block" });
      await keeper.stage();
      for (const use of ["ext4", "xfs", "block"] as const) {
        const volume = await testbed.volume({ use });
        await volume.stage();
        await volume.publish();
        if (use !== "block") await Deno.writeTextFile(`${volume.target}/unwritten`, "x".repeat(100_000));
        await enable(testbed, volume, false);

        await volume.unpublish(20);
        await volume.unstage(20);
        await volume.unpublish(20);
        await volume.unstage(20);

        assert.deepEqual(mountsBelow(volume.directory), []);
        await volume.revoke();
        await volume.delete();
      }
      await keeper.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "promise 4: access is taken away first, as when a pod is forced off: unstage still ends and leaves nothing",
    async run(testbed) {
      const keeper = await testbed.volume({ use: "block" });
      const volume = await testbed.volume({ use: "xfs" });
      await keeper.stage();
      await volume.stage();
      await volume.publish();
      await volume.revoke();
      await until("the device goes", () => devicesWith(volume.uuid).length === 0);

      await volume.unpublish(20);
      await volume.unstage(20);

      assert.deepEqual(mountsBelow(volume.directory), []);
      await keeper.unstage();
      assert.deepEqual(controllers(), []);
      await keeper.revoke();
      await keeper.delete();
      await volume.delete();
      await testbed.nothingLeft();
    },
  },
  {
    name: "promise 8: a connection that shows no namespace any more goes with the volume it was made for",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();
      await enable(testbed, volume, false);
      assert.equal(controllers().length, 2);

      await volume.unstage();

      assert.deepEqual(controllers(), []);
      await volume.revoke();
      await volume.delete();
      await testbed.nothingLeft();
    },
  },
  {
    name: "connections have the settings of lbcsi node, as sysfs shows them",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();

      for (const { name } of controllers()) {
        const at = (attribute: string) => read(`/sys/class/nvme/${name}/${attribute}`);
        assert.deepEqual(
          ["ctrl_loss_tmo", "reconnect_delay", "kato", "queue_count", "sqsize"].map(at),
          ["15", "1", "5", "2", "31"],
        );
      }
      await volume.end();
    },
  },
  {
    name: "promise 5: what users have left on the volume, or in its place, is there after unpublish and unstage",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await Deno.mkdir(`${volume.target}/a/b`, { recursive: true });
      await Deno.writeTextFile(`${volume.target}/a/b/file`, "on the volume");
      // Unmounted behind the driver's back, and written to what is there instead: the node's own disk.
      await tool("umount", volume.target);
      await Deno.writeTextFile(`${volume.target}/precious`, "on the root disk");

      await assertCallFails(
        () => volume.unpublish(),
        "FAILED_PRECONDITION",
        /it holds "precious", which are left alone/,
      );
      assert.equal(await Deno.readTextFile(`${volume.target}/precious`), "on the root disk");
      await Deno.remove(`${volume.target}/precious`);
      await volume.unpublish();
      await volume.unstage();

      await volume.stage();
      await volume.publish();
      assert.equal(await Deno.readTextFile(`${volume.target}/a/b/file`), "on the volume");
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "promise 6: a pod never gets the node's own disk: publish mends a staging path that lost its mount or device",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await Deno.writeTextFile(`${volume.staging}/kept`, "on the volume");
      await tool("umount", volume.staging);
      const own = `${volume.staging}/own`;
      await Deno.writeTextFile(own, "on the node's disk");
      await assertCallFails(
        () => volume.publish(),
        "FAILED_PRECONDITION",
        /staging path ".*" holds files of the node's own disk/,
      );
      await assert.rejects(Deno.stat(volume.target), Deno.errors.NotFound);
      await Deno.remove(own);
      await volume.publish();
      assert.equal(await Deno.readTextFile(`${volume.target}/kept`), "on the volume");
      await volume.unpublish();

      await enable(testbed, volume, false);
      await assertCallFails(() => volume.publish(10), "UNAVAILABLE", /Cannot find a block device of namespace/);
      await enable(testbed, volume, true);
      await volume.publish();
      assert.equal(await Deno.readTextFile(`${volume.target}/kept`), "on the volume");
      await Deno.writeTextFile(`${volume.target}/file`, "written");
      await volume.end();
      await testbed.nothingLeft();
    },
  },
]);

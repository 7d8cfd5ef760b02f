/**
 * Connections that are lost and come back, or do not. Measured on 6.1: a device without a path makes every reader and
 * writer wait in the kernel, umount(8) too, out of reach of any signal, until a path is back or ctrl_loss_tmo has passed.
 */
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
} from "../testbed.ts";

const take = (testbed: GuestTestbed, server: number, up: boolean) =>
  testbed.processes.ask("POST", `/paths/${up ? "up" : "down"}`, { server });
const states = () => controllers().map(({ state }) => state).join(" ");
const noneLive = () => controllers().length > 0 && controllers().every(({ state }) => state !== "live");

/** Processes that no signal ends, because their device has no path. */
async function stuck(): Promise<string> {
  const lines = (await tool("ps", "-eo", "state,args")).split("\n");
  return lines.filter((line) => /^D .*(mount|blkid|mkfs|nvme)/.test(line)).join("; ");
}

export const scenario = of([
  {
    name:
      "one lost path of two: I/O goes on, another volume is staged, and the path is made again when the kernel has given it up",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await take(testbed, 1, false);
      await until("a path is lost", () => states() !== "live live");
      await tool("dd", "if=/dev/zero", `of=${volume.target}/a`, "bs=1M", "count=4", "conv=fsync", "status=none");
      const other = await testbed.volume({ use: "block" });
      await other.stage();
      await until("the kernel gives the path up", () => controllers().length === 1, 60);

      await take(testbed, 1, true);
      await until("the path is made again", () => states() === "live live", 90);

      await take(testbed, 0, false);
      await until("the other path is lost", () => states() !== "live live");
      await tool("dd", "if=/dev/zero", `of=${volume.target}/b`, "bs=1M", "count=4", "conv=fsync", "status=none");
      await take(testbed, 0, true);
      await until("both paths are there", () => states() === "live live", 90);
      await other.end();
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "a dead address among two is a warning, and the volume is staged over the other",
    async run(testbed) {
      await take(testbed, 0, false);
      const volume = await testbed.volume();
      await volume.stage();

      assert.equal(states(), "live");
      assert.match(testbed.logOf("node"), /could not connect.*127\.0\.0\.1:4420: refused, nothing listens there/);
      await take(testbed, 0, true);
      await volume.stage();
      assert.equal(states(), "live live");
      await volume.end();
    },
  },
  {
    name: "no address answers, or none lets this host in: stage says of each why",
    async run(testbed) {
      const volume = await testbed.volume();
      for (const server of [0, 1]) await take(testbed, server, false);
      await assertCallFails(
        () => volume.stage(),
        "UNAVAILABLE",
        /took the connection \(127\.0\.0\.1:4420: refused, nothing listens there; 127\.0\.0\.2:4420: refused, nothing listens/,
      );
      for (const server of [0, 1]) await take(testbed, server, true);
      await volume.revoke();
      await testbed.processes.ask("GET", "/settled");

      await assertCallFails(
        () => volume.stage(),
        "UNAVAILABLE",
        /127\.0\.0\.1:4420: not allowed: the subsystem is unknown there or has no/,
      );
      await volume.grant();
      await volume.stage();
      await volume.end();
    },
  },
  {
    name: "promise 4: all paths are lost and come back: nothing hangs meanwhile, and what was written is on the volume",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await Deno.writeTextFile(`${volume.target}/unwritten`, "x".repeat(300_000));
      for (const server of [0, 1]) await take(testbed, server, false);
      await until("no path is live", noneLive);

      const { volumeCondition } = await volume.stats();
      assert.match(volumeCondition?.message ?? "", /no live path/);
      await assertCallFails(() => volume.publish(20), "UNAVAILABLE", /has no live path \(nvme\d+ \w+; nvme\d+ \w+\)/);
      await assertCallFails(() => volume.stage(20), "UNAVAILABLE", /no live path|took the connection/);
      await volume.unpublish(20);
      await assertCallFails(
        () => volume.unstage(20),
        "UNAVAILABLE",
        /has no live path .* what was not yet written waits for one/,
      );
      assert.equal(await stuck(), "");
      for (const server of [0, 1]) await take(testbed, server, true);
      await until("a path is live", () => states().includes("live"));
      await volume.unstage();

      await volume.stage();
      assert.equal((await Deno.readTextFile(`${volume.staging}/unwritten`)).length, 300_000);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name:
      "promise 25: all paths are lost until the kernel gives the devices up, and the next pods get their volumes without a stage",
    limitSeconds: 240,
    async run(testbed) {
      const volumes = [await testbed.volume(), await testbed.volume({ use: "block" })];
      for (const volume of volumes) {
        await volume.stage();
        await volume.publish();
      }
      const [mounted, block] = volumes;
      assert(mounted && block);
      await Deno.writeTextFile(`${mounted.target}/kept`, "by the first pod");
      await tool("sync", "-f", mounted.target);
      for (const server of [0, 1]) await take(testbed, server, false);
      const isGone = () => volumes.every(({ uuid }) => devicesWith(uuid).length === 0);
      await until("the kernel gives the devices up", isGone, 120);
      await assertCallFails(() => mounted.publish(20), "UNAVAILABLE", /took the connection|no block device/);
      for (const server of [0, 1]) await take(testbed, server, true);
      for (const volume of volumes) await volume.unpublish(20);

      for (const volume of volumes) await volume.publish();

      assert.equal(await Deno.readTextFile(`${mounted.target}/kept`), "by the first pod");
      await Deno.writeTextFile(`${mounted.target}/new`, "by the second pod");
      await tool("dd", "if=/dev/zero", `of=${block.target}`, "bs=4k", "count=1", "oflag=direct", "status=none");
      for (const volume of volumes) await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "all paths are inaccessible (ANA) while connected: nothing hangs, and it goes on afterwards",
    async run(testbed) {
      const ana = async (state: string) => {
        for (const server of [0, 1]) await testbed.processes.ask("POST", "/paths/ana", { server, state });
        const paths = [...Deno.readDirSync("/sys/block")].map(({ name }) => name).filter((name) =>
          /^nvme\d+c/.test(name)
        );
        await until(
          `all paths are ${state}`,
          () => paths.every((name) => read(`/sys/block/${name}/ana_state`) === state),
        );
      };
      const volume = await testbed.volume();
      await volume.stage();
      await ana("inaccessible");

      await assertCallFails(
        () => volume.publish(20),
        "UNAVAILABLE",
        /no live path \(nvme\d+ live, inaccessible; nvme\d+ live, inaccessible\)/,
      );
      await assertCallFails(() => volume.unstage(20), "UNAVAILABLE", /no live path/);
      await ana("optimized");

      await volume.publish();
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name:
      "promise 24: access is taken away while mounted: no write gets through, nothing hangs, and unstage succeeds in the end",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await Deno.writeTextFile(`${volume.target}/written`, "before");
      await tool("sync", "-f", volume.target);
      const content = testbed.contentOf(volume.uuid);
      await volume.revoke();
      await until("no path is live", noneLive);
      const fenced = Deno.statSync(content).mtime?.getTime();
      await Deno.writeTextFile(`${volume.target}/unwritten`, "after");

      await volume.unpublish(20);
      await assertCallFails(() => volume.unstage(20), "UNAVAILABLE", /has no live path/);
      assert.equal(await stuck(), "");
      await until("the kernel gives the device up", () => devicesWith(volume.uuid).length === 0, 90);
      await volume.unstage(20);

      assert.equal(Deno.statSync(content).mtime?.getTime(), fenced);
      assert.deepEqual(mountsBelow(volume.directory), []);
      await volume.grant();
      await volume.stage();
      assert.equal(await Deno.readTextFile(`${volume.staging}/written`), "before");
      await volume.end();
      await testbed.nothingLeft();
    },
  },
]);

/** PoseidonOS over the kernel's own NVMe/TCP: a subsystem for each export, and what happens to it when POS starts again. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { type Check, impatient, scenario as of } from "../scenario.ts";
import { assertCallFails, controllers, devicesWith, type GuestTestbed, names, read, tool, until } from "../testbed.ts";

/** Subsystems that POS has. */
async function subsystemNqns(testbed: GuestTestbed): Promise<readonly string[]> {
  const left = await testbed.processes.clusterWhenIdle(AbortSignal.timeout(30_000));
  return left["access"] ?? [];
}

const lives = (["ext4", "block"] as const).map((use): Check => ({
  name: `PoseidonOS: a volume with ${use} lives from creation to deletion, each call made twice, and leaves nothing`,
  async run(testbed) {
    const volume = await testbed.volume({ use });
    await volume.grant();
    const nqn = `nqn.2019-04.pos:lbcsi:${volume.uuid}:guest.node`;
    assert.equal(volume.publishContext["subsystem-nqn"], nqn);
    for (const call of [() => volume.stage(), () => volume.publish()]) {
      await call();
      await call();
    }
    assert.equal(read(`/sys/class/block/${volume.device.slice(5)}/device/subsysnqn`), nqn);
    const path = use === "block" ? volume.target : join(volume.target, "file");
    await Deno.writeTextFile(path, `text on ${use}`, { create: use !== "block" });
    await tool("sync", path);
    await assertCallFails(() => volume.grant("other.node"), "FAILED_PRECONDITION", /guest\.node has it/);
    const { usage } = await volume.stats();
    const total = Number(usage[0]?.total);
    assert(total > 0.8 * 2 ** 30 && total <= 2 ** 30, `${total} bytes`);

    for (
      const call of [() => volume.unpublish(), () => volume.unstage(), () => volume.revoke(), () => volume.grant()]
    ) {
      await call();
      await call();
    }
    assert.deepEqual([controllers(), devicesWith(volume.uuid)], [[], []]);
    await volume.stage();
    await volume.publish();
    const file = await Deno.open(path);
    const bytes = new Uint8Array(`text on ${use}`.length);
    await file.read(bytes);
    file.close();
    assert.equal(new TextDecoder().decode(bytes), `text on ${use}`);
    await volume.end();
    await testbed.nothingLeft();
  },
}));

export const scenario = of([
  ...lives,
  {
    name: "PoseidonOS, promise 24: when detaching returns the namespace is gone, mounted or not, and unstage succeeds",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await volume.revoke();
      assert.deepEqual(await subsystemNqns(testbed), []);
      await until("the device goes", () => devicesWith(volume.uuid).length === 0);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "PoseidonOS starts again and forgets its exports: attaching again brings the volume back with its data",
    async run(testbed) {
      const volume = await testbed.volume();
      await volume.stage();
      await volume.publish();
      await Deno.writeTextFile(`${volume.target}/file`, "kept");
      await tool("sync", "-f", volume.target);

      await testbed.processes.ask("POST", "/restart", {});
      assert.deepEqual(await subsystemNqns(testbed), []);
      // What an orchestrator does when the node has to use the volume again.
      await volume.grant();
      await until("the kernel is connected again", () => controllers().some(({ state }) => state === "live"), 60);
      await volume.stage();
      await volume.publish();

      assert.equal(await Deno.readTextFile(`${volume.target}/file`), "kept");
      await Deno.writeTextFile(`${volume.target}/another`, "written");
      await tool("sync", "-f", volume.target);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "PoseidonOS: 25 volumes come and go while another one is written and read, without an error or a lost byte",
    async run(testbed) {
      const busy = await testbed.volume();
      await busy.stage();
      await busy.publish();
      const messages = (await tool("dmesg")).length;
      let rounds = 0;
      let ended = false;
      const block = crypto.getRandomValues(new Uint8Array(65_536));
      const io = (async () => {
        while (!ended) {
          const path = join(busy.target, `file-${rounds % 16}`);
          block[0] = rounds % 256;
          const file = await Deno.open(path, { create: true, write: true, truncate: true });
          await file.write(block);
          await file.sync();
          file.close();
          const [found] = await Deno.readFile(path);
          assert.equal(found, rounds % 256);
          rounds++;
          // The emulated processor is for the others too.
          await new Promise((resolve) => setTimeout(resolve, 200));
        }
      })();
      const churn = async () => {
        for (let count = 0; count < 5; count++) {
          const volume = await testbed.volume({ use: "block" }, count % 5 === 0);
          if (count % 5 === 0) await volume.revoke();
          await volume.delete();
        }
      };
      // A failing writer ends it at once.
      await Promise.race([io, Promise.all(Array.from({ length: 5 }, churn))]);
      ended = true;
      await io;

      assert(rounds > 5, `${rounds} rounds`);
      testbed.measured("writes and reads while 25 volumes came and went", String(rounds));
      for (const name of names(busy.target).filter((name) => name.startsWith("file-"))) {
        const bytes = await Deno.readFile(join(busy.target, name));
        assert.deepEqual(bytes.subarray(1), block.subarray(1), name);
      }
      assert.doesNotMatch((await tool("dmesg")).slice(messages), /I\/O error/);
      await busy.end();
      await testbed.nothingLeft();
    },
  },
], { ...impatient, backend: "poseidon" });

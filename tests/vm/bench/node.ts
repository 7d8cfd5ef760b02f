/** What the node's calls cost over real NVMe/TCP, in time and in commands; the emulated machine is slow, compare one run. */
import { type Check, scenario as of } from "../scenario.ts";
import { devicesWith, type GuestTestbed, until, type VmVolumeRequest, type Volume } from "../testbed.ts";

const median = (times: readonly number[]) => [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)] ?? 0;
const rounds = 5;

async function timed(work: () => Promise<unknown>): Promise<number> {
  const started = performance.now();
  await work();
  return performance.now() - started;
}

/** Commands of the last NodeStageVolume in the node's log, with their times. */
function commandsOf(testbed: GuestTestbed, volume: Volume): string {
  const lines = testbed.logOf("node").split("\n").filter((line) => line.includes(volume.uuid)).flatMap((line) => {
    const { event, rpc, call, command, ms } = JSON.parse(line);
    return rpc === "NodeStageVolume" && /^ran a/.test(event) ? [{ call, command, ms }] : [];
  });
  const last = Math.max(...lines.map(({ call }) => call));
  return lines.filter(({ call }) => call === last).map(({ command, ms }) => `${command.split(" ")[0]} ${ms} ms`).join(
    ", ",
  );
}

function staging(what: string, request: VmVolumeRequest, known: boolean): Check {
  return {
    name: `NodeStageVolume, ${what}, connections there`,
    limitSeconds: 300,
    async run(testbed) {
      const keeper = await testbed.volume({ use: "block" });
      await keeper.stage();
      const times: number[] = [];
      let commands = "";
      for (let round = 0; round < rounds; round++) {
        const volume = await testbed.volume(request);
        await until("the device", () => devicesWith(volume.uuid).length === 1);
        if (known) {
          await volume.stage();
          await volume.unstage();
        }
        times.push(await timed(() => volume.stage()));
        commands = commandsOf(testbed, volume);
        await volume.end();
      }
      await keeper.end();
      testbed.measured(what, `median of ${rounds}: ${median(times).toFixed(0)} ms; commands: ${commands || "none"}`);
    },
  };
}

export const scenario = of([
  staging("block", { use: "block" }, false),
  staging("new ext4", { use: "ext4" }, false),
  staging("existing ext4", { use: "ext4" }, true),
  {
    name:
      "NodeStageVolume of a block volume with two connections to make, and from the device's arrival to a mounted ext4",
    limitSeconds: 300,
    async run(testbed) {
      const block = await testbed.volume({ use: "block" });
      await testbed.processes.ask("GET", "/settled");
      testbed.measured("block, nothing connected", `${(await timed(() => block.stage())).toFixed(0)} ms`);
      const volume = await testbed.volume({ use: "ext4" });
      await until("the device", () => devicesWith(volume.uuid).length === 1);
      await volume.stage();
      await volume.unstage();
      const enable = `${testbed.targetOf(volume.uuid)}/enable`;
      await Deno.writeTextFile(enable, "0");
      await until("the device goes", () => devicesWith(volume.uuid).length === 0);
      const staged = volume.stage();
      await until("the driver waits", () => testbed.logOf("node").includes("ns-rescan"));
      await Deno.writeTextFile(enable, "1");
      await until("the device comes", () => devicesWith(volume.uuid).length === 1);
      testbed.measured("existing ext4, arrival to mount", `${(await timed(() => staged)).toFixed(0)} ms`);
      await volume.end();
      await block.end();
    },
  },
  {
    name: "20 new ext4 volumes are staged at once",
    limitSeconds: 600,
    async run(testbed) {
      const volumes: Volume[] = [];
      for (let number = 0; number < 20; number++) volumes.push(await testbed.volume({ use: "ext4" }));
      const all = await timed(() => Promise.all(volumes.map((volume) => volume.stage(300))));
      testbed.measured("20 new ext4 at once", `${all.toFixed(0)} ms in all, ${(all / 20).toFixed(0)} ms each`);
      for (const volume of volumes) await volume.end();
    },
  },
  {
    name: "NodeStageVolume with host encryption, of a new and of an existing ext4",
    limitSeconds: 300,
    async run(testbed) {
      const volume = await testbed.volume({ parameters: { "host-encryption": "enabled" } });
      volume.stageSecrets = { "host-encryption-passphrase": "one of the benchmark" };
      const made = await timed(() => volume.stage());
      await volume.unstage();
      const opened = await timed(() => volume.stage());
      testbed.measured("host encryption", `new ${made.toFixed(0)} ms, existing ${opened.toFixed(0)} ms`);
      await volume.end();
    },
  },
]);

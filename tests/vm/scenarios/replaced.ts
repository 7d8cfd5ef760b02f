/** The end of the node's process, in order or killed, and a power cut of the machine. */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { Scenario } from "../scenario.ts";
import { capabilityOf, controllers, type GuestTestbed, mountsBelow, read, tool, until, Volume } from "../testbed.ts";

/** Writes and syncs without end, and notes when each write was done; the emulated processor is for the others too. */
function writer(path: string, notes: string): Deno.ChildProcess {
  const script = `
    while dd if=/dev/zero of=$1 bs=4k count=1 conv=fsync,notrunc status=none; do
      read -r now _ </proc/uptime; echo $now; sleep 0.1
    done >$2 2>&1
    echo FAILED >>$2`;
  return new Deno.Command("sh", { args: ["-c", script, "writer", path, notes], stdin: "null" }).spawn();
}

const saved = "/disk/volumes.json";

interface Saved {
  readonly id: string;
  readonly context: Record<string, string>;
  readonly directory: string;
  readonly use: "ext4" | "xfs" | "block";
  readonly publishContext: Record<string, string>;
  /** Whether a pod uses it again after the reboot. */
  readonly again: boolean;
}

function load(): readonly Saved[] {
  return JSON.parse(Deno.readTextFileSync(saved));
}

function volumeOf(testbed: GuestTestbed, { id, context, directory, use, publishContext }: Saved): Volume {
  const volume = new Volume(testbed, { id, context, directory, capability: capabilityOf(use) });
  volume.publishContext = publishContext;
  return volume;
}

export const scenario: Scenario = {
  start: { onDisk: true },
  boots: [
    [
      {
        name: "promise 23: the node is stopped, killed and started while a pod writes: no error and no stall",
        async run(testbed) {
          const volume = await testbed.volume();
          await volume.stage();
          await volume.publish();
          const notes = join(testbed.home, "writes");
          const writing = writer(`${volume.target}/file`, notes);
          const times = () => (read(notes) ?? "").split("\n").filter((line) => line !== "").map(Number);
          const before = controllers();
          await until("it writes", () => times().length > 10);
          const undisturbed = times().length;
          for (const signal of ["SIGTERM", "SIGKILL"] as const) {
            await testbed.processes.running("node")?.end(signal, 30_000);
            const then = times().length;
            await until("it writes without a node", () => times().length > then + 10);
            await testbed.startNode();
          }
          await volume.stage();
          await volume.publish();
          const then = times().length;
          await until("it writes with the new node", () => times().length > then + 10);
          assert.deepEqual(controllers(), before);
          const all = times();
          writing.kill("SIGKILL");
          await writing.status;

          assert(all.every((time) => time > 0), "a write failed");
          const gaps = all.slice(1).map((time, at) => time - (all[at] ?? 0));
          const longest = Math.max(...gaps.slice(undisturbed));
          testbed.measured("longest pause of a writer", `${longest.toFixed(2)} s in ${all.length} writes`);
          assert(longest < 5, `a pause of ${longest} s`);
          await volume.unpublish();
          await volume.unstage();
          await volume.end();
          await testbed.nothingLeft();
        },
      },
      {
        name: "promise 4: volumes are in use when the machine loses its power",
        async run(testbed) {
          const volumes: Saved[] = [];
          for (const use of ["ext4", "xfs", "block"] as const) {
            for (const again of [true, false]) {
              const volume = await testbed.volume({ use });
              await volume.stage();
              await volume.publish();
              if (use !== "block") {
                await Deno.writeTextFile(`${volume.target}/file`, use);
                await tool("sync", "-f", volume.target);
              }
              assert.equal(mountsBelow(volume.directory).length, use === "block" ? 1 : 2);
              const { id, context, directory, publishContext } = volume;
              volumes.push({ id, context, directory, publishContext, use, again });
            }
          }
          await Deno.writeTextFile(saved, JSON.stringify(volumes));
        },
      },
    ],
    [
      {
        name: "promise 4: after the reboot, volumes that were in use are staged and published again with their data",
        async run(testbed) {
          for (const known of load().filter(({ again }) => again)) {
            const volume = volumeOf(testbed, known);
            await volume.stage();
            await volume.publish();
            if (known.use !== "block") assert.equal(await Deno.readTextFile(`${volume.target}/file`), known.use);
            await volume.end();
          }
        },
      },
      {
        name: "promise 4: after the reboot, volumes that are not staged again are unpublished and unstaged",
        async run(testbed) {
          for (const known of load().filter(({ again }) => !again)) await volumeOf(testbed, known).end();
          await testbed.nothingLeft();
          assert.deepEqual(mountsBelow("/disk/volumes"), []);
        },
      },
    ],
  ],
};

/**
 * `lbcsi discovery-client` against the kernel's target: log pages, referrals, letting go. What it is told is written as
 * LightOS' documentation has it, not by the driver.
 */
import assert from "node:assert/strict";
import { basename, dirname, join } from "node:path";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Check, Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import { controllers, deviceOf, devicesWith, names, program, read, tool, until, type World } from "../world.ts";

const us = hostNqn("guest.node");
/** Seconds; on a quiet machine none of the waits takes 15. */
const patience = 90;

/** `127.0.0.1:4421 live`, by port; discovery connections begin with `discovery`. */
function states(): readonly string[] {
  return controllers().map(({ name, address, state }) => {
    const port = /trsvcid=(\d+)/.exec(address)?.[1];
    const isDiscovery = read(`/sys/class/nvme/${name}/cntrltype`) === "discovery";
    return `${isDiscovery ? "discovery " : ""}${port} ${state}`;
  }).sort();
}

async function statesAre(...wanted: readonly string[]): Promise<void> {
  let seen: readonly string[] = [];
  const isSo = () => (seen = states()).join() === wanted.join();
  await until(`connections ${wanted.join(", ")}`, isSo, patience).catch((error) => {
    throw new Error(`${error.message}; there are ${seen.join(", ")}`);
  });
}

class Daemon implements AsyncDisposable {
  readonly directory: string;
  readonly log: string;
  #process: Deno.ChildProcess | undefined;

  constructor(world: World) {
    this.directory = join(world.home, `discovery-${crypto.randomUUID().slice(0, 8)}`);
    this.log = `${this.directory}.log`;
  }

  async start(): Promise<void> {
    const args = [...program, "discovery-client", "--discovery-dir", this.directory, "--poll", "1"];
    const begin = this.said().length;
    // The shell opens the log: it has to go on when nobody reads from a pipe.
    const script = `log=$1; shift; exec "$@" 2>>"$log"`;
    this.#process = new Deno.Command("sh", {
      args: ["-c", script, "sh", this.log, ...args],
      stdin: "null",
      stdout: "null",
    }).spawn();
    await until("the daemon watches", () => this.said().slice(begin).includes('"watches"'), 180);
    await until(
      "it has its directory",
      () => names(dirname(this.directory)).includes(basename(this.directory)),
      patience,
    );
  }

  /** What the daemons of this boot have logged. */
  said(): string {
    return read(this.log) ?? "";
  }

  async stop(signal: "SIGTERM" | "SIGKILL"): Promise<number> {
    this.#process?.kill(signal);
    const status = await this.#process?.status;
    this.#process = undefined;
    return status?.code ?? -1;
  }

  /** Written elsewhere and renamed, as the documentation wants it. */
  async told(name: string, ...lines: readonly string[]): Promise<void> {
    const temporary = join(this.directory, `tmp.dc.${name}`);
    await Deno.writeTextFile(temporary, lines.map((line) => `${line}\n`).join(""));
    await Deno.rename(temporary, join(this.directory, name));
  }

  untold(name: string): Promise<void> {
    return Deno.remove(join(this.directory, name));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#process !== undefined) await this.stop("SIGKILL");
    await Deno.remove(this.directory, { recursive: true }).catch(() => {});
  }
}

const line = (target: Target, port = 4421) => `-t tcp -a 127.0.0.1 -s ${port} -q ${us} -n ${target.nqn}`;

const checks: readonly Check[] = [
  {
    name: "the daemon connects what log pages and referrals list, follows them, and lets go when the file goes",
    limitSeconds: 900,
    async run(world) {
      await using target = new Target(world.home, [us]);
      await using daemon = new Daemon(world);
      target.offer(1);
      target.offer(2);
      await daemon.start();
      assert.deepEqual(states(), []);

      let begin = performance.now();
      await daemon.told("volume", "# as documented", line(target), `${line(target)} # twice`);
      await statesAre("4421 live", "discovery 4421 live");
      world.measured("from the file to a device", `${Math.round(performance.now() - begin)} ms`);
      await until("its device", () => devicesWith(target.uuid).length === 1, patience);
      target.refer(1, 2);
      begin = performance.now();
      await statesAre("4421 live", "4422 live", "discovery 4421 live", "discovery 4422 live");
      world.measured("from a new referral to a second path", `${Math.round(performance.now() - begin)} ms`);
      target.offer(3);
      target.refer(2, 3);
      target.refer(3, 1);
      const whole = ["4421 live", "4422 live", "4423 live"];
      await statesAre(...whole, ...whole.map((state) => `discovery ${state}`));
      assert.equal(await daemon.stop("SIGTERM"), 0);
      assert.equal(states().length, 6);

      await daemon.start();
      await daemon.untold("volume");
      await statesAre();
      assert.deepEqual(devicesWith(target.uuid), []);
    },
  },
  {
    name: "the daemon keeps a device that is mounted, in a container too, and lets go after the umount",
    limitSeconds: 900,
    async run(world) {
      await using target = new Target(world.home, [us]);
      await using daemon = new Daemon(world);
      target.offer(1);
      await daemon.start();
      await daemon.told("volume", line(target));
      await statesAre("4421 live", "discovery 4421 live");
      await until("its device", () => devicesWith(target.uuid).length === 1, patience);
      const device = deviceOf(target.uuid);
      await tool("mkfs.ext4", "-q", device);
      const place = join(world.home, "mnt");
      await Deno.mkdir(place);
      const hidden = new Deno.Command("unshare", {
        args: [
          "--mount",
          "--propagation",
          "private",
          "sh",
          "-c",
          `mount ${device} ${place} && echo in && read -r line`,
        ],
        stdin: "piped",
        stdout: "piped",
      }).spawn();
      await hidden.stdout.getReader().read();

      await daemon.untold("volume");
      await until(
        "it says why",
        () => daemon.said().includes(`is in use by the mount at \\"${place}\\" of process`),
        patience,
      );
      assert.ok(states().includes("4421 live"));
      await hidden.stdin.close();
      await hidden.status;

      await statesAre();
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

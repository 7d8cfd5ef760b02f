/**
 * `lbcsi discovery-client` against the kernel's target: log pages, referrals, paths that go and come back, a daemon that is
 * killed under I/O. Its input files are written as LightOS' documentation has it, not by the driver.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Check, Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import { controllers, deviceOf, devicesWith, type GuestTestbed, program, read, tool, until } from "../testbed.ts";

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

async function statesAre(...expected: readonly string[]): Promise<void> {
  let seen: readonly string[] = [];
  const isSo = () => (seen = states()).join() === expected.join();
  await until(`connections ${expected.join(", ")}`, isSo, patience).catch((error) => {
    throw new Error(`${error.message}; there are ${seen.join(", ")}`);
  });
}

class Daemon implements AsyncDisposable {
  readonly directory: string;
  readonly log: string;
  #process: Deno.ChildProcess | undefined;

  constructor(testbed: GuestTestbed) {
    this.directory = join(testbed.home, `discovery-${crypto.randomUUID().slice(0, 8)}`);
    this.log = `${this.directory}.log`;
  }

  async start(): Promise<void> {
    const args = [...program, "discovery-client", "--discovery-dir", this.directory, "--poll", "1"];
    const begin = this.said().length;
    await Deno.mkdir(this.directory, { recursive: true });
    // The shell opens the log: it has to go on when no process reads from a pipe.
    const script = `log=$1; shift; exec "$@" 2>>"$log"`;
    this.#process = new Deno.Command("sh", {
      args: ["-c", script, "sh", this.log, ...args],
      stdin: "null",
      stdout: "null",
    }).spawn();
    await until("the daemon watches", () => this.said().slice(begin).includes('"watches"'), 180);
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

  /** Written elsewhere and renamed, as the documentation requires. */
  async writeFile(name: string, ...lines: readonly string[]): Promise<void> {
    const temporary = join(this.directory, `tmp.dc.${name}`);
    await Deno.writeTextFile(temporary, lines.map((line) => `${line}\n`).join(""));
    await Deno.rename(temporary, join(this.directory, name));
  }

  removeFile(name: string): Promise<void> {
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
    name: "the daemon connects what log pages and referrals list, follows them, and disconnects when the file goes",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      await using daemon = new Daemon(testbed);
      target.offer(1);
      target.offer(2);
      await daemon.start();
      assert.deepEqual(states(), []);

      let begin = performance.now();
      await daemon.writeFile("volume", "# as documented", line(target), `${line(target)} # twice`);
      await statesAre("4421 live", "discovery 4421 live");
      testbed.measured("from the file to a device", `${Math.round(performance.now() - begin)} ms`);
      await until("its device", () => devicesWith(target.uuid).length === 1, patience);
      target.refer(1, 2);
      begin = performance.now();
      await statesAre("4421 live", "4422 live", "discovery 4421 live", "discovery 4422 live");
      testbed.measured("from a new referral to a second path", `${Math.round(performance.now() - begin)} ms`);
      target.offer(3);
      target.refer(2, 3);
      target.refer(3, 1);
      const whole = ["4421 live", "4422 live", "4423 live"];
      await statesAre(...whole, ...whole.map((state) => `discovery ${state}`));
      assert.equal(await daemon.stop("SIGTERM"), 0);
      assert.equal(states().length, 6);

      await daemon.start();
      await daemon.removeFile("volume");
      await statesAre();
      assert.deepEqual(devicesWith(target.uuid), []);
    },
  },
  {
    name: "the daemon keeps a device that is mounted, in a container too, and disconnects it after the umount",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      await using daemon = new Daemon(testbed);
      target.offer(1);
      await daemon.start();
      await daemon.writeFile("volume", line(target));
      await statesAre("4421 live", "discovery 4421 live");
      await until("its device", () => devicesWith(target.uuid).length === 1, patience);
      const device = deviceOf(target.uuid);
      await tool("mkfs.ext4", "-q", device);
      const place = join(testbed.home, "mnt");
      await Deno.mkdir(place, { recursive: true });
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

      await daemon.removeFile("volume");
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
  {
    name: "promise 23: I/O goes on while a path is down and back, and while the daemon is killed and started again",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      await using daemon = new Daemon(testbed);
      target.offer(1);
      target.offer(2);
      await daemon.start();
      await daemon.writeFile("one", line(target, 4421));
      await daemon.writeFile("two", line(target, 4422));
      const all = ["4421 live", "4422 live", "discovery 4421 live", "discovery 4422 live"];
      await statesAre(...all);
      await until("its device", () => devicesWith(target.uuid).length === 1, patience);
      const device = deviceOf(target.uuid);
      const before = controllers().map(({ name }) => name);
      // Writes and reads back blocks until its file is removed; the first error ends it too.
      const go = join(testbed.home, "go");
      await Deno.writeTextFile(go, "");
      const script = `n=0; while [ -e ${go} ]; do
        n=$((n + 1)); printf 'block %010d' $n | dd of=${device} bs=4096 seek=$((n % 1000)) oflag=direct conv=sync status=none || exit 1
        dd if=${device} bs=4096 skip=$((n % 1000)) count=1 iflag=direct status=none | grep -aqF "block $(printf %010d $n)" || exit 2
        echo $n >${testbed.home}/count
        sleep 0.1
      done`;
      const writer = new Deno.Command("sh", { args: ["-c", script], stderr: "inherit" }).spawn();
      const count = () => Number(read(`${testbed.home}/count`) ?? 0);
      const goesOn = async (what: string) => {
        const from = count();
        await until(`I/O goes on ${what}`, () => count() > from + 5, patience);
      };
      await goesOn("at first");

      await daemon.stop("SIGKILL");
      await goesOn("without the daemon");
      await daemon.start();
      await until("it has looked", () => daemon.said().match(/"read a log page"/g)?.length === 4, patience);
      assert.deepEqual(controllers().map(({ name }) => name), before);
      target.withdraw(2);
      await until("the path is down", () => states().some((state) => /^4422 (?!live)/.test(state)), patience);
      await goesOn("with one path");
      target.offer(2);
      const begin = performance.now();
      await statesAre(...all);
      testbed.measured("from the way back to the path back", `${Math.round(performance.now() - begin)} ms`);
      await goesOn("with both");
      await Deno.remove(go);

      assert.equal((await writer.status).code, 0);
      testbed.measured("blocks written and read back", String(count()));
    },
  },
  {
    name: "the daemon lives with files that are half, bad, empty, and with a target that refuses",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      await using daemon = new Daemon(testbed);
      target.offer(1);
      await daemon.start();
      const path = join(daemon.directory, "half");
      const text = line(target);
      await Deno.writeTextFile(path, text.slice(0, -4));
      await daemon.writeFile("bad", "-t rdma -x");
      await daemon.writeFile("empty");
      await daemon.writeFile("refused", `-t tcp -a 127.0.0.1 -s 4499 -q ${us} -n ${target.nqn}`);
      await until("all is said", () => {
        const log = daemon.said();
        return log.includes('"refused a file"') && log.includes("refused, nothing listens there");
      }, patience);
      await Deno.writeTextFile(path, `${text}\n`);

      await statesAre("4421 live", "discovery 4421 live");
      // nvme-cli 2.3 makes one discovery connection to an address, whatever the host NQN; 2.13 one for each host NQN.
      await daemon.writeFile("stranger", `-t tcp -a 127.0.0.1 -s 4421 -q ${us}x -n ${target.nqn}`);
      const words = `is connected there as host ${us}, disconnect it first`;
      const theirs = () => controllers().filter((controller) => controller.hostNqn === `${us}x`);
      await until(
        "it says who has the address, or is connected beside it",
        () => daemon.said().includes(words) || theirs().some(({ state }) => state === "live"),
        patience,
      );
      assert.equal(await daemon.stop("SIGTERM"), 0);
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

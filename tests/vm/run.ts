/**
 * `deno task test:vm`: boots virtual machines with the real NVMe/TCP initiator and target of the Linux kernel, runs the
 * real program in them, and tells of each check whether it holds. Needs root and packages of Debian, which it names.
 *
 *   --only TEXT      checks whose name, or whose file in scenarios/, has TEXT in it
 *   --suite SUITE    Debian release of the guest: bookworm (kernel 6.1, nvme-cli 2.3; default) or trixie (6.12, 2.13)
 *   --keep           leave the folder of the run: the kernel's messages, the logs of the program, the disk
 *   --bench          measure instead: the files of bench/
 *   --list           name the checks
 *   --jobs COUNT     guests at the same time, default 2
 *
 * The guest's image is built when it is missing or its inputs have changed, in $LBCSI_VM_CACHE (default
 * ~/.cache/lbcsi-vm), 300 MB per suite, and so is QEMU, 170 MB. What a guest with a failed check said follows at its end,
 * with the last of its kernel's messages. Exit status: 0 all passed, 1 some failed, 2 bad options or something is missing.
 */
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { Testbed } from "../../lib/demo/testbed.ts";
import { type Code, codeAt } from "./code.ts";
import { boot, lastWords } from "./guest.ts";
import { type Item, lay, remaining } from "./queue.ts";
import { type Check, type Report, reportMark, type Scenario } from "./scenario.ts";

const here = fileURLToPath(new URL(".", import.meta.url));
const repository = join(here, "../..");
// Guests with more processors than there are cores for them wait for one another's locks.
const mostProcessors = 2;
// A guest is given up after this. On two cores one lives for 5 minutes; a machine may be several times as slow.
const bootLimitSeconds = 2400;

const { values: options } = parseArgs({
  args: Deno.args,
  options: {
    only: { type: "string" },
    suite: { type: "string", default: "bookworm" },
    keep: { type: "boolean", default: false },
    bench: { type: "boolean", default: false },
    list: { type: "boolean", default: false },
    jobs: { type: "string", default: "2" },
  },
});

const jobs = Number(options.jobs);
if (!Number.isInteger(jobs) || jobs < 1) {
  console.error(`--jobs "${options.jobs}": is not a whole number from 1 up`);
  Deno.exit(2);
}
const processors = Math.min(mostProcessors, Math.max(1, Math.floor(navigator.hardwareConcurrency / jobs)));
const folder = options.bench ? "bench" : "scenarios";
/** What guests of one kind run. */
interface Plan {
  /** Items of each boot; guests share them. */
  readonly boots: readonly (readonly Item[])[];
  /** Whether the guest sees the root file system of the image. */
  readonly image: boolean;
  /** Whether it takes a guest of its own. */
  readonly own: boolean;
}

/**
 * What is to run: most checks are of one plan, whose guests are any number. A scenario of several boots, which look at what
 * earlier ones have left, has a guest of its own, and so has one that mounts over the directories of the others.
 */
async function load(): Promise<readonly Plan[]> {
  const own: Plan[] = [];
  const groups = new Map<string, Item[]>();
  for (const file of await scenarioFiles()) {
    const { scenario }: { scenario: Scenario } = await import(new URL(`./${folder}/${file}`, import.meta.url).href);
    const { boots, start } = scenario;
    const { only } = options;
    const wanted = ({ name }: Check) => only === undefined || file.includes(only) || name.includes(only);
    if (!boots.flat().some(wanted)) continue;
    const image = start?.image === true;
    const itemsOf = (checks: readonly Check[], group: number): Item[] =>
      checks.map(({ name }) => ({ group, file: bundleOf(file), name }));
    if (boots.length > 1) {
      own.push({ boots: boots.map((checks) => itemsOf(checks, 0)), image, own: true });
      continue;
    }
    const checks = boots.flat().filter(wanted);
    if (image) {
      own.push({ boots: [itemsOf(checks, 0)], image, own: true });
      continue;
    }
    const key = JSON.stringify(start) ?? "";
    const group = groups.get(key) ?? [];
    groups.set(key, group);
    group.push(...itemsOf(checks, [...groups.keys()].indexOf(key)));
  }
  // The largest group last: its many short checks are what guests share out evenly in the end.
  const shared = [...groups.values()].sort((one, other) => one.length - other.length).flat();
  return shared.length === 0 ? own : [...own, { boots: [shared], image: false, own: false }];
}

async function scenarioFiles(): Promise<readonly string[]> {
  const names = await Array.fromAsync(Deno.readDir(join(here, folder)), ({ name }) => name);
  return names.filter((name) => name.endsWith(".ts")).sort();
}

/** Where the bundle of a file is, below the folder of inside.js. */
function bundleOf(file: string): string {
  return `${folder}/${file.replace(/ts$/, "js")}`;
}

const packages: Readonly<Record<string, string>> = {
  mmdebstrap: "mmdebstrap",
  cpio: "cpio",
  "mkfs.ext4": "e2fsprogs",
  depmod: "kmod",
  xz: "xz-utils",
  lz4: "lz4",
  zstd: "zstd",
  setpriv: "util-linux",
};

function refuseMissing(): void {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  const isThere = (program: string) =>
    path.some((directory) => {
      try {
        return Deno.statSync(join(directory, program)).isFile;
      } catch {
        return false;
      }
    });
  const missing = Object.keys(packages).filter((program) => !isThere(program)).map((program) => packages[program]);
  if (missing.length > 0) {
    console.error(
      `This needs packages: apt-get install -y --no-install-recommends ${[...new Set(missing)].sort().join(" ")}`,
    );
    Deno.exit(2);
  }
  if (Deno.build.os !== "linux" || Deno.build.arch !== "x86_64" || Deno.uid() !== 0) {
    console.error("This needs root on Linux with Debian's apt, x86_64");
    Deno.exit(2);
  }
}

async function command(program: string, args: readonly string[]): Promise<void> {
  const done = await new Deno.Command(program, { args: [...args], cwd: repository, stdin: "null", stdout: "null" })
    .spawn().status;
  if (!done.success) throw new Error(`Cannot go on: ${program} ${args.join(" ")} exits ${done.code}`);
}

/** What the guest does. */
function commandFor(code: Code, boot: number): string {
  return `
exec 2>&1
mkdir -p /disk
export DENO_DIR=/tmp/deno NO_COLOR=1 DENO_NO_UPDATE_CHECK=1 PATH=/deno-bin:$PATH LBCSI_VM_CODE=${code.directory}
cp -r ${code.cache} $DENO_DIR
if [ -b /dev/vdb ]; then
  blkid -p /dev/vdb >/dev/null || mkfs.ext4 -q /dev/vdb
  mount /dev/vdb /disk
fi
deno ${code.checks.join(" ")} /queue ${boot}
status=$?
[ ! -b /dev/vdb ] || sync -f /disk
exit $status
`;
}

interface Counted {
  readonly passed: number;
  readonly failed: number;
}

/** Makes the bundles, and runs each part of them once: so its bytecode gets into the cache. */
async function makeCode(code: Code): Promise<void> {
  const bundle = ["bundle", "--quiet", "--code-splitting", "--outdir"];
  // All files, whichever are to run: with one alone the folders would be others.
  const files = await scenarioFiles();
  await Promise.all([
    command(Deno.execPath(), [...bundle, code.programDir, "main.ts"]),
    command(Deno.execPath(), [
      ...[...bundle, code.checksDir, join(here, "inside.ts")],
      ...files.map((name) => join(here, folder, name)),
    ]),
  ]);
  const deno = ["env", `DENO_DIR=${code.cache}`, "NO_COLOR=1", Deno.execPath()];
  const [env = "", ...words] = deno;
  await command(env, [...words, ...code.checks, "--load", ...files.map(bundleOf)]);
  // How these end tells of this machine, where they find nothing.
  const lbcsi = async (...args: readonly string[]) =>
    void await new Deno.Command(env, { args: [...words, ...code.program, ...args], stdin: "null" }).output();
  const us = ["--node-id", "host.node"];
  await lbcsi("list");
  await lbcsi("doctor", "--checks", "machine", "--json");
  await lbcsi("detach", ...us, "--uuid", crypto.randomUUID(), "--nqn", "nqn.2019-09.org.example:nobody");
  for (const backend of ["lightos", "poseidon"] as const) {
    const program = [...deno, ...code.program];
    const processes = new Testbed(await Deno.makeTempDir({ prefix: "lbcsi-vm-" }), program, { backend });
    const signal = AbortSignal.timeout(60_000);
    try {
      await processes.startSimulator("none", signal, backend === "lightos" ? ["--schemes", "grpc"] : []);
      await Promise.all([
        processes.startController(signal),
        processes.startNode("host.node", signal, {}, ["--attach", "direct"]),
      ]);
      if (backend === "poseidon") continue;
      const token = join(processes.home, "token");
      await Deno.writeTextFile(token, processes.secrets["jwt"] ?? "");
      const id = `mgmt:${processes.addresses.grpc.join(",")}|nguid:${crypto.randomUUID()}|proj:default|scheme:grpc`;
      await lbcsi("detach", ...us, id, "--jwt-path", token);
    } finally {
      await processes.cleanUp(false);
    }
  }
}

/** What all guests of a run share. */
interface Run {
  readonly imageDir: string;
  readonly emulatorDir: string;
  readonly code: Code;
  /** The root file system of the node's image, which is still being made. */
  readonly rootDir: string;
  readonly rootReady: Promise<void>;
  /** Where guests have their files. */
  readonly directory: string;
  readonly stop: AbortSignal;
  guests: number;
}

/** A queue with guests on it. */
interface Work {
  readonly queueDir: string;
  readonly items: readonly Item[];
  /** Names of checks of which guests have told how they ended. */
  readonly told: Set<string>;
  readonly boot: number;
  readonly image: boolean;
  /** A disk that outlives the boot. */
  readonly diskFile: string | undefined;
  /** Guests that will soon take a check. */
  starting: number;
  /** How the last guest ended. */
  ended: string;
}

/** Boots a guest for a queue, and counts what it tells of its checks. */
async function bootFor(work: Work, run: Run): Promise<Counted & { begun: number }> {
  const { imageDir, emulatorDir, code, rootDir, stop } = run;
  const runDir = join(run.directory, `guest${++run.guests}`);
  await Deno.mkdir(runDir);
  let [begun, passed, failed] = [0, 0, 0];
  let current: string | undefined;
  const chatter: string[] = [];
  const give = (name: string, problem: string) => {
    failed++;
    current = undefined;
    work.told.add(name);
    console.log(`FAILED ${name}\n${problem.replace(/^/gm, "    ")}`);
  };
  const onLine = (line: string) => {
    const at = line.indexOf(reportMark);
    if (at < 0) return void chatter.push(line);
    const report: Report = JSON.parse(line.slice(at + reportMark.length));
    if (report.event === "begins") {
      if (begun++ === 0) work.starting--;
      current = report.name;
    }
    if (report.event === "measured") console.log(`   ${report.name}: ${report.text}`);
    if (report.event === "passed") {
      passed++;
      current = undefined;
      work.told.add(report.name);
      console.log(`ok ${report.name} (${(report.ms / 1000).toFixed(1)} s)`);
    }
    if (report.event === "failed") give(report.name, report.problem);
  };
  work.starting++;
  const how = await boot({
    imageDir,
    emulatorDir,
    runDir,
    command: commandFor(code, work.boot),
    shares: [
      { path: code.directory, at: code.directory },
      { path: dirname(Deno.execPath()), at: "/deno-bin" },
      { path: work.queueDir, at: "/queue", writable: true },
      ...(work.image ? [{ path: rootDir, at: "/image" }] : []),
    ],
    diskFile: work.diskFile,
    memoryMib: 2048,
    processors,
    onLine,
    signal: AbortSignal.any([AbortSignal.timeout(bootLimitSeconds * 1000), stop]),
  });
  if (begun === 0) work.starting--;
  work.ended = "problem" in how ? how.problem : `the guest's command ended with status ${how.status}`;
  if (current !== undefined) give(current, `${work.ended} while this ran`);
  if (failed > 0 || begun === 0) {
    console.log(`--- what the guest said:\n${chatter.slice(-40).join("\n")}`);
    console.log(`--- the end of its kernel's messages:\n${await lastWords(runDir, 25)}`);
  }
  return { begun, passed, failed };
}

/** Boots guests, one after the other, until nothing is left in the queue: one that dies over a check is followed by another. */
async function serve(work: Work, run: Run): Promise<Counted> {
  let [passed, failed] = [0, 0];
  while (!run.stop.aborted && (await remaining(work.queueDir)).length > work.starting) {
    const counted = await bootFor(work, run);
    passed += counted.passed;
    failed += counted.failed;
    if (counted.begun === 0) break;
  }
  return { passed, failed };
}

/** Counts as failed what no guest has told of: nobody has begun it, or who had taken it died before it could say so. */
function leftOver(work: Work, why = work.ended): number {
  const left = work.items.filter(({ name }) => !work.told.has(name));
  for (const { name } of left) console.log(`FAILED ${name}\n    it was not run: ${why}`);
  return left.length;
}

async function workOn(plan: Plan, boot: number, directory: string, diskFile?: string): Promise<Work> {
  const queueDir = join(directory, `queue${boot}`);
  const items = plan.boots[boot] ?? [];
  await lay(queueDir, items);
  return { queueDir, items, told: new Set(), boot, image: plan.image, diskFile, starting: 0, ended: "" };
}

/** All boots of a plan that has a guest of its own. */
async function playOwn(plan: Plan, run: Run): Promise<Counted> {
  const directory = join(run.directory, `own${++run.guests}`);
  await Deno.mkdir(directory);
  const diskFile = plan.boots.length === 1 ? undefined : join(directory, "disk.img");
  if (diskFile !== undefined) {
    await Deno.writeFile(diskFile, new Uint8Array());
    await Deno.truncate(diskFile, 4 * 2 ** 30);
  }
  let [passed, failed] = [0, 0];
  for (const boot of plan.boots.keys()) {
    const work = await workOn(plan, boot, directory, diskFile);
    if (failed > 0) {
      failed += leftOver(work, "an earlier boot failed");
      continue;
    }
    if (plan.image) await run.rootReady;
    const counted = await serve(work, run);
    passed += counted.passed;
    failed += counted.failed + leftOver(work);
  }
  return { passed, failed };
}

const plans = await load();
if (options.list) {
  for (const { file, name } of plans.flatMap(({ boots }) => boots.flat())) console.log(`${file}: ${name}`);
  Deno.exit(0);
}
if (plans.length === 0) {
  console.error(`No check has "${options.only}" in its name or file`);
  Deno.exit(2);
}
refuseMissing();
const started = performance.now();
const cache = Deno.env.get("LBCSI_VM_CACHE") ?? join(Deno.env.get("HOME") ?? "/root", ".cache/lbcsi-vm");
const imageDir = join(cache, options.suite);
const emulatorDir = join(cache, "emulator");
const stop = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(name, () => stop.abort(new Error(`stopped by ${name}`)));
}
// Not in /tmp, which is another one in a guest's image.
const directory = await Deno.makeTempDir({ dir: "/var/tmp", prefix: "lbcsi-vm-" });
const abandon = async (error: unknown): Promise<never> => {
  await Deno.remove(directory, { recursive: true }).catch(() => {});
  console.error(error instanceof Error ? error.message : error);
  Deno.exit(2);
};
const code = codeAt(join(directory, "code"));
const rootDir = join(directory, "root");
const makeRoot = () => command(Deno.execPath(), ["run", "-A", "k8s/image/root.ts", "node", rootDir]);
const rootReady = plans.some(({ image }) => image) ? makeRoot().catch(abandon) : Promise.resolve();
const makeGuest = command("bash", [join(here, "build_guest.sh"), options.suite, imageDir, emulatorDir]);
await Promise.all([makeGuest, makeCode(code)]).catch(abandon);
const run: Run = { imageDir, emulatorDir, code, rootDir, rootReady, directory, stop: stop.signal, guests: 0 };
const toBoot = Math.round((performance.now() - started) / 1000);
// The image's last, for its root file system.
const own = plans.filter(({ own }) => own).sort((one, other) => Number(one.image) - Number(other.image));
const shared = plans.find(({ own }) => !own);
const sharedWork = shared === undefined ? undefined : await workOn(shared, 0, directory);
const counts = await Promise.all(Array.from({ length: jobs }, async (_nothing, worker) => {
  const counts: Counted[] = [];
  for (const plan of worker === 0 ? own : []) counts.push(await playOwn(plan, run));
  if (sharedWork !== undefined) counts.push(await serve(sharedWork, run));
  return counts;
}));
const sum = (numbers: readonly number[]) => numbers.reduce((sum, number) => sum + number, 0);
const passed = sum(counts.flat().map(({ passed }) => passed));
const failed = sum(counts.flat().map(({ failed }) => failed)) +
  (sharedWork === undefined ? 0 : leftOver(sharedWork));
if (options.keep) console.log(`The folder of this run: ${directory}`);
else await Deno.remove(directory, { recursive: true });
const seconds = Math.round((performance.now() - started) / 1000);
console.log(`${options.suite}, ${seconds} s, of which ${toBoot} s until the first boot`);
console.log(`${passed} passed, ${failed} failed`);
Deno.exit(failed === 0 && !stop.signal.aborted ? 0 : 1);

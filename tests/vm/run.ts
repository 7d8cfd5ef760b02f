/**
 * `deno task test:vm`: boots virtual machines with the real NVMe/TCP initiator and target of the Linux kernel, runs the
 * real program in them, and prints for each check whether it passed. Needs root and Debian packages, which it names.
 *
 *   --only TEXT      run the checks whose name, or whose file in scenarios/, contains TEXT
 *   --suite SUITE    Debian release of the guest: bookworm (kernel 6.1, nvme-cli 2.3; default) or trixie (6.12, 2.13)
 *   --keep           keep the directory of the run: the kernel's messages, the logs of the program, the disk
 *   --bench          run the benchmarks of bench/ instead
 *   --list           print the names of the checks
 *   --build          only build the guest's image
 *   --jobs COUNT     number of guests that run at the same time, default 2
 *
 * The guest's image is built when it is missing or its inputs have changed, in $LBCSI_VM_CACHE (default
 * ~/.cache/lbcsi-vm), 300 MB per suite, and so is QEMU, 170 MB. When a check of a guest fails, the guest's output and the
 * last messages of its kernel are printed when it ends. The last lines list the failed checks again and count.
 * Exit status: 0 all passed, 1 some failed, 2 invalid options or something is missing.
 */
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { Testbed } from "../../lib/demo/testbed.ts";
import { type Code, codeAt } from "./code.ts";
import { boot, kernelMessages } from "./guest.ts";
import { type Item, lay, remaining } from "./queue.ts";
import { type Check, type Report, reportMark, type Scenario } from "./scenario.ts";

const here = fileURLToPath(new URL(".", import.meta.url));
const repository = join(here, "../..");
// Guests with more processors than the host has cores for wait for each other's locks.
const maxProcessors = 2;
// A guest that runs longer is killed. On two cores a guest runs for 5 minutes; other machines may be several times slower.
const bootLimitSeconds = 2400;

const { values: options } = parseArgs({
  args: Deno.args,
  options: {
    only: { type: "string" },
    suite: { type: "string", default: "bookworm" },
    keep: { type: "boolean", default: false },
    bench: { type: "boolean", default: false },
    list: { type: "boolean", default: false },
    build: { type: "boolean", default: false },
    jobs: { type: "string", default: "2" },
  },
});

const jobs = Number(options.jobs);
if (!Number.isInteger(jobs) || jobs < 1) {
  console.error(`--jobs "${options.jobs}": is not a whole number of at least 1`);
  Deno.exit(2);
}
const processors = Math.min(maxProcessors, Math.max(1, Math.floor(navigator.hardwareConcurrency / jobs)));
const scenarioDirectory = options.bench ? "bench" : "scenarios";

/** Checks that run in guests of the same kind. */
interface Plan {
  /** The checks of each boot. Guests take them from a queue. */
  readonly boots: readonly (readonly Item[])[];
  /** Whether the guest sees the root file system of the node's image. */
  readonly hasImage: boolean;
  /** Whether the plan has a guest of its own. */
  readonly isExclusive: boolean;
}

/**
 * Loads the scenarios. Most checks belong to one plan, which any number of guests share. A scenario of several boots has a
 * guest of its own, because each boot needs what the one before has left on the disk; so has a scenario that mounts over
 * directories which other checks use.
 */
async function loadPlans(): Promise<readonly Plan[]> {
  const exclusive: Plan[] = [];
  const groups = new Map<string, Item[]>();
  for (const file of await scenarioFiles()) {
    const { scenario }: { scenario: Scenario } = await import(
      new URL(`./${scenarioDirectory}/${file}`, import.meta.url).href
    );
    const { boots, start } = scenario;
    const { only } = options;
    const isSelected = ({ name }: Check) => only === undefined || file.includes(only) || name.includes(only);
    if (!boots.flat().some(isSelected)) continue;
    const hasImage = start?.image === true;
    const itemsOf = (checks: readonly Check[], group: number): Item[] =>
      checks.map(({ name }) => ({ group, file: bundleOf(file), name }));
    if (boots.length > 1) {
      exclusive.push({ boots: boots.map((checks) => itemsOf(checks, 0)), hasImage, isExclusive: true });
      continue;
    }
    const checks = boots.flat().filter(isSelected);
    if (hasImage) {
      exclusive.push({ boots: [itemsOf(checks, 0)], hasImage, isExclusive: true });
      continue;
    }
    const key = JSON.stringify(start) ?? "";
    const group = groups.get(key) ?? [];
    groups.set(key, group);
    group.push(...itemsOf(checks, [...groups.keys()].indexOf(key)));
  }
  // The largest group comes last, because its many short checks can be divided evenly between guests at the end.
  const shared = [...groups.values()].sort((one, other) => one.length - other.length).flat();
  return shared.length === 0 ? exclusive : [...exclusive, { boots: [shared], hasImage: false, isExclusive: false }];
}

async function scenarioFiles(): Promise<readonly string[]> {
  const names = await Array.fromAsync(Deno.readDir(join(here, scenarioDirectory)), ({ name }) => name);
  return names.filter((name) => name.endsWith(".ts")).sort();
}

/** The path of a scenario file's bundle, relative to the directory of inside.js. */
function bundleOf(file: string): string {
  return `${scenarioDirectory}/${file.replace(/ts$/, "js")}`;
}

/** The programs that a run needs, and their Debian packages. */
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

/** Exits with status 2 if this machine lacks something that a run needs. */
function requirePrograms(): void {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  const isInstalled = (program: string) =>
    path.some((directory) => {
      try {
        return Deno.statSync(join(directory, program)).isFile;
      } catch {
        return false;
      }
    });
  const missing = Object.keys(packages).filter((program) => !isInstalled(program)).map((program) => packages[program]);
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

/** Runs a program in the repository. Throws when it fails. */
async function runCommand(program: string, args: readonly string[]): Promise<void> {
  const status = await new Deno.Command(program, { args: [...args], cwd: repository, stdin: "null", stdout: "null" })
    .spawn().status;
  if (!status.success) throw new Error(`Cannot go on: ${program} ${args.join(" ")} exits ${status.code}`);
}

/** The script that a guest runs. */
function guestScript(code: Code, boot: number): string {
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

/** The outcome of checks. */
interface Outcome {
  readonly passed: number;
  /** Names of the checks that failed or did not run. */
  readonly failed: readonly string[];
}

const noChecks: Outcome = { passed: 0, failed: [] };

function sum(outcomes: readonly Outcome[]): Outcome {
  return outcomes.reduce(
    ({ passed, failed }, outcome) => ({
      passed: passed + outcome.passed,
      failed: [...failed, ...outcome.failed],
    }),
    noChecks,
  );
}

/** Makes the bundles, and runs each part of them once, which puts its bytecode into the cache. */
async function makeCode(code: Code): Promise<void> {
  const bundle = ["bundle", "--quiet", "--code-splitting", "--outdir"];
  // Always all files: with one file alone the bundle has another directory layout.
  const files = await scenarioFiles();
  await Promise.all([
    runCommand(Deno.execPath(), [...bundle, code.programDir, "main.ts"]),
    runCommand(Deno.execPath(), [
      ...[...bundle, code.checksDir, join(here, "inside.ts")],
      ...files.map((name) => join(here, scenarioDirectory, name)),
    ]),
  ]);
  const deno = ["env", `DENO_DIR=${code.cache}`, "NO_COLOR=1", Deno.execPath()];
  const [env = "", ...words] = deno;
  await runCommand(env, [...words, ...code.checks, "--load", ...files.map(bundleOf)]);
  // Their exit status does not matter: this machine has nothing that they could find.
  const lbcsi = async (...args: readonly string[]) =>
    void await new Deno.Command(env, { args: [...words, ...code.program, ...args], stdin: "null" }).output();
  const nodeOptions = ["--node-id", "host.node"];
  await lbcsi("list");
  await lbcsi("doctor", "--checks", "machine", "--json");
  await lbcsi("detach", ...nodeOptions, "--uuid", crypto.randomUUID(), "--nqn", "nqn.2019-09.org.example:absent");
  for (const backend of ["lightos", "poseidon"] as const) {
    const program = [...deno, ...code.program];
    const testbed = new Testbed(await Deno.makeTempDir({ prefix: "lbcsi-vm-testbed-" }), program, { backend });
    const signal = AbortSignal.timeout(60_000);
    try {
      await testbed.startSimulator("none", signal, backend === "lightos" ? ["--schemes", "grpc"] : []);
      await Promise.all([
        testbed.startController(signal),
        testbed.startNode("host.node", signal, {}, ["--attach", "direct"]),
      ]);
      if (backend === "poseidon") continue;
      const token = join(testbed.home, "token");
      await Deno.writeTextFile(token, testbed.secrets["jwt"] ?? "");
      const id = `mgmt:${testbed.addresses.grpc.join(",")}|nguid:${crypto.randomUUID()}|proj:default|scheme:grpc`;
      await lbcsi("detach", ...nodeOptions, id, "--jwt-path", token);
    } finally {
      await testbed.cleanUp(false);
    }
  }
}

/** What all guests of a run share. */
interface Run {
  readonly imageDir: string;
  readonly emulatorDir: string;
  readonly code: Code;
  /** The root file system of the node's image. It is complete when `rootReady` resolves. */
  readonly rootDir: string;
  readonly rootReady: Promise<void>;
  /** The directory for the files of the guests. */
  readonly directory: string;
  readonly stop: AbortSignal;
  guests: number;
}

/** A queue of checks, and the guests that take from it. */
interface Work {
  readonly queueDir: string;
  readonly items: readonly Item[];
  /** Names of the checks whose outcome guests have reported. */
  readonly reported: Set<string>;
  readonly boot: number;
  readonly hasImage: boolean;
  /** A disk that outlives the boot. */
  readonly diskFile: string | undefined;
  /** Number of guests that boot and have not taken a check yet. */
  starting: number;
  /** How the last guest ended. */
  lastEnd: string;
}

/** Boots a guest for a queue, prints the outcome of its checks and counts them. */
async function bootFor(work: Work, run: Run): Promise<Outcome & { readonly begun: number }> {
  const { imageDir, emulatorDir, code, rootDir, stop } = run;
  const runDir = join(run.directory, `guest${++run.guests}`);
  await Deno.mkdir(runDir);
  const guest = new GuestOutput(work);
  work.starting++;
  const end = await boot({
    imageDir,
    emulatorDir,
    runDir,
    command: guestScript(code, work.boot),
    shares: [
      { path: code.directory, at: code.directory },
      { path: dirname(Deno.execPath()), at: "/deno-bin" },
      { path: work.queueDir, at: "/queue", writable: true },
      ...(work.hasImage ? [{ path: rootDir, at: "/image" }] : []),
    ],
    diskFile: work.diskFile,
    memoryMib: 2048,
    processors,
    onLine: (line) => guest.read(line),
    signal: AbortSignal.any([AbortSignal.timeout(bootLimitSeconds * 1000), stop]),
  });
  work.lastEnd = "problem" in end ? end.problem : `the guest's command ended with status ${end.status}`;
  const { begun, passed, failed } = guest.finish();
  if (failed.length > 0 || begun === 0) {
    console.log(`--- the guest's output:\n${guest.otherLines.slice(-40).join("\n")}`);
    console.log(`--- the last messages of its kernel:\n${await kernelMessages(runDir, 25)}`);
  }
  return { begun, passed, failed };
}

/** Reads the lines of a guest: prints its reports and counts them. */
class GuestOutput {
  /** Lines that are not reports. */
  readonly otherLines: string[] = [];
  readonly #work: Work;
  readonly #failed: string[] = [];
  #begun = 0;
  #passed = 0;
  #current: string | undefined;

  constructor(work: Work) {
    this.#work = work;
  }

  read(line: string): void {
    const start = line.indexOf(reportMark);
    if (start < 0) return void this.otherLines.push(line);
    const report: Report = JSON.parse(line.slice(start + reportMark.length));
    if (report.event === "begins") {
      if (this.#begun++ === 0) this.#work.starting--;
      this.#current = report.name;
    }
    if (report.event === "measured") console.log(`   ${report.name}: ${report.text}`);
    if (report.event === "passed") {
      this.#passed++;
      this.#end(report.name);
      console.log(`ok ${report.name} (${(report.ms / 1000).toFixed(1)} s)`);
    }
    if (report.event === "failed") this.#fail(report.name, report.problem);
  }

  /** Counts the check that was running when the guest ended as failed. */
  finish(): Outcome & { readonly begun: number } {
    if (this.#begun === 0) this.#work.starting--;
    if (this.#current !== undefined) this.#fail(this.#current, `${this.#work.lastEnd} while this ran`);
    return { begun: this.#begun, passed: this.#passed, failed: this.#failed };
  }

  #fail(name: string, problem: string): void {
    this.#failed.push(name);
    this.#end(name);
    console.log(`FAILED ${name}\n${problem.replace(/^/gm, "    ")}`);
  }

  #end(name: string): void {
    this.#current = undefined;
    this.#work.reported.add(name);
  }
}

/** Boots guests, one after the other, until the queue is empty. A guest that dies in a check is followed by another one. */
async function serveQueue(work: Work, run: Run): Promise<Outcome> {
  const outcomes: Outcome[] = [];
  while (!run.stop.aborted && (await remaining(work.queueDir)).length > work.starting) {
    const outcome = await bootFor(work, run);
    outcomes.push(outcome);
    if (outcome.begun === 0) break;
  }
  return sum(outcomes);
}

/** Counts as failed the checks without a report: no guest has begun them, or theirs died before it could report. */
function failUnreported(work: Work, reason = work.lastEnd): Outcome {
  const failed = work.items.map(({ name }) => name).filter((name) => !work.reported.has(name));
  for (const name of failed) console.log(`FAILED ${name}\n    it was not run: ${reason}`);
  return { passed: 0, failed };
}

async function createWork(plan: Plan, boot: number, directory: string, diskFile?: string): Promise<Work> {
  const queueDir = join(directory, `queue${boot}`);
  const items = plan.boots[boot] ?? [];
  await lay(queueDir, items);
  const { hasImage } = plan;
  return { queueDir, items, reported: new Set(), boot, hasImage, diskFile, starting: 0, lastEnd: "" };
}

/** Runs all boots of a plan that has a guest of its own. */
async function runExclusive(plan: Plan, run: Run): Promise<Outcome> {
  const directory = join(run.directory, `exclusive${++run.guests}`);
  await Deno.mkdir(directory);
  const diskFile = plan.boots.length === 1 ? undefined : join(directory, "disk.img");
  if (diskFile !== undefined) {
    await Deno.writeFile(diskFile, new Uint8Array());
    await Deno.truncate(diskFile, 4 * 2 ** 30);
  }
  let outcome = noChecks;
  for (const boot of plan.boots.keys()) {
    const work = await createWork(plan, boot, directory, diskFile);
    if (outcome.failed.length > 0) {
      outcome = sum([outcome, failUnreported(work, "an earlier boot failed")]);
      continue;
    }
    if (plan.hasImage) await run.rootReady;
    const served = await serveQueue(work, run);
    outcome = sum([outcome, served, failUnreported(work)]);
  }
  return outcome;
}

/** Runs all plans in `jobs` guests at a time. */
async function runPlans(plans: readonly Plan[], run: Run): Promise<Outcome> {
  // Plans with the image come last, because its root file system is still being made.
  const exclusive = plans.filter(({ isExclusive }) => isExclusive)
    .sort((one, other) => Number(one.hasImage) - Number(other.hasImage));
  const shared = plans.find(({ isExclusive }) => !isExclusive);
  const sharedWork = shared === undefined ? undefined : await createWork(shared, 0, run.directory);
  const outcomes = await Promise.all(Array.from({ length: jobs }, async (_nothing, worker) => {
    const outcomes: Outcome[] = [];
    for (const plan of worker === 0 ? exclusive : []) outcomes.push(await runExclusive(plan, run));
    if (sharedWork !== undefined) outcomes.push(await serveQueue(sharedWork, run));
    return sum(outcomes);
  }));
  return sum([...outcomes, sharedWork === undefined ? noChecks : failUnreported(sharedWork)]);
}

const plans = await loadPlans();
if (options.list) {
  for (const { file, name } of plans.flatMap(({ boots }) => boots.flat())) console.log(`${file}: ${name}`);
  Deno.exit(0);
}
if (plans.length === 0) {
  console.error(`No check has "${options.only}" in its name or file`);
  Deno.exit(2);
}
requirePrograms();
const started = performance.now();
const cache = Deno.env.get("LBCSI_VM_CACHE") ?? join(Deno.env.get("HOME") ?? "/root", ".cache/lbcsi-vm");
const imageDir = join(cache, options.suite);
const emulatorDir = join(cache, "emulator");
const buildGuest = () => runCommand("bash", [join(here, "build_guest.sh"), options.suite, imageDir, emulatorDir]);
if (options.build) {
  await buildGuest().catch((error: Error) => {
    console.error(error.message);
    Deno.exit(2);
  });
  Deno.exit(0);
}
const stop = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(name, () => stop.abort(new Error(`stopped by ${name}`)));
}
// Not in /tmp, because guests have a /tmp of their own and see this directory at the same path.
const directory = await Deno.makeTempDir({ dir: "/var/tmp", prefix: "lbcsi-vm-" });
const exitUnprepared = async (error: unknown): Promise<never> => {
  await Deno.remove(directory, { recursive: true }).catch(() => {});
  console.error(error instanceof Error ? error.message : error);
  Deno.exit(2);
};
const code = codeAt(join(directory, "code"));
const rootDir = join(directory, "root");
const makeRoot = () => runCommand(Deno.execPath(), ["run", "-A", "k8s/image/root.ts", "node", rootDir]);
const rootReady = plans.some(({ hasImage }) => hasImage) ? makeRoot().catch(exitUnprepared) : Promise.resolve();
await Promise.all([buildGuest(), makeCode(code)]).catch(exitUnprepared);
const run: Run = { imageDir, emulatorDir, code, rootDir, rootReady, directory, stop: stop.signal, guests: 0 };
const secondsToBoot = Math.round((performance.now() - started) / 1000);
const { passed, failed } = await runPlans(plans, run);
if (options.keep) console.log(`The directory of this run: ${directory}`);
else await Deno.remove(directory, { recursive: true });
const seconds = Math.round((performance.now() - started) / 1000);
console.log(`${options.suite}, ${seconds} s, of which ${secondsToBoot} s until the first boot`);
// Again, because logs of CI are cut in the middle.
for (const name of failed) console.log(`FAILED ${name}`);
console.log(`${passed} passed, ${failed.length} failed`);
Deno.exit(failed.length === 0 && !stop.signal.aborted ? 0 : 1);

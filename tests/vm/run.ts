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
 * ~/.cache/lbcsi-vm), 300 MB per suite. The first `failed` line, the guest's output and the end of the kernel's messages
 * follow a check that fails. Exit status: 0 all passed, 1 some failed, 2 bad options or something is missing.
 */
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { boot, lastWords } from "./guest.ts";
import { type Report, reportMark, type Scenario } from "./scenario.ts";

const here = fileURLToPath(new URL(".", import.meta.url));
const repository = join(here, "../..");
// Guests with more processors than there are cores for them wait for one another's locks.
const mostProcessors = 2;
// Guests are given up after this; two of them at once on two cores take the longest a fifth of it.
const bootLimitSeconds = 1200;

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
const processors = Math.min(mostProcessors, Math.max(1, Math.floor(navigator.hardwareConcurrency / jobs)));
const folder = options.bench ? "bench" : "scenarios";
/** What one guest runs: scenarios that start in the same way share one, for a start takes longer than most checks. */
interface Loaded {
  readonly files: readonly string[];
  readonly scenario: Scenario;
  /** Names of the checks to run. */
  readonly names: readonly string[];
}

async function load(): Promise<readonly Loaded[]> {
  const loaded: Loaded[] = [];
  const files = [...Deno.readDirSync(join(here, folder))].map(({ name }) => name).filter((name) =>
    name.endsWith(".ts")
  );
  for (const file of files.sort()) {
    const { scenario }: { scenario: Scenario } = await import(new URL(`./${folder}/${file}`, import.meta.url).href);
    const all = scenario.boots.flat().map(({ name }) => name);
    const { only } = options;
    const matching = only === undefined || file.includes(only) ? all : all.filter((name) => name.includes(only));
    if (matching.length === 0) continue;
    // Later boots look at what earlier ones have left.
    const names = scenario.boots.length > 1 ? all : matching;
    const like = loaded.findIndex((other) =>
      scenario.boots.length === 1 && other.scenario.boots.length === 1 &&
      JSON.stringify(other.scenario.start) === JSON.stringify(scenario.start)
    );
    const found = loaded[like];
    if (found === undefined) loaded.push({ files: [file], scenario, names });
    else {
      loaded[like] = {
        files: [...found.files, file],
        scenario: { ...found.scenario, boots: [[...found.scenario.boots.flat(), ...scenario.boots.flat()]] },
        names: [...found.names, ...names],
      };
    }
  }
  // The longest first, so that the last guest is not alone for long.
  return loaded.sort((one, other) => other.names.length - one.names.length);
}

const packages: Readonly<Record<string, string>> = {
  "qemu-system-x86_64": "qemu-system-x86",
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

function quote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** What the guest does. */
function commandFor(files: readonly string[], bootNumber: number, names: readonly string[]): string {
  const bundled = files.map((file) => `${folder}/${file.replace(/ts$/, "js")}`);
  return `
exec 2>&1
mkdir -p /disk
export DENO_DIR=/tmp/deno NO_COLOR=1 DENO_NO_UPDATE_CHECK=1 PATH=/deno-bin:$PATH
if [ -b /dev/vdb ]; then
  blkid -p /dev/vdb >/dev/null || mkfs.ext4 -q /dev/vdb
  mount /dev/vdb /disk
fi
cd /checks
deno run -A --no-code-cache --v8-flags=--lite-mode inside.js \
  ${quote(JSON.stringify(bundled))} ${bootNumber} ${quote(JSON.stringify(names))}
status=$?
[ ! -b /dev/vdb ] || sync -f /disk
exit $status
`;
}

interface Counted {
  readonly passed: number;
  readonly failed: number;
}

/** What guests share, on the host. */
interface Folders {
  /** The bundle of inside.ts and the files of checks, which starts several times as fast as its sources do. */
  readonly checks: string;
  /** The bundle of main.ts. */
  readonly program: string;
  /** The root file system of the node's image. */
  readonly root: string;
}

async function play(
  { files, scenario, names }: Loaded,
  imageDir: string,
  { checks: checksDir, program: programDir, root: rootDir }: Folders,
  runDir: string,
  stop: AbortSignal,
): Promise<Counted> {
  let passed = 0;
  let failed = 0;
  const say = (text: string) => console.log(text);
  const where = files.join(", ");
  const diskFile = scenario.boots.length > 1 ? join(runDir, "disk.img") : undefined;
  if (diskFile !== undefined) {
    await Deno.writeFile(diskFile, new Uint8Array());
    await Deno.truncate(diskFile, 4 * 2 ** 30);
  }
  for (const [number, checks] of scenario.boots.entries()) {
    const mine = checks.map(({ name }) => name).filter((name) => names.includes(name));
    if (mine.length === 0) continue;
    const open = new Set(mine);
    const chatter: string[] = [];
    const bootDir = join(runDir, `boot${number}`);
    await Deno.mkdir(bootDir);
    const give = (name: string, problem: string) => {
      failed++;
      open.delete(name);
      say(`FAILED ${name} (${where})\n${problem.replace(/^/gm, "    ")}`);
    };
    let current: string | undefined;
    const onLine = (line: string) => {
      const at = line.indexOf(reportMark);
      if (at < 0) return void chatter.push(line);
      const report: Report = JSON.parse(line.slice(at + reportMark.length));
      if (report.event === "begins") current = report.name;
      if (report.event === "measured") say(`   ${report.name}: ${report.text}`);
      if (report.event === "passed") {
        passed++;
        open.delete(report.name);
        say(`ok ${report.name} (${(report.ms / 1000).toFixed(1)} s)`);
      }
      if (report.event === "failed") give(report.name, report.problem);
    };
    const limit = AbortSignal.timeout(bootLimitSeconds * 1000);
    const ended = await boot({
      imageDir,
      runDir: bootDir,
      command: commandFor(files, number, mine),
      shares: [
        { path: checksDir, at: "/checks" },
        { path: dirname(Deno.execPath()), at: "/deno-bin" },
        { path: programDir, at: "/program" },
        ...(scenario.start?.image === true ? [{ path: rootDir, at: "/image" }] : []),
      ],
      diskFile,
      memoryMib: scenario.memoryMib ?? 2048,
      processors,
      onLine,
      signal: AbortSignal.any([limit, stop]),
    });
    const problem = "problem" in ended ? ended.problem : `the guest's command ended with status ${ended.status}`;
    for (const name of open) {
      give(name, name === current ? `${problem} while this ran` : `it was not run: ${problem}`);
    }
    if (failed > 0) {
      say(`--- what the guest said (${where}, boot ${number}):\n${chatter.slice(-40).join("\n")}`);
      say(`--- the end of its kernel's messages:\n${await lastWords(bootDir, 25)}`);
      break;
    }
  }
  return { passed, failed };
}

const loaded = await load();
if (options.list) {
  for (const { files, names } of loaded) for (const name of names) console.log(`${files.join(", ")}: ${name}`);
  Deno.exit(0);
}
if (loaded.length === 0) {
  console.error(`No check has "${options.only}" in its name or file`);
  Deno.exit(2);
}
refuseMissing();
const started = performance.now();
const cache = Deno.env.get("LBCSI_VM_CACHE") ?? join(Deno.env.get("HOME") ?? "/root", ".cache/lbcsi-vm");
const imageDir = join(cache, options.suite);
await command("bash", [join(here, "build_guest.sh"), options.suite, imageDir]);
const stop = new AbortController();
for (const name of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(name, () => stop.abort(new Error(`stopped by ${name}`)));
}
const runs = await Deno.makeTempDir({ prefix: "lbcsi-vm-" });
const folders: Folders = { checks: join(runs, "checks"), program: join(runs, "program"), root: join(runs, "root") };
const bundle = ["bundle", "--quiet", "--code-splitting", "--outdir"];
await command(Deno.execPath(), [...bundle, folders.program, "main.ts"]);
// All files, whichever are to run: with one alone the folders would be others.
const entries = [...Deno.readDirSync(join(here, folder))].map(({ name }) => join(here, folder, name));
await command(Deno.execPath(), [...bundle, folders.checks, join(here, "inside.ts"), ...entries]);
if (loaded.some(({ scenario }) => scenario.start?.image === true)) {
  await command(Deno.execPath(), ["run", "-A", "k8s/image/root.ts", "node", folders.root]);
}
let passed = 0;
let failed = 0;
let guests = 0;
const queue = [...loaded];
await Promise.all(Array.from({ length: jobs }, async () => {
  for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
    const runDir = join(runs, `guest${++guests}`);
    await Deno.mkdir(runDir);
    const counted = await play(next, imageDir, folders, runDir, stop.signal);
    passed += counted.passed;
    failed += counted.failed;
  }
}));
if (options.keep) console.log(`The folder of this run: ${runs}`);
else await Deno.remove(runs, { recursive: true });
const seconds = Math.round((performance.now() - started) / 1000);
console.log(`${options.suite}, ${seconds} s\n${passed} passed, ${failed} failed`);
Deno.exit(failed === 0 && !stop.signal.aborted ? 0 : 1);

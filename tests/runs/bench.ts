/**
 * `deno task bench`: how fast lbcsi starts and answers, how much memory it takes, and what each CSI call costs on the
 * cluster and on the node. Prints tables and writes them as JSON. Exit status 1 when a bound on counts is exceeded;
 * times and memory have none, as machines differ.
 *
 * The client, the simulated cluster and the service under test share this machine: compare figures of one run.
 */
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import config from "../../deno.json" with { type: "json" };
import type { ServiceProcess } from "../../lib/demo/process.ts";
import { Testbed } from "../../lib/demo/testbed.ts";
import type { Channel } from "../../lib/grpc/client.ts";
import { Controller, Identity, Node, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { bounds, type Cost, firstVolume, type FsType, measureCalls } from "../support/measured_calls.ts";
import { needs } from "../support/needs.ts";

const usage = `usage: deno task bench [--quick] [--binary FILE] [--json FILE]

  --quick         a tenth of the calls: for a look, not for a comparison
  --binary FILE   measure a compiled lbcsi instead of the sources; or a bundle, FILE.js, with the flags of the build
  --json FILE     where the figures are written (default: bench.json)`;

/** One way to run the program. */
interface Variant {
  readonly name: string;
  readonly program: readonly string[];
}

interface StartUp {
  readonly variant: string;
  readonly role: Role;
  readonly runs: number;
  /** From the start of the process to the answer to its first Probe. */
  readonly leastMs: number;
  readonly medianMs: number;
  readonly mostMs: number;
}

interface Memory {
  readonly variant: string;
  readonly role: Role;
  readonly when: string;
  readonly rssMiB: number;
  /** The part that is the process's own: not backed by files, which processes of the same program share. */
  readonly anonymousMiB: number;
}

interface Throughput {
  readonly variant: string;
  readonly call: string;
  readonly inFlight: number;
  readonly calls: number;
  readonly callsPerSecond: number;
  readonly p50Ms: number;
  readonly p99Ms: number;
}

interface Count {
  readonly call: string;
  readonly managementCalls: readonly string[];
  readonly programs: readonly string[];
  readonly bound: { readonly managementCalls: number; readonly programs: number | undefined } | undefined;
  readonly within: boolean;
}

type Role = "identity" | "controller" | "node";

interface Effort {
  readonly startUps: number;
  readonly memoryCalls: number;
  readonly loadMs: number;
}

const thorough: Effort = { startUps: 20, memoryCalls: 20_000, loadMs: 5000 };
const quick: Effort = { startUps: 3, memoryCalls: 2000, loadMs: 500 };
const source = fileURLToPath(new URL("../../main.ts", import.meta.url));
const fromSource = [Deno.execPath(), "run", "-A", source];
// What `deno task build` bakes into the executable.
const bakedFlags = "--v8-flags=--lite-mode,--max-old-space-size=64";
const nodeId = "bench.node";
const project = "default";

async function main(args: string[]): Promise<number> {
  const { values } = parseArgs({
    args,
    options: {
      quick: { type: "boolean", default: false },
      binary: { type: "string" },
      json: { type: "string", default: "bench.json" },
      help: { type: "boolean", short: "h", default: false },
    },
  });
  if (values.help) {
    console.log(usage);
    return 0;
  }
  const effort = values.quick ? quick : thorough;
  const variants: readonly Variant[] = values.binary === undefined
    ? [
      { name: "deno run", program: fromSource },
      { name: "deno run, lite", program: [Deno.execPath(), "run", "-A", bakedFlags, source] },
    ]
    : [built(resolve(values.binary))];

  const about = aboutHere();
  console.log(`lbcsi ${config.version}, ${Object.values(about).join(", ")}${values.quick ? "; quick" : ""}`);
  const startUp: StartUp[] = [];
  const memory: Memory[] = [];
  const throughput: Throughput[] = [];
  for (const variant of variants) startUp.push(...await measureStartUp(variant, effort));
  table("start-up, from the start of the process to its first answer to Probe", startUp, {
    "variant": (row) => row.variant,
    "role": (row) => row.role,
    "runs": (row) => row.runs,
    "least ms": (row) => row.leastMs,
    "median ms": (row) => row.medianMs,
    "most ms": (row) => row.mostMs,
  });
  for (const variant of variants) memory.push(...await measureMemory(variant, effort));
  for (const variant of variants) {
    const measured = await measureThroughput(variant, effort);
    throughput.push(...measured.throughput);
    memory.push(measured.memory);
  }
  table("memory", memory, {
    "variant": (row) => row.variant,
    "role": (row) => row.role,
    "when": (row) => row.when,
    "RSS MiB": (row) => row.rssMiB,
    "anonymous MiB": (row) => row.anonymousMiB,
  });
  table("calls against the simulated cluster, one connection", throughput, {
    "variant": (row) => row.variant,
    "call": (row) => row.call,
    "in flight": (row) => row.inFlight,
    "calls": (row) => row.calls,
    "calls/s": (row) => row.callsPerSecond,
    "p50 ms": (row) => row.p50Ms,
    "p99 ms": (row) => row.p99Ms,
  });
  const counts = await measureCounts(variants[0]);
  table("what a call costs: calls of the management API, programs started", folded(counts), {
    "call": (row) => row.rpc,
    "of": (row) => row.volumes.length > 4 ? `${row.volumes.length} volumes` : row.volumes.join(", "),
    "management calls": (row) => row.managementCalls.join(" ") || "-",
    "at most": (row) => row.bound?.managementCalls ?? "-",
    "programs": (row) => row.programs.join(" ") || "-",
    "at most ": (row) => row.bound?.programs ?? "-",
    "": (row) => row.within ? "" : "EXCEEDED",
  });
  const figures = { version: config.version, quick: values.quick, ...about, startUp, memory, throughput, counts };
  await Deno.writeTextFile(values.json, `${JSON.stringify(figures, undefined, 2)}\n`);
  console.log(`\nwritten to ${values.json}`);
  const exceeded = counts.filter(({ within }) => !within).map(({ call }) => call);
  if (exceeded.length > 0) console.error(`bounds are exceeded by ${exceeded.join("; ")}`);
  return exceeded.length > 0 ? 1 : 0;
}

/** What `deno task build` makes, or what it makes that of. */
function built(file: string): Variant {
  return file.endsWith(".js")
    ? { name: "bundle, lite", program: [Deno.execPath(), "run", "--no-config", "-A", bakedFlags, file] }
    : { name: "compiled", program: [file] };
}

function aboutHere() {
  const read = (path: string, pattern: RegExp) => pattern.exec(Deno.readTextFileSync(path))?.[1]?.trim() ?? "unknown";
  return {
    deno: `Deno ${Deno.version.deno}`,
    kernel: `Linux ${Deno.osRelease()}`,
    cpus: `${navigator.hardwareConcurrency} CPUs (${read("/proc/cpuinfo", /^model name\s*:(.*)$/m)})`,
    memory: `${Math.round(Number(read("/proc/meminfo", /^MemTotal:\s*(\d+)/m)) / 1024)} MiB`,
    load: `load ${read("/proc/loadavg", /^(\S+)/)}`,
    date: new Date().toISOString(),
  };
}

// --------------------------------------------------------------------------------------------------------- measurements

/** Runs `work` with a test bed in a directory of its own, which is removed afterwards. */
async function withTestbed<T>(
  variant: Variant,
  work: (testbed: Testbed, signal: AbortSignal) => Promise<T>,
): Promise<T> {
  return await interruptible(async (signal) => {
    const home = await Deno.makeTempDir({ prefix: "lbcsi-bench-" });
    // The same simulator for every variant, so that its speed does not show in the comparison.
    const testbed = new Testbed(home, variant.program, { simulator: fromSource });
    try {
      return await work(testbed, signal);
    } finally {
      for (const { done, what } of await testbed.cleanUp(false)) {
        if (!done) console.error(`could not clean up: ${what}`);
      }
    }
  });
}

class Interrupted extends Error {}

/** Work whose signal aborts on Ctrl-C, so that it can clean up. */
async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const limit = new AbortController();
  const stop = () => limit.abort(new Interrupted("interrupted"));
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, stop);
  try {
    const result = await work(limit.signal);
    limit.signal.throwIfAborted();
    return result;
  } finally {
    for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.removeSignalListener(signal, stop);
  }
}

/** Starts a service as it runs in production: it logs what is worth a line at level info. */
async function start(testbed: Testbed, role: Role, signal: AbortSignal): Promise<ServiceProcess> {
  switch (role) {
    case "identity":
      return await testbed.startService(role, [], signal);
    case "controller": {
      const jwt = join(testbed.home, "jwt");
      await Deno.writeTextFile(jwt, "");
      return await testbed.startService(role, ["--jwt-path", jwt], signal);
    }
    case "node":
      return await testbed.startService(role, ["--node-id", nodeId, "--discovery-dir", testbed.home], signal);
  }
}

async function measureStartUp(variant: Variant, { startUps }: Effort): Promise<readonly StartUp[]> {
  const rows: StartUp[] = [];
  for (const role of ["identity", "controller", "node"] as const) {
    const times = await withTestbed(variant, async (testbed, signal) => {
      const times: number[] = [];
      // The first is not counted: it fills the caches of the disk, of the runtime and of this client.
      for (let run = -1; run < startUps; run++) {
        const began = performance.now();
        const running = await start(testbed, role, signal);
        if (run >= 0) times.push(performance.now() - began);
        await running.end("SIGTERM", 10_000);
      }
      return times.sort((a, b) => a - b);
    });
    rows.push({
      variant: variant.name,
      role,
      runs: times.length,
      leastMs: rounded(times[0] ?? NaN),
      medianMs: rounded(quantile(times, 0.5)),
      mostMs: rounded(times.at(-1) ?? NaN),
    });
  }
  return rows;
}

async function measureMemory(variant: Variant, { memoryCalls }: Effort): Promise<readonly Memory[]> {
  const rows: Memory[] = [];
  for (const role of ["identity", "controller", "node"] as const) {
    await withTestbed(variant, async (testbed, signal) => {
      const running = await start(testbed, role, signal);
      const channel = testbed.channel(role);
      await waitUntilIdle(running);
      rows.push({ variant: variant.name, role, when: "idle", ...memoryOf(running) });
      const calls: readonly (() => Promise<unknown>)[] = [
        () => channel.call(Identity.method.probe, {}, { signal }),
        () => channel.call(Identity.method.getPluginInfo, {}, { signal }),
        ...role === "controller"
          ? [() => channel.call(Controller.method.controllerGetCapabilities, {}, { signal })]
          : role === "node"
          ? [() => channel.call(Node.method.nodeGetCapabilities, {}, { signal })]
          : [],
      ];
      let left = memoryCalls;
      await Promise.all(Array.from({ length: 50 }, async () => {
        while (left-- > 0) await calls[left % calls.length]?.();
      }));
      const when = `after ${memoryCalls} calls, 50 in flight`;
      rows.push({ variant: variant.name, role, when, ...memoryOf(running) });
    });
  }
  return rows;
}

async function measureThroughput(
  variant: Variant,
  effort: Effort,
): Promise<{ readonly throughput: readonly Throughput[]; readonly memory: Memory }> {
  return await withTestbed(variant, async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    // What is measured is the driver, not how long the cluster takes to make and forget a volume.
    await testbed.ask("PATCH", "/behaviour", { creationMs: 0, deletionMs: 0 });
    const ca = join(testbed.home, "ca.pem");
    await Deno.writeTextFile(ca, testbed.addresses.ca ?? "");
    const running = await testbed.startService("controller", ["--mgmt-ca", ca], signal);
    const throughput: Throughput[] = [];
    const calls = clusterCalls(testbed, signal);
    for (const inFlight of [1, 50]) {
      const load = (work: Load) => loaded(variant, inFlight, effort.loadMs, work);
      throughput.push(
        ...await load(async (_worker, meter) => {
          await meter(Identity.method.probe.name, testbed.controller.call(Identity.method.probe, {}, { signal }));
        }),
      );
      let number = 0;
      throughput.push(
        ...await load(async (_worker, meter) => {
          const id = await meter("CreateVolume", calls.create(`bench-${inFlight}-${number++}`));
          await meter("DeleteVolume", calls.remove(id));
        }),
      );
      const ids = await Promise.all(Array.from({ length: inFlight }, (_, at) => calls.create(`bench-access-${at}`)));
      throughput.push(
        ...await load(async (worker, meter) => {
          const id = ids[worker] ?? "";
          await meter("ControllerPublishVolume", calls.publish(id));
          await meter("ControllerUnpublishVolume", calls.unpublish(id));
        }),
      );
      await Promise.all(ids.map(calls.remove));
    }
    const when = "after these volume calls";
    return { throughput, memory: { variant: variant.name, role: "controller", when, ...memoryOf(running) } };
  });
}

function clusterCalls(testbed: Testbed, signal: AbortSignal) {
  const { addresses, controller } = testbed;
  const secrets = { jwt: addresses.jwt };
  const volumeCapability = {
    accessType: { case: "mount" as const, value: { fsType: "ext4" } },
    accessMode: { mode: Mode.SINGLE_NODE_WRITER },
  };
  const call = <I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> => channelCall(controller, method, request, signal);
  return {
    async create(name: string): Promise<string> {
      const { volume } = await call(Controller.method.createVolume, {
        name,
        capacityRange: { requiredBytes: 1n << 30n },
        volumeCapabilities: [volumeCapability],
        parameters: {
          "mgmt-endpoint": addresses.grpcs.join(","),
          "mgmt-scheme": "grpcs",
          "project-name": project,
          "replica-count": "1",
        },
        secrets,
      });
      return volume?.volumeId ?? "";
    },
    remove: (volumeId: string) => call(Controller.method.deleteVolume, { volumeId, secrets }),
    publish: (volumeId: string) =>
      call(Controller.method.controllerPublishVolume, { volumeId, nodeId, volumeCapability, secrets }),
    unpublish: (volumeId: string) => call(Controller.method.controllerUnpublishVolume, { volumeId, nodeId, secrets }),
  };
}

function channelCall<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
  signal: AbortSignal,
): Promise<MessageShape<O>> {
  return channel.call(method, request, { signal, deadline: new Date(Date.now() + 30_000) });
}

/** One round of a load; `meter` measures a call that was just begun. */
type Load = (worker: number, meter: <T>(name: string, call: Promise<T>) => Promise<T>) => Promise<void>;

/** Does a load `inFlight` times at once, again and again for `loadMs`, after a tenth of that time to warm up. */
async function loaded(
  variant: Variant,
  inFlight: number,
  loadMs: number,
  work: Load,
): Promise<readonly Throughput[]> {
  let times = new Map<string, number[]>();
  const meter = async <T>(name: string, call: Promise<T>): Promise<T> => {
    const began = performance.now();
    const into = times;
    const answer = await call;
    const list = into.get(name) ?? [];
    into.set(name, list);
    list.push(performance.now() - began);
    return answer;
  };
  const during = async (ms: number) => {
    const until = performance.now() + ms;
    await Promise.all(Array.from({ length: inFlight }, async (_, worker) => {
      while (performance.now() < until) await work(worker, meter);
    }));
  };
  await during(loadMs / 10);
  times = new Map();
  const began = performance.now();
  await during(loadMs);
  const seconds = (performance.now() - began) / 1000;
  return [...times].map(([call, list]) => {
    const sorted = list.sort((a, b) => a - b);
    return {
      variant: variant.name,
      call,
      inFlight,
      calls: sorted.length,
      callsPerSecond: Math.round(sorted.length / seconds),
      p50Ms: rounded(quantile(sorted, 0.5)),
      p99Ms: rounded(quantile(sorted, 0.99)),
    };
  });
}

async function measureCounts(variant: Variant | undefined): Promise<readonly Count[]> {
  if (variant === undefined) return [];
  const fsTypes: readonly FsType[] = needs("root", "loop", "mkfs.ext4")
    ? (["ext4", "xfs", "btrfs"] as const).filter((fsType) => needs(`mkfs.${fsType}`))
    : [];
  const costs = await interruptible((signal) => measureCalls(variant.program, fsTypes, signal));
  return costs.map(compared);
}

function compared({ call, managementCalls, programs }: Cost): Count {
  const [rpc = "", label = ""] = call.split(", ");
  const bound = label === firstVolume ? undefined : bounds[rpc];
  const within = bound === undefined ||
    (managementCalls.length <= bound.managementCalls && programs.length <= (bound.programs ?? Infinity));
  return { call, managementCalls, programs, bound, within };
}

/** Rows of one RPC that cost the same, as one. */
function folded(counts: readonly Count[]): readonly (Count & { readonly rpc: string; readonly volumes: string[] })[] {
  const rows = new Map<string, Count & { readonly rpc: string; readonly volumes: string[] }>();
  for (const count of counts) {
    const [rpc = "", label = ""] = count.call.split(", ");
    const key = [rpc, count.bound, count.managementCalls, count.programs].map((part) => JSON.stringify(part)).join();
    const row = rows.get(key) ?? { ...count, rpc, volumes: [] };
    row.volumes.push(label.replace(/ volume$/, ""));
    rows.set(key, row);
  }
  return [...rows.values()];
}

// ----------------------------------------------------------------------------------------------------------- the process

/** Waits until a process has used no CPU time for half a second, for 10 s at most. */
async function waitUntilIdle(running: ServiceProcess): Promise<void> {
  let used = -1;
  for (let round = 0; round < 20; round++) {
    const now = cpuTicks(running.pid);
    if (now === used) return;
    used = now;
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

function cpuTicks(pid: number): number {
  // proc(5): utime and stime are fields 14 and 15; the name in field 2 may hold spaces.
  const fields = Deno.readTextFileSync(`/proc/${pid}/stat`).replace(/^.*\) /, "").split(" ");
  return Number(fields[11]) + Number(fields[12]);
}

function memoryOf(running: ServiceProcess): { readonly rssMiB: number; readonly anonymousMiB: number } {
  const status = Deno.readTextFileSync(`/proc/${running.pid}/status`);
  const field = (name: string) => rounded(Number(new RegExp(`^${name}:\\s*(\\d+) kB$`, "m").exec(status)?.[1]) / 1024);
  return { rssMiB: field("VmRSS"), anonymousMiB: field("RssAnon") };
}

// ----------------------------------------------------------------------------------------------------------- the figures

/** Of sorted values. */
function quantile(sorted: readonly number[], share: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? NaN;
}

function rounded(value: number): number {
  return value < 10 ? Math.round(value * 100) / 100 : Math.round(value * 10) / 10;
}

function table<R>(
  title: string,
  rows: readonly R[],
  columns: Readonly<Record<string, (row: R) => string | number>>,
): void {
  console.log(`\n${title}`);
  const cells = [
    Object.keys(columns),
    ...rows.map((row) => Object.values(columns).map((column) => String(column(row)))),
  ];
  const isNumber = Object.values(columns).map((column) => rows.every((row) => typeof column(row) === "number"));
  const widths = isNumber.map((_, at) => Math.max(...cells.map((row) => row[at]?.length ?? 0)));
  for (const row of cells) {
    const padded = row.map((cell, at) => isNumber[at] ? cell.padStart(widths[at] ?? 0) : cell.padEnd(widths[at] ?? 0));
    console.log(`  ${padded.join("  ")}`.trimEnd());
  }
}

if (import.meta.main) {
  try {
    Deno.exit(await main(Deno.args));
  } catch (error) {
    if (!(error instanceof Interrupted)) throw error;
    console.error("interrupted, cleaned up");
    Deno.exit(130);
  }
}

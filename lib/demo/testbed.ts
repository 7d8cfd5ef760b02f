/**
 * The test bed: a simulator, a controller and a node as processes that keep all their files in one directory, and what an
 * observer outside can see of them. The demo, the tests and the benchmark use it.
 */
import { join } from "node:path";
import * as z from "zod";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { sleep } from "../timing.ts";
import { messageOf } from "../error.ts";
import { CallError, Channel } from "../grpc/client.ts";
import { hostNqn } from "../namespace.ts";
import { kindOf, listNames, loopsBelow, type Mount, mountsBelow, processesNaming, readText } from "./machine.ts";
import { ServiceProcess } from "./process.ts";

const addressesSchema = z.object({
  subsystemNqn: z.string().default(""),
  // Of LightOS.
  grpc: z.array(z.string()).default([]),
  grpcs: z.array(z.string()).default([]),
  ca: z.string().optional(),
  adminJwt: z.string().default(""),
  jwt: z.string().default(""),
  projects: z.array(z.string()).default([]),
  // Of PoseidonOS.
  dagent: z.string().default(""),
  arrays: z.array(z.string()).default([]),
  targetAddress: z.string().default(""),
  transportServiceId: z.string().default(""),

  control: z.string(),
  data: z.enum(["none", "loop", "nvmet"]),
  discoveryDir: z.string().optional(),
  devRoot: z.string().optional(),
  sysfsRoot: z.string().optional(),
  programs: z.string().optional(),
});
/** Where a simulator listens; it prints this when it has started. */
type Addresses = z.infer<typeof addressesSchema>;

const modelSchema = z.object({
  volumes: z.array(z.object({
    uuid: z.string(),
    name: z.string(),
    state: z.string(),
    sizeBytes: z.coerce.bigint(),
    acl: z.array(z.string()),
  })),
});
const poseidonModelSchema = z.object({
  arrays: z.array(z.object({
    volumes: z.array(z.object({ uuid: z.string(), name: z.string(), sizeBytes: z.coerce.bigint() })),
  })),
  subsystems: z.array(z.object({ nqn: z.string(), namespaces: z.array(z.object({ volumeUuid: z.string() })) })),
});
const callsSchema = z.record(z.string(), z.object({ total: z.number() }));
const leftoversSchema = z.record(z.string(), z.array(z.string()));
const logLineSchema = z.object({
  event: z.string(),
  command: z.string().optional(),
  exit: z.number().optional(),
  ms: z.number().optional(),
});
/** The part of a line of the driver's log that reports a command. */
type LogLine = z.infer<typeof logLineSchema>;

/** A command that the driver ran, from its log. */
export interface RanCommand {
  readonly command: string;
  readonly exit: number;
  readonly ms: number;
}

/** The program of a command line. */
export function programOf(command: string): string {
  return command.split(" ", 1)[0] ?? "";
}

/** What exists on the cluster, and what the test bed has on the machine. */
export interface Inventory {
  readonly volumes: z.infer<typeof modelSchema>["volumes"];
  readonly calls: Readonly<Record<string, number>>;
  readonly mounts: readonly Mount[];
  /** Loop devices whose files are in the test bed's directory. */
  readonly loops: readonly string[];
  /** Block devices that the simulated kernel shows. */
  readonly devices: readonly string[];
  /** Files of the Discovery-Client's directory. */
  readonly entries: readonly string[];
}

/** The inventory before the first observation. */
export const emptyInventory: Inventory = { volumes: [], calls: {}, mounts: [], loops: [], devices: [], entries: [] };

/** How often each RPC was called between two readings of the counters. */
export function countsBetween(
  before: Readonly<Record<string, number>>,
  after: Readonly<Record<string, number>>,
): Readonly<Record<string, number>> {
  return Object.fromEntries(
    Object.entries(after).map(([rpc, count]) => [rpc, count - (before[rpc] ?? 0)] as const)
      .filter(([, count]) => count > 0),
  );
}

/** The storage systems that can be simulated. */
export type Backend = "lightos" | "poseidon";

export interface TestbedOptions {
  /** What starts the lbcsi that simulates. Default: `program`. */
  readonly simulator?: readonly string[];
  /** Default `lightos`. */
  readonly backend?: Backend;
  /** How long a process may take to start: on a fresh machine it downloads packages first. Default 60 s. */
  readonly startLimitMs?: number;
}

/**
 * A simulator, a controller and a node as processes that keep all their files in the directory `home`.
 * Call `stopAll` and `cleanUp` at the end.
 */
export class Testbed {
  readonly home: string;
  readonly backend: Backend;
  readonly #program: readonly string[];
  readonly #simulator: readonly string[];
  readonly #startLimitMs: number;
  readonly #processes = new Map<string, ServiceProcess>();
  readonly #channels = new Map<string, Channel>();
  readonly #logRead = new Map<string, number>();
  #addresses: Addresses | undefined;

  /** @param program what starts lbcsi, for example `ownProgram()` */
  constructor(home: string, program: readonly string[], options: TestbedOptions = {}) {
    const { simulator = program, backend = "lightos", startLimitMs = 60_000 } = options;
    this.home = home;
    this.backend = backend;
    this.#program = program;
    this.#simulator = simulator;
    this.#startLimitMs = startLimitMs;
  }

  /** What the simulator printed when it had started. */
  get addresses(): Addresses {
    if (this.#addresses === undefined) throw new Error("the simulator has not been started");
    return this.#addresses;
  }

  /** The parameters of a StorageClass for the simulator. */
  get parameters(): Record<string, string> {
    const { grpcs, projects, dagent, arrays, targetAddress, transportServiceId } = this.addresses;
    if (this.backend === "lightos") {
      return {
        "mgmt-endpoint": grpcs.join(","),
        "mgmt-scheme": "grpcs",
        "project-name": projects[0] ?? "",
        "replica-count": "2",
      };
    }
    const [provisionerIP = "", provisionerPort = ""] = dagent.split(":");
    return { provisionerIP, provisionerPort, arrayName: arrays[0] ?? "", targetAddress, transportServiceId };
  }

  /** The secrets of calls to the controller; PoseidonOS has none. */
  get secrets(): Record<string, string> {
    return this.backend === "lightos" ? { jwt: this.addresses.jwt } : {};
  }

  get #backendOption(): readonly string[] {
    return this.backend === "lightos" ? [] : ["--backend", this.backend];
  }

  /** The connection to the controller. */
  get controller(): Channel {
    return this.channel("controller");
  }

  /** The connection to the node. */
  get node(): Channel {
    return this.channel("node");
  }

  /** The most recent process of this name. */
  running(name: string): ServiceProcess | undefined {
    return this.#processes.get(name);
  }

  /**
   * Starts the simulator; with devices, they and their contents are in the test bed's directory.
   *
   * @param options more options of `lbcsi simulate`
   */
  async startSimulator(
    data: Addresses["data"],
    signal: AbortSignal,
    options: readonly string[] = [],
  ): Promise<ServiceProcess> {
    const state = data === "none" || options.includes("--state") ? [] : ["--state", join(this.home, "cluster")];
    const args = ["simulate", ...this.#backendOption, "--data", data, ...state, "--log-level", "info", ...options];
    // An earlier process wrote to the same file.
    const skip = (await readText(join(this.home, "simulator.log.out")) ?? "").length;
    const running = this.#start("simulator", [...this.#simulator, ...args]);
    const line = await running.until("its addresses", signal, async () => {
      const text = (await readText(`${running.log}.out`) ?? "").slice(skip);
      return text.includes("\n") ? text.slice(0, text.indexOf("\n")) : undefined;
    });
    this.#addresses = addressesSchema.parse(JSON.parse(line));
    return running;
  }

  /** Starts the controller, which trusts the simulator's certificate where it has one. */
  async startController(signal: AbortSignal): Promise<ServiceProcess> {
    const certificate = this.addresses.ca ?? "";
    if (certificate === "") return await this.startService("controller", ["--log-level", "debug"], signal);
    const ca = join(this.home, "ca.pem");
    await Deno.writeTextFile(ca, certificate);
    return await this.startService("controller", ["--mgmt-ca", ca, "--log-level", "debug"], signal);
  }

  /**
   * Starts the node on the simulated machine.
   *
   * @param env added to the environment
   * @param options more options of `lbcsi node`
   */
  async startNode(
    nodeId: string,
    signal: AbortSignal,
    env: Readonly<Record<string, string>> = {},
    options: readonly string[] = [],
  ): Promise<ServiceProcess> {
    const { discoveryDir, devRoot, sysfsRoot, programs } = this.addresses;
    const directories = { "discovery-dir": discoveryDir, dev: devRoot, sysfs: sysfsRoot };
    const path = env["PATH"] ?? Deno.env.get("PATH") ?? "";
    // With PoseidonOS the node connects by itself, with the `nvme` program of the simulated machine.
    const isOnPath = programs === undefined || path.split(":").includes(programs);
    const pathVariable = this.backend === "poseidon" && !isOnPath ? { PATH: `${programs}:${path}` } : {};
    const directoryOptions = Object.entries(directories).flatMap(([name, path]) =>
      path === undefined ? [] : [`--${name}`, path]
    );
    const nodeOptions = ["--node-id", nodeId, ...directoryOptions, "--log-level", "debug", ...options];
    return await this.startService("node", nodeOptions, signal, { ...env, ...pathVariable });
  }

  /** Starts a service and waits until it answers a Probe. */
  async startService(
    role: "controller" | "node" | "identity",
    options: readonly string[],
    signal: AbortSignal,
    env: Readonly<Record<string, string>> = {},
  ): Promise<ServiceProcess> {
    const socket = join(this.home, `${role}.sock`);
    this.#channels.get(role)?.[Symbol.dispose]();
    this.#channels.delete(role);
    // A process that was killed leaves its socket file. It is removed, so that a file means that the new process listens.
    await removeIfThere(socket);
    const running = this.#start(role, [
      ...[...this.#program, role, ...this.#backendOption, "--endpoint", `unix://${socket}`],
      ...options,
    ], env);
    await running.until("an answer to Probe", signal, async () => {
      if (await kindOf(socket) === "absent") return undefined;
      const channel = new Channel({ address: `unix://${socket}`, userAgent: "lbcsi-demo" });
      try {
        await channel.call(Identity.method.probe, {}, { signal, deadline: new Date(Date.now() + 10_000) });
        this.#channels.set(role, channel);
        return true;
      } catch (error) {
        channel[Symbol.dispose]();
        // On a busy machine the first answer may take longer than the deadline of the call.
        const isEarly = error instanceof CallError && (error.origin !== "server" || error.code === "DEADLINE_EXCEEDED");
        if (isEarly) return undefined;
        throw error;
      }
    });
    return running;
  }

  #start(name: string, command: readonly string[], env: Readonly<Record<string, string>> = {}): ServiceProcess {
    const running = new ServiceProcess(name, command, join(this.home, `${name}.log`), {
      env,
      startLimitMs: this.#startLimitMs,
    });
    this.#processes.set(name, running);
    return running;
  }

  /** The connection to a service that was started. */
  channel(role: string): Channel {
    const channel = this.#channels.get(role);
    if (channel === undefined) throw new Error(`the ${role} has not been started`);
    return channel;
  }

  /** Sends a request to the simulator's control port. */
  async ask(method: "GET" | "POST" | "PATCH" | "DELETE", path: string, body?: unknown): Promise<unknown> {
    const response = await fetch(`${this.addresses.control}${path}`, {
      method,
      signal: AbortSignal.timeout(10_000),
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`the control port answered ${method} ${path} with ${response.status}: ${text}`);
    return JSON.parse(text);
  }

  /** Number of management API calls so far, by RPC. */
  async managementCalls(): Promise<Readonly<Record<string, number>>> {
    const counts = callsSchema.parse(await this.ask("GET", "/calls"));
    return Object.fromEntries(Object.entries(counts).map(([rpc, { total }]) => [rpc, total]));
  }

  /** Takes the inventory of cluster and machine, once hosts see exactly the namespaces that they may access. */
  async observe(): Promise<Inventory> {
    await this.ask("GET", "/settled");
    const { devRoot, discoveryDir } = this.addresses;
    const names = devRoot === undefined ? [] : await listNames(devRoot) ?? [];
    const kinds = await Promise.all(names.map((name) => kindOf(join(devRoot ?? "", name))));
    return {
      volumes: await this.#volumes(),
      calls: await this.managementCalls(),
      mounts: await mountsBelow(this.home),
      loops: await loopsBelow(this.home),
      devices: names.filter((_name, at) => kinds[at] === "block"),
      entries: discoveryDir === undefined ? [] : await listNames(discoveryDir) ?? [],
    };
  }

  async #volumes(): Promise<Inventory["volumes"]> {
    const model = await this.ask("GET", "/model");
    if (this.backend === "lightos") return modelSchema.parse(model).volumes;
    const { arrays, subsystems } = poseidonModelSchema.parse(model);
    return arrays.flatMap(({ volumes }) => volumes).map((volume) => ({
      ...volume,
      state: "Available",
      // PoseidonOS has no access lists: the NQN of the subsystem that exports the volume names its host.
      acl: subsystems.filter(({ namespaces }) => namespaces.some(({ volumeUuid }) => volumeUuid === volume.uuid))
        .map(({ nqn }) => nqn.startsWith("nqn.2019-04.pos:lbcsi:") ? hostNqn(nqn.replace(/^.*:/, "")) : nqn),
    }));
  }

  /** What is left on the cluster after running deletions have ended. Waits 10 s at most. */
  async clusterWhenIdle(signal: AbortSignal): Promise<Readonly<Record<string, readonly string[]>>> {
    for (let waitedMs = 0;; waitedMs += 50) {
      const left = leftoversSchema.parse(await this.ask("GET", "/leftovers"));
      if (Object.values(left).every((found) => found.length === 0) || waitedMs >= 10_000) return left;
      await sleep(50, signal);
    }
  }

  /** Lines that the controller and the node have logged since the last time. Both log a call before they answer it. */
  async newLogLines(): Promise<readonly LogLine[]> {
    const lines: LogLine[] = [];
    for (const name of ["controller", "node"]) {
      const text = await readText(join(this.home, `${name}.log`)) ?? "";
      const whole = text.slice(0, text.lastIndexOf("\n") + 1);
      const fresh = whole.slice(this.#logRead.get(name) ?? 0);
      this.#logRead.set(name, whole.length);
      for (const line of fresh.split("\n")) {
        // A runtime that crashes writes lines of its own.
        const parsed = logLineSchema.safeParse(line.startsWith("{") ? parseJson(line) : undefined);
        if (parsed.success) lines.push(parsed.data);
      }
    }
    return lines;
  }

  /** The last lines of each log, without probes and received requests. */
  async logTails(): Promise<readonly { readonly name: string; readonly lines: readonly string[] }[]> {
    const tails = [];
    for (const { name, log } of this.#processes.values()) {
      const lines = (await readText(log) ?? "").split("\n")
        .filter((line) => line !== "" && !line.includes('"event":"received"') && !line.includes('"rpc":"Probe"')).slice(
          -8,
        );
      if (lines.length > 0) tails.push({ name, lines: lines.map((line) => this.shorten(line)) });
    }
    return tails;
  }

  /** Paths of the logs that contain one of these words. */
  async logsContaining(words: readonly string[]): Promise<readonly string[]> {
    const found: string[] = [];
    for (const { log } of this.#processes.values()) {
      const text = await readText(log) ?? "";
      if (words.some((word) => text.includes(word))) found.push(log);
    }
    return found;
  }

  /** Stops every process with SIGTERM, in reverse order. Resolves with how each one ended: `exit 0`. */
  async stopAll(): Promise<readonly { readonly name: string; readonly exit: string }[]> {
    const exits = [];
    for (const channel of this.#channels.values()) channel[Symbol.dispose]();
    this.#channels.clear();
    for (const running of [...this.#processes.values()].reverse()) {
      if (running.isRunning) exits.push({ name: running.name, exit: await running.end("SIGTERM", 10_000) });
    }
    return exits;
  }

  /**
   * Removes whatever is left: processes, mounts, loop devices, the directory. Resolves with what it had to do besides
   * removing the directory, and with what it failed to do (`done` is false).
   */
  async cleanUp(keep: boolean): Promise<readonly { readonly done: boolean; readonly what: string }[]> {
    const forced: { done: boolean; what: string }[] = [];
    const attempt = async (what: string, work: () => Promise<unknown>) => {
      try {
        await work();
        forced.push({ done: true, what });
      } catch (error) {
        forced.push({ done: false, what: `${what}: ${messageOf(error)}` });
      }
    };
    for (const channel of this.#channels.values()) channel[Symbol.dispose]();
    // The simulator ends last: it detaches its loop devices when nothing uses them any more.
    const simulator = this.#processes.get("simulator");
    for (const running of this.#processes.values()) {
      if (running === simulator || !running.isRunning) continue;
      await attempt(`ended ${running.name}`, () => running.end("SIGTERM", 5000));
    }
    // Newest mount first, because mounts can be stacked.
    for (const { at } of (await mountsBelow(this.home)).reverse()) {
      await attempt(`unmounted ${this.shorten(at)}`, () => runTool("umount", at));
    }
    if (simulator?.isRunning) await attempt("ended simulator", () => simulator.end("SIGTERM", 5000));
    for (const loop of await loopsBelow(this.home)) {
      await attempt(`took ${loop} away`, () => runTool("losetup", "-d", `/dev/${loop}`));
    }
    for (const line of await processesNaming(this.home)) {
      forced.push({ done: false, what: `a process is left: ${line}` });
    }
    if (keep) return forced;
    const mounts = await mountsBelow(this.home);
    if (mounts.length > 0) {
      // A recursive removal would delete the content of the mounted file systems.
      forced.push({ done: false, what: `${this.home} is left, as mounts are below it` });
      return forced;
    }
    try {
      await Deno.remove(this.home, { recursive: true });
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) {
        forced.push({ done: false, what: `removed ${this.home}: ${messageOf(error)}` });
      }
    }
    return forced;
  }

  /** The text with paths relative to the test bed's directory. */
  shorten(text: string): string {
    return text.replaceAll(`${this.home}/`, "");
  }

  shortenCommand(ran: RanCommand): RanCommand {
    return { ...ran, command: this.shorten(ran.command) };
  }
}

async function runTool(program: string, ...args: readonly string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command(program, { args: [...args], stdout: "null", stderr: "piped" })
    .output();
  if (!success) throw new Error(new TextDecoder().decode(stderr).trim());
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

async function removeIfThere(path: string): Promise<void> {
  try {
    await Deno.remove(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

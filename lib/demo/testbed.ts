/**
 * The program as processes: a simulator, a controller and a node with everything of theirs in one directory, what they
 * say of themselves, and what can be seen of them from outside.
 */
import { join } from "node:path";
import * as z from "zod";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { sleep } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { CallError, Channel } from "../grpc/client.ts";
import { hostNqn } from "../namespace.ts";
import { kindOf, listNames, loopsBelow, type Mount, mountsBelow, processesNaming, readText } from "./machine.ts";

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
/** Where a simulator listens, as it says itself when it has started. */
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
/** The part of a line in the driver's log that tells of commands. */
type LogLine = z.infer<typeof logLineSchema>;

/** A command that the driver ran, as its log tells. */
export interface RanCommand {
  readonly command: string;
  readonly exit: number;
  readonly ms: number;
}

/** The program of a command line. */
export function programOf(command: string): string {
  return command.split(" ", 1)[0] ?? "";
}

/** What there is on the cluster and, of the rig, on the machine. */
export interface Inventory {
  readonly volumes: z.infer<typeof modelSchema>["volumes"];
  readonly calls: Readonly<Record<string, number>>;
  readonly mounts: readonly Mount[];
  /** Loop devices whose files are in the rig's directory. */
  readonly loops: readonly string[];
  /** Block devices that the simulated kernel shows. */
  readonly devices: readonly string[];
  /** Files of the Discovery-Client's directory. */
  readonly entries: readonly string[];
}

/** What there is before anything was looked at. */
export const emptyInventory: Inventory = { volumes: [], calls: {}, mounts: [], loops: [], devices: [], entries: [] };

/** How often each RPC was called between two looks at the counters. */
export function countsBetween(
  before: Readonly<Record<string, number>>,
  after: Readonly<Record<string, number>>,
): Readonly<Record<string, number>> {
  return Object.fromEntries(
    Object.entries(after).map(([rpc, count]) => [rpc, count - (before[rpc] ?? 0)] as const)
      .filter(([, count]) => count > 0),
  );
}

/** The storage systems that can be played. */
export type Backend = "lightos" | "poseidon";

/**
 * A simulator, a controller and a node as processes, with everything of theirs in one directory.
 *
 * The benchmark and the tests of bounds use it too.
 */
export class Testbed {
  readonly home: string;
  readonly backend: Backend;
  readonly #program: readonly string[];
  readonly #simulator: readonly string[];
  readonly #patienceMs: number;
  readonly #processes = new Map<string, Running>();
  readonly #channels = new Map<string, Channel>();
  readonly #logRead = new Map<string, number>();
  #addresses: Addresses | undefined;

  /**
   * @param program what starts lbcsi, `ownProgram()`
   * @param simulator what starts the lbcsi that simulates; the same unless told otherwise
   * @param patienceMs how long a process may take to start: on a fresh machine it fetches packages first
   */
  constructor(
    home: string,
    program: readonly string[],
    simulator = program,
    backend: Backend = "lightos",
    patienceMs = 60_000,
  ) {
    this.home = home;
    this.backend = backend;
    this.#program = program;
    this.#simulator = simulator;
    this.#patienceMs = patienceMs;
  }

  /** What the simulator said when it had started. */
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

  /** The secrets of calls to the controller; PoseidonOS knows none. */
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

  /** The process of this name that was started last. */
  running(name: string): Running | undefined {
    return this.#processes.get(name);
  }

  /**
   * Starts the simulator; with devices, they and their contents are in the rig's directory.
   *
   * @param options more options of `lbcsi simulate`
   */
  async startSimulator(
    data: Addresses["data"],
    signal: AbortSignal,
    options: readonly string[] = [],
  ): Promise<Running> {
    const state = data === "none" || options.includes("--state") ? [] : ["--state", join(this.home, "cluster")];
    const words = ["simulate", ...this.#backendOption, "--data", data, ...state, "--log-level", "info", ...options];
    // An earlier one wrote to the same file.
    const said = (await readText(join(this.home, "simulator.log.out")) ?? "").length;
    const running = this.#start("simulator", [...this.#simulator, ...words]);
    const line = await running.until("its addresses", signal, async () => {
      const text = (await readText(`${running.log}.out`) ?? "").slice(said);
      return text.includes("\n") ? text.slice(0, text.indexOf("\n")) : undefined;
    });
    this.#addresses = addressesSchema.parse(JSON.parse(line));
    return running;
  }

  /** Starts the controller, which trusts the simulator's certificate where it has one. */
  async startController(signal: AbortSignal): Promise<Running> {
    const certificate = this.addresses.ca ?? "";
    if (certificate === "") return await this.startService("controller", ["--log-level", "debug"], signal);
    const ca = join(this.home, "ca.pem");
    await Deno.writeTextFile(ca, certificate);
    return await this.startService("controller", ["--mgmt-ca", ca, "--log-level", "debug"], signal);
  }

  /**
   * Starts the node on the simulator's machine.
   *
   * @param env added to the environment
   * @param options more options of `lbcsi node`
   */
  async startNode(
    nodeId: string,
    signal: AbortSignal,
    env: Readonly<Record<string, string>> = {},
    options: readonly string[] = [],
  ): Promise<Running> {
    const { discoveryDir, devRoot, sysfsRoot, programs } = this.addresses;
    const places = { "discovery-dir": discoveryDir, dev: devRoot, sysfs: sysfsRoot };
    const path = env["PATH"] ?? Deno.env.get("PATH") ?? "";
    // With PoseidonOS the node connects by itself, with the nvme of the simulated machine.
    const isOnPath = programs === undefined || path.split(":").includes(programs);
    const itsPath = this.backend === "poseidon" && !isOnPath ? { PATH: `${programs}:${path}` } : {};
    const words = Object.entries(places).flatMap(([name, path]) => path === undefined ? [] : [`--${name}`, path]);
    const nodeOptions = ["--node-id", nodeId, ...words, "--log-level", "debug", ...options];
    return await this.startService("node", nodeOptions, signal, { ...env, ...itsPath });
  }

  /** Starts a service and waits until it answers a Probe. */
  async startService(
    role: "controller" | "node" | "identity",
    options: readonly string[],
    signal: AbortSignal,
    env: Readonly<Record<string, string>> = {},
  ): Promise<Running> {
    const socket = join(this.home, `${role}.sock`);
    this.#channels.get(role)?.[Symbol.dispose]();
    this.#channels.delete(role);
    // One that was killed leaves its socket file; without it here, the file tells that the new one listens.
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
        // On a busy machine the first answer may take longer than the call.
        const isEarly = error instanceof CallError && (error.origin !== "server" || error.code === "DEADLINE_EXCEEDED");
        if (isEarly) return undefined;
        throw error;
      }
    });
    return running;
  }

  #start(name: string, command: readonly string[], env: Readonly<Record<string, string>> = {}): Running {
    const running = new Running(name, command, join(this.home, `${name}.log`), env, this.#patienceMs);
    this.#processes.set(name, running);
    return running;
  }

  /** The connection to a service that has been started. */
  channel(role: string): Channel {
    const channel = this.#channels.get(role);
    if (channel === undefined) throw new Error(`the ${role} has not been started`);
    return channel;
  }

  /** Asks the simulator's control port. */
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

  /** Calls of the management API so far, by RPC. */
  async managementCalls(): Promise<Readonly<Record<string, number>>> {
    const counts = callsSchema.parse(await this.ask("GET", "/calls"));
    return Object.fromEntries(Object.entries(counts).map(([rpc, { total }]) => [rpc, total]));
  }

  /** Looks at the cluster and at the machine, once hosts see what they may. */
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
      // Who may connect is written in the names of the subsystems that show the volume.
      acl: subsystems.filter(({ namespaces }) => namespaces.some(({ volumeUuid }) => volumeUuid === volume.uuid))
        .map(({ nqn }) => nqn.startsWith("nqn.2019-04.pos:lbcsi:") ? hostNqn(nqn.replace(/^.*:/, "")) : nqn),
    }));
  }

  /** What is left on the cluster once deletions that go on by themselves have ended; waits for that for 10 s at most. */
  async clusterWhenIdle(signal: AbortSignal): Promise<Readonly<Record<string, readonly string[]>>> {
    for (let waitedMs = 0;; waitedMs += 50) {
      const left = leftoversSchema.parse(await this.ask("GET", "/leftovers"));
      if (Object.values(left).every((found) => found.length === 0) || waitedMs >= 10_000) return left;
      await sleep(50, signal);
    }
  }

  /** Lines that the controller and the node have logged since the last time. They log a call before they answer it. */
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

  /** The ends of the logs, without what tells nothing. */
  async lastWords(): Promise<readonly { readonly name: string; readonly lines: readonly string[] }[]> {
    const words = [];
    for (const { name, log } of this.#processes.values()) {
      const lines = (await readText(log) ?? "").split("\n")
        .filter((line) => line !== "" && !line.includes('"event":"received"') && !line.includes('"rpc":"Probe"')).slice(
          -8,
        );
      if (lines.length > 0) words.push({ name, lines: lines.map((line) => this.short(line)) });
    }
    return words;
  }

  /** Names of the logs in which one of `texts` stands. */
  async logsThatHold(texts: readonly string[]): Promise<readonly string[]> {
    const found: string[] = [];
    for (const { log } of this.#processes.values()) {
      const text = await readText(log) ?? "";
      if (texts.some((one) => text.includes(one))) found.push(log);
    }
    return found;
  }

  /** Stops every process with SIGTERM, in reverse order, and tells how each ended. */
  async stopAll(): Promise<readonly { readonly name: string; readonly ending: string }[]> {
    const endings = [];
    for (const channel of this.#channels.values()) channel[Symbol.dispose]();
    this.#channels.clear();
    for (const running of [...this.#processes.values()].reverse()) {
      if (running.isRunning) endings.push({ name: running.name, ending: await running.end("SIGTERM", 10_000) });
    }
    return endings;
  }

  /**
   * Takes away whatever is still there: processes, mounts, loop devices, the directory. Tells what it had to do besides
   * removing the directory, and what it could not do.
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
    // The simulator goes last: it takes its loop devices away when nothing uses them any more.
    const simulator = this.#processes.get("simulator");
    for (const running of this.#processes.values()) {
      if (running === simulator || !running.isRunning) continue;
      await attempt(`ended ${running.name}`, () => running.end("SIGTERM", 5000));
    }
    // The last mount first, as mounts can lie on one another.
    for (const { at } of (await mountsBelow(this.home)).reverse()) {
      await attempt(`unmounted ${this.short(at)}`, () => runTool("umount", at));
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
      // A recursive removal would go through them into a file system.
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

  /** A text without the rig's directory in its paths. */
  short(text: string): string {
    return text.replaceAll(`${this.home}/`, "");
  }

  shorten(ran: RanCommand): RanCommand {
    return { ...ran, command: this.short(ran.command) };
  }
}

/** A process of ours. Its stderr goes to the file `log`, its stdout to `log` with `.out` behind it. */
export class Running {
  readonly name: string;
  readonly log: string;
  readonly pid: number;
  readonly #child: Deno.ChildProcess;
  readonly #patienceMs: number;
  #status: Deno.CommandStatus | undefined;

  constructor(
    name: string,
    command: readonly string[],
    log: string,
    env: Readonly<Record<string, string>> = {},
    patienceMs = 60_000,
  ) {
    this.name = name;
    this.log = log;
    this.#patienceMs = patienceMs;
    // The shell gives way to the program, which thus has this PID, and writes to files: what it wrote before it answered a
    // call is there when the answer is.
    this.#child = new Deno.Command("/bin/sh", {
      args: ["-c", 'exec "$@" >>"$0.out" 2>>"$0"', log, ...command],
      stdin: "null",
      stdout: "null",
      stderr: "null",
      // The logs are read as text.
      env: { NO_COLOR: "1", ...env },
      // Ctrl-C is for us alone: we end them in order.
      detached: true,
    }).spawn();
    this.pid = this.#child.pid;
    this.#child.status.then((status) => this.#status = status);
  }

  get isRunning(): boolean {
    return this.#status === undefined;
  }

  /**
   * Polls until `look` answers something; rejects with the end of its log when the process ends instead, or its time is
   * up.
   */
  async until<T>(what: string, signal: AbortSignal, look: () => Promise<T | undefined>): Promise<T> {
    const began = performance.now();
    for (;;) {
      const ended = this.#status;
      const passed = performance.now() - began;
      const found = await look();
      if (found !== undefined) return found;
      if (ended !== undefined || passed > this.#patienceMs) {
        const log = (await readText(this.log) ?? "").trimEnd().split("\n").slice(-5).join("\n");
        const fate = ended === undefined
          ? `it gave none for ${this.#patienceMs / 1000} s`
          : `it ended with status ${ended.code}`;
        throw new StatusError("UNAVAILABLE", `Cannot get ${what} from the ${this.name}: ${fate}\n${log}`);
      }
      // Where starting takes long, looking does too, and takes its time from the one who starts.
      await sleep(Math.min(250, Math.max(5, passed / 20)), signal);
    }
  }

  /** Sends `signal`, waits, and sends SIGKILL after `graceMs`; tells how it ended, `exit 0` or the like. */
  async end(signal: "SIGTERM" | "SIGKILL", graceMs: number): Promise<string> {
    try {
      this.#child.kill(signal);
    } catch {
      // It has ended already.
    }
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), graceMs));
    const status = await Promise.race([this.#child.status, late]);
    clearTimeout(timer);
    if (status !== undefined) return status.signal === null ? `exit ${status.code}` : `ended by ${status.signal}`;
    this.#child.kill("SIGKILL");
    await this.#child.status;
    return `did not end within ${graceMs} ms, killed`;
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

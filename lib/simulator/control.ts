/**
 * The simulator's control port: HTTP with JSON, on a loopback address only.
 *
 * Every answer is JSON. A body that does not match is answered with status 400 and `{"error": …}` that names the field, a
 * path that does not exist with 404.
 *
 * | request                       | body                                                        | effect                      |
 * | ----------------------------- | ----------------------------------------------------------- | --------------------------- |
 * | GET /                         |                                                             | addresses and tokens        |
 * | GET /model                    |                                                             | everything the cluster holds |
 * | GET /leftovers                |                                                             | what was not cleaned up     |
 * | GET /settled                  |                                                             | answers when hosts see exactly what they may access |
 * | GET /visible?host=NQN         |                                                             | namespaces that a host may access |
 * | GET /calls, DELETE /calls     |                                                             | calls per RPC; reset        |
 * | POST /faults                  | {rpc, count?, skip?, code? or event?, message?, delayMs?, drop?, hold?, when?, endpoint?} | adds a rule, see faults.ts |
 * | DELETE /faults                |                                                             | removes the rules, releases held calls |
 * | GET /held, DELETE /held       |                                                             | calls that a rule holds; releases them |
 * | GET /behaviour, PATCH         | any of {creationMs, deletionMs, updateMs, rollbackMs, holdCreations, failCreations, nameShowsDead, snapshotWaitsForClones, nameCheckedLast, asDocumented} | how the cluster behaves |
 * | POST /creations/release       |                                                             | releases held creations     |
 * | PATCH /volumes/UUID           | {state?, protection?}                                       | sets them permanently       |
 * | POST /projects                | {name}                                                      | adds a project              |
 * | POST /policies                | {name, kind, read, write, projects?, description?}          | adds a QoS policy           |
 * | PATCH /features/NAME          | {enabled}                                                   | switches a feature          |
 * | POST /tokens                  | {projects?, lifeMs?}                                        | a token; without projects for the cluster |
 * | GET /endpoints                |                                                             | management endpoints, state |
 * | POST /endpoints/stop, /start, /hang, /drop | {server?, scheme?, address?}                   | to those that match         |
 * | POST /restart                 | {memory?: boolean}                                          | restarts the cluster, as after a power cut |
 * | GET /devices                  |                                                             | block devices of the machine |
 * | POST /devices/remove, /heal   | {uuid}                                                      | see Machine in data_plane.ts |
 * | POST /devices/restore         | {uuid, name?}                                               | the same                    |
 * | POST /devices/damage          | {uuid, how: "unreadable" or "empty"}                        | the same                    |
 * | POST /devices/swap            | {uuid, other}                                               | the same                    |
 * | GET /paths                    |                                                             | I/O controllers of the servers, state |
 * | POST /paths/down, /up         | {server}                                                    | as if a server were switched off, on |
 * | POST /paths/ana               | {server, state}                                             | the ANA state that a server reports: "optimized", "inaccessible" … |
 */
import * as z from "zod";
import { messageOf, StatusError } from "../error.ts";
import type { Logger } from "../log.ts";
import type { Scheme } from "../volume_id.ts";
import { anaStates, type DataPlane, type Machine, type Paths } from "./data_plane/data_plane.ts";
import type { CallCount, CallEvent, FaultRule, Faults, HeldCall } from "./faults.ts";
import type { Behaviour } from "./lightos/behaviour.ts";
import type { Cluster } from "./lightos/cluster.ts";
import { type Protection, protections, type SimPolicy, type VolumeState, volumeStates } from "./lightos/model.ts";
import type { ApiEndpoint } from "./lightos/service.ts";
import type { Tokens } from "./lightos/token.ts";
import { onFreePort } from "./port.ts";

/** Selects management endpoints: those that match every given field; all of them without a field. */
export interface EndpointFilter {
  /** Number of the server, from 0. */
  readonly server?: number | undefined;
  readonly scheme?: Scheme | undefined;
  /** `host:port`. */
  readonly address?: string | undefined;
}

/** A management endpoint and its state. */
export interface EndpointState {
  readonly server: number;
  readonly scheme: Scheme;
  readonly address: string;
  readonly state: ApiEndpoint["state"];
}

/** What was made on the cluster or the machine and has not been removed. */
export interface Leftovers {
  /** Volumes, `<name> <uuid> <state>`; without husks of failed creations, which cannot be deleted. */
  readonly volumes: readonly string[];
  readonly snapshots: readonly string[];
  /** Access list entries, `<volume uuid> <host NQN>`. */
  readonly access: readonly string[];
  /** Block devices that hosts see, by name. */
  readonly devices: readonly string[];
}

/** A fault to add. Default: one call, before its effect. */
export type FaultRequest =
  & { readonly rpc: string }
  & { readonly [K in Exclude<keyof FaultRule, "rpc">]?: FaultRule[K] };

/** Control over the calls of a management API. */
export interface CallControl {
  /** Calls per RPC since the last reset. */
  calls(): Readonly<Record<string, CallCount>>;
  /** Calls of all RPCs since the last reset. */
  callsInAll(): number;
  resetCalls(): void;
  fail(fault: FaultRequest): void;
  clearFaults(): void;
  /** Calls that a rule holds, oldest first. */
  held(): readonly HeldCall[];
  releaseHeld(): void;
  /** Passes the begin and end of each call to `listener`. */
  watchCalls(listener: (event: CallEvent) => void): Disposable;
}

/** The functions of the control port, for callers in the same process. */
export interface Control extends CallControl {
  readonly cluster: Cluster;
  behave(change: Partial<Behaviour>): void;
  releaseCreations(): void;
  setVolume(uuid: string, to: { readonly state?: VolumeState; readonly protection?: Protection }): void;
  addProject(name: string): void;
  addPolicy(policy: Omit<SimPolicy, "uuid">): SimPolicy;
  /** A token for these projects, or for the whole cluster. */
  token(projects?: readonly string[], lifeMs?: number): string;
  visible(hostNqn: string): readonly string[];
  leftovers(): Leftovers;
  /** Resolves when hosts see exactly the namespaces that they may access. */
  waitUntilSettled(): Promise<void>;
  endpoints(): readonly EndpointState[];
  stopEndpoints(which?: EndpointFilter): Promise<void>;
  startEndpoints(which?: EndpointFilter): Promise<void>;
  hangEndpoints(which?: EndpointFilter): Promise<void>;
  dropConnections(which?: EndpointFilter): void;
  /** Ends and starts the cluster, with everything it holds or as a new installation. */
  restart(options?: { readonly memory?: boolean }): Promise<void>;
  /** @throws StatusError UNIMPLEMENTED for a data plane without a machine */
  machine(): Machine;
  /** @throws StatusError UNIMPLEMENTED for a data plane that no host connects to */
  paths(): Paths;
}

/** The part of a control port that is the same for every management API. */
export function callControl(faults: Faults): CallControl {
  return {
    calls: () => faults.calls(),
    callsInAll: () => Object.values(faults.calls()).reduce((sum, { total }) => sum + total, 0),
    resetCalls: () => faults.resetCalls(),
    fail: (fault) => faults.add({ ...fault, count: fault.count ?? 1, when: fault.when ?? "before" }),
    clearFaults: () => faults.clear(),
    held: () => faults.held(),
    releaseHeld: () => faults.release(),
    watchCalls: (listener) => faults.watch(listener),
  };
}

/** The control functions over a cluster and its endpoints. */
export function createControl(
  cluster: Cluster,
  endpoints: readonly ApiEndpoint[],
  faults: Faults,
  tokens: Tokens,
): Control {
  const matching = (which: EndpointFilter = {}) => {
    const found = endpoints.filter((endpoint) =>
      (which.server === undefined || endpoint.server === which.server) &&
      (which.scheme === undefined || endpoint.scheme === which.scheme) &&
      (which.address === undefined || endpoint.address === which.address)
    );
    if (found.length > 0) return found;
    throw new StatusError("NOT_FOUND", `Cannot find an endpoint with ${JSON.stringify(which)}`);
  };
  const each = async (which: EndpointFilter | undefined, step: (endpoint: ApiEndpoint) => Promise<void>) => {
    await Promise.all(matching(which).map(step));
  };
  const self: Control = {
    ...callControl(faults),
    cluster,
    behave: (change) => {
      Object.assign(cluster.behaviour, change);
    },
    releaseCreations: () => cluster.releaseCreations(),
    setVolume: (uuid, to) => cluster.setVolume(uuid, to),
    addProject: (name) => cluster.addProject(name),
    addPolicy: (policy) => cluster.addPolicy(policy),
    token: (projects, lifeMs) =>
      tokens.issue(projects === undefined ? { scope: "cluster" } : { scope: "projects", projects }, lifeMs),
    visible: (hostNqn) => cluster.visibleTo(hostNqn),
    leftovers: () => ({
      volumes: cluster.volumes.filter(({ state }) => state !== "Failed")
        .map(({ name, uuid, state }) => `${name} ${uuid} ${state}`),
      snapshots: cluster.snapshots.filter(({ state }) => state !== "Failed")
        .map(({ name, uuid, state }) => `${name} ${uuid} ${state}`),
      access: cluster.volumes.filter(({ state }) => state !== "Failed").flatMap(({ uuid, acl }) =>
        acl.filter((entry) => entry !== "ALLOW_NONE").map((entry) => `${uuid} ${entry}`)
      ),
      devices: (cluster.dataPlane.machine?.devices ?? []).map(({ name }) => name),
    }),
    waitUntilSettled: () => cluster.dataPlane.waitUntilSettled(),
    endpoints: () => endpoints.map(({ server, scheme, address, state }) => ({ server, scheme, address, state })),
    stopEndpoints: (which) => each(which, (endpoint) => endpoint.stop()),
    startEndpoints: (which) => each(which, (endpoint) => endpoint.start()),
    hangEndpoints: (which) => each(which, (endpoint) => endpoint.hang()),
    dropConnections: (which) => {
      for (const endpoint of matching(which)) endpoint.dropConnections();
    },
    async restart({ memory = true } = {}) {
      const running = endpoints.filter(({ state }) => state === "running");
      await Promise.all(running.map((endpoint) => endpoint.stop()));
      cluster.pause();
      if (memory) await cluster.resume();
      else await cluster.forget();
      await Promise.all(running.map((endpoint) => endpoint.start()));
    },
    machine: () => machineOf(cluster.dataPlane),
    paths: () => pathsOf(cluster.dataPlane),
  };
  return self;
}

/** The machine that a data plane simulates; throws UNIMPLEMENTED when it simulates none. */
export function machineOf({ kind, machine }: DataPlane): Machine {
  if (machine !== undefined) return machine;
  throw new StatusError("UNIMPLEMENTED", `Cannot change a device: data plane "${kind}" has none, use another one`);
}

/** The I/O ports of a data plane; throws UNIMPLEMENTED when hosts cannot connect to it. */
export function pathsOf({ kind, paths }: DataPlane): Paths {
  if (paths !== undefined) return paths;
  throw new StatusError("UNIMPLEMENTED", `Cannot change a path: no host connects to data plane "${kind}", use "nvmet"`);
}

/** A running control port. */
export interface ControlPort extends AsyncDisposable {
  readonly url: string;
}

const schemeSchema = z.enum(["grpc", "grpcs"]);
const filterSchema = z.strictObject({
  server: z.int().min(0).optional(),
  scheme: schemeSchema.optional(),
  address: z.string().optional(),
});
const faultSchema = z.strictObject({
  rpc: z.string().min(1),
  count: z.int().min(0).default(1),
  code: z.enum([
    "CANCELLED",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
  ]).optional(),
  message: z.string().optional(),
  event: z.string().optional(),
  delayMs: z.number().min(0).optional(),
  drop: z.boolean().optional(),
  skip: z.int().min(0).optional(),
  hold: z.boolean().optional(),
  when: z.enum(["before", "after"]).default("before"),
  endpoint: z.string().optional(),
}).refine(
  ({ code, event, delayMs, drop, hold }) => [code, event, delayMs].some((given) => given !== undefined) || drop || hold,
  { message: "one of code, event, delayMs, drop and hold is needed" },
);
const milliseconds = z.number().min(0);
const behaviourSchema = z.strictObject({
  creationMs: milliseconds,
  deletionMs: milliseconds,
  updateMs: milliseconds,
  rollbackMs: milliseconds,
  holdCreations: z.boolean(),
  failCreations: z.int().min(0),
  nameShowsDead: z.boolean(),
  snapshotWaitsForClones: z.boolean(),
  nameCheckedLast: z.boolean(),
  asDocumented: z.boolean(),
}).partial();
const volumeSchema = z.strictObject({ state: z.enum(volumeStates), protection: z.enum(protections) }).partial();
const policySchema = z.strictObject({
  name: z.string(),
  description: z.string().default(""),
  kind: z.enum(["iops", "bandwidth", "iopsPerGb"]),
  read: z.int().min(0),
  write: z.int().min(0),
  projects: z.array(z.string()).optional(),
});
const tokenSchema = z.strictObject({ projects: z.array(z.string()), lifeMs: z.number() }).partial();
const serverSchema = z.strictObject({ server: z.int().min(0) });
const uuidSchema = z.strictObject({ uuid: z.uuid() });

/**
 * Serves the control port.
 *
 * @param about what GET / answers
 * @throws StatusError INVALID_ARGUMENT for a host that is not a loopback address, because the port needs no credentials
 */
export function serveControl(
  control: Control,
  about: () => unknown,
  options: ControlPortOptions,
): Promise<ControlPort> {
  return serveRoutes(routesOf(control, about), options);
}

/** Where a control port listens. */
export interface ControlPortOptions {
  readonly host: string;
  readonly port: number;
  readonly log: Logger;
}

/** Serves routes as a control port; throws what serveControl throws. */
export async function serveRoutes(
  routes: readonly Route[],
  { host, port, log }: ControlPortOptions,
): Promise<ControlPort> {
  if (!/^(127\.|::1$|localhost$)/.test(host)) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot serve the control port on ${host}: only loopback is safe`);
  }
  const answer = async (request: Request): Promise<Response> => {
    const url = new URL(request.url);
    try {
      const text = await request.text();
      for (const [method, pattern, run] of routes) {
        const match = method === request.method ? pattern.exec(url.pathname) : null;
        if (match === null) continue;
        const body = await run({ text, url, argument: decodeURIComponent(match[1] ?? "") });
        return reply(200, body ?? {});
      }
      return reply(404, { error: `Cannot find ${request.method} ${url.pathname}` });
    } catch (error) {
      const known = error instanceof StatusError;
      if (!known) log.error("control port failed", { error: messageOf(error) });
      return reply(known ? 400 : 500, { error: messageOf(error) });
    }
  };
  const server = await onFreePort(port, async (port) => {
    try {
      const started = Promise.withResolvers<void>();
      const server = Deno.serve({ hostname: host, port, onListen: () => started.resolve() }, answer);
      await started.promise;
      return server;
    } catch (cause) {
      throw new StatusError("FAILED_PRECONDITION", `Cannot listen on ${host}:${port}: ${messageOf(cause)}`, { cause });
    }
  });
  return {
    url: `http://${host.includes(":") ? `[${host}]` : host}:${server.addr.port}`,
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

function reply(status: number, body: unknown): Response {
  const text = JSON.stringify(body, (_key, value) => typeof value === "bigint" ? String(value) : value);
  return new Response(`${text}\n`, { status, headers: { "content-type": "application/json" } });
}

/** A request of a control port. */
export interface ControlRequest {
  readonly text: string;
  readonly url: URL;
  readonly argument: string;
}
export type Route = readonly ["GET" | "POST" | "PATCH" | "DELETE", RegExp, (request: ControlRequest) => unknown];

function routesOf(control: Control, about: () => unknown): readonly Route[] {
  const { cluster } = control;
  const endpointRoute = (name: string, run: (which: EndpointFilter) => Promise<void> | void): Route => [
    "POST",
    new RegExp(`^/endpoints/${name}$`),
    async ({ text }) => {
      await run(parse(filterSchema, text));
      return control.endpoints();
    },
  ];
  return [
    ["GET", /^\/$/, about],
    ["GET", /^\/model$/, () => cluster.dump()],
    ["GET", /^\/leftovers$/, () => control.leftovers()],
    ["GET", /^\/visible$/, ({ url }) => control.visible(url.searchParams.get("host") ?? "")],
    ...sharedRoutes(control),
    ["GET", /^\/behaviour$/, () => cluster.behaviour],
    ["PATCH", /^\/behaviour$/, ({ text }) => {
      control.behave(withoutUndefined(parse(behaviourSchema, text)));
      return cluster.behaviour;
    }],
    ["POST", /^\/creations\/release$/, () => control.releaseCreations()],
    ["PATCH", /^\/volumes\/([^/]+)$/, ({ text, argument }) => {
      control.setVolume(argument, withoutUndefined(parse(volumeSchema, text)));
    }],
    ["POST", /^\/projects$/, ({ text }) => control.addProject(parse(z.strictObject({ name: z.string() }), text).name)],
    ["POST", /^\/policies$/, ({ text }) => {
      const { kind, read, write, ...policy } = parse(policySchema, text);
      return control.addPolicy({ ...policy, limit: { kind, read, write } });
    }],
    ["PATCH", /^\/features\/([^/]+)$/, ({ text, argument }) => {
      cluster.setFeature(argument, parse(z.strictObject({ enabled: z.boolean() }), text).enabled);
    }],
    ["POST", /^\/tokens$/, ({ text }) => {
      const { projects, lifeMs } = parse(tokenSchema, text);
      return { token: control.token(projects, lifeMs) };
    }],
    ["GET", /^\/endpoints$/, () => control.endpoints()],
    endpointRoute("stop", control.stopEndpoints),
    endpointRoute("start", control.startEndpoints),
    endpointRoute("hang", control.hangEndpoints),
    endpointRoute("drop", control.dropConnections),
    ["POST", /^\/restart$/, async ({ text }) => {
      const { memory = true } = parse(z.strictObject({ memory: z.boolean().optional() }), text);
      await control.restart({ memory });
    }],
  ];
}

/** What control ports of all storage systems offer: faults and counts of calls, and the devices of the machine. */
export function sharedRoutes(
  control: CallControl & Pick<Control, "waitUntilSettled" | "machine" | "paths">,
): readonly Route[] {
  return [
    ["GET", /^\/settled$/, () => control.waitUntilSettled()],
    ["GET", /^\/calls$/, () => control.calls()],
    ["DELETE", /^\/calls$/, () => control.resetCalls()],
    ["POST", /^\/faults$/, ({ text }) => control.fail(parse(faultSchema, text))],
    ["DELETE", /^\/faults$/, () => control.clearFaults()],
    ["GET", /^\/held$/, () => control.held()],
    ["DELETE", /^\/held$/, () => control.releaseHeld()],
    ["GET", /^\/paths$/, () => control.paths().list()],
    ["POST", /^\/paths\/(down|up)$/, async ({ text, argument }) => {
      const { server } = parse(serverSchema, text);
      await control.paths().take(server, argument === "up");
      return control.paths().list();
    }],
    ["POST", /^\/paths\/ana$/, async ({ text }) => {
      const { server, state } = parse(serverSchema.extend({ state: z.enum(anaStates) }), text);
      await control.paths().setAna(server, state);
      return control.paths().list();
    }],
    ["GET", /^\/devices$/, () => control.machine().devices],
    ["POST", /^\/devices\/remove$/, ({ text }) => control.machine().remove(parse(uuidSchema, text).uuid)],
    ["POST", /^\/devices\/heal$/, ({ text }) => control.machine().heal(parse(uuidSchema, text).uuid)],
    ["POST", /^\/devices\/restore$/, ({ text }) => {
      const { uuid, name } = parse(z.strictObject({ uuid: z.uuid(), name: z.string().optional() }), text);
      return control.machine().restore(uuid, name);
    }],
    ["POST", /^\/devices\/damage$/, ({ text }) => {
      const { uuid, how } = parse(z.strictObject({ uuid: z.uuid(), how: z.enum(["unreadable", "empty"]) }), text);
      return control.machine().damage(uuid, how);
    }],
    ["POST", /^\/devices\/swap$/, ({ text }) => {
      const { uuid, other } = parse(z.strictObject({ uuid: z.uuid(), other: z.uuid() }), text);
      return control.machine().swap(uuid, other);
    }],
  ];
}

/** Reads the body of a request; throws INVALID_ARGUMENT that names the bad fields. */
export function parse<T>(schema: z.ZodType<T>, text: string): T {
  let value: unknown;
  try {
    value = JSON.parse(text.trim() === "" ? "{}" : text);
  } catch (cause) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot read the body: ${messageOf(cause)}`, { cause });
  }
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const problems = parsed.error.issues.map(({ path, message }) => `${path.join(".") || "body"}: ${message}`);
  throw new StatusError("INVALID_ARGUMENT", `Cannot read the body: ${problems.join("; ")}`);
}

/** Without the keys whose value is undefined. */
export function withoutUndefined<T extends object>(value: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, entry]) => entry !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

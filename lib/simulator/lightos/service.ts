/**
 * The LightOS management API over gRPC, served for a simulated cluster.
 *
 * One endpoint is one server with one scheme; each can be stopped, started again and made to hang, as servers do.
 * Messages are those of proto/lightos.proto, meanings those of docs/reference/lightos-api.md sections 6, 14 and 15.
 */
import { createServer, type Socket } from "node:net";
import type { DescMethod } from "@bufbuild/protobuf";
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import { sleep } from "../../timing.ts";
import { StatusError } from "../../error.ts";
import { type CallContext, type Handlers, serve, type Server, service } from "../../grpc/server.ts";
import type { Logger } from "../../log.ts";
import type { Scheme } from "../../volume_id.ts";
import type { FaultRule, Faults } from "../faults.ts";
import { onFreePort } from "../port.ts";
import type { Cluster } from "./cluster.ts";
import { Access, type ServiceParts } from "./rpcs/access.ts";
import { clusterRpcs } from "./rpcs/cluster.ts";
import { projectRpcs } from "./rpcs/projects.ts";
import { serverRpcs } from "./rpcs/servers.ts";
import { snapshotRpcs } from "./rpcs/snapshots.ts";
import { trustedHostRpcs, trustedHostSecretRpcs } from "./rpcs/trusted_hosts.ts";
import { volumeRpcs } from "./rpcs/volumes.ts";
import type { Caller, Tokens } from "./token.ts";

/** The management API of one server over one scheme. */
export interface ApiEndpoint extends AsyncDisposable {
  readonly scheme: Scheme;
  /** Number of the server, from 0. */
  readonly server: number;
  /** `host:port` to call. */
  readonly address: string;
  readonly state: "running" | "stopped" | "hanging";
  /** Ends its connections and accepts no more, as a server that is down. */
  stop(): Promise<void>;
  /** Listens again, on the same port. */
  start(): Promise<void>;
  /** Accepts TCP connections and never answers, as a server that is stuck. */
  hang(): Promise<void>;
  /** Ends its connections; clients may connect again. */
  dropConnections(): void;
}

export interface ManagementApiOptions {
  readonly cluster: Cluster;
  readonly faults: Faults;
  readonly tokens: Tokens;
  /** False admits every call as the cluster's administrator. */
  readonly authentication: boolean;
  /** Address to listen on. */
  readonly host: string;
  /** Port; 0 takes a free one. */
  readonly port: number;
  readonly scheme: Scheme;
  readonly server: number;
  readonly tls: { readonly key: string; readonly cert: string } | undefined;
  /** The endpoints of this scheme that the cluster announces, in the order of its servers. */
  readonly apiEndpoints: () => readonly string[];
  readonly log: Logger;
}

/** Serves the management API of one server over one scheme, until it is disposed. */
export async function serveLightos(options: ManagementApiOptions): Promise<ApiEndpoint> {
  const endpoint = new GrpcEndpoint(options);
  await endpoint.start();
  return endpoint;
}

/** RPCs that only the cluster's administrator may call. */
const administratorRpcs = new Set(["GetCluster", "ListNodes", "GetNode", "ListServers", "GetServer"]);

class GrpcEndpoint implements ApiEndpoint {
  readonly scheme: Scheme;
  readonly server: number;
  readonly #options: ManagementApiOptions;
  readonly #access = new Access();
  #port: number;
  #running: Server | undefined;
  #hanging: AsyncDisposable | undefined;

  constructor(options: ManagementApiOptions) {
    this.#options = options;
    this.scheme = options.scheme;
    this.server = options.server;
    this.#port = options.port;
  }

  get address(): string {
    const { host } = this.#options;
    return host.includes(":") ? `[${host}]:${this.#port}` : `${host}:${this.#port}`;
  }

  get state(): ApiEndpoint["state"] {
    return this.#running !== undefined ? "running" : this.#hanging !== undefined ? "hanging" : "stopped";
  }

  async start(): Promise<void> {
    if (this.#running !== undefined) return;
    await this.stop();
    this.#running = await onFreePort(this.#port, (port) => this.#serve(port));
    this.#port = this.#running.port;
  }

  async stop(): Promise<void> {
    await this.#hanging?.[Symbol.asyncDispose]();
    this.#hanging = undefined;
    const server = this.#running;
    this.#running = undefined;
    server?.dropConnections();
    await server?.stop(0);
  }

  async hang(): Promise<void> {
    await this.stop();
    this.#hanging = await acceptAndIgnore(this.#options.host, this.#port);
  }

  dropConnections(): void {
    this.#running?.dropConnections();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  #serve(port: number): Promise<Server> {
    const { cluster, apiEndpoints, host, tls, log } = this.#options;
    const handlers = allRpcs({ cluster, access: this.#access, apiEndpoints });
    return serve({
      listen: { host, port, ...(tls === undefined ? {} : { tls }) },
      services: [service(DurosAPI, this.#withFaults(handlers))],
      log: log.with({ address: this.scheme }),
      // A simulator logs each call at level debug only.
      quiet: () => true,
      before: (method, _request, call) => this.#admit(method, call),
    });
  }

  /** Counts a call and authenticates its caller; throws UNAUTHENTICATED. */
  #admit(method: DescMethod, call: CallContext): void {
    const { faults, authentication, tokens } = this.#options;
    faults.count(method.name, this.address);
    const caller = authentication ? authenticate(tokens, call) : { scope: "cluster" } as const;
    if (administratorRpcs.has(method.name) && caller.scope !== "cluster") {
      // A token without the right gets the same answer as a bad token (docs/reference/lightos-api.md section 14).
      throw new StatusError("UNAUTHENTICATED", `Cannot call ${method.name}: the token has no right to the cluster`);
    }
    this.#access.setCaller(call, caller);
  }

  /** The handlers, each of which obeys the fault rules and reports its begin and end to watchers. */
  #withFaults(handlers: Handlers<typeof DurosAPI>): Handlers<typeof DurosAPI> {
    const { faults } = this.#options;
    const guarded = Object.entries(handlers).map(([name, handler]) => {
      const rpc = name.charAt(0).toUpperCase() + name.slice(1);
      const run = handler as (request: unknown, call: CallContext) => Promise<unknown>;
      return [name, async (request: unknown, call: CallContext) => {
        const rule = faults.take(rpc, this.address);
        const subject = subjectOf(request);
        faults.report({ phase: "begin", rpc, subject });
        try {
          if (rule?.delayMs !== undefined) await sleep(rule.delayMs, call.signal);
          if (rule?.when === "before") await this.#applyFault(rule, rpc, call.signal);
          const answer = await run(request, call);
          if (rule?.when === "after") await this.#applyFault(rule, rpc, call.signal);
          return answer;
        } finally {
          faults.report({ phase: "end", rpc, subject });
        }
      }];
    });
    return Object.fromEntries(guarded) as unknown as Handlers<typeof DurosAPI>;
  }

  /** Does to a call what a rule demands; throws the error that the call fails with. */
  async #applyFault(rule: FaultRule, rpc: string, signal: AbortSignal): Promise<void> {
    const { faults } = this.#options;
    if (rule.hold === true) await faults.hold({ rpc, endpoint: this.address, when: rule.when }, signal);
    if (rule.drop === true) this.#running?.dropConnections();
    if (rule.code === undefined && rule.drop !== true) return;
    const message = rule.message ?? `Cannot answer ${rpc}: the simulator was told to fail`;
    throw new StatusError(rule.code ?? "UNAVAILABLE", message);
  }
}

function allRpcs(parts: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    ...clusterRpcs(parts),
    ...serverRpcs(parts),
    ...projectRpcs(parts),
    ...volumeRpcs(parts),
    ...snapshotRpcs(parts),
    ...trustedHostRpcs(parts),
    ...trustedHostSecretRpcs(parts),
  };
}

/** The UUID in a request, or the name where it has none. */
function subjectOf(request: unknown): string {
  const { UUID = "", name = "" } = request as { readonly UUID?: string; readonly name?: string };
  return UUID === "" ? name : UUID;
}

async function acceptAndIgnore(host: string, port: number): Promise<AsyncDisposable> {
  const connections = new Set<Socket>();
  const server = createServer((socket) => {
    connections.add(socket);
    socket.on("error", () => {}); // The peer gives up, as it should.
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, host, resolve);
  });
  return {
    [Symbol.asyncDispose]: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        for (const socket of connections) socket.destroy();
      }),
  };
}

/** The caller that a token names; throws UNAUTHENTICATED. */
function authenticate(tokens: Tokens, call: CallContext): Caller {
  const header = call.header("authorization");
  const tokenError = (problem: string) =>
    new StatusError("UNAUTHENTICATED", `Cannot authenticate the call: ${problem}`);
  if (header === undefined) throw tokenError("there is no authorization header");
  const match = /^Bearer +(\S+)$/.exec(header);
  if (match === null) throw tokenError(`the authorization header is not "Bearer <token>"`);
  const caller = tokens.check(match[1] ?? "");
  if (typeof caller === "string") throw tokenError(`the token is not accepted, ${caller}`);
  return caller;
}

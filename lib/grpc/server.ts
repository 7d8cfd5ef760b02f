/**
 * Typed gRPC over protobuf-es messages: `serve` for our own services, `Channel` for those that we call. The only file
 * that knows grpc-js.
 *
 * Deadlines become AbortSignals. A handler's signal aborts shortly before its caller stops listening, so that an answer
 * which names what was slow still arrives; the handler goes on until its work has really ended, and holds its locks
 * until then.
 */
import { unreadableCertificates } from "./peer_certificate.ts";
import { wasCalmedSince } from "./goaway.ts";
import "./stream_limit.ts";
import grpc from "@grpc/grpc-js";
import { createHash, X509Certificate } from "node:crypto";
import { chmodSync, lstatSync, mkdirSync, statSync, unlinkSync } from "node:fs";
import type { EventEmitter } from "node:events";
import net from "node:net";
import { dirname } from "node:path";
import type { Duplex } from "node:stream";
import tls from "node:tls";
import {
  create,
  type DescMessage,
  type DescMethod,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type DescService,
  fromBinary,
  type Message,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import { acceptAnyAuthority } from "./authority.ts";
import { type Fields, formatSeconds, type Logger, type RequestContext, requestContext } from "../context.ts";
import { messageOf, type StatusCode, StatusError, systemCode } from "../error.ts";
import { splitPem } from "../pem.ts";
import { answers, listenUnix, type UnixListener } from "./unix_socket.ts";

// ---------------------------------------------------------------------------------------------------------- serving

/** The context of one incoming call. */
export interface CallContext extends RequestContext {
  /** A request header (gRPC metadata), lower-case name; undefined when absent. */
  header(name: string): string | undefined;
}

type Handler<M extends DescMethod> = M extends DescMethodUnary<infer I, infer O>
  ? (request: MessageShape<I>, call: CallContext) => Promise<MessageInitShape<O>>
  : M extends DescMethodServerStreaming<infer I, infer O>
    ? (request: MessageShape<I>, call: CallContext) => AsyncIterable<MessageInitShape<O>>
  : never;

/** One handler per method of the service. A method without a handler answers UNIMPLEMENTED. */
export type Handlers<S extends DescService> = { readonly [M in keyof S["method"]]?: Handler<S["method"][M]> };

type AnyHandler = (request: Message, call: CallContext) => Promise<unknown> | AsyncIterable<unknown>;

/** A service with its handlers. */
export interface Service {
  readonly description: DescService;
  readonly handlers: Readonly<Record<string, AnyHandler | undefined>>;
}

export function service<S extends DescService>(description: S, handlers: Handlers<S>): Service {
  return { description, handlers: handlers as unknown as Service["handlers"] };
}

/** Where to listen. Port 0 takes a free one. */
export type Listen =
  | { readonly path: string }
  | {
    readonly host: string;
    readonly port: number;
    /** PEM texts; plain HTTP/2 when absent. */
    readonly tls?: { readonly key: string; readonly cert: string };
  };

export interface ServeOptions {
  readonly listen: Listen;
  readonly services: readonly Service[];
  readonly log: Logger;
  /** Facts about a request for the log lines of its call, free of secrets. */
  readonly describe?: (method: DescMethod, request: Message) => Fields;
  /** The whole request without its secrets, for one line at level debug. */
  readonly redact?: (method: DescMethod, request: Message) => unknown;
  /** Calls that come too often to be logged at level info. */
  readonly quiet?: (method: DescMethod) => boolean;
  /** Told of each call when it comes, and of the code of its answer when the work for it has ended. */
  readonly observe?: (method: string) => (code: string) => void;
  /** Runs before each handler and may refuse the call by throwing; for authentication, counting, faults. */
  readonly before?: (method: DescMethod, request: Message, call: CallContext) => Promise<void> | void;
}

export interface Server {
  /** The port, or 0 for a socket path. */
  readonly port: number;
  /** Ends every connection at once, as a crash of this server would; new ones are welcome. */
  dropConnections(): void;
  /** Refuses new calls, waits for the running ones for `graceMs` at most, then closes everything. */
  stop(graceMs: number): Promise<void>;
}

/** Sidecars keep one each; kubelet opens one for each call, and a call for a hung volume can last minutes. */
const mostConnections = 1000;
/** external-provisioner has 100 workers on its connection. */
const mostCallsOfConnection = 128;
/** A call without a deadline is given this one. */
const longestCallMs = 10 * 60 * 1000;
const statusNumbers = grpc.status as unknown as Readonly<Record<string, number>>;

/**
 * Serves gRPC until `stop` is called. Idle connections are kept for ever: the sidecars exit when theirs is closed.
 *
 * The last directory of a socket's path is made when it is missing.
 *
 * @throws StatusError FAILED_PRECONDITION when the socket's directory cannot be made or is open to everybody, its path is
 *   too long, is something else than a socket, or another process answers on it. A socket file that nobody answers on is
 *   removed
 */
export async function serve(options: ServeOptions): Promise<Server> {
  const server = new grpc.Server({
    "grpc.max_receive_message_length": 16 << 20,
    "grpc.max_concurrent_streams": mostCallsOfConnection,
  });
  const running = new Set<Promise<void>>();
  const state = { draining: false, calls: 0 };
  for (const { description, handlers } of options.services) {
    const definition: Record<string, grpc.MethodDefinition<Message, unknown>> = {};
    const implementation: Record<string, grpc.UntypedHandleCall> = {};
    for (const method of description.methods) {
      const handler = handlers[method.localName];
      definition[method.name] = methodDefinition(method);
      implementation[method.name] = method.methodKind === "server_streaming"
        ? (call: grpc.ServerWritableStream<Message, unknown>) => {
          track(running, runStreaming(options, state, method, handler, call));
        }
        : (call: grpc.ServerUnaryCall<Message, unknown>, reply: grpc.sendUnaryData<unknown>) => {
          track(running, runUnary(options, state, method, handler, call, reply));
        };
    }
    server.addService(definition, implementation);
  }

  // We accept the connections and hand them to grpc-js: so that any :authority is served, see authority.ts.
  const injector = server.createConnectionInjector(grpc.ServerCredentials.createInsecure());
  const connections = new Set<Duplex>();
  const accept = (connection: Duplex) => {
    if (connections.size >= mostConnections) {
      options.log.warning("refused a connection, there are too many", { error: `${mostConnections} are open` });
      connection.destroy();
      return;
    }
    connections.add(connection);
    connection.on("error", () => {}); // The close event follows, and grpc-js ends the calls of a lost connection.
    connection.on("close", () => connections.delete(connection));
    injector.injectConnection(connection);
  };
  const listener = await listenFor(options, accept);

  return {
    port: listener.port,
    dropConnections() {
      for (const connection of connections) connection.destroy();
    },
    async stop(graceMs) {
      state.draining = true;
      const closed = listener.close();
      let timer: ReturnType<typeof setTimeout> | undefined;
      await Promise.race([
        Promise.allSettled(running),
        new Promise((resolve) => timer = setTimeout(resolve, graceMs)),
      ]);
      clearTimeout(timer);
      // Replies that were just given are on their way through grpc-js; let them reach their sockets.
      await new Promise((resolve) => setTimeout(resolve, 20));
      server.forceShutdown();
      for (const connection of connections) connection.destroy();
      await closed;
    },
  };
}

/** Where connections come from. */
interface Listener {
  /** As Server's. */
  readonly port: number;
  /** Accepts no more; of TCP it resolves when all connections are closed. */
  close(): Promise<void>;
}

async function listenFor({ listen, log }: ServeOptions, accept: (connection: Duplex) => void): Promise<Listener> {
  const refusal = (error: Error) => {
    const where = "path" in listen ? listen.path : `${listen.host}:${listen.port}`;
    return new StatusError("FAILED_PRECONDITION", `Cannot listen on ${where}: ${error.message}`, { cause: error });
  };
  if ("path" in listen) {
    await clearSocketPath(listen.path);
    let listener: UnixListener;
    try {
      listener = listenUnix(
        listen.path,
        (connection) => accept(acceptAnyAuthority(connection)),
        (error) => log.error("could not accept connections, tries again", { path: listen.path, error: error.message }),
      );
    } catch (error) {
      throw refusal(error as Error);
    }
    // Whoever may connect may order volumes about: the driver's user, and its group for sidecars that run as another.
    chmodSync(listen.path, 0o660);
    return { port: 0, close: () => Promise.resolve(listener.close()) };
  }
  const { host, port, tls: identity } = listen;
  const listener = identity === undefined
    ? net.createServer(accept)
    : tls.createServer({ ...identity, ALPNProtocols: ["h2"] }, accept)
      .on("tlsClientError", (error) => log.debug("refused a TLS connection", { error: error.message }));
  await new Promise<void>((resolve, reject) => {
    listener.once("error", (error) => reject(refusal(error)));
    listener.listen(port, host, resolve);
  });
  const address = listener.address();
  return {
    port: typeof address === "object" && address !== null ? address.port : 0,
    close: () => new Promise<void>((resolve) => listener.close(() => resolve())),
  };
}

function track(running: Set<Promise<void>>, call: Promise<void>): void {
  running.add(call);
  call.finally(() => running.delete(call));
}

function methodDefinition(method: DescMethod): grpc.MethodDefinition<Message, unknown> {
  const serializeRequest = (message: Message) => toBuffer(toBinary(method.input, message));
  return {
    path: `/${method.parent.typeName}/${method.name}`,
    requestStream: method.methodKind === "client_streaming" || method.methodKind === "bidi_streaming",
    responseStream: method.methodKind === "server_streaming" || method.methodKind === "bidi_streaming",
    requestSerialize: serializeRequest,
    requestDeserialize: (bytes) => readable(method, bytes),
    responseSerialize: (message) => toBuffer(toBinary(method.output, create(method.output, message as never))),
    responseDeserialize: (bytes) => fromBinary(method.output, bytes),
  };
}

/** Bytes that are no message of the schema; thrown later, for grpc-js would answer INTERNAL. */
class Unreadable {
  readonly error: StatusError;

  constructor(error: StatusError) {
    this.error = error;
  }
}

function readable(method: DescMethod, bytes: Uint8Array): Message {
  try {
    return fromBinary(method.input, bytes);
  } catch (error) {
    const message = `Cannot read the request of ${method.name}: ${messageOf(error)}`;
    return new Unreadable(new StatusError("INVALID_ARGUMENT", message)) as unknown as Message;
  }
}

/** The request of a call; throws INVALID_ARGUMENT when it could not be read. */
function requestOf(call: IncomingCall): Message {
  const request: unknown = call.request;
  if (request instanceof Unreadable) throw request.error;
  return call.request;
}

function toBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

type IncomingCall = grpc.ServerUnaryCall<Message, unknown> | grpc.ServerWritableStream<Message, unknown>;

interface CallState {
  readonly context: CallContext;
  /** How long before the deadline the signal aborts: time for the answer to travel. */
  readonly marginMs: number;
  /** Ends the deadline timer and the listening for a caller that hangs up. */
  finish(): void;
}

function beginCall(options: ServeOptions, state: { calls: number }, method: DescMethod, call: IncomingCall): CallState {
  const started = Date.now();
  const given = call.getDeadline();
  const deadline = new Date(Math.min(given instanceof Date ? given.getTime() : given, started + longestCallMs));
  const leftMs = deadline.getTime() - started;
  const marginMs = Math.min(250, Math.max(0, leftMs) / 5);
  const aborted = new AbortController();
  const timer = setTimeout(() => {
    const message = `Cannot finish ${method.name} within the caller's deadline of ${
      formatSeconds(leftMs)
    }: the work goes on, repeat`;
    aborted.abort(new StatusError("DEADLINE_EXCEEDED", message));
  }, Math.max(0, leftMs - marginMs));
  let finished = false;
  (call as EventEmitter).on("cancelled", () => {
    // grpc-js emits this at the end of well-finished calls too.
    if (!finished) aborted.abort(new StatusError("CANCELLED", `${method.name} was given up by its caller`));
  });
  let log = options.log.with({ rpc: method.name, call: ++state.calls });
  try {
    const request = requestOf(call);
    log = log.with(options.describe?.(method, request) ?? {});
    if (options.redact !== undefined && log.verbose) {
      log.debug("received", { request: options.redact(method, request) });
    }
  } catch (error) {
    // A request that cannot be described is still to be answered.
    log.error("failed to describe a request", { error: messageOf(error) });
  }
  const context: CallContext = {
    ...requestContext(aborted.signal, deadline, log),
    header: (name) => call.metadata.get(name)[0]?.toString(),
  };
  return {
    context,
    marginMs,
    finish: () => {
      finished = true;
      clearTimeout(timer);
    },
  };
}

async function runUnary(
  options: ServeOptions,
  state: { draining: boolean; calls: number },
  method: DescMethod,
  handler: AnyHandler | undefined,
  call: grpc.ServerUnaryCall<Message, unknown>,
  reply: grpc.sendUnaryData<unknown>,
): Promise<void> {
  const started = performance.now();
  const ended = options.observe?.(method.name);
  const { context, marginMs, finish } = beginCall(options, state, method, call);
  let replied = false;
  let code = "OK";
  const answer = (error: StatusError | undefined, response?: unknown) => {
    if (replied) {
      const facts = { code: error?.code ?? "OK", ms: elapsed(started) };
      context.log.info(
        "ended a call after its caller had left",
        error ? { ...facts, error: error.message } : facts,
      );
      return;
    }
    replied = true;
    code = error?.code ?? "OK";
    logEnd(options, method, context.log, started, error);
    if (error === undefined) reply(null, response);
    else reply(statusOf(error));
  };
  // A handler that reacts to the signal has half of the margin to say more than "too slow".
  let grace: ReturnType<typeof setTimeout> | undefined;
  context.signal.addEventListener("abort", () => {
    grace = setTimeout(() => answer(context.signal.reason), marginMs / 2);
  });
  try {
    if (state.draining) {
      throw new StatusError("UNAVAILABLE", `Cannot start ${method.name}: the driver is shutting down`);
    }
    const request = requestOf(call);
    await options.before?.(method, request, context);
    if (handler === undefined) throw unimplemented(method);
    answer(undefined, await handler(request, context));
  } catch (error) {
    answer(foreseen(method, context.log, error));
  } finally {
    clearTimeout(grace);
    finish();
    ended?.(code);
  }
}

async function runStreaming(
  options: ServeOptions,
  state: { draining: boolean; calls: number },
  method: DescMethod,
  handler: AnyHandler | undefined,
  call: grpc.ServerWritableStream<Message, unknown>,
): Promise<void> {
  const started = performance.now();
  const ended = options.observe?.(method.name);
  const { context, finish } = beginCall(options, state, method, call);
  let code = "OK";
  try {
    if (state.draining) {
      throw new StatusError("UNAVAILABLE", `Cannot start ${method.name}: the driver is shutting down`);
    }
    const request = requestOf(call);
    await options.before?.(method, request, context);
    if (handler === undefined) throw unimplemented(method);
    for await (const message of handler(request, context) as AsyncIterable<unknown>) {
      context.signal.throwIfAborted();
      if (!call.write(message)) await drained(call, context.signal);
    }
    logEnd(options, method, context.log, started, undefined);
    call.end();
  } catch (error) {
    const known = foreseen(method, context.log, error);
    code = known.code;
    logEnd(options, method, context.log, started, known);
    call.emit("error", statusOf(known));
  } finally {
    finish();
    ended?.(code);
  }
}

function drained(call: grpc.ServerWritableStream<Message, unknown>, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    const giveUp = () => {
      call.off("drain", goOn);
      reject(signal.reason);
    };
    const goOn = () => {
      signal.removeEventListener("abort", giveUp);
      resolve();
    };
    call.once("drain", goOn);
    signal.addEventListener("abort", giveUp, { once: true });
  });
}

function unimplemented(method: DescMethod): StatusError {
  return new StatusError("UNIMPLEMENTED", `Cannot serve ${method.name}: this driver does not announce it`);
}

function foreseen(method: DescMethod, log: Logger, error: unknown): StatusError {
  if (error instanceof StatusError) {
    if (error.cause !== undefined) log.debug("failed because of", { error: messageOf(error.cause) });
    return error;
  }
  log.error("failed in an unforeseen way", {
    error: error instanceof Error ? error.stack ?? error.message : String(error),
  });
  const code = systemCode(error);
  if (code !== undefined) {
    // What the machine refuses (descriptors, memory, a disk) it may grant later; it is no fault of the driver.
    return new StatusError("UNAVAILABLE", `Cannot finish ${method.name}: ${messageOf(error)} (${code})`);
  }
  return new StatusError(
    "INTERNAL",
    `Cannot finish ${method.name}: a fault in the driver, its log has the details; please report it`,
  );
}

function statusOf(error: StatusError): Partial<grpc.StatusObject> & Error {
  return Object.assign(new Error(error.message), {
    code: statusNumbers[error.code] ?? grpc.status.INTERNAL,
    details: error.message,
  });
}

function logEnd(
  options: ServeOptions,
  method: DescMethod,
  log: Logger,
  started: number,
  error: StatusError | undefined,
): void {
  const ms = elapsed(started);
  if (error !== undefined) {
    log.info("answered with an error", { code: error.code, ms, error: error.message });
  } else if (options.quiet?.(method)) {
    log.debug("answered", { code: "OK", ms });
  } else {
    log.info("answered", { code: "OK", ms });
  }
}

function elapsed(started: number): number {
  return Math.round((performance.now() - started) * 10) / 10;
}

// sockaddr_un holds 108 bytes with the closing zero.
const longestSocketPath = 107;

async function clearSocketPath(path: string): Promise<void> {
  const refuse = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot listen on ${path}: ${problem}`, { cause });
  if (Buffer.byteLength(path) > longestSocketPath) throw refuse(`the path has more than ${longestSocketPath} bytes`);
  try {
    // For an emptyDir of Kubernetes, which is open to everybody in the pod: a directory in it is not.
    mkdirSync(dirname(path), { mode: 0o750 });
  } catch {
    // It is there, as it mostly is, or what comes next says what is wrong.
  }
  const directory = statIfThere(dirname(path));
  if (!directory?.isDirectory()) throw refuse(`its directory is missing, create ${dirname(path)} first`);
  // With the sticky bit, as /tmp has it, nobody can put a socket of theirs in the place of ours.
  if ((directory.mode & 0o1002) === 0o002) {
    throw refuse(`every user of the machine may replace files in ${dirname(path)}, take that right away (chmod o-w)`);
  }
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (found === undefined) return;
  if (!found.isSocket()) throw refuse("something that is not a socket is there");
  if (await answers(path)) throw refuse("another process is listening there");
  unlinkSync(path);
}

function statIfThere(path: string) {
  try {
    return statSync(path);
  } catch {
    return undefined;
  }
}

// ---------------------------------------------------------------------------------------------------------- calling

/** A call that came back with an error. */
export class CallError extends Error {
  override readonly name = "CallError";
  /** gRPC's name of the code, `UNKNOWN` and `DATA_LOSS` included. */
  readonly code: StatusCode | "UNKNOWN" | "DATA_LOSS";
  /**
   * Who says so. `server`: the server, in the status of its answer. All others are our side, with code UNAVAILABLE, or
   * DEADLINE_EXCEEDED after the deadline of the call; whether the server has done it is unknown, but for the first:
   * - `not connected`: the request was not sent.
   * - `too large`: an answer came that is larger than we take.
   * - `no answer`: the connection was lost, or what came is not a gRPC answer (the error page of a proxy, for example).
   */
  readonly origin: "server" | "not connected" | "too large" | "no answer";

  constructor(code: CallError["code"], details: string, origin: CallError["origin"]) {
    super(details);
    this.code = code;
    this.origin = origin;
  }
}

/** How a server has to prove who it is. */
export interface Trust {
  /**
   * PEM certificates to trust instead of the built-in ones, as `readPem` answers them. A server that shows one of them is
   * trusted, no matter which CA has signed it.
   */
  readonly ca?: string;
  /** False accepts any certificate. */
  readonly verify: boolean;
  /** The name that the certificate must be for; the host of the address unless told otherwise. */
  readonly serverName?: string;
  /** `publicKeyPin`s, one of which the server's key must have besides. Not looked at when `verify` is false. */
  readonly pins?: readonly string[];
}

export interface ChannelOptions {
  /** `host:port`, or `unix:///path`. */
  readonly address: string;
  readonly tls?: Trust;
  readonly userAgent?: string;
}

export interface CallOptions {
  readonly signal: AbortSignal;
  readonly deadline?: Date;
  readonly headers?: Readonly<Record<string, string>>;
  /** How long to wait for a connection before the call fails as not sent; 3 s unless told otherwise. */
  readonly connectTimeoutMs?: number;
}

/**
 * The longest message that is taken as an answer: what it becomes as objects has to fit several times into the heap of 64 MiB
 * that the shipped executable has.
 */
const longestAnswerBytes = 8 << 20;

/** A connection to one gRPC server, made on the first call and again after a loss. */
export class Channel implements Disposable {
  readonly address: string;
  readonly #client: grpc.Client;

  constructor(options: ChannelOptions) {
    this.address = options.address;
    this.#client = new grpc.Client(options.address, credentials(options), {
      "grpc.primary_user_agent": options.userAgent ?? "lbcsi",
      // Without it, grpc-js asks DNS for a TXT record of each host name.
      "grpc.service_config_disable_resolution": 1,
      // A storage cluster is reached directly; a proxy meant for the web would answer in its place.
      "grpc.enable_http_proxy": 0,
      // Two channels to one server must be two connections: dropping one is how fail-over is done.
      "grpc.use_local_subchannel_pool": 1,
      // A local server cannot vanish without a word, and one that is slow to answer must not lose the calls it works on.
      ...(options.address.startsWith("unix:")
        ? {}
        : { "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 10_000 }),
      "grpc.initial_reconnect_backoff_ms": 1000,
      "grpc.max_reconnect_backoff_ms": 7000,
      "grpc.max_receive_message_length": longestAnswerBytes,
      ...(options.tls === undefined ? {} : tlsNameOptions(options.address, options.tls)),
    });
  }

  /** Whether the connection stands. Does not begin to make one. */
  get isConnected(): boolean {
    return this.#client.getChannel().getConnectivityState(false) === grpc.connectivityState.READY;
  }

  /**
   * Calls a unary method.
   *
   * @throws CallError with the server's code and words, or with an `origin` that tells that no answer of the server came;
   *   `signal.reason` when the signal aborts first
   */
  async call<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    options: CallOptions,
  ): Promise<MessageShape<O>> {
    options.signal.throwIfAborted();
    await this.#connected(options);
    const definition = methodDefinition(method);
    return await new Promise((resolve, reject) => {
      let headers: grpc.Metadata | undefined;
      const started = performance.now();
      const pending = this.#client.makeUnaryRequest(
        definition.path,
        definition.requestSerialize,
        definition.responseDeserialize as (bytes: Buffer) => MessageShape<O>,
        create(method.input, request) as Message,
        metadata(options),
        options.deadline === undefined ? {} : { deadline: options.deadline },
        (error, response) => {
          options.signal.removeEventListener("abort", giveUp);
          if (error !== null) {
            reject(
              options.signal.aborted
                ? options.signal.reason
                : callError(error, headers, wasCalmedSince(this.address, started)),
            );
          } else resolve(response as MessageShape<O>);
        },
      );
      pending.on("metadata", (metadata: grpc.Metadata) => headers = metadata);
      const giveUp = () => pending.cancel();
      options.signal.addEventListener("abort", giveUp, { once: true });
    });
  }

  /** Calls a server-streaming method; the iteration throws what `call` throws. Leaving it early cancels the call. */
  async *stream<I extends DescMessage, O extends DescMessage>(
    method: DescMethodServerStreaming<I, O>,
    request: MessageInitShape<I>,
    options: CallOptions,
  ): AsyncGenerator<MessageShape<O>> {
    options.signal.throwIfAborted();
    await this.#connected(options);
    const definition = methodDefinition(method);
    const pending = this.#client.makeServerStreamRequest(
      definition.path,
      definition.requestSerialize,
      definition.responseDeserialize as (bytes: Buffer) => MessageShape<O>,
      create(method.input, request) as Message,
      metadata(options),
      options.deadline === undefined ? {} : { deadline: options.deadline },
    );
    let headers: grpc.Metadata | undefined;
    const started = performance.now();
    pending.on("metadata", (metadata: grpc.Metadata) => headers = metadata);
    const giveUp = () => pending.cancel();
    options.signal.addEventListener("abort", giveUp, { once: true });
    try {
      for await (const message of pending) yield message as MessageShape<O>;
    } catch (error) {
      throw options.signal.aborted ? options.signal.reason : callError(
        error as grpc.ServiceError,
        headers,
        wasCalmedSince(this.address, started),
      );
    } finally {
      options.signal.removeEventListener("abort", giveUp);
      pending.cancel();
    }
  }

  /** Waits until the connection stands. Says nothing when it fails at once: the call itself then tells the reason. */
  async #connected(options: CallOptions): Promise<void> {
    const channel = this.#client.getChannel();
    const leftMs = options.deadline === undefined ? Infinity : Math.max(0, options.deadline.getTime() - Date.now());
    const timeoutMs = Math.min(options.connectTimeoutMs ?? 3000, leftMs);
    const until = Date.now() + timeoutMs;
    for (;;) {
      const state = channel.getConnectivityState(true);
      if (state === grpc.connectivityState.SHUTDOWN) {
        throw new CallError("UNAVAILABLE", "the connection was given up", "not connected");
      }
      if (state !== grpc.connectivityState.IDLE && state !== grpc.connectivityState.CONNECTING) return;
      const changed = await new Promise<boolean>((resolve, reject) => {
        const giveUp = () => reject(options.signal.reason);
        options.signal.addEventListener("abort", giveUp, { once: true });
        channel.watchConnectivityState(state, until, (error) => {
          options.signal.removeEventListener("abort", giveUp);
          resolve(error === undefined || error === null);
        });
      });
      if (!changed) {
        throw new CallError("UNAVAILABLE", `no connection within ${formatSeconds(timeoutMs)}`, "not connected");
      }
    }
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }
}

function metadata(options: CallOptions): grpc.Metadata {
  const metadata = new grpc.Metadata();
  for (const [name, value] of Object.entries(options.headers ?? {})) metadata.set(name, value);
  return metadata;
}

/** So grpc-js words a stream that was ended with ENHANCE_YOUR_CALM. */
const calmedDetails = "Bandwidth exhausted or memory limit exceeded";

/** What grpc-js leaves out of the metadata that it makes of a server's headers or trailers. */
interface SentStatus {
  readonly http: number | undefined;
  /** The one of gRPC. */
  readonly grpc: number | undefined;
}

/** The codes that grpc-js makes up by itself (for HTTP errors, lost connections, unreadable answers) look like sent ones. */
const sentStatus = new WeakMap<grpc.Metadata, SentStatus>();
const readHeaders = grpc.Metadata.fromHttp2Headers;
grpc.Metadata.fromHttp2Headers = (headers) => {
  const metadata = readHeaders.call(grpc.Metadata, headers);
  const numberOf = (value: unknown) => value === undefined ? undefined : Number(value);
  sentStatus.set(metadata, { http: numberOf(headers[":status"]), grpc: numberOf(headers["grpc-status"]) });
  return metadata;
};

/**
 * @param headers what the answer began with; undefined: nothing came
 * @param isCalmed the server has ended a connection with ENHANCE_YOUR_CALM since the call began
 */
function callError(error: grpc.ServiceError, headers: grpc.Metadata | undefined, isCalmed: boolean): CallError {
  const code = (grpc.status[error.code] ?? "UNKNOWN") as CallError["code"];
  // Of an answer that it cannot decompress, grpc-js says nothing.
  const details = error.details || (error.code === undefined ? "an answer that cannot be read" : error.message);
  const sent = error.metadata === undefined ? undefined : sentStatus.get(error.metadata);
  if (sent?.grpc !== undefined && sent.grpc === error.code) return new CallError(code, details, "server");
  const ourCode = code === "DEADLINE_EXCEEDED" ? code : "UNAVAILABLE";
  if (/^(No connection established|Name resolution failed)/.test(details)) {
    // Of its long words for a failed connection, only what the system said is of use to a reader.
    const reason = /Last error: (?:Error: )?(.+?)\. Resolution note/s.exec(details)?.[1] ?? details;
    return new CallError(ourCode, wordsOfFailedConnection(reason), "not connected");
  }
  const contentType = headers?.get("content-type")[0]?.toString() ?? "";
  const isGrpc = headers === undefined || contentType.startsWith("application/grpc");
  if (isGrpc && /^Received message larger than max/.test(details)) {
    return new CallError(ourCode, `an answer of more than ${longestAnswerBytes >> 20} MiB`, "too large");
  }
  const httpStatus = (headers === undefined ? sent : sentStatus.get(headers))?.http ?? 200;
  const words = isCalmed || details === calmedDetails
    ? "the server, or a proxy in between, ended the connection with ENHANCE_YOUR_CALM: too many pings or too much traffic"
    : wordsWithoutAnswer(details, httpStatus, isGrpc ? undefined : contentType);
  return new CallError(ourCode, words, "no answer");
}

/** @param reason what Deno's TLS and HTTP/2, and grpc-js, say of a connection that did not come about */
function wordsOfFailedConnection(reason: string): string {
  // grpc-js adds the time to some of them: each message would be another event in Kubernetes.
  const plain = reason.replace(/ \(\d{4}-\d\d-\d\dT[\d:.]+Z\)/g, "").replace(/^Error \[\w+\]: /, "");
  if (plain === "Failed to connect") return "the connection was closed before HTTP/2 began";
  if (plain === "Protocol error") return "what answers does not speak HTTP/2";
  if (/InvalidContentType|wrong version number/.test(plain)) return "what answers does not speak TLS";
  if (/^Name resolution failed/.test(plain)) return "its name cannot be resolved";
  return plain;
}

/** @param contentType undefined: that of gRPC, or nothing came */
function wordsWithoutAnswer(details: string, httpStatus: number, contentType: string | undefined): string {
  if (httpStatus !== 200) {
    return `HTTP status ${httpStatus} instead of a gRPC answer, as a proxy or load balancer in between sends it`;
  }
  if (contentType !== undefined) {
    const type = /^[\w.+-]+\/[\w.+-]+/.exec(contentType)?.[0];
    return `${type === undefined ? "something" : `content of type ${type}`} instead of a gRPC answer`;
  }
  return details;
}

function credentials({ address, tls: trust }: ChannelOptions): grpc.ChannelCredentials {
  if (trust === undefined) return grpc.credentials.createInsecure();
  const ca = trust.ca === undefined ? null : Buffer.from(trust.ca);
  const certificateProblem = (certificate: tls.PeerCertificate) => {
    try {
      return tls.checkServerIdentity(nameOf(address, trust), certificate) ?? pinProblem(trust.pins, certificate);
    } catch (cause) {
      // TLS asks in an event callback, where nobody could catch it.
      return new Error(`the server's certificate cannot be checked (${messageOf(cause)})`, { cause });
    }
  };
  const leaves = trust.verify ? signedByOthers(trust.ca) : new Set<string>();
  const made = grpc.credentials.createSsl(ca, null, null, {
    rejectUnauthorized: trust.verify && leaves.size === 0,
    checkServerIdentity: (_name, certificate) => trust.verify ? certificateProblem(certificate) : undefined,
  });
  if (!trust.verify) return made;
  const createConnector = made._createSecureConnector.bind(made);
  made._createSecureConnector = (...args) => {
    const connector = createConnector(...args);
    return {
      connect: async (socket) => {
        const connected = await connector.connect(socket).catch(async (error) => {
          throw await datesProblemAt(address, trust) ?? error;
        });
        if (leaves.size === 0) return connected;
        // TLS itself trusts what a certificate to trust has signed, and not such a certificate itself unless it has signed
        // itself. So TLS only proves that the server has the key of what it shows, and what that is gets checked here.
        const secured = connected.socket as tls.TLSSocket;
        const problem = leafProblem(secured, leaves) ?? certificateProblem(secured.getPeerCertificate(true));
        if (problem === undefined) return connected;
        secured.destroy();
        throw problem;
      },
      waitForReady: () => connector.waitForReady(),
      getCallCredentials: () => connector.getCallCredentials(),
      destroy: () => connector.destroy(),
    };
  };
  return made;
}

/** The certificates (DER, base64) of a PEM text that others have signed: a server may show one of them as its own. */
function signedByOthers(ca: string | undefined): ReadonlySet<string> {
  return new Set(
    splitPem(ca ?? "").filter(({ issuer, subject }) => issuer !== subject).map(({ raw }) => raw.toString("base64")),
  );
}

/** OpenSSL's words for its codes. */
const refusalWords: Readonly<Record<string, string>> = {
  CERT_HAS_EXPIRED: "certificate has expired",
  CERT_NOT_YET_VALID: "certificate is not yet valid",
  DEPTH_ZERO_SELF_SIGNED_CERT: "self-signed certificate",
  SELF_SIGNED_CERT_IN_CHAIN: "self-signed certificate in certificate chain",
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "unable to get local issuer certificate",
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: "unable to verify the first certificate",
};

/** Why a server is not to be trusted, its name and pins apart; undefined: it is. */
function leafProblem(socket: tls.TLSSocket, leaves: ReadonlySet<string>): Error | undefined {
  if (socket.authorized) return undefined;
  const shown = socket.getPeerCertificate(true);
  const { raw } = shown ?? {};
  if (raw === undefined) return new Error(unreadableCertificates);
  // A certificate that is trusted itself needs none of the others that the server shows.
  if (leaves.has(Buffer.from(raw).toString("base64"))) return datesProblemOf(shown.raw);
  // Deno gives an error where TLS itself refuses, and a code here.
  const refusal: unknown = socket.authorizationError;
  return datesProblem(shown) ??
    new Error(refusal instanceof Error ? refusal.message : refusalWords[String(refusal)] ?? String(refusal));
}

/** How long a server is waited for that is looked at once more, for better words: well below the 3 s of a connection. */
const secondLookMs = 1000;

/**
 * Why a server that TLS has refused is refused, when it is the dates of its certificates; undefined: it is not, or that cannot
 * be found out. Deno's TLS says of each bad chain only that it cannot be verified, and shows nothing of it, so the server is
 * asked once more. Nothing is sent to it, and it is not trusted any more for it.
 */
async function datesProblemAt(address: string, trust: Trust): Promise<Error | undefined> {
  try {
    return await lookAtServer(address, trust, AbortSignal.timeout(secondLookMs), datesProblem);
  } catch {
    // The first error says what is wrong.
    return undefined;
  }
}

/**
 * What is wrong with the dates of the certificates that a server shows: its own, and those between that and a root. A root
 * that it shows as well does not count for anybody.
 */
function datesProblem(shown: tls.DetailedPeerCertificate): Error | undefined {
  const seen = new Set<tls.DetailedPeerCertificate>();
  for (let at: tls.DetailedPeerCertificate | undefined = shown; at?.raw !== undefined; at = at.issuerCertificate) {
    if (seen.has(at)) return undefined;
    seen.add(at);
    const { subject, issuer } = new X509Certificate(at.raw);
    if (at !== shown && subject === issuer) return undefined;
    const problem = datesProblemOf(at.raw);
    if (problem !== undefined) return problem;
  }
  return undefined;
}

/** What is wrong with the dates of one certificate (DER). */
function datesProblemOf(raw: Uint8Array): Error | undefined {
  const { subject, subjectAltName, validFrom, validTo } = new X509Certificate(raw);
  const name = oneLine(subject) || oneLine(subjectAltName) || "one without a name";
  const now = Date.now();
  if (now < Date.parse(validFrom)) {
    return new Error(`certificate is not yet valid: ${name} is valid from ${new Date(validFrom).toISOString()} on`);
  }
  if (now > Date.parse(validTo)) {
    return new Error(`certificate has expired: ${name} was valid until ${new Date(validTo).toISOString()}`);
  }
  return undefined;
}

/** The name of a certificate, a part of which may be on a line of its own; not without end, for the server has made it. */
function oneLine(name: string | undefined): string {
  // deno-lint-ignore no-control-regex
  return (name ?? "").trim().replaceAll(/[\x00-\x1f\x7f]+/g, ", ").slice(0, 200);
}

function pinProblem(pins: readonly string[] = [], certificate: tls.PeerCertificate): Error | undefined {
  if (pins.length === 0) return undefined;
  const pin = publicKeyPin(certificate.raw);
  if (pins.includes(pin)) return undefined;
  return new Error(`the server's public key is ${pin}, which is not pinned`);
}

/**
 * `sha256//` and base64 of the SHA-256 of a certificate's public key (its SubjectPublicKeyInfo), as curl's
 * `--pinnedpubkey` takes it.
 *
 * @param certificate PEM or DER
 */
export function publicKeyPin(certificate: string | Uint8Array): string {
  const key = new X509Certificate(certificate).publicKey.export({ type: "spki", format: "der" });
  return `sha256//${createHash("sha256").update(key).digest("base64")}`;
}

/** What a server's certificate says of itself, be it true or not. */
export interface ShownCertificate {
  /** `CN=lightos.example`; its alternative names where it has no subject. */
  readonly subject: string;
  readonly issuer: string;
  readonly validFrom: Date;
  readonly validTo: Date;
}

/**
 * The certificate that a server shows. It is looked at and not trusted: nothing is sent, and the connection ends at once.
 *
 * @throws what the system says when no TLS connection comes about; `signal.reason` when the signal aborts first
 */
export function shownCertificate(address: string, trust: Trust, signal: AbortSignal): Promise<ShownCertificate> {
  return lookAtServer(address, trust, signal, (shown) => {
    const certificate = new X509Certificate(shown.raw);
    return {
      subject: oneLine(certificate.subject) || oneLine(certificate.subjectAltName) || "nobody",
      issuer: oneLine(certificate.issuer) || "nobody",
      validFrom: new Date(certificate.validFrom),
      validTo: new Date(certificate.validTo),
    };
  });
}

/**
 * What `read` finds in the certificates that a server shows. They are looked at and not trusted: nothing is sent, and the
 * connection ends at once.
 *
 * @throws what the system says when no TLS connection comes about; what `read` throws; `signal.reason` when the signal
 *   aborts first
 */
function lookAtServer<T>(
  address: string,
  trust: Trust,
  signal: AbortSignal,
  read: (shown: tls.DetailedPeerCertificate) => T,
): Promise<T> {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const socket = tls.connect({
      host: address.replace(/:\d+$/, "").replace(/^\[(.*)\]$/, "$1"),
      port: Number(/:(\d+)$/.exec(address)?.[1]),
      servername: sentName(address, trust),
      ALPNProtocols: ["h2"],
      rejectUnauthorized: false,
      // A list of its own keeps Deno from resuming a session, whose certificate would be the one that was shown then.
      ca: [...tls.rootCertificates.slice(0, 1)],
    });
    const giveUp = () => end(() => reject(signal.reason));
    const end = (settle: () => void) => {
      signal.removeEventListener("abort", giveUp);
      settle();
      socket.destroy();
    };
    signal.addEventListener("abort", giveUp, { once: true });
    socket.on("error", (error) => end(() => reject(error)));
    socket.once("secureConnect", () =>
      end(() => {
        try {
          resolve(read(socket.getPeerCertificate(true)));
        } catch (error) {
          reject(error);
        }
      }));
  });
}

function tlsNameOptions(address: string, trust: Trust): Record<string, string> {
  return { "grpc.ssl_target_name_override": sentName(address, trust) };
}

/**
 * The TLS server name that is sent (SNI). Deno refuses an IP address as such (Node only warns), so a placeholder is sent for
 * one; the certificate is still checked against the address itself, in `credentials`.
 *
 * Deno keeps TLS sessions by that name, and a resumed session shows no certificate again (seen with 2.9.5, where no list of
 * CAs is given). So each endpoint has a placeholder of its own, and each way to trust it: what was found out about one
 * server, or with less care, must not count for another.
 */
function sentName(address: string, trust: Trust): string {
  const name = nameOf(address, trust);
  if (net.isIP(name) === 0) return name;
  const { ca, verify, serverName, pins } = trust;
  const digest = createHash("sha256").update(JSON.stringify([address, ca, verify, serverName, pins])).digest("hex");
  return `ip-address-${digest.slice(0, 16)}.invalid`;
}

/** What the certificate has to be for. */
function nameOf(address: string, trust: Trust): string {
  return trust.serverName ?? address.replace(/:\d+$/, "").replace(/^\[(.*)\]$/, "$1");
}

/**
 * Typed gRPC services over protobuf-es messages, on a Unix socket or a TCP port. Only the files of this directory import
 * grpc-js.
 *
 * Deadlines become AbortSignals. A handler's signal aborts shortly before its caller stops listening, so that an answer
 * which names what was slow still arrives; the handler goes on until its work has really ended, and holds its locks
 * until then.
 */
import "./goaway.ts";
import "./stream_limit.ts";
import type { EventEmitter } from "node:events";
import { chmodSync, lstatSync, mkdirSync, statSync, unlinkSync } from "node:fs";
import net from "node:net";
import { dirname } from "node:path";
import type { Duplex } from "node:stream";
import tls from "node:tls";
import {
  type DescMethod,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type DescService,
  fromBinary,
  type Message,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import { type Fields, formatSeconds, type Logger, type RequestContext, requestContext } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import { acceptAnyAuthority } from "./authority.ts";
import { methodDefinition } from "./method.ts";
import { isListening, listenUnix, type UnixListener } from "./unix_socket.ts";

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

/** Bytes that are no message of the schema; thrown later, for grpc-js would answer INTERNAL. */
class Unreadable {
  readonly error: StatusError;

  constructor(error: StatusError) {
    this.error = error;
  }
}

export function readable(method: DescMethod, bytes: Uint8Array): Message {
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
    ...requestContext(aborted.signal, deadline, log, `answer ${method.name}`),
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
  if (await isListening(path)) throw refuse("another process is listening there");
  unlinkSync(path);
}

function statIfThere(path: string) {
  try {
    return statSync(path);
  } catch {
    return undefined;
  }
}

/**
 * Typed gRPC services over protobuf-es messages, on a Unix socket or a TCP port. Only the files of this directory import
 * grpc-js.
 *
 * Deadlines become AbortSignals. A handler's signal aborts shortly before its caller's deadline, so that an answer that
 * names what was slow still arrives. The handler continues until its work has really ended, and holds its locks until then.
 */
import "./goaway.ts";
import "./stream_limit.ts";
import type { Duplex } from "node:stream";
import type {
  DescMethod,
  DescMethodServerStreaming,
  DescMethodUnary,
  DescService,
  Message,
  MessageInitShape,
  MessageShape,
} from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import type { RequestContext } from "../context.ts";
import type { Fields, Logger } from "../log.ts";
import { type Listen, startListener } from "./listener.ts";
import { methodDefinition } from "./method.ts";
import { CallRunner } from "./server_call.ts";

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

/** A handler whose message types are not known. */
export type AnyHandler = (request: Message, call: CallContext) => Promise<unknown> | AsyncIterable<unknown>;

/** A service with its handlers. */
export interface Service {
  readonly description: DescService;
  readonly handlers: Readonly<Record<string, AnyHandler | undefined>>;
}

/** A service with typed handlers. */
export function service<S extends DescService>(description: S, handlers: Handlers<S>): Service {
  return { description, handlers: handlers as unknown as Service["handlers"] };
}

/** What to serve, where, and how calls are logged. */
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
  /** Called when a call arrives; the result receives the code of its answer when the work for it has ended. */
  readonly observe?: (method: string) => (code: string) => void;
  /** Runs before each handler. Throws to reject the call. For authentication, counting and faults. */
  readonly before?: (method: DescMethod, request: Message, call: CallContext) => Promise<void> | void;
}

/** A running server. */
export interface Server {
  /** The port, or 0 for a socket path. */
  readonly port: number;
  /** Ends every connection at once, as a crash of the server would. Clients may connect again. */
  dropConnections(): void;
  /** Rejects new calls, waits for the running ones, `graceMs` at most, then closes everything. */
  stop(graceMs: number): Promise<void>;
}

/** Each sidecar keeps one open; kubelet opens one for each call, and a call for a hung volume can last minutes. */
const mostConnections = 1000;
/** external-provisioner has 100 workers on its connection. */
const mostCallsOfConnection = 128;

/**
 * Serves gRPC until `stop` is called. Idle connections are kept for ever, because the sidecars exit when theirs is closed.
 *
 * @throws StatusError FAILED_PRECONDITION when it cannot listen: see startListener
 */
export async function serve(options: ServeOptions): Promise<Server> {
  const server = new grpc.Server({
    "grpc.max_receive_message_length": 16 << 20,
    "grpc.max_concurrent_streams": mostCallsOfConnection,
  });
  const calls = new CallRunner(options);
  for (const { description, handlers } of options.services) {
    const definition: Record<string, grpc.MethodDefinition<Message, unknown>> = {};
    const implementation: Record<string, grpc.UntypedHandleCall> = {};
    for (const method of description.methods) {
      const served = { method, handler: handlers[method.localName] };
      definition[method.name] = methodDefinition(method);
      implementation[method.name] = method.methodKind === "server_streaming"
        ? (call: grpc.ServerWritableStream<Message, unknown>) => calls.startStreaming(served, call)
        : (call: grpc.ServerUnaryCall<Message, unknown>, reply: grpc.sendUnaryData<unknown>) =>
          calls.startUnary(served, call, reply);
    }
    server.addService(definition, implementation);
  }

  // grpc-js gets connections that are already accepted, so that any :authority can be served: see authority.ts.
  const injector = server.createConnectionInjector(grpc.ServerCredentials.createInsecure());
  const connections = new Set<Duplex>();
  const accept = (connection: Duplex) => {
    if (connections.size >= mostConnections) {
      options.log.warning("refused a connection, there are too many", { error: `${mostConnections} are open` });
      connection.destroy();
      return;
    }
    connections.add(connection);
    connection.on("error", () => {}); // "close" follows, and grpc-js ends the calls of the connection.
    connection.on("close", () => connections.delete(connection));
    injector.injectConnection(connection);
  };
  const listener = await startListener(options.listen, options.log, accept);

  return {
    port: listener.port,
    dropConnections() {
      for (const connection of connections) connection.destroy();
    },
    async stop(graceMs) {
      const drained = calls.drain();
      const closed = listener.close();
      let timer: ReturnType<typeof setTimeout> | undefined;
      await Promise.race([
        drained,
        new Promise((resolve) => timer = setTimeout(resolve, graceMs)),
      ]);
      clearTimeout(timer);
      // Replies that were just given are still inside grpc-js: this lets them reach their sockets.
      await new Promise((resolve) => setTimeout(resolve, 20));
      server.forceShutdown();
      for (const connection of connections) connection.destroy();
      await closed;
    },
  };
}

/**
 * A gRPC client for protobuf-es messages: `Channel` is a connection to one address, `CallError` says how a call failed.
 */
import "./goaway.ts";
import {
  create,
  type DescMessage,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type Message,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import type { StatusCode } from "../error.ts";
import { formatSeconds } from "../timing.ts";
import { wasCalmedSince } from "./goaway.ts";
import { methodDefinition } from "./method.ts";
import { credentials, tlsNameOptions, type Trust } from "./tls.ts";

/** The error of a call. */
export class CallError extends Error {
  override readonly name = "CallError";
  /** gRPC's name of the code, `UNKNOWN` and `DATA_LOSS` included. */
  readonly code: StatusCode | "UNKNOWN" | "DATA_LOSS";
  /**
   * Where it comes from. `server`: the server, in the status of its answer. All others come from this side, with code
   * UNAVAILABLE, or DEADLINE_EXCEEDED after the deadline of the call:
   * - `not connected`: the request was not sent.
   * - `too large`: an answer came that is larger than this side accepts. Whether the server has done its work is
   *   unknown.
   * - `no answer`: the connection was lost, or what came is not a gRPC answer (the error page of a proxy, for example).
   *   Whether the server has done its work is unknown.
   */
  readonly origin: "server" | "not connected" | "too large" | "no answer";

  constructor(code: CallError["code"], details: string, origin: CallError["origin"]) {
    super(details);
    this.code = code;
    this.origin = origin;
  }
}

/** Where a channel connects to, and how. */
export interface ChannelOptions {
  /** `host:port`, or `unix:///path`. */
  readonly address: string;
  /** Absent: clear text. */
  readonly tls?: Trust;
  readonly userAgent?: string;
}

/** How a call is made. */
export interface CallOptions {
  readonly signal: AbortSignal;
  readonly deadline?: Date;
  readonly headers?: Readonly<Record<string, string>>;
  /** How long to wait for a connection before the call fails as not sent; default: 3 s. */
  readonly connectTimeoutMs?: number;
}

/**
 * The longest message that is accepted as an answer: the objects that are made from it have to fit several times into the
 * heap of 64 MiB that the shipped executable has.
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
      // Connections to a storage cluster are direct; a proxy meant for the web would answer in its place.
      "grpc.enable_http_proxy": 0,
      // Two channels to one server must be two connections: fail-over closes one of them.
      "grpc.use_local_subchannel_pool": 1,
      // A local server cannot vanish unnoticed, and one that is slow to answer must not lose the calls that it works on.
      ...(options.address.startsWith("unix:")
        ? {}
        : { "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 10_000 }),
      "grpc.initial_reconnect_backoff_ms": 1000,
      "grpc.max_reconnect_backoff_ms": 7000,
      "grpc.max_receive_message_length": longestAnswerBytes,
      ...(options.tls === undefined ? {} : tlsNameOptions(options.address, options.tls)),
    });
  }

  /** Whether there is a connection now. Does not begin to make one. */
  get isConnected(): boolean {
    return this.#client.getChannel().getConnectivityState(false) === grpc.connectivityState.READY;
  }

  /**
   * Calls a unary method.
   *
   * @throws CallError with the server's code and words, or with an `origin` that says why no answer of the server came;
   *   `signal.reason` when the signal aborts first
   */
  async call<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    options: CallOptions,
  ): Promise<MessageShape<O>> {
    options.signal.throwIfAborted();
    await this.#connected(options);
    return await new Promise((resolve, reject) => {
      const pending = this.#client.makeUnaryRequest(
        ...callArguments(method, request, options),
        (error, response) => {
          running[Symbol.dispose]();
          if (error === null) resolve(response as MessageShape<O>);
          else reject(running.failure(error));
        },
      );
      const running = new RunningCall(pending, this.address, options.signal);
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
    const pending = this.#client.makeServerStreamRequest(...callArguments(method, request, options));
    using running = new RunningCall(pending, this.address, options.signal);
    try {
      for await (const message of pending) yield message as MessageShape<O>;
    } catch (error) {
      throw running.failure(error as grpc.ServiceError);
    } finally {
      pending.cancel();
    }
  }

  /** Waits for the connection. Does not throw when it fails at once: the call itself then fails with the reason. */
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

/** What grpc-js makes a call with, whatever its kind. */
function callArguments<I extends DescMessage, O extends DescMessage>(
  method: DescMethodUnary<I, O> | DescMethodServerStreaming<I, O>,
  request: MessageInitShape<I>,
  options: CallOptions,
) {
  const definition = methodDefinition(method);
  return [
    definition.path,
    definition.requestSerialize,
    definition.responseDeserialize as (bytes: Buffer) => MessageShape<O>,
    create(method.input, request) as Message,
    metadata(options),
    options.deadline === undefined ? {} : { deadline: options.deadline },
  ] as const;
}

/** The parts of the calls of grpc-js that RunningCall uses. */
interface PendingCall {
  cancel(): void;
  on(event: "metadata", listener: (metadata: grpc.Metadata) => void): unknown;
}

/** A call that was sent. It is cancelled when `signal` aborts, until this is disposed. */
class RunningCall implements Disposable {
  readonly #address: string;
  readonly #signal: AbortSignal;
  readonly #cancel: () => void;
  readonly #started = performance.now();
  /** Of the answer; undefined: nothing has come. */
  #headers: grpc.Metadata | undefined;

  constructor(pending: PendingCall, address: string, signal: AbortSignal) {
    this.#address = address;
    this.#signal = signal;
    this.#cancel = () => pending.cancel();
    pending.on("metadata", (metadata) => this.#headers = metadata);
    signal.addEventListener("abort", this.#cancel, { once: true });
  }

  /** What the caller receives for an error of grpc-js: a CallError, or the reason of the signal when that has aborted. */
  failure(error: grpc.ServiceError): unknown {
    if (this.#signal.aborted) return this.#signal.reason;
    return callError(error, this.#headers, wasCalmedSince(this.#address, this.#started));
  }

  [Symbol.dispose](): void {
    this.#signal.removeEventListener("abort", this.#cancel);
  }
}

function metadata(options: CallOptions): grpc.Metadata {
  const metadata = new grpc.Metadata();
  for (const [name, value] of Object.entries(options.headers ?? {})) metadata.set(name, value);
  return metadata;
}

/** The text of grpc-js for a stream that was ended with ENHANCE_YOUR_CALM. */
const calmedDetails = "Bandwidth exhausted or memory limit exceeded";

/** The parts of a server's headers or trailers that grpc-js leaves out of its metadata. */
interface SentStatus {
  readonly http: number | undefined;
  /** The status of gRPC. */
  readonly grpc: number | undefined;
}

/**
 * Needed because the codes that grpc-js makes up (for HTTP errors, lost connections, unreadable answers) look like sent
 * ones.
 */
const sentStatus = new WeakMap<grpc.Metadata, SentStatus>();

const readHeaders = grpc.Metadata.fromHttp2Headers;
grpc.Metadata.fromHttp2Headers = (headers) => {
  const metadata = readHeaders.call(grpc.Metadata, headers);
  const numberOf = (value: unknown) => value === undefined ? undefined : Number(value);
  sentStatus.set(metadata, { http: numberOf(headers[":status"]), grpc: numberOf(headers["grpc-status"]) });
  return metadata;
};

/**
 * The CallError for an error of grpc-js.
 *
 * @param headers of the answer; undefined: nothing came
 * @param isCalmed the server has ended a connection with ENHANCE_YOUR_CALM since the call began
 */
function callError(error: grpc.ServiceError, headers: grpc.Metadata | undefined, isCalmed: boolean): CallError {
  const code = (grpc.status[error.code] ?? "UNKNOWN") as CallError["code"];
  // For an answer that it cannot decompress, grpc-js gives no details.
  const details = error.details || (error.code === undefined ? "an answer that cannot be read" : error.message);
  const sent = error.metadata === undefined ? undefined : sentStatus.get(error.metadata);
  if (sent?.grpc !== undefined && sent.grpc === error.code) return new CallError(code, details, "server");
  const ourCode = code === "DEADLINE_EXCEEDED" ? code : "UNAVAILABLE";
  if (/^(No connection established|Name resolution failed)/.test(details)) {
    // Of its long text for a failed connection, only the words of the system are of use to a reader.
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

/** Plain words for `reason`, the words of Deno's TLS and HTTP/2, and of grpc-js, for a failed connection. */
function wordsOfFailedConnection(reason: string): string {
  // grpc-js adds the time to some of them, and each text would be another event in Kubernetes.
  const plain = reason.replace(/ \(\d{4}-\d\d-\d\dT[\d:.]+Z\)/g, "").replace(/^Error \[\w+\]: /, "");
  if (plain === "Failed to connect") return "the connection was closed before HTTP/2 began";
  if (plain === "Protocol error") return "what answers does not speak HTTP/2";
  if (/InvalidContentType|wrong version number/.test(plain)) return "what answers does not speak TLS";
  if (/^Name resolution failed/.test(plain)) return "its name cannot be resolved";
  return plain;
}

/**
 * Words for an answer that is not a gRPC answer.
 *
 * @param contentType undefined: that of gRPC, or nothing came
 */
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

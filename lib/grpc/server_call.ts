/** One incoming call on the server: its context, its deadline, its answer and its log line. */
import "./goaway.ts";
import type { EventEmitter } from "node:events";
import type { DescMethod, Message } from "@bufbuild/protobuf";
import grpc from "@grpc/grpc-js";
import { requestContext } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Logger } from "../log.ts";
import { formatSeconds } from "../timing.ts";
import { requestOf } from "./request.ts";
import type { AnyHandler, CallContext, ServeOptions } from "./server.ts";

/** A call without a deadline gets this one. */
const longestCallMs = 10 * 60 * 1000;
const statusNumbers = grpc.status as unknown as Readonly<Record<string, number>>;

type IncomingCall = grpc.ServerUnaryCall<Message, unknown> | grpc.ServerWritableStream<Message, unknown>;

/** A method and its handler; undefined: the method answers UNIMPLEMENTED. */
export interface ServedMethod {
  readonly method: DescMethod;
  readonly handler: AnyHandler | undefined;
}

/** Runs the calls of one server. */
export class CallRunner {
  readonly #options: ServeOptions;
  readonly #running = new Set<Promise<void>>();
  #calls = 0;
  #isDraining = false;

  constructor(options: ServeOptions) {
    this.#options = options;
  }

  /** From now on new calls are answered with UNAVAILABLE. Resolves when the running ones have ended. */
  async drain(): Promise<void> {
    this.#isDraining = true;
    await Promise.allSettled(this.#running);
  }

  startUnary(
    served: ServedMethod,
    call: grpc.ServerUnaryCall<Message, unknown>,
    reply: grpc.sendUnaryData<unknown>,
  ): void {
    this.#track(this.#runUnary(served, call, reply));
  }

  startStreaming(served: ServedMethod, call: grpc.ServerWritableStream<Message, unknown>): void {
    this.#track(this.#runStreaming(served, call));
  }

  #track(call: Promise<void>): void {
    this.#running.add(call);
    call.finally(() => this.#running.delete(call));
  }

  async #runUnary(
    served: ServedMethod,
    call: grpc.ServerUnaryCall<Message, unknown>,
    reply: grpc.sendUnaryData<unknown>,
  ): Promise<void> {
    const running = this.#begin(served.method, call);
    const { context, marginMs } = running;
    let isAnswered = false;
    const answer = (error: StatusError | undefined, response?: unknown) => {
      if (isAnswered) {
        const facts = { code: error?.code ?? "OK", ms: running.elapsedMs() };
        context.log.info("ended a call after its caller had left", error ? { ...facts, error: error.message } : facts);
        return;
      }
      isAnswered = true;
      running.logEnd(error);
      if (error === undefined) reply(null, response);
      else reply(statusOf(error));
    };
    // A handler that reacts to the signal has half of the margin to say more than "too slow".
    let grace: ReturnType<typeof setTimeout> | undefined;
    context.signal.addEventListener("abort", () => {
      grace = setTimeout(() => answer(context.signal.reason), marginMs / 2);
    });
    await this.#run(served, call, running, {
      handle: async (handler, request) => answer(undefined, await handler(request, context)),
      fail: answer,
    });
    clearTimeout(grace);
  }

  async #runStreaming(served: ServedMethod, call: grpc.ServerWritableStream<Message, unknown>): Promise<void> {
    const running = this.#begin(served.method, call);
    const { context } = running;
    await this.#run(served, call, running, {
      handle: async (handler, request) => {
        for await (const message of handler(request, context) as AsyncIterable<unknown>) {
          context.signal.throwIfAborted();
          if (!call.write(message)) await waitForDrain(call, context.signal);
        }
        running.logEnd(undefined);
        call.end();
      },
      fail: (error) => {
        running.logEnd(error);
        call.emit("error", statusOf(error));
      },
    });
  }

  /** Runs what both kinds of calls have in common. Does not reject. */
  async #run(
    { method, handler }: ServedMethod,
    call: IncomingCall,
    running: RunningCall,
    { handle, fail }: {
      readonly handle: (handler: AnyHandler, request: Message) => Promise<void>;
      readonly fail: (error: StatusError) => void;
    },
  ): Promise<void> {
    try {
      if (this.#isDraining) {
        throw new StatusError("UNAVAILABLE", `Cannot start ${method.name}: the driver is shutting down`);
      }
      const request = requestOf(call);
      await this.#options.before?.(method, request, running.context);
      if (handler === undefined) throw unimplemented(method);
      await handle(handler, request);
    } catch (error) {
      fail(answerError(method, running.context.log, error));
    } finally {
      running.finish();
    }
  }

  #begin(method: DescMethod, call: IncomingCall): RunningCall {
    return new RunningCall(this.#options, method, call, ++this.#calls);
  }
}

/** A call from its arrival to the end of the work for it. */
class RunningCall {
  readonly context: CallContext;
  /** How long before the deadline the signal aborts: time for the answer to travel. */
  readonly marginMs: number;
  readonly #options: ServeOptions;
  readonly #method: DescMethod;
  readonly #started = performance.now();
  readonly #observed: ((code: string) => void) | undefined;
  readonly #timer: ReturnType<typeof setTimeout>;
  #code = "OK";
  #isFinished = false;

  constructor(options: ServeOptions, method: DescMethod, call: IncomingCall, number: number) {
    this.#options = options;
    this.#method = method;
    this.#observed = options.observe?.(method.name);
    const now = Date.now();
    const given = call.getDeadline();
    const deadline = new Date(Math.min(given instanceof Date ? given.getTime() : given, now + longestCallMs));
    const leftMs = deadline.getTime() - now;
    this.marginMs = Math.min(250, Math.max(0, leftMs) / 5);
    const aborted = new AbortController();
    this.#timer = setTimeout(() => {
      const limit = formatSeconds(leftMs);
      const problem = `within the caller's deadline of ${limit}: the work goes on, repeat`;
      aborted.abort(new StatusError("DEADLINE_EXCEEDED", `Cannot finish ${method.name} ${problem}`));
    }, Math.max(0, leftMs - this.marginMs));
    (call as EventEmitter).on("cancelled", () => {
      // grpc-js also emits this at the end of calls that were answered.
      if (this.#isFinished) return;
      aborted.abort(new StatusError("CANCELLED", `${method.name} was given up by its caller`));
    });
    const log = describe(options, method, call, number);
    this.context = {
      ...requestContext(aborted.signal, deadline, log, `answer ${method.name}`),
      header: (name) => call.metadata.get(name)[0]?.toString(),
    };
  }

  elapsedMs(): number {
    return Math.round((performance.now() - this.#started) * 10) / 10;
  }

  /** Logs the answer: one line per call. */
  logEnd(error: StatusError | undefined): void {
    const { log } = this.context;
    const ms = this.elapsedMs();
    this.#code = error?.code ?? "OK";
    if (error !== undefined) {
      log.info("answered with an error", { code: error.code, ms, error: error.message });
    } else if (this.#options.quiet?.(this.#method)) {
      log.debug("answered", { code: "OK", ms });
    } else {
      log.info("answered", { code: "OK", ms });
    }
  }

  /** Ends the deadline timer and ignores a later cancellation. */
  finish(): void {
    this.#isFinished = true;
    clearTimeout(this.#timer);
    this.#observed?.(this.#code);
  }
}

/** The logger of a call, with the facts about its request; logs the request at level debug. */
function describe(options: ServeOptions, method: DescMethod, call: IncomingCall, number: number): Logger {
  let log = options.log.with({ rpc: method.name, call: number });
  try {
    const request = requestOf(call);
    log = log.with(options.describe?.(method, request) ?? {});
    if (options.redact !== undefined && log.verbose) {
      log.debug("received", { request: options.redact(method, request) });
    }
  } catch (error) {
    // A request that cannot be described must still be answered.
    log.error("failed to describe a request", { error: messageOf(error) });
  }
  return log;
}

/** Resolves when the caller has read enough that more can be written; rejects with the reason of `signal`. */
function waitForDrain(call: grpc.ServerWritableStream<Message, unknown>, signal: AbortSignal): Promise<void> {
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

/** The error that the caller receives. */
function answerError(method: DescMethod, log: Logger, error: unknown): StatusError {
  if (error instanceof StatusError) {
    if (error.cause !== undefined) log.debug("failed because of", { error: messageOf(error.cause) });
    return error;
  }
  log.error("failed in an unforeseen way", {
    error: error instanceof Error ? error.stack ?? error.message : String(error),
  });
  const code = systemCode(error);
  if (code !== undefined) {
    // The machine may have what it lacks now (descriptors, memory, a disk) later; it is no fault of the driver.
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

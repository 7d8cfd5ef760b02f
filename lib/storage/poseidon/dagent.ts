/**
 * Calls to DAgent, the REST face of PoseidonOS (facts: docs/reference/poseidonos-api.md section 5).
 *
 * - The HTTP status is looked at first: a request that DAgent itself refuses has HTTP status 400 and code 0.
 * - PoseidonOS does one thing at a time, and so do we: changes queue here, one after the other per DAgent, and a caller
 *   whose time is over is told what it waited for. DAgent would let it wait for half an hour.
 * - A change is never broken off. When its caller gives up it goes on to its end here as it does there, and what comes
 *   next waits for it: two changes of ours never meet on PoseidonOS.
 * - Of the routes, only those named here are called. Some others wipe an array or end PoseidonOS (5.5). Every request but
 *   a GET has a `param` object, for without one DAgent locks up for half an hour.
 *
 * DAgent knows no TLS and no credentials: whoever reaches its port has every right. So nothing here is secret.
 */
import * as z from "zod";
import { type Fields, formatSeconds, type RequestContext, sleep, timeLimit, unlessAborted } from "../../context.ts";
import { hasCode, messageOf, type StatusCode, StatusError } from "../../error.ts";
import { type Endpoint, formatEndpoint } from "../../volume_id.ts";
import { KeyedLock } from "../../lock.ts";
import { countManagementCall, type Metrics } from "../../metrics.ts";
import { type Meaning, meaningOf, readingOf } from "./codes.ts";

/** A StatusError for what DAgent answered, or for its silence. */
export class PoseidonError extends StatusError {
  readonly meaning: Meaning;
  /** The same request may succeed in a moment. */
  readonly passing: boolean;

  constructor(meaning: Meaning, message: string, options: ErrorOptions & { readonly code?: StatusCode } = {}) {
    const reading = readingOf(meaning);
    super(options.code ?? reading.code, message, options);
    this.meaning = meaning;
    this.passing = reading.passing;
  }
}

/** Whether `error` is what DAgent answered, with one of these meanings. */
export function means(error: unknown, ...meanings: readonly Meaning[]): error is PoseidonError {
  return error instanceof PoseidonError && meanings.includes(error.meaning);
}

/**
 * How long a change is waited for once it was sent: DAgent gives PoseidonOS 360 s for a call (5.4), and its own answer
 * some time to arrive.
 */
const longestChangeMs = 400_000;

const basePath = "/api/ibofos/v1";
/** The longest answer that is read: 256 volumes have some 100 KiB. */
const longestAnswerBytes = 8 << 20;

const envelopeSchema = z.object({
  result: z.object({
    status: z.object({
      code: z.number(),
      eventName: z.string().default(""),
      cause: z.string().default(""),
      description: z.string().default(""),
      posDescription: z.string().default(""),
      errorInfo: z.object({ errorCode: z.number().default(0) }).optional(),
    }),
    data: z.unknown().optional(),
  }),
  info: z.object({ version: z.string().default("") }).optional(),
});

/** A change of PoseidonOS. */
export interface Change {
  readonly method: "POST" | "DELETE";
  /** Behind `/api/ibofos/v1`, its variable parts encoded. */
  readonly path: string;
  readonly param: Readonly<Record<string, unknown>>;
}

interface Request {
  readonly method: "GET" | "POST" | "DELETE";
  readonly path: string;
  readonly param?: Readonly<Record<string, unknown>>;
}

/** The DAgents of this process, one for each endpoint. Dispose it to break off what still runs. */
export class Dagents implements AsyncDisposable {
  readonly #dagents = new Map<string, Dagent>();
  readonly #closing = new AbortController();
  readonly #metrics: Metrics | undefined;

  constructor(metrics?: Metrics) {
    this.#metrics = metrics;
  }

  /** Connects to nothing yet. */
  at(endpoint: Endpoint): Dagent {
    const address = formatEndpoint(endpoint);
    let dagent = this.#dagents.get(address);
    if (dagent === undefined) {
      dagent = new Dagent(address, this.#closing.signal, this.#metrics);
      this.#dagents.set(address, dagent);
    }
    return dagent;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort(new DOMException("the driver stops", "AbortError"));
    for (const dagent of this.#dagents.values()) await dagent.idle();
  }
}

/** One DAgent, shared by all calls. */
export class Dagent {
  /** `host:port`, for messages. */
  readonly address: string;
  readonly #closing: AbortSignal;
  readonly #metrics: Metrics | undefined;
  readonly #locks = new KeyedLock();
  /** What holds the lock, for whoever waits for it. */
  #busy: { readonly what: string; readonly since: number } | undefined;
  /** The change that was sent and has not been answered. */
  #unanswered: Promise<unknown> | undefined;
  /** What PoseidonOS called itself in its last answer; empty: it has not. */
  #version = "";

  constructor(address: string, closing: AbortSignal, metrics: Metrics | undefined) {
    this.address = address;
    this.#closing = closing;
    this.#metrics = metrics;
  }

  /** The version of PoseidonOS, `v1.0.0-rc2`; empty when no answer has told it yet. */
  get version(): string {
    return this.#version;
  }

  /**
   * Reads with GET. Busy: asks again until `ctx` ends.
   *
   * @returns `data` as `schema` reads it; undefined stands for the data of an answer without any
   * @throws PoseidonError with what DAgent says, UNAVAILABLE when it cannot be reached, INTERNAL when it answers something
   *   that is none of its words
   */
  async read<T>(ctx: RequestContext, action: string, path: string, schema: z.ZodType<T>): Promise<T> {
    const delays = growingDelays();
    for (;;) {
      try {
        const { data } = await this.#call(ctx, action, { method: "GET", path }, ctx.signal);
        const parsed = schema.safeParse(data);
        if (parsed.success) return parsed.data;
        const problems = parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`);
        throw new StatusError(
          "INTERNAL",
          `Cannot ${action}: PoseidonOS at ${this.address} answered GET ${path} with data of another form (${
            problems.slice(0, 3).join("; ")
          })`,
        );
      } catch (error) {
        if (!means(error, "busy")) throw error;
        await pause(ctx, delays, action, error.message);
      }
    }
  }

  /**
   * Runs `work`, which looks and changes, when everything of ours that came before it has ended. A change that its caller
   * gave up is part of that.
   *
   * @param what for those who wait meanwhile: `creating volume "pvc-1"`
   * @throws StatusError ABORTED when the caller's time ends before its turn comes
   */
  async exclusively<T>(ctx: RequestContext, action: string, what: string, work: () => Promise<T>): Promise<T> {
    let held: Disposable;
    try {
      held = await this.#locks.wait("changes", what, ctx.signal);
    } catch (reason) {
      const { what: other = "another change", since = performance.now() } = this.#busy ?? {};
      throw new StatusError(
        "ABORTED",
        `Cannot ${action} in time: one change after the other is made on PoseidonOS at ${this.address}, and ${other} has ` +
          `been running for ${Math.round((performance.now() - since) / 1000)} s; repeat the call`,
        { cause: reason },
      );
    }
    this.#busy = { what, since: performance.now() };
    const release = () => {
      this.#busy = undefined;
      this.#unanswered = undefined;
      held[Symbol.dispose]();
    };
    try {
      return await work();
    } finally {
      // The caller has its answer; who comes next waits until this one's last change has really ended.
      if (this.#unanswered === undefined) release();
      else this.#unanswered.then(release, release);
    }
  }

  /**
   * Makes one change, for `work` of `exclusively` only. It is sent once, whatever happens.
   *
   * @throws PoseidonError; whether the change was made has to be looked up after each of them
   */
  async change(ctx: RequestContext, action: string, change: Change): Promise<void> {
    ctx.signal.throwIfAborted();
    const started = performance.now();
    const limit = timeLimit(this.#closing, longestChangeMs);
    const answer = this.#call(ctx, action, change, limit.signal);
    const ended = answer.then(() => {}, () => {}).finally(() => limit[Symbol.dispose]());
    this.#unanswered = ended;
    try {
      await unlessAborted(answer, ctx.signal);
      this.#unanswered = undefined;
    } catch (error) {
      if (!ctx.signal.aborted) {
        this.#unanswered = undefined;
        throw error;
      }
      throw new PoseidonError(
        "no answer from PoseidonOS",
        `Cannot ${action} in time: PoseidonOS at ${this.address} has not answered ${change.method} ${change.path} after ${
          formatSeconds(performance.now() - started)
        }; it goes on there, repeat the call`,
        { cause: error, code: codeOf(ctx.signal) },
      );
    }
  }

  /** Resolves when no change is under way. */
  async idle(): Promise<void> {
    await this.#unanswered;
  }

  async #call(
    ctx: RequestContext,
    action: string,
    { method, path, param }: Request,
    signal: AbortSignal,
  ): Promise<{ readonly data: unknown }> {
    const what = `${method} ${path}`;
    const requestId = crypto.randomUUID();
    const started = performance.now();
    const note = (fields: Fields & { readonly code: string }) => {
      const ms = Math.round(performance.now() - started);
      countManagementCall(this.#metrics, this.address, `${method} ${routeOf(path)}`, fields.code, ms);
      ctx.log.debug("called the management API", { rpc: what, address: this.address, requestId, ms, ...fields });
    };
    let status: number;
    let text: string;
    try {
      const response = await fetch(`http://${this.address}${basePath}${path}`, {
        method,
        headers: {
          "X-request-Id": requestId,
          ts: String(Math.floor(Date.now() / 1000)),
          ...(method === "GET" ? {} : { "Content-Type": "application/json" }),
        },
        ...(method === "GET" ? {} : { body: once(JSON.stringify({ param: param ?? {} })) }),
        redirect: "manual",
        signal,
      });
      status = response.status;
      text = await readText(response, longestAnswerBytes);
    } catch (error) {
      const reason = reasonOf(error);
      note({ code: "UNAVAILABLE", error: reason });
      if (ctx.signal.aborted && signal === ctx.signal) {
        throw new PoseidonError(
          "no answer from PoseidonOS",
          `Cannot ${action} in time: PoseidonOS at ${this.address} has not answered ${what} after ${
            formatSeconds(performance.now() - started)
          }; repeat the call`,
          { cause: ctx.signal.reason, code: codeOf(ctx.signal) },
        );
      }
      throw new PoseidonError(
        "no answer from PoseidonOS",
        `Cannot ${action}: the DAgent at ${this.address} cannot be reached, or broke off ${what} (${reason})`,
        { cause: error },
      );
    }
    const refuse = (meaning: Meaning, words: string) => {
      note({ code: String(status), error: words });
      return new PoseidonError(
        meaning,
        `Cannot ${action}: PoseidonOS at ${this.address} answered ${what} with ${words}`,
      );
    };
    const envelope = envelopeSchema.safeParse(parseJson(text));
    if (!envelope.success) {
      // A proxy in between, a DAgent that panicked (500), an answer that was cut off, or something that is no DAgent at
      // all (404). Whichever it is, it does not tell what PoseidonOS has done.
      const words = `HTTP status ${status} and no envelope of DAgent`;
      const isServerError = status >= 500;
      throw refuse(
        "no answer from PoseidonOS",
        isServerError
          ? words
          : `${words}: a proxy in between, or there is no DAgent of a known version at this address`,
      );
    }
    const { result, info } = envelope.data;
    if (info !== undefined && info.version !== "") this.#version = info.version;
    const { code, eventName, errorInfo } = result.status;
    const words = [result.status.cause, result.status.description, result.status.posDescription]
      .find((words) => words !== "") ?? "";
    const told = `${code}${eventName === "" ? "" : ` ${eventName}`}${words === "" ? "" : `: ${words}`}`;
    if (status === 200 && code === 0 && (errorInfo?.errorCode ?? 0) === 0) {
      note({ code: "0" });
      return { data: result.data };
    }
    if (code === 0) throw refuse("unknown", `HTTP status ${status}: it did not take the request as it is`);
    throw refuse(meaningOf(code, eventName), told);
  }
}

/** Parts of routes that are words of DAgent (docs/reference/poseidonos-api.md 6), and not names of arrays and volumes. */
const routeWords: ReadonlySet<string> = new Set(
  ["array", "listener", "mount", "qos", "subsystem", "transports", "volumelist", "volumes"],
);

/** A path as a kind of call: `/volumes/{}/mount`. */
function routeOf(path: string): string {
  return path.split("/").map((part, at) => at === 0 || routeWords.has(part) ? part : "{}").join("/");
}

/** What fetch knows of a failed connection, without the addresses that the message around it has already. */
function reasonOf(error: unknown): string {
  const cause = error instanceof Error && error.cause !== undefined ? error.cause : error;
  const text = messageOf(cause);
  return /client error \(\w+\): (.*)$/.exec(text)?.[1] ?? text;
}

/**
 * A body that can be sent once only. Of any other, fetch (Deno 2.9.5) sends the request again by itself when the connection
 * ends without an answer, whatever the method.
 */
function once(text: string): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode(text));
      controller.close();
    },
  });
}

/** The body of an answer; throws when it is longer than `mostBytes`. */
async function readText(response: Response, mostBytes: number): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  let bytes = 0;
  for await (const part of response.body ?? []) {
    bytes += part.length;
    // Leaving the loop ends the connection.
    if (bytes > mostBytes) throw new Error(`its answer has more than ${mostBytes >> 20} MiB`);
    text += decoder.decode(part, { stream: true });
  }
  return text + decoder.decode();
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** The code for a call that `signal` ended. */
function codeOf(signal: AbortSignal): StatusCode {
  return signal.reason instanceof StatusError ? signal.reason.code : "DEADLINE_EXCEEDED";
}

/** Delays between looks. */
export function* growingDelays(): Generator<number, never> {
  for (let ms = 100;; ms = Math.min(ms * 1.5, 2000)) yield ms;
}

/** Waits before the next look; when the caller's time ends meanwhile, UNAVAILABLE tells what was last seen. */
export async function pause(
  ctx: RequestContext,
  delays: Iterator<number, never>,
  action: string,
  seen: string,
): Promise<void> {
  try {
    await sleep(delays.next().value, ctx.signal);
  } catch (reason) {
    throw tooLate(ctx, action, seen, reason);
  }
}

function tooLate(ctx: RequestContext, action: string, seen: string, cause: unknown): StatusError {
  const code = codeOf(ctx.signal);
  return new StatusError(
    code === "DEADLINE_EXCEEDED" ? "UNAVAILABLE" : code,
    `Cannot ${action} in time: ${seen.replace(`Cannot ${action}: `, "")}; repeat the call`,
    { cause },
  );
}

/** What is to be done next, or what has come of it. */
export type Next<R> =
  | { readonly done: R }
  | {
    /** Tells this step from others, and what it does. */
    readonly step: string;
    readonly change: Change;
    /** Turns a refusal that looking again does not change into a better one. */
    readonly explain?: (refusal: PoseidonError) => Promise<StatusError | undefined>;
  };

/**
 * Looks, does the next thing that is missing, and looks again, until nothing is. After a failure or a lost answer the look
 * decides what to do, so that nothing is repeated blindly, and what happened although the answer denied it counts.
 *
 * @throws PoseidonError for a step that was refused for good and is still to be done; UNAVAILABLE, which is not final, when a
 *   look after a change is answered with what nobody understands
 */
export async function converge<W, R>(
  ctx: RequestContext,
  action: string,
  dagent: Dagent,
  look: () => Promise<W>,
  next: (world: W) => Next<R> | Promise<Next<R>>,
): Promise<R> {
  const delays = growingDelays();
  /** What stood in the way so far. */
  let seen: string | undefined;
  let isChanged = false;
  let last: { readonly step: string; readonly refusal: PoseidonError | undefined } | undefined;
  for (;;) {
    let now: Next<R>;
    try {
      now = await next(await look());
    } catch (error) {
      // Of a look that the deadline cut off, what came before it says more.
      if (seen !== undefined && ctx.signal.aborted) throw tooLate(ctx, action, seen, error);
      // Something may have been made. INTERNAL would be the last word to the caller, who could leave it behind.
      if (isChanged && hasCode(error, "INTERNAL")) {
        throw new StatusError("UNAVAILABLE", `${error.message}; repeat the call`, { cause: error });
      }
      throw error;
    }
    if ("done" in now) return now.done;
    if (last?.step === now.step) {
      if (last.refusal !== undefined && !last.refusal.passing) {
        throw await now.explain?.(last.refusal) ?? last.refusal;
      }
      seen = last.refusal?.message ??
        `PoseidonOS at ${dagent.address} says that it did "${now.step}", and does not show it`;
      await pause(ctx, delays, action, seen);
      // What was seen before the pause may be old by now.
      last = undefined;
      continue;
    }
    let refusal: PoseidonError | undefined;
    isChanged = true;
    try {
      await dagent.change(ctx, action, now.change);
    } catch (error) {
      if (!(error instanceof PoseidonError)) throw error;
      if (ctx.signal.aborted) throw seen === undefined ? error : tooLate(ctx, action, seen, error);
      ctx.log.debug("looks again after a refusal", { error: error.message });
      refusal = error;
      seen = error.message;
    }
    last = { step: now.step, refusal };
  }
}

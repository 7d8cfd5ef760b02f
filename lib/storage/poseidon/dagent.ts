/**
 * Calls to DAgent, the REST API of PoseidonOS (facts: docs/reference/poseidonos-api.md section 5).
 *
 * - The HTTP status is checked first: a request that DAgent itself rejects has HTTP status 400 and code 0.
 * - PoseidonOS does one thing at a time, and so does this driver: changes queue here, one after the other per DAgent,
 *   and a caller whose time is over learns what it waited for. DAgent would let it wait for half an hour.
 * - A change is never broken off. When its caller gives up, it continues to its end here as it does there, and the next
 *   change waits for it: two changes of ours never meet on PoseidonOS.
 * - Of the routes, only those named in this room are called. Some others wipe an array or end PoseidonOS (5.5). Every
 *   request but a GET has a `param` object, because without one DAgent blocks for half an hour.
 *
 * DAgent has neither TLS nor credentials: every program that can connect to its port has every right. So nothing here
 * is secret.
 */
import type * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { KeyedLock } from "../../lock.ts";
import type { Metrics } from "../../metrics.ts";
import { formatSeconds, timeLimit, unlessAborted } from "../../timing.ts";
import { type Endpoint, formatEndpoint } from "../../volume_id.ts";
import { abortCode, growingDelays, inTime, pause } from "../polling.ts";
import { busyError, means, PoseidonError } from "./dagent_error.ts";
import { callDagent, type DagentRequest } from "./http.ts";

/**
 * How long to wait for a change once it was sent: DAgent gives PoseidonOS 360 s for a call (5.4), and its own answer
 * needs some time to arrive.
 */
const longestChangeMs = 400_000;

/** A change of PoseidonOS. */
export interface DagentChange extends DagentRequest {
  readonly method: "POST" | "DELETE";
  readonly param: Readonly<Record<string, unknown>>;
}

/** The DAgents of this process, one for each endpoint. Dispose it to break off what still runs. */
export class Dagents implements AsyncDisposable {
  readonly #dagents = new Map<string, Dagent>();
  readonly #closing = new AbortController();
  readonly #metrics: Metrics | undefined;

  constructor(metrics?: Metrics) {
    this.#metrics = metrics;
  }

  /** The DAgent at an endpoint; connects to nothing yet. */
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
    for (const dagent of this.#dagents.values()) await dagent.waitUntilIdle();
  }
}

/** One DAgent, shared by all calls. */
export class Dagent {
  /** `host:port`, for messages. */
  readonly address: string;
  readonly #closing: AbortSignal;
  readonly #metrics: Metrics | undefined;
  readonly #locks = new KeyedLock();
  /** What holds the lock, for the errors of waiting callers. */
  #busy: { readonly what: string; readonly since: number } | undefined;
  /** The change that was sent and has not been answered. */
  #unanswered: Promise<unknown> | undefined;
  #version = "";

  constructor(address: string, closing: AbortSignal, metrics: Metrics | undefined) {
    this.address = address;
    this.#closing = closing;
    this.#metrics = metrics;
  }

  /** The version of PoseidonOS, `v1.0.0-rc2`; empty when no answer has named it yet. */
  get version(): string {
    return this.#version;
  }

  /**
   * Reads with GET. While PoseidonOS is busy, asks again until `ctx` ends.
   *
   * @returns `data` as `schema` reads it; undefined stands for the data of an answer without any
   * @throws PoseidonError with what DAgent says, UNAVAILABLE when it cannot be reached, INTERNAL when its answer has
   *   another form than documented
   */
  async read<T>(ctx: RequestContext, path: string, schema: z.ZodType<T>): Promise<T> {
    const delays = growingDelays();
    for (;;) {
      try {
        const data = await this.#call(ctx, { method: "GET", path }, ctx.signal);
        const parsed = schema.safeParse(data);
        if (parsed.success) return parsed.data;
        const problems = parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`);
        throw ctx.error(
          "INTERNAL",
          `PoseidonOS at ${this.address} answered GET ${path} with data of another form (${
            problems.slice(0, 3).join("; ")
          })`,
        );
      } catch (error) {
        if (!means(error, "busy")) throw error;
        await pause(ctx, delays, (reason) => busyError(ctx, error.message, reason));
      }
    }
  }

  /**
   * Runs `work`, which looks and changes, when everything of ours that came before it has ended. A change that its
   * caller gave up is part of that.
   *
   * @param what names the work in the errors of callers that wait for it: `creating volume "pvc-1"`
   * @throws StatusError ABORTED when the caller's time ends before its turn comes
   */
  async exclusively<T>(ctx: RequestContext, what: string, work: () => Promise<T>): Promise<T> {
    let held: Disposable;
    try {
      held = await this.#locks.wait("changes", what, ctx.signal);
    } catch (reason) {
      const { what: other = "another change", since = performance.now() } = this.#busy ?? {};
      throw inTime(ctx).error(
        "ABORTED",
        `one change after the other is made on PoseidonOS at ${this.address}, and ${other} has ` +
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
      // The caller has its answer; the next one waits until this one's last change has really ended.
      if (this.#unanswered === undefined) release();
      else this.#unanswered.then(release, release);
    }
  }

  /**
   * Makes one change, for `work` of `exclusively` only. It is sent once, whatever happens.
   *
   * @throws PoseidonError; whether the change was made has to be looked up after each of them
   */
  async change(ctx: RequestContext, change: DagentChange): Promise<void> {
    ctx.signal.throwIfAborted();
    const started = performance.now();
    const limit = timeLimit(this.#closing, longestChangeMs);
    const answer = this.#call(ctx, change, limit.signal);
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
        inTime(ctx),
        "no answer from PoseidonOS",
        `PoseidonOS at ${this.address} has not answered ${change.method} ${change.path} after ${
          formatSeconds(performance.now() - started)
        }; it goes on there, repeat the call`,
        { cause: error, code: abortCode(ctx.signal) },
      );
    }
  }

  /** Resolves when no change is running. */
  async waitUntilIdle(): Promise<void> {
    await this.#unanswered;
  }

  #call(ctx: RequestContext, request: DagentRequest, signal: AbortSignal): Promise<unknown> {
    const call = { address: this.address, metrics: this.#metrics, signal };
    return callDagent(ctx, call, request, (version) => {
      this.#version = version;
    });
  }
}

/**
 * The management endpoints of one LightOS cluster (facts: docs/reference/lightos-api.md section 6): one of them is in
 * use; fail-over, back-off, API version, and errors that name the endpoint and keep LightOS' own words.
 */
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { type ClusterInfoV2, DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { type StatusCode, StatusError } from "../../error.ts";
import { CallError, type CallOptions, Channel } from "../../grpc/client.ts";
import type { Trust } from "../../grpc/tls.ts";
import type { Fields } from "../../log.ts";
import { countManagementCall, type MetricSample } from "../../metrics.ts";
import { formatSeconds, sleep, timeLimit } from "../../timing.ts";
import { type Endpoint, formatEndpoint, parseEndpoints } from "../../volume_id.ts";
import { abortCode, inTime } from "../polling.ts";
import { adviceFor } from "./advice.ts";
import { LightosError } from "./api_error.ts";
import type { LightosOptions } from "./cluster.ts";
import { callUnlessSilent, firstOf, follow, patienceFor, silenceMs } from "./patience.ts";
import { withoutSecrets } from "./redaction.ts";
import { type Credentials, describeLifetime } from "./tokens.ts";

/** A call of the management API. */
export interface ApiRequest<I extends DescMessage, O extends DescMessage> {
  readonly method: DescMethodUnary<I, O>;
  readonly request: MessageInitShape<I>;
  readonly headers: Readonly<Record<string, string>>;
  readonly credentials: Credentials;
}

/**
 * The endpoints of one cluster, one of them in use. A member that fails is left alone for a back-off period (1 s,
 * growing to 5 s), so a dead one costs one connect attempt per period and not one per call; meanwhile the others serve.
 *
 * The same holds for a member that answers that it cannot. But what all members answer to a request may be caused by the
 * request: after a read, such a member is left alone only when another one has answered better.
 */
export class ClusterEndpoints implements Disposable {
  readonly #options: LightosOptions;
  readonly #trust: Trust | undefined;
  readonly #members: Member[];
  #current: Member | undefined;
  #lastUse = performance.now();
  #running = 0;
  #info: { readonly value: ClusterInfoV2; readonly at: number } | undefined;

  /** @param trust undefined: clear text */
  constructor(options: LightosOptions, endpoints: readonly Endpoint[], trust: Trust | undefined) {
    this.#options = options;
    this.#trust = trust;
    this.#members = endpoints.map(newMember);
  }

  /** The endpoint in use, for messages. */
  get lastAddress(): string {
    const member = this.#current ?? this.#members[0];
    return member === undefined ? "no endpoint" : formatEndpoint(member.endpoint);
  }

  /** The state of its endpoints now, for the metrics. */
  samples(): readonly MetricSample[] {
    const security = this.#trust === undefined ? "clear" : this.#trust.verify ? "verified" : "unverified";
    return this.#members.flatMap((member): MetricSample[] => {
      const endpoint = formatEndpoint(member.endpoint);
      return [
        ["lbcsi_mgmt_connections", [endpoint, security], member.channel === undefined ? 0 : 1],
        ["lbcsi_mgmt_endpoint_resting", [endpoint], member.retryAt > performance.now() ? 1 : 0],
        ["lbcsi_mgmt_endpoint_failures", [endpoint], member.failures],
      ];
    });
  }

  /** Whether no call has used it for so long. */
  isIdleFor(ms: number): boolean {
    return this.#running === 0 && performance.now() - this.#lastUse > ms;
  }

  /** What `remember` was given, unless it is too old. */
  freshInfo(): ClusterInfoV2 | undefined {
    return this.#info !== undefined && performance.now() - this.#info.at < infoMs ? this.#info.value : undefined;
  }

  /** Keeps what the cluster reports of itself. The endpoints that it names are used when all others fail. */
  remember(info: ClusterInfoV2): void {
    this.#info = { value: info, at: performance.now() };
    const known = new Set(this.#members.map(({ endpoint }) => formatEndpoint(endpoint)));
    for (const text of info.apiEndpoints) {
      const parsed = parseEndpoints(text);
      if (typeof parsed === "string") continue;
      for (const endpoint of parsed) {
        if (known.has(formatEndpoint(endpoint))) continue;
        known.add(formatEndpoint(endpoint));
        this.#members.push(newMember(endpoint));
      }
    }
  }

  /**
   * Calls the management API at the endpoint in use, or at the next one that answers. A request that changes something
   * is sent to another endpoint only when it certainly did not arrive at the first.
   *
   * @throws LightosError with LightOS' code (its UNKNOWN and DATA_LOSS become INTERNAL) and words, or UNAVAILABLE that
   *   lists what each endpoint said; DEADLINE_EXCEEDED when the caller's time is over
   */
  async call<I extends DescMessage, O extends DescMessage>(
    ctx: RequestContext,
    request: ApiRequest<I, O>,
  ): Promise<MessageShape<O>> {
    this.#running++;
    const running = new AbortController();
    const following = follow(ctx.signal, running);
    try {
      const { jwt } = request.credentials;
      const headers = { ...request.headers, ...(jwt === undefined ? {} : { authorization: `Bearer ${jwt}` }) };
      return await this.#callAny({ ...request, ctx, headers, signal: running.signal });
    } finally {
      following[Symbol.dispose]();
      running.abort();
      this.#running--;
      this.#lastUse = performance.now();
    }
  }

  /**
   * Sends one call to one member after the other, until one of them answers or rejects it. A read that a member is slow
   * with is sent to the next one too, and the first answer counts: a cluster whose members are all slow is not a silent
   * one.
   */
  async #callAny<I extends DescMessage, O extends DescMessage>(call: ApiCall<I, O>): Promise<MessageShape<O>> {
    const { ctx } = call;
    const isRead = isReadMethod(call.method.name);
    const tried = new Set<Member>();
    const running = new Map<Member, Promise<Ended<MessageShape<O>>>>();
    const failing: { readonly member: Member; readonly details: string }[] = [];
    let failure: LightosError | undefined;
    let rounds = 1;
    for (;;) {
      const member = this.#next(tried);
      const resting = this.#members.filter((member) => !tried.has(member));
      let waitMs: number | undefined;
      let channel: Channel | undefined;
      if (member !== undefined) {
        tried.add(member);
        const hasOthers = tried.size < this.#members.length;
        const patienceMs = patienceFor(ctx, hasOthers);
        const attempt = this.#try(call, member, patienceMs).then((attempt) => ({ member, attempt }));
        // It may fail after the call has returned.
        attempt.catch(() => {});
        running.set(member, attempt);
        channel = member.channel;
        if (hasOthers && isRead) waitMs = patienceMs + connectMarginMs;
      } else if (resting.length > 0) {
        // The others failed a moment ago, in another call: wait for the first that may be tried again.
        waitMs = Math.max(1, Math.min(...resting.map((member) => member.retryAt)) - performance.now());
      } else if (running.size === 0) {
        // A bad answer usually goes away at once. After a change, the caller looks for its outcome.
        const isWorthAnother = failure?.code === "UNAVAILABLE" && isRead && rounds++ === 1;
        if (!isWorthAnother) throw failure ?? this.#allFailed(ctx, "UNAVAILABLE");
        await sleep(secondRoundMs, ctx.signal).catch(() => Promise.reject(failure));
        tried.clear();
        failing.length = 0;
        continue;
      }
      let ended: Ended<MessageShape<O>> | undefined;
      try {
        ended = await firstOf([...running.values()], waitMs, ctx.signal);
      } catch (error) {
        if (error !== ctx.signal.reason) throw error;
        throw failure ?? this.#allFailed(ctx, abortCode(ctx.signal));
      }
      if (ended === undefined) {
        if (member !== undefined && channel !== undefined) {
          this.#giveUp(member, channel, `no answer within ${formatSeconds(waitMs ?? 0)}`);
        }
        continue;
      }
      running.delete(ended.member);
      const { attempt } = ended;
      if (attempt.kind === "failing") {
        failure = attempt.error;
        failing.push({ member: ended.member, details: attempt.details });
      } else if (attempt.kind !== "unreachable") {
        for (const { member, details } of failing) this.#giveUpFailing(member, details);
        if (attempt.kind === "rejected") throw attempt.error;
        return attempt.answer;
      }
    }
  }

  #allFailed(ctx: RequestContext, code: StatusCode): LightosError {
    // The same words each time, whatever the order: Kubernetes makes an event of each text.
    const byReason = new Map<string, string[]>();
    for (const { endpoint, lastFailure } of this.#members) {
      const address = formatEndpoint(endpoint);
      const reason = lastFailure.replace(` ${address}`, "");
      byReason.set(reason, [...byReason.get(reason) ?? [], address]);
    }
    const failures = [...byReason].map(([reason, addresses]) => `${addresses.join(", ")}: ${reason}`);
    const reasons = [...byReason.keys()];
    const advice = [...new Set(reasons.map((reason) => adviceFor(reason, this.#trust)))].join("; ");
    const problem = `no LightOS management endpoint answers (${failures.join("; ")}); ${advice}`;
    return new LightosError(ctx, code, problem, { reasons });
  }

  /** The member to try now, the one in use first; undefined when the others are being left alone. */
  #next(tried: ReadonlySet<Member>): Member | undefined {
    const now = performance.now();
    const ready = this.#members.filter((member) => !tried.has(member) && member.retryAt <= now);
    return ready.find((member) => member === this.#current) ?? ready[0];
  }

  /**
   * One attempt at one member.
   *
   * @param patienceMs how long to wait for the connection and its first answer; a read itself has all of the caller's
   *   time
   * @throws LightosError for a change with an unknown outcome; StatusError when the member is not a LightOS of a version
   *   that we know
   */
  async #try<I extends DescMessage, O extends DescMessage>(
    call: ApiCall<I, O>,
    member: Member,
    patienceMs: number,
  ): Promise<Attempt<MessageShape<O>>> {
    const { ctx, method, request, headers } = call;
    const address = formatEndpoint(member.endpoint);
    const isRead = isReadMethod(method.name);
    // A read goes on beside those at other members.
    using limit = timeLimit(call.signal, isRead ? patienceFor(ctx, false) : patienceMs);
    const connectTimeoutMs = Math.min(silenceMs, patienceMs);
    const started = performance.now();
    const channel = member.channel ??= this.#connect(address);
    const note = (code: string, fields: Fields = {}) => {
      const ms = elapsedMs(started);
      countManagementCall(this.#options.metrics, { endpoint: address, method: method.name, code, ms });
      ctx.log.debug("called the management API", { rpc: method.name, address, code, ms, ...fields });
    };
    let isSent = false;
    try {
      const options = { signal: limit.signal, headers, connectTimeoutMs };
      if (!member.isVersionKnown) await this.#checkVersion(call, member, channel, options);
      isSent = true;
      const answer = isRead
        ? await channel.call(method, request, options)
        : await this.#change(call, member, channel, { ...options, signal: ctx.signal });
      note("OK");
      member.failures = 0;
      member.retryAt = 0;
      this.#current = member;
      return { kind: "answered", answer };
    } catch (error) {
      if (call.signal.aborted && !ctx.signal.aborted) {
        note("CANCELLED", { error: "another endpoint has answered" });
        return { kind: "unreachable" };
      }
      if (error instanceof StatusError && !ctx.signal.aborted) {
        note(error.code, { error: error.message });
        throw error;
      }
      const mayBeDone = isSent && !isRead;
      if (ctx.signal.aborted) {
        const code = abortCode(ctx.signal);
        note(code);
        // A connection that does not stand (yet, or again) may be lost unnoticed until the next call.
        if (!member.isVersionKnown || !channel.isConnected) this.#drop(member, channel);
        const late = `LightOS at ${address} has not answered ${method.name} after ${formatSeconds(elapsedMs(started))}`;
        throw new LightosError(inTime(ctx), code, late, { outcomeUnknown: mayBeDone, cause: ctx.signal.reason });
      }
      if (!(error instanceof CallError) && !(error instanceof DOMException)) throw error;
      const failure = error instanceof CallError
        ? new CallError(error.code, withoutSecrets(error.message, request, call.credentials.jwt), error.origin)
        : new CallError("UNAVAILABLE", `no answer within ${formatSeconds(elapsedMs(started))}`, "no answer");
      note(failure.code, { error: failure.message });
      return this.#failed(call, member, channel, { failure, mayBeDone });
    }
  }

  /**
   * Sends a change. While another member answers, this one gets half of the time that is left, and no more than
   * `silenceMs` without a sign of life.
   */
  async #change<I extends DescMessage, O extends DescMessage>(
    call: ApiCall<I, O>,
    member: Member,
    channel: Channel,
    options: CallOptions,
  ): Promise<MessageShape<O>> {
    const { ctx, method, request } = call;
    if (!this.#isAnotherReady(member)) return await channel.call(method, request, options);
    const halfMs = Math.max(1000, (ctx.deadline.getTime() - Date.now()) / 2);
    const stop = new AbortController();
    using _following = follow(ctx.signal, stop);
    // A member that is slow is better than others that are down.
    const timer = setTimeout(async () => {
      if (await this.#isAnotherAlive(call, member)) stop.abort(new DOMException("too slow", "TimeoutError"));
    }, halfMs);
    const patienceMs = Math.min(silenceMs, halfMs);
    try {
      return await callUnlessSilent(channel, method, request, { ...options, signal: stop.signal, patienceMs });
    } finally {
      clearTimeout(timer);
    }
  }

  /** Whether another member answers now. Those that cannot be reached are left alone from now on. Never throws. */
  async #isAnotherAlive<I extends DescMessage, O extends DescMessage>(
    { headers, signal }: ApiCall<I, O>,
    member: Member,
  ): Promise<boolean> {
    const now = performance.now();
    const looks = this.#members.filter((other) => other !== member && other.retryAt <= now).map(async (other) => {
      const channel = other.channel ??= this.#connect(formatEndpoint(other.endpoint));
      using limit = timeLimit(signal, silenceMs);
      try {
        await channel.call(DurosAPI.method.getVersion, {}, { signal: limit.signal, headers });
      } catch (error) {
        const isAnswer = error instanceof CallError && error.origin === "server";
        if (!signal.aborted && !isAnswer) {
          const failure = error instanceof CallError ? error.message : `no answer within ${silenceMs / 1000} s`;
          this.#giveUp(other, channel, failure);
        }
        throw error;
      }
    });
    return await Promise.any(looks).then(() => true, () => false);
  }

  /** What an attempt that failed means for its member and for the call. */
  #failed<I extends DescMessage, O extends DescMessage>(
    call: ApiCall<I, O>,
    member: Member,
    channel: Channel,
    { failure, mayBeDone }: { readonly failure: CallError; readonly mayBeDone: boolean },
  ): Exclude<Attempt<MessageShape<O>>, { kind: "answered" }> {
    const { ctx, method } = call;
    const address = formatEndpoint(member.endpoint);
    const details = failure.message;
    if (failure.origin === "too large") {
      const problem = `LightOS at ${address} answered ${method.name} with ${details}`;
      throw new LightosError(ctx, "UNAVAILABLE", problem, { outcomeUnknown: mayBeDone, isTooLarge: true });
    }
    if (failure.origin === "server") {
      const isFailing = failingCodes.has(failure.code);
      const [code, problem] = answerError(call, address, failure);
      const error = (elsewhere: boolean) =>
        new LightosError(ctx, code, problem, { outcomeUnknown: mayBeDone && isFailing, elsewhere });
      if (!isFailing) {
        member.failures = 0;
        this.#current = member;
        return { kind: "rejected", error: error(false) };
      }
      const words = `${failure.code}: ${details}`;
      member.lastFailure = words;
      if (!mayBeDone) return { kind: "failing", error: error(false), details: words };
      const elsewhere = this.#isAnotherReady(member);
      if (elsewhere) this.#giveUpFailing(member, words);
      throw error(elsewhere);
    }
    this.#giveUp(member, channel, details);
    if (!mayBeDone || failure.origin === "not connected") return { kind: "unreachable" };
    const problem =
      `LightOS at ${address} gave no answer to ${method.name} (${details}), which may have been carried out`;
    const elsewhere = this.#isAnotherReady(member);
    throw new LightosError(ctx, "UNAVAILABLE", problem, { outcomeUnknown: true, elsewhere });
  }

  #isAnotherReady(member: Member): boolean {
    const now = performance.now();
    return this.#members.some((other) => other !== member && other.retryAt <= now);
  }

  #connect(address: string): Channel {
    if (this.#trust?.verify === false) {
      this.#options.log.warning("connects without verifying the management API's certificate", { address });
    }
    return new Channel({
      address,
      userAgent: this.#options.userAgent,
      ...(this.#trust === undefined ? {} : { tls: this.#trust }),
    });
  }

  async #checkVersion<I extends DescMessage, O extends DescMessage>(
    { ctx, request, credentials }: ApiCall<I, O>,
    member: Member,
    channel: Channel,
    options: CallOptions,
  ): Promise<void> {
    const version = await channel.call(DurosAPI.method.getVersion, {}, options);
    if (version.apiVersion !== apiVersion) {
      const shown = withoutSecrets(version.apiVersion, request, credentials.jwt);
      throw ctx.error(
        "FAILED_PRECONDITION",
        `LightOS at ${
          formatEndpoint(member.endpoint)
        } speaks management API "${shown}", this driver speaks "${apiVersion}"`,
      );
    }
    member.isVersionKnown = true;
  }

  /** Leaves a member alone whose connection is lost or silent. */
  #giveUp(member: Member, channel: Channel, failure: string): void {
    // Of several calls that fail together on one connection, the first counts.
    if (member.channel !== channel) return;
    this.#leaveAlone(member, failure);
    this.#drop(member, channel);
    this.#options.log.warning("lost a management endpoint", {
      address: formatEndpoint(member.endpoint),
      error: failure,
    });
  }

  /** Leaves a member alone that answers that it cannot; its connection stays. */
  #giveUpFailing(member: Member, failure: string): void {
    // Of several calls that fail together, the first counts.
    if (member.retryAt > performance.now()) return;
    this.#leaveAlone(member, failure);
    this.#options.log.warning("leaves an ill management endpoint alone", {
      address: formatEndpoint(member.endpoint),
      error: failure,
    });
  }

  #leaveAlone(member: Member, failure: string): void {
    member.failures++;
    member.lastFailure = failure;
    member.retryAt = performance.now() + Math.min(1000 * 1.5 ** (member.failures - 1), 5000);
    if (this.#current === member) this.#current = undefined;
  }

  /** A new channel begins without the half-dead connection of the old one, which lets its running calls end. */
  #drop(member: Member, channel: Channel): void {
    if (member.channel !== channel) return;
    channel[Symbol.dispose]();
    member.channel = undefined;
    member.isVersionKnown = false;
  }

  [Symbol.dispose](): void {
    for (const member of this.#members) member.channel?.[Symbol.dispose]();
  }
}

/** One endpoint of the cluster, and what is known of it. */
interface Member {
  readonly endpoint: Endpoint;
  channel: Channel | undefined;
  /** Whether the server on this connection has shown that it speaks our API version. */
  isVersionKnown: boolean;
  /** A failed member is not tried again before this time (ms of performance.now). */
  retryAt: number;
  failures: number;
  lastFailure: string;
}

/** A call that is running, at any member. */
interface ApiCall<I extends DescMessage, O extends DescMessage> extends ApiRequest<I, O> {
  readonly ctx: RequestContext;
  /** Aborts with the caller's signal, and when another member has answered. */
  readonly signal: AbortSignal;
}

/** The result of an attempt at one member. */
type Attempt<T> =
  | { readonly kind: "answered"; readonly answer: T }
  /** The cluster rejects the call; any member would. */
  | { readonly kind: "rejected"; readonly error: LightosError }
  /** The member answers that it cannot. Another member may be asked. */
  | { readonly kind: "failing"; readonly error: LightosError; readonly details: string }
  /** The member cannot be reached, or is silent. Another member may be asked. */
  | { readonly kind: "unreachable" };

/** An attempt that has ended. */
interface Ended<T> {
  readonly member: Member;
  readonly attempt: Attempt<T>;
}

const apiVersion = "v2.0";
const infoMs = 60_000;
/** How much later than its connection an attempt is given up, so that the reason for the former is reported. */
const connectMarginMs = 50;
/** How long to wait before a cluster is asked once more all of whose members answered that they cannot. */
const secondRoundMs = 250;
/** Codes with which a server says that it cannot answer now, and nothing about the request. */
const failingCodes: ReadonlySet<string> = new Set<CallError["code"]>([
  "CANCELLED",
  "DATA_LOSS",
  "DEADLINE_EXCEEDED",
  "INTERNAL",
  "UNAVAILABLE",
  "UNKNOWN",
]);
/** Whether a method changes nothing, so that it can be sent again after a lost answer; LightOS' names say it. */
function isReadMethod(name: string): boolean {
  return /^(Get|List)[A-Z]/.test(name);
}

function newMember(endpoint: Endpoint): Member {
  return { endpoint, channel: undefined, isVersionKnown: false, retryAt: 0, failures: 0, lastFailure: "not tried" };
}

/**
 * Code and problem of the error for what a server answered. A read needs no space: RESOURCE_EXHAUSTED means there that the
 * server is overloaded, and not that the cluster is full, as it does for what creates or grows. Passed on, it would make
 * callers give up what may exist (csi/controller/full_cluster.ts).
 */
function answerError<I extends DescMessage, O extends DescMessage>(
  { method, credentials }: ApiCall<I, O>,
  address: string,
  { code, message: details }: CallError,
): readonly [StatusCode, string] {
  const isOverloaded = code === "RESOURCE_EXHAUSTED" && isReadMethod(method.name);
  if (isOverloaded) {
    return ["UNAVAILABLE", `LightOS at ${address} answered ${method.name} with ${code}: ${details}; repeat the call`];
  }
  const isAboutToken = code === "UNAUTHENTICATED" || code === "PERMISSION_DENIED";
  const token = isAboutToken ? `; JWT: ${credentials.source}${describeLifetime(credentials)}` : "";
  const ourCode = code === "UNKNOWN" || code === "DATA_LOSS" ? "INTERNAL" : code;
  return [ourCode, `LightOS at ${address} answered ${method.name} with ${code}: ${details}${token}`];
}

function elapsedMs(started: number): number {
  return Math.round(performance.now() - started);
}

/**
 * Calls to LightOS' management API (facts: docs/reference/lightos-api.md section 6): several endpoints of one cluster of which one is in
 * use, fail-over and back-off, tokens, TLS, API version, and errors that name the endpoint and keep LightOS' own words.
 */
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { clearInterval, setInterval } from "node:timers";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import * as z from "zod";
import { type ClusterInfoV2, DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import {
  type Fields,
  formatSeconds,
  type Logger,
  type RequestContext,
  type Secrets,
  sleep,
  timeLimit,
} from "../../context.ts";
import { type StatusCode, StatusError } from "../../error.ts";
import { CallError, type CallOptions, Channel } from "../../grpc/client.ts";
import type { Trust } from "../../grpc/tls.ts";
import { countManagementCall, type Metrics, type Sample } from "../../metrics.ts";
import { pemProblem, readPem } from "../../pem.ts";
import { type Endpoint, formatEndpoint, formatEndpoints, parseEndpoints, type Scheme } from "../../volume_id.ts";
import { adviceFor } from "./advice.ts";
import { misfit } from "./answers.ts";
import type { KnownCluster, KnownClusters } from "./cluster_file.ts";
import { parseTrustOptions, resolveTrust, type TrustOptions, trustSchema } from "./trust.ts";

/**
 * Which servers receive the token of the process:
 *
 * - `cluster file`: clusters of the cluster file, over TLS
 * - `own CA`: these, and every server that proves itself by the certificates that the process itself was given
 * - `any endpoint`: every server that a StorageClass or a volume ID names, over clear text too
 */
export type TokenAudience = "cluster file" | "own CA" | "any endpoint";

/** What the process was told about reaching LightOS. */
export interface LightosOptions {
  readonly log: Logger;
  /** The token for calls that bring none of their own; undefined when there is none now. */
  readonly globalJwt: () => string | undefined;
  /** Where that token comes from, for messages. */
  readonly globalJwtPath: string;
  /** Which servers receive that token. */
  readonly globalJwtFor: TokenAudience;
  /** PEM certificates to trust instead of the built-in ones, as `readPem` answers them. */
  readonly ca: string | undefined;
  /** False accepts any certificate of the management API. */
  readonly verifyTls: boolean;
  readonly userAgent: string;
  /** Clusters that the process was told about itself; undefined: none. */
  readonly clusters?: KnownClusters | undefined;
  readonly metrics?: Metrics | undefined;
}

/** A StatusError for what the management API answered, or for its silence. */
export class LightosError extends StatusError {
  /** The request may have been carried out although no answer came, or a bad one. */
  readonly outcomeUnknown: boolean;
  /** Another management endpoint can be asked at once: this one is left alone for a while. */
  readonly elsewhere: boolean;
  /** The answer was larger than we take: less has to be asked for. */
  readonly isTooLarge: boolean;
  /** When no endpoint answers: what is wrong with them, each reason once. */
  readonly reasons: readonly string[];

  constructor(
    code: StatusCode,
    message: string,
    outcomeUnknown: boolean,
    options: ErrorOptions & {
      readonly elsewhere?: boolean;
      readonly isTooLarge?: boolean;
      readonly reasons?: readonly string[];
    } = {},
  ) {
    super(code, message, options);
    this.outcomeUnknown = outcomeUnknown;
    this.elsewhere = options.elsewhere ?? false;
    this.isTooLarge = options.isTooLarge ?? false;
    this.reasons = options.reasons ?? [];
  }
}

const secretsSchema = z.object({
  jwt: z.string().optional(),
  "mgmt-ca.crt": z.string().transform((text, check) => {
    const read = readPem(text);
    const problem = pemProblem(read);
    if (problem === undefined) return read.pem;
    check.addIssue(problem);
    return z.NEVER;
  }).optional(),
  ...trustSchema,
});

type GivenSecrets = z.infer<typeof secretsSchema>;

/** What may be told of a token: not a letter of it. */
export interface TokenFacts {
  /** Where it came from, or why there is none. */
  readonly source: string;
  /** `other` is something that is no JSON Web Token. */
  readonly kind: "none" | "JWT" | "other";
  readonly expires: Date | undefined;
  /** It counts from then on, or was made then. */
  readonly begins: Date | undefined;
}

interface Credentials {
  readonly jwt: string | undefined;
  /** Where the token came from, for messages. */
  readonly source: string;
}

/** What a user can do when the token of the process is withheld. */
const tokenAdvice =
  'put "jwt" into the Secret of the StorageClass, or the cluster with its "jwt" into the cluster file ' +
  "(--config), or give the CA of the clusters by --mgmt-ca and speak TLS, or start the controller with --jwt-for-any-endpoint";

/**
 * The token as a header can carry it.
 *
 * @param source where it comes from, for messages
 * @param missing what a message says when there is none
 * @throws StatusError INVALID_ARGUMENT when it holds blanks or control characters
 */
function usableToken(text: string | undefined, source: string, missing: string): Credentials {
  const jwt = text?.trim() ?? "";
  if (jwt === "") return { jwt: undefined, source: `none was given: ${missing}` };
  if (!/^[\x21-\x7e]+$/.test(jwt)) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot use the JWT of ${source}: it holds blanks or control characters`,
    );
  }
  return { jwt, source };
}

/** How long an unused connection is kept. */
const idleMs = 10 * 60 * 1000;

/** The connections of this process, shared by all calls to one cluster, and closed after ten idle minutes. */
export class ClusterPool implements AsyncDisposable {
  readonly #options: LightosOptions;
  readonly #connections = new Map<string, Connections>();
  readonly #sweeper: ReturnType<typeof setInterval>;
  readonly #measured: Disposable | undefined;

  constructor(options: LightosOptions) {
    this.#options = options;
    this.#measured = options.metrics?.gather(() =>
      [...this.#connections.values()].flatMap((connections) => connections.samples())
    );
    this.#sweeper = setInterval(() => this.#sweep(), idleMs / 10);
    this.#sweeper.unref();
  }

  /**
   * The cluster behind these endpoints, with the credentials of this call. Connects to nothing yet.
   *
   * Endpoints of a known cluster, former ones too, lead to that cluster as it is today: its endpoints, its scheme, and
   * its certificates and token unless the call brings some. Volume IDs are for good, endpoints are not.
   *
   * @param wish what else is known of the proof, before everything else
   */
  open(secrets: Secrets, endpoints: readonly Endpoint[], scheme: Scheme, wish: TrustOptions = {}): Cluster {
    const known = this.#options.clusters?.owning(endpoints);
    return this.#at(known?.endpoints ?? endpoints, known, secrets, this.trust(secrets, endpoints, scheme, wish));
  }

  /** The same cluster at each of today's endpoints by itself: to see which of them answer. */
  openEach(
    secrets: Secrets,
    endpoints: readonly Endpoint[],
    scheme: Scheme,
  ): readonly { readonly address: string; readonly cluster: Cluster; readonly trust: Trust | undefined }[] {
    const known = this.#options.clusters?.owning(endpoints);
    const trust = this.trust(secrets, endpoints, scheme);
    return (known?.endpoints ?? endpoints).map((endpoint) => ({
      address: formatEndpoint(endpoint),
      cluster: this.#at([endpoint], known, secrets, trust),
      trust,
    }));
  }

  #at(
    endpoints: readonly Endpoint[],
    known: KnownCluster | undefined,
    secrets: Secrets,
    trust: Trust | undefined,
  ): Cluster {
    const given = secrets.parse(secretsSchema);
    const proof = createHash("sha256").update(JSON.stringify(trust ?? null)).digest("hex");
    const key = [formatEndpoints(endpoints), trust === undefined ? "grpc" : "grpcs", proof].join(" ");
    let connections = this.#connections.get(key);
    if (connections === undefined) {
      connections = new Connections(this.#options, endpoints, trust);
      this.#connections.set(key, connections);
    }
    const isAlsoAt = (others: readonly Endpoint[]) =>
      known !== undefined && this.#options.clusters?.owning(others)?.name === known.name;
    return new Cluster(connections, this.#credentials(given, known, trust), isAlsoAt);
  }

  /** How the cluster behind these endpoints has to prove who it is; undefined: it does not, for clear text is spoken. */
  trust(
    secrets: Secrets,
    endpoints: readonly Endpoint[],
    scheme: Scheme,
    wish: TrustOptions = {},
  ): Trust | undefined {
    const known = this.#options.clusters?.owning(endpoints);
    if ((known?.scheme ?? scheme) === "grpc") return undefined;
    const given = secrets.parse(secretsSchema);
    const ca = given["mgmt-ca.crt"] ?? known?.ca() ?? this.#options.ca;
    return resolveTrust(ca, wish, parseTrustOptions(given), known?.trust ?? {}, { verify: this.#options.verifyTls });
  }

  #credentials(given: GivenSecrets, known: KnownCluster | undefined, trust: Trust | undefined): Credentials {
    if (given.jwt !== undefined) {
      return usableToken(given.jwt, 'key "jwt" of the call\'s secrets', 'key "jwt" in the secrets is empty');
    }
    const missing = (source: string) => `no key "jwt" in the secrets, and none that can be read in ${source}`;
    if (known?.jwtPath !== undefined) {
      const source = `${known.jwtPath} of cluster "${known.name}"`;
      return usableToken(known.jwt(), source, missing(source));
    }
    const { globalJwt, globalJwtPath } = this.#options;
    const token = globalJwt();
    const obstacle = this.#obstacleToGlobalToken(given, known, trust);
    if (obstacle === undefined || (token ?? "").trim() === "") {
      return usableToken(token, globalJwtPath, missing(globalJwtPath));
    }
    const withheld =
      `no key "jwt" in the secrets, and that of ${globalJwtPath} is not sent here: ${obstacle}; ${tokenAdvice}`;
    return usableToken(undefined, globalJwtPath, withheld);
  }

  /**
   * Why the server does not receive the token of the process; undefined: it does.
   *
   * Users who may write a StorageClass choose the endpoint, the Secret and with it the certificates to trust. They must
   * not be able to have the token of the process sent to a server of their own, or readable on its way.
   */
  #obstacleToGlobalToken(
    given: GivenSecrets,
    known: KnownCluster | undefined,
    trust: Trust | undefined,
  ): string | undefined {
    const { globalJwtFor, verifyTls } = this.#options;
    if (globalJwtFor === "any endpoint") return undefined;
    if (trust === undefined) return "clear text would show it";
    if (known !== undefined) {
      // Whether to verify a cluster of the file is for the operator to say, and not for a Secret.
      const isVerifiedByOperator = known.trust.verify ?? verifyTls;
      return trust.verify || !isVerifiedByOperator ? undefined : "the call's Secret turns verification off";
    }
    if (!trust.verify) return "the server's certificate is not verified";
    if (globalJwtFor === "cluster file") return "the endpoint is not in the cluster file, and there is no --mgmt-ca";
    return given["mgmt-ca.crt"] === undefined
      ? undefined
      : "the endpoint is not in the cluster file, and the certificate to trust is the call's and not that of --mgmt-ca";
  }

  #sweep(): void {
    for (const [key, connections] of this.#connections) {
      if (!connections.idleFor(idleMs)) continue;
      connections[Symbol.dispose]();
      this.#connections.delete(key);
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#sweeper);
    this.#measured?.[Symbol.dispose]();
    for (const connections of this.#connections.values()) connections[Symbol.dispose]();
    this.#connections.clear();
    return Promise.resolve();
  }
}

/** One cluster as one call sees it: shared connections, its own credentials. */
export class Cluster {
  readonly #connections: Connections;
  readonly #credentials: Credentials;
  /** Whether the cluster file says that these endpoints, former ones too, are this cluster's. */
  readonly isAlsoAt: (endpoints: readonly Endpoint[]) => boolean;

  constructor(
    connections: Connections,
    credentials: Credentials,
    isAlsoAt: (endpoints: readonly Endpoint[]) => boolean,
  ) {
    this.#connections = connections;
    this.#credentials = credentials;
    this.isAlsoAt = isAlsoAt;
  }

  /** What may be told of the token of this call. */
  get token(): TokenFacts {
    return factsOf(this.#credentials);
  }

  /** The endpoint that answered last, for messages. */
  get lastAddress(): string {
    return this.#connections.lastAddress;
  }

  /**
   * See Connections.call.
   *
   * @throws StatusError INTERNAL, too, when the answer does not fit the request
   */
  async call<I extends DescMessage, O extends DescMessage>(
    ctx: RequestContext,
    action: string,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    headers: Readonly<Record<string, string>> = {},
  ): Promise<MessageShape<O>> {
    const answer = await this.#connections.call(ctx, action, method, request, headers, this.#credentials);
    hideToken(answer, this.#credentials.jwt);
    const misfitting = misfit(method.name, request, answer);
    if (misfitting === undefined) return answer;
    const problem = withoutSecrets(misfitting, request, this.#credentials);
    throw new StatusError(
      "INTERNAL",
      `Cannot ${action}: LightOS at ${this.lastAddress} answered ${method.name} with ${problem}`,
    );
  }

  /** What the cluster says of itself, at most a minute old. */
  async info(ctx: RequestContext, action: string): Promise<ClusterInfoV2> {
    const known = this.#connections.freshInfo();
    if (known !== undefined) return known;
    const info = await this.call(ctx, action, DurosAPI.method.getClusterInfo, {});
    if (!info.subsystemNQN.startsWith("nqn.")) {
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ${action}: LightOS at ${this.lastAddress} has no subsystem NQN yet ("${info.subsystemNQN}")`,
      );
    }
    this.#connections.learn(info);
    return info;
  }
}

interface Member {
  readonly endpoint: Endpoint;
  channel: Channel | undefined;
  /** The API version was seen to be ours on this connection. */
  checked: boolean;
  /** Not before this time (ms of performance.now) is a failed member tried again. */
  retryAt: number;
  failures: number;
  lastFailure: string;
}

/** One call of the management API, at whichever member. */
interface ApiCall<I extends DescMessage, O extends DescMessage> {
  readonly ctx: RequestContext;
  readonly action: string;
  readonly method: DescMethodUnary<I, O>;
  readonly request: MessageInitShape<I>;
  readonly headers: Readonly<Record<string, string>>;
  readonly credentials: Credentials;
  /** Aborts with the caller's signal, and when another member has answered. */
  readonly signal: AbortSignal;
}

/** What came of an attempt at one member. */
type Attempt<T> =
  | { readonly kind: "answer"; readonly answer: T }
  /** The cluster refuses the call; any member would. */
  | { readonly kind: "refusal"; readonly error: LightosError }
  /** The member answers that it cannot. Another member may be asked. */
  | { readonly kind: "ill"; readonly error: LightosError; readonly details: string }
  /** The member cannot be reached, or is silent. Another member may be asked. */
  | { readonly kind: "gone" };

/** An attempt that has ended. */
interface Ended<T> {
  readonly member: Member;
  readonly attempt: Attempt<T>;
}

const apiVersion = "v2.0";
const infoMs = 60_000;
/** How long a member is waited for that gives no sign of life, while there are others. */
const silenceMs = 3000;
/** So much later than a connection is given up, so that the reason for that is what is reported. */
const connectMarginMs = 50;
/** How long to wait before a cluster is asked once more all of whose members say that they cannot. */
const secondLookMs = 250;
/** Codes with which a server says that it cannot answer now, and nothing of the request. */
const illCodes: ReadonlySet<string> = new Set<CallError["code"]>([
  "CANCELLED",
  "DATA_LOSS",
  "DEADLINE_EXCEEDED",
  "INTERNAL",
  "UNAVAILABLE",
  "UNKNOWN",
]);
/** Methods that change nothing, so that they can be sent again after a lost answer. */
const reads: ReadonlySet<string> = new Set([
  "GetVersion",
  "GetVolume",
  "ListVolumes",
  "GetSnapshot",
  "ListSnapshots",
  "GetClusterInfo",
  "GetCluster",
  "GetHost",
  "GetTrustedHostSecret",
  "ListTrustedHosts",
]);

/**
 * The endpoints of one cluster, one of them in use. A member that fails is left alone for a back-off period (1 s, growing
 * to 5 s), so a dead one costs one connect attempt per period and not one per call; meanwhile the others serve.
 *
 * So is a member that answers and is ill. But what all members say about a request may be about the request: reads put a
 * member to rest only when another one has answered better.
 */
class Connections implements Disposable {
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

  get lastAddress(): string {
    const member = this.#current ?? this.#members[0];
    return member === undefined ? "no endpoint" : formatEndpoint(member.endpoint);
  }

  /** How its endpoints are now. */
  samples(): readonly Sample[] {
    const security = this.#trust === undefined ? "clear" : this.#trust.verify ? "verified" : "unverified";
    return this.#members.flatMap((member): Sample[] => {
      const endpoint = formatEndpoint(member.endpoint);
      return [
        ["lbcsi_mgmt_connections", [endpoint, security], member.channel === undefined ? 0 : 1],
        ["lbcsi_mgmt_endpoint_resting", [endpoint], member.retryAt > performance.now() ? 1 : 0],
        ["lbcsi_mgmt_endpoint_failures", [endpoint], member.failures],
      ];
    });
  }

  idleFor(ms: number): boolean {
    return this.#running === 0 && performance.now() - this.#lastUse > ms;
  }

  freshInfo(): ClusterInfoV2 | undefined {
    return this.#info !== undefined && performance.now() - this.#info.at < infoMs ? this.#info.value : undefined;
  }

  /** Keeps the cluster's own account of itself; endpoints that it names are fallen back on when all others fail. */
  learn(info: ClusterInfoV2): void {
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
   * Calls the management API at the endpoint in use, or at the next one that answers. A request that changes something is
   * sent on to another endpoint only when it surely did not reach the first.
   *
   * @throws LightosError with LightOS' code (its UNKNOWN and DATA_LOSS become INTERNAL) and words, or UNAVAILABLE that
   *   lists what each endpoint said; DEADLINE_EXCEEDED when the caller's time is over
   */
  async call<I extends DescMessage, O extends DescMessage>(
    ctx: RequestContext,
    action: string,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    headers: Readonly<Record<string, string>>,
    credentials: Credentials,
  ): Promise<MessageShape<O>> {
    this.#running++;
    const running = new AbortController();
    const follow = () => running.abort(ctx.signal.reason);
    if (ctx.signal.aborted) follow();
    else ctx.signal.addEventListener("abort", follow, { once: true });
    try {
      const authorization = credentials.jwt === undefined ? {} : { authorization: `Bearer ${credentials.jwt}` };
      const { signal } = running;
      return await this.#callAny({
        ctx,
        action,
        method,
        request,
        headers: { ...headers, ...authorization },
        credentials,
        signal,
      });
    } finally {
      ctx.signal.removeEventListener("abort", follow);
      running.abort();
      this.#running--;
      this.#lastUse = performance.now();
    }
  }

  /**
   * One call at the members by turns, until one of them answers it or refuses it. A read that a member is slow with is
   * sent to the next one too, and the first answer counts: a cluster whose members are all slow is not a silent one.
   */
  async #callAny<I extends DescMessage, O extends DescMessage>(call: ApiCall<I, O>): Promise<MessageShape<O>> {
    const { ctx, action } = call;
    const isRead = reads.has(call.method.name);
    const tried = new Set<Member>();
    const running = new Map<Member, Promise<Ended<MessageShape<O>>>>();
    const ill: { readonly member: Member; readonly details: string }[] = [];
    let illness: LightosError | undefined;
    let looks = 1;
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
        // It may end when nobody waits for it any more.
        attempt.catch(() => {});
        running.set(member, attempt);
        channel = member.channel;
        if (hasOthers && isRead) waitMs = patienceMs + connectMarginMs;
      } else if (resting.length > 0) {
        // What is left failed a moment ago, in another call: wait for the first that may be tried again.
        waitMs = Math.max(1, Math.min(...resting.map((member) => member.retryAt)) - performance.now());
      } else if (running.size === 0) {
        // A bad answer mostly passes at once. Of changes, the caller looks what has come of them.
        const isWorthAnother = illness?.code === "UNAVAILABLE" && isRead && looks++ === 1;
        if (!isWorthAnother) throw illness ?? this.#allFailed("UNAVAILABLE", action);
        await sleep(secondLookMs, ctx.signal).catch(() => Promise.reject(illness));
        tried.clear();
        ill.length = 0;
        continue;
      }
      let ended: Ended<MessageShape<O>> | undefined;
      try {
        ended = await firstOf([...running.values()], waitMs, ctx.signal);
      } catch (error) {
        if (error !== ctx.signal.reason) throw error;
        throw illness ?? this.#allFailed(codeOf(ctx.signal), action);
      }
      if (ended === undefined) {
        if (member !== undefined && channel !== undefined) {
          this.#rest(member, channel, `no answer within ${formatSeconds(waitMs ?? 0)}`);
        }
        continue;
      }
      running.delete(ended.member);
      const { attempt } = ended;
      if (attempt.kind === "ill") {
        illness = attempt.error;
        ill.push({ member: ended.member, details: attempt.details });
      } else if (attempt.kind !== "gone") {
        for (const { member, details } of ill) this.#restIll(member, details);
        if (attempt.kind === "refusal") throw attempt.error;
        return attempt.answer;
      }
    }
  }

  #allFailed(code: StatusCode, action: string): LightosError {
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
    const message = `Cannot ${action}: no LightOS management endpoint answers (${failures.join("; ")}); ${advice}`;
    return new LightosError(code, message, false, { reasons });
  }

  /** The member to try now, the one in use first; undefined when those that are left have to rest. */
  #next(tried: ReadonlySet<Member>): Member | undefined {
    const now = performance.now();
    const ready = this.#members.filter((member) => !tried.has(member) && member.retryAt <= now);
    return ready.find((member) => member === this.#current) ?? ready[0];
  }

  /**
   * One attempt at one member.
   *
   * @param patienceMs how long to wait for the connection and its first answer; a read itself has all of the caller's time
   * @throws LightosError for a change of which nobody knows whether it was made; StatusError when the member is none of a
   *   LightOS that we know
   */
  async #try<I extends DescMessage, O extends DescMessage>(
    call: ApiCall<I, O>,
    member: Member,
    patienceMs: number,
  ): Promise<Attempt<MessageShape<O>>> {
    const { ctx, action, method, request, headers } = call;
    const address = formatEndpoint(member.endpoint);
    const isRead = reads.has(method.name);
    // A read goes on beside those at other members.
    using limit = timeLimit(call.signal, isRead ? patienceFor(ctx, false) : patienceMs);
    const connectTimeoutMs = Math.min(silenceMs, patienceMs);
    const started = performance.now();
    const channel = member.channel ??= this.#connect(address);
    const note = (code: string, fields: Fields = {}) => {
      const ms = elapsed(started);
      countManagementCall(this.#options.metrics, address, method.name, code, ms);
      ctx.log.debug("called the management API", { rpc: method.name, address, code, ms, ...fields });
    };
    let sent = false;
    try {
      const options = { signal: limit.signal, headers, connectTimeoutMs };
      if (!member.checked) await this.#checkVersion(call, member, channel, options);
      sent = true;
      const answer = isRead
        ? await channel.call(method, request, options)
        : await this.#change(call, member, channel, { ...options, signal: ctx.signal });
      note("OK");
      member.failures = 0;
      member.retryAt = 0;
      this.#current = member;
      return { kind: "answer", answer };
    } catch (error) {
      if (call.signal.aborted && !ctx.signal.aborted) {
        note("CANCELLED", { error: "another endpoint has answered" });
        return { kind: "gone" };
      }
      if (error instanceof StatusError && !ctx.signal.aborted) {
        note(error.code, { error: error.message });
        throw error;
      }
      const mayBeDone = sent && !isRead;
      if (ctx.signal.aborted) {
        note(codeOf(ctx.signal));
        // A connection that is not there yet, or not there again, may be lost by the time of the next call, and not be noticed.
        if (!member.checked || !channel.isConnected) this.#drop(member, channel);
        const message = `Cannot ${action} in time: LightOS at ${address} has not answered ${method.name} after ${
          formatSeconds(elapsed(started))
        }`;
        throw new LightosError(codeOf(ctx.signal), message, mayBeDone, { cause: ctx.signal.reason });
      }
      if (!(error instanceof CallError) && !(error instanceof DOMException)) throw error;
      const failure = error instanceof CallError
        ? new CallError(error.code, withoutSecrets(error.message, request, call.credentials), error.origin)
        : new CallError("UNAVAILABLE", `no answer within ${formatSeconds(elapsed(started))}`, "no answer");
      note(failure.code, { error: failure.message });
      return this.#failed(call, member, channel, { failure, mayBeDone });
    }
  }

  /**
   * Sends a change. While another member answers, this one gets half of the time that is left, and no more than `silenceMs`
   * without a sign of life.
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
    const follow = () => stop.abort(ctx.signal.reason);
    if (ctx.signal.aborted) follow();
    else ctx.signal.addEventListener("abort", follow, { once: true });
    // A member that is slow is better than others that are down.
    const timer = setTimeout(async () => {
      if (await this.#isAnotherAlive(call, member)) stop.abort(new DOMException("too slow", "TimeoutError"));
    }, halfMs);
    const patienceMs = Math.min(silenceMs, halfMs);
    try {
      return await callUnlessSilent(channel, method, request, { ...options, signal: stop.signal, patienceMs });
    } finally {
      clearTimeout(timer);
      ctx.signal.removeEventListener("abort", follow);
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
          this.#rest(
            other,
            channel,
            error instanceof CallError ? error.message : `no answer within ${silenceMs / 1000} s`,
          );
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
  ): Exclude<Attempt<MessageShape<O>>, { kind: "answer" }> {
    const { action, method } = call;
    const address = formatEndpoint(member.endpoint);
    const details = failure.message;
    if (failure.origin === "too large") {
      const message = `Cannot ${action}: LightOS at ${address} answered ${method.name} with ${details}`;
      throw new LightosError("UNAVAILABLE", message, mayBeDone, { isTooLarge: true });
    }
    if (failure.origin === "server") {
      const error = answered(call, address, failure, mayBeDone);
      if (!illCodes.has(failure.code)) {
        member.failures = 0;
        this.#current = member;
        return { kind: "refusal", error };
      }
      const ill = `${failure.code}: ${details}`;
      member.lastFailure = ill;
      if (!mayBeDone) return { kind: "ill", error, details: ill };
      const elsewhere = this.#isAnotherReady(member);
      if (elsewhere) this.#restIll(member, ill);
      throw new LightosError(error.code, error.message, true, { elsewhere });
    }
    this.#rest(member, channel, details);
    if (!mayBeDone || failure.origin === "not connected") return { kind: "gone" };
    const message = `Cannot ${action}: LightOS at ${address} gave no answer to ${method.name} (${details}), ` +
      `which may have been carried out`;
    throw new LightosError("UNAVAILABLE", message, true, { elsewhere: this.#isAnotherReady(member) });
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
    { action, request, credentials }: ApiCall<I, O>,
    member: Member,
    channel: Channel,
    options: { readonly signal: AbortSignal; readonly headers: Readonly<Record<string, string>> },
  ): Promise<void> {
    const version = await channel.call(DurosAPI.method.getVersion, {}, options);
    if (version.apiVersion !== apiVersion) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: LightOS at ${formatEndpoint(member.endpoint)} speaks management API "${
          withoutSecrets(version.apiVersion, request, credentials)
        }", ` +
          `this driver speaks "${apiVersion}"`,
      );
    }
    member.checked = true;
  }

  #rest(member: Member, channel: Channel, failure: string): void {
    // Of several calls that fail together on one connection, the first counts.
    if (member.channel !== channel) return;
    this.#leaveAlone(member, failure);
    this.#drop(member, channel);
    this.#options.log.warning("lost a management endpoint", {
      address: formatEndpoint(member.endpoint),
      error: failure,
    });
  }

  /** For a member that answers and cannot do what it is asked for: its connection stays. */
  #restIll(member: Member, failure: string): void {
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
    member.checked = false;
  }

  [Symbol.dispose](): void {
    for (const member of this.#members) member.channel?.[Symbol.dispose]();
  }
}

function newMember(endpoint: Endpoint): Member {
  return { endpoint, channel: undefined, checked: false, retryAt: 0, failures: 0, lastFailure: "not tried" };
}

/** How long to wait for a member; one that has gone silent must not use up the time of the others. */
function patienceFor({ deadline }: RequestContext, hasOthers: boolean): number {
  const leftMs = Math.max(1, deadline.getTime() - Date.now());
  return hasOthers ? Math.min(silenceMs, Math.max(1000, leftMs / 2)) : Math.max(1000, leftMs);
}

/**
 * The first of these attempts that ends; undefined when none has after `waitMs`.
 *
 * @param waitMs undefined: without end
 * @throws what the attempt throws; without attempts `signal.reason` when it aborts
 */
async function firstOf<T>(
  attempts: readonly Promise<T>[],
  waitMs: number | undefined,
  signal: AbortSignal,
): Promise<T | undefined> {
  if (waitMs === undefined) return await Promise.race(attempts);
  if (attempts.length === 0) return await sleep(waitMs, signal).then(() => undefined);
  let timer: ReturnType<typeof setTimeout> | undefined;
  try {
    return await Promise.race([
      ...attempts,
      new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), waitMs)),
    ]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Sends a change and waits for its answer as long as the server gives signs of life: a change may take its time, and a
 * server that has gone silent must not use up the time of the others.
 *
 * @param options `patienceMs` is how long the server may give no sign of life
 * @throws what `Channel.call` throws; DOMException when the server is silent
 */
async function callUnlessSilent<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
  options: CallOptions & { readonly patienceMs: number },
): Promise<MessageShape<O>> {
  const { signal, patienceMs } = options;
  const stop = new AbortController();
  const follow = () => stop.abort(signal.reason);
  if (signal.aborted) follow();
  else signal.addEventListener("abort", follow, { once: true });
  const watch = async () => {
    for (;;) {
      await sleep(patienceMs / 2, stop.signal);
      using limit = timeLimit(stop.signal, patienceMs / 2);
      try {
        await channel.call(DurosAPI.method.getVersion, {}, { ...options, signal: limit.signal });
      } catch (error) {
        stop.signal.throwIfAborted();
        // Any answer is a sign of life. When the connection is lost, the change says so itself.
        if (!(error instanceof CallError)) stop.abort(new DOMException("no sign of life", "TimeoutError"));
      }
    }
  };
  watch().catch(() => {});
  try {
    return await channel.call(method, request, { ...options, signal: stop.signal });
  } finally {
    signal.removeEventListener("abort", follow);
    stop.abort();
  }
}

/**
 * Reads a page of a list, and a smaller one when the answer would be larger than we take.
 *
 * @param limit how many objects to ask for at first
 */
export async function readInParts<T>(limit: number, read: (limit: number) => Promise<T>): Promise<T> {
  for (let size = limit;; size = Math.ceil(size / 2)) {
    try {
      return await read(size);
    } catch (error) {
      if (!(error instanceof LightosError) || !error.isTooLarge || size <= 1) throw error;
    }
  }
}

/**
 * Makes a change that does no harm when it is made twice, at another endpoint when one is ill or silent.
 */
export async function repeatElsewhere<T>(change: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await change();
    } catch (error) {
      // An endpoint that failed is left alone for a while, so this ends with the last one.
      if (!(error instanceof LightosError) || !error.elsewhere) throw error;
    }
  }
}

/** The longest words of a server that go into a message: Kubernetes keeps 1 KiB of an event. */
const longestWords = 2000;

/** A server may cut short what it repeats. Pieces of a secret that are shorter than this are of no use to anybody. */
const leastPiece = 16;

/** What a server said, without the token and the keys of hosts that it may have repeated, and not without end. */
function withoutSecrets(text: string, request: unknown, { jwt }: Credentials): string {
  const { hostSecret, targetSecret } = request as { readonly hostSecret?: string; readonly targetSecret?: string };
  const secrets = [[jwt, "[token]"], [hostSecret, "[key]"], [targetSecret, "[key]"]] as const;
  let plain = text;
  for (const [secret = "", mark] of secrets) for (const form of formsOf(secret)) plain = plain.replaceAll(form, mark);
  const isCut = plain.length > longestWords;
  plain = plain.slice(0, longestWords);
  for (const [secret = "", mark] of secrets) plain = withoutPieces(plain, secret, mark);
  return isCut ? `${plain} …` : plain;
}

/**
 * The texts by which a server may repeat a secret, the longest first: as it is, without padding, in base64, and each of these
 * percent-encoded. A server that wants to hide it better can.
 */
function formsOf(secret: string): readonly string[] {
  if (secret === "") return [];
  const base64 = Buffer.from(secret).toString("base64");
  const others = [
    secret.replace(/=+$/, ""),
    base64,
    base64.replace(/=+$/, ""),
    Buffer.from(secret).toString("base64url"),
    ...secret.split(/[.:]/),
  ];
  const plain = [secret, ...others.filter((form) => form.length >= leastPiece)];
  const forms = new Set(plain.flatMap((form) => [form, encodeURIComponent(form)]));
  return [...forms].sort((one, other) => other.length - one.length);
}

/** The text with a mark in place of each piece of the secret. */
function withoutPieces(text: string, secret: string, mark: string): string {
  let plain = "";
  for (let at = 0; at < text.length;) {
    let end = at + leastPiece;
    if (end > text.length || !secret.includes(text.slice(at, end))) {
      plain += text.charAt(at++);
      continue;
    }
    while (end < text.length && secret.includes(text.slice(at, end + 1))) end++;
    plain += mark;
    at = end;
  }
  return plain;
}

/** Takes a token out of all texts of an answer, for names and states in it get into messages. */
function hideToken(answer: unknown, jwt: string | undefined): void {
  if (jwt === undefined || typeof answer !== "object" || answer === null || ArrayBuffer.isView(answer)) return;
  const fields = answer as Record<string, unknown>;
  for (const key of Object.keys(fields)) {
    const value = fields[key];
    if (typeof value === "object") hideToken(value, jwt);
    else if (typeof value === "string" && value.length >= jwt.length && value.includes(jwt)) {
      fields[key] = value.replaceAll(jwt, "[token]");
    }
  }
}

/** @param mayBeDone it was a change, so that a server which broke off in the middle may have made it */
function answered<I extends DescMessage, O extends DescMessage>(
  { action, method, credentials }: ApiCall<I, O>,
  address: string,
  { code, message: details }: CallError,
  mayBeDone: boolean,
): LightosError {
  const isRefused = code === "UNAUTHENTICATED" || code === "PERMISSION_DENIED";
  const token = isRefused ? `; JWT: ${credentials.source}${lifeOf(credentials)}` : "";
  const message = `Cannot ${action}: LightOS at ${address} answered ${method.name} with ${code}: ${details}${token}`;
  const known = code === "UNKNOWN" || code === "DATA_LOSS" ? "INTERNAL" : code;
  return new LightosError(known, message, mayBeDone && illCodes.has(code));
}

/** When a token ends, for messages: whoever reads "UNAUTHENTICATED" wants to know. Nothing else of it is told. */
function lifeOf(credentials: Credentials): string {
  const { kind, expires } = factsOf(credentials);
  if (kind === "other") return ", which is not a JSON Web Token";
  if (expires === undefined) return "";
  return `, which ${expires.getTime() < Date.now() ? "expired" : "is valid until"} ${expires.toISOString()}`;
}

function factsOf({ jwt, source }: Credentials): TokenFacts {
  const facts = { source, expires: undefined, begins: undefined };
  if (jwt === undefined) return { ...facts, kind: "none" };
  const [, claims, signature, ...rest] = jwt.split(".");
  if (claims === undefined || signature === undefined || rest.length > 0) return { ...facts, kind: "other" };
  try {
    const { exp, nbf, iat } = JSON.parse(Buffer.from(claims, "base64url").toString());
    return { source, kind: "JWT", expires: dateOf(exp), begins: dateOf(nbf) ?? dateOf(iat) };
  } catch {
    return { ...facts, kind: "other" };
  }
}

/** RFC 7519: seconds since 1970. The range is that of dates that have a text. */
function dateOf(claim: unknown): Date | undefined {
  return typeof claim === "number" && Math.abs(claim) < 8.64e12 ? new Date(claim * 1000) : undefined;
}

/** The code for a call that `signal` ended. */
export function codeOf(signal: AbortSignal): StatusCode {
  return signal.reason instanceof StatusError ? signal.reason.code : "DEADLINE_EXCEEDED";
}

function elapsed(started: number): number {
  return Math.round(performance.now() - started);
}

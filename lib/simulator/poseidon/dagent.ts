/**
 * DAgent's REST API, served for a simulated PoseidonOS (facts: docs/reference/poseidonos-api.md sections 5 and 6).
 *
 * Its faults are simulated too: one lock around every request to PoseidonOS, HTTP status 400 with code 0 when DAgent itself
 * rejects a request, fields that are absent when they are zero, and on some routes a lock that is never released after a
 * request without `param`. Harmful routes exist and answer with an error; `harmful` lists the requests that used them.
 */
import * as z from "zod";
import { sleep } from "../../timing.ts";
import { simulatorMark } from "../../check.ts";
import { messageOf } from "../../error.ts";
import type { Logger } from "../../log.ts";
import type { FaultRule, Faults } from "../faults.ts";
import { type HttpAnswer, type HttpRequest, type HttpServer, serveHttp } from "../http.ts";
import { DAgentError, type Route, type RouteCall, routesOf, versions } from "./routes.ts";
import { events, type PoseidonModel, PosError, type PosEvent } from "./system.ts";

export interface DAgentOptions {
  readonly model: PoseidonModel;
  readonly faults: Faults;
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly log: Logger;
}

/** A DAgent that listens. */
export interface DAgent extends HttpServer {
  /** Requests that would have harmed a real system, `GET /api/ibofos/v1/arrays/reset` and the like. */
  readonly harmful: readonly string[];
  /** Releases the lock that a bad request has left taken, as a restart of DAgent does. */
  unlock(): void;
}

/** Serves until it is disposed. */
export async function serveDAgent({ model, faults, host, port, log }: DAgentOptions): Promise<DAgent> {
  const handler = new RequestHandler(model, faults, log);
  const server = await serveHttp(host, port, (request) => handler.answer(request, server.address));
  return {
    get address() {
      return server.address;
    },
    get state() {
      return server.state;
    },
    harmful: handler.harmful,
    unlock: () => handler.unlock(),
    stop: () => server.stop(),
    start: () => server.start(),
    hang: () => server.hang(),
    dropConnections: () => server.dropConnections(),
    async [Symbol.asyncDispose]() {
      handler.close();
      await server[Symbol.asyncDispose]();
    },
  };
}

const basePath = "/api/ibofos/v1";

const harmfulRequests = [
  /^GET .*\/arrays\/reset$/,
  /^DELETE \/api\/dagent\/v1\/(ibofos|dagent)$/,
  /^DELETE \/api\/ibofos\/v1\/system$/,
];

/** What is known of a request when it asks PoseidonOS. */
interface PendingRequest {
  readonly request: HttpRequest;
  readonly route: Route;
  readonly call: RouteCall;
  /** Method and path. */
  readonly where: string;
  /** `host:port` that was called. */
  readonly endpoint: string;
}

/** Answers requests, one after the other where they ask PoseidonOS. */
class RequestHandler {
  readonly harmful: string[] = [];
  readonly #model: PoseidonModel;
  readonly #faults: Faults;
  readonly #log: Logger;
  readonly #routes: readonly Route[];
  #lock: Promise<unknown> = Promise.resolve();
  #unlocked = Promise.withResolvers<void>();

  constructor(model: PoseidonModel, faults: Faults, log: Logger) {
    this.#model = model;
    this.#faults = faults;
    this.#log = log;
    this.#routes = routesOf(model);
  }

  /** Releases the lock; a later bad request takes it again. */
  unlock(): void {
    this.#unlocked.resolve();
    this.#unlocked = Promise.withResolvers();
  }

  /** Releases the lock for good. */
  close(): void {
    this.#unlocked.resolve();
  }

  /** Resolves with undefined to end the connection without an answer. */
  async answer(request: HttpRequest, endpoint: string): Promise<HttpAnswer | undefined> {
    const path = request.path.split("?")[0] ?? "";
    const where = `${request.method} ${path}`;
    if (harmfulRequests.some((pattern) => pattern.test(where))) {
      this.harmful.push(where);
      this.#log.error("harmful request", { request: where });
      return reply(request, 500, "");
    }
    const route = this.#routes.find(({ method, path: pattern }) =>
      method === request.method && pattern.test(path.slice(basePath.length))
    );
    if (route === undefined || !path.startsWith(basePath)) {
      return reply(request, 404, "404 page not found", "text/plain");
    }
    this.#faults.count(route.rpc, endpoint);
    if (!isUuidText(requestIdOf(request))) return this.#rejection(request);
    const param = request.method === "GET" ? {} : paramOf(request.body);
    if (param === "not JSON") return this.#rejection(request);
    const [, first = "", second = ""] = route.path.exec(path.slice(basePath.length)) ?? [];
    const call: RouteCall = { argument: decodeURIComponent(first), secondArgument: decodeURIComponent(second), param };
    return await this.#inTurn(() => this.#ask({ request, route, call, where, endpoint }));
  }

  /** Runs `work` after all earlier requests. */
  #inTurn(work: () => Promise<HttpAnswer | undefined>): Promise<HttpAnswer | undefined> {
    const turn = this.#lock.then(work, work);
    this.#lock = turn.catch(() => {});
    return turn;
  }

  /** Asks the model, and does what the fault rules demand. */
  async #ask(pending: PendingRequest): Promise<HttpAnswer | undefined> {
    const { request, route, call, where, endpoint } = pending;
    const { rpc } = route;
    const rule = this.#faults.take(rpc, endpoint);
    const subject = call.secondArgument || call.argument || String(call.param?.["name"] ?? "");
    this.#faults.report({ phase: "begin", rpc, subject });
    try {
      const delayMs = (rule?.delayMs ?? 0) + this.#model.behaviour.callMs;
      // PoseidonOS goes on when the caller is gone.
      if (delayMs > 0) await sleep(delayMs, new AbortController().signal);
      if (this.#model.behaviour.dead) return this.#failure(request, "POS_UNREACHABLE", "cannot dial the server");
      if (route.hangsWithoutParam === true && call.param === undefined) {
        this.harmful.push(`${where} without param`);
        await this.#unlocked.promise;
        return reply(request, 500, "");
      }
      const before = await this.#applyFault(pending, rule, "before");
      if (before !== "go on") return before;
      const data = await route.run(call);
      const after = await this.#applyFault(pending, rule, "after");
      if (after !== "go on") return after;
      const result = envelope(this.#model, { code: 0, event: "SUCCESS", cause: "" }, data);
      return reply(request, 200, JSON.stringify(result, bigints));
    } catch (error) {
      if (error instanceof DAgentError || error instanceof z.ZodError) return this.#rejection(request);
      if (error instanceof PosError) return this.#failure(request, error.event, error.message);
      this.#log.error("DAgent failed", { request: where, error: messageOf(error) });
      return reply(request, 500, "");
    } finally {
      this.#faults.report({ phase: "end", rpc, subject });
    }
  }

  /** The answer that a rule demands at this point, undefined to end the connection; "go on" when it demands none. */
  async #applyFault(
    { request, route, endpoint }: PendingRequest,
    rule: FaultRule | undefined,
    when: "before" | "after",
  ): Promise<HttpAnswer | undefined | "go on"> {
    if (rule?.when !== when) return "go on";
    if (rule.hold === true) {
      const held = this.#faults.hold({ rpc: route.rpc, endpoint, when }, request.signal);
      const isGone = await held.then(() => false, () => true);
      // As if the request had been lost on its way here.
      if (isGone && when === "before") return undefined;
    }
    if (rule.drop === true) return undefined;
    if (rule.event === undefined) return "go on";
    if (rule.event === "panic") return reply(request, 500, "");
    const event = isEvent(rule.event) ? rule.event : "POS_UNREACHABLE";
    return this.#failure(request, event, rule.message ?? "told to fail");
  }

  /** The answer when PoseidonOS rejects a request. */
  #failure(request: HttpRequest, event: PosEvent, cause: string): HttpAnswer {
    return reply(request, 400, JSON.stringify(envelope(this.#model, { ...codeOf(this.#model, event), cause })));
  }

  /** The answer when DAgent itself rejects a request. */
  #rejection(request: HttpRequest): HttpAnswer {
    return reply(request, 400, JSON.stringify(envelope(this.#model, { code: 0, event: "", cause: "" })));
  }
}

function requestIdOf({ headers }: HttpRequest): string {
  return headers.get("x-request-id") ?? "";
}

function reply(request: HttpRequest, status: number, body: string, type = "application/json"): HttpAnswer {
  return { status, headers: { "Content-Type": type, "X-request-Id": requestIdOf(request) }, body };
}

function isUuidText(text: string): boolean {
  return /^(urn:uuid:)?\{?[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}\}?$/.test(text);
}

/** `param` of a body with its keys in lower case; undefined when it has none. */
function paramOf(body: string): Readonly<Record<string, unknown>> | undefined | "not JSON" {
  if (body.trim() === "") return undefined;
  try {
    const parsed = z.object({ param: z.record(z.string(), z.unknown()).optional() }).parse(JSON.parse(body));
    if (parsed.param === undefined) return undefined;
    return Object.fromEntries(Object.entries(parsed.param).map(([key, value]) => [key.toLowerCase(), value]));
  } catch {
    return "not JSON";
  }
}

function isEvent(text: string): text is PosEvent {
  return Object.hasOwn(events, text);
}

function codeOf({ behaviour }: PoseidonModel, event: PosEvent): { readonly code: number; readonly event: string } {
  const isOld = behaviour.generation === "0.11";
  return { code: events[event][isOld ? 1 : 0], event: isOld || event === "POS_UNREACHABLE" ? "" : event };
}

function envelope(
  { behaviour, dataPlane }: PoseidonModel,
  { code, event, cause }: { readonly code: number; readonly event: string; readonly cause: string },
  data?: unknown,
) {
  return {
    rid: crypto.randomUUID(),
    lastSuccessTime: 0,
    result: {
      status: {
        module: "",
        code,
        ...(behaviour.generation === "0.11" ? {} : { eventName: event, cause }),
        description: cause,
        posDescription: "",
      },
      ...(data === undefined ? {} : { data }),
    },
    // What follows the "+" has no meaning in a version, so lbcsi doctor recognises a simulator by it.
    info: { version: `${versions[behaviour.generation]}+${simulatorMark}:${dataPlane.kind}` },
  };
}

/** Writes 64-bit numbers as text. */
function bigints(_key: string, value: unknown): unknown {
  return typeof value === "bigint" ? value.toString() : value;
}

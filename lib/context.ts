/** What the handlers and everything below them know of the call that they work for: signal, deadline, log and action. */
import { type StatusCode, StatusError } from "./error.ts";
import type { Fields, Logger } from "./log.ts";

/** What a piece of work needs to know of the call that asked for it. */
export interface RequestContext {
  /** Aborts shortly before the deadline, or when the caller hangs up; its reason is a StatusError. */
  readonly signal: AbortSignal;
  /** When the caller stops listening. */
  readonly deadline: Date;
  readonly log: Logger;
  /** What is being done, as it stands after "Cannot" in an error: `stage the volume 0f2c6a5e-…`. */
  readonly action: string;
  /** The same call, with more facts in its log lines. */
  with(fields: Fields): RequestContext;
  /** The same call, for a part of its work that fails with errors of its own. */
  doing(action: string): RequestContext;
  /** The error that the action fails with: `Cannot <action>: <problem>`. The problem ends with what to do, without a period. */
  error(code: StatusCode, problem: string, options?: ErrorOptions): StatusError;
}

/** A RequestContext of these parts; `action` stands after "Cannot" in its errors. */
export function requestContext(
  signal: AbortSignal,
  deadline: Date,
  log: Logger,
  action = "go on",
): RequestContext {
  return {
    signal,
    deadline,
    log,
    action,
    with: (fields) => requestContext(signal, deadline, log.with(fields), action),
    doing: (action) => requestContext(signal, deadline, log, action),
    error: (code, problem, options) => new StatusError(code, `Cannot ${action}: ${problem}`, options),
  };
}

/** A RequestContext for work that no caller asked for (start-up, background): it ends after `timeoutMs`, or with `parent`. */
export function backgroundContext(what: string, log: Logger, timeoutMs: number, parent?: AbortSignal): RequestContext {
  const timeout = new AbortController();
  const timer = setTimeout(() => {
    timeout.abort(new StatusError("DEADLINE_EXCEEDED", `Cannot ${what}: not done within ${timeoutMs} ms`));
  }, timeoutMs);
  Deno.unrefTimer(timer);
  const signal = parent === undefined ? timeout.signal : AbortSignal.any([timeout.signal, parent]);
  return requestContext(signal, new Date(Date.now() + timeoutMs), log, what);
}

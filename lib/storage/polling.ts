/** How backends wait for a state that is about to change: delays between looks, and what ends the wait. */
import { sleep, timeLimit } from "../timing.ts";
import { type RequestContext, requestContext } from "../context.ts";
import { type StatusCode, StatusError } from "../error.ts";

/** Delays between looks at a state that is about to change: 100 ms, growing to 2 s. */
export function* growingDelays(): Generator<number, never> {
  for (let ms = 100;; ms = Math.min(ms * 1.5, 2000)) yield ms;
}

/**
 * Waits for the next of `delays`.
 *
 * @param toError the error when the call ends first; `reason` is that of its signal
 */
export async function pause(
  ctx: RequestContext,
  delays: Iterator<number, never>,
  toError: (reason: unknown) => StatusError,
): Promise<void> {
  try {
    await sleep(delays.next().value, ctx.signal);
  } catch (reason) {
    throw toError(reason);
  }
}

/**
 * The error of a call whose time has ended while it waited.
 *
 * @param seen what was seen last: no other text that a person reads says it
 */
export function lateError(ctx: RequestContext, code: StatusCode, seen: string, cause: unknown): StatusError {
  return new StatusError(code, `Cannot ${ctx.action} in time: ${seen}; repeat the call`, { cause });
}

/** The same call; its errors begin with `Cannot <action> in time`. */
export function inTime(ctx: RequestContext): RequestContext {
  return ctx.doing(`${ctx.action} in time`);
}

/** The code for a call that `signal` has ended. */
export function abortCode(signal: AbortSignal): StatusCode {
  return signal.reason instanceof StatusError ? signal.reason.code : "DEADLINE_EXCEEDED";
}

/** What `work` resolves with; its context ends after `ms`, or with `ctx` when that comes first. */
export async function withinTime<T>(
  ctx: RequestContext,
  ms: number,
  work: (ctx: RequestContext) => Promise<T>,
): Promise<T> {
  using limit = timeLimit(ctx.signal, ms);
  const deadline = new Date(Math.min(Date.now() + ms, ctx.deadline.getTime()));
  return await work(requestContext(limit.signal, deadline, ctx.log, ctx.action));
}

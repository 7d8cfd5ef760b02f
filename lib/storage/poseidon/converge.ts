/**
 * Changes PoseidonOS step by step until nothing is missing. Every answer can be lost, and some failures are only half
 * true: so each change is followed by a look, and what is found there is the result.
 */
import type { RequestContext } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { growingDelays, pause } from "../polling.ts";
import type { Dagent, DagentChange } from "./dagent.ts";
import { busyError, PoseidonError } from "./dagent_error.ts";

/** The next step, or the result when nothing is missing. */
export type Next<R> =
  | { readonly done: R }
  | {
    /** What it does; distinguishes this step from others. */
    readonly step: string;
    readonly change: DagentChange;
    /** Turns a final rejection of this step into an error that says more. */
    readonly explain?: (rejection: PoseidonError) => Promise<StatusError | undefined>;
  };

/** The goal of `converge`, and the way to it. */
export interface Convergence<S, R> {
  /** Reads the state of PoseidonOS. */
  readonly look: () => Promise<S>;
  /** The next step from this state. */
  readonly next: (state: S) => Next<R> | Promise<Next<R>>;
}

/**
 * Looks, takes the next step, and looks again, until nothing is missing. After a failure or a lost answer the look
 * decides what to do, so that nothing is repeated blindly, and what happened although the answer denied it counts.
 *
 * @throws PoseidonError for a step that was rejected for good and is still missing; UNAVAILABLE, which is not final,
 *   when a look after a change gets an answer that is not understood
 */
export async function converge<S, R>(
  ctx: RequestContext,
  dagent: Dagent,
  { look, next }: Convergence<S, R>,
): Promise<R> {
  const delays = growingDelays();
  /** The last obstacle. */
  let seen: string | undefined;
  let isChanged = false;
  let last: { readonly step: string; readonly rejection: PoseidonError | undefined } | undefined;
  for (;;) {
    let now: Next<R>;
    try {
      now = await next(await look());
    } catch (error) {
      // When the deadline cut off a look, what came before it says more.
      if (seen !== undefined && ctx.signal.aborted) throw busyError(ctx, seen, error);
      // Something may have been made. INTERNAL is final for the caller, which could leave it behind.
      if (isChanged && hasCode(error, "INTERNAL")) {
        throw new StatusError("UNAVAILABLE", `${error.message}; repeat the call`, { cause: error });
      }
      throw error;
    }
    if ("done" in now) return now.done;
    if (last?.step === now.step) {
      if (last.rejection !== undefined && !last.rejection.passing) {
        throw await now.explain?.(last.rejection) ?? last.rejection;
      }
      const obstacle = last.rejection?.message ??
        `PoseidonOS at ${dagent.address} says that it did "${now.step}", and does not show it`;
      seen = obstacle;
      await pause(ctx, delays, (reason) => busyError(ctx, obstacle, reason));
      // What was seen before the pause may be out of date.
      last = undefined;
      continue;
    }
    let rejection: PoseidonError | undefined;
    isChanged = true;
    try {
      await dagent.change(ctx, now.change);
    } catch (error) {
      if (!(error instanceof PoseidonError)) throw error;
      if (ctx.signal.aborted) throw seen === undefined ? error : busyError(ctx, seen, error);
      ctx.log.debug("looks again after a refusal", { error: error.message });
      rejection = error;
      seen = error.message;
    }
    last = { step: now.step, rejection };
  }
}

/** How calls to DAgent fail, and calls whose time ends while they wait for it. */
import type { RequestContext } from "../../context.ts";
import { type StatusCode, StatusError } from "../../error.ts";
import { abortCode, lateError } from "../polling.ts";
import { type Meaning, readingOf } from "./codes.ts";

/** A StatusError for what DAgent answered, or for its silence; its message says `Cannot <action>: <problem>`. */
export class PoseidonError extends StatusError {
  readonly meaning: Meaning;
  /** The same request may succeed in a moment. */
  readonly passing: boolean;

  /** @param options `code` in place of the code that the meaning has */
  constructor(
    ctx: RequestContext,
    meaning: Meaning,
    problem: string,
    options: ErrorOptions & { readonly code?: StatusCode } = {},
  ) {
    const reading = readingOf(meaning);
    const code = options.code ?? reading.code;
    super(code, ctx.error(code, problem).message, options);
    this.meaning = meaning;
    this.passing = reading.passing;
  }
}

/** Whether `error` is what DAgent answered, with one of these meanings. */
export function means(error: unknown, ...meanings: readonly Meaning[]): error is PoseidonError {
  return error instanceof PoseidonError && meanings.includes(error.meaning);
}

/**
 * The error of a call whose time has ended while it waited: UNAVAILABLE in place of DEADLINE_EXCEEDED, because what it
 * saw last says more than the deadline.
 *
 * @param seen the message of an error of the same action, or a sentence of its own
 */
export function busyError(ctx: RequestContext, seen: string, cause: unknown): StatusError {
  const code = abortCode(ctx.signal);
  const words = seen.replace(`Cannot ${ctx.action}: `, "");
  return lateError(ctx, code === "DEADLINE_EXCEEDED" ? "UNAVAILABLE" : code, words, cause);
}

/** How a call to LightOS' management API fails, and changes that are repeated at another endpoint. */
import type { RequestContext } from "../../context.ts";
import { type StatusCode, StatusError } from "../../error.ts";

/** What a failed call to the management API has left behind. */
export interface ApiFailure {
  /** The request may have been carried out although no answer came, or a bad one. */
  readonly outcomeUnknown?: boolean;
  /** Another management endpoint can be asked at once: the one that failed is left alone for a while. */
  readonly elsewhere?: boolean;
  /** The answer was larger than the driver accepts: a smaller one has to be asked for. */
  readonly isTooLarge?: boolean;
  /** When no endpoint answers: what is wrong with them, each reason once. */
  readonly reasons?: readonly string[];
}

/**
 * A StatusError for what the management API answered, or for its silence; its message says `Cannot <action>: <problem>`.
 */
export class LightosError extends StatusError implements ApiFailure {
  readonly outcomeUnknown: boolean;
  readonly elsewhere: boolean;
  readonly isTooLarge: boolean;
  readonly reasons: readonly string[];

  constructor(ctx: RequestContext, code: StatusCode, problem: string, options: ErrorOptions & ApiFailure = {}) {
    super(code, ctx.error(code, problem).message, options);
    this.outcomeUnknown = options.outcomeUnknown ?? false;
    this.elsewhere = options.elsewhere ?? false;
    this.isTooLarge = options.isTooLarge ?? false;
    this.reasons = options.reasons ?? [];
  }
}

/** Makes a change that does no harm when it is made twice, at another endpoint when one is failing or silent. */
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

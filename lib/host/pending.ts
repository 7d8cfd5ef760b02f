/**
 * The volumes that owe an answer. A file system that is frozen or has no path blocks the thread that asks it in the kernel, and
 * a question cannot be cancelled: the thread stays blocked until the volume answers, even after the call that asked has ended.
 * So a volume that owes an answer is asked nothing more until it has answered. All calls of a node share this memory: stage,
 * publish, unpublish, unstage, expand and the statistics.
 */
import { type RequestContext, timeLimit, unlessAborted } from "../context.ts";
import { hasCode, StatusError } from "../error.ts";

/** A question that a volume has not answered. */
export interface Owed {
  /** `a read of /dev/nvme0n1`. */
  readonly what: string;
  /** For how long, in milliseconds. */
  readonly ms: number;
}

/** The outcome of a question. */
export type Answer<T> =
  | { readonly kind: "answered"; readonly value: T }
  /** This question or an earlier one was not answered. */
  | { readonly kind: "silent"; readonly owed: Owed };

interface Question {
  readonly what: string;
  readonly began: number;
  /** Whether the call that asked has ended. */
  isAbandoned: boolean;
}

/** A question to a volume. */
export interface AskOptions {
  /** The volume's UUID. */
  readonly volume: string;
  /** What is asked, for messages: `a read of /dev/nvme0n1`. */
  readonly what: string;
  /** Ends the wait, with the answer `silent`; absent: never. */
  readonly longestMs?: number;
}

/** After this time, a question whose call still waits keeps others from asking. */
const patienceMs = 10_000;

/** Remembers the open questions of each volume. */
export class PendingAnswers {
  readonly #questions = new Map<string, Set<Question>>();

  /** How many volumes owe an answer, and the longest time for which one has, in ms. For metrics. */
  get debt(): { readonly volumes: number; readonly longestMs: number } {
    const owed = [...this.#questions.keys()].map((volume) => this.owedBy(volume)).filter((owed) => owed !== undefined);
    return { volumes: owed.length, longestMs: Math.max(0, ...owed.map(({ ms }) => ms)) };
  }

  /** What a volume owes, so that it must not be asked now; undefined: nothing. */
  owedBy(volume: string): Owed | undefined {
    const now = performance.now();
    for (const { what, began, isAbandoned } of this.#questions.get(volume) ?? []) {
      if (isAbandoned || now - began >= patienceMs) return { what, ms: now - began };
    }
    return undefined;
  }

  /** Throws UNAVAILABLE while a volume owes an answer. */
  assertNothingOwed(ctx: RequestContext, volume: string): void {
    const owed = this.owedBy(volume);
    if (owed !== undefined) throw owedError(ctx, owed);
  }

  /**
   * Asks a volume, unless it owes an answer. Rejects with the reason of `signal`, while the question continues, or with the
   * error of `question`.
   *
   * @param question gets no signal, because nothing can end it
   */
  async ask<T>(
    { signal }: Pick<RequestContext, "signal">,
    options: AskOptions,
    question: () => Promise<T>,
  ): Promise<Answer<T>> {
    const { volume, what, longestMs = 2 ** 31 - 1 } = options;
    signal.throwIfAborted();
    const earlier = this.owedBy(volume);
    if (earlier !== undefined) return { kind: "silent", owed: earlier };
    const asked: Question = { what, began: performance.now(), isAbandoned: false };
    const questions = this.#questions.get(volume) ?? new Set();
    this.#questions.set(volume, questions.add(asked));
    const answered = question().finally(() => {
      questions.delete(asked);
      if (questions.size === 0) this.#questions.delete(volume);
    });
    using limit = timeLimit(signal, longestMs);
    try {
      return { kind: "answered", value: await unlessAborted(answered, limit.signal) };
    } catch (error) {
      if (!limit.signal.aborted || error !== limit.signal.reason) throw error;
      asked.isAbandoned = true;
      signal.throwIfAborted();
      return { kind: "silent", owed: { what, ms: performance.now() - asked.began } };
    }
  }

  /**
   * Asks a volume, for callers that cannot continue without the answer.
   *
   * @throws StatusError UNAVAILABLE when the volume does not answer, naming what it owes and since when
   */
  async answer<T>(ctx: RequestContext, options: AskOptions, question: () => Promise<T>): Promise<T> {
    try {
      const answer = await this.ask(ctx, options, question);
      if (answer.kind === "answered") return answer.value;
      throw owedError(ctx, answer.owed);
    } catch (error) {
      // The caller's deadline has passed: the error names what it waited for.
      const owed = ctx.signal.aborted && hasCode(error, "DEADLINE_EXCEEDED") ? this.owedBy(options.volume) : undefined;
      throw owed === undefined ? error : owedError(ctx, owed, error);
    }
  }
}

function owedError(ctx: RequestContext, { what, ms }: Owed, cause?: unknown): StatusError {
  return ctx.error(
    "UNAVAILABLE",
    `the volume has not answered ${what} for ${Math.round(ms / 1000)} s, it is asked nothing more until it ` +
      `does; restore the way to its storage, or thaw it (fsfreeze --unfreeze) if a backup has left it frozen`,
    { cause },
  );
}

/**
 * The volumes that have not answered. A file system that is frozen or has no path blocks the thread that asks it in the kernel,
 * and a question cannot be cancelled: the thread stays blocked until the volume answers, even after the call that asked has
 * ended. So a volume with a pending operation is asked nothing more until it has answered. All calls of a node share this
 * memory: stage, publish, unpublish, unstage, expand and the statistics.
 */
import { timeLimit, unlessAborted } from "../timing.ts";
import type { RequestContext } from "../context.ts";
import { hasCode, StatusError } from "../error.ts";

/** An operation that a volume has not answered. */
export interface PendingOperation {
  /** `a read of /dev/nvme0n1`. */
  readonly what: string;
  /** For how long, in milliseconds. */
  readonly ms: number;
}

/** The outcome of a question. */
export type PendingOutcome<T> =
  | { readonly kind: "answered"; readonly value: T }
  /** This question or an earlier one was not answered. */
  | { readonly kind: "silent"; readonly pending: PendingOperation };

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

  /** How many volumes have a pending operation, and the longest time since one began, in ms. For metrics. */
  get unanswered(): { readonly volumes: number; readonly longestMs: number } {
    const pending = [...this.#questions.keys()].map((volume) => this.pendingOperation(volume)).filter((pending) =>
      pending !== undefined
    );
    return { volumes: pending.length, longestMs: Math.max(0, ...pending.map(({ ms }) => ms)) };
  }

  /** What a volume has not answered, so that it must not be asked now; undefined: nothing. */
  pendingOperation(volume: string): PendingOperation | undefined {
    const now = performance.now();
    for (const { what, began, isAbandoned } of this.#questions.get(volume) ?? []) {
      if (isAbandoned || now - began >= patienceMs) return { what, ms: now - began };
    }
    return undefined;
  }

  /** Throws UNAVAILABLE while a volume has a pending operation. */
  assertAnswering(ctx: RequestContext, volume: string): void {
    const pending = this.pendingOperation(volume);
    if (pending !== undefined) throw notAnsweringError(ctx, pending);
  }

  /**
   * Asks a volume, unless it has a pending operation. Rejects with the reason of `signal`, while the question continues, or
   * with the error of `question`.
   *
   * @param question gets no signal, because nothing can end it
   */
  async ask<T>(
    { signal }: Pick<RequestContext, "signal">,
    options: AskOptions,
    question: () => Promise<T>,
  ): Promise<PendingOutcome<T>> {
    const { volume, what, longestMs = 2 ** 31 - 1 } = options;
    signal.throwIfAborted();
    const earlier = this.pendingOperation(volume);
    if (earlier !== undefined) return { kind: "silent", pending: earlier };
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
      return { kind: "silent", pending: { what, ms: performance.now() - asked.began } };
    }
  }

  /**
   * Asks a volume, for callers that cannot continue without the answer.
   *
   * @throws StatusError UNAVAILABLE when the volume does not answer, naming the pending operation and since when
   */
  async answer<T>(ctx: RequestContext, options: AskOptions, question: () => Promise<T>): Promise<T> {
    try {
      const answer = await this.ask(ctx, options, question);
      if (answer.kind === "answered") return answer.value;
      throw notAnsweringError(ctx, answer.pending);
    } catch (error) {
      // The caller's deadline has passed: the error names what it waited for.
      const pending = ctx.signal.aborted && hasCode(error, "DEADLINE_EXCEEDED")
        ? this.pendingOperation(options.volume)
        : undefined;
      throw pending === undefined ? error : notAnsweringError(ctx, pending, error);
    }
  }
}

function notAnsweringError(ctx: RequestContext, { what, ms }: PendingOperation, cause?: unknown): StatusError {
  return ctx.error(
    "UNAVAILABLE",
    `the volume has not answered ${what} for ${Math.round(ms / 1000)} s, it is asked nothing more until it ` +
      `does; restore the way to its storage, or thaw it (fsfreeze --unfreeze) if a backup has left it frozen`,
    { cause },
  );
}

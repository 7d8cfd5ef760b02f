/**
 * Questions to volumes that may never be answered: a file system without a path, or a frozen one, keeps whoever asks in the
 * kernel, and what was asked cannot be taken back. It holds a thread of this process until the volume answers. So a volume
 * that has owed an answer for too long is asked nothing more until it has given it.
 */
import { timeLimit, unlessAborted } from "../context.ts";

export type Answer<T> =
  | { readonly kind: "answered"; readonly value: T }
  /** The volume has not answered for so long, this question or an earlier one. */
  | { readonly kind: "silent"; readonly ms: number };

/** Which volumes owe an answer: one memory for all calls of a node. */
export class PendingAnswers {
  /** When the oldest question was asked that is not answered yet, by volume. */
  readonly #since = new Map<string, number>();

  /**
   * Asks a volume, and waits for `longestMs` at most. Rejects with the reason of `signal`, or with what `question` rejects
   * with.
   *
   * @param volume its UUID
   * @param question goes on after the wait has ended; gets no signal for that reason
   */
  async ask<T>(
    volume: string,
    question: () => Promise<T>,
    { signal, longestMs }: { readonly signal: AbortSignal; readonly longestMs: number },
  ): Promise<Answer<T>> {
    const owedSince = this.#since.get(volume);
    const silent = (since: number) => ({ kind: "silent" as const, ms: performance.now() - since });
    if (owedSince !== undefined && performance.now() - owedSince >= longestMs) return silent(owedSince);
    const started = performance.now();
    if (owedSince === undefined) this.#since.set(volume, started);
    const answered = question().finally(() => {
      if (this.#since.get(volume) === started) this.#since.delete(volume);
    });
    using limit = timeLimit(signal, longestMs);
    try {
      return { kind: "answered", value: await unlessAborted(answered, limit.signal) };
    } catch (error) {
      signal.throwIfAborted();
      if (error === limit.signal.reason) return silent(started);
      throw error;
    }
  }
}

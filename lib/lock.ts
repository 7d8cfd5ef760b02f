import { timeLimit } from "./timing.ts";
import { StatusError } from "./error.ts";

interface Held {
  readonly holder: string;
  readonly since: number;
  readonly queue: Array<() => void>;
}

/**
 * One holder per key. `take` fails at once (volumes: the orchestrator retries), `wait` queues first come, first served
 * (subsystems: unrelated volumes share one). The holder keeps the key until the returned Disposable is disposed, which
 * belongs at the real end of the work, not at the caller's deadline.
 */
export class KeyedLock {
  readonly #held = new Map<string, Held>();

  /**
   * Takes `key`, or throws ABORTED that names who holds it and for how long.
   * Check and take are one synchronous step, so two callers can never both pass.
   *
   * @param holder what is running, as it should be read in the second caller's error: `NodeStageVolume`
   */
  take(key: string, holder: string): Disposable {
    const held = this.#held.get(key);
    if (held !== undefined) {
      const seconds = Math.round((performance.now() - held.since) / 1000);
      throw new StatusError(
        "ABORTED",
        `Cannot start ${holder} for ${key}: ${held.holder} has been running for ${seconds} s, repeat the call later`,
      );
    }
    return this.#hold(key, holder, []);
  }

  /** Takes `key` as soon as all earlier callers have released it; rejects with `signal.reason` when that comes first. */
  async wait(key: string, holder: string, signal: AbortSignal): Promise<Disposable> {
    signal.throwIfAborted();
    const held = this.#held.get(key);
    if (held === undefined) return this.#hold(key, holder, []);
    await new Promise<void>((resolve, reject) => {
      const turn = () => {
        signal.removeEventListener("abort", giveUp);
        resolve();
      };
      const giveUp = () => {
        // The queue travels from holder to holder, so the entry is looked for in the current one.
        const queue = this.#held.get(key)?.queue ?? [];
        const at = queue.indexOf(turn);
        if (at >= 0) queue.splice(at, 1);
        reject(signal.reason);
      };
      signal.addEventListener("abort", giveUp, { once: true });
      held.queue.push(turn);
    });
    return this.#hold(key, holder, this.#held.get(key)?.queue ?? []);
  }

  /**
   * Takes `key` once all earlier callers have released it, within `waitMs`; then throws the ABORTED of `take`. Rejects with
   * `signal.reason` when that comes first. For calls that many nodes make for one volume at the same moment.
   */
  async takeWithin(waitMs: number, key: string, holder: string, signal: AbortSignal): Promise<Disposable> {
    using limit = timeLimit(signal, waitMs);
    try {
      return await this.wait(key, holder, limit.signal);
    } catch {
      signal.throwIfAborted();
      return this.take(key, holder);
    }
  }

  #hold(key: string, holder: string, queue: Array<() => void>): Disposable {
    const mine: Held = { holder, since: performance.now(), queue };
    this.#held.set(key, mine);
    let released = false;
    return {
      [Symbol.dispose]: () => {
        // Once only: the entry is still ours while the next in line wakes up, and a second one would wake another.
        if (released) return;
        released = true;
        const next = mine.queue.shift();
        // The entry stays while the next in line wakes up, so that no other caller slips in between.
        if (next === undefined) this.#held.delete(key);
        else next();
      },
    };
  }
}

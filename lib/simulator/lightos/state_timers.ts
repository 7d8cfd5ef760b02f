/** When objects of a simulated cluster change their state: one timer per object. */
import { messageOf } from "../../error.ts";
import type { Logger } from "../../log.ts";

const longestTimerMs = 2 ** 31 - 1;

/** Runs the next step of each object at its time. Close it to stop them; `close` waits for steps that are running. */
export class StateTimers {
  readonly #log: Logger;
  readonly #timers = new Map<string, ReturnType<typeof setTimeout>>();
  readonly #running = new Set<Promise<void>>();
  #closed = false;

  constructor(log: Logger) {
    this.#log = log;
  }

  /** Runs `step` at a point in time, at once when that has passed. Replaces the object's earlier timer. */
  at(uuid: string, dueAtMs: number, step: () => Promise<void> | void): void {
    this.stop(uuid);
    if (this.#closed) return;
    const leftMs = Math.max(0, dueAtMs - Date.now());
    const timer = setTimeout(() => {
      if (leftMs > longestTimerMs) return this.at(uuid, dueAtMs, step);
      this.#timers.delete(uuid);
      const work: Promise<void> = (async () => await step())()
        .catch((error) => this.#log.error("could not finish a change", { volume: uuid, error: messageOf(error) }))
        .finally(() => this.#running.delete(work));
      this.#running.add(work);
    }, Math.min(leftMs, longestTimerMs));
    this.#timers.set(uuid, timer);
  }

  /** Stops the timer of an object; without one: nothing. */
  stop(uuid: string): void {
    clearTimeout(this.#timers.get(uuid));
    this.#timers.delete(uuid);
  }

  stopAll(): void {
    for (const uuid of [...this.#timers.keys()]) this.stop(uuid);
  }

  /** Stops all timers for good, and waits for the steps that are running. */
  async close(): Promise<void> {
    this.#closed = true;
    this.stopAll();
    while (this.#running.size > 0) await Promise.allSettled(this.#running);
  }
}

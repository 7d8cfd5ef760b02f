/** Work that goes on beside the looks of the daemon, and problems that are logged once. */
import { backgroundContext, type RequestContext } from "../context.ts";
import { messageOf } from "../error.ts";
import type { Fields, Logger } from "../log.ts";

const firstPauseMs = 1000;
const longestPauseMs = 60_000;
// nvme-cli waits 3 s for an address that does not answer; a disconnect of a controller that has not noticed takes 61 s.
const taskLimitMs = 90_000;

/** Logs a problem when it appears or changes, and not again while it stays the same. */
export class ProblemLog {
  readonly #log: Logger;
  readonly #logged = new Map<string, string>();

  constructor(log: Logger) {
    this.#log = log;
  }

  /** Logs `event` unless the same problem of this subject was the last one. */
  report(subject: string, problem: string, event: string, fields: Fields = {}): void {
    if (this.#logged.get(subject) === problem) return;
    this.#logged.set(subject, problem);
    this.#log.warning(event, { ...fields, error: problem });
  }

  /** The subject has no problem any more. */
  clear(subject: string): void {
    this.#logged.delete(subject);
  }
}

/** What a task does; resolves with why it failed, or undefined. */
export type Work = (ctx: RequestContext) => Promise<string | undefined>;

export interface TaskOptions {
  readonly log: Logger;
  readonly problems: ProblemLog;
  /** Ends all tasks, and starts no more. */
  readonly signal: AbortSignal;
  /** A clock in milliseconds. */
  readonly now: () => number;
  /** Called after each task. */
  readonly onEnd: () => void;
}

/** Runs one task per key at a time. A task that failed can start again after 1, 2, 4 … 60 seconds. */
export class TaskRunner {
  readonly #options: TaskOptions;
  readonly #running = new Map<string, Promise<void>>();
  readonly #pauses = new Map<string, { readonly failures: number; readonly until: number }>();

  constructor(options: TaskOptions) {
    this.#options = options;
  }

  /**
   * Starts `work`, unless the key's task runs or pauses.
   *
   * @param failure log event of a failure
   */
  start(key: string, failure: string, fields: Fields, work: Work): void {
    const { log, problems, signal, now, onEnd } = this.#options;
    if (this.#running.has(key) || signal.aborted || (this.#pauses.get(key)?.until ?? -Infinity) > now()) return;
    const ctx = backgroundContext("go on", log, taskLimitMs, signal);
    const done = work(ctx).catch(messageOf).then((problem) => {
      this.#running.delete(key);
      if (signal.aborted) return;
      if (problem === undefined) {
        this.#pauses.delete(key);
        problems.clear(key);
      } else {
        const failures = (this.#pauses.get(key)?.failures ?? 0) + 1;
        const pauseMs = Math.min(firstPauseMs * 2 ** (failures - 1), longestPauseMs);
        this.#pauses.set(key, { failures, until: now() + pauseMs });
        problems.report(key, problem, `${failure}, tries again`, fields);
      }
      onEnd();
    });
    this.#running.set(key, done);
  }

  isRunning(key: string): boolean {
    return this.#running.has(key);
  }

  /** Keys of the running tasks. */
  running(): readonly string[] {
    return [...this.#running.keys()];
  }

  /** Ends the pauses of all keys that begin with `prefix`. */
  endPauses(prefix: string): void {
    for (const key of this.#pauses.keys()) if (key.startsWith(prefix)) this.#pauses.delete(key);
  }

  /** Resolves when the tasks that run now have ended. */
  async waitForRunning(): Promise<void> {
    await Promise.all(this.#running.values());
  }

  /** Resolves when no task runs. */
  async waitUntilIdle(): Promise<void> {
    while (this.#running.size > 0) await this.waitForRunning();
  }
}

/**
 * Threads for operations that can block in the kernel. Deno has 32 threads for all file operations of a process, and a blocked
 * one stays blocked when the caller stops waiting: after 32 reads of volumes that hang, not even the path of a healthy volume
 * can be resolved. So volumes get a part of these threads; when that part is blocked, they get the threads of workers, each of
 * which has 32 of its own (seen with Deno 2.9.5; a worker takes about 7 MiB).
 */
import { StatusError } from "../error.ts";
import { type VolumeOperations, volumeOperations } from "./volume_operations.ts";

/** How many of the process's own threads volumes may use for operations that have just begun. The driver needs the rest. */
const ownThreads = 12;
/** With this many of them blocked, new operations go to workers. */
const blockedBeforeWorkers = 8;
const workerThreads = 28;
const mostWorkers = 8;
/** After this time an operation counts as blocked: healthy storage answers faster. */
const blockedMs = 250;
/** How long an idle worker is kept. */
const idleMs = 60_000;

type Name = keyof VolumeOperations;
type OperationArguments<N extends Name> = Parameters<VolumeOperations[N]>;
type Result<N extends Name> = Awaited<ReturnType<VolumeOperations[N]>>;

/** Runs operations on volumes. */
export class VolumeThreads {
  /** When the operations on the process's own threads began, in ms. */
  readonly #own = new Map<symbol, number>();
  readonly #waiting: Array<() => void> = [];
  readonly #workers: OperationWorker[] = [];
  #operations: Promise<VolumeOperations> | undefined;

  /** How many operations have not ended. */
  get running(): number {
    return this.#own.size + this.#workers.reduce((sum, worker) => sum + worker.running, 0);
  }

  /**
   * Runs one operation.
   *
   * @throws what the operation throws; StatusError UNAVAILABLE when so many operations are blocked that no thread is left
   */
  async perform<N extends Name>(name: N, ...args: OperationArguments<N>): Promise<Result<N>> {
    const thread = await this.#ownThread();
    if (thread === undefined) return await this.#worker().run(name, args);
    try {
      const operations = await (this.#operations ??= volumeOperations());
      return await call(operations, name, args);
    } finally {
      this.#own.delete(thread);
      this.#waiting[0]?.();
    }
  }

  /** Takes one of the process's own threads, now or in a moment; undefined: too many are blocked. */
  async #ownThread(): Promise<symbol | undefined> {
    for (;;) {
      const now = performance.now();
      const ages = [...this.#own.values()].map((began) => now - began);
      const recent = ages.filter((ms) => ms < blockedMs);
      if (ages.length - recent.length >= blockedBeforeWorkers) return undefined;
      if (recent.length < ownThreads) break;
      await this.#nextEnd(blockedMs - Math.max(...recent));
    }
    const thread = Symbol();
    this.#own.set(thread, performance.now());
    return thread;
  }

  /** Resolves when an operation on an own thread ends, or after `ms`. */
  #nextEnd(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer);
        const at = this.#waiting.indexOf(done);
        if (at >= 0) this.#waiting.splice(at, 1);
        resolve();
      };
      const timer = setTimeout(done, Math.max(1, ms));
      this.#waiting.push(done);
    });
  }

  #worker(): OperationWorker {
    const free = this.#workers.find((worker) => worker.running < workerThreads);
    if (free !== undefined) return free;
    if (this.#workers.length >= mostWorkers) {
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ask the volume: ${this.running} operations on volumes have not ended, this node has no thread left for ` +
          `another; restore the way to their storage, or thaw what is frozen`,
      );
    }
    const worker = new OperationWorker(() => {
      const at = this.#workers.indexOf(worker);
      if (at >= 0) this.#workers.splice(at, 1);
    });
    this.#workers.push(worker);
    return worker;
  }
}

/** Calls an operation by its name. */
async function call<N extends Name>(
  operations: VolumeOperations,
  name: N,
  args: OperationArguments<N>,
): Promise<Result<N>> {
  const operation = operations[name] as (...args: OperationArguments<N>) => Promise<Result<N>>;
  return await operation(...args);
}

/** The answer of a worker to the operation with this number. */
type WorkerMessage =
  | { readonly id: number; readonly value: unknown }
  | { readonly id: number; readonly message: string; readonly code: unknown };

/** A worker that runs operations, several at a time. Ends by itself when it has been idle for a while. */
class OperationWorker {
  readonly #worker: Worker;
  readonly #open = new Map<number, PromiseWithResolvers<unknown>>();
  readonly #ended: () => void;
  #count = 0;
  #idle: ReturnType<typeof setTimeout> | undefined;

  constructor(ended: () => void) {
    this.#ended = ended;
    const program = `(${serve})(${volumeOperations})`;
    const url = URL.createObjectURL(new Blob([program], { type: "text/javascript" }));
    this.#worker = new Worker(url, { type: "module" });
    URL.revokeObjectURL(url);
    this.#worker.onmessage = ({ data }) => this.#answered(data as WorkerMessage);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#end(new Error(`the worker for operations on volumes has ended (${event.message})`));
    };
  }

  get running(): number {
    return this.#open.size;
  }

  async run<N extends Name>(name: N, args: OperationArguments<N>): Promise<Result<N>> {
    clearTimeout(this.#idle);
    const id = ++this.#count;
    const answer = Promise.withResolvers<unknown>();
    this.#open.set(id, answer);
    this.#worker.postMessage({ id, name, args });
    return await answer.promise as Result<N>;
  }

  #answered(answer: WorkerMessage): void {
    const open = this.#open.get(answer.id);
    this.#open.delete(answer.id);
    if ("message" in answer) {
      open?.reject(Object.assign(new Error(answer.message), answer.code === undefined ? {} : { code: answer.code }));
    } else {
      open?.resolve(answer.value);
    }
    if (this.#open.size > 0) return;
    this.#idle = setTimeout(() => this.#end(new Error("the worker has ended")), idleMs);
    Deno.unrefTimer(this.#idle);
  }

  #end(reason: Error): void {
    clearTimeout(this.#idle);
    this.#ended();
    for (const open of this.#open.values()) open.reject(reason);
    this.#open.clear();
    this.#worker.terminate();
  }
}

/** The program of a worker. Its source text is sent there, so it must not refer to anything outside of itself. */
function serve(makeOperations: () => Promise<VolumeOperations>): void {
  const scope = globalThis as unknown as {
    onmessage: (
      event: { readonly data: { readonly id: number; readonly name: string; readonly args: unknown[] } },
    ) => void;
    postMessage: (answer: WorkerMessage) => void;
  };
  const made = makeOperations();
  scope.onmessage = async ({ data: { id, name, args } }) => {
    try {
      const operations = await made as unknown as Record<string, (...args: unknown[]) => Promise<unknown>>;
      const value = await operations[name]?.(...args);
      scope.postMessage({ id, value });
    } catch (error) {
      const { message, code } = error as { message?: unknown; code?: unknown };
      scope.postMessage({ id, message: String(message ?? error), code });
    }
  };
}

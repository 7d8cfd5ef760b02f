/** Time limits, and waits that end when a signal aborts. */

/**
 * A signal that aborts with `parent`, or with a TimeoutError after `ms`. Dispose it when the work is done: that ends the
 * timer and stops listening to `parent`, which AbortSignal.any and AbortSignal.timeout would hold for longer.
 */
export function timeLimit(parent: AbortSignal, ms: number): Disposable & { readonly signal: AbortSignal } {
  const limit = new AbortController();
  const follow = () => limit.abort(parent.reason);
  if (parent.aborted) follow();
  else parent.addEventListener("abort", follow, { once: true });
  const timer = setTimeout(() => {
    limit.abort(new DOMException(`not done within ${ms} ms`, "TimeoutError"));
  }, Math.min(ms, 2 ** 31 - 1));
  return {
    signal: limit.signal,
    [Symbol.dispose]: () => {
      clearTimeout(timer);
      parent.removeEventListener("abort", follow);
    },
  };
}

/** Resolves after `ms`, or rejects with `signal.reason` when that comes first. */
export function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    const giveUp = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", giveUp);
      resolve();
    }, ms);
    signal.addEventListener("abort", giveUp, { once: true });
  });
}

/** `promise`, or a rejection with `signal.reason` when that comes first. The work behind `promise` goes on. */
export function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const giveUp = () => reject(signal.reason);
    if (signal.aborted) {
      promise.catch(() => {});
      return giveUp();
    }
    signal.addEventListener("abort", giveUp, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", giveUp));
  });
}

/** A time for messages, rounded, so that a repeated call gives the same text and Kubernetes makes no new event of it. */
export function formatSeconds(ms: number): string {
  return ms < 950 ? `${Math.ceil(ms / 100) / 10} s` : `${Math.round(ms / 1000)} s`;
}

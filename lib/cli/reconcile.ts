/** Restores lost connections to volumes from time to time. */
import { sleep, timeLimit } from "../timing.ts";
import { requestContext } from "../context.ts";
import { messageOf } from "../error.ts";
import type { Attacher } from "../host/attach/attacher.ts";
import type { Logger } from "../log.ts";

const longestReconciliationMs = 300_000;

/** Calls `reconcile` of the attacher, if it has one, again and again until it is disposed. */
export function reconcileRegularly(attacher: Attacher, log: Logger): Disposable {
  const stop = new AbortController();
  reconcileUntilAborted(attacher, log, stop.signal).catch((error) => {
    if (!stop.signal.aborted) log.error("no longer restores lost connections", { error: messageOf(error) });
  });
  return { [Symbol.dispose]: () => stop.abort() };
}

async function reconcileUntilAborted(attacher: Attacher, log: Logger, signal: AbortSignal): Promise<void> {
  const { reconcileEveryMs } = await import("../host/attach/direct.ts");
  while (attacher.reconcile !== undefined) {
    // The kernel gives up a connection after minutes, so this need not be quick.
    await sleep(reconcileEveryMs, signal);
    using limit = timeLimit(signal, longestReconciliationMs);
    try {
      await attacher.reconcile(requestContext(limit.signal, new Date(Date.now() + longestReconciliationMs), log));
    } catch (error) {
      signal.throwIfAborted();
      log.warning("could not restore lost connections", { error: messageOf(error) });
    }
  }
}

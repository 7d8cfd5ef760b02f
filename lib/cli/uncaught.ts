/**
 * The last line of defence of a process that serves: an uncaught exception ends the work that it came from, mostly one
 * connection, and not the work for all other volumes.
 */
import type { Logger } from "../log.ts";

/**
 * Until it is disposed, uncaught exceptions of event callbacks and unhandled rejections are logged and do not end the
 * process. It is for a process that serves already: one that cannot start has to end.
 *
 * @param stillServes whether the process can do its work; called after such an exception, and never twice at a time
 * @param giveUp ends the process when it cannot
 */
export function surviveUncaught(
  log: Logger,
  stillServes: () => Promise<boolean>,
  giveUp: () => void,
): Disposable {
  let isChecking = false;
  const exitUnlessServing = async () => {
    if (isChecking) return;
    isChecking = true;
    const serves = await stillServes().catch(() => false);
    isChecking = false;
    if (serves) return;
    log.error("cannot serve after an uncaught exception, exits");
    giveUp();
  };
  const survive = (thrown: unknown) => {
    log.error("continues after an uncaught exception", { error: describeThrown(thrown) });
    exitUnlessServing();
  };
  const onError = (event: ErrorEvent) => {
    event.preventDefault();
    survive(event.error ?? event.message);
  };
  const onRejection = (event: PromiseRejectionEvent) => {
    event.preventDefault();
    survive(event.reason);
  };
  globalThis.addEventListener("error", onError);
  globalThis.addEventListener("unhandledrejection", onRejection);
  return {
    [Symbol.dispose]: () => {
      globalThis.removeEventListener("error", onError);
      globalThis.removeEventListener("unhandledrejection", onRejection);
    },
  };
}

function describeThrown(thrown: unknown): string {
  return thrown instanceof Error ? thrown.stack ?? thrown.message : String(thrown);
}

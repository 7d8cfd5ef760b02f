/**
 * The last line of defence of a process that serves: an exception that nobody has caught costs what it came from, a
 * connection mostly, and not the volumes of everybody else.
 */
import type { Logger } from "../context.ts";

/**
 * Logs exceptions out of event callbacks, and rejections that nobody handles, instead of ending the process, until it is
 * disposed. For a process that is up: one that cannot start has to end.
 *
 * @param stillServes whether the process can do its work; asked after such an exception, one question at a time
 * @param giveUp ends the process, which must not pretend to serve
 */
export function surviveUncaught(
  log: Logger,
  stillServes: () => Promise<boolean>,
  giveUp: () => void,
): Disposable {
  let isAsking = false;
  const ask = async () => {
    if (isAsking) return;
    isAsking = true;
    const serves = await stillServes().catch(() => false);
    isAsking = false;
    if (serves) return;
    log.error("cannot serve any more after an exception that nobody has caught, ends");
    giveUp();
  };
  const survive = (thrown: unknown) => {
    log.error("goes on after an exception that nobody has caught", { error: wordsOf(thrown) });
    ask();
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

function wordsOf(thrown: unknown): string {
  return thrown instanceof Error ? thrown.stack ?? thrown.message : String(thrown);
}

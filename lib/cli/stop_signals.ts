/** The signals that end a process which serves. */

const stopSignals = ["SIGTERM", "SIGINT", "SIGHUP"] as const;

/**
 * Resolves with the first signal that asks the process to stop. SIGHUP is one of them: a terminal that closes must not leave
 * a socket and unfinished answers behind.
 */
export function waitForStopSignal(): Promise<Deno.Signal> {
  return new Promise((resolve) => {
    for (const signal of stopSignals) Deno.addSignalListener(signal, () => resolve(signal));
  });
}

/** How the demo ends early: signals, and checks that failed. */

/** Signals that end the demo. A terminal sends SIGHUP when it is closed. */
export const interruptions = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
type Interruption = typeof interruptions[number];
/** Exit status after a signal: 128 plus the signal's number, as in a shell. */
export const interruptedStatus: Readonly<Record<Interruption, number>> = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 };

/** A signal ended the demo. */
export class Interrupted extends Error {
  readonly signal: Interruption;

  constructor(signal: Interruption) {
    super(`interrupted by ${signal}`);
    this.signal = signal;
  }
}

/** A check failed. */
export class CheckFailed extends Error {}

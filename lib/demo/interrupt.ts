/** How a demo ends before its time. */

/** Signals that end the demo; SIGHUP is what a terminal sends that is closed. */
export const interruptions = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
type Interruption = typeof interruptions[number];
/** What a shell makes of a program that ends by a signal: 128 and the signal's number. */
export const interruptedStatus: Readonly<Record<Interruption, number>> = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 };

/** Somebody ended the demo by a signal. */
export class Interrupted extends Error {
  readonly signal: Interruption;

  constructor(signal: Interruption) {
    super(`interrupted by ${signal}`);
    this.signal = signal;
  }
}

/** A check that did not pass. */
export class CheckFailed extends Error {}

/**
 * What a file of scenarios/ consists of. Host and guest both load it: the host to know the names of the checks, the guest
 * to run them. So nothing may happen when such a file is merely loaded.
 */
import type { GuestTestbed, StartOptions } from "./testbed.ts";

/** Something that is asserted on a real kernel. It makes what it needs and takes it away again. */
export interface Check {
  /** Like a test's name; `promise N: …` where it keeps one. */
  readonly name: string;
  /** Default 300 s: a machine may be ten times as slow as another. */
  readonly limitSeconds?: number;
  /** Throws when it fails. `signal` aborts at the time limit. */
  readonly run: (testbed: GuestTestbed, signal: AbortSignal) => Promise<void>;
}

/** Checks that share a guest, one after the other. */
export interface Scenario {
  /** Each element is a boot; the guest's disk `/disk` stays, its memory and its connections do not. */
  readonly boots: readonly (readonly Check[])[];
  /** What runs before the first check of each boot; undefined: nothing. */
  readonly start: StartOptions | undefined;
}

/** Settings of lbcsi node with which lost connections are given up while one can wait for it. */
export const impatient: StartOptions = {
  node: [
    ...["--ctrl-loss-tmo", "15", "--reconnect-delay", "1", "--keep-alive-tmo", "5"],
    ...["--nr-io-queues", "1", "--queue-size", "32"],
  ],
};

/** And with encryption that takes little time; the image's checks have its default. */
const quick: StartOptions = { node: [...impatient.node ?? [], "--luks-pbkdf", "pbkdf2", "--luks-iter-time", "50"] };

/** A scenario of one boot. Default: with cluster, controller and a quick node. */
export function scenario(checks: readonly Check[], start: StartOptions | undefined = quick): Scenario {
  return { boots: [checks], start };
}

/** What the guest reports to the host, one line of JSON each; other lines are for people. */
export type Report =
  | { readonly event: "begins"; readonly name: string }
  | { readonly event: "passed"; readonly name: string; readonly ms: number }
  | { readonly event: "failed"; readonly name: string; readonly ms: number; readonly problem: string }
  | { readonly event: "measured"; readonly name: string; readonly text: string };

/** Begins each line that is a Report. */
export const reportMark = "\u0001report ";

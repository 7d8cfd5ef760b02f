/**
 * What a file of scenarios/ is made of. Host and guest both load it: the host to know the names of the checks, the guest
 * to run them. So nothing may happen when such a file is merely loaded.
 */
import type { World } from "./world.ts";

/** Something that is asserted on a real kernel. It makes what it needs and takes it away again. */
export interface Check {
  /** Like a test's name; `promise N: …` where it keeps one. */
  readonly name: string;
  /** Default 60 s. */
  readonly limitSeconds?: number;
  /** Throws when it fails. `signal` aborts at the time limit. */
  readonly run: (world: World, signal: AbortSignal) => Promise<void>;
}

/** Checks that share a guest, one after the other. */
export interface Scenario {
  /** Each element is a boot; the guest's disk `/disk` stays, its memory and its connections do not. */
  readonly boots: readonly (readonly Check[])[];
  /** Default 2048. */
  readonly memoryMib?: number;
}

/** A scenario of one boot. */
export function scenario(checks: readonly Check[]): Scenario {
  return { boots: [checks] };
}

/** What the guest tells the host, a line of JSON each; other lines are for people. */
export type Report =
  | { readonly event: "begins"; readonly name: string }
  | { readonly event: "passed"; readonly name: string; readonly ms: number }
  | { readonly event: "failed"; readonly name: string; readonly ms: number; readonly problem: string }
  | { readonly event: "measured"; readonly name: string; readonly text: string };

/** Begins each line that is a Report. */
export const reportMark = "\u0001report ";

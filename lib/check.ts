/** What `lbcsi doctor` finds, in words that the machine's side and the storage's side share. */
import { messageOf, StatusError } from "./error.ts";

/**
 * `problem`: volumes do not work here, or not safely, until something is done. `warning`: they do, but for something that
 * only some of them need, or something looks as if it would soon stop them. `not checked`: it could not be seen from here.
 */
export type Verdict = "ok" | "warning" | "problem" | "not checked";

/** One thing that was looked at. Its texts never hold a secret. */
export interface Check {
  /** A few words, the same each time: `native multipath`. */
  readonly name: string;
  readonly verdict: Verdict;
  /** What is there, or why it could not be seen. */
  readonly found: string;
  /** What to do about it; absent when there is nothing to do. */
  readonly advice?: string;
}

/** At most so many items of a list are shown: a machine may have hundreds of whatever is wrong. */
const mostShown = 6;

/** The items as one text; of a long list the first ones, and how many more there are. */
export function formatList(items: readonly string[], separator: ", " | "; " = ", "): string {
  // One more costs no more room than saying that there is one more.
  if (items.length <= mostShown + 1) return items.join(separator);
  return `${items.slice(0, mostShown).join(separator)}${separator}and ${items.length - mostShown} more`;
}

/**
 * How a storage system that `lbcsi simulate` plays tells so, in a field that is for no other use: this, a colon, and which data
 * plane it has (`none`, `loop`, `nvmet`).
 */
export const simulatorMark = "lbcsi-simulator";

/** What the doctor finds at a simulated storage system; undefined for a `mark` that is none. */
export function simulatorCheck(
  mark: string,
): { readonly check: Check; readonly hasDataPath: boolean } | undefined {
  const at = mark.indexOf(`${simulatorMark}:`);
  if (at < 0) return undefined;
  const hasDataPath = mark.slice(at).startsWith(`${simulatorMark}:nvmet`);
  const path = hasDataPath ? "" : ", and nothing listens at its data addresses, which are not tried";
  const check = {
    name: "simulator",
    verdict: "warning",
    found: `lbcsi simulate plays this storage system${path}`,
    advice: "use it to try and to test; it stores nothing on real storage",
  } as const;
  return { check, hasDataPath };
}

/**
 * What `look` finds. What it throws makes the check one that was not made, for a look that fails says nothing about what
 * it was to see.
 */
export async function runCheck(name: string, look: () => Promise<Omit<Check, "name">>): Promise<Check> {
  try {
    return { name, ...await look() };
  } catch (error) {
    return { name, verdict: "not checked", found: reasonOf(error) };
  }
}

/** Why something failed, without the part of our own messages that says what was being done. */
export function reasonOf(error: unknown): string {
  const text = messageOf(error);
  return error instanceof StatusError ? text.replace(/^Cannot .*?: /, "") : text;
}

export type Finding = Omit<Check, "name">;

export function formatCount(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

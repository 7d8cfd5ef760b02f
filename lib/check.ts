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

/**
 * What `look` finds. What it throws makes the check one that was not made, for a look that fails says nothing about what
 * it was to see.
 */
export async function checked(name: string, look: () => Promise<Omit<Check, "name">>): Promise<Check> {
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

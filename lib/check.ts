/** The result of a check of `lbcsi doctor`, for checks of the machine and of storage systems. */
import { messageOf, StatusError } from "./error.ts";

/**
 * `problem`: volumes do not work here, or not safely, until something is done. `warning`: they work, but something is
 * missing that only some of them need, or something will soon stop them. `not checked`: it is not visible from here.
 */
export type Verdict = "ok" | "warning" | "problem" | "not checked";

/** One thing that was checked. Its texts never hold a secret. */
export interface Check {
  /** A few words, the same each time: `native multipath`. */
  readonly name: string;
  readonly verdict: Verdict;
  /** What is there, or why it could not be checked. */
  readonly found: string;
  /** What to do about it; absent when there is nothing to do. */
  readonly advice?: string;
}

/** What a check returns: all of a Check but its name. */
export type Finding = Omit<Check, "name">;

/** `1 volume`, `2 volumes`. */
export function formatCount(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

/** At most so many items of a list are shown: a machine may have hundreds of the same problem. */
const mostShown = 6;

/** The items as one text: all of a short list, or the first ones of a long list and how many more there are. */
export function formatList(items: readonly string[], separator: ", " | "; " = ", "): string {
  // One more item takes no more space than "and 1 more".
  if (items.length <= mostShown + 1) return items.join(separator);
  return `${items.slice(0, mostShown).join(separator)}${separator}and ${items.length - mostShown} more`;
}

/**
 * By this mark a simulated storage system can be recognised. It stands in a field that has no other use, followed by a colon
 * and the data plane (`none`, `loop`, `nvmet`).
 */
export const simulatorMark = "lbcsi-simulator";

/** The check of a simulated storage system, and whether it has a data path; undefined when `mark` is not the mark of one. */
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
    found: `this storage system is simulated (lbcsi simulate)${path}`,
    advice: "use it for trials and tests; it stores nothing on real storage",
  } as const;
  return { check, hasDataPath };
}

/** The result of `check`. When it throws, the verdict is `not checked`: the failure proves nothing about what is checked. */
export async function runCheck(name: string, check: () => Promise<Finding>): Promise<Check> {
  try {
    return { name, ...await check() };
  } catch (error) {
    return { name, verdict: "not checked", found: reasonOf(error) };
  }
}

/** Why something failed: the message of `error`, without the action that messages of this driver start with. */
export function reasonOf(error: unknown): string {
  const text = messageOf(error);
  return error instanceof StatusError ? text.replace(/^Cannot .*?: /, "") : text;
}

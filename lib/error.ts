/**
 * A failure that we foresaw, with the gRPC code that tells the caller what to do about it.
 *
 * Which code for what: "who acts" is the guide. INVALID_ARGUMENT is for the author of a manifest, FAILED_PRECONDITION
 * and RESOURCE_EXHAUSTED are for an operator, ABORTED and UNAVAILABLE are retried by the orchestrator, INTERNAL is a bug
 * of ours. Callers treat every code but CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED and UNAVAILABLE as
 * final: one outside this set may be used only when nothing is going on any more and nothing was left behind. For
 * csi-provisioner RESOURCE_EXHAUSTED is final too, so the code for a full cluster depends on the call
 * (csi/controller/full_cluster.ts). What callers do after each code is in docs/reference/csi.md 2.5.
 */

/** The names of the gRPC status codes that an answer of ours may carry. */
export type StatusCode =
  | "CANCELLED"
  | "INVALID_ARGUMENT"
  | "DEADLINE_EXCEEDED"
  | "NOT_FOUND"
  | "ALREADY_EXISTS"
  | "PERMISSION_DENIED"
  | "RESOURCE_EXHAUSTED"
  | "FAILED_PRECONDITION"
  | "ABORTED"
  | "OUT_OF_RANGE"
  | "UNIMPLEMENTED"
  | "INTERNAL"
  | "UNAVAILABLE"
  | "UNAUTHENTICATED";

/**
 * A foreseen failure, worded for the person who reads `kubectl describe`: `Cannot <action> <object>: <what is>[, <what
 * is needed>]`. Its message reaches end users, so it never holds a secret or a stack; the `cause` goes to the log only.
 */
export class StatusError extends Error {
  override readonly name = "StatusError";
  readonly code: StatusCode;

  constructor(code: StatusCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

/** Whether a caller treats this as final: it may then forget what it asked for, and never ask to have it undone. */
export function isFinal(error: unknown): boolean {
  return !hasCode(error, "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE");
}

/** Whether `error` is a StatusError with one of these codes. */
export function hasCode(error: unknown, ...codes: readonly StatusCode[]): error is StatusError {
  return error instanceof StatusError && codes.includes(error.code);
}

/** The message of anything that was thrown, for use after a colon. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** What the operating system calls a failure of a system call: `ENOSPC`; undefined for every other error. */
export function systemCode(error: unknown): string | undefined {
  const code = error instanceof Error && !(error instanceof StatusError) && "code" in error ? error.code : undefined;
  return typeof code === "string" && /^E[A-Z0-9]+$/.test(code) ? code : undefined;
}

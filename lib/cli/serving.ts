/** Whether this process can still serve: its file operations run on a few threads, and all of them can be blocked. */
import { timeLimit, unlessAborted } from "../context.ts";

/**
 * A check that begins `operation`, any file operation on a disk of this machine's own, and answers whether it ended in time.
 * While one has not ended no other is begun, so that the check itself blocks one thread at most.
 *
 * @param longestMs how long a check waits, shorter than the probe's own timeout
 */
export function servingCheck(operation: () => Promise<unknown>, longestMs = 2000): () => Promise<boolean> {
  const never = new AbortController().signal;
  let running: Promise<unknown> | undefined;
  return async () => {
    running ??= operation().catch(() => {}).finally(() => running = undefined);
    using limit = timeLimit(never, longestMs);
    try {
      await unlessAborted(running, limit.signal);
      return true;
    } catch {
      return false;
    }
  };
}

/** Whether file operations of this process still end: they run on a few threads, and all of them can be blocked. */
import { timeLimit, unlessAborted } from "../timing.ts";

/**
 * A probe that starts `operation`, any file operation on a local disk, and returns whether it ended in time. While one has
 * not ended, no other is started, so that the probe itself blocks one thread at most.
 *
 * @param longestMs how long a probe waits; it has to be shorter than the timeout of the caller
 */
export function createFileOperationsProbe(
  operation: () => Promise<unknown>,
  longestMs = 2000,
): () => Promise<boolean> {
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

/** Runs nvme-cli's commands (ns-rescan, reset). connect.ts makes the arguments of its connect. */
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { CommandResult, Host } from "../host.ts";

/** Runs nvme-cli; returns why it failed, or undefined. Throws `ctx.signal.reason` when that has aborted. */
export async function runNvme(
  host: Host,
  ctx: RequestContext,
  args: readonly string[],
  onAbort: "kill" | "finish",
): Promise<string | undefined> {
  try {
    const result = await host.run("nvme", args, { signal: ctx.signal, onAbort, log: ctx.log });
    return result.code === 0 ? undefined : `exit ${result.code} ${wordsOf(result)}`.trim();
  } catch (error) {
    ctx.signal.throwIfAborted();
    return messageOf(error);
  }
}

/** The error message of a command in one line. nvme-cli 2.13 writes part of its messages to standard output. */
export function wordsOf({ stdout, stderr }: CommandResult): string {
  const text = stderr.trim() === "" ? stdout : stderr;
  return text.trim().replace(/\s*\n\s*/g, "; ").slice(0, 1000);
}

/** Runs cryptsetup. */
import type { RequestContext } from "../context.ts";
import { StatusError } from "../error.ts";
import { reasonOf } from "./command_reason.ts";
import type { CommandResult, Host } from "./host.ts";

/** Runs cryptsetup to its end; the passphrase goes to its standard input. A non-zero exit is returned. */
export async function runCryptsetup(
  host: Host,
  ctx: RequestContext,
  args: readonly string[],
  passphrase?: string,
): Promise<CommandResult> {
  return await host.run("cryptsetup", args, {
    signal: ctx.signal,
    onAbort: "finish",
    log: ctx.log,
    ...(passphrase === undefined ? {} : { stdin: passphrase }),
  });
}

/** The error for a command of cryptsetup that has failed. */
export function cryptsetupError(
  ctx: RequestContext,
  code: "FAILED_PRECONDITION" | "UNAVAILABLE",
  command: string,
  result: CommandResult,
): StatusError {
  return ctx.error(code, `cryptsetup ${command} failed with exit ${result.code} (${reasonOf("cryptsetup", result)})`);
}

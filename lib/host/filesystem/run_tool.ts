/** Runs the tools of file systems, which change devices and are never killed half-way. */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { reasonOf } from "../command_reason.ts";
import type { CommandResult, Host } from "../host.ts";

/** Runs a tool to its end, also when the signal aborts; then throws its reason. A non-zero exit is returned. */
export async function runTool(host: Host, ctx: RequestContext, program: string, args: readonly string[]) {
  return await host.run(program, args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
}

/** The error for a tool that has failed: FAILED_PRECONDITION with its message. */
export function toolError(ctx: RequestContext, program: string, result: CommandResult): StatusError {
  return ctx.error("FAILED_PRECONDITION", `${program} failed with exit ${result.code} (${reasonOf(program, result)})`);
}

/** Runs the tools of file systems. */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { reasonOf } from "../command_reason.ts";
import type { CommandResult, Host } from "../host.ts";

export async function runTool(host: Host, ctx: RequestContext, program: string, args: readonly string[]) {
  return await host.run(program, args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
}

export function toolError(ctx: RequestContext, program: string, result: CommandResult): StatusError {
  return ctx.error("FAILED_PRECONDITION", `${program} failed with exit ${result.code} (${reasonOf(program, result)})`);
}

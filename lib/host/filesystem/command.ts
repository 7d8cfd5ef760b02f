/** Runs the tools of file systems. */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { reasonOf } from "../command_reason.ts";
import type { CommandResult, Host } from "../host.ts";

export async function changing(host: Host, ctx: RequestContext, program: string, args: readonly string[]) {
  return await host.run(program, args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
}

export function failed(action: string, program: string, result: CommandResult): StatusError {
  return new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: ${program} failed with exit ${result.code} (${reasonOf(program, result)})`,
  );
}

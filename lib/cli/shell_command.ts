/** What commands that a person runs at a shell have in common. */
import { backgroundContext, type RequestContext } from "../context.ts";
import { hasCode, StatusError } from "../error.ts";
import { createLogger } from "../log.ts";
import type { shellLogOptions } from "./option_groups.ts";
import type { Settings } from "./options.ts";
import { surviveUncaught } from "./uncaught.ts";

const exitStatuses = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;

/** The settings of a command at a shell; `timeout` is in seconds. */
export type ShellSettings = Settings<typeof shellLogOptions> & { readonly timeout: number };

/**
 * Runs `work`, which ends at its timeout or with the first signal, but lets running changes of the machine end. The result
 * is the exit status: what `work` returns, 0 without that, or 128 and the number of the signal.
 *
 * @param action as it stands after "Cannot": `attach the volume`
 */
export async function runShellCommand(
  action: string,
  settings: ShellSettings,
  work: (ctx: RequestContext) => Promise<number | void>,
): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]);
  // The work is bounded by its timeout, and reports its own result.
  using _survival = surviveUncaught(log, () => Promise.resolve(true), () => {});
  const stop = new AbortController();
  let status = 0;
  for (const [signal, code] of Object.entries(exitStatuses) as [keyof typeof exitStatuses, number][]) {
    Deno.addSignalListener(signal, () => {
      // A program that is changing something runs in a process group of its own, and continues.
      if (status !== 0) Deno.exit(status);
      status = code;
      stop.abort(
        new StatusError("CANCELLED", `Cannot ${action}: interrupted, what has been done stays and may be repeated`),
      );
    });
  }
  try {
    return await work(backgroundContext(action, log, settings.timeout * 1000, stop.signal)) ?? 0;
  } catch (error) {
    if (status === 0 || !hasCode(error, "CANCELLED")) throw error;
    console.error(`lbcsi: ${error.message}`);
    return status;
  }
}

/** Writes all of a long text to stdout. A reader that closes the pipe early (`| head`) is not a failure. */
export async function writeOut(text: string): Promise<void> {
  try {
    await new Blob([text]).stream().pipeTo(Deno.stdout.writable, { preventClose: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
  }
}

import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import { addressOf, isAt, type NvmeController, readController } from "./controllers.ts";
import { runNvme, wordsOf } from "./nvme_cli.ts";

/**
 * Makes the kernel connect a live controller again, under its name. What is on its way over it fails over to other paths,
 * or waits. Until it is live again or that has failed, it blocks; a signal that aborts lets it go on in the kernel.
 *
 * @returns why it failed, or undefined
 */
export async function resetController(
  host: Host,
  ctx: RequestContext,
  { name }: NvmeController,
): Promise<string | undefined> {
  return await runNvme(host, ctx, ["reset", `${host.roots.dev}/${name}`], "kill");
}

/**
 * `nvme disconnect` of one controller. Not connected, or its name is that of another connection by now: done.
 *
 * @throws StatusError UNAVAILABLE with nvme-cli's words
 */
export async function disconnectController(
  host: Host,
  ctx: RequestContext,
  controller: NvmeController,
): Promise<void> {
  // Names are used anew, and a disconnect of the one before can have taken a minute.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  const result = await host.run("nvme", ["disconnect", `--device=${controller.name}`], {
    signal: ctx.signal,
    onAbort: "finish",
    log: ctx.log,
  });
  // nvme-cli 2.3 to 2.16 exit with 0 also when the kernel refused, and say so.
  if (result.code === 0 && !/failed to disconnect/i.test(result.stderr)) return;
  // It was gone before nvme-cli came to it.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  throw new StatusError(
    "UNAVAILABLE",
    `Cannot disconnect ${controller.name} from ${controller.subsystemNqn}: ${
      wordsOf(result) || `nvme exits ${result.code}`
    }`,
  );
}

/** Whether what a name stands for now is still this connection. */
export function isSameController(now: NvmeController | undefined, controller: NvmeController): boolean {
  const address = addressOf(controller);
  return now !== undefined && now.subsystemNqn === controller.subsystemNqn && now.hostNqn === controller.hostNqn &&
    (address === undefined || isAt(now, address));
}

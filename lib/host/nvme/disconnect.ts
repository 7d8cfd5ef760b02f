/** Disconnects controllers, and makes the kernel connect them again. */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import { addressOf, isAt, type NvmeController, readController } from "./controllers.ts";
import { runNvme, wordsOf } from "./nvme_cli.ts";

/**
 * Makes the kernel connect a live controller again, under the same name. Its outstanding I/O fails over to other paths, or
 * waits. Returns when the controller is live again or the attempt has failed; when the signal aborts, the kernel continues.
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
 * Disconnects one controller. Does nothing when it is not connected, or its name belongs to another connection by now.
 *
 * @throws StatusError UNAVAILABLE with the message of nvme-cli
 */
export async function disconnectController(
  host: Host,
  ctx: RequestContext,
  controller: NvmeController,
): Promise<void> {
  // The kernel reuses names, and disconnecting the controller before this one may have taken a minute.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  const result = await host.run("nvme", ["disconnect", `--device=${controller.name}`], {
    signal: ctx.signal,
    onAbort: "finish",
    log: ctx.log,
  });
  // nvme-cli 2.3 to 2.16 also exit with 0 when the kernel fails, and print a message.
  if (result.code === 0 && !/failed to disconnect/i.test(result.stderr)) return;
  // It had gone before nvme-cli started.
  if (!isSameController(await readController(host, controller.name), controller)) return;
  throw new StatusError(
    "UNAVAILABLE",
    `Cannot disconnect ${controller.name} from ${controller.subsystemNqn}: ${
      wordsOf(result) || `nvme exits ${result.code}`
    }`,
  );
}

/** Whether `now`, which has the name of `controller`, is still the same connection. */
export function isSameController(now: NvmeController | undefined, controller: NvmeController): boolean {
  const address = addressOf(controller);
  return now !== undefined && now.subsystemNqn === controller.subsystemNqn && now.hostNqn === controller.hostNqn &&
    (address === undefined || isAt(now, address));
}

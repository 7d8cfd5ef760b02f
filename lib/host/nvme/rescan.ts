/** Makes the kernel ask I/O controllers again for their namespaces and sizes. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { controllersOf, type NvmeController } from "./controllers.ts";
import { runNvme } from "./nvme_cli.ts";

/**
 * Makes the kernel read the namespaces of a subsystem again over one live controller, mainly their sizes. Failures are logged
 * only, because the kernel does so by itself when the cluster announces a change.
 */
export async function rescanNamespaces(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) return;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** The same over every live controller: for namespaces that are missing, because each controller shows its own list. */
export async function rescanAll(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) continue;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** Makes the kernel read again the namespaces that one live controller shows; returns why that failed, or undefined. */
export async function rescanController(
  host: Host,
  ctx: RequestContext,
  { name }: NvmeController,
): Promise<string | undefined> {
  return await runNvme(host, ctx, ["ns-rescan", `${host.roots.dev}/${name}`], "finish");
}

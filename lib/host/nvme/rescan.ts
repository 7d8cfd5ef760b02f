/** Makes the kernel ask I/O controllers again for their namespaces and sizes. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { controllersOf, type NvmeController } from "./controllers.ts";
import { runNvme } from "./nvme_cli.ts";

/**
 * Asks the kernel to look at the namespaces of a subsystem again over one live controller: at their sizes, most of all. At
 * best effort, for the kernel does so by itself when the cluster announces a change.
 */
export async function rescanNamespaces(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) return;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** The same over every live controller: for namespaces that are missing, for which one controller does not speak for all. */
export async function rescanAll(host: Host, ctx: RequestContext, subsystemNqn: string): Promise<void> {
  for (const controller of await controllersOf(host, subsystemNqn)) {
    if (controller.state !== "live") continue;
    const problem = await rescanController(host, ctx, controller);
    if (problem === undefined) continue;
    ctx.log.warning("could not rescan", { device: `${host.roots.dev}/${controller.name}`, error: problem });
  }
}

/** Asks the kernel to look again at the namespaces that one live controller shows; answers why not, or undefined. */
export async function rescanController(
  host: Host,
  ctx: RequestContext,
  { name }: NvmeController,
): Promise<string | undefined> {
  return await runNvme(host, ctx, ["ns-rescan", `${host.roots.dev}/${name}`], "finish");
}

/** Paths: the I/O controllers through which a namespace can be reached, and their ANA state. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { controllersOf, type NvmeController } from "./controllers.ts";
import type { BlockDevice } from "./devices.ts";
import { readAttribute } from "./sysfs.ts";

/** One controller's way to a namespace. */
export interface NamespacePath {
  readonly controller: NvmeController;
  /** `optimized`, `non-optimized`, `inaccessible` …; undefined where the kernel has no multipath. */
  readonly anaState: string | undefined;
}

/** Every path that sysfs shows over `controllers`, with the name of its device (`nvme1n3`). None without native multipath. */
export async function allPaths(
  host: Host,
  controllers: readonly NvmeController[],
): Promise<readonly (NamespacePath & { readonly device: string })[]> {
  const names = await host.list(`${host.roots.sysfs}/class/block`) ?? [];
  const paths = await Promise.all(names.map(async (name) => {
    // nvme1c2n3 is the path of nvme1n3 over controller nvme2.
    const [, subsystem, instance, namespace] = /^nvme(\d+)c(\d+)n(\d+)$/.exec(name) ?? [];
    const controller = controllers.find((controller) => controller.name === `nvme${instance}`);
    if (controller === undefined) return [];
    const anaState = await readAttribute(host, `class/block/${name}/ana_state`);
    return [{ controller, anaState, device: `nvme${subsystem}n${namespace}` }];
  }));
  return paths.flat();
}

/** The paths of a device over `controllers`, by controller name. Does not touch the device. */
export async function pathsOf(
  host: Host,
  device: BlockDevice,
  controllers: readonly NvmeController[],
): Promise<readonly NamespacePath[]> {
  const found = (await allPaths(host, controllers)).filter((path) => path.device === device.name)
    .map(({ controller, anaState }) => ({ controller, anaState }));
  // Without native multipath there are no such entries, and the device hangs on its one controller.
  return found.length > 0 ? found : controllers
    .filter((controller) => controller.subsystemNqn === device.subsystemNqn)
    .map((controller) => ({ controller, anaState: undefined }));
}

/** Whether reads and writes get through on this path now. */
export function isLivePath({ controller, anaState }: NamespacePath): boolean {
  return controller.state === "live" && (anaState === undefined || /optimized$/.test(anaState));
}

/**
 * Whether some namespace has no live path but over this controller, those over `others` counted. Without native multipath
 * the kernel shows no paths, and nobody is needed.
 */
export async function isNeeded(
  host: Host,
  controller: NvmeController,
  others: readonly NvmeController[],
): Promise<boolean> {
  const names = await host.list(`${host.roots.sysfs}/class/block`) ?? [];
  const live = new Set(others.filter(({ state }) => state === "live").map(({ name }) => name));
  // nvme1c2n3 is the path of nvme1n3 over controller nvme2.
  const paths = names.flatMap((name) => {
    const [, subsystem = "", instance = "", namespace = ""] = /^nvme(\d+)c(\d+)n(\d+)$/.exec(name) ?? [];
    return subsystem === "" ? [] : [{ name, controller: `nvme${instance}`, device: `nvme${subsystem}n${namespace}` }];
  });
  for (const { device } of paths.filter((path) => path.controller === controller.name)) {
    let isCarried = false;
    for (const path of paths) {
      if (path.device !== device || !live.has(path.controller)) continue;
      const state = await host.readText(`${host.roots.sysfs}/class/block/${path.name}/ana_state`);
      isCarried ||= state !== undefined && /optimized$/.test(state.trim());
    }
    if (!isCarried) return true;
  }
  return false;
}

/**
 * Throws UNAVAILABLE when no path of the device is live. Whoever touches it then waits in the kernel, where no signal
 * reaches him, until a path comes back or the kernel gives the connection up (`ctrl_loss_tmo`; with live connections whose
 * ANA state is inaccessible, never). Shows sysfs nothing of its connections, that is no reason to refuse.
 */
export async function assertHasPath(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const bare = device.encrypts === undefined ? device : device.encrypts.beneath;
  const paths = bare === undefined ? [] : await pathsOf(host, bare, await controllersOf(host, bare.subsystemNqn));
  if (paths.length === 0 || paths.some(isLivePath)) return;
  const states = paths.map((path) => {
    const { name, state } = path.controller;
    return `${name} ${state}${state === "live" ? `, ${path.anaState}` : ""}`;
  });
  throw ctx.error(
    "UNAVAILABLE",
    `${device.path} has no live path (${states.join("; ")}), what was not yet written waits for one; ` +
      `it goes on when a path comes back, or without what was not written when the kernel gives up (ctrl_loss_tmo)`,
  );
}

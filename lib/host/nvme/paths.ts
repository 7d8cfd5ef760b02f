/** Paths: the I/O controllers that lead to a namespace, and their ANA state. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { controllersOf, type NvmeController } from "./controllers.ts";
import type { BlockDevice } from "./devices.ts";
import { readAttribute } from "./sysfs.ts";

/** A path to a namespace over one controller. */
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
  const paths = await Promise.all((await pathEntries(host)).map(async (entry) => {
    const controller = controllers.find((controller) => controller.name === entry.controllerName);
    return controller === undefined
      ? []
      : [{ controller, anaState: await anaStateOf(host, entry), device: entry.device }];
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
  // Without native multipath there are no such entries, and the device has one controller.
  return found.length > 0 ? found : controllers
    .filter((controller) => controller.subsystemNqn === device.subsystemNqn)
    .map((controller) => ({ controller, anaState: undefined }));
}

/** Whether reads and writes can use this path now. */
export function isLivePath({ controller, anaState }: NamespacePath): boolean {
  return controller.state === "live" && (anaState === undefined || /optimized$/.test(anaState));
}

/**
 * Whether a namespace has no live path but over this controller; only `others` count besides. False without native multipath,
 * where the kernel shows no paths.
 */
export async function isNeeded(
  host: Host,
  controller: NvmeController,
  others: readonly NvmeController[],
): Promise<boolean> {
  const entries = await pathEntries(host);
  const live = new Set(others.filter(({ state }) => state === "live").map(({ name }) => name));
  for (const { device } of entries.filter(({ controllerName }) => controllerName === controller.name)) {
    let isCarried = false;
    for (const entry of entries) {
      if (entry.device !== device || !live.has(entry.controllerName)) continue;
      isCarried ||= /optimized$/.test(await anaStateOf(host, entry) ?? "");
    }
    if (!isCarried) return true;
  }
  return false;
}

/**
 * Throws UNAVAILABLE when no path of the device is live. A process that touches the device then blocks in the kernel and
 * cannot be killed, until a path comes back or the kernel gives the connection up (`ctrl_loss_tmo`; with live connections
 * whose ANA state is inaccessible, never). A device of which sysfs shows no connection passes.
 */
export async function assertHasPath(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const namespace = device.encrypts === undefined ? device : device.encrypts.beneath;
  const paths = namespace === undefined
    ? []
    : await pathsOf(host, namespace, await controllersOf(host, namespace.subsystemNqn));
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

/** The entry of a path in sysfs: `nvme1c2n3` is the path of `nvme1n3` over controller `nvme2`. */
interface PathEntry {
  readonly name: string;
  readonly controllerName: string;
  readonly device: string;
}

async function pathEntries(host: Host): Promise<readonly PathEntry[]> {
  const names = await host.list(`${host.roots.sysfs}/class/block`) ?? [];
  return names.flatMap((name) => {
    const [, subsystem, instance, namespace] = /^nvme(\d+)c(\d+)n(\d+)$/.exec(name) ?? [];
    if (subsystem === undefined) return [];
    return [{ name, controllerName: `nvme${instance}`, device: `nvme${subsystem}n${namespace}` }];
  });
}

async function anaStateOf(host: Host, { name }: PathEntry): Promise<string | undefined> {
  return await readAttribute(host, `class/block/${name}/ana_state`);
}

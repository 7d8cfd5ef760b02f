/** What sysfs shows of namespaces and of the connections that lead to them, read at one moment. */
import { formatAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { addressOf, allControllers, type NvmeController } from "./controllers.ts";
import { allDevices, type BlockDevice } from "./devices.ts";
import { hasMultipath } from "./multipath.ts";
import { allPaths, isLivePath, type NamespacePath } from "./paths.ts";

/** Namespaces, controllers and paths of this machine. */
export interface ConnectionView {
  readonly devices: readonly BlockDevice[];
  readonly controllers: readonly NvmeController[];
  readonly paths: readonly (NamespacePath & { readonly device: string })[];
  /** Whether the kernel has native multipath. */
  readonly multipath: boolean;
}

/** Reads sysfs and nothing else. */
export async function readConnectionView(host: Host): Promise<ConnectionView> {
  const [devices, controllers, multipath] = await Promise.all([
    allDevices(host),
    allControllers(host),
    hasMultipath(host),
  ]);
  return { devices, controllers, paths: await allPaths(host, controllers), multipath };
}

/** Whether I/O can reach a device. Where sysfs shows no paths of it, any live controller of its subsystem counts. */
export function hasUsablePath({ paths, controllers }: ConnectionView, device: BlockDevice): boolean {
  const devicePaths = paths.filter((path) => path.device === device.name);
  if (devicePaths.length > 0) return devicePaths.some(isLivePath);
  return controllers.some(({ state, subsystemNqn }) => state === "live" && subsystemNqn === device.subsystemNqn);
}

/** Whether reads and writes can go over this controller now, to any namespace. */
export function carries({ paths, devices }: ConnectionView, controller: NvmeController): boolean {
  const ownPaths = paths.filter((path) => path.controller.name === controller.name);
  if (ownPaths.length > 0) return ownPaths.some(isLivePath);
  // Where sysfs shows no paths of a device, any controller may carry it.
  return devices.some((device) =>
    device.subsystemNqn === controller.subsystemNqn && !paths.some((path) => path.device === device.name)
  );
}

/** `192.0.2.1:4420`, for messages; the text of sysfs when it has no such parts. */
export function addressText(controller: NvmeController): string {
  const address = addressOf(controller);
  return address === undefined ? controller.address : formatAddress(address);
}

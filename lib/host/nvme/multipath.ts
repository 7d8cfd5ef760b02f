/** Whether the kernel has native NVMe multipath: one device for all paths to a namespace. */
import type { Host } from "../host.ts";

/**
 * Why this kernel shows each path to a namespace as a device of its own, and what is needed instead; undefined when it has
 * native multipath, or sysfs does not show it.
 */
export async function multipathObstacle(
  host: Host,
): Promise<{ readonly found: string; readonly needed: string } | undefined> {
  const text = (await host.readText(`${host.roots.sysfs}/module/nvme_core/parameters/multipath`))?.trim();
  if (text === "Y") return undefined;
  if (text !== undefined) {
    return {
      found: `native NVMe multipath is off (nvme_core.multipath=${text})`,
      needed: "nvme_core.multipath=Y on the kernel's command line",
    };
  }
  if (await host.kindOf(`${host.roots.sysfs}/module/nvme_core`) === "absent") return undefined;
  return {
    found: "this kernel was built without native NVMe multipath (CONFIG_NVME_MULTIPATH)",
    needed: "a kernel with it",
  };
}

/**
 * Whether the kernel shows one device for all connections to a namespace. Without that, a second connection to a subsystem
 * shows each of its namespaces a second time.
 */
export async function hasMultipath(host: Host): Promise<boolean> {
  return (await host.readText(`${host.roots.sysfs}/module/nvme_core/parameters/multipath`))?.trim() === "Y";
}

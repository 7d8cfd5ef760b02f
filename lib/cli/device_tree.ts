/** Which devices belong to the device tree that a command works with. */
import type { Host } from "../host/host.ts";
import type { Mount } from "../host/mount_table.ts";

/**
 * Whether the device of a mount can be in the device tree that `host.roots` names. In a tree that is not the kernel's own
 * (`--sysfs` of a simulated machine) all other devices are missing, and nothing is wrong with their mounts.
 */
export function isOfDeviceTree(host: Host, table: readonly Mount[], { root, source }: Mount): boolean {
  const { dev, sysfs } = host.roots;
  // In a container, the tree of the kernel can be mounted elsewhere.
  if (sysfs === "/sys" || table.some((mount) => mount.fsType === "sysfs" && mount.path === sysfs)) return true;
  if (source.startsWith(`${dev}/`)) return true;
  // A device node that is bound to a file: its path in the file system that the tree is on.
  const path = root.replace(/\/\/deleted$/, "");
  const name = path.slice(path.lastIndexOf("/"));
  return path !== name && `${dev}${name}`.endsWith(path);
}

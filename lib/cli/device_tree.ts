import type { Host } from "../host/host.ts";
import type { Mount } from "../host/mount_table.ts";

/**
 * Whether a mount can be of a device of the tree that `host.roots` names. With a tree that is not the kernel's own (`--sysfs`
 * of a simulated machine), the devices of all others are missing in it, and nothing is wrong with their mounts.
 */
export function isOfDeviceTree(host: Host, table: readonly Mount[], { root, source }: Mount): boolean {
  const { dev, sysfs } = host.roots;
  // A container can have the kernel's at another place.
  if (sysfs === "/sys" || table.some((mount) => mount.fsType === "sysfs" && mount.path === sysfs)) return true;
  if (source.startsWith(`${dev}/`)) return true;
  // A device node that is bound to a file: its place in the file system that the tree is on.
  const place = root.replace(/\/\/deleted$/, "");
  const name = place.slice(place.lastIndexOf("/"));
  return place !== name && `${dev}${name}`.endsWith(place);
}

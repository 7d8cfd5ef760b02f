import type { Host } from "./host.ts";
import { type Mount, mountTable } from "./mount_table.ts";
import { attachedVolumes, type BlockDevice, deviceNumbered } from "./nvme/devices.ts";

/**
 * What a mount is to a volume: `ours`, its file system or (`node`) its device node; `dead`, a mount of an NVMe namespace
 * that is not on this machine any more; `foreign`, everything else.
 */
export type Relation = "ours" | "our node" | "dead" | "foreign";

/** How `mount` relates to the volume whose block device is `device`; undefined when the volume has none at present. */
export async function relationOf(host: Host, mount: Mount, device: BlockDevice | undefined): Promise<Relation> {
  const nodeName = namespaceName(mount.root);
  if (nodeName !== undefined) {
    // A node of the directory of devices, bound to a file: the number behind the file is what I/O goes to.
    const number = await quietly(host.blockNumber(mount.path));
    if (number !== undefined) {
      // The kernel removes the node with the device. A bound node does not keep the number: the next device can get that, and
      // the name too.
      if (mount.root.endsWith("//deleted")) return "dead";
      if (device !== undefined && number === device.number) return "our node";
      return await isPresent(host, number) ? "foreign" : "dead";
    }
    // A directory can have such a name too: pods choose the names of their subPaths.
  }
  const number = await numberOf(host, mount);
  if (device !== undefined && number === device.number) return "ours";
  // Only a mount of an NVMe namespace can be a dead one of ours; for others a missing number may mean anything.
  if (namespaceName(mount.source) === undefined) return "foreign";
  return number !== undefined && await isPresent(host, number) ? "foreign" : "dead";
}

/** The block device under a mounted file system; undefined when it has none, or it has gone. */
async function numberOf(host: Host, mount: Mount): Promise<string | undefined> {
  // btrfs shows a number of its own. Its source is the path of the device, which the kernel keeps from being used anew
  // while the mount lasts.
  if (mount.fsType === "btrfs") return await host.blockNumber(mount.source);
  return mount.number.startsWith("0:") ? undefined : mount.number;
}

/**
 * The namespace whose file system `mount` shows; undefined when that is none, or its device has gone. For who is to take
 * down a mount and does not know by heart which volume it is of.
 */
export async function deviceUnder(host: Host, mount: Mount): Promise<BlockDevice | undefined> {
  const number = await numberOf(host, mount);
  return number === undefined ? undefined : await deviceNumbered(host, number);
}

/**
 * `nvme0n1` of a path that ends in it, or the name of a mapper; the kernel adds `//deleted` to the root of a node that has
 * gone.
 */
function namespaceName(path: string): string | undefined {
  return /\/(nvme\d+n\d+|dm-\d+|lb-csi-nvme-uuid\.[0-9a-f-]{36})(?:\/\/deleted)?$/.exec(path)?.[1];
}

async function isPresent(host: Host, number: string): Promise<boolean> {
  return await host.kindOf(`${host.roots.sysfs}/dev/block/${number}`) !== "absent";
}

/** The mounts of the volume with this device, its device node included. */
export async function mountsOf(host: Host, table: readonly Mount[], device: BlockDevice): Promise<readonly Mount[]> {
  const found: Mount[] = [];
  for (const mount of table) {
    if (mount.number !== device.number && namespaceName(mount.root) === undefined && mount.fsType !== "btrfs") continue;
    const relation = await relationOf(host, mount, device);
    if (relation === "ours" || relation === "our node") found.push(mount);
  }
  return found;
}

/** A mount of the volume as a file system (`ours`) or as a block device (`our node`), wherever it is; undefined: none. */
export async function mountAs(
  host: Host,
  device: BlockDevice,
  relation: "ours" | "our node",
): Promise<Mount | undefined> {
  for (const mount of await mountsOf(host, await mountTable(host), device)) {
    if (await relationOf(host, mount, device) === relation) return mount;
  }
  return undefined;
}

/** The volumes that this machine is connected to and that are mounted here or held by another device. Touches none. */
export async function volumesInUse(host: Host): Promise<readonly BlockDevice[]> {
  const table = await mountTable(host);
  const used: BlockDevice[] = [];
  for (const device of await attachedVolumes(host)) {
    const holders = await host.list(`${host.roots.sysfs}/class/block/${device.name}/holders`) ?? [];
    if (holders.length > 0 || (await mountsOf(host, table, device)).length > 0) used.push(device);
  }
  return used;
}

/**
 * The file system of `device` that is mounted anywhere on this machine, in other containers too, as the kernel lists it in
 * sysfs (ext4, xfs and btrfs, seen on 6.18); undefined: none of these. A mount table shows one mount namespace only.
 */
export async function mountedSomewhere(host: Host, { name }: BlockDevice): Promise<string | undefined> {
  const fs = `${host.roots.sysfs}/fs`;
  const places: (readonly [fsType: string, path: string])[] = [
    ["ext4", `${fs}/ext4/${name}`],
    ["xfs", `${fs}/xfs/${name}`],
  ];
  for (const id of await host.list(`${fs}/btrfs`) ?? []) places.push(["btrfs", `${fs}/btrfs/${id}/devices/${name}`]);
  for (const [fsType, path] of places) {
    if (await host.kindOf(path) !== "absent") return fsType;
  }
  return undefined;
}

/** Processes end while they are looked at. */
export async function quietly<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise;
  } catch {
    return undefined;
  }
}

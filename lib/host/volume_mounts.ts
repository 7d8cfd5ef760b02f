/** The mounts of volumes: which mount belongs to which volume, and whether the volume's device still is there. */
import type { Host } from "./host.ts";
import { type Mount, mountTable } from "./mount_table.ts";
import { attachedVolumes, type BlockDevice, deviceNumbered } from "./nvme/devices.ts";

/**
 * How a mount relates to a volume: `ours` is the volume's file system, `our device node` its device node; `dead` is a mount of an NVMe
 * namespace that is not on this machine any more; `foreign` is everything else.
 */
export type Relation = "ours" | "our device node" | "dead" | "foreign";

/** How `mount` relates to the volume whose block device is `device`; undefined: it has none now. */
export async function relationOf(host: Host, mount: Mount, device: BlockDevice | undefined): Promise<Relation> {
  const nodeName = namespaceName(mount.root);
  if (nodeName !== undefined) {
    // A device node that is bound to a file: I/O goes to the device with the number behind the file.
    const number = await host.blockNumber(mount.path).catch(() => undefined);
    if (number !== undefined) {
      // The kernel removes the node with the device. A bound node does not reserve the number: the next device can get the
      // same number and the same name.
      if (mount.root.endsWith("//deleted")) return "dead";
      if (device !== undefined && number === device.number) return "our device node";
      return await isPresent(host, number) ? "foreign" : "dead";
    }
    // Directories can have such names too: pods choose the names of their subPaths.
  }
  const number = await numberOf(host, mount);
  if (device !== undefined && number === device.number) return "ours";
  // Only a mount of an NVMe namespace can be a dead one of ours; for other mounts a missing number proves nothing.
  if (namespaceName(mount.source) === undefined) return "foreign";
  return number !== undefined && await isPresent(host, number) ? "foreign" : "dead";
}

/** The block device under a mounted file system; undefined when it has none, or it has gone. */
async function numberOf(host: Host, mount: Mount): Promise<string | undefined> {
  // btrfs shows a number of its own. Its source is the path of the device; the kernel does not give that name to another
  // device while the mount lasts.
  if (mount.fsType === "btrfs") return await host.blockNumber(mount.source);
  return mount.number.startsWith("0:") ? undefined : mount.number;
}

/**
 * The namespace whose file system `mount` shows; undefined when it shows none, or the device has gone. For callers that
 * unmount a path without knowing its volume.
 */
export async function deviceUnder(host: Host, mount: Mount): Promise<BlockDevice | undefined> {
  const number = await numberOf(host, mount);
  return number === undefined ? undefined : await deviceNumbered(host, number);
}

/**
 * `nvme0n1`, or the name of a mapper, at the end of a path. The kernel appends `//deleted` to the root of a node that has
 * gone.
 */
function namespaceName(path: string): string | undefined {
  return /\/(nvme\d+n\d+|dm-\d+|lb-csi-nvme-uuid\.[0-9a-f-]{36})(?:\/\/deleted)?$/.exec(path)?.[1];
}

async function isPresent(host: Host, number: string): Promise<boolean> {
  return await host.kindOf(`${host.roots.sysfs}/dev/block/${number}`) !== "absent";
}

/** The mounts of the volume with this device, including those of its device node. */
export async function mountsOf(host: Host, table: readonly Mount[], device: BlockDevice): Promise<readonly Mount[]> {
  const found: Mount[] = [];
  for (const mount of table) {
    if (mount.number !== device.number && namespaceName(mount.root) === undefined && mount.fsType !== "btrfs") continue;
    const relation = await relationOf(host, mount, device);
    if (relation === "ours" || relation === "our device node") found.push(mount);
  }
  return found;
}

/** A mount of the volume as a file system (`ours`) or as a block device (`our device node`), at any path; undefined: none. */
export async function mountAs(
  host: Host,
  device: BlockDevice,
  relation: "ours" | "our device node",
): Promise<Mount | undefined> {
  for (const mount of await mountsOf(host, await mountTable(host), device)) {
    if (await relationOf(host, mount, device) === relation) return mount;
  }
  return undefined;
}

/** The volumes that are connected to this machine and are mounted here or held by another device. Touches no device. */
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
 * The type of the file system of `device` that is mounted anywhere on this machine, also in other containers, as sysfs shows it
 * (ext4, xfs and btrfs, seen on 6.18); undefined: none of these. A mount table shows one mount namespace only.
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

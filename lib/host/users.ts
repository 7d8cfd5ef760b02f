/**
 * What uses a block device of this machine without a mount of the device itself: devices on top of it (device-mapper, md,
 * LVM, bcache), mounts of its partitions, and swap. A disconnect under any of them loses what it has not yet written.
 *
 * The kernel lists devices on top in `holders` of the device, and those on top of a partition in `holders` of the partition
 * (Documentation/ABI/testing/sysfs-block). Nothing here touches a device.
 */
import type { Host } from "./host.ts";
import { loopDevicesOn } from "./loop_devices.ts";
import { foreignMountsOf, mountedSomewhere, mountsOf, mountTable, processesAt } from "./mounts.ts";
import type { BlockDevice } from "./nvme/sysfs.ts";

/**
 * Everything that holds `device` or a partition of it, in words for an error message: `dm-3 (vg0-data)`, `md0 on its
 * partition nvme0n1p2`, `the mount of its partition nvme0n1p1 at "/x"`, `the swap on it`. Mounts of the device itself are
 * not among them (mounts.ts). Empty: nothing holds it.
 */
export async function holdersOfDevice(host: Host, { name }: Pick<BlockDevice, "name">): Promise<readonly string[]> {
  const found = await holdersIn(host, `class/block/${name}/holders`);
  const swaps = await swapNames(host);
  if (swaps.has(name)) found.push("the swap on it");
  for (const partition of await partitionsOf(host, name)) {
    const base = `class/block/${name}/${partition}`;
    found.push(
      ...(await holdersIn(host, `${base}/holders`)).map((holder) => `${holder} on its partition ${partition}`),
    );
    if (swaps.has(partition)) found.push(`the swap on its partition ${partition}`);
    const number = (await host.readText(`${host.roots.sysfs}/${base}/dev`))?.trim();
    for (const mount of await mountTable(host)) {
      if (mount.number === number || mount.source === `${host.roots.dev}/${partition}`) {
        found.push(`the mount of its partition ${partition} at "${mount.path}"`);
      }
    }
  }
  return found;
}

async function holdersIn(host: Host, directory: string): Promise<string[]> {
  const names = await host.list(`${host.roots.sysfs}/${directory}`) ?? [];
  return await Promise.all(names.map(async (name) => {
    // LVM's and cryptsetup's names say more than a number does.
    const mapper = (await host.readText(`${host.roots.sysfs}/class/block/${name}/dm/name`))?.trim();
    return mapper === undefined || mapper === "" ? name : `${name} (${mapper})`;
  }));
}

/** `nvme0n1p1` … of `nvme0n1`: the directory of a disk holds one directory for each. */
async function partitionsOf(host: Host, name: string): Promise<readonly string[]> {
  const names = await host.list(`${host.roots.sysfs}/class/block/${name}`) ?? [];
  return names.filter((entry) => entry.startsWith(`${name}p`) && /^\d+$/.test(entry.slice(name.length + 1)));
}

/** Names of the block devices that the kernel swaps to (proc(5), `swaps`). */
async function swapNames(host: Host): Promise<ReadonlySet<string>> {
  const text = await host.readText(`${host.roots.proc}/swaps`) ?? "";
  return new Set([...text.matchAll(/^\/dev\/(\S+)\s+partition\s/gm)].map(([, name = ""]) => name));
}

/** What holds a device on this machine, in words for an error message: devices on top of it, and mounts. */
export async function usersOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, device);
  return [
    ...await holdersOfDevice(host, device),
    ...await loopDevicesOn(host, table, device.path),
    ...mounts.map((mount) => `the mount at "${mount.path}"`),
  ];
}

/**
 * The same, with what it takes more work to see: who has the device open, and mounts that our own mount table does not
 * show. Of those in containers that do not share their processes with us (`hostPID`) it sees the file system alone.
 */
export async function allUsersOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const users = [
    ...await usersOf(host, device),
    ...await foreignMountsOf(host, device),
    ...await processesAt(host, (place) => place === device.path),
  ];
  if (users.length > 0) return users;
  const fsType = await mountedSomewhere(host, device);
  return fsType === undefined ? [] : [`its ${fsType}, which is mounted where this process cannot see it`];
}

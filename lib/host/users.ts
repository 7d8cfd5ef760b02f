/**
 * What uses a block device or a path of this machine: devices on top of it (device-mapper, md, LVM, bcache), loop devices,
 * mounts, swap, and processes. A disconnect under any of them loses what it has not written yet.
 *
 * The kernel lists devices on top in `holders` of the device, and those on top of a partition in `holders` of the partition
 * (Documentation/ABI/testing/sysfs-block). Nothing here touches a device.
 */
import type { Host } from "./host.ts";
import { loopDevicesOn } from "./loop_devices.ts";
import { mountTable } from "./mount_table.ts";
import type { BlockDevice } from "./nvme/devices.ts";
import { foreignMountsOf, mostListed, processesAt } from "./processes.ts";
import { mountedSomewhere, mountsOf } from "./volume_mounts.ts";

/**
 * Everything that holds `device` or a partition of it, in words for an error message: `dm-3 (vg0-data)`, `md0 on its
 * partition nvme0n1p2`, `the mount of its partition nvme0n1p1 at "/x"`, `the swap on it`. Mounts of the device itself are
 * not among them (volume_mounts.ts). Empty: nothing holds it.
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
    // The names of LVM and cryptsetup say more than a number.
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

/** What uses a device on this machine, in words for an error message: devices on top of it, and mounts. */
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
 * The same, and what takes more work to find: processes that have the device open, and mounts that our own mount table does
 * not show. In containers that do not share their processes with us (`hostPID`), it finds the file system only.
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

/** Mounts below `path`, loop devices on it and processes with something open there, at most a few; for error messages. */
export async function holdersOf(host: Host, path: string): Promise<readonly string[]> {
  const table = await mountTable(host);
  const mounts = table.filter((mount) => mount.path.startsWith(`${path}/`)).map((mount) =>
    `the mount at "${mount.path}"`
  );
  const loops = (await loopDevicesOn(host, table, path)).map((name) => `the loop device ${name}`);
  const processes = await processesAt(host, (place) => place === path || place.startsWith(`${path}/`));
  return [...mounts, ...loops, ...processes].slice(0, mostListed);
}

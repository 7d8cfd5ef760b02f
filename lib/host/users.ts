/**
 * What uses a block device of this machine without a mount of the device itself: devices on top of it (device-mapper, md,
 * LVM, bcache), mounts of its partitions, and swap. A disconnect under any of them loses what it has not yet written.
 *
 * The kernel lists devices on top in `holders` of the device, and those on top of a partition in `holders` of the partition
 * (Documentation/ABI/testing/sysfs-block). Nothing here touches a device.
 */
import type { Host } from "./host.ts";
import { loopDevicesOn } from "./loop_devices.ts";
import { mountTable, parseMountTable } from "./mount_table.ts";
import type { BlockDevice } from "./nvme/devices.ts";
import { mountedSomewhere, mountsOf, quietly } from "./volume_mounts.ts";

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

const mostHolders = 5;

/** Mounts below `path`, loop devices on it and processes with something open there, at most a few; for error messages. */
export async function holdersOf(host: Host, path: string): Promise<readonly string[]> {
  const table = await mountTable(host);
  const mounts = table.filter((mount) => mount.path.startsWith(`${path}/`)).map((mount) =>
    `the mount at "${mount.path}"`
  );
  const loops = (await loopDevicesOn(host, table, path)).map((name) => `the loop device ${name}`);
  const processes = await processesAt(host, (place) => place === path || place.startsWith(`${path}/`));
  return [...mounts, ...loops, ...processes].slice(0, mostHolders);
}

/**
 * Processes that have something open, run from, or are in a place that `isThere`, at most a few: `process 7 (dd) with
 * "/mnt/x"`. Sees only the processes of this container unless it shares the machine's.
 */
export async function processesAt(host: Host, isThere: (place: string) => boolean): Promise<readonly string[]> {
  const found: string[] = [];
  const proc = host.roots.proc;
  for (const pid of await host.list(proc) ?? []) {
    if (found.length >= mostHolders) break;
    if (!/^\d+$/.test(pid)) continue;
    const links = [`${proc}/${pid}/cwd`, `${proc}/${pid}/root`, `${proc}/${pid}/exe`];
    for (const fd of await quietly(host.list(`${proc}/${pid}/fd`)) ?? []) links.push(`${proc}/${pid}/fd/${fd}`);
    for (const link of links) {
      const place = await quietly(host.readLink(link));
      if (place === undefined || !isThere(place)) continue;
      const name = (await quietly(host.readText(`${proc}/${pid}/comm`)))?.trim() ?? "unknown";
      found.push(`process ${pid} (${name}) with "${place}"`);
      break;
    }
  }
  return found;
}

/**
 * Mounts of a device in the mount namespaces of other processes, one for each namespace, at most a few: `the mount at "/x"
 * of process 7 (redis)`. For a device that somebody uses where our own mount table does not show it.
 */
export async function foreignMountsOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const proc = host.roots.proc;
  const seen = new Set([await quietly(host.readLink(`${proc}/self/ns/mnt`))]);
  const found: string[] = [];
  for (const pid of await host.list(proc) ?? []) {
    if (found.length >= mostHolders) break;
    if (!/^\d+$/.test(pid)) continue;
    const namespace = await quietly(host.readLink(`${proc}/${pid}/ns/mnt`));
    if (namespace === undefined || seen.has(namespace)) continue;
    const table = parseMountTable(await quietly(host.readText(`${proc}/${pid}/mountinfo`)) ?? "");
    // A process that ended while we looked leaves the namespace to another one of its own.
    if (table.length > 0) seen.add(namespace);
    // A file system goes by its number, btrfs by its source, and a bound device node by its place in devtmpfs.
    const mount = table.find(({ number, fsType, source, root }) =>
      number === device.number || fsType === "btrfs" && source === device.path ||
      fsType === "devtmpfs" && root === `/${device.name}`
    );
    if (mount === undefined) continue;
    const name = (await quietly(host.readText(`${proc}/${pid}/comm`)))?.trim() ?? "unknown";
    found.push(`the mount at "${mount.path}" of process ${pid} (${name})`);
  }
  return found;
}

/**
 * The mount table: who is mounted where, on which device, and whether that device is still the one it was.
 *
 * A mount outlives its device. Measured on kernel 6.1: after the device of a namespace has gone, mountinfo goes on
 * saying `259:1 … ext4 /dev/nvme0n1 rw`, df and stat work, and writes fail at fsync only. What tells is sysfs:
 * `dev/block/<major:minor>` is gone.
 */
import type { RequestContext } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Host } from "./host.ts";
import { loopDevicesOn } from "./loop_devices.ts";
import { assertHasPath } from "./nvme/paths.ts";
import { attachedVolumes, type BlockDevice, describeDevice, deviceNumbered } from "./nvme/sysfs.ts";

/** One line of mountinfo (proc(5)), unescaped. */
export interface Mount {
  /** `major:minor` of the file system; of an anonymous one (btrfs, tmpfs) it is no device. */
  readonly number: string;
  /** What of the file system is mounted: `/`, a directory, or a device node of devtmpfs. */
  readonly root: string;
  readonly path: string;
  /**
   * The directory or file under the mount, whatever path leads to it: the file system that shows it and where in that. Two
   * mounts with one place are one mount seen twice, as where a bind mount shows kubelet's directory at a second path.
   */
  readonly place: string;
  /** Options of this mount alone. */
  readonly options: readonly string[];
  /** `shared:5`: what is mounted below it shows in other mount namespaces too; `master:1`: theirs shows here. */
  readonly propagation: readonly string[];
  readonly fsType: string;
  readonly source: string;
  /** Options of the file system, whoever mounts it. */
  readonly superOptions: readonly string[];
}

/** The lines of a mountinfo text, oldest first; lines that cannot be read are left out. */
export function parseMountTable(text: string): readonly Mount[] {
  const lines = text.split("\n").flatMap((line) => {
    const [before, after] = split(line, " - ");
    const [id, parent, number, root, path, options, ...propagation] = before.split(" ");
    const [fsType, source, superOptions] = after.split(" ");
    if (number === undefined || root === undefined || path === undefined || options === undefined) return [];
    if (fsType === undefined || source === undefined) return [];
    const mount = {
      number,
      root: unescapeField(root),
      path: unescapeField(path),
      options: unescapeField(options).split(","),
      propagation,
      fsType,
      source: unescapeField(source),
      superOptions: unescapeField(superOptions ?? "").split(","),
    };
    return [{ id, parent, mount }];
  });
  const byId = new Map(lines.map(({ id, mount }) => [id, mount]));
  return lines.map(({ parent, mount }) => {
    const above = byId.get(parent);
    // The parent of the process' root is not in the table.
    return { ...mount, place: above === undefined ? mount.path : placeBelow(above, mount.path) };
  });
}

/** The place of `path`, which is at or below the path of `mount`: see Mount. */
function placeBelow(mount: Omit<Mount, "place">, path: string): string {
  const rest = path.slice(mount.path === "/" ? 0 : mount.path.length);
  return `${mount.number} ${mount.root === "/" ? "" : mount.root}${rest}`;
}

function split(text: string, separator: string): readonly [string, string] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + separator.length)];
}

/** Blank, tab, newline, backslash and hash are written as three octal digits; other bytes as they are. */
function unescapeField(text: string): string {
  if (!text.includes("\\")) return text;
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(parseInt(digits, 8)));
}

/** All mounts of this process' mount namespace, oldest first; throws UNAVAILABLE when there is no such table. */
export async function mountTable(host: Host): Promise<readonly Mount[]> {
  const path = `${host.roots.proc}/self/mountinfo`;
  const text = await host.readText(path);
  if (text === undefined) throw new StatusError("UNAVAILABLE", `Cannot read the mount table: ${path} is missing`);
  return parseMountTable(text);
}

/** The mounts stacked at `path` (free of symbolic links), lowest first. */
export function mountsAt(table: readonly Mount[], path: string): readonly Mount[] {
  return table.filter((mount) => mount.path === path);
}

/**
 * The mounts among `mounts` that are at none of these paths. What a path shows is left out wherever else it is seen too: a
 * mount that propagated to a second view of the same directory is no second use of the volume.
 *
 * @param paths free of symbolic links; undefined: none
 */
export function mountsElsewhere(
  table: readonly Mount[],
  mounts: readonly Mount[],
  ...paths: readonly (string | undefined)[]
): readonly Mount[] {
  const places = new Set(paths.flatMap((path) => path === undefined ? [] : placesAt(table, path)));
  return mounts.filter((mount) => !paths.includes(mount.path) && !places.has(mount.place));
}

/** The places of all that is mounted at `path`, and of the directory or file there when that is nothing. */
function placesAt(table: readonly Mount[], path: string): readonly string[] {
  const places = mountsAt(table, path).map((mount) => mount.place);
  const above = mountAbove(table, path);
  return above === undefined ? places : [...places, placeBelow(above, path)];
}

/** The mount that the directory of `path` is in. */
function mountAbove(table: readonly Mount[], path: string): Mount | undefined {
  const parent = path.slice(0, path.lastIndexOf("/") + 1);
  const isAbove = (mount: Mount) => parent.startsWith(mount.path === "/" ? "/" : `${mount.path}/`);
  return table.filter(isAbove).reduce<Mount | undefined>(
    // Of two at one path, the later one is on top.
    (best, mount) => best === undefined || mount.path.length >= best.path.length ? mount : best,
    undefined,
  );
}

/**
 * `path` as the mount table writes it: its directory without symbolic links. Undefined when the directory is missing. The
 * last part is not looked at, for it may be the root of a file system that does not answer.
 */
export async function canonicalPath(host: Host, path: string): Promise<string | undefined> {
  const trimmed = path.replace(/\/+$/, "");
  const slash = trimmed.lastIndexOf("/");
  const directory = slash <= 0 ? "/" : trimmed.slice(0, slash);
  const parent = await onNodeDisk(host, directory, "look at", () => host.realPath(directory));
  if (parent === undefined) return undefined;
  return `${parent === "/" ? "" : parent}/${trimmed.slice(slash + 1)}`;
}

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

// A healthy file system takes a write in milliseconds; a busy one in some hundred.
const longestWriteMs = 2000;

/** An unmount that is about to come. */
export interface ComingUnmount {
  readonly device: BlockDevice;
  /** Free of symbolic links. */
  readonly path: string;
}

/**
 * Throws UNAVAILABLE when the unmount at `path` would be the last of its file system and would not end well: without a path
 * to the device, umount(8) would hang in the kernel, and the volume would be held by it; a frozen file system would stay in
 * the kernel, without a mount by which somebody could thaw it. A repeat goes on when that has passed, or the last of the
 * device is gone: a dead mount is taken down at once.
 */
export async function assertUnmountCanEnd(
  host: Host,
  ctx: RequestContext,
  { device, path }: ComingUnmount,
): Promise<void> {
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, device);
  const here = mounts.find((mount) => mount.path === path);
  // Only the last unmount of a file system writes.
  if (here === undefined || here.superOptions.includes("ro") || here.fsType === "devtmpfs") return;
  if (mountsElsewhere(table, mounts, path).some((mount) => mount.fsType === here.fsType)) return;
  await assertHasPath(host, ctx, device);
  if (here.options.includes("ro")) return;
  // The kernel shows nowhere that a file system is frozen; what tells is that a write waits.
  const write = async () => {
    try {
      await host.tryWrite(path);
    } catch {
      // Full, broken or shut down: it has answered.
    }
  };
  const asked = { volume: device.uuid, what: `a write at "${path}"`, longestMs: longestWriteMs };
  const answer = await host.pending.ask(ctx, asked, write);
  if (answer.kind === "answered") return;
  const { what, ms } = answer.owed;
  throw ctx.error(
    "UNAVAILABLE",
    `${describeMount(here)} has not answered ${what} for ${Math.round(ms / 1000)} s, it is frozen or its ` +
      `storage does not answer; if a backup has left it frozen, thaw it on this node: fsfreeze --unfreeze ${path}`,
  );
}

/**
 * Throws FAILED_PRECONDITION while the kernel has the file system of `device` active although this mount table has no mount
 * of it: what is in memory is written with the last unmount, and that one was not here.
 */
export async function assertFileSystemInactive(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const fsType = await mountedSomewhere(host, device);
  if (fsType === undefined) return;
  const places = await foreignMountsOf(host, device);
  throw ctx.error(
    "FAILED_PRECONDITION",
    `its ${fsType} is still in use by ${
      places.length > 0
        ? places.join(", ")
        : `something that this process cannot see: a mount of another container, or a freeze that outlived its mounts; in ` +
          `that case mount ${device.path} somewhere on this node, thaw it (fsfreeze --unfreeze) and unmount it`
    }`,
  );
}

/**
 * Takes down every mount at `path` that is the volume's or dead, topmost first, and answers how many. Nothing there: 0.
 *
 * @throws StatusError FAILED_PRECONDITION when something foreign is mounted there (left as it is), or the mount is busy,
 *   saying by whom; UNAVAILABLE when umount fails otherwise
 */
export async function unmountAll(
  host: Host,
  ctx: RequestContext,
  path: string,
  device: BlockDevice | undefined,
): Promise<number> {
  const stacked = mountsAt(await mountTable(host), path);
  for (const mount of stacked.toReversed()) {
    if (await relationOf(host, mount, device) === "foreign") {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${describeMount(mount)} is mounted at "${path}", which is not this volume` +
          `${device === undefined ? "" : `, ${describeDevice(device)},`} and left as it is`,
      );
    }
    await unmount(host, ctx, path);
  }
  const left = mountsAt(await mountTable(host), path);
  if (left[0] !== undefined) {
    throw ctx.error("UNAVAILABLE", `${describeMount(left[0])} is still mounted at "${path}"`);
  }
  return stacked.length;
}

/**
 * Makes an empty file or directory to mount on. What is there already must be empty, for the mount would hide it.
 *
 * @param path free of symbolic links, in an existing directory
 * @throws StatusError FAILED_PRECONDITION for something else that is there
 */
export async function makeMountPoint(
  host: Host,
  ctx: RequestContext,
  path: string,
  wanted: "file" | "directory",
): Promise<void> {
  const kind = await onNodeDisk(host, path, "look at", () => host.kindOf(path));
  if (kind === "absent") {
    const make = () => wanted === "file" ? host.makeFile(path) : host.makeDirectory(path);
    return await onNodeDisk(host, path, `make the ${wanted}`, make);
  }
  if (kind !== wanted) {
    throw ctx.error("FAILED_PRECONDITION", `the target path "${path}" is there already and is not a ${wanted}`);
  }
  if (wanted === "directory" && !await isEmptyDirectory(host, path)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the target path "${path}" is not a mount point but holds files of the node's own disk`,
    );
  }
}

/** Removes the empty file or directory that makeMountPoint made; gone already: done. */
export async function removeMountPoint(host: Host, path: string): Promise<void> {
  await onNodeDisk(host, path, "remove", () => host.removeEmpty(path));
}

/** Whether nothing is in a directory on the node's own disk; a missing one is empty. */
export async function isEmptyDirectory(host: Host, path: string): Promise<boolean> {
  return (await onNodeDisk(host, path, "list", () => host.list(path)) ?? []).length === 0;
}

/**
 * Does a step with a path on the node's own disk, that of kubelet. What this disk answers is nobody's bug: a full or broken
 * one is UNAVAILABLE with the path and the disk, a name that is too long INVALID_ARGUMENT.
 */
export async function onNodeDisk<T>(host: Host, path: string, verb: string, step: () => Promise<T>): Promise<T> {
  try {
    return await step();
  } catch (error) {
    const code = systemCode(error);
    if (code === undefined) throw error;
    const known = diskProblems[code];
    if (code === "ENAMETOOLONG") {
      throw new StatusError("INVALID_ARGUMENT", `Cannot ${verb} "${path}": ${known}`, { cause: error });
    }
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${verb} "${path}", on this node's own disk (${await diskOf(host, path)}): ${
        known ?? messageOf(error)
      } (${code})`,
      { cause: error },
    );
  }
}

const diskProblems: Readonly<Record<string, string>> = {
  ENOSPC: "no space or no inode is left there",
  EDQUOT: "the quota there is used up",
  EROFS: "it is read-only",
  EACCES: "access is denied to the driver",
  EPERM: "the driver is not permitted to",
  EIO: "the disk answers with an error",
  ELOOP: "too many symbolic links are in it",
  ENAMETOOLONG: "a part of it, or the whole, is too long",
  ENOTDIR: "a part of it is not a directory",
};

/** `tmpfs at "/x"`: the mount that holds a path, as far as the mount table tells. */
async function diskOf(host: Host, path: string): Promise<string> {
  const above = mountAbove(await mountTable(host), path);
  return above === undefined ? "unknown" : `${above.fsType} at "${above.path}"`;
}

/** `ext4 of /dev/nvme0n1 (259:1)`. */
export function describeMount(mount: Mount): string {
  return `${mount.fsType} of ${mount.source} (${mount.number}${mount.root === "/" ? "" : `, ${mount.root}`})`;
}

/**
 * One `umount` of what is on top at `path`, whatever that is: never lazy, for the data must be on the device when it
 * returns, and never forced. Not mounted: done.
 *
 * @throws StatusError FAILED_PRECONDITION when it is busy, saying by whom; UNAVAILABLE when umount fails otherwise
 */
export async function unmount(host: Host, ctx: RequestContext, path: string): Promise<void> {
  const result = await host.run("umount", [path], { signal: ctx.signal, onAbort: "finish", log: ctx.log });
  // Unmounted by somebody else meanwhile.
  if (result.code === 0 || /not mounted|no mount point/.test(result.stderr)) return;
  const text = result.stderr.trim();
  if (/busy/.test(text)) {
    const holders = await holdersOf(host, path);
    throw ctx.error(
      "FAILED_PRECONDITION",
      `"${path}" is in use by ${holders.length === 0 ? "something that this process cannot see" : holders.join(", ")}`,
    );
  }
  throw ctx.error("UNAVAILABLE", `${text === "" ? `umount exits ${result.code}` : text}`);
}

const mostHolders = 5;

/** Mounts below `path`, loop devices on it and processes with something open there, at most a few; for error messages. */
async function holdersOf(host: Host, path: string): Promise<readonly string[]> {
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

/** Processes end while they are looked at. */
async function quietly<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise;
  } catch {
    return undefined;
  }
}

/**
 * File systems on block devices: what is there, making one, checking, mounting, growing.
 *
 * Never format what may hold data. `blkid -p` exits 2 for a blank device, and just the same for one that cannot be read,
 * is missing or has no size (util-linux 2.38.1); mkfs.ext4 without a terminal overwrites whatever is there without asking
 * (e2fsprogs 1.47.0). So a device counts as blank only when its name still is the right namespace, its size is not zero,
 * nobody uses it, blkid finds nothing, and we have read its head, its tail and samples in between ourselves and found
 * zeros. mkfs never gets a force flag.
 *
 * A mkfs that was killed half-way leaves a device which is neither blank nor a file system. The driver marks a device while
 * mkfs runs (see unfinished.ts), so it knows its own work and begins it again. Without the mark, and without one of earlier
 * versions, such a device is refused: zeros in the right places and metadata of an unknown writer are what a damaged file
 * system looks like too.
 */
import type { RequestContext } from "../../context.ts";
import { isFinal, messageOf, StatusError } from "../../error.ts";
import { reasonOf } from "../command_reason.ts";
import type { CommandResult, Host } from "../host.ts";
import { featureOptions, featureProblem } from "./kernel_features.ts";
import { isNeverUsed, markUsed } from "../luks.ts";
import { parseMkfsOptions, parseMountFlags } from "./options.ts";
import {
  describeMount,
  type Mount,
  mountAs,
  mountedSomewhere,
  mountsAt,
  mountsElsewhere,
  mountsOf,
  mountTable,
  processesAt,
  relationOf,
  takeDown,
  unmount,
} from "../mounts.ts";
import { type BlockDevice, nameUuid, recheckDevice } from "../nvme/sysfs.ts";
import { firstNonZero, samplesOf } from "./samples.ts";
import { hasLuksHeader, hasNoPartition, isWholeExt4, owningFileSystem, textAt, uuidAt } from "./superblocks.ts";
import { eraseMark, holdsData, isUnfinished, markOffset, wasUnfinishedWhenSmaller, writeMark } from "./unfinished.ts";

/** The file systems that a volume can be given. */
export const fsTypes = ["ext4", "xfs", "btrfs"] as const;
export type FsType = typeof fsTypes[number];

/** How a file system is to be mounted. */
export interface MountWish {
  /** Undefined: `defaultFsType` for a blank device, whatever is there otherwise. */
  readonly fsType: FsType | undefined;
  readonly defaultFsType: FsType;
  readonly flags: readonly string[];
  /** Nobody writes through this mount. */
  readonly readOnly: boolean;
  /** Other hosts may have it mounted at the same time. */
  readonly shared: boolean;
  /** Text of the StorageClass parameter `mkfs-options`. */
  readonly mkfsOptions: string;
  /** Whether a blank device is given a file system. Absent: it is, for that is what a volume's first mount means. */
  readonly formats?: boolean;
  /** Ends the error for a blank device that is not to be formatted; absent: that it takes a request to have it formatted. */
  readonly unformattedAdvice?: string;
}

/**
 * Mounts the file system of `device` at `path`, making one first on a blank device, and grows it to the size of the
 * device; what is mounted there already and works is left alone, a dead mount is taken down first. Repeat it after any
 * failure.
 *
 * Before it returns, the mount at `path` is of this very namespace, has answered a read, and takes writes if it should. It
 * has the size of the device, unless it is for reading only, or is an ext4 that pods use while the driver may not grow it
 * under them (a warning says so then).
 *
 * @param path free of symbolic links, an existing directory
 * @throws StatusError ALREADY_EXISTS when it is mounted there in another way; FAILED_PRECONDITION when the device holds
 *   something else, or something that is not blank either; INVALID_ARGUMENT for bad flags or options; UNAVAILABLE when
 *   the device cannot be read or changed meanwhile, or the file system is mounted and cannot be grown
 */
export async function mountVolume(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
  wish: MountWish,
): Promise<void> {
  const fsType = await mountAsItIs(host, ctx, device, path, wish);
  if (wish.readOnly || parseMountFlags(wish.flags).readOnly) return;
  // The device may be larger than the origin of a clone, or have grown since it was looked at, even in between.
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) {
    const action = `grow the ext4 of namespace ${device.uuid} at "${path}"`;
    const now = await recheckDevice(host, device, action);
    const { fsBytes, stepBytes, unusableBytes } = await measure(host, ctx, now, path, fsType, action);
    // What resize2fs has just left out at the end, it leaves out again.
    const leastBytes = now.sizeBytes > device.sizeBytes ? stepBytes : unusableBytes;
    if (now.sizeBytes - fsBytes < leastBytes) return;
    const table = await mountTable(host);
    if (mountsElsewhere(table, await mountsOf(host, table, device), path).length > 0) {
      ctx.log.warning("leaves a mounted ext4 smaller than its device, the right CAP_SYS_RESOURCE is missing", {
        device: device.path,
        path,
      });
      return;
    }
    // Nobody uses it yet: unmounted it can grow.
    await takeDown(host, ctx, path, device, action);
    await mountAsItIs(host, ctx, device, path, wish);
    return;
  }
  try {
    await ensureGrown(host, ctx, device, path, fsType);
  } catch (error) {
    // A final answer makes the orchestrator forget the mount that is there now, and nobody would take it down.
    if (!isFinal(error)) throw error;
    throw new StatusError("UNAVAILABLE", messageOf(error), { cause: error });
  }
}

/** Mounts it, see mountVolume, and leaves its size as it is unless it can only grow before it is mounted. */
async function mountAsItIs(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
  wish: MountWish,
): Promise<FsType> {
  const action = `mount namespace ${device.uuid} at "${path}"`;
  const flags = parseMountFlags(wish.flags);
  const readOnly = wish.readOnly || flags.readOnly;
  const stacked = mountsAt(await mountTable(host), path);
  const top = stacked.at(-1);
  if (top !== undefined) {
    const relation = await relationOf(host, top, device);
    if (relation === "ours") {
      const trouble = await troubleOf(host, ctx, device, top, readOnly);
      if (trouble === undefined) return refuseOtherMount(action, top, wish, readOnly);
      await refuseWhileUsedElsewhere(host, device, path, action, trouble);
      ctx.log.warning("mounts again what does not work", { device: device.path, path, error: trouble });
    }
    await takeDown(host, ctx, path, device, action);
  }

  const node = await mountAs(host, device, "our node");
  if (node !== undefined) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ${device.path} is in use as a block device at "${node.path}", a file system is damaged by that`,
    );
  }
  const found = await contentOf(host, ctx, device, action);
  if (found.kind === "luks") throw refuseEncrypted(action, device);
  let fsType: FsType;
  if (found.kind === "filesystem") {
    fsType = found.fsType;
    if (wish.fsType !== undefined && wish.fsType !== fsType) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: ${device.path} holds ${fsType}, the request wants ${wish.fsType}; it is never formatted again`,
      );
    }
    if (!readOnly && !wish.shared) {
      await eraseStaleMark(host, ctx, device, fsType, action);
      await check(host, ctx, device, fsType, found.isSmaller, action);
    }
    if (readOnly && wish.shared) await refuseUnreplayed(host, ctx, device, fsType, action);
  } else {
    if (readOnly || wish.shared) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: ${device.path} has no file system, and with read-only or shared access none is made; ` +
          `mount it once for writing`,
      );
    }
    if (wish.formats === false) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: ${device.path} ${
          found.kind === "blank" ? "is blank" : "holds a file system that was never finished"
        }, ${wish.unformattedAdvice ?? "and none is made unless it is asked for"}`,
      );
    }
    fsType = wish.fsType ?? wish.defaultFsType;
    await format(host, ctx, device, fsType, wish.mkfsOptions, found.kind === "unfinished", action);
  }
  await mount(host, ctx, device, path, fsType, { ...wish, readOnly, flags: flags.rest }, action);
  const mounted = mountsAt(await mountTable(host), path).at(-1);
  if (mounted === undefined || await relationOf(host, mounted, device) !== "ours") {
    // The name went to another namespace in between. Left there, it would be foreign to every call for either volume.
    if (mounted?.source === device.path) await unmount(host, ctx, path, action);
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${action}: after the mount, ${
        mounted === undefined ? "nothing" : describeMount(mounted)
      } is there instead of ${device.path} (${device.number})`,
    );
  }
  const trouble = await troubleOf(host, ctx, device, mounted, readOnly);
  if (trouble !== undefined) throw new StatusError("UNAVAILABLE", `Cannot ${action}: ${trouble}`);
  return fsType;
}

/**
 * Makes a file system on a blank device without mounting it; does nothing on a device that has one. For a volume that is
 * new and will be mounted read-only. Repeat it after any failure.
 *
 * @throws StatusError as mountVolume does for a device that is not blank and holds none
 */
export async function ensureFilesystem(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  wish: Pick<MountWish, "fsType" | "defaultFsType" | "mkfsOptions">,
): Promise<void> {
  const action = `make a file system on namespace ${device.uuid}`;
  const found = await contentOf(host, ctx, device, action);
  if (found.kind === "filesystem") return;
  if (found.kind === "luks") throw refuseEncrypted(action, device);
  const fsType = wish.fsType ?? wish.defaultFsType;
  await format(host, ctx, device, fsType, wish.mkfsOptions, found.kind === "unfinished", action);
}

/**
 * What is wrong with a mount of `device`, or undefined: the file system must look up a name in its root, the device must
 * answer a read, and a mount for writing must take writes (the kernel makes a damaged file system read-only without a word in the
 * mount table).
 */
export async function troubleOf(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
  readOnly: boolean,
): Promise<string | undefined> {
  return await readTroubleOf(host, ctx, device, mount) ??
    (readOnly ? undefined : await writeTroubleOf(host, ctx, device, mount));
}

/**
 * Why a mount of `device` cannot be read, or undefined. A volume that does not answer is not looked at as broken, for a
 * mount that hangs must be left alone.
 *
 * @throws the reason of `ctx.signal`; StatusError UNAVAILABLE while the volume owes an answer
 */
export async function readTroubleOf(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
): Promise<string | undefined> {
  const quote = `${describeMount(mount)} at "${mount.path}"`;
  const answer = answersOf(host, ctx, device, `use ${quote}`);
  try {
    await answer(`a look at "${mount.path}"`, () => host.lookUp(mount.path));
    // Somewhere, so that the answer does not come from a cache.
    const blocks = device.sizeBytes / 4096n;
    if (blocks === 0n) return `${device.path} has no size`;
    const block = BigInt(Math.floor(Math.random() * Number(blocks)));
    await answer(`a read of ${device.path}`, () => host.readBytes(device.path, block * 4096n, 4096));
  } catch (error) {
    if (error instanceof StatusError) throw error;
    ctx.signal.throwIfAborted();
    return `${quote} cannot be read (${messageOf(error)})`;
  }
  return undefined;
}

/** Why a mount for writing takes no writes, or undefined. Throws as readTroubleOf does. */
export async function writeTroubleOf(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
): Promise<string | undefined> {
  const quote = `${describeMount(mount)} at "${mount.path}"`;
  const state = ["ro", "emergency_ro", "shutdown"].find((option) => mount.superOptions.includes(option));
  if (state !== undefined) {
    return `${quote} is ${state === "shutdown" ? "shut down" : "read-only"} although it should not`;
  }
  if (mount.options.includes("ro")) return undefined;
  try {
    const answer = answersOf(host, ctx, device, `use ${quote}`);
    await answer(`a write at "${mount.path}"`, () => host.tryWrite(mount.path));
  } catch (error) {
    if (error instanceof StatusError) throw error;
    ctx.signal.throwIfAborted();
    // A full file system, or one without unnamed files, is not a broken one.
    if (/EROFS|EIO|ESHUTDOWN|EUCLEAN|ENODEV|ENXIO/.test(codeOf(error))) {
      return `${quote} takes no writes (${messageOf(error)})`;
    }
  }
  return undefined;
}

/** Asks the volume of `device`, until the caller gives up; a volume that owes an answer is UNAVAILABLE (see pending.ts). */
function answersOf(host: Host, ctx: RequestContext, { uuid }: BlockDevice, action: string) {
  return <T>(what: string, question: () => Promise<T>): Promise<T> =>
    host.pending.answer({ volume: uuid, what, signal: ctx.signal, action }, question);
}

function codeOf(error: unknown): string {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  return typeof code === "string" ? code : messageOf(error);
}

async function refuseWhileUsedElsewhere(
  host: Host,
  device: BlockDevice,
  path: string,
  action: string,
  trouble: string,
): Promise<void> {
  const table = await mountTable(host);
  const others = mountsElsewhere(table, await mountsOf(host, table, device), path);
  if (others.length === 0) return;
  // Mounted again beside them, it would be the same broken file system.
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: ${trouble}; it is still in use at ${
      others.map((mount) => `"${mount.path}"`).join(", ")
    }, the pods there have to end first`,
  );
}

// What of the options of a mount can be told from the mount table. The rest cannot be compared.
const visibleOptions = ["noexec", "nosuid", "nodev", "noatime", "nodiratime", "sync", "dirsync"];

function refuseOtherMount(action: string, mount: Mount, wish: MountWish, readOnly: boolean): FsType {
  const shown = new Set([...mount.options, ...mount.superOptions]);
  const wanted = new Set(parseMountFlags(wish.flags).rest);
  const differences: string[] = [];
  const fsType = fsTypes.find((fsType) => fsType === mount.fsType);
  if (fsType === undefined || (wish.fsType !== undefined && wish.fsType !== fsType)) {
    differences.push(`file system ${mount.fsType} instead of ${wish.fsType ?? fsTypes.join(" or ")}`);
  }
  const isReadOnly = shown.has("ro");
  if (isReadOnly !== readOnly) {
    differences.push(`${isReadOnly ? "read-only" : "writable"} instead of ${readOnly ? "read-only" : "writable"}`);
  }
  for (const option of visibleOptions) {
    // The kernel drops nodiratime beside noatime, which includes it.
    if (option === "nodiratime" && wanted.has("noatime")) continue;
    if (shown.has(option) !== wanted.has(option)) {
      differences.push(`${shown.has(option) ? "with" : "without"} ${option}`);
    }
  }
  // Without relatime and noatime the kernel keeps every access time.
  const isStrict = !shown.has("relatime") && !shown.has("noatime");
  if (!shown.has("noatime") && !wanted.has("noatime") && isStrict !== wanted.has("strictatime")) {
    differences.push(`${isStrict ? "with" : "without"} strictatime`);
  }
  if (differences.length === 0 && fsType !== undefined) return fsType;
  throw new StatusError("ALREADY_EXISTS", `Cannot ${action}: it is mounted there already, ${differences.join(", ")}`);
}

// ----------------------------------------------------------------------------------------------------- what is there

type Content =
  /** Encrypted on the host: luks.ts opens it. */
  | { readonly kind: "luks" }
  | { readonly kind: "filesystem"; readonly fsType: FsType; readonly isSmaller: boolean }
  | { readonly kind: "blank" }
  /** A mkfs of ours for this namespace that was cut off: see the head of this file. */
  | { readonly kind: "unfinished" };

/**
 * What the device holds: a file system that we can mount, or provably nothing.
 *
 * @throws StatusError FAILED_PRECONDITION for everything else, naming it; UNAVAILABLE when the device cannot be read, has no
 *   size, or is not this namespace any more
 */
export async function contentOf(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  action: string,
): Promise<Content> {
  const refuse = (problem: string) => new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${problem}`);
  const now = await recheckDevice(host, device, action);
  if (now.sizeBytes === 0n) {
    throw new StatusError("UNAVAILABLE", `Cannot ${action}: ${now.path} has no size, the namespace is not ready`);
  }
  const holders = await host.list(`${host.roots.sysfs}/class/block/${now.name}/holders`) ?? [];
  if (holders.length > 0) throw refuse(`${now.path} is in use by ${holders.join(", ")}`);
  const beneath = now.encrypts?.beneath;
  if (beneath !== undefined && await isNeverUsed(beneath, readerOf(host, ctx, beneath, action))) {
    return { kind: "unfinished" };
  }

  const read = readerOf(host, ctx, now, action);
  const type = await typeOf(host, ctx, now, action);
  if (await isHalfMade(read, now, type)) return { kind: "unfinished" };
  if (type === "crypto_LUKS") return { kind: "luks" };
  if (type !== undefined) {
    const size = await sizeFromSuperBlock(read, type);
    if (size === undefined) throw refuse(`the super block of ${type} on ${now.path} makes no sense`);
    if (size.fsBytes > now.sizeBytes) {
      throw refuse(
        `${type} on ${now.path} has ${size.fsBytes} bytes, but the device only ${now.sizeBytes}: it has shrunk, and the ` +
          `volume has to get its size back`,
      );
    }
    return { kind: "filesystem", fsType: type, isSmaller: now.sizeBytes - size.fsBytes >= size.stepBytes };
  }
  if (now.encrypts !== undefined) {
    // What was never written shows as noise. Only the mark of a new volume could tell, and it is gone.
    throw refuse(`${now.path} holds no file system, and may have been used without one; it is left alone`);
  }
  if (await isUnfinished(read, now)) return { kind: "unfinished" };
  try {
    await proveBlank(read, now, refuse);
  } catch (error) {
    if (!isFinal(error) || !await wasUnfinishedWhenSmaller(read, now)) throw error;
    return { kind: "unfinished" };
  }
  return { kind: "blank" };
}

/**
 * What the device holds of the things that we can open; undefined: nothing at all.
 *
 * blkid that is asked for everything takes a block near the end of the device for a member of a RAID, of DRBD or of ZFS, and
 * a second LUKS header in the middle for an encrypted volume. Either can be part of a tenant's file. So where it finds
 * anything else than one of our file systems, it is asked for those alone before the device is refused. One that it finds
 * then has to be whole: the super block of an ext4 stays where ZFS or a RAID was made over it, and e2fsck would write there.
 *
 * @throws StatusError FAILED_PRECONDITION for anything else, for a partition table, and for several of ours of which none is
 *   provably the real one
 */
async function typeOf(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  action: string,
): Promise<FsType | "crypto_LUKS" | undefined> {
  const refuse = (problem: string) => new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${problem}`);
  const read = readerOf(host, ctx, device, action);
  const probe = (...types: string[]) => probeSignatures(host, ctx, device, { types, action });
  const all = await probe();
  const tableError = refuse(`${device.path} holds a partition table (${all.partitions}), it is left alone`);
  const hasPartitions = all.partitions !== undefined && (all.partitions !== "dos" || !await hasNoPartition(read));
  if (hasPartitions) throw tableError;
  if (all.isNothing) return undefined;
  const fsType = fsTypes.find((fsType) => fsType === all.type);
  if (fsType === "ext4" && !await isWholeExt4(read, device.sizeBytes)) {
    throw refuse(
      `${device.path} has a super block of ext4 and no root directory where that leads to: it is damaged, or the remains ` +
        `of an ext4 under other data; it is left alone, e2fsck -n shows what is there`,
    );
  }
  if (fsType !== undefined) return fsType;
  if (all.type === "crypto_LUKS" && await hasLuksHeader(read)) return "crypto_LUKS";

  const ours = await probe(...fsTypes, "crypto_LUKS");
  if (ours.type !== undefined || ours.isAmbiguous) {
    if (ours.type === "crypto_LUKS" && await hasLuksHeader(read)) return "crypto_LUKS";
    const owner = await owningFileSystem(read, device.sizeBytes);
    // blkid tells ext4 from its predecessors, and checks checksums.
    if (owner !== undefined && (await probe(owner)).type === owner) return owner;
    // cryptsetup repairs a lost first header from the second one.
    if (ours.type === "crypto_LUKS" && (await probe(...fsTypes)).isNothing) return "crypto_LUKS";
    throw refuse(`${device.path} has signatures of more than one kind, it is left alone`);
  }
  if (all.partitions !== undefined) throw tableError;
  if (all.isAmbiguous) throw refuse(`${device.path} has signatures of more than one kind, it is left alone`);
  throw refuse(
    all.type === undefined
      ? `blkid finds something on ${device.path} that it does not name, it is left alone`
      : `${device.path} holds ${all.type}, which is none of ${fsTypes.join(", ")}; it is left alone`,
  );
}

interface Signatures {
  readonly type: string | undefined;
  /** The kind of a partition table. */
  readonly partitions: string | undefined;
  readonly isAmbiguous: boolean;
  /** blkid finds nothing, or cannot read the device: it answers the same for both. */
  readonly isNothing: boolean;
}

/** Asks `blkid -p` for these types, for all if there are none; throws UNAVAILABLE for an answer that is none. */
async function probeSignatures(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { types, action }: { readonly types: readonly string[]; readonly action: string },
): Promise<Signatures> {
  const filter = types.length === 0 ? [] : ["-n", types.join(",")];
  const args = ["-p", ...filter, "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device.path];
  const probed = await host.run("blkid", args, { signal: ctx.signal, onAbort: "kill", log: ctx.log });
  // blkid(8): 2 is "nothing found", 8 "ambivalent".
  if (probed.code !== 0 && probed.code !== 2 && probed.code !== 8) {
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${action}: blkid cannot tell what ${device.path} holds (exit ${probed.code}: ${
        reasonOf("blkid", probed)
      })`,
    );
  }
  const facts = new Map(
    probed.stdout.split("\n").map((line) => {
      const equals = line.indexOf("=");
      return [line.slice(0, equals), line.slice(equals + 1)] as const;
    }),
  );
  return {
    type: facts.get("TYPE"),
    partitions: facts.get("PTTYPE"),
    isAmbiguous: probed.code === 8,
    isNothing: probed.code === 2,
  };
}

type Reader = (offsetBytes: bigint, lengthBytes: number) => Promise<Uint8Array>;

function readerOf(host: Host, ctx: RequestContext, device: BlockDevice, action: string): Reader {
  return async (offsetBytes, lengthBytes) => {
    try {
      const answer = answersOf(host, ctx, device, action);
      return await answer(`a read of ${device.path}`, () => host.readBytes(device.path, offsetBytes, lengthBytes));
    } catch (error) {
      if (error instanceof StatusError) throw error;
      ctx.signal.throwIfAborted();
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ${action}: ${device.path} cannot be read at byte ${offsetBytes} (${messageOf(error)})`,
        { cause: error },
      );
    }
  };
}

/** Reads head, tail, and samples in between; throws `refuse` at the first byte that is not zero. */
async function proveBlank(read: Reader, device: BlockDevice, refuse: (problem: string) => StatusError): Promise<void> {
  for (const { offsetBytes, lengthBytes } of samplesOf(device.sizeBytes)) {
    const at = firstNonZero(await read(offsetBytes, lengthBytes));
    if (at === undefined) continue;
    throw refuse(
      `${device.path} is not blank and holds no file system: there is data at byte ${
        offsetBytes + BigInt(at)
      }; it is left ` +
        `alone. If nothing on it is needed, delete the volume and make it anew`,
    );
  }
}

/** The file system UUID that the driver gives a namespace's file system. */
export function fileSystemUuid(namespaceUuid: string): string {
  return nameUuid(`file system on ${namespaceUuid}`);
}

/** Whether a mkfs of ours began on the device and did not end, by what xfs says itself and earlier versions had btrfs say. */
async function isHalfMade(
  read: Reader,
  device: BlockDevice,
  mountable: FsType | "crypto_LUKS" | undefined,
): Promise<boolean> {
  // Whatever else is left there, a file system that is whole is not half-made. xfs is whole when it says so.
  if (mountable !== undefined && mountable !== "xfs") return false;
  if (device.sizeBytes < 1n << 20n) return false;
  const ours = fileSystemUuid(device.uuid);
  // xfs_format.h: sb_uuid at 32, sb_inprogress at 126. The magic may be wiped already, see format.
  const xfs = await read(0n, 4096);
  const isXfs = ["XFSB", "\0\0\0\0"].includes(textAt(xfs, 0, 4)) && uuidAt(xfs, 32) === ours && xfs[126] === 1;
  if (isXfs || mountable === "xfs") return isXfs && !await holdsData(read, device);
  // Earlier versions gave btrfs a UUID of ours. btrfs-progs writes "!BHRfS_M" turned round until all is in place; fsid at
  // 32, magic at 64 of the super block.
  const btrfs = await read(65536n, 4096);
  if (uuidAt(btrfs, 32) !== ours || textAt(btrfs, 64, 8) !== "!BHRfS_M") return false;
  return !await holdsData(read, device);
}

// ---------------------------------------------------------------------------------------------------- making, checking

async function format(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  mkfsOptions: string,
  unfinished: boolean,
  action: string,
): Promise<void> {
  const wanted = parseMkfsOptions(fsType, mkfsOptions);
  const mounted = await mountsOf(host, await mountTable(host), device);
  if (mounted[0] !== undefined) {
    throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: it is mounted at "${mounted[0].path}"`);
  }
  // A mkfs that outlived the driver which started it may still be at work. Those of ext4 and xfs hold the device for
  // themselves all the time, that of btrfs (6.2) does not.
  if (unfinished || fsType === "btrfs") {
    const users = await processesAt(host, (place) => place === device.path);
    if (users.length > 0) {
      throw new StatusError("UNAVAILABLE", `Cannot ${action}: ${device.path} is in use by ${users.join(", ")}`);
    }
  }
  // What was found there was read by a name, and may be of a device that has gone since.
  await recheckDevice(host, device, action);
  if (unfinished) {
    if (device.encrypts === undefined) {
      ctx.log.warning("makes a file system again that was never finished", { device: device.path });
    }
    // mkfs.xfs refuses to write over the magic of its own half-made work, and is never forced. Within a new encryption
    // there may be more than that: a whole file system of which the mark was not told any more.
    const types = device.encrypts === undefined ? ["--types", "xfs"] : [];
    const wiped = await changing(host, ctx, "wipefs", ["--quiet", "--all", ...types, device.path]);
    if (wiped.code !== 0) throw failed(action, "wipefs", wiped);
    await recheckDevice(host, device, action);
  }
  const options = [...await featureOptions(host, ctx, fsType, wanted), ...wanted];
  await writeMark(host, device, action);
  const args = mkfsArguments(fsType, device, options);
  const made = await changing(host, ctx, `mkfs.${fsType}`, args);
  if (made.code !== 0) {
    await takeBackMark(host, ctx, device, action);
    throw failed(action, `mkfs.${fsType}`, made);
  }
  await eraseMark(host, ctx, device, action);
  await markUsed(host, ctx, device, action);
}

function mkfsArguments(fsType: FsType, { path, uuid }: BlockDevice, options: readonly string[]): readonly string[] {
  switch (fsType) {
    case "ext4":
      // No reserved blocks: the volume has one user. A new namespace has nothing to discard. Zeros for the journal are most
      // of what mkfs writes, and no block of it can be taken for one of a journal: what is there is zero, or noise.
      return [
        ...["-q", "-m", "0", "-U", fileSystemUuid(uuid)],
        ...joined(joined(["-E", "nodiscard,lazy_journal_init=1", ...options], "-E"), "-O"),
        path,
      ];
    case "xfs":
      return ["-q", "-K", "-m", `uuid=${fileSystemUuid(uuid)}`, ...options, path];
    case "btrfs":
      // Without -U: to see that a UUID is unique, mkfs.btrfs reads every block device of the machine, and one that does not
      // answer holds it up.
      return ["-q", "-K", ...options, path];
  }
}

/** `args` with all values of `option` in one comma list, in their order: mke2fs takes the last such option only. */
function joined(args: readonly string[], option: string): readonly string[] {
  const values: string[] = [];
  const rest: string[] = [];
  for (let at = 0; at < args.length; at += 2) {
    const [name = "", value = ""] = args.slice(at, at + 2);
    if (name === option) values.push(value);
    else rest.push(name, value);
  }
  return values.length === 0 ? rest : [option, values.join(","), ...rest];
}

/** After a mkfs that refused: leaves the device as blank as it was, if it is. */
async function takeBackMark(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  action: string,
): Promise<void> {
  const offset = markOffset(device);
  if (offset === undefined) return;
  const read = readerOf(host, ctx, device, action);
  try {
    // What follows the mark is never written without something before it.
    await proveBlank(read, { ...device, sizeBytes: offset }, (problem) => new StatusError("UNAVAILABLE", problem));
    await eraseMark(host, ctx, device, action);
  } catch (error) {
    // What mkfs said matters more. The mark stays, and the next attempt begins again.
    ctx.signal.throwIfAborted();
    ctx.log.debug("leaves a device marked as unfinished", { device: device.path, error: messageOf(error) });
  }
}

/**
 * Erases the mark in a file system whose mkfs has ended, when the driver was killed before it could. Only in one that was never
 * mounted, or hardly: in any other, what looks like the mark is a tenant's. Left in a free block, it would make a volume that
 * lost its super block look like one that was never finished.
 */
async function eraseStaleMark(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  action: string,
): Promise<void> {
  if (await isFresh(readerOf(host, ctx, device, action), fsType)) await eraseMark(host, ctx, device, action);
}

/** Whether a file system is as its mkfs left it, or was used for next to nothing. */
async function isFresh(read: Reader, fsType: FsType): Promise<boolean> {
  switch (fsType) {
    case "ext4": {
      // s_mtime and s_mnt_count, which the kernel writes when it mounts.
      const view = viewOf(await read(0n, 4096), 1024);
      return view.getUint32(0x2c, true) === 0 && view.getUint16(0x34, true) === 0;
    }
    case "xfs":
      // sb_icount (xfs_format.h): mkfs makes one chunk of 64 inodes, and three of them are in use.
      return viewOf(await read(0n, 4096), 0).getBigUint64(128) <= 64n;
    case "btrfs":
      // The generation of the super block: mkfs.btrfs leaves it below ten, and each commit adds one.
      return viewOf(await read(65536n, 4096), 0).getBigUint64(0x48, true) <= 10n;
  }
}

function refuseEncrypted(action: string, device: BlockDevice): StatusError {
  return new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: ${device.path} holds crypto_LUKS, which is none of ${fsTypes.join(", ")}; it is left alone`,
  );
}

async function check(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  isSmaller: boolean,
  action: string,
): Promise<void> {
  // xfs and btrfs put themselves right when they are mounted; their check tools are for people.
  if (fsType !== "ext4") return;
  // Mounted elsewhere on this machine (by an earlier staging path, or in a container that kept a copy of the mount): it is in
  // order, and e2fsck would refuse.
  if ((await mountsOf(host, await mountTable(host), device)).length > 0) return;
  if (await mountedSomewhere(host, device) !== undefined) return;
  // Once mounted it grows much faster, without a full check; but that takes a right which not every container has.
  const growHere = isSmaller && !await canGrowMountedExt4(host);
  await recheckDevice(host, device, action);
  const checked = await changing(host, ctx, "e2fsck", growHere ? ["-f", "-p", device.path] : ["-p", device.path]);
  // e2fsck(8): the exit code is a sum; 1 is "errors corrected", 2 is "and the system should be rebooted" (a mounted root).
  if ((checked.code & ~3) === 0) {
    if (!growHere) return;
    await recheckDevice(host, device, action);
    const grown = await changing(host, ctx, "resize2fs", [device.path]);
    if (grown.code !== 0) throw failed(action, "resize2fs", grown);
    return;
  }
  if ((checked.code & 4) !== 0) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ext4 on ${device.path} has errors that e2fsck does not repair by itself, run e2fsck by hand ` +
        `(${reasonOf("e2fsck", checked)})`,
    );
  }
  throw failed(action, "e2fsck", checked);
}

/**
 * Throws FAILED_PRECONDITION when the log of a file system holds changes that are not yet in their places, as in a copy of
 * a volume in use. Shared read-only mounts leave the log alone, for other hosts read the device too; files would then be
 * missing without a word (seen with xfs: an empty directory).
 */
async function refuseUnreplayed(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  action: string,
): Promise<void> {
  if (!await hasUnreplayed(host, ctx, device, fsType, action)) return;
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: the log of its ${fsType} holds changes that a shared read-only mount would not show, as in a copy ` +
      `of a volume in use; mount it once with access for one node, or make it from a source that was unmounted`,
  );
}

async function hasUnreplayed(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  action: string,
): Promise<boolean> {
  const read = readerOf(host, ctx, device, action);
  switch (fsType) {
    case "ext4":
      // INCOMPAT_RECOVER in s_feature_incompat.
      return (viewOf(await read(0n, 4096), 1024).getUint32(0x60, true) & 4) !== 0;
    case "btrfs":
      // log_root of the super block: what was synced file by file since the last commit.
      return viewOf(await read(65536n, 4096), 0).getBigUint64(0x60, true) !== 0n;
    case "xfs": {
      const log = await host.run("xfs_logprint", ["-t", device.path], {
        signal: ctx.signal,
        onAbort: "kill",
        log: ctx.log,
      });
      const state = /^\s*log tail: .* state: <(CLEAN|DIRTY)>/m.exec(log.stdout)?.[1];
      if (state === undefined) throw failed(action, "xfs_logprint", log);
      return state === "DIRTY";
    }
  }
}

/** The kernel lets only holders of CAP_SYS_RESOURCE (24) grow a mounted ext4, root or not. */
async function canGrowMountedExt4(host: Host): Promise<boolean> {
  const status = await host.readText(`${host.roots.proc}/self/status`);
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status ?? "")?.[1];
  return effective !== undefined && (BigInt(`0x${effective}`) & (1n << 24n)) !== 0n;
}

async function mount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
  fsType: FsType,
  wish: { readonly flags: readonly string[]; readonly readOnly: boolean; readonly shared: boolean },
  action: string,
): Promise<void> {
  await recheckDevice(host, device, action);
  const options = [wish.readOnly ? "ro" : "rw"];
  // A clone has the UUID of its origin and may be mounted beside it.
  if (fsType === "xfs") options.push("nouuid");
  if (wish.shared && wish.readOnly) {
    // Other hosts read it too: not even the journal may be replayed.
    options.push({ ext4: "noload", xfs: "norecovery", btrfs: "rescue=nologreplay" }[fsType]);
  }
  // s_errors of the super block: a volume must not be able to stop the node (EXT4_ERRORS_PANIC).
  const panics = fsType === "ext4" &&
    viewOf(await readerOf(host, ctx, device, action)(0n, 4096), 1024).getUint16(0x3c, true) === 3;
  if (panics && !wish.flags.some((flag) => flag.startsWith("errors="))) options.push("errors=remount-ro");
  // Without -w, mount falls back to a read-only mount of a write-protected device and calls that a success.
  const writable = wish.readOnly ? [] : ["-w"];
  const args = [...writable, "-t", fsType, "-o", [...options, ...wish.flags].join(","), device.path, path];
  const mounted = await changing(host, ctx, "mount", args);
  if (mounted.code === 0) return;
  if (fsType === "btrfs" && mounted.stderr.includes("File exists")) {
    // EEXIST: before Linux 6.7 the kernel knows one btrfs by each UUID, and a clone has the UUID of its origin.
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: this node has another btrfs with the same UUID, its origin or a clone of it; this kernel mounts ` +
        `them on different nodes only, Linux 6.7 and later also on one`,
    );
  }
  const failure = failed(action, "mount", mounted);
  const problem = await featureProblem(host, ctx, fsType, readerOf(host, ctx, device, action));
  if (problem !== undefined) {
    throw new StatusError(failure.code, `${failure.message}; ${problem}: use a node with a newer kernel`);
  }
  if (wish.flags.length === 0) throw failure;
  // mount has the same words for a damaged file system and for a flag that the kernel does not take.
  throw new StatusError(
    failure.code,
    `${failure.message}; its mount flags are ${
      wish.flags.join(",")
    }, the kernel log (dmesg) says when it refuses one of them`,
  );
}

async function changing(host: Host, ctx: RequestContext, program: string, args: readonly string[]) {
  return await host.run(program, args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
}

function failed(action: string, program: string, result: CommandResult): StatusError {
  return new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: ${program} failed with exit ${result.code} (${reasonOf(program, result)})`,
  );
}

// -------------------------------------------------------------------------------------------------------------- growth

interface FsSize {
  readonly fsBytes: bigint;
  /** The least that it can grow by, in bytes. */
  readonly stepBytes: bigint;
  /** The most that it may be unable to use at the end of its device, in bytes. */
  readonly unusableBytes: bigint;
}

/**
 * Grows the mounted file system to the size of its device if it is smaller, and measures it afterwards; never shrinks.
 * Answers the size of the file system in bytes. Large enough: done, without a command.
 *
 * @throws StatusError FAILED_PRECONDITION when the mount is read-only or the tool fails; UNAVAILABLE when the file system
 *   has not grown although the tool says so
 */
export async function ensureGrown(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
  fsType: FsType,
): Promise<bigint> {
  const action = `grow the ${fsType} of namespace ${device.uuid} at "${path}"`;
  const now = await recheckDevice(host, device, action);
  const before = await measure(host, ctx, now, path, fsType, action);
  if (now.sizeBytes - before.fsBytes < before.stepBytes) return before.fsBytes;
  const mount = mountsAt(await mountTable(host), path).at(-1);
  // Some of the tools are told the path alone, and grow what they find on top there.
  if (mount === undefined || await relationOf(host, mount, now) !== "ours") {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ${
        mount === undefined ? "nothing" : describeMount(mount)
      } is mounted there instead of ${now.path}`,
    );
  }
  if (mount.superOptions.includes("ro") || mount.options.includes("ro")) {
    throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: it is mounted read-only`);
  }
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: the driver lacks the capability CAP_SYS_RESOURCE to grow it while it is mounted; it grows when it ` +
        `is staged the next time, or run the node service privileged`,
    );
  }
  const [program, ...args] = {
    ext4: ["resize2fs", now.path],
    xfs: ["xfs_growfs", "-d", path],
    btrfs: ["btrfs", "filesystem", "resize", "max", path],
  }[fsType];
  const grown = await changing(host, ctx, program as string, args);
  if (grown.code !== 0) throw failed(action, program as string, grown);
  const after = await measure(host, ctx, now, path, fsType, action);
  // resize2fs leaves out a last block group that is too small to hold its own tables.
  if (now.sizeBytes - after.fsBytes >= after.unusableBytes) {
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${action}: ${program} succeeded, but it has ${after.fsBytes} of the ${now.sizeBytes} bytes of ${now.path}`,
    );
  }
  return after.fsBytes;
}

async function measure(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
  fsType: FsType,
  action: string,
): Promise<FsSize> {
  const read = readerOf(host, ctx, device, action);
  const onDisk = await sizeFromSuperBlock(read, fsType);
  if (onDisk === undefined) {
    throw new StatusError("UNAVAILABLE", `Cannot ${action}: ${device.path} has no super block of ${fsType}`);
  }
  // ext4 keeps its super block where we read it. The others write theirs now and then, and statfs knows more.
  if (fsType === "ext4") return onDisk;
  const answer = answersOf(host, ctx, device, action);
  const usage = await answer(`statfs of "${path}"`, () => host.usage(path));
  // statfs of xfs leaves out the journal, whose size never changes.
  const mounted = usage.totalBytes + (onDisk.journalBytes ?? 0n);
  return { ...onDisk, fsBytes: mounted > onDisk.fsBytes ? mounted : onDisk.fsBytes };
}

/** Reads the size that a super block tells; undefined when there is none of this type. */
async function sizeFromSuperBlock(
  read: Reader,
  fsType: FsType,
): Promise<(FsSize & { readonly journalBytes?: bigint }) | undefined> {
  switch (fsType) {
    case "ext4": {
      // ext4's disk layout: little endian, at byte 1024.
      const view = viewOf(await read(0n, 4096), 1024);
      if (view.getUint16(0x38, true) !== 0xef53) return undefined;
      const logBlockSize = view.getUint32(0x18, true);
      if (logBlockSize > 6) return undefined;
      const blockBytes = 1024n << BigInt(logBlockSize);
      const is64bit = (view.getUint32(0x60, true) & 0x80) !== 0;
      const high = is64bit ? BigInt(view.getUint32(0x150, true)) << 32n : 0n;
      const blocks = high | BigInt(view.getUint32(4, true));
      return {
        fsBytes: blocks * blockBytes,
        stepBytes: blockBytes,
        // One block group.
        unusableBytes: BigInt(view.getUint32(0x20, true)) * blockBytes,
      };
    }
    case "xfs": {
      // xfs_format.h: big endian.
      const view = viewOf(await read(0n, 4096), 0);
      if (view.getUint32(0) !== 0x58465342) return undefined;
      const blockBytes = BigInt(view.getUint32(4));
      // An allocation group has 64 blocks at least, so a shorter rest cannot be used.
      return {
        fsBytes: view.getBigUint64(8) * blockBytes,
        stepBytes: 64n * blockBytes,
        unusableBytes: 64n * blockBytes,
        journalBytes: BigInt(view.getUint32(96)) * blockBytes,
      };
    }
    case "btrfs": {
      // btrfs' disk format: little endian, super block at 64 KiB; total_bytes at 0x70.
      const view = viewOf(await read(65536n, 4096), 0);
      if (view.getBigUint64(0x40, true) !== 0x4d5f53665248425fn) return undefined;
      return { fsBytes: view.getBigUint64(0x70, true), stepBytes: 1n << 20n, unusableBytes: 1n << 20n };
    }
  }
}

function viewOf(bytes: Uint8Array, at: number): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset + at, bytes.byteLength - at);
}

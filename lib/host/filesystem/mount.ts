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
import type { Host } from "../host.ts";
import { describeMount, type Mount, mountsAt, mountsElsewhere, mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { unmount, unmountAll } from "../unmount.ts";
import { mountAs, mountsOf, relationOf } from "../volume_mounts.ts";
import { viewOf } from "./bytes.ts";
import { assertReplayed, checkFileSystem } from "./check.ts";
import { runTool, toolError } from "./run_tool.ts";
import { contentOf } from "./content.ts";
import { createDeviceReader } from "./device_reader.ts";
import { encryptedError, eraseStaleMark, format } from "./format.ts";
import { type FsType, fsTypes } from "./fs_type.ts";
import { canGrowMountedExt4, ensureGrown } from "./grow.ts";
import { checkMount } from "./health.ts";
import { featureProblem } from "./kernel_features.ts";
import { parseMountFlags } from "./mount_flags.ts";
import { measureFileSystem } from "./size.ts";

/** How a file system is to be mounted. */
export interface MountOptions {
  /** Where it is mounted: an existing directory, free of symbolic links. */
  readonly path: string;
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
  wish: MountOptions,
): Promise<void> {
  const { path } = wish;
  const fsType = await mountAsItIs(host, ctx, device, wish);
  if (wish.readOnly || parseMountFlags(wish.flags).readOnly) return;
  // The device may be larger than the origin of a clone, or have grown since it was looked at, even in between.
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) {
    const growing = ctx.doing(`grow the ext4 of namespace ${device.uuid} at "${path}"`);
    const now = await recheckDevice(host, growing, device);
    const { fsBytes, stepBytes, unusableBytes } = await measureFileSystem(host, growing, now, { path, fsType });
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
    await unmountAll(host, growing, path, device);
    await mountAsItIs(host, ctx, device, wish);
    return;
  }
  try {
    await ensureGrown(host, ctx, device, { path, fsType });
  } catch (error) {
    // A final answer makes the orchestrator forget the mount that is there now, and nobody would take it down.
    if (!isFinal(error)) throw error;
    throw new StatusError("UNAVAILABLE", messageOf(error), { cause: error });
  }
}

/** Mounts it, see mountVolume, and leaves its size as it is unless it can only grow before it is mounted. */
async function mountAsItIs(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  wish: MountOptions,
): Promise<FsType> {
  const { path } = wish;
  const ctx = outer.doing(`mount namespace ${device.uuid} at "${path}"`);
  const flags = parseMountFlags(wish.flags);
  const readOnly = wish.readOnly || flags.readOnly;
  const stacked = mountsAt(await mountTable(host), path);
  const top = stacked.at(-1);
  if (top !== undefined) {
    const relation = await relationOf(host, top, device);
    if (relation === "ours") {
      const condition = await checkMount(host, ctx, device, { mount: top, readOnly });
      if (condition === undefined) return assertSameMount(ctx, top, wish, readOnly);
      await assertNotUsedElsewhere(host, ctx, device, { path, condition });
      ctx.log.warning("mounts again what does not work", { device: device.path, path, error: condition });
    }
    await unmountAll(host, ctx, path, device);
  }

  const node = await mountAs(host, device, "our node");
  if (node !== undefined) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${device.path} is in use as a block device at "${node.path}", a file system is damaged by that`,
    );
  }
  const found = await contentOf(host, ctx, device);
  if (found.kind === "luks") throw encryptedError(ctx, device);
  let fsType: FsType;
  if (found.kind === "filesystem") {
    fsType = found.fsType;
    if (wish.fsType !== undefined && wish.fsType !== fsType) {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${device.path} holds ${fsType}, the request wants ${wish.fsType}; it is never formatted again`,
      );
    }
    if (!readOnly && !wish.shared) {
      await eraseStaleMark(host, ctx, device, fsType);
      await checkFileSystem(host, ctx, device, fsType, found.isSmaller);
    }
    if (readOnly && wish.shared) await assertReplayed(host, ctx, device, fsType);
  } else {
    if (readOnly || wish.shared) {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${device.path} has no file system, and with read-only or shared access none is made; ` +
          `mount it once for writing`,
      );
    }
    if (wish.formats === false) {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${device.path} ${found.kind === "blank" ? "is blank" : "holds a file system that was never finished"}, ${
          wish.unformattedAdvice ?? "and none is made unless it is asked for"
        }`,
      );
    }
    fsType = wish.fsType ?? wish.defaultFsType;
    await format(host, ctx, device, fsType, wish.mkfsOptions, found.kind === "unfinished");
  }
  await mount(host, ctx, device, fsType, { ...wish, readOnly, flags: flags.rest });
  const mounted = mountsAt(await mountTable(host), path).at(-1);
  if (mounted === undefined || await relationOf(host, mounted, device) !== "ours") {
    // The name went to another namespace in between. Left there, it would be foreign to every call for either volume.
    if (mounted?.source === device.path) await unmount(host, ctx, path);
    throw ctx.error(
      "UNAVAILABLE",
      `after the mount, ${
        mounted === undefined ? "nothing" : describeMount(mounted)
      } is there instead of ${device.path} (${device.number})`,
    );
  }
  const condition = await checkMount(host, ctx, device, { mount: mounted, readOnly });
  if (condition !== undefined) throw ctx.error("UNAVAILABLE", condition);
  return fsType;
}

async function assertNotUsedElsewhere(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { path, condition }: { readonly path: string; readonly condition: string },
): Promise<void> {
  const table = await mountTable(host);
  const others = mountsElsewhere(table, await mountsOf(host, table, device), path);
  if (others.length === 0) return;
  // Mounted again beside them, it would be the same broken file system.
  throw ctx.error(
    "FAILED_PRECONDITION",
    `${condition}; it is still in use at ${
      others.map((mount) => `"${mount.path}"`).join(", ")
    }, the pods there have to end first`,
  );
}

// What of the options of a mount can be told from the mount table. The rest cannot be compared.
const visibleOptions = ["noexec", "nosuid", "nodev", "noatime", "nodiratime", "sync", "dirsync"];

function assertSameMount(ctx: RequestContext, mount: Mount, wish: MountOptions, readOnly: boolean): FsType {
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
  throw ctx.error("ALREADY_EXISTS", `it is mounted there already, ${differences.join(", ")}`);
}

export async function mount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  wish: Pick<MountOptions, "path" | "flags" | "readOnly" | "shared">,
): Promise<void> {
  await recheckDevice(host, ctx, device);
  const options = [wish.readOnly ? "ro" : "rw"];
  // A clone has the UUID of its origin and may be mounted beside it.
  if (fsType === "xfs") options.push("nouuid");
  if (wish.shared && wish.readOnly) {
    // Other hosts read it too: not even the journal may be replayed.
    options.push({ ext4: "noload", xfs: "norecovery", btrfs: "rescue=nologreplay" }[fsType]);
  }
  // s_errors of the super block: a volume must not be able to stop the node (EXT4_ERRORS_PANIC).
  const panics = fsType === "ext4" &&
    viewOf(await createDeviceReader(host, ctx, device)(0n, 4096), 1024).getUint16(0x3c, true) === 3;
  if (panics && !wish.flags.some((flag) => flag.startsWith("errors="))) options.push("errors=remount-ro");
  // Without -w, mount falls back to a read-only mount of a write-protected device and calls that a success.
  const writable = wish.readOnly ? [] : ["-w"];
  const args = [...writable, "-t", fsType, "-o", [...options, ...wish.flags].join(","), device.path, wish.path];
  const mounted = await runTool(host, ctx, "mount", args);
  if (mounted.code === 0) return;
  if (fsType === "btrfs" && mounted.stderr.includes("File exists")) {
    // EEXIST: before Linux 6.7 the kernel knows one btrfs by each UUID, and a clone has the UUID of its origin.
    throw ctx.error(
      "FAILED_PRECONDITION",
      `this node has another btrfs with the same UUID, its origin or a clone of it; this kernel mounts ` +
        `them on different nodes only, Linux 6.7 and later also on one`,
    );
  }
  const failure = toolError(ctx, "mount", mounted);
  const problem = await featureProblem(host, ctx, fsType, createDeviceReader(host, ctx, device));
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

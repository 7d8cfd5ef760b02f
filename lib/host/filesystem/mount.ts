/** Mounts the file system of a volume, which is made on a blank device, checked, and grown to the size of its device. */
import type { RequestContext } from "../../context.ts";
import { isFinal, messageOf, StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import { describeMount, type Mount, mountsAt, mountsElsewhere, mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { unmount, unmountAll } from "../unmount.ts";
import { mountAs, mountsOf, relationOf } from "../volume_mounts.ts";
import { assertReplayed, repairFileSystem } from "./check.ts";
import { type EmptyContent, encryptedError, probeContent } from "./content.ts";
import { eraseStaleMark, format, type FormatOptions } from "./format.ts";
import { type FsType, fsTypes } from "./fs_type.ts";
import { canGrowMountedExt4, ensureGrown } from "./grow.ts";
import { checkMount } from "./health.ts";
import { runMount } from "./mount_command.ts";
import { parseMountFlags } from "./mount_flags.ts";
import { measureFileSystem } from "./size.ts";

/** Where and how a file system is to be mounted. */
export interface MountOptions extends FormatOptions {
  /** An existing directory, free of symbolic links. */
  readonly path: string;
  readonly flags: readonly string[];
  /** Nothing is written through this mount. */
  readonly readOnly: boolean;
  /** Other hosts may have it mounted at the same time. */
  readonly shared: boolean;
  /** Whether a file system is made on a blank device, as the first mount of a volume requires. */
  readonly mayFormat: boolean;
  /** Ends the error for a blank device that is not to be formatted. */
  readonly unformattedAdvice?: string;
}

/**
 * Mounts the file system of `device` at `options.path`. Makes one first on a blank device, and grows it to the size of the
 * device. A working mount that is there already stays; a dead one is unmounted first. Repeat it after any failure.
 *
 * When it returns, the mount is of this very namespace, has answered a read, and takes writes unless it is read-only. The
 * file system has the size of the device, unless it is mounted read-only, or is an ext4 that pods use while the driver may
 * not grow it under them (which is logged as a warning).
 *
 * @throws StatusError ALREADY_EXISTS when it is mounted there in another way; FAILED_PRECONDITION when the device holds
 *   something else, or data of unknown kind; INVALID_ARGUMENT for bad flags or options; UNAVAILABLE when the device cannot be
 *   read or has changed meanwhile, or the file system is mounted and cannot be grown
 */
export async function mountVolume(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  options: MountOptions,
): Promise<void> {
  const { path } = options;
  const fsType = await mountAtPresentSize(host, ctx, device, options);
  if (options.readOnly || parseMountFlags(options.flags).readOnly) return;
  // The device may be larger than the origin of a clone, or may have grown at any time since it was read.
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) return await growBeforeMount(host, ctx, device, options);
  try {
    await ensureGrown(host, ctx, device, { path, fsType });
  } catch (error) {
    // After a final code the orchestrator forgets the mount that exists now, and never asks to unmount it.
    if (!isFinal(error)) throw error;
    throw new StatusError("UNAVAILABLE", messageOf(error), { cause: error });
  }
}

/** Unmounts an ext4 that no pod uses yet and mounts it again if it is smaller than its device: it grows before it is mounted. */
async function growBeforeMount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  options: MountOptions,
): Promise<void> {
  const { path } = options;
  const growing = ctx.doing(`grow the ext4 of namespace ${device.uuid} at "${path}"`);
  const now = await recheckDevice(host, growing, device);
  const { fsBytes, stepBytes, unusableBytes } = await measureFileSystem(host, growing, now, { path, fsType: "ext4" });
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
  await unmountAll(host, growing, path, device);
  await mountAtPresentSize(host, ctx, device, options);
}

/** Mounts the file system, see mountVolume, and leaves its size as it is unless it can only grow before it is mounted. */
async function mountAtPresentSize(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  options: MountOptions,
): Promise<FsType> {
  const { path } = options;
  const ctx = outer.doing(`mount namespace ${device.uuid} at "${path}"`);
  const flags = parseMountFlags(options.flags);
  // From here on, `ro` and `rw` are in `readOnly` and not among the flags.
  const request = { ...options, flags: flags.rest, readOnly: options.readOnly || flags.readOnly };
  const present = await keepOrUnmount(host, ctx, device, request);
  if (present !== undefined) return present;

  const asBlock = await mountAs(host, device, "our device node");
  if (asBlock !== undefined) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${device.path} is in use as a block device at "${asBlock.path}", a file system is damaged by that`,
    );
  }
  const fsType = await prepareFileSystem(host, ctx, device, request);
  await runMount(host, ctx, device, { ...request, fsType });
  const mounted = mountsAt(await mountTable(host), path).at(-1);
  if (mounted === undefined || await relationOf(host, mounted, device) !== "ours") {
    // The name went to another namespace in between. If that mount stayed, no call for either volume would unmount it.
    if (mounted?.source === device.path) await unmount(host, ctx, path);
    throw ctx.error(
      "UNAVAILABLE",
      `after the mount, ${
        mounted === undefined ? "nothing" : describeMount(mounted)
      } is there instead of ${device.path} (${device.number})`,
    );
  }
  const condition = await checkMount(host, ctx, device, { mount: mounted, readOnly: request.readOnly });
  if (condition !== undefined) throw ctx.error("UNAVAILABLE", condition);
  return fsType;
}

/**
 * The type of the volume's file system if it is mounted at the path already, works, and is as requested. Unmounts what is
 * broken or dead there; undefined: nothing is mounted there now.
 */
async function keepOrUnmount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  options: MountOptions,
): Promise<FsType | undefined> {
  const { path, readOnly } = options;
  const top = mountsAt(await mountTable(host), path).at(-1);
  if (top === undefined) return undefined;
  if (await relationOf(host, top, device) === "ours") {
    const condition = await checkMount(host, ctx, device, { mount: top, readOnly });
    if (condition === undefined) {
      const fsType = fsTypes.find((fsType) => fsType === top.fsType);
      const differences = mountDifferences(top, options);
      if (differences.length === 0 && fsType !== undefined) return fsType;
      throw ctx.error("ALREADY_EXISTS", `it is mounted there already, ${differences.join(", ")}`);
    }
    await assertNotUsedElsewhere(host, ctx, device, { path, condition });
    ctx.log.warning("mounts again what does not work", { device: device.path, path, error: condition });
  }
  await unmountAll(host, ctx, path, device);
  return undefined;
}

/** Makes sure that the device has a file system which can be mounted as requested, and returns its type. */
async function prepareFileSystem(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  options: MountOptions,
): Promise<FsType> {
  const { readOnly, shared } = options;
  const content = await probeContent(host, ctx, device);
  if (content.kind === "luks") throw encryptedError(ctx, device);
  if (content.kind === "filesystem") {
    const { fsType, isSmaller } = content;
    if (options.fsType !== undefined && options.fsType !== fsType) {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${device.path} holds ${fsType}, the request wants ${options.fsType}; it is never formatted again`,
      );
    }
    if (!readOnly && !shared) {
      await eraseStaleMark(host, ctx, device, fsType);
      await repairFileSystem(host, ctx, device, { fsType, isSmaller });
    }
    if (readOnly && shared) await assertReplayed(host, ctx, device, fsType);
    return fsType;
  }
  assertMayFormat(ctx, device, content, options);
  const fsType = options.fsType ?? options.defaultFsType;
  const { mkfsOptions } = options;
  await format(host, ctx, device, { fsType, mkfsOptions, content });
  return fsType;
}

function assertMayFormat(
  ctx: RequestContext,
  device: BlockDevice,
  content: EmptyContent,
  { readOnly, shared, mayFormat, unformattedAdvice }: MountOptions,
): void {
  if (readOnly || shared) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${device.path} has no file system, and with read-only or shared access none is made; mount it once for writing`,
    );
  }
  if (mayFormat) return;
  const state = content.kind === "blank" ? "is blank" : "holds a file system that was never finished";
  const advice = unformattedAdvice ?? "and none is made unless it is asked for";
  throw ctx.error("FAILED_PRECONDITION", `${device.path} ${state}, ${advice}`);
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
  // Another mount beside these would be of the same broken file system.
  const places = others.map((mount) => `"${mount.path}"`).join(", ");
  throw ctx.error(
    "FAILED_PRECONDITION",
    `${condition}; it is still in use at ${places}, the pods there have to end first`,
  );
}

// The mount options that the mount table shows. The others cannot be compared.
const visibleOptions = ["noexec", "nosuid", "nodev", "noatime", "nodiratime", "sync", "dirsync"];

/** How `mount` differs from the requested one; also a file system of an unknown type is a difference. */
function mountDifferences(mount: Mount, options: MountOptions): readonly string[] {
  const shown = new Set([...mount.options, ...mount.superOptions]);
  const requested = new Set(options.flags);
  const differences: string[] = [];
  const isKnownType = fsTypes.some((fsType) => fsType === mount.fsType);
  if (!isKnownType || (options.fsType !== undefined && options.fsType !== mount.fsType)) {
    differences.push(`file system ${mount.fsType} instead of ${options.fsType ?? fsTypes.join(" or ")}`);
  }
  const isReadOnly = shown.has("ro");
  if (isReadOnly !== options.readOnly) {
    differences.push(
      `${isReadOnly ? "read-only" : "writable"} instead of ${options.readOnly ? "read-only" : "writable"}`,
    );
  }
  for (const option of visibleOptions) {
    // The kernel drops nodiratime beside noatime, which includes it.
    if (option === "nodiratime" && requested.has("noatime")) continue;
    if (shown.has(option) !== requested.has(option)) {
      differences.push(`${shown.has(option) ? "with" : "without"} ${option}`);
    }
  }
  // Without relatime and noatime the kernel keeps every access time.
  const isStrict = !shown.has("relatime") && !shown.has("noatime");
  if (!shown.has("noatime") && !requested.has("noatime") && isStrict !== requested.has("strictatime")) {
    differences.push(`${isStrict ? "with" : "without"} strictatime`);
  }
  return differences;
}

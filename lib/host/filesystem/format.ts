/**
 * Makes file systems, on devices that content.ts has proved blank or unfinished.
 *
 * A mkfs that was killed leaves a device which is neither blank nor a file system. The driver marks a device while mkfs runs
 * (unfinished.ts), so it recognises its own work and begins again. mkfs never gets a force flag: without a terminal,
 * mkfs.ext4 overwrites anything without asking (e2fsprogs 1.47.0).
 */
import type { RequestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";
import { markUsed } from "../luks_label.ts";
import { mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { processesAt } from "../processes.ts";
import { mountsOf } from "../volume_mounts.ts";
import { viewOf } from "./bytes.ts";
import { type EmptyContent, encryptedError, probeContent } from "./content.ts";
import { createDeviceReader, type DeviceReader } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";
import { fileSystemUuid } from "./fs_uuid.ts";
import { featureOptions } from "./kernel_features.ts";
import { parseMkfsOptions } from "./mkfs_options.ts";
import { runTool, toolError } from "./run_tool.ts";
import { firstDataOffset } from "./samples.ts";
import { eraseMark, markOffset, writeMark } from "./unfinished.ts";

/** Which file system a blank device gets. */
export interface FormatOptions {
  /** Undefined: `defaultFsType` for a blank device, any of `fsTypes` otherwise. */
  readonly fsType: FsType | undefined;
  readonly defaultFsType: FsType;
  /** Text of the StorageClass parameter `mkfs-options`. */
  readonly mkfsOptions: string;
}

/**
 * Makes a file system on a blank device without mounting it; does nothing on a device that has one. For a new volume that
 * will be mounted read-only. Repeat it after any failure.
 *
 * @throws StatusError as mountVolume does for a device that is not blank and has no file system
 */
export async function ensureFilesystem(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  options: FormatOptions,
): Promise<void> {
  const ctx = outer.doing(`make a file system on namespace ${device.uuid}`);
  const found = await probeContent(host, ctx, device);
  if (found.kind === "filesystem") return;
  if (found.kind === "luks") throw encryptedError(ctx, device);
  const fsType = options.fsType ?? options.defaultFsType;
  const { mkfsOptions } = options;
  await format(host, ctx, device, { fsType, mkfsOptions, content: found });
}

/**
 * Makes a file system on a device that probeContent has proved blank or unfinished; nothing else is accepted as `content`.
 *
 * @throws StatusError INVALID_ARGUMENT for bad options; FAILED_PRECONDITION when the device is mounted or a tool fails;
 *   UNAVAILABLE when the device is in use or has changed
 */
export async function format(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { fsType, mkfsOptions, content }: {
    readonly fsType: FsType;
    readonly mkfsOptions: string;
    readonly content: EmptyContent;
  },
): Promise<void> {
  const isUnfinished = content.kind === "unfinished";
  const userOptions = parseMkfsOptions(fsType, mkfsOptions);
  const mounted = await mountsOf(host, await mountTable(host), device);
  if (mounted[0] !== undefined) {
    throw ctx.error("FAILED_PRECONDITION", `it is mounted at "${mounted[0].path}"`);
  }
  // A mkfs that outlived the driver which started it may still be running. mkfs.ext4 and mkfs.xfs hold the device
  // exclusively all the time, mkfs.btrfs (6.2) does not.
  if (isUnfinished || fsType === "btrfs") {
    const users = await processesAt(host, (place) => place === device.path);
    if (users.length > 0) {
      throw ctx.error("UNAVAILABLE", `${device.path} is in use by ${users.join(", ")}`);
    }
  }
  // The content was read through a name, which may belong to another device by now.
  await recheckDevice(host, ctx, device);
  if (isUnfinished) {
    if (device.encrypts === undefined) {
      ctx.log.warning("makes a file system again that was never finished", { device: device.path });
    }
    // mkfs.xfs does not write over the magic of an unfinished xfs, and is never forced. Inside a new encryption there may be
    // a whole file system, whose label was not written before the driver was killed.
    const types = device.encrypts === undefined ? ["--types", "xfs"] : [];
    const wiped = await runTool(host, ctx, "wipefs", ["--quiet", "--all", ...types, device.path]);
    if (wiped.code !== 0) throw toolError(ctx, "wipefs", wiped);
    await recheckDevice(host, ctx, device);
  }
  const options = [...await featureOptions(host, ctx, fsType, userOptions), ...userOptions];
  await writeMark(host, ctx, device);
  const args = mkfsArguments(fsType, device, options);
  const made = await runTool(host, ctx, `mkfs.${fsType}`, args);
  if (made.code !== 0) {
    await eraseMarkIfBlank(host, ctx, device);
    throw toolError(ctx, `mkfs.${fsType}`, made);
  }
  await eraseMark(host, ctx, device);
  await markUsed(host, ctx, device);
}

function mkfsArguments(fsType: FsType, { path, uuid }: BlockDevice, options: readonly string[]): readonly string[] {
  switch (fsType) {
    case "ext4":
      // No reserved blocks: the volume has one user. A new namespace has nothing to discard. The journal need not
      // be zeroed, which would be most of what mkfs writes: every block is zero or noise, so none looks like a journal block.
      return [
        ...["-q", "-m", "0", "-U", fileSystemUuid(uuid)],
        ...joinOption(joinOption(["-E", "nodiscard,lazy_journal_init=1", ...options], "-E"), "-O"),
        path,
      ];
    case "xfs":
      return ["-q", "-K", "-m", `uuid=${fileSystemUuid(uuid)}`, ...options, path];
    case "btrfs":
      // Without -U: to check that a UUID is unique, mkfs.btrfs reads every block device of the machine, and hangs when one
      // of them does not answer.
      return ["-q", "-K", ...options, path];
  }
}

/** `args` with all values of `option` in one comma list, in their order: mke2fs uses only the last such option. */
function joinOption(args: readonly string[], option: string): readonly string[] {
  const values: string[] = [];
  const rest: string[] = [];
  for (let at = 0; at < args.length; at += 2) {
    const [name = "", value = ""] = args.slice(at, at + 2);
    if (name === option) values.push(value);
    else rest.push(name, value);
  }
  return values.length === 0 ? rest : [option, values.join(","), ...rest];
}

/** After a mkfs that failed: erases the mark again if the device is still blank otherwise. */
async function eraseMarkIfBlank(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const offset = markOffset(device);
  if (offset === undefined) return;
  const read = createDeviceReader(host, ctx, device);
  try {
    // mkfs writes nothing behind the mark without writing before it.
    const at = await firstDataOffset(read, offset);
    if (at === undefined) return await eraseMark(host, ctx, device);
    ctx.log.debug("leaves a device marked as unfinished", {
      device: device.path,
      error: `there is data at byte ${at}`,
    });
  } catch (error) {
    // The error of mkfs matters more. The mark stays, and the next attempt begins again.
    ctx.signal.throwIfAborted();
    ctx.log.debug("leaves a device marked as unfinished", { device: device.path, error: messageOf(error) });
  }
}

/**
 * Erases the mark in a file system whose mkfs has ended, when the driver was killed before it erased the mark. Only if
 * the file system was hardly mounted; otherwise a block like the mark may be tenant data. A mark that stayed in a free block
 * would make a volume that lost its super block look unfinished.
 */
export async function eraseStaleMark(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
): Promise<void> {
  if (await isFresh(createDeviceReader(host, ctx, device), fsType)) await eraseMark(host, ctx, device);
}

/** Whether a file system is as its mkfs left it, or hardly used. */
async function isFresh(read: DeviceReader, fsType: FsType): Promise<boolean> {
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

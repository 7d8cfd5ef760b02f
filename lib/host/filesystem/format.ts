/** Makes file systems. What proves that a device may be formatted is in content.ts and unfinished.ts. */
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import { markUsed } from "../luks_label.ts";
import { mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { processesAt } from "../users.ts";
import { mountsOf } from "../volume_mounts.ts";
import { viewOf } from "./bytes.ts";
import { runTool, toolError } from "./run_tool.ts";
import { contentOf } from "./content.ts";
import { createDeviceReader, type DeviceReader } from "./device_reader.ts";
import { type FsType, fsTypes } from "./fs_type.ts";
import { fileSystemUuid } from "./fs_uuid.ts";
import { featureOptions } from "./kernel_features.ts";
import { parseMkfsOptions } from "./mkfs_options.ts";
import type { MountOptions } from "./mount.ts";
import { proveBlank } from "./samples.ts";
import { eraseMark, markOffset, writeMark } from "./unfinished.ts";

/**
 * Makes a file system on a blank device without mounting it; does nothing on a device that has one. For a volume that is
 * new and will be mounted read-only. Repeat it after any failure.
 *
 * @throws StatusError as mountVolume does for a device that is not blank and holds none
 */
export async function ensureFilesystem(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  wish: Pick<MountOptions, "fsType" | "defaultFsType" | "mkfsOptions">,
): Promise<void> {
  const ctx = outer.doing(`make a file system on namespace ${device.uuid}`);
  const found = await contentOf(host, ctx, device);
  if (found.kind === "filesystem") return;
  if (found.kind === "luks") throw encryptedError(ctx, device);
  const fsType = wish.fsType ?? wish.defaultFsType;
  await format(host, ctx, device, fsType, wish.mkfsOptions, found.kind === "unfinished");
}

export async function format(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
  mkfsOptions: string,
  unfinished: boolean,
): Promise<void> {
  const wanted = parseMkfsOptions(fsType, mkfsOptions);
  const mounted = await mountsOf(host, await mountTable(host), device);
  if (mounted[0] !== undefined) {
    throw ctx.error("FAILED_PRECONDITION", `it is mounted at "${mounted[0].path}"`);
  }
  // A mkfs that outlived the driver which started it may still be at work. Those of ext4 and xfs hold the device for
  // themselves all the time, that of btrfs (6.2) does not.
  if (unfinished || fsType === "btrfs") {
    const users = await processesAt(host, (place) => place === device.path);
    if (users.length > 0) {
      throw ctx.error("UNAVAILABLE", `${device.path} is in use by ${users.join(", ")}`);
    }
  }
  // What was found there was read by a name, and may be of a device that has gone since.
  await recheckDevice(host, ctx, device);
  if (unfinished) {
    if (device.encrypts === undefined) {
      ctx.log.warning("makes a file system again that was never finished", { device: device.path });
    }
    // mkfs.xfs refuses to write over the magic of its own half-made work, and is never forced. Within a new encryption
    // there may be more than that: a whole file system of which the mark was not told any more.
    const types = device.encrypts === undefined ? ["--types", "xfs"] : [];
    const wiped = await runTool(host, ctx, "wipefs", ["--quiet", "--all", ...types, device.path]);
    if (wiped.code !== 0) throw toolError(ctx, "wipefs", wiped);
    await recheckDevice(host, ctx, device);
  }
  const options = [...await featureOptions(host, ctx, fsType, wanted), ...wanted];
  await writeMark(host, ctx, device);
  const args = mkfsArguments(fsType, device, options);
  const made = await runTool(host, ctx, `mkfs.${fsType}`, args);
  if (made.code !== 0) {
    await takeBackMark(host, ctx, device);
    throw toolError(ctx, `mkfs.${fsType}`, made);
  }
  await eraseMark(host, ctx, device);
  await markUsed(host, ctx, device);
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
): Promise<void> {
  const offset = markOffset(device);
  if (offset === undefined) return;
  const read = createDeviceReader(host, ctx, device);
  try {
    // What follows the mark is never written without something before it.
    await proveBlank(read, { ...device, sizeBytes: offset }, (problem) => new StatusError("UNAVAILABLE", problem));
    await eraseMark(host, ctx, device);
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
export async function eraseStaleMark(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
): Promise<void> {
  if (await isFresh(createDeviceReader(host, ctx, device), fsType)) await eraseMark(host, ctx, device);
}

/** Whether a file system is as its mkfs left it, or was used for next to nothing. */
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

export function encryptedError(ctx: RequestContext, device: BlockDevice): StatusError {
  return ctx.error(
    "FAILED_PRECONDITION",
    `${device.path} holds crypto_LUKS, which is none of ${fsTypes.join(", ")}; it is left alone`,
  );
}

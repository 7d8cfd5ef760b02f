/**
 * Marks a device while mkfs runs, so that the driver recognises a file system whose mkfs was killed, and runs mkfs again.
 *
 * Such a device is neither blank nor a file system. ext4 writes its super block last, and the blocks before it do not show
 * whose they are. xfs and btrfs mark themselves as unfinished from the start, but a second attempt erases that first. So the
 * driver writes a mark before mkfs, on a device that is proved blank. It erases the mark after mkfs, before anything else can
 * write to the device: before the first mount, and before a pod gets the device itself.
 *
 * The mark is a block of 4 KiB about 2 MiB before the end of the device. No mkfs writes there (seen with e2fsprogs 1.47,
 * xfsprogs 6.1 and btrfs-progs 6.2): each zeroes the head, and at the end btrfs zeroes 2 MiB, xfs and ext4 up to 128 KiB;
 * their own blocks are at the beginnings of groups and chunks. If an unusual layout overwrites the mark, the unfinished file
 * system is left alone, like everything that is not provably blank.
 *
 * The mark contains the namespace UUID and the size, so that a clone or snapshot of an unfinished volume does not count as
 * ours. It counts only where no file system is found, the head is as every mkfs leaves it until the end, and no sample of the
 * device has content that no mkfs writes. A block of a tenant's file that looks like the mark lies in a file system, which is
 * found.
 */
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { firstNonZero, textAt, uuidAt } from "./bytes.ts";
import type { DeviceReader } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";
import { fileSystemUuid } from "./fs_uuid.ts";
import { type DataSample, samplesOf } from "./samples.ts";

/**
 * The offset of the mark on a device, in bytes. Undefined where there is none: on an encrypted device, whose LUKS header has a
 * label instead (luks_label.ts), and on a very small one.
 */
export function markOffset({ encrypts, sizeBytes }: BlockDevice): bigint | undefined {
  if (encrypts !== undefined || sizeBytes < leastBytes) return undefined;
  return (sizeBytes / alignmentBytes - 1n) * alignmentBytes - tailBytes;
}

function markOf({ uuid, sizeBytes }: BlockDevice): Uint8Array {
  const text = `lbcsi: a file system is being made on this device, it holds nothing yet\n` +
    `namespace ${uuid}\nsize ${sizeBytes}\n`;
  const mark = new Uint8Array(markBytes);
  mark.set(new TextEncoder().encode(text));
  return mark;
}

/** Whether the mark of this very namespace is on the device. */
async function isMarked(read: DeviceReader, device: BlockDevice): Promise<boolean> {
  const offset = markOffset(device);
  if (offset === undefined) return false;
  const expected = markOf(device);
  return (await read(offset, markBytes)).every((byte, at) => byte === expected[at]);
}

/** Whether a mkfs of ours has begun on this device and not ended, by the mark. Call it only where no file system is found. */
export async function isUnfinished(read: DeviceReader, device: BlockDevice): Promise<boolean> {
  if (!await isMarked(read, device)) return false;
  // Every mkfs zeroes the boot block first. A pod that uses the raw device writes there, and a used xfs has a header there.
  if (!(await read(0n, 4096)).subarray(0, 1024).every((byte) => byte === 0)) return false;
  for (const offset of btrfsCopies) {
    if (offset + 4096n <= device.sizeBytes && textAt(await read(offset, 4096), 64, 8) === "_BHRfS_M") return false;
  }
  return !await holdsData(read, device);
}

/**
 * Whether a mkfs of ours began on this device when it was smaller, before the volume was expanded. Tries sizes of whole GiB,
 * as volumes have. Call it only where the device would be left alone otherwise.
 */
export async function wasUnfinishedWhenSmaller(read: DeviceReader, device: BlockDevice): Promise<boolean> {
  const largest = (device.sizeBytes - 1n) / gib;
  for (let size = largest; size > 0n && size > largest - mostSizes; size--) {
    const smaller = { ...device, sizeBytes: size * gib };
    if (!await isMarked(read, smaller)) continue;
    for (const { offsetBytes, lengthBytes } of samplesOf(device.sizeBytes)) {
      // The part that was added is blank.
      if (offsetBytes < smaller.sizeBytes) continue;
      if (firstNonZero(await read(offsetBytes, lengthBytes)) !== undefined) return false;
    }
    return await isUnfinished(read, smaller);
  }
  return false;
}

/** Whether a mkfs of ours began on the device and did not end, by what xfs says, and btrfs as earlier versions made it. */
export async function isHalfMade(
  read: DeviceReader,
  device: BlockDevice,
  mountable: FsType | "crypto_LUKS" | undefined,
): Promise<boolean> {
  // A file system that is complete is not half-made, whatever else is left there. An xfs says so itself.
  if (mountable !== undefined && mountable !== "xfs") return false;
  if (device.sizeBytes < 1n << 20n) return false;
  const ours = fileSystemUuid(device.uuid);
  // xfs_format.h: sb_uuid at 32, sb_inprogress at 126. The magic may be wiped already, see format.ts.
  const xfs = await read(0n, 4096);
  const isXfs = ["XFSB", "\0\0\0\0"].includes(textAt(xfs, 0, 4)) && uuidAt(xfs, 32) === ours && xfs[126] === 1;
  if (isXfs || mountable === "xfs") return isXfs && !await holdsData(read, device);
  // Earlier versions gave btrfs a UUID of ours. btrfs-progs writes the magic in this order until everything is in place; fsid at
  // 32, magic at 64 of the super block.
  const btrfs = await read(65536n, 4096);
  if (uuidAt(btrfs, 32) !== ours || textAt(btrfs, 64, 8) !== "!BHRfS_M") return false;
  return !await holdsData(read, device);
}

/** Writes the mark on a device that is proved blank or unfinished, and waits until it is on the disk; else UNAVAILABLE. */
export async function writeMark(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const offset = markOffset(device);
  if (offset === undefined) return;
  await recheckDevice(host, ctx, device);
  try {
    await host.writeDevice(device.path, offset, markOf(device));
  } catch (error) {
    throw markError(ctx, device, error);
  }
}

/**
 * Erases the mark; does nothing where there is none. Erases the exact mark only. The caller has made sure that nothing has
 * used the device since the mark was written.
 *
 * @throws StatusError UNAVAILABLE when the device cannot be read or written
 */
export async function eraseMark(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const offset = markOffset(device);
  if (offset === undefined) return;
  try {
    if (!await isMarked(readerOf(host, ctx, device), device)) return;
    await recheckDevice(host, ctx, device);
    await host.writeDevice(device.path, offset, new Uint8Array(markBytes));
  } catch (error) {
    ctx.signal.throwIfAborted();
    throw error instanceof StatusError ? error : markError(ctx, device, error);
  }
  ctx.log.debug("erased the mark of an unfinished file system", { device: device.path });
}

/**
 * Erases the mark of an unfinished file system on a raw device before a pod gets it. Does nothing where nothing is unfinished,
 * or the device cannot be read, which the pod will notice.
 *
 * @throws StatusError UNAVAILABLE when there is a mark that cannot be erased
 */
export async function abandonUnfinished(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  try {
    if (!await isUnfinished(readerOf(host, ctx, device), device)) return;
  } catch (error) {
    ctx.signal.throwIfAborted();
    ctx.log.debug("cannot look for the mark of an unfinished file system", {
      device: device.path,
      error: messageOf(error),
    });
    return;
  }
  await eraseMark(host, ctx, device);
}

function readerOf(host: Host, ctx: RequestContext, device: BlockDevice): DeviceReader {
  return (offsetBytes, lengthBytes) =>
    host.pending.answer(
      ctx.doing(`read the mark of an unfinished file system on ${device.path}`),
      { volume: device.uuid, what: `a read of ${device.path}` },
      () => host.readBytes(device.path, offsetBytes, lengthBytes),
    );
}

function markError(ctx: RequestContext, device: BlockDevice, error: unknown): StatusError {
  return ctx.error(
    "UNAVAILABLE",
    `the mark of an unfinished file system on ${device.path} cannot be read or written ` +
      `(${messageOf(error)})`,
    { cause: error },
  );
}

/**
 * Whether the samples of a device with an unfinished file system contain what no mkfs writes: text, or blocks without zeros as
 * in compressed, encrypted and random data. Detects a raw device that was used and whose content looks unfinished.
 */
async function holdsData(read: DeviceReader, device: BlockDevice): Promise<boolean> {
  const own = markOffset(device);
  for (const { offsetBytes, lengthBytes } of partsOf(device.sizeBytes)) {
    const bytes = await read(offsetBytes, lengthBytes);
    const first = firstNonZero(bytes);
    if (first === undefined) continue;
    for (let at = first - first % unitBytes; at < bytes.length; at += unitBytes) {
      const place = offsetBytes + BigInt(at);
      if (own !== undefined && place >= own && place < own + BigInt(markBytes)) continue;
      const unit = bytes.subarray(at, at + unitBytes);
      if (firstNonZero(unit) !== undefined && isData(unit)) return true;
    }
  }
  return false;
}

/** A small device from end to end, samples of a large one. */
function partsOf(sizeBytes: bigint): readonly DataSample[] {
  if (sizeBytes > wholeBytes) return samplesOf(sizeBytes);
  const parts: DataSample[] = [];
  for (let at = 0n; at < sizeBytes; at += pieceBytes) {
    const left = sizeBytes - at;
    parts.push({ offsetBytes: at, lengthBytes: Number(left < pieceBytes ? left : pieceBytes) });
  }
  return parts;
}

/** Metadata of ext4, xfs and btrfs is mostly zeros, or a bitmap; its only text is short names, and labels in super blocks. */
function isData(unit: Uint8Array): boolean {
  if (hasNames(unit)) return false;
  const values = new Set<number>();
  let nonZero = 0;
  let printable = 0;
  for (const byte of unit) {
    values.add(byte);
    if (byte !== 0) nonZero++;
    printable = byte >= 0x20 && byte < 0x7f ? printable + 1 : 0;
    if (printable > longestWord) return true;
  }
  return nonZero > unit.length * 15 / 16 && values.size > 32;
}

/** Whether a block is of a kind that contains labels and names. */
function hasNames(unit: Uint8Array): boolean {
  const isExt4 = unit[0x38] === 0x53 && unit[0x39] === 0xef;
  // The block of ext4 that protects against double mounts (mmp) has the names of machine and device.
  return isExt4 || ["XFSB", "PMM\0"].includes(textAt(unit, 0, 4)) ||
    /^(?:_BHRfS_M|!BHRfS_M)$/.test(textAt(unit, 64, 8));
}

const markBytes = 4096;
const alignmentBytes = 64n << 10n;
/** What mkfs.btrfs zeroes at the end of a device. */
const tailBytes = 2n << 20n;
/** On a smaller device, every place may be written by some mkfs. */
const leastBytes = 16n << 20n;
/** Where btrfs keeps copies of its super block, which mkfs.btrfs completes last. */
const btrfsCopies = [64n << 20n, 256n << 30n];

const gib = 1n << 30n;
/** How many sizes are tried; each takes a read of 4 KiB. */
const mostSizes = 1024n;

const wholeBytes = 256n << 20n;
const pieceBytes = 1n << 20n;
// Measured on 150 new file systems of many sizes and options: at most 795 bytes of 1024 are not zero where they have more
// than 32 values, and the longest text outside of super blocks is "lost+found".
const unitBytes = 1024;
const longestWord = 12;

/** Sizes of file systems. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { viewOf } from "./bytes.ts";
import { createDeviceReader, type DeviceReader, volumeQuestioner } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";

/** A mount of a volume. */
export interface MountedFileSystem {
  readonly path: string;
  readonly fsType: FsType;
}

/** The size of a file system. */
export interface FileSystemSize {
  readonly fsBytes: bigint;
  /** The least that it can grow by, in bytes. */
  readonly stepBytes: bigint;
  /** The most that it may be unable to use at the end of its device, in bytes. */
  readonly unusableBytes: bigint;
}

/**
 * The size of a mounted file system now.
 *
 * @throws StatusError UNAVAILABLE when the device has no super block of that type, cannot be read, or has a pending operation
 */
export async function measureFileSystem(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { path, fsType }: MountedFileSystem,
): Promise<FileSystemSize> {
  const read = createDeviceReader(host, ctx, device);
  const onDisk = await sizeFromSuperBlock(read, fsType);
  if (onDisk === undefined) {
    throw ctx.error("UNAVAILABLE", `${device.path} has no super block of ${fsType}`);
  }
  // ext4 keeps its super block up to date on the device. The others write theirs from time to time, and statfs is exact.
  if (fsType === "ext4") return onDisk;
  const ask = volumeQuestioner(host, ctx, device);
  const usage = await ask(`statfs of "${path}"`, () => host.usage(path));
  // statfs of xfs leaves out the journal, whose size never changes.
  const mounted = usage.totalBytes + (onDisk.journalBytes ?? 0n);
  return { ...onDisk, fsBytes: mounted > onDisk.fsBytes ? mounted : onDisk.fsBytes };
}

/** The size in a super block; undefined when there is none of this type. */
export async function sizeFromSuperBlock(
  read: DeviceReader,
  fsType: FsType,
): Promise<(FileSystemSize & { readonly journalBytes?: bigint }) | undefined> {
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

/** Sizes of file systems, and making one fill its device. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { describeMount, mountsAt, mountTable, relationOf } from "../mounts.ts";
import type { BlockDevice } from "../nvme/sysfs.ts";
import { recheckDevice } from "../nvme/wait.ts";
import { changing, failed } from "./command.ts";
import { type Reader, readerOf } from "./content.ts";
import type { FsType } from "./fs_type.ts";
import { answersOf } from "./health.ts";

/** The kernel lets only holders of CAP_SYS_RESOURCE (24) grow a mounted ext4, root or not. */
export async function canGrowMountedExt4(host: Host): Promise<boolean> {
  const status = await host.readText(`${host.roots.proc}/self/status`);
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status ?? "")?.[1];
  return effective !== undefined && (BigInt(`0x${effective}`) & (1n << 24n)) !== 0n;
}

/** A mount of a volume. */
export interface MountedFileSystem {
  readonly path: string;
  readonly fsType: FsType;
}

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
  outer: RequestContext,
  device: BlockDevice,
  { path, fsType }: MountedFileSystem,
): Promise<bigint> {
  const ctx = outer.doing(`grow the ${fsType} of namespace ${device.uuid} at "${path}"`);
  const now = await recheckDevice(host, ctx, device);
  const before = await measureFileSystem(host, ctx, now, { path, fsType });
  if (now.sizeBytes - before.fsBytes < before.stepBytes) return before.fsBytes;
  const mount = mountsAt(await mountTable(host), path).at(-1);
  // Some of the tools are told the path alone, and grow what they find on top there.
  if (mount === undefined || await relationOf(host, mount, now) !== "ours") {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${mount === undefined ? "nothing" : describeMount(mount)} is mounted there instead of ${now.path}`,
    );
  }
  if (mount.superOptions.includes("ro") || mount.options.includes("ro")) {
    throw ctx.error("FAILED_PRECONDITION", `it is mounted read-only`);
  }
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the driver lacks the capability CAP_SYS_RESOURCE to grow it while it is mounted; it grows when it ` +
        `is staged the next time, or run the node service privileged`,
    );
  }
  const [program, ...args] = {
    ext4: ["resize2fs", now.path],
    xfs: ["xfs_growfs", "-d", path],
    btrfs: ["btrfs", "filesystem", "resize", "max", path],
  }[fsType];
  const grown = await changing(host, ctx, program as string, args);
  if (grown.code !== 0) throw failed(ctx, program as string, grown);
  const after = await measureFileSystem(host, ctx, now, { path, fsType });
  // resize2fs leaves out a last block group that is too small to hold its own tables.
  if (now.sizeBytes - after.fsBytes >= after.unusableBytes) {
    throw ctx.error(
      "UNAVAILABLE",
      `${program} succeeded, but it has ${after.fsBytes} of the ${now.sizeBytes} bytes of ${now.path}`,
    );
  }
  return after.fsBytes;
}

export async function measureFileSystem(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { path, fsType }: MountedFileSystem,
): Promise<FsSize> {
  const read = readerOf(host, ctx, device);
  const onDisk = await sizeFromSuperBlock(read, fsType);
  if (onDisk === undefined) {
    throw ctx.error("UNAVAILABLE", `${device.path} has no super block of ${fsType}`);
  }
  // ext4 keeps its super block where we read it. The others write theirs now and then, and statfs knows more.
  if (fsType === "ext4") return onDisk;
  const answer = answersOf(host, ctx, device);
  const usage = await answer(`statfs of "${path}"`, () => host.usage(path));
  // statfs of xfs leaves out the journal, whose size never changes.
  const mounted = usage.totalBytes + (onDisk.journalBytes ?? 0n);
  return { ...onDisk, fsBytes: mounted > onDisk.fsBytes ? mounted : onDisk.fsBytes };
}

/** Reads the size that a super block tells; undefined when there is none of this type. */
export async function sizeFromSuperBlock(
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

export function viewOf(bytes: Uint8Array, at: number): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset + at, bytes.byteLength - at);
}

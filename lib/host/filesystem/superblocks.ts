/**
 * Recognises file systems by their super blocks, and which of two on one device is the real one.
 *
 * The places of fields are those of the kernel's own headers: fs/ext4/ext4.h (little endian, super block at byte 1024),
 * fs/xfs/libxfs/xfs_format.h (big endian, at byte 0) and include/uapi/linux/btrfs_tree.h (little endian, at 64 KiB).
 */
import { textAt, uuidAt, viewOf } from "./bytes.ts";
import type { DeviceReader } from "./device_reader.ts";

/** Whether there is a LUKS header at its first place. Its second place lies where a file system keeps files. */
export async function hasLuksHeader(read: DeviceReader): Promise<boolean> {
  return textAt(await read(0n, 4096), 0, 6) === "LUKS\xba\xbe";
}

/**
 * Whether the first sector is a DOS partition table whose four entries are empty: for instance boot code that a virtual machine
 * wrote before its ext4 or btrfs. No data can be in partitions that do not exist.
 */
export async function hasNoPartition(read: DeviceReader): Promise<boolean> {
  const sector = (await read(0n, 4096)).subarray(0, 512);
  return sector[510] === 0x55 && sector[511] === 0xaa && sector.subarray(446, 510).every((byte) => byte === 0);
}

/**
 * The file system that owns a device on which signatures of several are found; undefined when that is not clear.
 *
 * A file of an ext4 or xfs can lie where btrfs has its super block (64 KiB) or LUKS its second header (16 KiB to 4 MiB), and a
 * file of a btrfs where that header is behind the first MiB; the content of files is the tenant's. So a super block that the
 * rest of the file system confirms wins over a signature that can be in a file. A head without the rest, as in a partial copy,
 * wins over nothing. The content of a file cannot imitate a file system, because super blocks are where no file lies.
 */
export async function owningFileSystem(
  read: DeviceReader,
  sizeBytes: bigint,
): Promise<"ext4" | "xfs" | "btrfs" | undefined> {
  if (await hasLuksHeader(read)) return undefined;
  const ext4 = await isWholeExt4(read, sizeBytes);
  const xfs = await isWholeXfs(read, sizeBytes);
  if (ext4 !== xfs) return ext4 ? "ext4" : "xfs";
  return !ext4 && await isWholeBtrfs(read, sizeBytes) ? "btrfs" : undefined;
}

/**
 * Whether there is a super block of ext4, and the root directory where it points: the inode, and in its first block the entries
 * "." and "..", both of inode 2. An ext4 that has only its super block is damaged, or was overwritten by data of another kind,
 * which e2fsck would write into. The inode alone proves nothing: one in sixteen random ones has the mode of a directory.
 */
export async function isWholeExt4(read: DeviceReader, sizeBytes: bigint): Promise<boolean> {
  const superBlock = new DataView((await read(0n, 4096)).slice(1024).buffer);
  if (superBlock.getUint16(0x38, true) !== 0xef53) return false;
  const logBlockSize = superBlock.getUint32(0x18, true);
  if (logBlockSize > 6) return false;
  const blockBytes = 1024n << BigInt(logBlockSize);
  const has64bit = (superBlock.getUint32(0x60, true) & 0x80) !== 0;
  const inodeBytes = superBlock.getUint32(0x4c, true) === 0 ? 128 : superBlock.getUint16(0x58, true);
  // The first group descriptor, in the block after the super block, points to the inode table. Inode 2, the second one, is
  // the root directory.
  const group = viewOf(await read(blockBytes === 1024n ? 2048n : blockBytes, 64));
  const high = has64bit ? BigInt(group.getUint32(0x28, true)) << 32n : 0n;
  const root = (high | BigInt(group.getUint32(8, true))) * blockBytes + BigInt(inodeBytes);
  if (root < 2048n || root + 128n > sizeBytes) return false;
  const inode = viewOf(await read(root, 128));
  // A directory with more than 65000 subdirectories has a link count of one (dir_nlink).
  if ((inode.getUint16(0, true) & 0xf000) !== 0x4000 || inode.getUint16(0x1a, true) === 0) return false;
  const isInline = (inode.getUint32(0x20, true) & 0x10000000) !== 0;
  // A directory in its inode (inline_data) begins with the inode number of its parent; the root is its own parent.
  if (isInline) return inode.getUint32(0x28, true) === 2;
  const block = await firstExt4Block(read, inode, { blockBytes, sizeBytes });
  return block !== undefined && isExt4RootBlock(viewOf(await read(block * blockBytes, 24)));
}

/** The first block of an inode, by its extents or its first direct block. Undefined when it has none on the device. */
async function firstExt4Block(
  read: DeviceReader,
  inode: DataView,
  { blockBytes, sizeBytes }: { readonly blockBytes: bigint; readonly sizeBytes: bigint },
): Promise<bigint | undefined> {
  const isOnDevice = (block: bigint) => block > 0n && (block + 1n) * blockBytes <= sizeBytes;
  const hasExtents = (inode.getUint32(0x20, true) & 0x80000) !== 0;
  let block = BigInt(inode.getUint32(0x28, true));
  if (!hasExtents) return isOnDevice(block) ? block : undefined;
  let node = new DataView(inode.buffer, inode.byteOffset + 0x28, 60);
  // The kernel's limit for the depth of an extent tree is 5.
  for (let left = 5; left >= 0; left--) {
    if (node.getUint16(0, true) !== 0xf30a || node.getUint16(2, true) === 0) return undefined;
    const isLeaf = node.getUint16(6, true) === 0;
    const [low, high] = isLeaf ? [20, 18] : [16, 20];
    block = (BigInt(node.getUint16(high, true)) << 32n) | BigInt(node.getUint32(low, true));
    if (!isOnDevice(block)) return undefined;
    if (isLeaf) return block;
    node = viewOf(await read(block * blockBytes, 60));
  }
  return undefined;
}

/** Whether a directory's block begins with "." and "..", both of inode 2. */
function isExt4RootBlock(block: DataView): boolean {
  const isEntry = (at: number, name: string) =>
    block.getUint32(at, true) === 2 && block.getUint8(at + 6) === name.length &&
    textAt(new Uint8Array(block.buffer, block.byteOffset), at + 8, name.length) === name;
  return isEntry(0, ".") && isEntry(12, "..");
}

/** Whether there is a super block of xfs, the two headers after it, and a copy of it in the last allocation group. */
async function isWholeXfs(read: DeviceReader, sizeBytes: bigint): Promise<boolean> {
  const head = await read(0n, 4096);
  if (textAt(head, 0, 4) !== "XFSB") return false;
  const superBlock = viewOf(head);
  const [blockBytes, groupBlocks, groups] = [4, 84, 88].map((at) => BigInt(superBlock.getUint32(at)));
  const sectorBytes = BigInt(superBlock.getUint16(102));
  if (blockBytes === undefined || groupBlocks === undefined || groups === undefined || groups === 0n) return false;
  const last = blockBytes * groupBlocks * (groups - 1n);
  if (sectorBytes < 512n || last + 4n * sectorBytes > sizeBytes) return false;
  if (textAt(await read(last + sectorBytes, 512), 0, 4) !== "XAGF") return false;
  if (textAt(await read(2n * sectorBytes, 512), 0, 4) !== "XAGI") return false;
  const copy = await read(last, 512);
  return textAt(copy, 0, 4) === "XFSB" && uuidAt(copy, 32) === uuidAt(head, 32);
}

/**
 * Whether there is a super block of btrfs with its copy, and nothing of ext4, xfs or LUKS in the first MiB, where no file of a
 * btrfs lies.
 */
async function isWholeBtrfs(read: DeviceReader, sizeBytes: bigint): Promise<boolean> {
  const firstBytes = 1 << 20;
  const copyOffset = 64n << 20n;
  if (sizeBytes < BigInt(firstBytes)) return false;
  const first = await read(0n, firstBytes);
  const head = first.subarray(64 << 10, 68 << 10);
  if (textAt(head, 64, 8) !== "_BHRfS_M") return false;
  if (textAt(first, 0, 4) === "XFSB" || (first[1024 + 0x38] === 0x53 && first[1024 + 0x39] === 0xef)) return false;
  // The places of the second LUKS header are 16 KiB, 32 KiB and so on.
  for (let at = 16 << 10; at < firstBytes; at *= 2) if (textAt(first, at, 6) === "SKUL\xba\xbe") return false;
  if (sizeBytes < copyOffset + 4096n) return true;
  const copy = await read(copyOffset, 4096);
  return textAt(copy, 64, 8) === "_BHRfS_M" && uuidAt(copy, 32) === uuidAt(head, 32);
}

import { textAt, uuidAt, view } from "./bytes.ts";
import type { DeviceReader } from "./device_reader.ts";

/** A LUKS header at its first place. Its second place lies where a file system keeps its files. */
export async function hasLuksHeader(read: DeviceReader): Promise<boolean> {
  return textAt(await read(0n, 4096), 0, 6) === "LUKS\xba\xbe";
}

/**
 * Whether the first sector ends as that of a DOS partition table does and its four entries are empty: boot code that a
 * virtual machine wrote before its ext4 or btrfs, for instance. Nothing can be in partitions that are not there.
 */
export async function hasNoPartition(read: DeviceReader): Promise<boolean> {
  const sector = (await read(0n, 4096)).subarray(0, 512);
  return sector[510] === 0x55 && sector[511] === 0xaa && sector.subarray(446, 510).every((byte) => byte === 0);
}

/**
 * The file system that owns a device on which signatures of several are found; undefined when that cannot be told.
 *
 * A file of an ext4 or xfs can lie where btrfs has its super block (64 KiB) or LUKS its second header (16 KiB to 4 MiB), a
 * file of a btrfs where that header is behind the first MiB, and its content is the tenant's. So a super block that the
 * rest of the file system agrees with wins over what can be in a file; a head without a body, as a partial copy leaves it,
 * wins over nothing. Nothing that a file contains can make a file system: their super blocks are where no file lies.
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
 * Whether there is a super block of ext4, and its root directory is where the super block leads to: the inode, and in its
 * first block the entries "." and "..", both of inode 2. One that has only its super block is damaged, or the remains of an ext4
 * under data of another kind, which e2fsck would write into. The inode alone proves nothing: one in sixteen random ones has
 * the mode of a directory.
 */
export async function isWholeExt4(read: DeviceReader, sizeBytes: bigint): Promise<boolean> {
  const superBlock = new DataView((await read(0n, 4096)).slice(1024).buffer);
  if (superBlock.getUint16(0x38, true) !== 0xef53) return false;
  const logBlockSize = superBlock.getUint32(0x18, true);
  if (logBlockSize > 6) return false;
  const blockBytes = 1024n << BigInt(logBlockSize);
  const has64bit = (superBlock.getUint32(0x60, true) & 0x80) !== 0;
  const inodeBytes = superBlock.getUint32(0x4c, true) === 0 ? 128 : superBlock.getUint16(0x58, true);
  // The first group descriptor, in the block after that of the super block, has the place of the inode table. Inode 2, the second
  // of them, is the root directory.
  const group = view(await read(blockBytes === 1024n ? 2048n : blockBytes, 64));
  const high = has64bit ? BigInt(group.getUint32(0x28, true)) << 32n : 0n;
  const root = (high | BigInt(group.getUint32(8, true))) * blockBytes + BigInt(inodeBytes);
  if (root < 2048n || root + 128n > sizeBytes) return false;
  const inode = view(await read(root, 128));
  // A directory with more than 65000 others in it counts one link (dir_nlink).
  if ((inode.getUint16(0, true) & 0xf000) !== 0x4000 || inode.getUint16(0x1a, true) === 0) return false;
  const isInline = (inode.getUint32(0x20, true) & 0x10000000) !== 0;
  // A directory in its inode (inline_data) begins with the number of its parent, which is itself for the root.
  if (isInline) return inode.getUint32(0x28, true) === 2;
  const block = await firstExt4Block(read, inode, { blockBytes, sizeBytes });
  return block !== undefined && isExt4RootBlock(view(await read(block * blockBytes, 24)));
}

/** Where the first block of an inode lies: by its extents, or by its first direct block. Undefined when it has none on the device. */
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
  // The kernel's own bound for the depth of a tree of extents is 5.
  for (let left = 5; left >= 0; left--) {
    if (node.getUint16(0, true) !== 0xf30a || node.getUint16(2, true) === 0) return undefined;
    const isLeaf = node.getUint16(6, true) === 0;
    const [low, high] = isLeaf ? [20, 18] : [16, 20];
    block = (BigInt(node.getUint16(high, true)) << 32n) | BigInt(node.getUint32(low, true));
    if (!isOnDevice(block)) return undefined;
    if (isLeaf) return block;
    node = view(await read(block * blockBytes, 60));
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

/** Whether there is a super block of xfs, its other two headers follow, and the last allocation group has a copy of it. */
async function isWholeXfs(read: DeviceReader, sizeBytes: bigint): Promise<boolean> {
  const head = await read(0n, 4096);
  if (textAt(head, 0, 4) !== "XFSB") return false;
  const superBlock = view(head);
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
 * Whether there is a super block of btrfs with its copy, and nothing of ext4, xfs or LUKS in the first MiB, which belongs to
 * no file of a btrfs.
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

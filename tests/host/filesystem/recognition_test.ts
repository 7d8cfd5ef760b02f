/** A file system is recognised by itself, whatever its files contain and whatever was written around it. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { probeContent } from "../../../lib/host/filesystem/content.ts";
import type { FsType } from "../../../lib/host/filesystem/fs_type.ts";
import { assertSame, copyOf, type Disk, mib, mountOptions, withDisk, write } from "../../support/disk.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "cryptsetup");
const ascii = new TextEncoder();

/** What the content of one block, or of a few, can look like: where it begins, from the end where negative. */
interface Lookalike {
  readonly what: string;
  readonly make: (sizeBytes: number) => readonly (readonly [offsetBytes: number, bytes: Uint8Array])[];
}

const atTheEnd: readonly Lookalike[] = [
  { what: "an NVIDIA RAID", make: (size) => [[size - 1024, ascii.encode("NVIDIA")]] },
  {
    what: "DRBD",
    make: (size) => {
      const block = new Uint8Array(4096);
      // drbd_meta_data_on_disk of 8.4: a magic after eight 64-bit numbers, and sizes that fit it.
      const view = new DataView(block.buffer);
      view.setBigUint64(0, BigInt(size / 512));
      view.setUint32(60, 0x8374026b + 1);
      view.setUint32(68, 64);
      return [[size - 4096, block]];
    },
  },
  {
    what: "ZFS",
    make: (size) => {
      const label = size - (size % (256 << 10)) - (256 << 10);
      const uberblock = new Uint8Array(8);
      new DataView(uberblock.buffer).setBigUint64(0, 0x00bab10cn, true);
      return Array.from({ length: 16 }, (_, n) => [label + (128 << 10) + n * 1024, uberblock] as const);
    },
  },
];

/** What blkid answers when it looks for all types. */
async function blkid({ machine, namespace }: Disk): Promise<string> {
  return (await machine.tool("sh", "-c", `blkid -p -s TYPE -o value ${namespace.path} || echo exit $?`)).trim();
}

async function makeWith(disk: Disk, fsType: FsType, mkfsOptions = ""): Promise<void> {
  await disk.mount({ ...mountOptions, fsType, mkfsOptions });
  await Deno.writeTextFile(join(disk.path, "kept"), "the tenant's data");
  await disk.machine.tool("umount", disk.path);
}

async function assertMounts(disk: Disk, fsType: FsType): Promise<void> {
  await disk.mount({ ...mountOptions, fsType });
  assert.equal(await Deno.readTextFile(join(disk.path, "kept")), "the tenant's data");
}

for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
  for (const { what, make } of atTheEnd) {
    Deno.test({
      name: `promise 29: an intact ${fsType} with content that looks like ${what} at its end is mounted`,
      ignore,
      fn: () =>
        withDisk(320, async (disk) => {
          await makeWith(disk, fsType);
          for (const [offset, bytes] of make(320 * mib)) await write(disk.namespace.path, offset, bytes);
          assert.notEqual(await blkid(disk), fsType);

          await assertMounts(disk, fsType);
        }),
    });
  }
}

Deno.test({
  name: "promise 29: what a file contains makes an ext4 no RAID, seen with a file that fills it",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      await disk.mount(mountOptions);
      await Deno.writeTextFile(join(disk.path, "kept"), "the tenant's data");
      const block = new Uint8Array(mib);
      for (let at = 3072; at < block.length; at += 4096) block.set(ascii.encode("NVIDIA"), at);
      {
        using file = await Deno.open(join(disk.path, "image"), { write: true, create: true });
        await assert.rejects(async () => {
          for (;;) await file.write(block);
        }, /No space left/);
      }
      await disk.machine.tool("umount", disk.path);

      await assertMounts(disk, "ext4");
    }),
});

/** The second header of a new LUKS2, which says that it belongs at `offset`. */
async function secondLuksHeader({ machine }: Disk, offset: number): Promise<Uint8Array> {
  const file = join(machine.directory, "luks");
  const key = join(machine.directory, "key");
  await Deno.writeTextFile(key, "test");
  await machine.tool("truncate", "--size=32M", file);
  const fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
  await machine.tool("cryptsetup", "luksFormat", "--batch-mode", ...fast, file, key);
  const header = (await Deno.readFile(file)).slice(16 << 10, 32 << 10);
  new DataView(header.buffer).setBigUint64(256, BigInt(offset));
  return header;
}

for (const [fsType, mkfsOptions] of [["ext4", "-N 1024"], ["xfs", ""]] as const) {
  Deno.test({
    name: `promise 29: an intact ${fsType} with a file that contains a LUKS header in its middle is mounted`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await makeWith(disk, fsType, mkfsOptions);
        await write(disk.namespace.path, 4 * mib, await secondLuksHeader(disk, 4 * mib));
        assert.equal(await blkid(disk), "crypto_LUKS");

        await assertMounts(disk, fsType);
      }),
  });
}

for (const place of [2, 4]) {
  Deno.test({
    name: `promise 29: an intact btrfs with a file that contains a LUKS header at ${place} MiB is mounted`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await makeWith(disk, "btrfs");
        await write(disk.namespace.path, place * mib, await secondLuksHeader(disk, place * mib));
        assert.equal(await blkid(disk), "crypto_LUKS");

        await assertMounts(disk, "btrfs");
      }),
  });
}

Deno.test({
  name: "promise 1: a btrfs over a LUKS whose second header is left is refused, and no byte changes",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      await makeWith(disk, "btrfs");
      await write(disk.namespace.path, 16 << 10, await secondLuksHeader(disk, 16 << 10));
      const before = await copyOf(disk);

      await rejects(
        disk.mount(mountOptions),
        "FAILED_PRECONDITION",
        /has signatures of more than one kind, it is left alone/,
      );

      await assertSame(disk, before);
    }),
});

Deno.test({
  name: "promise 29: an intact xfs with a file that contains the super block of a btrfs is mounted",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      // Larger inodes leave this place to files.
      await makeWith(disk, "xfs", "-i size=2048");
      await write(disk.namespace.path, 64 << 10, await btrfsSuperBlock(disk));

      await assertMounts(disk, "xfs");
    }),
});

async function btrfsSuperBlock({ machine }: Disk): Promise<Uint8Array> {
  const file = join(machine.directory, "btrfs");
  await machine.tool("truncate", "--size=128M", file);
  await machine.tool("mkfs.btrfs", "-q", file);
  return (await Deno.readFile(file)).slice(64 << 10, 68 << 10);
}

for (const [fsType, places] of [["ext4", [0]], ["btrfs", [0, 1024, 32 << 10]]] as const) {
  for (const place of places) {
    Deno.test({
      name: `promise 29: an intact ${fsType} with foreign bytes before its super block, at byte ${place} is mounted`,
      ignore,
      fn: () =>
        withDisk(320, async (disk) => {
          await makeWith(disk, fsType);
          // A boot sector without a table, and the label of a CD where one would be.
          await write(disk.namespace.path, place, ascii.encode(place === 32 << 10 ? "\x01CD001" : "boot me"));

          await assertMounts(disk, fsType);
        }),
    });
  }
}

for (const fsType of ["ext4", "btrfs"] as const) {
  Deno.test({
    name: `promise 29: an intact ${fsType} behind a boot sector whose partition table is empty is mounted`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await makeWith(disk, fsType);
        const sector = new Uint8Array(512).fill(0x90, 0, 440);
        sector.set([0x55, 0xaa], 510);
        await write(disk.namespace.path, 0, sector);

        await assertMounts(disk, fsType);
      }),
  });
}

Deno.test({
  name: "promise 1: an empty partition table alone is refused, and no byte changes",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      await write(disk.namespace.path, 510, new Uint8Array([0x55, 0xaa]));
      const before = await copyOf(disk);

      await rejects(
        disk.mount(mountOptions),
        "FAILED_PRECONDITION",
        /holds a partition table \(dos\), it is left alone/,
      );

      await assertSame(disk, before);
    }),
});

/** The first bytes of another file system, as a copy that ended early leaves them over what was there. */
async function headOf({ machine }: Disk, fsType: FsType, bytes: number): Promise<Uint8Array> {
  const file = join(machine.directory, `head.${fsType}`);
  await machine.tool("truncate", "--size=320M", file);
  await machine.tool(`mkfs.${fsType}`, "-q", file);
  return (await Deno.readFile(file)).slice(0, bytes);
}

for (const head of ["ext4", "xfs"] as const) {
  Deno.test({
    name: `promise 1: a btrfs under the head of an ${head} is refused, and no byte changes`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await makeWith(disk, "btrfs");
        await write(disk.namespace.path, 0, await headOf(disk, head, 16 << 10));
        const before = await copyOf(disk);

        const two = /has signatures of more than one kind, it is left alone/;
        await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", two);
        await rejects(disk.mount({ ...mountOptions, fsType: head }), "FAILED_PRECONDITION", two);

        await assertSame(disk, before);
      }),
  });

  Deno.test({
    name: `promise 1: a LUKS under the head of an ${head} is refused, and no byte changes`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await write(disk.namespace.path, 16 << 10, await secondLuksHeader(disk, 16 << 10));
        await write(disk.namespace.path, 0, await headOf(disk, head, 16 << 10));
        const before = await copyOf(disk);

        await rejects(
          disk.mount(mountOptions),
          "FAILED_PRECONDITION",
          /has signatures of more than one kind, it is left alone/,
        );

        await assertSame(disk, before);
      }),
  });
}

/** Keeps the first 8 KiB of the device, and puts bytes without any meaning behind them. */
async function overwriteBody({ namespace }: Disk, sizeMib: number): Promise<void> {
  const noise = new Uint8Array(64 << 10);
  for (let at = 8 << 10; at < sizeMib * mib; at += noise.length) {
    crypto.getRandomValues(noise);
    await write(namespace.path, at, noise.subarray(0, Math.min(noise.length, sizeMib * mib - at)));
  }
}

for (const { what, make } of [...atTheEnd, { what: "noise", make: () => [] }] satisfies Lookalike[]) {
  Deno.test({
    name: `promise 1: ${what} with the super block of an earlier ext4 at its head is refused, and no byte changes`,
    ignore,
    fn: () =>
      withDisk(16, async (disk) => {
        await makeWith(disk, "ext4");
        await overwriteBody(disk, 16);
        for (const [offset, bytes] of make(16 * mib)) await write(disk.namespace.path, offset, bytes);
        const before = await copyOf(disk);

        await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /it is left alone/);
        await rejects(disk.mount({ ...mountOptions, readOnly: true }), "FAILED_PRECONDITION", /it is left alone/);

        await assertSame(disk, before);
        assert(!disk.machine.commands.includes("e2fsck"));
      }),
  });
}

Deno.test({
  name: "promise 1: an ext4 of which only the root directory's inode is left is refused, and no byte changes",
  ignore,
  fn: () =>
    withDisk(16, async (disk) => {
      await makeWith(disk, "ext4");
      const whole = await Deno.readFile(disk.namespace.file);
      await overwriteBody(disk, 16);
      // The inode table is in the descriptor of the first group; the inode of the root directory is the second of it.
      const table = new DataView(whole.buffer).getUint32(2048 + 8, true) * 1024;
      await write(disk.namespace.path, table + 256, whole.subarray(table + 256, table + 512));
      const before = await copyOf(disk);

      await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /it is left alone/);

      await assertSame(disk, before);
      assert(!disk.machine.commands.includes("e2fsck"));
    }),
});

for (
  const [what, mkfsOptions, change] of [
    ["blocks of 1 KiB in clusters", "-b 1024 -O bigalloc", undefined],
    ["descriptors of groups in each of them", "-O meta_bg,^resize_inode", undefined],
    ["inodes of 128 bytes", "-I 128", undefined],
    ["lists of blocks in place of extents", "-O ^extents,^64bit", undefined],
    ["directories inside their inodes", "-O inline_data", undefined],
    // The kernel counts one link of a directory with more than 65000 others in it.
    ["65000 directories in its root", "", "set_inode_field <2> links_count 1"],
  ] as const
) {
  Deno.test({
    name: `promise 29: an intact ext4 with ${what} is mounted, also with content that looks like a RAID`,
    ignore,
    fn: () =>
      withDisk(64, async (disk) => {
        await makeWith(disk, "ext4", mkfsOptions);
        if (change !== undefined) await disk.machine.tool("debugfs", "-w", "-R", change, disk.namespace.path);
        await assertMounts(disk, "ext4");
        await disk.machine.tool("umount", disk.path);
        if (change !== undefined) await disk.machine.tool("debugfs", "-w", "-R", change, disk.namespace.path);
        await write(disk.namespace.path, 64 * mib - 1024, ascii.encode("NVIDIA"));

        await assertMounts(disk, "ext4");
      }),
  });
}

Deno.test({
  name: "promise 1: a partition table over an ext4 is refused, and no byte changes",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      await makeWith(disk, "ext4");
      const sector = new Uint8Array(512);
      sector.set([0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0], 446);
      sector.set([0x55, 0xaa], 510);
      await write(disk.namespace.path, 0, sector);
      const before = await copyOf(disk);

      await rejects(
        disk.mount(mountOptions),
        "FAILED_PRECONDITION",
        /holds a partition table \(dos\), it is left alone/,
      );

      await assertSame(disk, before);
    }),
});

Deno.test({
  name:
    "promise 29: probeContent takes a LUKS volume for one, whatever its last blocks look like and with its second header alone",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      const { machine, namespace, device } = disk;
      const found = async () => (await probeContent(machine.host, callContext(), await device())).kind;
      await write(namespace.path, 16 << 10, await secondLuksHeader(disk, 16 << 10));
      assert.equal(await found(), "luks");

      const luks = await Deno.readFile(join(machine.directory, "luks"));
      await write(namespace.path, 0, luks.subarray(0, 32 << 10));
      await write(namespace.path, 320 * mib - 1024, ascii.encode("NVIDIA"));
      assert.equal(await found(), "luks");
    }),
});

Deno.test({
  name: "an ext2 is refused by its name",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      await disk.machine.tool("mkfs.ext4", "-q", "-t", "ext2", disk.namespace.path);

      await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /holds ext2, which is none of/);
    }),
});

/** A mkfs that is killed at any moment leaves a volume that the next stage finishes, and no other data is mistaken for its work. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { probeContent } from "../../../lib/host/filesystem/content.ts";
import type { FsType } from "../../../lib/host/filesystem/fs_type.ts";
import { fileSystemUuid } from "../../../lib/host/filesystem/fs_uuid.ts";
import { type MountOptions, mountVolume } from "../../../lib/host/filesystem/mount.ts";
import { isUnfinished, markOffset } from "../../../lib/host/filesystem/unfinished.ts";
import type { Host } from "../../../lib/host/host.ts";
import { assertSame, copyOf, type Disk, mib, mountOptions, uuid, withDisk, write } from "../../support/disk.ts";
import { needs } from "../../support/needs.ts";
import {
  blockCapability,
  callContext,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "strace");
const changes = "pwrite64,pwritev,write,fallocate,fsync";

/** What ends a driver that is killed together with its mkfs. */
class Killed extends Error {}

/** The host of `disk`, whose mkfs is killed at its n-th write (which is not made), and the driver with it. */
function killing({ machine }: Disk, n: number): Host {
  return {
    ...machine.host,
    async run(program, args, options) {
      if (!program.startsWith("mkfs.")) return await machine.host.run(program, args, options);
      const kill = `inject=${changes}:signal=KILL:error=EIO:when=${n}`;
      const strace = ["-f", "-qq", "-o", "/dev/null", "-e", `trace=${changes}`, "-e", kill];
      const ended = await machine.host.run("strace", [...strace, program, ...args], options);
      if (ended.code !== 0) throw new Killed();
      return ended;
    },
  };
}

/** Mounts with a mkfs that is killed at its n-th write; false: it has fewer. */
async function isCut(disk: Disk, special: Partial<MountOptions>, n: number): Promise<boolean> {
  const device = await disk.device();
  try {
    await mountVolume(killing(disk, n), callContext(), device, { ...mountOptions, ...special, path: disk.path });
  } catch (error) {
    if (error instanceof Killed) return true;
    throw error;
  }
  await disk.machine.tool("umount", disk.path);
  return false;
}

/** Brings the device back to what it was before it was used. */
async function blank({ machine, namespace }: Disk): Promise<void> {
  await machine.tool(
    "fallocate",
    "--punch-hole",
    "--offset=0",
    `--length=${await size(namespace.file)}`,
    namespace.file,
  );
  await machine.tool("blockdev", "--flushbufs", namespace.path);
}

async function size(file: string): Promise<number> {
  return (await Deno.stat(file)).size;
}

interface Making {
  readonly fsType: FsType;
  readonly sizeMib: number;
  readonly mkfsOptions: string;
  /** Every how many writes it is cut. */
  readonly step: number;
}

const makings: readonly Making[] = [
  { fsType: "ext4", sizeMib: 64, mkfsOptions: "-b 4096", step: 1 },
  { fsType: "ext4", sizeMib: 64, mkfsOptions: "", step: 41 },
  { fsType: "xfs", sizeMib: 320, mkfsOptions: "", step: 5 },
  { fsType: "btrfs", sizeMib: 128, mkfsOptions: "-L mine", step: 5 },
];

for (const { fsType, sizeMib, mkfsOptions, step } of makings) {
  Deno.test({
    name: `promise 8: the next stage finishes a mkfs.${fsType} ${mkfsOptions} that was killed at any write`,
    ignore,
    fn: () =>
      withDisk(sizeMib, async (disk) => {
        const special = { fsType, mkfsOptions };
        let cuts = 0;
        for (let n = 1; await isCut(disk, special, n); n += step) {
          cuts++;
          // Killed at the first attempt and at the second one.
          await isCut(disk, special, n + 2);

          await disk.mount({ ...mountOptions, ...special });

          await Deno.writeTextFile(join(disk.path, "works"), "");
          await disk.machine.tool("umount", disk.path);
          await blank(disk);
        }
        assert(cuts > 5, `${cuts} cuts`);
      }),
  });
}

Deno.test({
  name: "promise 8: the next stage finishes an ext4 of 2 TB that was killed at writes spread over its mkfs",
  ignore,
  fn: () =>
    withDisk(2 << 20, async (disk) => {
      for (const n of [3, 40, 700, 2000, 2100]) {
        assert(await isCut(disk, {}, n), String(n));
      }
      // Mounted without it, the kernel begins to write 32 GB of zeros into the file behind the device.
      await disk.mount({ ...mountOptions, flags: ["noinit_itable"] });

      await Deno.writeTextFile(join(disk.path, "works"), "");
    }),
});

for (const [mark, cut] of [["before mkfs wrote anything", 1], ["while mkfs wrote", 60]] as const) {
  Deno.test({
    name: `promise 8: a volume that was enlarged after its stage was killed ${mark} gets a file system of its new size`,
    ignore,
    fn: () =>
      withDisk(2048, async (disk) => {
        const { machine, namespace, path } = disk;
        assert(await isCut(disk, {}, cut));
        await machine.grow(namespace, 5 * 1024 * mib);

        await disk.mount(mountOptions);

        assert((await machine.host.usage(path)).totalBytes > 4n << 30n);
        assert.equal(await lastText(disk), "");
      }),
  });
}

Deno.test({
  name: "promise 1: a half-made ext4 that was enlarged is refused when data is in what was added, and nothing is run",
  ignore,
  fn: () =>
    withDisk(1024, async (disk) => {
      assert(await isCut(disk, {}, 60));
      await disk.machine.grow(disk.namespace, 2048 * mib);
      await write(disk.namespace.path, 2047 * mib, garbage);
      disk.machine.commands.splice(0);

      await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /is not blank and holds no file system/);

      assert.deepEqual(disk.machine.commands, ["blkid"]);
    }),
});

Deno.test({
  name: "promise 8: a stage that was killed after its mark, before mkfs, is repeated",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      const { machine } = disk;
      await assert.rejects(
        mountVolume(endingAt(machine.host, "mkfs.ext4"), callContext(), await disk.device(), {
          ...mountOptions,
          path: disk.path,
        }),
        Killed,
      );
      assert.notEqual(await lastText(disk), "");

      await disk.mount(mountOptions);

      assert.equal(await lastText(disk), "");
    }),
});

Deno.test({
  name: "promise 8: a stage that was killed after mkfs, before it erased its mark, keeps the file system",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      const { machine } = disk;
      let writes = 0;
      const host: Host = {
        ...machine.host,
        writeDevice: (...args) => ++writes === 2 ? Promise.reject(new Killed()) : machine.host.writeDevice(...args),
      };
      await assert.rejects(
        mountVolume(host, callContext(), await disk.device(), { ...mountOptions, path: disk.path }),
        /the mark of an unfinished .* cannot be read or written/,
      );
      assert.notEqual(await lastText(disk), "");

      await disk.mount(mountOptions);

      assert.equal(machine.commands.filter((program) => program === "mkfs.ext4").length, 1);
      assert.equal(await lastText(disk), "");
    }),
});

/** A host whose driver is killed before it runs `program`. */
function endingAt(host: Host, program: string): Host {
  return { ...host, run: (name, ...rest) => name === program ? Promise.reject(new Killed()) : host.run(name, ...rest) };
}

const markFromEnd = (2 << 20) + (64 << 10);

/** The text where a mark is, which is the mark or nothing. */
async function lastText({ namespace }: Disk): Promise<string> {
  return new TextDecoder().decode(await markBlock(namespace.file)).replaceAll("\0", "");
}

async function markBlock(file: string): Promise<Uint8Array> {
  using opened = await Deno.open(file);
  await opened.seek(await size(file) - markFromEnd, Deno.SeekMode.Start);
  const block = new Uint8Array(4096);
  assert.equal(await opened.read(block), block.length);
  return block;
}

/** Leaves a mkfs.ext4 that was killed near its end. */
async function leaveHalfMade(disk: Disk): Promise<void> {
  assert(await isCut(disk, { mkfsOptions: "-b 4096" }, 20));
}

const garbage = new TextEncoder().encode("the tenant's data");

for (
  const [what, change] of [
    ["when its first bytes are data", ({ namespace }: Disk) => write(namespace.path, 0, garbage)],
    ["when the mark is of another namespace, as in a clone", async ({ namespace }: Disk) => {
      const mark = new TextEncoder().encode(`namespace ${uuid.replace("0f2c", "1f2c")}`);
      const text = new TextDecoder("latin1").decode(await Deno.readFile(namespace.file));
      const at = text.lastIndexOf(`namespace ${uuid}`);
      assert(at >= 64 * mib - markFromEnd);
      await write(namespace.path, at, mark);
    }],
    ...[70_000, mib, 32 * mib, 63 * mib, 64 * mib - garbage.length].map((at) =>
      [`when text is at byte ${at}`, ({ namespace }: Disk) => write(namespace.path, at, garbage)] as const
    ),
    ...[5 * mib, 32 * mib].map((at) =>
      [
        `when random bytes are at byte ${at}`,
        ({ namespace }: Disk) => write(namespace.path, at, crypto.getRandomValues(new Uint8Array(64 << 10))),
      ] as const
    ),
    [
      "when the mark is gone",
      ({ namespace }: Disk) => write(namespace.path, 64 * mib - markFromEnd, new Uint8Array(4096)),
    ],
  ] as const
) {
  Deno.test({
    name: `promise 1: a half-made ext4 is refused ${what}, and no byte changes`,
    ignore,
    fn: () =>
      withDisk(64, async (disk) => {
        await leaveHalfMade(disk);
        await change(disk);
        const before = await copyOf(disk);

        await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /is not blank and holds no file system/);

        await assertSame(disk, before);
      }),
  });
}

Deno.test({
  name: "promise 1: a volume that a pod got as a block device is never begun again, whatever was left on it before",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      const { machine, namespace } = disk;
      await leaveHalfMade(disk);
      const discovery = join(machine.directory, "discovery.d");
      await Deno.mkdir(discovery);
      const attacher = createDiscoveryClientAttacher({ host: machine.host, directory: discovery, hostNqn: "nqn.host" });
      const calls = nodeCalls({ host: machine.host, attacher });
      await calls.stage({
        volumeId: volumeId(uuid),
        stagingTargetPath: disk.path,
        publishContext: publishContext(uuid),
        volumeCapability: blockCapability(),
      });
      // Written by the pod, behind what a mkfs zeroes first.
      await write(namespace.path, 32 * mib, garbage);
      const before = await copyOf(disk);

      await rejects(disk.mount(mountOptions), "FAILED_PRECONDITION", /is not blank and holds no file system/);

      await assertSame(disk, before);
    }),
});

Deno.test({
  name: "promise 1: what looks like the mark in a file stays as it is",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      const { namespace } = disk;
      await leaveHalfMade(disk);
      const mark = await markBlock(namespace.file);
      await disk.mount(mountOptions);
      await disk.machine.tool("umount", disk.path);
      await write(namespace.path, 64 * mib - markFromEnd, mark);

      await disk.mount(mountOptions);

      assert.deepEqual(await markBlock(namespace.file), mark);
    }),
});

Deno.test({
  name: "promise 1: a used btrfs that lost its super block is refused, even with the mark in a file of it",
  ignore,
  fn: () =>
    withDisk(128, async (disk) => {
      const { namespace } = disk;
      assert(await isCut(disk, { fsType: "btrfs" }, 20));
      const mark = await markBlock(namespace.file);
      await disk.mount({ ...mountOptions, fsType: "btrfs" });
      await disk.machine.tool("umount", disk.path);
      await write(namespace.path, 128 * mib - markFromEnd, mark);
      await write(namespace.path, 64 << 10, new Uint8Array(4096));
      const before = await copyOf(disk);

      await rejects(
        disk.mount({ ...mountOptions, fsType: "btrfs" }),
        "FAILED_PRECONDITION",
        /is not blank and holds no/,
      );

      await assertSame(disk, before);
    }),
});

for (
  const [fsType, mkfsOptions, sizes] of [
    ["ext4", "", [16, 17, 31, 65, 100, 129, 257, 511, 513, 1000, 1025, 5000, 10_240]],
    ["ext4", "-b 1024", [129, 2049]],
    ["ext4", "-I 128 -L sixteen-letters. -O ^64bit,^metadata_csum", [64, 300]],
    ["ext4", "-O inline_data,sparse_super2,mmp,orphan_file -N 4096", [64, 3000]],
    ["ext4", "-O ^resize_inode,^flex_bg,^metadata_csum -E lazy_itable_init=0", [64, 700]],
    ["ext4", "-O bigalloc -C 65536", [64, 1024]],
    ["xfs", "", [300, 301, 1025, 10_240]],
    ["btrfs", "", [110, 200, 1025, 10_240]],
    ["btrfs", "-M", [40, 66]],
  ] as const
) {
  Deno.test({
    name: `promise 8: mkfs.${fsType} ${mkfsOptions} of any size leaves the mark until it has ended, and none stays`,
    ignore,
    async fn() {
      for (const sizeMib of sizes) {
        await withDisk(sizeMib, async (disk) => {
          const { machine, namespace } = disk;
          const device = await disk.device();
          const offset = Number(markOffset(device));
          const markAt = () => machine.host.readBytes(namespace.path, BigInt(offset), 4096);
          let left: Uint8Array | undefined;
          const host: Host = {
            ...machine.host,
            async run(program, args, options) {
              const ended = await machine.host.run(program, args, options);
              if (program !== `mkfs.${fsType}`) return ended;
              left = await markAt();
              // All that mkfs wrote but the super block, which ext4 writes last and isUnfinished does not ask for.
              const read = (at: bigint, length: number) => machine.host.readBytes(namespace.path, at, length);
              if (fsType === "ext4") assert(await isUnfinished(read, device), `${sizeMib} MiB is taken for data`);
              return ended;
            },
          };

          await mountVolume(host, callContext(), device, { ...mountOptions, fsType, mkfsOptions, path: disk.path });

          assert.match(new TextDecoder().decode(left), /^lbcsi: /, `${sizeMib} MiB`);
          assert.equal(new TextDecoder().decode(await markAt()).includes("lbcsi"), false);
        });
      }
    },
  });
}

Deno.test({
  name: "a mkfs that refuses its options leaves the device blank",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      await rejects(
        disk.mount({ ...mountOptions, mkfsOptions: "-I 100" }),
        "FAILED_PRECONDITION",
        /mkfs.ext4 failed with exit/,
      );

      const { kind } = await probeContent(disk.machine.host, callContext(), await disk.device());
      assert.equal(kind, "blank");
    }),
});

for (const fsType of ["xfs", "btrfs"] as const) {
  Deno.test({
    name: `promise 8: mountVolume makes a ${fsType} again when the mkfs of an earlier version was killed`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        const { machine, namespace, mount, path } = disk;
        await mount({ ...mountOptions, fsType });
        await machine.tool("umount", path);
        if (fsType === "xfs") await write(namespace.path, 126, new Uint8Array([1]));
        else await leaveHalfMadeBtrfs(disk);

        await mount({ ...mountOptions, fsType });

        assert.equal(machine.commands.filter((program) => program === `mkfs.${fsType}`).length, 2);
        await Deno.writeTextFile(join(path, "works"), "");
      }),
  });
}

for (const fsType of ["xfs", "btrfs"] as const) {
  Deno.test({
    name: `promise 1: what looks like a half-made ${fsType} of an earlier version is refused when it holds data`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        const { machine, namespace } = disk;
        await disk.mount({ ...mountOptions, fsType });
        await machine.tool("umount", disk.path);
        if (fsType === "xfs") await write(namespace.path, 126, new Uint8Array([1]));
        else await leaveHalfMadeBtrfs(disk);
        await write(namespace.path, 300 * mib, crypto.getRandomValues(new Uint8Array(64 << 10)));
        await write(namespace.path, 319 * mib, garbage);
        const before = await copyOf(disk);

        await rejects(
          disk.mount({ ...mountOptions, fsType }),
          "FAILED_PRECONDITION",
          /is not blank and|mount failed with exit/,
        );

        await assertSame(disk, before);
      }),
  });
}

/** The super block of a mkfs.btrfs that the earlier version gave a UUID. */
async function leaveHalfMadeBtrfs({ namespace }: Disk): Promise<void> {
  await write(namespace.path, (64 << 10) + 32, Uint8Array.fromHex(fileSystemUuid(uuid).replaceAll("-", "")));
  await write(namespace.path, (64 << 10) + 64, new TextEncoder().encode("!BHRfS_M"));
}

Deno.test({
  name: "promise 1: an ext4 with data is not begun again because a half-made btrfs of an earlier version is left in it",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      // Few inodes and no reserve for growth leave the place of a btrfs super block to files.
      await disk.mount({ ...mountOptions, mkfsOptions: "-O ^resize_inode -N 64" });
      await Deno.writeTextFile(join(disk.path, "kept"), "the tenant's data");
      await disk.machine.tool("umount", disk.path);
      await leaveHalfMadeBtrfs(disk);

      await disk.mount(mountOptions);

      assert.equal(await Deno.readTextFile(join(disk.path, "kept")), "the tenant's data");
    }),
});

Deno.test({
  name: "promise 26: mkfs reads no other block device, so that one that hangs holds up no new volume",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      const { machine, namespace } = disk;
      for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
        const log = join(machine.directory, `reads.${fsType}`);
        const host: Host = {
          ...machine.host,
          run: (program, args, options) =>
            program.startsWith("mkfs.")
              ? machine.host.run(
                "strace",
                ["-f", "-qq", "-y", "-o", log, "-e", "trace=read,pread64,readv,preadv", program, ...args],
                options,
              )
              : machine.host.run(program, args, options),
        };

        await mountVolume(host, callContext(), await disk.device(), { ...mountOptions, fsType, path: disk.path });

        // A loop device that is mounted elsewhere may be opened to see whose file it has, which waits for no read.
        const read = [...(await Deno.readTextFile(log)).matchAll(/\(\d+<(\/[^>]*)>/g)].map(([, path = ""]) => path);
        assert.deepEqual([...new Set(read.filter(isBlockDevice))], [namespace.path]);
        await machine.tool("umount", disk.path);
        await blank(disk);
      }
    }),
});

function isBlockDevice(path: string): boolean {
  try {
    return Deno.statSync(path).isBlockDevice === true;
  } catch {
    return false;
  }
}

Deno.test({
  name: "the label in mkfs-options is that of the new btrfs",
  ignore,
  fn: () =>
    withDisk(128, async (disk) => {
      await disk.mount({ ...mountOptions, fsType: "btrfs", mkfsOptions: "-L mine" });

      assert.equal((await disk.machine.tool("btrfs", "filesystem", "label", disk.path)).trim(), "mine");
    }),
});

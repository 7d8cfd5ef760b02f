import assert from "node:assert/strict";
import { join } from "node:path";
import { type StatusCode } from "../../../lib/error.ts";
import { probeContent } from "../../../lib/host/filesystem/content.ts";
import { type MountOptions, mountVolume } from "../../../lib/host/filesystem/mount.ts";
import { assertSame, copyOf, type Disk, mib, mountOptions, withDisk, write } from "../../support/disk.ts";
import { fakeDisk } from "../../support/fake_disk.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");

const garbage = new TextEncoder().encode("data that no tool knows");

interface NonBlank {
  readonly what: string;
  readonly tools?: readonly string[];
  readonly sizeMib?: number;
  readonly make: (disk: Disk) => Promise<unknown>;
  readonly options?: Partial<MountOptions>;
  readonly code: StatusCode;
  readonly message: RegExp;
}

const nonBlank: readonly NonBlank[] = [
  {
    what: "an ext4 when xfs is requested",
    make: ({ machine, namespace }) => machine.tool("mkfs.ext4", "-q", namespace.path),
    options: { fsType: "xfs" },
    code: "FAILED_PRECONDITION",
    message: /holds ext4, the request wants xfs; it is never formatted again/,
  },
  {
    what: "an xfs when ext4 is requested",
    tools: ["mkfs.xfs"],
    sizeMib: 320,
    make: ({ machine, namespace }) => machine.tool("mkfs.xfs", "-q", namespace.path),
    options: { fsType: "ext4" },
    code: "FAILED_PRECONDITION",
    message: /holds xfs, the request wants ext4/,
  },
  {
    what: "a btrfs when ext4 is requested",
    tools: ["mkfs.btrfs"],
    sizeMib: 128,
    make: ({ machine, namespace }) => machine.tool("mkfs.btrfs", "-q", namespace.path),
    options: { fsType: "ext4" },
    code: "FAILED_PRECONDITION",
    message: /holds btrfs, the request wants ext4/,
  },
  {
    what: "an ext2",
    make: ({ machine, namespace }) => machine.tool("mkfs.ext4", "-q", "-t", "ext2", namespace.path),
    code: "FAILED_PRECONDITION",
    message: /holds ext2, which is none of ext4, xfs, btrfs; it is left alone/,
  },
  {
    what: "swap space",
    tools: ["mkswap"],
    make: ({ machine, namespace }) => machine.tool("mkswap", namespace.path),
    code: "FAILED_PRECONDITION",
    message: /holds swap, which is none of/,
  },
  {
    what: "a LUKS header",
    tools: ["cryptsetup"],
    make: async ({ machine, namespace }) => {
      const key = join(machine.directory, "key");
      await Deno.writeTextFile(key, "test");
      const fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
      await machine.tool("cryptsetup", "luksFormat", "--batch-mode", ...fast, namespace.path, key);
    },
    code: "FAILED_PRECONDITION",
    message: /holds crypto_LUKS, which is none of/,
  },
  {
    what: "an empty DOS partition table",
    make: ({ namespace }) => {
      const sector = new Uint8Array(512);
      // One partition of type 83 from sector 2048 on, and the signature.
      sector.set([0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0], 446);
      sector.set([0x55, 0xaa], 510);
      return write(namespace.path, 0, sector);
    },
    code: "FAILED_PRECONDITION",
    message: /holds a partition table \(dos\), it is left alone/,
  },
  {
    what: "two file systems at once",
    tools: ["mkfs.btrfs"],
    sizeMib: 128,
    make: async ({ machine, namespace }) => {
      await machine.tool("mkfs.btrfs", "-q", namespace.path);
      const other = await machine.addNamespace("1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e", 128 * mib);
      await machine.tool("mkfs.ext4", "-q", other.path);
      await write(namespace.path, 0, (await Deno.readFile(other.file)).subarray(0, 16384));
    },
    code: "FAILED_PRECONDITION",
    message: /left alone|more than one kind/,
  },
  ...[
    ["at its first byte", 0],
    ["in its head", 70_000],
    ["at the end of its head", 2 * mib - garbage.length],
    ["in its middle", 32 * mib],
    ["where a backup of ext4 would be", 8193 * 1024],
    ["at the begin of its tail", 62 * mib],
    ["at its last byte", 64 * mib - garbage.length],
  ].map(([where, offset]): NonBlank => ({
    what: `unknown data ${where}`,
    make: ({ namespace }) => write(namespace.path, Number(offset), garbage),
    code: "FAILED_PRECONDITION",
    message: new RegExp(`not blank and holds no file system: there is data at byte ${offset}; it is left alone`),
  })),
  {
    what: "an ext4 whose super block was lost",
    make: async ({ machine, namespace }) => {
      await machine.tool("mkfs.ext4", "-q", namespace.path);
      await write(namespace.path, 1024, new Uint8Array(1024));
    },
    code: "FAILED_PRECONDITION",
    message: /not blank and holds no file system/,
  },
  {
    what: "an xfs that another program never finished",
    tools: ["mkfs.xfs"],
    sizeMib: 320,
    make: async ({ machine, namespace }) => {
      await machine.tool("mkfs.xfs", "-q", namespace.path);
      await write(namespace.path, 126, new Uint8Array([1]));
    },
    code: "FAILED_PRECONDITION",
    message: /mount failed with exit/,
  },
  {
    what: "a blank device, when read-only access is requested,",
    make: () => Promise.resolve(),
    options: { readOnly: true },
    code: "FAILED_PRECONDITION",
    message: /has no file system, and with read-only or shared access none is made/,
  },
  {
    what: "a blank device, when shared access is requested,",
    make: () => Promise.resolve(),
    options: { shared: true },
    code: "FAILED_PRECONDITION",
    message: /has no file system, and with read-only or shared access none is made/,
  },
  {
    what: "a blank device that sysfs gives no size",
    make: async ({ machine, namespace }) => {
      await machine.hide(namespace);
      await machine.show(namespace, { sysfsSizeBytes: 0 });
    },
    code: "UNAVAILABLE",
    message: /has no size, the namespace is not ready/,
  },
  {
    what: "a blank device that is in use by another",
    make: async ({ machine, namespace }) => {
      const holders = join(machine.host.roots.sysfs, "class/block", namespace.name, "holders");
      await Deno.mkdir(join(holders, "dm-0"), { recursive: true });
    },
    code: "FAILED_PRECONDITION",
    message: /is in use by dm-0/,
  },
];

for (const { what, tools = [], sizeMib = 64, make, options: special, code, message } of nonBlank) {
  Deno.test({
    name: `promise 1: mountVolume refuses ${what} and changes no byte`,
    ignore: ignore || !needs(...tools),
    fn: () =>
      withDisk(sizeMib, async (disk) => {
        await make(disk);
        const before = await copyOf(disk);

        await rejects(disk.mount({ ...mountOptions, ...special }), code, message);

        await assertSame(disk, before);
        assert.deepEqual(await disk.machine.mounts(), []);
      }),
  });
}

Deno.test({
  name: "promise 1: mountVolume refuses a device that blkid calls blank but cannot be read",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, namespace, device, path }) => {
      // The file behind the device ends early: reads beyond give EIO, and blkid exits 2 as for a blank device.
      const found = await device();
      await Deno.truncate(namespace.file, 8 * mib);

      const mounted = mountVolume(machine.host, callContext(), found, { ...mountOptions, path });

      await rejects(mounted, "UNAVAILABLE", /cannot be read at byte \d+ \(Input\/output error/);
      assert.deepEqual(machine.commands, ["blkid"]);
    }),
});

Deno.test("probeContent accepts no exit code of blkid but 0, 2 and 8", async () => {
  const { host, device } = await fakeDisk();
  host.answers.set("blkid", { code: 4, stderr: "blkid: usage error" });
  await rejects(
    probeContent(host, callContext(), device),
    "UNAVAILABLE",
    /blkid cannot tell what .* \(exit 4: blkid: usage/,
  );
  host.answers.set("blkid", { code: 8 });
  await rejects(probeContent(host, callContext(), device), "FAILED_PRECONDITION", /more than one kind/);
});

import assert from "node:assert/strict";
import { join } from "node:path";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { contentOf } from "../../../lib/host/filesystem/content.ts";
import { type FsType, fsTypes } from "../../../lib/host/filesystem/fs_type.ts";
import { fileSystemUuid } from "../../../lib/host/filesystem/fs_uuid.ts";
import { ensureGrown } from "../../../lib/host/filesystem/grow.ts";
import { checkReadable } from "../../../lib/host/filesystem/health.ts";
import { parseMkfsOptions } from "../../../lib/host/filesystem/mkfs_options.ts";
import { type MountOptions, mountVolume } from "../../../lib/host/filesystem/mount.ts";
import { mountFlags, parseMountFlags } from "../../../lib/host/filesystem/mount_flags.ts";
import { canonicalPath } from "../../../lib/host/mount_point.ts";
import { mountsElsewhere, parseMountTable } from "../../../lib/host/mount_table.ts";
import { findDevice } from "../../../lib/host/nvme/devices.ts";
import { assertSame, copyOf, type Disk, mib, mountOptions, uuid, withDisk, write } from "../../support/disk.ts";
import { FakeHost, type FakeNamespace } from "../../support/fake_host.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const ignore = !needs("root", "loop", "mkfs.ext4");

const garbage = new TextEncoder().encode("data that no tool knows");

interface NonBlank {
  readonly what: string;
  readonly tools?: readonly string[];
  readonly sizeMib?: number;
  readonly make: (disk: Disk) => Promise<unknown>;
  readonly wish?: Partial<MountOptions>;
  readonly code: StatusCode;
  readonly message: RegExp;
}

const nonBlank: readonly NonBlank[] = [
  {
    what: "an ext4 when xfs is wanted",
    make: ({ machine, namespace }) => machine.tool("mkfs.ext4", "-q", namespace.path),
    wish: { fsType: "xfs" },
    code: "FAILED_PRECONDITION",
    message: /holds ext4, the request wants xfs; it is never formatted again/,
  },
  {
    what: "an xfs when ext4 is wanted",
    tools: ["mkfs.xfs"],
    sizeMib: 320,
    make: ({ machine, namespace }) => machine.tool("mkfs.xfs", "-q", namespace.path),
    wish: { fsType: "ext4" },
    code: "FAILED_PRECONDITION",
    message: /holds xfs, the request wants ext4/,
  },
  {
    what: "a btrfs when ext4 is wanted",
    tools: ["mkfs.btrfs"],
    sizeMib: 128,
    make: ({ machine, namespace }) => machine.tool("mkfs.btrfs", "-q", namespace.path),
    wish: { fsType: "ext4" },
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
    what: "a blank device, when the wish is read-only,",
    make: () => Promise.resolve(),
    wish: { readOnly: true },
    code: "FAILED_PRECONDITION",
    message: /has no file system, and with read-only or shared access none is made/,
  },
  {
    what: "a blank device, when the wish is shared,",
    make: () => Promise.resolve(),
    wish: { shared: true },
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

for (const { what, tools = [], sizeMib = 64, make, wish: special, code, message } of nonBlank) {
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
  name: "promise 1: mountVolume refuses a device that blkid calls blank but nobody can read",
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

Deno.test({
  name: "promise 1: mountVolume touches nothing when the name now belongs to another namespace",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, namespace, device, path }) => {
      const found = await device();
      const entry = join(machine.host.roots.sysfs, "class/block", namespace.name);
      await Deno.writeTextFile(join(entry, "wwid"), "uuid.1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e\n");

      const mounted = mountVolume(machine.host, callContext(), found, { ...mountOptions, path });

      await rejects(mounted, "UNAVAILABLE", /nvme0n1 is nvme0n1 \(namespace 1b7e2c44.*has to be found again/);
      assert.deepEqual(machine.commands, []);
    }),
});

for (const [what, fsBytes] of [["a blank device is formatted", 0n], ["an ext4 is checked", 1n << 30n]] as const) {
  Deno.test(`promise 3: mountVolume runs no tool when the name goes to another namespace before ${what}`, async () => {
    const { host, device, namespace } = await fakeDisk();
    const content = fsBytes === 0n ? undefined : { fsType: "ext4", fsBytes };
    namespace.content = content;
    const stranger = host.addNamespace(other, subsystemNqn);
    stranger.content = content;
    const readBytes = host.readBytes.bind(host);
    host.readBytes = async (...args) => {
      const bytes = await readBytes(...args);
      giveNameTo(host, stranger);
      return bytes;
    };

    const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

    await rejects(mounted, "UNAVAILABLE", /nvme0n1 is nvme0n1 \(namespace 1b7e2c44.*has to be found again/);
    assert.deepEqual(host.commands.map((command) => command.split(" ")[0]), ["blkid"]);
    assert.equal(stranger.content, content);
  });
}

Deno.test("promise 4: mountVolume leaves nothing mounted when the name goes to another namespace under mount", async () => {
  const { host, device } = await fakeDisk();
  const stranger = host.addNamespace(other, subsystemNqn);
  stranger.content = { fsType: "ext4", fsBytes: stranger.sizeBytes };
  const run = host.run.bind(host);
  host.run = (program, ...rest) => {
    if (program === "mount") giveNameTo(host, stranger, "259:9");
    return run(program, ...rest);
  };

  const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

  await rejects(
    mounted,
    "UNAVAILABLE",
    /ext4 of \/dev\/nvme0n1 \(259:9\) is there instead of \/dev\/nvme0n1 \(259:1\)/,
  );
  assert.deepEqual(host.mounts, []);
});

Deno.test({
  name: "mountVolume makes no btrfs while a process that outlived the last driver has the device open",
  ignore: ignore || !needs("mkfs.btrfs"),
  fn: () =>
    withDisk(128, async ({ machine, namespace, mount }) => {
      {
        using _open = await Deno.open(namespace.path, { write: true });
        const busy = new RegExp(`nvme0n1 is in use by process ${Deno.pid} \\(\\w+\\) with`);
        await rejects(mount({ ...mountOptions, fsType: "btrfs" }), "UNAVAILABLE", busy);
        assert.deepEqual(machine.commands, ["blkid"]);
      }
      await mount({ ...mountOptions, fsType: "btrfs" });
    }),
});

Deno.test({
  name: "promise 29: readTroubleOf takes one look-up, however many names the root of the volume has",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, mount, device, path }) => {
      await mount(mountOptions);
      const mounted = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).find((one) => one.path === path);
      assert(mounted);
      const looked: string[] = [];
      const host = {
        ...machine.host,
        list: (directory: string) => Promise.reject(new Error(`lists ${directory}`)),
        lookUp: (directory: string) => {
          looked.push(directory);
          return machine.host.lookUp(directory);
        },
      };

      assert.equal(await checkReadable(host, callContext(), await device(), mounted), undefined);
      assert.deepEqual(looked, [path]);
      const broken = { ...host, lookUp: () => Promise.reject(new Error("Input/output error (os error 5)")) };
      assert.match(
        await checkReadable(broken, callContext(), await device(), mounted) ?? "",
        /cannot be read \(Input\/output error/,
      );
    }),
});

Deno.test({
  name: "mountVolume gives a file system the UUID that follows from its namespace",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, namespace, mount }) => {
      await mount(mountOptions);

      const found = await machine.tool("blkid", "-p", "-s", "UUID", "-o", "value", namespace.path);
      assert.equal(found.trim(), fileSystemUuid(uuid));
    }),
});

Deno.test({
  name: "mountVolume repairs an ext4 that was not unmounted",
  ignore,
  fn: () =>
    withDisk(64, async ({ machine, namespace, mount, path }) => {
      await mount(mountOptions);
      await Deno.writeTextFile(join(path, "kept"), "before the crash");
      await machine.tool("sync", "-f", path);
      const crashed = join(machine.directory, "crashed");
      await machine.tool("cp", "--sparse=always", namespace.file, crashed);
      await machine.tool("umount", path);
      await machine.tool("dd", `if=${crashed}`, `of=${namespace.path}`, "bs=1M", "conv=notrunc,fsync", "status=none");

      await mount(mountOptions);

      assert.equal(await Deno.readTextFile(join(path, "kept")), "before the crash");
    }),
});

Deno.test({
  name: "mountVolume of an ext4 that another mount namespace has mounted mounts it as it is",
  ignore: ignore || !needs("unshare"),
  fn: () =>
    withDisk(64, async ({ machine, namespace, mount, path }) => {
      await mount(mountOptions);
      // Where the kernel lists a mounted file system; this machine's sysfs does not follow it.
      const listed = join(machine.host.roots.sysfs, "fs/ext4", namespace.name);
      await Deno.mkdir(listed, { recursive: true });
      const leak = new Deno.Command("unshare", {
        args: ["--mount", "--propagation", "private", "sh", "-c", "echo ready && read -r line"],
        stdin: "piped",
        stdout: "piped",
      }).spawn();
      try {
        await leak.stdout.getReader().read();
        await machine.tool("umount", path);

        await mount(mountOptions);
      } finally {
        await leak.stdin.close();
        await leak.status;
      }

      await Deno.writeTextFile(join(path, "works"), "");
      assert(!machine.commands.includes("e2fsck"));
    }),
});

Deno.test("mountVolume of an ext4 that e2fsck cannot repair answers FAILED_PRECONDITION and does not mount it", async () => {
  const { host, device } = await fakeDisk();
  host.answers.set("e2fsck", { code: 4, stdout: "/dev/nvme0n1: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\n" });

  const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

  await rejects(mounted, "FAILED_PRECONDITION", /errors that e2fsck does not repair by itself.*RUN fsck MANUALLY/);
  assert.deepEqual(host.mounts, []);
});

for (const [code, outcome] of [[1, true], [2, true], [3, true], [8, false], [12, false]] as const) {
  Deno.test(`mountVolume ${outcome ? "goes on" : "stops"} after e2fsck exits ${code}`, async () => {
    const { host, device } = await fakeDisk();
    host.answers.set("e2fsck", { code });

    const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

    if (outcome) await mounted;
    else await rejects(mounted, "FAILED_PRECONDITION", /e2fsck/);
    assert.equal(host.mounts.length, outcome ? 1 : 0);
  });
}

Deno.test("mountVolume for reading only neither checks nor repairs", async () => {
  const { host, device } = await fakeDisk();

  await mountVolume(host, callContext(), device, { ...mountOptions, readOnly: true, shared: true, path: "/staging" });

  assert.deepEqual(host.commands.map((command) => command.split(" ")[0]), ["blkid", "mount"]);
  assert.match(host.commands[1] ?? "", /^mount -t ext4 -o ro,noload \/dev\/nvme0n1 \/staging$/);
});

Deno.test("mountVolume reports what mkfs says when it fails", async () => {
  const { host, device, namespace } = await fakeDisk();
  namespace.content = undefined;
  const stderr = "/dev/nvme0n1 is apparently in use by the system; will not make a filesystem here!\n";
  host.answers.set("mkfs.ext4", { code: 1, stderr });

  const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

  await rejects(mounted, "FAILED_PRECONDITION", /mkfs.ext4 failed with exit 1 \(.*apparently in use by the system/);
});

Deno.test("contentOf takes no answer of blkid for granted but 0, 2 and 8", async () => {
  const { host, device } = await fakeDisk();
  host.answers.set("blkid", { code: 4, stderr: "blkid: usage error" });
  await rejects(
    contentOf(host, callContext(), device),
    "UNAVAILABLE",
    /blkid cannot tell what .* \(exit 4: blkid: usage/,
  );
  host.answers.set("blkid", { code: 8 });
  await rejects(contentOf(host, callContext(), device), "FAILED_PRECONDITION", /more than one kind/);
});

Deno.test("promise 16: ensureGrown does not believe a tool that says it succeeded", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });
  namespace.sizeBytes = 4n << 30n;
  host.answers.set("resize2fs", { code: 0, stdout: "Nothing to do!\n" });

  const grown = ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" });

  await rejects(grown, "UNAVAILABLE", /resize2fs succeeded, but it has 1073741824 of the 4294967296 bytes/);
});

Deno.test("promise 16: ensureGrown answers what it measures, and runs nothing when nothing is to be done", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });
  const before = host.commands.length;

  assert.equal(await ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" }), 1n << 30n);
  assert.equal(host.commands.length, before);
  namespace.sizeBytes = 4n << 30n;
  assert.equal(await ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" }), 4n << 30n);

  assert.deepEqual(host.commands.slice(before), ["resize2fs /dev/nvme0n1"]);
});

Deno.test("promise 16: ensureGrown of a read-only mount answers FAILED_PRECONDITION", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, readOnly: true, path: "/staging" });
  namespace.sizeBytes = 4n << 30n;

  const grown = ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" });

  await rejects(grown, "FAILED_PRECONDITION", /it is mounted read-only/);
});

/** What a reconnect can do: the first device is another namespace. */
function giveNameTo(host: FakeHost, namespace: FakeNamespace, number?: string): void {
  const [device] = host.devices;
  assert(device);
  host.devices.splice(0, 1, { name: device.name, number: number ?? device.number, namespace });
}

Deno.test({
  name: "promise 3: ensureGrown grows no file system that is mounted on top of the volume's",
  ignore: ignore || !needs("mkfs.xfs"),
  fn: () =>
    withDisk(320, async ({ machine, namespace, mount, path, device }) => {
      await mount({ ...mountOptions, fsType: "xfs" });
      const stranger = await machine.addNamespace(other, 320 * mib);
      await machine.tool("mkfs.xfs", "-q", stranger.path);
      await machine.grow(stranger, 512 * mib);
      await machine.grow(namespace, 512 * mib);
      await machine.tool("mount", stranger.path, path);
      const before = await machine.host.usage(path);

      const grown = ensureGrown(machine.host, callContext(), await device(), { path, fsType: "xfs" });

      await rejects(grown, "FAILED_PRECONDITION", /xfs of .*nvme0n2 .* is mounted there instead of .*nvme0n1$/);
      assert.equal((await machine.host.usage(path)).totalBytes, before.totalBytes);
    }),
});

async function fakeDisk() {
  const host = new FakeHost();
  const namespace = host.addNamespace(uuid, subsystemNqn);
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };
  host.connect(subsystemNqn);
  const device = await findDevice(host, uuid);
  assert(device);
  return { host, device, namespace };
}

// ------------------------------------------------------------------------------------------------------------- parsers

Deno.test("parseMountTable reads escapes, propagation fields and stacked mounts", () => {
  const text = [
    "22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw,errors=remount-ro",
    "40 22 259:1 / /var/lib/a\\040b\\011c\\134d\\012e\\043 rw,nosuid shared:1 master:2 propagate_from:3 - ext4 /dev/nvme0n1 rw",
    "41 22 259:1 /sub\\040dir /var/lib/x ro unbindable - xfs /dev/nvme0n1 rw,attr2",
    "42 41 0:5 / /var/lib/x rw - tmpfs none rw",
    "43 22 0:6 /nvme0n1//deleted /block rw - devtmpfs udev rw",
    "",
    "broken line",
  ].join("\n");

  const table = parseMountTable(text);

  assert.deepEqual(table.map((mount) => mount.path), [
    "/",
    "/var/lib/a b\tc\\d\ne#",
    "/var/lib/x",
    "/var/lib/x",
    "/block",
  ]);
  assert.deepEqual(table[1], {
    number: "259:1",
    root: "/",
    path: "/var/lib/a b\tc\\d\ne#",
    place: "254:0 /var/lib/a b\tc\\d\ne#",
    options: ["rw", "nosuid"],
    propagation: ["shared:1", "master:2", "propagate_from:3"],
    fsType: "ext4",
    source: "/dev/nvme0n1",
    superOptions: ["rw"],
  });
  assert.equal(table[2]?.root, "/sub dir");
  assert.equal(table[4]?.root, "/nvme0n1//deleted");
});

Deno.test("mountsElsewhere takes what is seen at two paths for one mount", () => {
  // Kubelet's directory /d/kubelet is bound to itself and to /k; the mounts below it propagated from one to the other.
  const table = parseMountTable([
    "22 1 254:0 / / rw - ext4 /dev/vda1 rw",
    "30 22 254:0 /d/kubelet /d/kubelet rw shared:1 - ext4 /dev/vda1 rw",
    "31 22 254:0 /d/kubelet /k rw shared:1 - ext4 /dev/vda1 rw",
    "40 30 259:1 / /d/kubelet/staging rw shared:2 - ext4 /dev/nvme0n1 rw",
    "41 31 259:1 / /k/staging rw shared:2 - ext4 /dev/nvme0n1 rw",
    "50 30 259:1 / /d/kubelet/pod rw shared:2 - ext4 /dev/nvme0n1 rw",
    "51 31 259:1 / /k/pod rw shared:2 - ext4 /dev/nvme0n1 rw",
    "60 22 259:1 / /pod rw - ext4 /dev/nvme0n1 rw",
  ].join("\n"));
  const mounts = table.filter(({ number }) => number === "259:1");
  const paths = (...given: (string | undefined)[]) => mountsElsewhere(table, mounts, ...given).map(({ path }) => path);

  assert.deepEqual(paths("/k/staging", "/k/pod"), ["/pod"]);
  assert.deepEqual(paths("/d/kubelet/staging", undefined), ["/d/kubelet/pod", "/k/pod", "/pod"]);
  assert.deepEqual(paths("/pod"), mounts.slice(0, 4).map(({ path }) => path));
});

Deno.test("canonicalPath resolves the links above a path, and never the path itself", async () => {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-path-" }));
  try {
    await Deno.mkdir(join(directory, "real"));
    await Deno.symlink("real", join(directory, "link"));
    await Deno.symlink("/", join(directory, "real/last"));
    const { host } = await fakeDisk();
    const linux = {
      ...host,
      roots: host.roots,
      realPath: (path: string) => Deno.realPath(path).catch(() => undefined),
    };

    const paths = ["link/last/", "link/none", "none/x"].map((path) =>
      canonicalPath(linux as FakeHost, join(directory, path))
    );

    assert.deepEqual(await Promise.all(paths), [join(directory, "real/last"), join(directory, "real/none"), undefined]);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

const goodOptions: readonly [FsType, string, readonly string[]][] = [
  ["ext4", "", []],
  ["ext4", "-m0", ["-m", "0"]],
  ["ext4", " -b  4096\t-E stride=16,stripe_width=64 ", ["-b", "4096", "-E", "stride=16,stripe_width=64"]],
  ["ext4", "-O ^has_journal,metadata_csum -i 8192", ["-O", "^has_journal,metadata_csum", "-i", "8192"]],
  ["xfs", "-i size=512 -l size=64m -m reflink=0", ["-i", "size=512", "-l", "size=64m", "-m", "reflink=0"]],
  ["btrfs", "-M -m single --csum xxhash", ["-M", "-m", "single", "--csum", "xxhash"]],
  ["btrfs", "--csum=sha256", ["--csum", "sha256"]],
  ["ext4", "-O +quota,-resize_inode -e remount-ro", ["-O", "+quota,-resize_inode", "-e", "remount-ro"]],
  ["xfs", "-m bigtime=0,inobtcount=0 -i nrext64=0", ["-m", "bigtime=0,inobtcount=0", "-i", "nrext64=0"]],
  ["btrfs", "-O ^no-holes,quota", ["-O", "^no-holes,quota"]],
];
for (const [fsType, text, args] of goodOptions) {
  Deno.test(`parseMkfsOptions takes "${text}" for ${fsType}`, () => {
    assert.deepEqual(parseMkfsOptions(fsType, text), args);
  });
}

const badOptions: readonly [FsType, string, RegExp][] = [
  ["ext4", "-F", /-F is not one of/],
  ["ext4", "-FF", /-F is not one of/],
  ["ext4", "-qF", /-q is not one of/],
  ["ext4", "-n", /-n is not one of/],
  ["ext4", "-S", /-S is not one of/],
  ["ext4", "-c", /-c is not one of/],
  ["ext4", "-l /etc/passwd", /-l is not one of/],
  ["ext4", "-d /etc", /-d is not one of/],
  ["ext4", "-U random", /-U is not one of/],
  ["ext4", "-M /var", /-M is not one of/],
  ["ext4", "/dev/sda", /"\/dev\/sda" belongs to no option/],
  ["ext4", "-m 0 100G", /"100G" belongs to no option/],
  ["ext4", "-m", /-m has no value/],
  ["ext4", "-m -F", /the value "-F" of -m/],
  ["ext4", "-m-F", /the value "-F" of -m/],
  ["ext4", "-J device=LABEL=x", /-J device is not allowed/],
  ["ext4", "-J size=4,device=x", /-J device is not allowed/],
  ["ext4", "-E offset=1048576", /-E offset is not allowed/],
  ["ext4", "-O journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O +journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O has_journal,-journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O FEATURE_I3", /-O FEATURE_I3 is not allowed/],
  ["ext4", "-O ++journal_dev", /-O \+journal_dev is not allowed/],
  ["ext4", "-J +device=x", /-J \+device is not allowed/],
  ["ext4", "-E test_fs", /-E test_fs is not allowed, it takes stride, /],
  ["ext4", "-E +offset=1", /-E \+offset is not allowed/],
  ["ext4", "-e panic", /-e panic is not allowed, it takes continue, remount-ro/],
  ["ext4", "-O bogus", /-O bogus is not allowed, it takes none, has_journal, /],
  ["xfs", "-m bogus=1", /-m bogus is not allowed, it takes autofsck, bigtime/],
  ["xfs", "-d rtinherit=1", /-d rtinherit is not allowed/],
  ["btrfs", "-O list-all", /-O list-all is not allowed/],
  ["btrfs", "-O zoned", /-O zoned is not allowed/],
  ["ext4", "-L $(reboot)", /has something else than letters/],
  ["ext4", "-L a/b", /has something else than letters/],
  ["ext4", "--help", /--help is not one of/],
  ["ext4", "--", /-- is not one of/],
  ["ext4", "-", /- is not one of/],
  ["ext4", "-constructor x", /-c is not one of/],
  ["xfs", "-f", /-f is not one of/],
  ["xfs", "-N", /-N is not one of/],
  ["xfs", "-p /etc/passwd", /-p is not one of/],
  ["xfs", "-r rtdev=/dev/sda", /-r is not one of/],
  ["xfs", "-c options=/etc/x", /-c is not one of/],
  ["xfs", "-d name=sda", /-d name is not allowed/],
  ["xfs", "-d file,size=1g", /-d file is not allowed/],
  ["xfs", "-l logdev=sda", /-l logdev is not allowed/],
  ["xfs", "-m uuid=x", /-m uuid is not allowed/],
  ["btrfs", "-f", /-f is not one of/],
  ["btrfs", "--force", /--force is not one of/],
  ["btrfs", "-r /etc", /-r is not one of/],
  ["btrfs", "--rootdir=/etc", /--rootdir is not one of/],
  ["btrfs", "-b 1g", /-b is not one of/],
  ["btrfs", "-Mf", /-M is not one of/],
];
for (const [fsType, text, message] of badOptions) {
  Deno.test(`parseMkfsOptions refuses "${text}" for ${fsType}`, () => {
    assert.throws(() => parseMkfsOptions(fsType, text), (error) => {
      assert(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      // A combined flag is looked up by its first letter.
      assert.match(error.message, text === "-Mf" ? /-M is not one of|-Mf is not one of/ : message);
      return true;
    });
  });
}

Deno.test("parseMountFlags parts options, keeps quoted commas, and takes ro out", () => {
  const flags = ["noatime,ro", 'context="system_u:object_r:c0,c1"', "defaults", "user_xattr,grpid,data=ordered"];

  assert.deepEqual(parseMountFlags(flags), {
    readOnly: true,
    rest: ["noatime", 'context="system_u:object_r:c0,c1"', "user_xattr", "grpid", "data=ordered"],
  });
});

for (
  const [flags, readOnly, rest] of [
    [["noexec", "exec"], false, ["exec"]],
    [["exec,nosuid", "noexec"], false, ["nosuid", "noexec"]],
    [["ro", "rw"], false, []],
    [["rw,ro"], true, []],
    [["noexec", "defaults"], false, ["noexec"]],
    [["noatime", "relatime"], false, ["relatime"]],
    [["strictatime,noatime"], false, ["noatime"]],
    [["noatime", "atime", "nodev", "dev"], false, ["dev"]],
    [["noatime,norelatime"], false, ["noatime"]],
    [["strictatime,nostrictatime,sync,async,nodiratime,diratime"], false, ["async", "diratime"]],
  ] as const
) {
  Deno.test(`parseMountFlags of ${flags.join(" ")} keeps what counts`, () => {
    assert.deepEqual(parseMountFlags(flags), { readOnly, rest });
  });
}

for (
  const flag of [
    "compress=zstd:3",
    "discard=async",
    "logbsize=256k",
    "data_err=abort",
    "errors=remount-ro",
    "barrier=0",
    "dax",
    "init_itable",
    'fscontext="system_u:object_r:container_file_t:s0:c1,c2"',
    "context=system_u:object_r:container_file_t:s0",
    "prjquota",
    "nouuid",
    "inode64",
    "_netdev",
  ]
) {
  Deno.test(`parseMountFlags takes ${flag}`, () => {
    assert.deepEqual(parseMountFlags([flag]), { readOnly: false, rest: [flag] });
  });
}

Deno.test("docs/configuration.md lists the mount flags that are taken, and no others", async () => {
  const text = await Deno.readTextFile(new URL("../../../docs/configuration.md", import.meta.url));
  const section = /## Mount flags\n(.*?)\n## /s.exec(text)?.[1] ?? "";
  for (const [owner, options] of Object.entries(mountFlags)) {
    const row = new RegExp(`^\\| ${owner} \\| (.*) \\|$`, "m").exec(section)?.[1] ?? "";
    const listed = [...row.matchAll(/`([^`]+)`/g)].map(([, name = ""]) => name.replace(/=.*$/, ""));
    assert.deepEqual(listed, Object.keys(options), owner);
  }
});

for (
  const [flags, expected] of [
    [["noexec", "exec"], "rw,relatime"],
    [["exec", "noexec"], "rw,noexec,relatime"],
    [["nosuid", "suid", "nodev", "dev"], "rw,relatime"],
    [["noatime,relatime"], "rw,relatime"],
    [["strictatime", "noatime"], "rw,noatime"],
    [["noatime", "strictatime"], "rw"],
    [["sync", "async"], "rw,relatime"],
    [["ro", "rw", "noexec", "defaults"], "rw,noexec,relatime"],
  ] as const
) {
  Deno.test({
    name: `mountVolume with ${flags.join(" ")} mounts it so, and a repeat finds it so`,
    ignore,
    fn: () =>
      withDisk(64, async ({ machine, mount, path }) => {
        await mount({ ...mountOptions, flags });
        await mount({ ...mountOptions, flags });

        const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
        assert.deepEqual(table.filter((mount) => mount.path === path).map(({ options }) => options.join()), [expected]);
        assert.equal(machine.commands.filter((program) => program === "mount").length, 1);
      }),
  });
}

Deno.test({
  name: "promise 27: an ext4 whose super block says that the node stops at an error is mounted otherwise",
  ignore: ignore || !needs("tune2fs"),
  fn: () =>
    withDisk(64, async ({ machine, namespace, mount, path }) => {
      await mount(mountOptions);
      await machine.tool("umount", path);
      await machine.tool("tune2fs", "-e", "panic", namespace.path);
      const optionsOf = async (flags: readonly string[]) => {
        await mount({ ...mountOptions, flags });
        const mounted = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"))
          .find((one) => one.path === path);
        await machine.tool("umount", path);
        return mounted?.superOptions.filter((option) => option.startsWith("errors="));
      };

      assert.deepEqual(await optionsOf([]), ["errors=remount-ro"]);
      assert.deepEqual(await optionsOf(["errors=continue"]), ["errors=continue"]);
    }),
});

Deno.test({
  name: "mountVolume with other flags than what is mounted answers ALREADY_EXISTS, naming each difference",
  ignore,
  fn: () =>
    withDisk(64, async ({ mount }) => {
      await mount({ ...mountOptions, flags: ["noexec", "exec"] });

      await rejects(
        mount({ ...mountOptions, flags: ["exec", "noexec"] }),
        "ALREADY_EXISTS",
        /there already, without noexec$/,
      );
      await rejects(
        mount({ ...mountOptions, flags: ["strictatime"] }),
        "ALREADY_EXISTS",
        /there already, without strictatime$/,
      );
    }),
});

for (
  const flag of [
    "errors=panic",
    "fatal_errors=panic",
    "abort",
    "usebackuproot",
    "recovery",
    "degraded",
    "subvol=/x",
    "sb=8193",
    "test_dummy_encryption",
    "noatime=1",
    "errors",
    "errors=",
    "data=writeback,errors=panic",
    'context="a\nb"',
    "context=$(reboot)",
    "bogus",
    "bind",
    "remount",
    "loop",
    "loop=/dev/loop1",
    "X-mount.mkdir",
    "x-systemd.automount",
    "offset=1",
    "noload",
    "rshared",
    "noatime,move",
    "bind=",
    "remount=",
    "rshared=",
    "noload=1",
    "ro=fs",
    "rw=recursive",
    'loop="/dev/loop1"',
    "x-mount.mkdir\n",
  ]
) {
  Deno.test(`parseMountFlags refuses ${flag}`, () => {
    assert.throws(() => parseMountFlags([flag]), (error) => {
      assert(error instanceof StatusError);
      assert.deepEqual([error.code, /this driver does not allow it/.test(error.message)], ["INVALID_ARGUMENT", true]);
      return true;
    });
  });
}

Deno.test("every file system has its own list of mkfs options", () => {
  for (const fsType of fsTypes) assert.deepEqual(parseMkfsOptions(fsType, "-L name"), ["-L", "name"]);
});

Deno.test({
  name: "mountVolume names the mount flags when the kernel does not take one, and mounts without it",
  ignore: !needs("root", "loop", "mkfs.ext4"),
  fn: () =>
    withDisk(64, async ({ mount, machine, path }) => {
      // Quotas of projects are a feature that mkfs has to be asked for.
      const flags = ["noatime", "prjquota"];

      await rejects(
        mount({ ...mountOptions, flags }),
        "FAILED_PRECONDITION",
        /mount failed with exit 32 .*; its mount flags are noatime,prjquota, the kernel log \(dmesg\) says when/,
      );

      assert.deepEqual(await machine.mounts(), []);
      await mount({ ...mountOptions, flags: ["noatime"] });
      assert.deepEqual(await machine.mounts(), [path]);
    }),
});

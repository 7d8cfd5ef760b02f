/** New file systems have no feature that the node's kernel does not know, and a mount that fails for one says so. */
import assert from "node:assert/strict";
import type { FsType } from "../../../lib/host/filesystem/fs_type.ts";
import { type MountOptions, mountVolume } from "../../../lib/host/filesystem/mount.ts";
import type { Host } from "../../../lib/host/host.ts";
import { type Disk, mountOptions, withDisk } from "../../support/disk.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "xfs_db", "dumpe2fs");

/** The host of `disk` with another kernel, and the commands that it ran. */
function withKernel(
  { machine, device, path }: Disk,
  release: string | undefined,
  tools: Readonly<Record<string, string>> = {},
) {
  const commands: string[] = [];
  const host: Host = {
    ...machine.host,
    readText: (path) => path === "/proc/sys/kernel/osrelease" ? Promise.resolve(release) : machine.host.readText(path),
    run(program, args, options) {
      const command = [program, ...args].join(" ");
      commands.push(command);
      const answer = tools[command];
      return answer === undefined
        ? machine.host.run(program, args, options)
        : Promise.resolve({ code: 0, stdout: answer, stderr: "" });
    },
  };
  const mount = async (special: Partial<MountOptions>) =>
    await mountVolume(host, callContext(), await device(), { ...mountOptions, ...special, path });
  return { mount, commands };
}

async function xfsFeatures({ machine, namespace }: Disk): Promise<readonly string[]> {
  const text = await machine.tool("xfs_db", "-r", "-c", "version", namespace.path);
  return text.toLowerCase().trim().split(/[\s,]+/);
}

for (
  const [release, mkfsOptions, has, hasNot] of [
    ["5.4.0-150-generic", "", ["reflink", "sparse_inodes"], ["bigtime", "inobtcnt"]],
    ["5.9.16", "-m reflink=0", ["finobt"], ["bigtime", "inobtcnt", "reflink"]],
    ["4.8.0", "", ["finobt"], ["bigtime", "inobtcnt", "reflink"]],
    ["5.4.0", "-m bigtime=1", ["bigtime"], ["inobtcnt"]],
    ["5.10.0", "", ["bigtime", "inobtcnt"], []],
    ["6.12.1", "-m bigtime=0", ["inobtcnt"], ["bigtime"]],
    [undefined, "", ["bigtime"], []],
    ["strange", "", ["bigtime"], []],
  ] as const
) {
  Deno.test({
    name: `a new xfs ${mkfsOptions} on a node with Linux ${release} has what that kernel knows`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        await withKernel(disk, release).mount({ fsType: "xfs", mkfsOptions });

        const features = await xfsFeatures(disk);
        for (const name of has) assert(features.includes(name), `${name} of ${features}`);
        for (const name of hasNot) assert(!features.includes(name), `${name} of ${features}`);
      }),
  });
}

Deno.test({
  name: "an xfs is made without options that an old mkfs.xfs does not know",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      const { mount, commands } = withKernel(disk, "4.18.0", { "mkfs.xfs -V": "mkfs.xfs version 5.0.0\n" });

      await mount({ fsType: "xfs" });

      const made = commands.find((command) => command.startsWith("mkfs.xfs -q"));
      assert.doesNotMatch(made ?? "", /bigtime|inobtcount|nrext64|parent/);
    }),
});

Deno.test({
  name: "a new ext4 for an old kernel has no feature of a newer one, and the user's options count",
  ignore,
  fn: () =>
    withDisk(64, async (disk) => {
      const { mount, commands } = withKernel(disk, "5.4.0-150-generic");
      await mount({ mkfsOptions: "-O large_dir -E stride=16" });

      const made = commands.find((command) => command.startsWith("mkfs.ext4 -q"));
      assert.match(made ?? "", / -O \^orphan_file,large_dir -E nodiscard,lazy_journal_init=1,stride=16 /);
      const features = await disk.machine.tool("dumpe2fs", "-h", disk.namespace.path);
      assert.match(features, /Filesystem features:.* large_dir/);
      assert.doesNotMatch(features, /orphan_file/);
    }),
});

Deno.test({
  name: "a new btrfs for an old kernel leaves out what its mkfs.btrfs has a name for",
  ignore,
  fn: () =>
    withDisk(128, async (disk) => {
      const list =
        "Filesystem features available:\nblock-group-tree    - block group tree (compat=6.1, default=6.19)\n";
      const { mount, commands } = withKernel(disk, "5.15.0", { "mkfs.btrfs -O list-all": list });
      // This mkfs.btrfs has no such feature, and says so.
      await rejects(mount({ fsType: "btrfs" }), "FAILED_PRECONDITION", /feature '\^?block-group-tree'/);
      assert(commands.some((command) => command.startsWith("mkfs.btrfs -q -K -O ^block-group-tree ")));

      await withKernel(disk, "5.15.0", { "mkfs.btrfs -O list-all": "" }).mount({ fsType: "btrfs" });
    }),
});

for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
  Deno.test({
    name: `mkfs.${fsType} is asked for nothing on a node whose kernel is new enough`,
    ignore,
    fn: () =>
      withDisk(320, async (disk) => {
        const { mount, commands } = withKernel(disk, "6.18.0");

        await mount({ fsType });

        assert.equal(commands.filter((command) => command.startsWith("mkfs.")).length, 1);
      }),
  });
}

/** Sets bits of the read-only compatible features of an xfs. */
async function setBits({ machine, namespace }: Disk, bits: string): Promise<void> {
  await machine.tool("xfs_db", "-x", "-c", "sb 0", "-c", `write -d features_ro_compat ${bits}`, namespace.path);
}

async function makeUnmounted(disk: Disk, fsType: FsType): Promise<void> {
  await disk.mount({ ...mountOptions, fsType });
  await disk.machine.tool("umount", disk.path);
}

Deno.test({
  name: "a mount that fails because of features names them and the kernel",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      await makeUnmounted(disk, "xfs");
      await setBits(disk, "0x8000000d");

      await rejects(
        disk.mount({ ...mountOptions, fsType: "xfs" }),
        "FAILED_PRECONDITION",
        /mount failed with exit 32 \(.*\); its xfs has read-only compatible features that this driver cannot name \(0x80000000\), which this node's kernel \d\S+ may not know: use a node with a newer kernel$/,
      );
      await rejects(
        withKernel(disk, "5.4.0-150-generic").mount({ fsType: "xfs" }),
        "FAILED_PRECONDITION",
        /its xfs has bigtime \(since Linux 5\.10\), inobtcount \(since Linux 5\.10\), read-only .* kernel 5\.4\.0-150-generic/,
      );
    }),
});

Deno.test({
  name: "a mount that fails for another reason says nothing of features",
  ignore,
  fn: () =>
    withDisk(320, async (disk) => {
      await makeUnmounted(disk, "xfs");

      await rejects(
        disk.mount({ ...mountOptions, fsType: "xfs", flags: ["sunit=7"] }),
        "FAILED_PRECONDITION",
        /mount failed with exit 32 \([^;]*\); its mount flags are sunit=7, the kernel log \(dmesg\) says when it refuses one of them$/,
      );
    }),
});

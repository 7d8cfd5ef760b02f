import assert from "node:assert/strict";
import { join } from "node:path";
import { fileSystemUuid } from "../../../lib/host/filesystem/fs_uuid.ts";
import { mountVolume } from "../../../lib/host/filesystem/mount.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import { mountOptions, uuid, withDisk } from "../../support/disk.ts";
import { fakeDisk, giveNameTo } from "../../support/fake_disk.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

const ignore = !needs("root", "loop", "mkfs.ext4");

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

Deno.test("mountVolume reports the message of a mkfs that fails", async () => {
  const { host, device, namespace } = await fakeDisk();
  namespace.content = undefined;
  const stderr = "/dev/nvme0n1 is apparently in use by the system; will not make a filesystem here!\n";
  host.answers.set("mkfs.ext4", { code: 1, stderr });

  const mounted = mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });

  await rejects(mounted, "FAILED_PRECONDITION", /mkfs.ext4 failed with exit 1 \(.*apparently in use by the system/);
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

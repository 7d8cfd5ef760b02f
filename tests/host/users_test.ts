import assert from "node:assert/strict";
import { join } from "node:path";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { loopDevicesOn } from "../../lib/host/loop_devices.ts";
import { mountTable } from "../../lib/host/mount_table.ts";
import { findDevice } from "../../lib/host/nvme/devices.ts";
import { allUsersOf, holdersOfDevice, usersOf } from "../../lib/host/users.ts";
import { createLogger } from "../../lib/log.ts";
import { loopMachine } from "../support/loop_machine.ts";
import { needs } from "../support/needs.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

/** A directory in the shape of sysfs and procfs; a path that ends in "/" is a directory. */
async function withTree(
  files: Readonly<Record<string, string>>,
  act: (host: Host, directory: string) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-users-" });
  try {
    for (const [path, text] of Object.entries({ "proc/self/mountinfo": "", ...files })) {
      await Deno.mkdir(join(directory, path.endsWith("/") ? path : join(path, "..")), { recursive: true });
      if (!path.endsWith("/")) await Deno.writeTextFile(join(directory, path), text);
    }
    const [sysfsRoot, procRoot, devRoot] = ["sys", "proc", "dev"].map((name) => join(directory, name));
    if (sysfsRoot === undefined || procRoot === undefined || devRoot === undefined) throw new Error("no roots");
    await act(createLinuxHost({ log: createLogger("error"), sysfsRoot, procRoot, devRoot }), directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

const disk = "sys/class/block/nvme0n1";

Deno.test("holdersOfDevice names devices on top of a device and of its partitions, with LVM's names", async () => {
  const files = {
    [`${disk}/holders/dm-3/`]: "",
    [`${disk}/holders/md0/`]: "",
    [`${disk}/nvme0n1p1/holders/dm-4/`]: "",
    [`${disk}/nvme0n1p1/dev`]: "259:2\n",
    // Not a partition of it, but an attribute and another disk.
    [`${disk}/nvme0n1px/holders/dm-9/`]: "",
    "sys/class/block/nvme0n10/holders/dm-8/": "",
    "sys/class/block/dm-3/dm/name": "vg0-data\n",
  };
  await withTree(files, async (host) => {
    assert.deepEqual(await holdersOfDevice(host, { name: "nvme0n1" }), [
      "dm-3 (vg0-data)",
      "md0",
      "dm-4 on its partition nvme0n1p1",
    ]);
  });
});

Deno.test("holdersOfDevice names mounts of partitions, and swap", async () => {
  const files = {
    [`${disk}/nvme0n1p1/dev`]: "259:2\n",
    [`${disk}/nvme0n1p2/dev`]: "259:3\n",
    "proc/self/mountinfo": "40 1 259:2 / /mnt/a rw shared:1 - ext4 /dev/nvme0n1p1 rw\n" +
      "41 1 259:1 / /mnt/b rw shared:1 - ext4 /dev/nvme0n1 rw\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n" +
      "/dev/nvme0n1p2                          partition\t1048572\t\t0\t\t-2\n" +
      "/swapfile                               file\t\t1048572\t\t0\t\t-3\n",
  };
  await withTree(files, async (host) => {
    assert.deepEqual(await holdersOfDevice(host, { name: "nvme0n1" }), [
      'the mount of its partition nvme0n1p1 at "/mnt/a"',
      "the swap on its partition nvme0n1p2",
    ]);
  });
});

Deno.test("holdersOfDevice finds nothing on a device that nothing holds, and on one that is gone", async () => {
  await withTree({ [`${disk}/holders/`]: "" }, async (host) => {
    assert.deepEqual(await holdersOfDevice(host, { name: "nvme0n1" }), []);
    assert.deepEqual(await holdersOfDevice(host, { name: "nvme7n1" }), []);
  });
});

Deno.test({
  name: "loopDevicesOn names the loop device on a bound device node, by any path by which it was opened",
  ignore: !needs("root", "loop"),
  async fn() {
    await using machine = await loopMachine();
    const { path } = await machine.addNamespace(uuid, 16 << 20);
    await machine.addNamespace(other, 16 << 20);
    const device = await findDevice(machine.host, uuid);
    assert.ok(device);
    const targets = ["published", "mapped"].map((name) => join(machine.directory, name));
    for (const target of targets) {
      await Deno.writeTextFile(target, "");
      await machine.tool("mount", "--bind", path, target);
    }
    const everywhere = [path, ...targets];
    for (const opened of everywhere) {
      const loop = (await machine.tool("losetup", "--show", "--find", opened)).trim().replace("/dev/", "");
      try {
        for (const place of everywhere) {
          assert.deepEqual(await loopDevicesOn(machine.host, await mountTable(machine.host), place), [loop]);
        }
        assert.deepEqual(await usersOf(machine.host, device), [
          loop,
          ...targets.map((target) => `the mount at "${target}"`),
        ]);
      } finally {
        await machine.tool("losetup", "--detach", `/dev/${loop}`);
      }
    }
    for (const place of everywhere) {
      assert.deepEqual(await loopDevicesOn(machine.host, await mountTable(machine.host), place), []);
    }
  },
});

Deno.test("loopDevicesOn knows a backing file whose node is gone, and takes no similar path for it", async () => {
  const files = {
    "sys/block/loop10/loop/backing_file": "/pods/a b/dev (deleted)\n",
    "sys/block/loop9/loop/backing_file": "/pods/a b/dev\n",
    "sys/block/loop3/loop/backing_file": "/pods/a b/dev2\n",
    "sys/block/loop4/": "",
    "sys/block/sda/loop/backing_file": "/pods/a b/dev\n",
  };
  await withTree(files, async (host) => {
    assert.deepEqual(await loopDevicesOn(host, await mountTable(host), "/pods/a b/dev"), ["loop9", "loop10"]);
    assert.deepEqual(await loopDevicesOn(host, await mountTable(host), "/pods/c"), []);
  });
});

Deno.test({
  name: "promise 3: allUsersOf sees a mount in another mount namespace or container, and who has the device open",
  ignore: !needs("root", "loop", "mkfs.ext4", "unshare"),
  async fn() {
    await using machine = await loopMachine();
    const { path } = await machine.addNamespace(uuid, 16 << 20);
    await machine.tool("mkfs.ext4", "-q", path);
    const device = await findDevice(machine.host, uuid);
    assert.ok(device);
    const place = join(machine.directory, "there");
    await Deno.mkdir(place);
    assert.deepEqual(await allUsersOf(machine.host, device), []);
    const script = `mount "$1" "$2" && touch "$2/mounted" && exec 3<"$1" && echo ready && read -r line`;
    const user = new Deno.Command("unshare", {
      args: ["--mount", "--propagation", "private", "sh", "-c", script, "sh", path, place],
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    try {
      const { value } = await user.stdout.getReader().read();
      assert.equal(new TextDecoder().decode(value), "ready\n");

      const users = await allUsersOf(machine.host, device);

      assert.deepEqual(users, [
        `the mount at "${place}" of process ${user.pid} (sh)`,
        `process ${user.pid} (sh) with "${path}"`,
      ]);
      assert.deepEqual(await usersOf(machine.host, device), []);
    } finally {
      await user.stdin.close();
      await user.status;
    }
    // Where the kernel lists a mounted file system; this machine's sysfs does not follow it.
    const listed = join(machine.host.roots.sysfs, "fs/ext4", device.name);
    await Deno.mkdir(listed, { recursive: true });
    assert.deepEqual(await allUsersOf(machine.host, device), [
      "its ext4, which is mounted where this process cannot see it",
    ]);
  },
});

/**
 * What is mounted where, and what remains of it: kubelet's directory seen twice, frozen file systems, holders, full
 * disks.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hasCode } from "../../../lib/error.ts";
import type { Host } from "../../../lib/host/host.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import { exists, type LoopNodeOptions, node, nodeTest, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import { blockCapability, mountCapability, publishContext, rejects, volumeId } from "../../support/node_calls.ts";

/**
 * A node whose kubelet directory is a bind mount, which shows at `twin` too; what is mounted at one shows at the other.
 */
async function nodeSeenTwice(options: LoopNodeOptions = {}) {
  const n = await node({ ...options, base: "mnt/kubelet" });
  const twin = join(n.machine.directory, "k");
  await Deno.mkdir(twin);
  await n.machine.tool("mount", "--bind", n.base, n.base);
  await n.machine.tool("mount", "--make-shared", n.base);
  await n.machine.tool("mount", "--bind", n.base, twin);
  return {
    ...n,
    twin,
    async [Symbol.asyncDispose]() {
      // A mount that propagated goes with the one that it came from.
      for (const path of await n.machine.mounts()) {
        if (path.startsWith(`${n.base}/`)) await n.machine.tool("umount", path);
      }
      await n.machine[Symbol.asyncDispose]();
    },
  };
}

for (const mode of [Mode.SINGLE_NODE_SINGLE_WRITER, Mode.SINGLE_NODE_READER_ONLY]) {
  nodeTest(
    `a volume for one pod (${Mode[mode]}) is published where kubelet's directory is seen at two paths`,
    async () => {
      await using n = await nodeSeenTwice();
      // For writing first, or there would be no file system.
      await n.stage(n.stageRequest());
      await n.unstage(n.unstageRequest);
      const staging = join(n.twin, "globalmount");
      const capability = mountCapability("", mode);
      await n.stage(n.stageRequest(capability, {}, staging));

      await n.publish(n.publishRequest(capability, false, join(n.twin, "pod1"), staging));

      await rejects(
        n.publish(n.publishRequest(capability, false, join(n.base, "pod2"), staging)),
        "FAILED_PRECONDITION",
        /it is published at ".*pod1", and access mode .* allows one target/,
      );
      await n.unpublish(n.unpublishRequest);
      await n.unstage(n.unstageRequest);
      assert.deepEqual(await n.machine.mounts(), [n.base, n.twin]);
    },
  );
}

nodeTest(
  "a file system that shut itself down is mounted again where kubelet's directory is seen at two paths",
  async () => {
    await using n = await nodeSeenTwice({ sizeMib: 320 });
    await n.stage(n.stageRequest(mountCapability("xfs")));
    await n.machine.tool("xfs_io", "-x", "-c", "shutdown", n.staging);

    await n.stage(n.stageRequest(mountCapability("xfs")));

    await Deno.writeTextFile(join(n.staging, "x"), "writable");
  },
  !needs("mkfs.xfs"),
);

nodeTest(
  "a raw block device is writable again after its last read-only pod where kubelet's directory is seen twice",
  async () => {
    await using n = await nodeSeenTwice();
    await n.stage(n.stageRequest(blockCapability()));
    await n.publish(n.publishRequest(blockCapability(), true));
    assert.equal((await n.machine.tool("blockdev", "--getro", n.namespace.loop)).trim(), "1");

    await n.unpublish(n.unpublishRequest);

    assert.equal((await n.machine.tool("blockdev", "--getro", n.namespace.loop)).trim(), "0");
  },
);

nodeTest("promise 4: unstage does not hang without a path where kubelet's directory is seen at two paths", async () => {
  await using n = await nodeSeenTwice();
  const sysfs = join(n.machine.directory, "sys/class");
  const write = async (directory: string, facts: Record<string, string>) => {
    await Deno.mkdir(join(sysfs, directory), { recursive: true });
    for (const [name, text] of Object.entries(facts)) {
      await Deno.writeTextFile(join(sysfs, directory, name), `${text}\n`);
    }
  };
  const address = "traddr=192.0.2.1,trsvcid=4420";
  await write("nvme/nvme0", { state: "live", subsysnqn: subsystemNqn, transport: "tcp", address, hostnqn: "nqn.h:n1" });
  await write("block/nvme0c0n1", { hidden: "1", ana_state: "optimized" });
  await n.stage(n.stageRequest());
  await write("nvme/nvme0", { state: "connecting" });

  await rejects(n.unstage(n.unstageRequest), "UNAVAILABLE", /has no live path \(nvme0 connecting\)/);

  assert(!n.machine.commands.includes("umount"));
});

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  nodeTest(`promise 4: a frozen ${fsType} keeps its mount, and the error says how to thaw it`, async () => {
    await using n = await node({ sizeMib: fsType === "ext4" ? 64 : 320 });
    const capability = mountCapability(fsType);
    await n.stage(n.stageRequest(capability));
    await n.machine.tool("fsfreeze", "--freeze", n.staging);
    try {
      for (let round = 0; round < 2; round++) {
        await rejects(
          n.unstage(n.unstageRequest),
          "UNAVAILABLE",
          new RegExp(`${fsType} of .* it is frozen or .* thaw it on this node: fsfreeze --unfreeze ${n.staging}$`),
        );
      }
      assert.deepEqual([await n.machine.mounts(), n.machine.commands.includes("umount")], [[n.staging], false]);
    } finally {
      await n.machine.tool("fsfreeze", "--unfreeze", n.staging);
    }

    // The write that waited answers a moment later.
    await until(() => n.unstage(n.unstageRequest));

    assert.deepEqual(await n.machine.mounts(), []);
  }, !needs(`mkfs.${fsType}`));
}

nodeTest("promise 4: a file system that is active without a mount says that it may be frozen", async () => {
  // The kernel's own list of active file systems, under the name that the machine of the test gives the device.
  const withKernelList = (host: Host): Host => ({
    ...host,
    async kindOf(path) {
      const name = /\/fs\/ext4\/(nvme\d+n\d+)$/.exec(path)?.[1];
      if (name === undefined) return await host.kindOf(path);
      const number = await host.readText(`${host.roots.sysfs}/class/block/${name}/dev`);
      const real = await Deno.realPath(`/sys/dev/block/${number?.trim()}`);
      return await host.kindOf(`/sys/fs/ext4/${real.slice(real.lastIndexOf("/") + 1)}`);
    },
  });
  await using n = await node({ host: withKernelList });
  await n.stage(n.stageRequest());
  await n.machine.tool("fsfreeze", "--freeze", n.staging);
  await n.machine.tool("umount", n.staging);

  try {
    await rejects(
      n.unstage(n.unstageRequest),
      "FAILED_PRECONDITION",
      /its ext4 is still in use by .* a freeze that outlived its mounts; .* mount .*nvme0n1 somewhere.*fsfreeze --unfreeze/,
    );
  } finally {
    // As the message says.
    await n.machine.tool("mount", n.namespace.path, n.staging);
    await n.machine.tool("fsfreeze", "--unfreeze", n.staging);
  }
}, !needs("fsfreeze"));

nodeTest(
  "promise 3: unstage with a Discovery-Client fails while another device holds the raw block device",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest(blockCapability()));
    await n.publish(n.publishRequest(blockCapability()));
    const holder = join(n.machine.directory, "sys/class/block/nvme0n1/holders/dm-3");
    await Deno.mkdir(holder, { recursive: true });
    await n.unpublish(n.unpublishRequest);

    await rejects(n.unstage(n.unstageRequest), "FAILED_PRECONDITION", /nvme0n1 is in use by dm-3/);
    assert.deepEqual([...Deno.readDirSync(n.discovery)].map(({ name }) => name), [uuid]);
    await Deno.remove(holder);
    await n.unstage(n.unstageRequest);

    assert.deepEqual([...Deno.readDirSync(n.discovery)], []);
  },
);

nodeTest("unpublish of a raw block volume names the loop device that kubelet still has on it", async () => {
  await using n = await node();
  await n.stage(n.stageRequest(blockCapability()));
  await n.publish(n.publishRequest(blockCapability()));
  const loop = (await n.machine.tool("losetup", "--show", "--find", n.target)).trim();
  try {
    await rejects(
      n.unpublish(n.unpublishRequest),
      "FAILED_PRECONDITION",
      new RegExp(`pod1" is in use by the loop device ${loop.replace("/dev/", "")}$`),
    );
  } finally {
    await n.machine.tool("losetup", "--detach", loop);
  }

  await n.unpublish(n.unpublishRequest);
});

nodeTest("errors of kubelet's own disk name the path and the disk", async () => {
  await using n = await node();
  const full = join(n.machine.directory, "full");
  await Deno.mkdir(full);
  await n.machine.tool("mount", "-t", "tmpfs", "-o", "nr_inodes=2", "none", full);
  await Deno.mkdir(join(full, "pod"));
  await n.stage(n.stageRequest());
  const disk = `on this node's own disk \\(tmpfs at "${full}"\\)`;
  const publish = (path: string) => n.publish(n.publishRequest(mountCapability(), false, path));

  await rejects(
    publish(join(full, "new")),
    "UNAVAILABLE",
    new RegExp(`Cannot make the directory "${full}/new", ${disk}: no space or no inode is left there \\(ENOSPC\\)`),
  );
  await n.machine.tool("mount", "-o", "remount,ro", full);
  await rejects(publish(join(full, "new")), "UNAVAILABLE", new RegExp(`${disk}: it is read-only \\(EROFS\\)`));
  await rejects(
    n.unpublish({ volumeId: volumeId(uuid), targetPath: join(full, "pod") }),
    "UNAVAILABLE",
    new RegExp(`Cannot remove "${full}/pod", ${disk}: it is read-only \\(EROFS\\)`),
  );
  await rejects(
    publish(join(n.base, "x".repeat(300))),
    "INVALID_ARGUMENT",
    /x": a part of it, or the whole, is too long/,
  );
});

nodeTest("promise 5: a staging path that holds files of the node is never mounted over", async () => {
  await using n = await node();
  await Deno.writeTextFile(join(n.staging, "precious"), "data of the node");

  await rejects(
    n.stage(n.stageRequest()),
    "FAILED_PRECONDITION",
    /the staging path ".*" holds files of the node's own disk/,
  );

  assert.deepEqual([await n.machine.mounts(), n.machine.commands], [[], []]);
});

nodeTest(
  "volumes are mounted in no directory of the operating system, and never at their own staging path",
  async () => {
    await using n = await node();
    const link = join(n.base, "link");
    await Deno.symlink("/etc", link);
    const system = /is a directory of the operating system, .* --allow-system-paths/;

    for (const path of ["/etc", "/usr/lib", "/", join(link, "x")]) {
      await rejects(n.stage(n.stageRequest(mountCapability(), {}, path)), "INVALID_ARGUMENT", system);
    }
    await n.stage(n.stageRequest());
    await rejects(n.publish(n.publishRequest(mountCapability(), false, "/etc/target")), "INVALID_ARGUMENT", system);
    await rejects(
      n.publish(n.publishRequest(mountCapability(), false, n.staging)),
      "INVALID_ARGUMENT",
      /target_path and staging_target_path are both/,
    );

    assert.deepEqual(await n.machine.mounts(), [n.staging]);
  },
);

/** Repeats a call while it is UNAVAILABLE, as kubelet does. */
async function until(call: () => Promise<unknown>): Promise<void> {
  const giveUpAt = Date.now() + 30_000;
  for (;;) {
    try {
      return void await call();
    } catch (error) {
      if (!hasCode(error, "UNAVAILABLE") || Date.now() > giveUpAt) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

nodeTest(
  "promise 4: a raw block target whose device has gone is unpublished, also when another volume has got its number",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest(blockCapability()));
    await n.publish(n.publishRequest(blockCapability()));
    await n.machine.hide(n.namespace);
    // A bound device node does not keep the number of a device that has gone: the next device gets it, and the name
    // too.
    const other = "5a1f0d3c-7b52-4e0a-8f44-0c6d2e9b7a31";
    await n.machine.show({ ...n.namespace, uuid: other });
    const otherTarget = join(n.base, "other");
    const otherStaging = join(n.base, "otherstaging");
    await Deno.mkdir(otherStaging);
    const volume = {
      volumeId: volumeId(other),
      stagingTargetPath: otherStaging,
      publishContext: publishContext(other),
    };
    const capability = blockCapability(Mode.SINGLE_NODE_SINGLE_WRITER);

    await n.stage({ ...volume, volumeCapability: capability });
    await n.publish({ ...volume, targetPath: otherTarget, volumeCapability: capability });
    await n.unpublish({ volumeId: volumeId(other), targetPath: otherTarget });
    // The first volume's pod has not ended, and does not hold up the other volume.
    await n.unstage({ volumeId: volumeId(other), stagingTargetPath: otherStaging });
    await n.unpublish(n.unpublishRequest);
    await n.unstage(n.unstageRequest);

    assert.deepEqual(await n.machine.mounts(), []);
    assert.equal(exists(n.target), false);
  },
);

nodeTest(
  "a raw block target of a device that has gone is published again when the volume is back under its old number",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest(blockCapability()));
    await n.publish(n.publishRequest(blockCapability()));
    await n.machine.hide(n.namespace);
    await n.machine.show(n.namespace);

    await n.publish(n.publishRequest(blockCapability()));

    assert.equal((await n.machine.mounts()).length, 1);
    assert.equal((await Deno.stat(n.target)).rdev, (await Deno.stat(n.namespace.loop)).rdev);
    await n.unpublish(n.unpublishRequest);
    await n.unstage(n.unstageRequest);
    assert.deepEqual(await n.machine.mounts(), []);
  },
);

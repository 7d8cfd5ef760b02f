/** NodeStageVolume on a machine of loop devices. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { exists, mib, node, nodeTest, other, sha256, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import {
  blockCapability,
  callContext,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

nodeTest(
  "NodeStageVolume of a staged volume with another capability answers ALREADY_EXISTS with the differences",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest(mountCapability("ext4")));

    await rejects(
      n.stage(n.stageRequest(mountCapability("xfs", Mode.SINGLE_NODE_WRITER, ["noatime"]))),
      "ALREADY_EXISTS",
      /mounted there already, file system ext4 instead of xfs, without noatime/,
    );
    await rejects(
      n.stage(n.stageRequest(blockCapability())),
      "ALREADY_EXISTS",
      /as a block device: ext4 of .* is staged/,
    );
  },
);

nodeTest("NodeStageVolume passes mount flags and mkfs options on", async () => {
  await using n = await node();
  const capability = mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["noatime", "data=ordered"]);

  await n.stage(n.stageRequest(capability, { "mkfs-options": "-L mine -m1 -E stride=16" }));

  const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
  assert(table.find((mount) => mount.path === n.staging)?.options.includes("noatime"));
  assert.equal((await n.machine.tool("e2label", n.namespace.path)).trim(), "mine");
  await n.stage(n.stageRequest(capability));
});

nodeTest(
  "NodeStageVolume of a blank volume with mkfs options that are not allowed answers INVALID_ARGUMENT and makes nothing",
  async () => {
    await using n = await node();

    for (
      const [text, message] of [["-F", /-F is not one of/], [
        "-O +journal_dev",
        /-O \+?journal_dev is not allowed/,
      ]] as const
    ) {
      const staged = n.stage(n.stageRequest(mountCapability("ext4"), { "mkfs-options": text }));
      await rejects(staged, "INVALID_ARGUMENT", message);
    }

    assert.deepEqual(n.machine.commands.filter((command) => command !== "blkid"), []);
  },
);

// A PersistentVolume keeps its mkfs-options for ever, and a later version of the driver may allow less.
nodeTest("NodeStageVolume mounts a file system that is there, whatever its mkfs options say", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.unstage(n.unstageRequest);

  for (const text of ["-F", "-e panic", "-O +journal_dev", "words"]) {
    await n.stage(n.stageRequest(mountCapability("ext4"), { "mkfs-options": text }));
    assert.deepEqual(await n.machine.mounts(), [n.staging]);
    await n.unstage(n.unstageRequest);
  }
});

nodeTest(
  "NodeStageVolume of a blank volume for reading only answers FAILED_PRECONDITION and makes nothing",
  async () => {
    await using n = await node();

    const staged = n.stage(n.stageRequest(mountCapability("ext4", Mode.MULTI_NODE_READER_ONLY)));

    await rejects(
      staged,
      "FAILED_PRECONDITION",
      /has no file system, and with read-only or shared access none is made/,
    );
    assert.deepEqual(n.machine.commands, ["blkid"]);
  },
);

nodeTest("NodeStageVolume for many readers mounts read-only without replaying the journal", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.unstage(n.unstageRequest);
  const before = await sha256(n.namespace.file);

  const capability = mountCapability("", Mode.MULTI_NODE_READER_ONLY);
  for (let round = 0; round < 2; round++) await n.stage(n.stageRequest(capability));
  await n.publish(n.publishRequest(capability));

  const mounts = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
  const staged = mounts.find((mount) => mount.path === n.staging);
  assert.deepEqual([staged?.superOptions.includes("ro"), staged?.superOptions.includes("norecovery")], [true, true]);
  await assert.rejects(Deno.writeTextFile(join(n.target, "x"), ""), /Read-only file system/);
  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);
  assert.equal(await sha256(n.namespace.file), before);
});

nodeTest(
  "promise 2: NodeStageVolume mounts an xfs again that has shut down, which other volumes do not notice",
  async () => {
    await using n = await node({ sizeMib: 320 });
    await n.stage(n.stageRequest(mountCapability("xfs")));
    const [directory, subPath] = [join(n.staging, "nvme9n9"), join(n.machine.directory, "subPath")];
    for (const path of [directory, subPath]) await Deno.mkdir(path);
    await n.machine.tool("mount", "--bind", directory, subPath);
    await n.machine.addNamespace(other, 64 * mib);
    const staging = join(n.machine.directory, "globalmount2");
    await Deno.mkdir(staging);
    const neighbour = {
      ...n.stageRequest(),
      volumeId: volumeId(other),
      stagingTargetPath: staging,
      publishContext: publishContext(other),
    };
    await n.stage(neighbour);

    await n.machine.tool("xfs_io", "-x", "-c", "shutdown", n.staging);
    await n.unstage({ volumeId: neighbour.volumeId, stagingTargetPath: staging });
    const broken = /cannot be read \(.*\); it is still in use at ".*subPath", the pods there have to end first/;
    await rejects(n.stage(n.stageRequest(mountCapability("xfs"))), "FAILED_PRECONDITION", broken);
    await n.machine.tool("umount", subPath);
    await n.stage(n.stageRequest(mountCapability("xfs")));

    await Deno.writeTextFile(join(n.staging, "works"), "");
  },
  !needs("mkfs.xfs", "xfs_io"),
);

nodeTest("NodeStageVolume with the publish context of another driver uses the device that is there", async () => {
  await using n = await node();

  await n.stage({ ...n.stageRequest(), publishContext: { device: "/dev/x" } });

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
});

nodeTest(
  "NodeStageVolume with the publish context of another driver says what to do when the device is missing",
  async () => {
    await using n = await node();
    await n.machine.hide(n.namespace);

    const staged = n.stage({ ...n.stageRequest(), publishContext: {} });

    await rejects(
      staged,
      "FAILED_PRECONDITION",
      /made by another driver and the device is not here; delete the VolumeAttachment/,
    );
  },
);

nodeTest("NodeStageVolume says that the staging path is missing", async () => {
  await using n = await node();
  await Deno.remove(n.staging);

  await rejects(
    n.stage(n.stageRequest()),
    "FAILED_PRECONDITION",
    /staging path ".*" is missing, the orchestrator has to make/,
  );
});

// ------------------------------------------------------------------------------------------------------------ promises

nodeTest(
  "promise 1: NodeStageVolume of a device with foreign data fails with the reason and changes no byte",
  async () => {
    await using n = await node();
    await Deno.writeFile(n.namespace.path, new TextEncoder().encode("somebody's data"), { create: false });
    const before = await sha256(n.namespace.file);

    await rejects(
      n.stage(n.stageRequest()),
      "FAILED_PRECONDITION",
      /not blank and holds no file system: there is data at byte 0/,
    );

    assert.equal(await sha256(n.namespace.file), before);
  },
);

nodeTest(
  "promise 1: NodeStageVolume of a device that has shrunk fails with both sizes and changes no byte",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    await n.unstage(n.unstageRequest);
    await n.machine.grow(n.namespace, 32 * mib);
    const before = await sha256(n.namespace.file);

    await rejects(
      n.stage(n.stageRequest()),
      "FAILED_PRECONDITION",
      /67108864 bytes, but the device only 33554432: it has shrunk/,
    );

    assert.equal(await sha256(n.namespace.file), before);
  },
);

nodeTest("promise 2: NodeStageVolume unmounts a dead mount and mounts the device that is there now", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.machine.hide(n.namespace);
  const now = await n.machine.addNamespace(uuid, 64 * mib, { name: "nvme1n1" });

  await n.stage(n.stageRequest());

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
  const [mount] = await mountsAtPath(n.staging);
  assert.equal(mount?.source, now.path);
});

nodeTest("promise 2: NodeStageVolume notices a mount that became read-only and mounts it again", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.machine.tool("mount", "-o", "remount,ro", n.staging);

  await n.stage(n.stageRequest());

  await Deno.writeTextFile(join(n.staging, "x"), "writable");
});

nodeTest(
  "promise 2: NodeStageVolume notices an ext4 that the kernel made read-only after an error, and repairs it",
  async () => {
    await using n = await node();
    const capability = mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["errors=remount-ro"]);
    await n.stage(n.stageRequest(capability));
    const loop = n.namespace.loop.replace("/dev/", "");
    await Deno.writeTextFile(`/sys/fs/ext4/${loop}/trigger_fs_error`, "test\n");
    await assert.rejects(Deno.writeTextFile(join(n.staging, "x"), ""), /Read-only file system/);

    await n.stage(n.stageRequest(capability));

    await Deno.writeTextFile(join(n.staging, "x"), "writable");
  },
  !exists("/sys/fs/ext4/features/lazy_itable_init"),
);

nodeTest("promise 2: NodeStageVolume does not believe a mount whose device gives only I/O errors", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const readBytes = () => Promise.reject(new Error("Input/output error (os error 5)"));
  const broken = nodeCalls({
    host: { ...n.machine.host, readBytes },
    attacher: createDiscoveryClientAttacher({ host: n.machine.host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
  });

  await rejects(broken.stage(n.stageRequest()), "UNAVAILABLE", /cannot be read at byte 0 \(Input\/output error/);

  assert.deepEqual(n.machine.commands, ["blkid", "mkfs.ext4", "mount", "umount", "blkid"]);
  await n.stage(n.stageRequest());
});

nodeTest("promise 2: NodeStageVolume does not leave a broken mount under a pod in silence", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await n.machine.tool("mount", "-o", "remount,ro", n.staging);

  const staged = n.stage(n.stageRequest());

  await rejects(staged, "FAILED_PRECONDITION", /read-only although it should not; it is still in use at ".*pod1"/);
});

nodeTest(
  "promise 3: NodeStageVolume finds the namespace by UUID after two devices have swapped their names",
  async () => {
    await using n = await node();
    const stranger = await n.machine.addNamespace(other, 64 * mib);
    await n.stage(n.stageRequest());
    await Deno.writeTextFile(join(n.staging, "mine"), "");
    await n.unstage(n.unstageRequest);
    await n.machine.hide(n.namespace);
    await n.machine.hide(stranger);
    await n.machine.show(stranger, { name: n.namespace.name });
    await n.machine.show(n.namespace, { name: stranger.name });

    await n.stage(n.stageRequest());

    assert.deepEqual([...Deno.readDirSync(n.staging)].map((entry) => entry.name).sort(), ["lost+found", "mine"]);
  },
);

nodeTest("promise 3: NodeStageVolume waits while the node of the device is another device, and says so", async () => {
  await using n = await node();
  const stranger = await n.machine.addNamespace(other, 64 * mib);
  await Deno.remove(n.namespace.path);
  await n.machine.tool("cp", "-a", stranger.path, n.namespace.path);
  const before = await sha256(stranger.file);
  const caller = new AbortController();
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 150);

  const staged = n.stage(n.stageRequest(), callContext(caller.signal));

  await rejects(staged, "UNAVAILABLE", /sysfs has nvme0n1 as device 7:\d+, but the node .*nvme0n1 is device 7:\d+/);
  assert.equal(await sha256(stranger.file), before);
});

nodeTest("promise 3: NodeStageVolume does not take a namespace with the right UUID of another subsystem", async () => {
  await using n = await node();
  await n.machine.hide(n.namespace);
  await n.machine.show(n.namespace, { subsystemNqn: "nqn.2019-09.com.example:cluster:2" });
  const caller = new AbortController();
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 150);

  const staged = n.stage(n.stageRequest(), callContext(caller.signal));

  await rejects(
    staged,
    "UNAVAILABLE",
    /has this UUID, but belongs to another subsystem than nqn.*Discovery-Client runs/,
  );
});

nodeTest("promise 14: NodeStageVolume waits for a device that comes late", async () => {
  await using n = await node();
  await n.machine.hide(n.namespace);
  const staged = n.stage(n.stageRequest());
  await new Promise((resolve) => setTimeout(resolve, 50));
  await n.machine.show(n.namespace);

  await staged;

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
});

async function mountsAtPath(path: string) {
  return parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).filter((mount) => mount.path === path);
}

import assert from "node:assert/strict";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { StatusError } from "../../../lib/error.ts";
import type { Attacher } from "../../../lib/host/attach/attacher.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../../lib/host/host.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import {
  NodeGetCapabilitiesRequestSchema,
  NodeServiceCapability_RPC_Type as Rpc,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeUsage_Unit as Unit,
} from "../../../proto/gen/csi_pb.ts";
import { node, other, uuid } from "../../support/loop_node.ts";
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

const ignore = !needs("root", "loop", "mkfs.ext4");
const mib = 1 << 20;
// CAP_SYS_RESOURCE: see NodeExpandVolume. Containers may lack it although they run as root.
const growsMountedExt4 = (BigInt(
  `0x${/CapEff:\s*(\w+)/.exec(Deno.readTextFileSync("/proc/self/status"))?.[1] ?? "0"}`,
) & (1n << 24n)) !== 0n;
if (!growsMountedExt4) console.warn("skipped, this machine has no CAP_SYS_RESOURCE: growing a mounted ext4");

function nodeTest(name: string, fn: () => Promise<void>, skip = false): void {
  Deno.test({ name, ignore: ignore || skip, fn });
}

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  nodeTest(`node service takes a ${fsType} volume through its whole life, each call twice`, async () => {
    await using n = await node({ sizeMib: fsType === "ext4" ? 64 : 320 });
    const capability = mountCapability(fsType);

    for (let round = 0; round < 2; round++) await n.stage(n.stageRequest(capability));
    assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
    for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(capability));
    await Deno.writeTextFile(join(n.target, "kept"), "by the pod");
    assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
    for (let round = 0; round < 2; round++) await n.unpublish(n.unpublishRequest);
    await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
    for (let round = 0; round < 2; round++) await n.unstage(n.unstageRequest);
    assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);

    await n.stage(n.stageRequest(capability));
    assert.equal(await Deno.readTextFile(join(n.staging, "kept")), "by the pod");
    const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.staging });
    assert.equal(usage?.length, 2);
  }, !needs(`mkfs.${fsType}`));
}

nodeTest("node service takes a raw block volume through its whole life, each call twice", async () => {
  await using n = await node();
  const capability = blockCapability();

  for (let round = 0; round < 2; round++) await n.stage(n.stageRequest(capability));
  assert.deepEqual(await n.machine.mounts(), []);
  for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(capability));
  const stat = await Deno.stat(n.target);
  assert.deepEqual([stat.isBlockDevice, stat.rdev], [true, (await Deno.stat(n.namespace.loop)).rdev]);
  const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });
  assert.deepEqual(usage, [{ unit: Unit.BYTES, total: 64n * BigInt(mib) }]);
  for (let round = 0; round < 2; round++) await n.unpublish(n.unpublishRequest);
  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
  for (let round = 0; round < 2; round++) await n.unstage(n.unstageRequest);

  assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);
});

nodeTest(
  "NodePublishVolume of a block volume read-only makes the kernel refuse writes until NodeUnpublishVolume",
  async () => {
    await using n = await node();
    const capability = blockCapability();
    await n.stage(n.stageRequest(capability));
    const readOnly = async () => (await n.machine.tool("blockdev", "--getro", n.namespace.loop)).trim();

    await n.publish(n.publishRequest(capability, true));
    assert.equal(await readOnly(), "1");
    await rejects(
      n.publish(n.publishRequest(capability, false, join(n.machine.directory, "pod2"))),
      "FAILED_PRECONDITION",
      /published at ".*pod1" read-only, and a block device is either read-only or writable/,
    );
    await n.unpublish(n.unpublishRequest);

    assert.equal(await readOnly(), "0");
  },
);

nodeTest("node calls spawn no more commands than the bounds allow", async () => {
  await using n = await node();
  const spawned = async (act: () => Promise<unknown>) => {
    const before = n.machine.commands.length;
    await act();
    return n.machine.commands.slice(before);
  };

  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), ["blkid", "mkfs.ext4", "mount"]);
  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), []);
  assert.deepEqual(await spawned(() => n.publish(n.publishRequest())), ["mount"]);
  assert.deepEqual(await spawned(() => n.publish(n.publishRequest())), []);
  assert.deepEqual(await spawned(() => n.unpublish(n.unpublishRequest)), ["umount"]);
  assert.deepEqual(await spawned(() => n.unstage(n.unstageRequest)), ["umount"]);
  assert.deepEqual(await spawned(() => n.stage(n.stageRequest())), ["blkid", "e2fsck", "mount"]);
});

nodeTest("node calls answer INVALID_ARGUMENT for each missing required field before anything else", async () => {
  await using n = await node();
  const unknown = "fake-vol-id-1a2b3c4d-5";
  const cases: [Promise<unknown>, RegExp][] = [
    [n.stage({ ...n.stageRequest(), volumeId: "" }), /volume_id is missing/],
    [n.stage({ ...n.stageRequest(), volumeId: unknown, stagingTargetPath: "" }), /staging_target_path is missing/],
    [n.stage({ volumeId: unknown, stagingTargetPath: n.staging }), /volume_capability is missing/],
    [n.stage({ ...n.stageRequest(), stagingTargetPath: "relative" }), /not a plain absolute path/],
    [n.unstage({ ...n.unstageRequest, volumeId: "" }), /volume_id is missing/],
    [n.unstage({ ...n.unstageRequest, stagingTargetPath: "" }), /staging_target_path is missing/],
    [n.publish({ ...n.publishRequest(), volumeId: "" }), /volume_id is missing/],
    [n.publish({ ...n.publishRequest(), volumeId: unknown, targetPath: "" }), /target_path is missing/],
    [n.publish({ volumeId: unknown, targetPath: n.target }), /volume_capability is missing/],
    [n.unpublish({ ...n.unpublishRequest, volumeId: "" }), /volume_id is missing/],
    [n.unpublish({ ...n.unpublishRequest, targetPath: "" }), /target_path is missing/],
    [n.stats({ volumePath: n.target }), /volume_id is missing/],
    [n.stats({ volumeId: unknown }), /volume_path is missing/],
    [n.expand({ volumePath: n.target }), /volume_id is missing/],
    [n.expand({ volumeId: unknown }), /volume_path is missing/],
    [
      n.expand({ volumeId: unknown, volumePath: n.target, capacityRange: { requiredBytes: 2n, limitBytes: 1n } }),
      /from 2 to 1 bytes makes no sense/,
    ],
    [n.stage(n.stageRequest(mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["loop"]))), /mount flag "loop"/],
    [
      n.stage({ ...n.stageRequest(), publishContext: publishContext(other) }),
      /the publish context is of namespace 1b7e2c44/,
    ],
  ];

  for (const [call, message] of cases) await rejects(call, "INVALID_ARGUMENT", message);

  assert.deepEqual(n.machine.commands, []);
});

nodeTest("node calls for an unknown volume ID answer NOT_FOUND, or OK to take away what is not there", async () => {
  await using n = await node();
  const volumeId = "fake-vol-id-1a2b3c4d-5";

  await rejects(n.stage({ ...n.stageRequest(), volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.publish({ ...n.publishRequest(), volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.stats({ volumeId, volumePath: "some/path" }), "NOT_FOUND", /its ID is not one of this driver/);
  await rejects(n.expand({ volumeId, volumePath: "some/path" }), "NOT_FOUND", /its ID is not one of this driver/);
  await n.unstage({ ...n.unstageRequest, volumeId });
  await n.unpublish({ ...n.unpublishRequest, volumeId });
  await n.machine.tool("mount", "-t", "tmpfs", "foreign", n.staging);
  await rejects(n.unstage({ ...n.unstageRequest, volumeId }), "NOT_FOUND", /its ID is not one of this driver/);
});

nodeTest(
  "NodePublishVolume with another capability than the volume is staged with answers FAILED_PRECONDITION",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());

    const asXfs = n.publish(n.publishRequest(mountCapability("xfs")));
    await rejects(asXfs, "FAILED_PRECONDITION", /it is staged as ext4, the request wants xfs/);
    const asBlock = n.publish(n.publishRequest(blockCapability()));
    await rejects(asBlock, "FAILED_PRECONDITION", /as a file system, not as a block device/);

    assert.deepEqual(await n.machine.mounts(), [n.staging]);
  },
);

nodeTest("NodePublishVolume without a staging path answers FAILED_PRECONDITION", async () => {
  await using n = await node();

  const published = n.publish({ ...n.publishRequest(), stagingTargetPath: "" });

  await rejects(published, "FAILED_PRECONDITION", /staging_target_path is missing, the volume has to be staged first/);
});

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

nodeTest("NodePublishVolume read-only shows a pod the volume without letting it write", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(mountCapability(), true));

  await assert.rejects(Deno.writeTextFile(join(n.target, "x"), ""), /Read-only file system/);
  await Deno.writeTextFile(join(n.staging, "x"), "");
  await rejects(
    n.publish(n.publishRequest(mountCapability(), false)),
    "ALREADY_EXISTS",
    /published there already, read-only instead of writable/,
  );
});

for (const [mode, allowed] of [["SINGLE_NODE_SINGLE_WRITER", false], ["SINGLE_NODE_WRITER", true]] as const) {
  nodeTest(`NodePublishVolume at a second target with ${mode} is ${allowed ? "done" : "refused"}`, async () => {
    await using n = await node();
    const capability = mountCapability("", Mode[mode]);
    await n.stage(n.stageRequest(capability));
    await n.publish(n.publishRequest(capability));
    const second = n.publish(n.publishRequest(capability, false, join(n.machine.directory, "pod2")));

    if (allowed) await second;
    else {
      await rejects(
        second,
        "FAILED_PRECONDITION",
        /published at ".*pod1", and access mode \w+ allows one target on a node/,
      );
    }

    assert.equal((await n.machine.mounts()).length, allowed ? 3 : 2);
  });
}

nodeTest(
  "NodeUnstageVolume of a volume that is still published answers FAILED_PRECONDITION and keeps it attached",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    await n.publish(n.publishRequest());

    await rejects(
      n.unstage(n.unstageRequest),
      "FAILED_PRECONDITION",
      /still mounted at ".*pod1", unpublish it there first/,
    );
    assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
    await n.unpublish(n.unpublishRequest);
    await n.unstage(n.unstageRequest);

    assert.deepEqual([...Deno.readDirSync(n.discovery)], []);
  },
);

nodeTest("promise 4: a directory of the volume is one, whatever its name, while it is mounted in a pod", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const [directory, subPath] = [join(n.staging, "nvme9n9"), join(n.machine.directory, "subPath")];
  for (const path of [directory, subPath]) await Deno.mkdir(path);
  await n.machine.tool("mount", "--bind", directory, subPath);

  await rejects(
    n.unstage(n.unstageRequest),
    "FAILED_PRECONDITION",
    /it is still mounted at ".*subPath", unpublish it there first/,
  );

  assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
  await n.machine.tool("umount", subPath);
  await n.unstage(n.unstageRequest);
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

nodeTest("promise 4: NodeUnstageVolume lets go of no volume that is mounted in another mount namespace", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  // Where the kernel lists a mounted file system; this machine's sysfs does not follow it.
  const listed = join(n.machine.host.roots.sysfs, "fs/ext4", n.namespace.name);
  await Deno.mkdir(listed, { recursive: true });
  const leak = new Deno.Command("unshare", {
    args: ["--mount", "--propagation", "private", "sh", "-c", "echo ready && read -r line"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  try {
    await leak.stdout.getReader().read();

    await rejects(
      n.unstage(n.unstageRequest),
      "FAILED_PRECONDITION",
      new RegExp(`its ext4 is still in use by the mount at "${n.staging}" of process ${leak.pid} \\(sh\\)$`),
    );
  } finally {
    await leak.stdin.close();
    await leak.status;
  }
  await rejects(
    n.unstage(n.unstageRequest),
    "FAILED_PRECONDITION",
    /its ext4 is still in use by something that this process cannot see: a mount of another container, or a freeze/,
  );
  assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
  await Deno.remove(listed);
  await n.unstage(n.unstageRequest);

  assert.deepEqual([...Deno.readDirSync(n.discovery)], []);
}, !needs("unshare"));

nodeTest("promise 17: a volume encrypted on the host is never published without its encryption", async () => {
  await using n = await node();
  const encrypted = `${volumeId(uuid)}|hostcrypto:luks2`;

  for (const capability of [blockCapability(), mountCapability()]) {
    await rejects(
      n.publish({ ...n.publishRequest(capability), volumeId: encrypted }),
      "FAILED_PRECONDITION",
      /its encryption is not open on this node, and the call brings no passphrase; end every pod .* is staged again/,
    );
  }

  assert.deepEqual([n.machine.commands, await n.machine.mounts()], [[], []]);
});

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

nodeTest("NodeGetVolumeStats answers the bytes and inodes that statfs tells", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());

  const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });

  const [bytes, inodes] = usage ?? [];
  const total = Number(await n.machine.tool("stat", "-f", "-c", "%b", n.target)) *
    Number(await n.machine.tool("stat", "-f", "-c", "%S", n.target));
  assert.deepEqual([bytes?.unit, bytes?.total], [Unit.BYTES, BigInt(total)]);
  assert((bytes?.used ?? 0n) + (bytes?.available ?? 0n) <= BigInt(total) && (bytes?.available ?? 0n) > 0n);
  assert.deepEqual(
    [inodes?.unit, inodes?.total],
    [Unit.INODES, BigInt((await n.machine.tool("stat", "-f", "-c", "%c", n.target)).trim())],
  );
});

nodeTest("NodeGetVolumeStats and NodeExpandVolume at a path without the volume answer NOT_FOUND", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await Deno.mkdir(n.target);

  for (const volumePath of ["some/path", "/no/such/path", n.target, join(n.staging, "lost+found")]) {
    await rejects(n.stats({ volumeId: volumeId(uuid), volumePath }), "NOT_FOUND", /is not there|does not show/);
    await rejects(n.expand({ volumeId: volumeId(uuid), volumePath }), "NOT_FOUND", /is not there|does not show/);
  }
  const absent = n.stats({ volumeId: volumeId(other), volumePath: n.staging });
  await rejects(absent, "NOT_FOUND", /this node has no block device of it/);
});

nodeTest("NodeGetVolumeStats of a file system that hangs ends with its caller's deadline", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const hung = nodeCalls({
    host: { ...n.machine.host, usage: () => new Promise(() => {}) },
    attacher: createDiscoveryClientAttacher({ host: n.machine.host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
  });
  const caller = new AbortController();
  const asked = hung.stats({ volumeId: volumeId(uuid), volumePath: n.staging }, callContext(caller.signal));
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time")), 20);

  await rejects(asked, "DEADLINE_EXCEEDED", /Cannot finish in time/);
});

nodeTest("NodeGetInfo and NodeGetCapabilities answer what the node was started with", async () => {
  await using n = await node();

  assert.deepEqual(await n.info(), { nodeId: "n1.node", maxVolumesPerNode: 0n });
  const answer = await n.handlers.nodeGetCapabilities?.(create(NodeGetCapabilitiesRequestSchema), callContext());
  const types = answer?.capabilities?.map(({ type }) => type?.case === "rpc" ? Rpc[type.value.type ?? 0] : "");
  assert.deepEqual(types, [
    "STAGE_UNSTAGE_VOLUME",
    "GET_VOLUME_STATS",
    "VOLUME_CONDITION",
    "EXPAND_VOLUME",
    "SINGLE_NODE_MULTI_WRITER",
  ]);
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

nodeTest("promise 2: NodeStageVolume takes a dead mount down and mounts the device that is there now", async () => {
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

nodeTest("promise 2: NodeStageVolume refuses to leave a broken mount under a pod in silence", async () => {
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

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume succeed after the device has gone", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await n.machine.hide(n.namespace);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual([await n.machine.mounts(), [...Deno.readDirSync(n.discovery)]], [[], []]);
  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
});

nodeTest("promise 4: NodeUnpublishVolume of a block volume succeeds after the device has gone", async () => {
  await using n = await node();
  await n.stage(n.stageRequest(blockCapability()));
  await n.publish(n.publishRequest(blockCapability()));
  await n.machine.hide(n.namespace);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual(await n.machine.mounts(), []);
});

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume take stacked mounts down", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await n.machine.tool("mount", "--bind", n.staging, n.target);
  await n.machine.tool("mount", "--bind", n.staging, n.staging);

  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);

  assert.deepEqual(await n.machine.mounts(), []);
});

nodeTest("promise 4: NodeUnpublishVolume and NodeUnstageVolume succeed where nothing was ever done", async () => {
  await using n = await node();

  await n.unpublish(n.unpublishRequest);
  await n.unpublish({ ...n.unpublishRequest, targetPath: "/no/such/directory/mount" });
  await Deno.mkdir(n.target);
  await n.unpublish(n.unpublishRequest);
  await n.unstage(n.unstageRequest);
  await Deno.remove(n.staging);
  await n.unstage(n.unstageRequest);

  await assert.rejects(Deno.stat(n.target), Deno.errors.NotFound);
});

nodeTest(
  "promise 4: NodeUnstageVolume of a busy mount answers FAILED_PRECONDITION saying who, and works afterwards",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());
    {
      using _open = await Deno.open(join(n.staging, "held"), { create: true, write: true });

      await rejects(
        n.unstage(n.unstageRequest),
        "FAILED_PRECONDITION",
        new RegExp(`is in use by process ${Deno.pid} \\(\\w+\\) with ".*/held"`),
      );
    }
    await n.unstage(n.unstageRequest);

    assert.deepEqual(await n.machine.mounts(), []);
  },
);

nodeTest(
  "promise 5: NodeUnpublishVolume of a target with files on it answers FAILED_PRECONDITION and keeps them",
  async () => {
    await using n = await node();
    await Deno.mkdir(n.target);
    await Deno.writeTextFile(join(n.target, "precious"), "data");

    await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /it holds "precious", which are left alone/);

    assert.equal(await Deno.readTextFile(join(n.target, "precious")), "data");
  },
);

nodeTest("promise 5: NodeUnpublishVolume leaves the user's files on the volume", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());
  await Deno.mkdir(join(n.target, "a/b"), { recursive: true });

  await n.unpublish(n.unpublishRequest);

  assert((await Deno.stat(join(n.staging, "a/b"))).isDirectory);
});

for (const call of ["unpublish", "unstage"] as const) {
  nodeTest(`promise 5: ${call} leaves a foreign mount alone and names it`, async () => {
    await using n = await node();
    const path = call === "unpublish" ? n.target : n.staging;
    await Deno.mkdir(path, { recursive: true });
    await n.machine.tool("mount", "-t", "tmpfs", "foreign", path);
    await Deno.writeTextFile(join(path, "precious"), "data");

    const done = call === "unpublish" ? n.unpublish(n.unpublishRequest) : n.unstage(n.unstageRequest);

    await rejects(done, "FAILED_PRECONDITION", /tmpfs of foreign .* which is not this volume, .* left as it is/);
    assert.equal(await Deno.readTextFile(join(path, "precious")), "data");
  });
}

nodeTest("promise 5: NodeUnpublishVolume leaves the mount of another volume alone", async () => {
  await using n = await node();
  const stranger = await n.machine.addNamespace(other, 64 * mib);
  await n.machine.tool("mkfs.ext4", "-q", stranger.path);
  await Deno.mkdir(n.target);
  await n.machine.tool("mount", stranger.path, n.target);

  await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /ext4 of .* is mounted at .* not this volume/);

  assert.deepEqual(await n.machine.mounts(), [n.target]);
});

nodeTest("promise 6: NodePublishVolume refuses a staging mount of another device", async () => {
  await using n = await node();
  const stranger = await n.machine.addNamespace(other, 64 * mib);
  await n.machine.tool("mkfs.ext4", "-q", stranger.path);
  await n.machine.tool("mount", stranger.path, n.staging);

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /mounted at the staging path, which is not this volume/,
  );
});

nodeTest("promise 6: NodePublishVolume refuses a target with files of the root disk", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await Deno.mkdir(n.target);
  await Deno.writeTextFile(join(n.target, "precious"), "data");

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /not a mount point but holds files of the node's own disk/,
  );
});

nodeTest(
  "promise 9: a second call for a volume is told which one runs, and calls for other volumes go on",
  async () => {
    const started = Promise.withResolvers<void>();
    const slow = Promise.withResolvers<void>();
    const attach: Attacher = {
      hint: "",
      takesKeys: false,
      async attach(_ctx, namespace) {
        if (namespace.uuid !== uuid) return;
        started.resolve();
        await slow.promise;
      },
      detach: () => Promise.resolve(),
    };
    await using n = await node({ attach });
    await n.machine.addNamespace(other, 64 * mib);
    const first = n.stage(n.stageRequest());
    await started.promise;

    const busy = /Cannot start Node\w+ for volume 0f2c6a5e-\S+: NodeStageVolume has been running for \d+ s/;
    await rejects(n.stage(n.stageRequest()), "ABORTED", busy);
    await rejects(n.unstage(n.unstageRequest), "ABORTED", busy);
    await rejects(n.publish(n.publishRequest()), "ABORTED", busy);
    const staging = join(n.machine.directory, "globalmount2");
    await Deno.mkdir(staging);
    await n.stage({
      ...n.stageRequest(),
      volumeId: volumeId(other),
      stagingTargetPath: staging,
      publishContext: publishContext(other),
    });
    slow.resolve();
    await first;

    assert.deepEqual(await n.machine.mounts(), [staging, n.staging]);
  },
);

nodeTest("promise 14: NodeStageVolume waits for a device that comes late", async () => {
  await using n = await node();
  await n.machine.hide(n.namespace);
  const staged = n.stage(n.stageRequest());
  await new Promise((resolve) => setTimeout(resolve, 50));
  await n.machine.show(n.namespace);

  await staged;

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
});

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  const [smallMib, largeMib] = fsType === "ext4" ? [64, 128] : [320, 512];
  const fits = (bytes: bigint) => bytes > BigInt(largeMib * mib) * 4n / 5n && bytes <= BigInt(largeMib * mib);

  nodeTest(`promise 15: NodeStageVolume grows ${fsType} to a device that is larger than its origin`, async () => {
    await using n = await node({ sizeMib: smallMib });
    await n.stage(n.stageRequest(mountCapability(fsType)));
    await n.unstage(n.unstageRequest);
    await n.machine.grow(n.namespace, largeMib * mib);

    await n.stage(n.stageRequest(mountCapability(fsType)));

    assert(fits((await n.machine.host.usage(n.staging)).totalBytes));
  }, !needs(`mkfs.${fsType}`));

  nodeTest(`promise 16: NodeExpandVolume grows a published ${fsType} and answers the size measured`, async () => {
    await using n = await node({ sizeMib: smallMib });
    await n.stage(n.stageRequest(mountCapability(fsType)));
    await n.publish(n.publishRequest(mountCapability(fsType)));
    await n.machine.grow(n.namespace, largeMib * mib);

    for (let round = 0; round < 2; round++) {
      const answer = await n.expand({ volumeId: volumeId(uuid), volumePath: n.target });
      assert.deepEqual(answer, { capacityBytes: BigInt(largeMib * mib) });
    }

    assert(fits((await n.machine.host.usage(n.target)).totalBytes));
    assert.equal(n.machine.commands.filter((program) => /resize2fs|xfs_growfs|^btrfs/.test(program)).length, 1);
  }, !needs(`mkfs.${fsType}`) || (fsType === "ext4" && !growsMountedExt4));
}

nodeTest(
  "NodeExpandVolume of a mounted ext4 without CAP_SYS_RESOURCE says what is missing, and staging grows it",
  async () => {
    await using n = await node();
    const host = withoutSysResource(n.machine.host);
    const attacher = createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" });
    const limited = nodeCalls({ host, attacher });
    await limited.stage(n.stageRequest());
    await n.machine.grow(n.namespace, 128 * mib);

    const expanded = limited.expand({ volumeId: volumeId(uuid), volumePath: n.staging });
    await rejects(
      expanded,
      "FAILED_PRECONDITION",
      /lacks the capability CAP_SYS_RESOURCE to grow it while it is mounted/,
    );
    await limited.unstage(n.unstageRequest);
    await limited.stage(n.stageRequest());

    assert((await host.usage(n.staging)).totalBytes > 100n * BigInt(mib));
    assert.deepEqual(n.machine.commands.slice(-4), ["blkid", "e2fsck", "resize2fs", "mount"]);
  },
);

nodeTest("NodePublishVolume and NodeUnpublishVolume follow no symbolic link at the target path", async () => {
  await using n = await node();
  const elsewhere = join(n.machine.directory, "elsewhere");
  await Deno.mkdir(elsewhere);
  await n.stage(n.stageRequest());
  await Deno.symlink(elsewhere, n.target);

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /the target path "\S+pod1" is there already and is not a directory/,
  );
  await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /pod1/);

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
  assert.deepEqual([(await Deno.lstat(n.target)).isSymlink, [...Deno.readDirSync(elsewhere)]], [true, []]);
});

for (const when of ["while it is being staged", "after it was staged"] as const) {
  nodeTest(`promise 15: an ext4 whose device grows ${when} has that size without CAP_SYS_RESOURCE too`, async () => {
    await using n = await node();
    let growsBefore: string | undefined;
    const host: Host = {
      ...withoutSysResource(n.machine.host),
      async run(program, args, options) {
        if (program === growsBefore) {
          growsBefore = undefined;
          await n.machine.grow(n.namespace, 128 * mib);
        }
        return await n.machine.host.run(program, args, options);
      },
    };
    const limited = nodeCalls({
      host,
      attacher: createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
    });
    await limited.stage(n.stageRequest());
    if (when === "after it was staged") {
      await n.machine.grow(n.namespace, 128 * mib);
    } else {
      await limited.unstage(n.unstageRequest);
      growsBefore = "mount";
    }

    await limited.stage(n.stageRequest());

    assert((await host.usage(n.staging)).totalBytes > 100n * BigInt(mib));
    assert.deepEqual(n.machine.commands.slice(-5), ["umount", "blkid", "e2fsck", "resize2fs", "mount"]);
    assert.deepEqual(await n.machine.mounts(), [n.staging]);
  });
}

nodeTest("NodeStageVolume of a grown ext4 in use leaves it to its pods without CAP_SYS_RESOURCE", async () => {
  await using n = await node();
  const host = withoutSysResource(n.machine.host);
  const limited = nodeCalls({
    host,
    attacher: createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
  });
  await limited.stage(n.stageRequest());
  await limited.publish(n.publishRequest());
  await n.machine.grow(n.namespace, 128 * mib);

  await limited.stage(n.stageRequest());

  assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
  assert((await host.usage(n.staging)).totalBytes < 65n * BigInt(mib));
});

nodeTest("promise 16: NodeExpandVolume of a block volume answers the size of the device", async () => {
  await using n = await node();
  await n.stage(n.stageRequest(blockCapability()));
  await n.publish(n.publishRequest(blockCapability()));
  await n.machine.grow(n.namespace, 128 * mib);
  const request = {
    volumeId: volumeId(uuid),
    volumePath: n.target,
    capacityRange: { requiredBytes: 128n * BigInt(mib) },
  };

  assert.deepEqual(await n.expand(request), { capacityBytes: 128n * BigInt(mib) });
});

nodeTest("promise 16: NodeExpandVolume does not succeed while the kernel shows the old size", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const caller = new AbortController();
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 100);

  const expanded = n.expand({
    volumeId: volumeId(uuid),
    volumePath: n.staging,
    capacityRange: { requiredBytes: 128n * BigInt(mib) },
  }, callContext(caller.signal));

  await rejects(expanded, "UNAVAILABLE", /still has 67108864 bytes, 134217728 are wanted/);
});

/** The machine as a container sees it that may not grow a mounted ext4. */
function withoutSysResource(host: Host): Host {
  return {
    ...host,
    readText: (path) =>
      path === "/proc/self/status" ? Promise.resolve("CapEff:\t000001fffeffffff\n") : host.readText(path),
  };
}

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

async function sha256(path: string): Promise<string> {
  const { code, stdout } = await new Deno.Command("sha256sum", { args: [path] }).output();
  assert.equal(code, 0);
  return new TextDecoder().decode(stdout).slice(0, 64);
}

async function mountsAtPath(path: string) {
  return parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).filter((mount) => mount.path === path);
}

/** NodePublishVolume of inline volumes on a simulated cluster, and their lives as a whole. */
import { create } from "@bufbuild/protobuf";
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import {
  NodeGetVolumeHealthRequestSchema,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../../proto/gen/csi_pb.ts";
import {
  assertNothingLeft,
  exists,
  inlineId,
  inlineNode,
  inlineRequest,
  inlineTest,
  podUid,
} from "../../support/inline_node.ts";
import { mountCapability, nodeCalls, rejects } from "../../support/node_calls.ts";
import { eventually } from "../../support/simulator.ts";

const gib = 1n << 30n;

for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
  inlineTest(`an inline volume (${fsType}) is made, written, measured and removed, each call twice`, async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    const request = { ...inlineRequest(targetPath), volumeCapability: mountCapability(fsType) };

    await n.publish(request);
    await Deno.writeTextFile(join(targetPath, "kept"), "data");
    await n.publish(request);
    const [mount, ...more] = await n.mounts();
    const { usage, volumeCondition } = await n.stats({ volumeId: inlineId(), volumePath: targetPath });
    const [volume] = n.sim.control.cluster.volumes;
    const text = await Deno.readTextFile(join(targetPath, "kept"));
    await n.unpublish({ volumeId: inlineId(), targetPath });
    const isThere = await exists(targetPath);
    await n.unpublish({ volumeId: inlineId(), targetPath });

    assert.equal(text, "data");
    assert.deepEqual([mount?.path, mount?.fsType, more], [targetPath, fsType, []]);
    assert(mount?.options.includes("rw"));
    assert(Number(usage?.[0]?.total) > Number(gib) / 2);
    assert.equal(volumeCondition?.abnormal, false);
    assert.equal(volume?.name, inlineId());
    assert.equal(volume.sizeBytes, gib);
    const labels = Object.fromEntries(volume.labels.map(({ key, value }) => [key, value]));
    const { target = "", ...rest } = labels;
    assert.deepEqual(rest, {
      madeby: "lbcsi",
      ephemeral: inlineId(),
      node: "n1.node",
      pod: "pod1",
      namespace: "team-a",
      poduid: podUid(),
    });
    assert.equal(Buffer.from(target, "base64url").toString(), targetPath);
    assert.equal(isThere, false);
    await assertNothingLeft(n);
  }, `mkfs.${fsType}`);
}

inlineTest("a read-only inline volume has a file system and takes no writes, also when published again", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  const request = { ...inlineRequest(targetPath), readonly: true };

  await n.publish(request);
  await n.publish(request);

  const [mount] = await n.mounts();
  assert(mount?.options.includes("ro"));
  assert.deepEqual([...Deno.readDirSync(targetPath)].map(({ name }) => name), ["lost+found"]);
  await assert.rejects(Deno.writeTextFile(join(targetPath, "x"), ""), /Read-only file system/);
  await rejects(n.publish({ ...request, readonly: false }), "ALREADY_EXISTS", /read-only instead of writable/);
  await n.unpublish({ volumeId: inlineId(), targetPath });
  await assertNothingLeft(n);
});

inlineTest("an inline volume with a final error leaves no directory, and one that may succeed later does", async () => {
  await using n = await inlineNode({ data: "none" });
  const targetPath = await n.target();

  await rejects(n.publish(inlineRequest(targetPath, { size: "3Gi" })), "OUT_OF_RANGE", /allows 2147483648$/);
  const afterRefusal = await exists(targetPath);
  n.sim.control.fail({ rpc: "CreateVolume", code: "RESOURCE_EXHAUSTED" });
  await rejects(n.publish(inlineRequest(targetPath)), "RESOURCE_EXHAUSTED", /told to fail/);

  assert.equal(afterRefusal, false);
  assert.equal(await exists(targetPath), true);
});

inlineTest("two inline volumes of one node are made and removed at once without mixing them up", async () => {
  await using n = await inlineNode();
  const targets = await Promise.all([1, 2].map((number) => n.target(number)));
  const numbered = targets.map((target, at) => [target, at + 1] as const);

  await Promise.all(numbered.map(([target, number]) => n.publish(inlineRequest(target, { size: "1Gi" }, number))));
  for (const [target, number] of numbered) await Deno.writeTextFile(join(target, `file${number}`), "");
  const [first = "", second = ""] = targets;
  await n.unpublish({ volumeId: inlineId(1), targetPath: first });
  const left = [...Deno.readDirSync(second)].map(({ name }) => name).sort();
  await n.unpublish({ volumeId: inlineId(2), targetPath: second });

  assert.deepEqual(left, ["file2", "lost+found"]);
  await assertNothingLeft(n);
});

inlineTest(
  "promise 9: a second call for an inline volume fails naming the one that runs, and the repeat succeeds",
  async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    n.sim.control.fail({ rpc: "CreateVolume", hold: true, when: "after" });

    const published = n.publish(inlineRequest(targetPath));
    await eventually("the creation waits", () => n.sim.control.held().length > 0);
    await rejects(n.publish(inlineRequest(targetPath)), "ABORTED", /NodePublishVolume has been running/);
    await rejects(n.unpublish({ volumeId: inlineId(), targetPath }), "ABORTED", /NodePublishVolume has been running/);
    n.sim.control.releaseHeld();
    await published;
    await n.unpublish({ volumeId: inlineId(), targetPath });

    await assertNothingLeft(n);
  },
);

inlineTest("an inline volume is published at one target only", async () => {
  await using n = await inlineNode();
  await n.publish(inlineRequest(await n.target()));

  await rejects(n.publish(inlineRequest(await n.target(2))), "UNAVAILABLE", /it is published at ".*", and an inline/);

  assert.equal((await n.mounts()).length, 1);
});

inlineTest("the health of an inline volume is found by its path", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const { handlers } = nodeCalls({ host: n.host, attacher: n.attacher, volumeHealth: true });
  const health = async () =>
    await handlers.nodeGetVolumeHealth?.(
      create(NodeGetVolumeHealthRequestSchema, { volumeId: inlineId(), volumePublishPath: targetPath }),
      n.call(),
    );

  const well = await health();
  const [volume] = n.sim.control.cluster.volumes;
  const ref = { project: "default", uuid: volume?.uuid ?? "" };
  await n.sim.control.cluster.updateVolume(ref, { acl: [] }, undefined);
  await eventually("the device goes", () => n.sim.control.machine().devices.length === 0);
  const ill = await health();

  assert.doesNotMatch(JSON.stringify(well), /INACCESSIBLE|DeviceGone/);
  assert.match(JSON.stringify(ill), /DeviceGone/);
});

inlineTest("a node without a cluster file makes no inline volumes, and says what it leaves of one", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const [volume] = n.sim.control.cluster.volumes;
  // The same node, started without --config.
  const without = nodeCalls({ host: n.host, attacher: n.attacher });
  const other = await n.target(2);

  await rejects(
    without.publish(inlineRequest(other, {}, 2)),
    "FAILED_PRECONDITION",
    /knows no cluster for them, start it with --config and a cluster file that has the key ephemeral/,
  );
  await without.unpublish({ volumeId: inlineId(2), targetPath: other });
  await rejects(
    without.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    new RegExp(
      `namespace ${volume?.uuid} of nqn\\S+ is unmounted, and left on the cluster and attached; this node knows`,
    ),
  );
  const mounted = await n.mounts();
  await rejects(
    without.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    /a volume may be left on the cluster; this node knows no cluster/,
  );
  await n.unpublish({ volumeId: inlineId(), targetPath });

  assert.deepEqual(mounted, []);
  await assertNothingLeft(n);
});

inlineTest("stage, unstage and expand of an inline volume are errors", async () => {
  await using n = await inlineNode({ data: "none" });
  const volumeId = inlineId();
  const volumeCapability = mountCapability();
  const message = /it is an inline volume of a pod, which is published and unpublished and nothing else/;

  await rejects(n.stage({ volumeId, stagingTargetPath: "/staging", volumeCapability }), "INVALID_ARGUMENT", message);
  await rejects(n.unstage({ volumeId, stagingTargetPath: "/staging" }), "INVALID_ARGUMENT", message);
  await rejects(n.expand({ volumeId, volumePath: "/target" }), "INVALID_ARGUMENT", message);
  await rejects(n.stats({ volumeId, volumePath: n.directory }), "NOT_FOUND", /this node has no block device of it/);
});

inlineTest("publish of an inline volume rejects requests that no inline volume can have", async () => {
  await using n = await inlineNode({ data: "none" });
  const targetPath = await n.target();
  const request = inlineRequest(targetPath);
  const { "csi.storage.k8s.io/ephemeral": _, ...unsaid } = request.volumeContext;

  await rejects(n.publish({ ...request, targetPath: "" }), "INVALID_ARGUMENT", /target_path is missing/);
  await rejects(n.publish({ ...request, targetPath: "pods/x" }), "INVALID_ARGUMENT", /not a plain absolute path/);
  await rejects(
    n.publish({ volumeId: request.volumeId, targetPath }),
    "INVALID_ARGUMENT",
    /volume_capability is missing/,
  );
  await rejects(
    n.publish({ ...request, volumeCapability: mountCapability("ext4", Mode.MULTI_NODE_READER_ONLY) }),
    "INVALID_ARGUMENT",
    /its access mode is for several nodes, an inline volume is a file system for one pod/,
  );
  await rejects(
    n.publish({
      ...request,
      volumeCapability: {
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
        accessType: { case: "block" as const, value: {} },
      },
    }),
    "INVALID_ARGUMENT",
    /volume_capability is block/,
  );
  await rejects(n.publish({ ...request, volumeContext: unsaid }), "FAILED_PRECONDITION", /podInfoOnMount: true/);
  await rejects(n.publish({ ...request, targetPath: "/nowhere/mount" }), "FAILED_PRECONDITION", /is missing/);
  await rejects(
    n.publish(inlineRequest(targetPath, { "size": "1Gi", "mkfs-options": "-F" })),
    "INVALID_ARGUMENT",
    /-F/,
  );
  assert.equal(n.sim.control.callsInAll(), 0);
  assert.deepEqual([...Deno.readDirSync(dirname(targetPath))], []);
});

inlineTest("publish and unpublish of one inline volume that race leave nothing after the last unpublish", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  const unpublish = () => n.unpublish({ volumeId: inlineId(), targetPath });
  const codes = new Set<string>();

  for (let round = 0; round < 5; round++) {
    const racing = await Promise.allSettled([
      n.publish(inlineRequest(targetPath)),
      unpublish(),
      n.publish(inlineRequest(targetPath)),
      unpublish(),
    ]);
    for (const outcome of racing) {
      codes.add(outcome.status === "rejected" ? String(outcome.reason.code) : "OK");
    }
    await unpublish();
    await assertNothingLeft(n);
  }

  assert.deepEqual([...codes].sort(), ["ABORTED", "OK"]);
});

/** Snapshots through the controller service, over real sockets, against a simulated cluster. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { Controller } from "../../../proto/gen/csi_pb.ts";
import { answers } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";
import { eventually } from "../../support/simulator.ts";
import { absentAt, fromSnapshot, startSnapshots, uuidOf } from "../../support/snapshots.ts";

const { deleteVolume, createSnapshot, deleteSnapshot, getSnapshot } = Controller.method;

Deno.test("a snapshot's life, every call twice", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v", { capacityRange: { requiredBytes: 3n * gib } });
  const before = Date.now();

  const first = await env.snapshot("s", sourceVolumeId);
  const again = await env.snapshot("s", sourceVolumeId);

  deepStrictEqual(again, first);
  strictEqual(first.sizeBytes, 3n * gib);
  strictEqual(first.readyToUse, true);
  ok(first.creationTime);
  const created = timestampDate(first.creationTime).getTime();
  ok(created >= before && created <= Date.now(), `created at ${created}`);
  const [made] = env.cluster.snapshots;
  strictEqual(uuidOf(first.snapshotId), made?.uuid);
  deepStrictEqual({ ...parseVolumeId(first.snapshotId), uuid: "" }, { ...parseVolumeId(sourceVolumeId), uuid: "" });
  const { snapshotId } = first;
  deepStrictEqual((await env.call(getSnapshot, { snapshotId })).snapshot, first);
  for (let i = 0; i < 2; i++) await env.call(deleteSnapshot, { snapshotId });
  deepStrictEqual(env.kept(), []);
  await rejects(env.call(getSnapshot, { snapshotId }), answers("NOT_FOUND", /Cannot read snapshot/));
});

Deno.test("CreateSnapshot accepts accessibility_requirements that ask for nothing, and rejects those that name a segment", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  const request = { name: "s", sourceVolumeId, secrets: { jwt: env.simulator.addresses.jwt } };

  await rejects(
    env.call(createSnapshot, { ...request, accessibilityRequirements: { requisite: [{ segments: { zone: "a" } }] } }),
    answers("INVALID_ARGUMENT", /^Cannot create snapshot "s": accessibility_requirements asks for "zone" "a", but /),
  );
  deepStrictEqual(env.kept(), []);
  for (const accessibilityRequirements of [{}, { requisite: [{ segments: {} }], preferred: [{}] }]) {
    const { snapshot } = await env.call(createSnapshot, { ...request, accessibilityRequirements });
    deepStrictEqual(snapshot?.accessibleTopology, []);
  }
});

Deno.test("CreateSnapshot repeats the text of source_volume_id, whatever its form", async () => {
  await using env = await startSnapshots();
  const uuid = uuidOf(await env.volume("v"));
  const text = `mgmt:${
    env.simulator.addresses.grpc.toReversed().join(",")
  }|nguid:${uuid.toUpperCase()}|proj:default|scheme:grpc`;

  const snapshot = await env.snapshot("s", text);

  strictEqual(snapshot.sourceVolumeId, text);
});

for (
  const [what, request, message] of [
    ["no name", { name: "" }, /name is missing/],
    ["no source", { sourceVolumeId: "" }, /source_volume_id is missing/],
    ["a name of 129 bytes", { name: "n".repeat(129) }, /name has 129 bytes, 128 are allowed/],
    ["control characters in the name", { name: "a\x07b" }, /control characters/],
    ["an unknown parameter", { parameters: { colour: "red" } }, /parameter "colour" is unknown/],
  ] as const
) {
  Deno.test(`CreateSnapshot with ${what} answers INVALID_ARGUMENT`, async () => {
    await using env = await startSnapshots();

    const call = env.call(createSnapshot, { name: "s", sourceVolumeId: absentAt(env), ...request });

    await rejects(call, answers("INVALID_ARGUMENT", message));
    strictEqual(env.control.callsInAll(), 0);
  });
}

for (const [what, id] of [["that is not ours", () => "fake-vol-id"], ["that is absent", absentAt]] as const) {
  Deno.test(`CreateSnapshot of a volume ${what} answers NOT_FOUND`, async () => {
    await using env = await startSnapshots();

    await rejects(env.snapshot("s", id(env)), answers("NOT_FOUND", /Cannot (find volume|create snapshot "s")/));
  });
}

Deno.test("CreateSnapshot of a volume that is being deleted answers NOT_FOUND", async () => {
  await using env = await startSnapshots({ deletionMs: 60_000 });
  const sourceVolumeId = await env.volume("v");
  await env.call(deleteVolume, { volumeId: sourceVolumeId });

  await rejects(env.snapshot("s", sourceVolumeId), answers("NOT_FOUND", /shows the volume as Deleting/));
});

Deno.test("CreateSnapshot answers ALREADY_EXISTS for a name that a snapshot of another volume has", async () => {
  await using env = await startSnapshots();
  const [a, b] = [await env.volume("a"), await env.volume("b")];
  await env.snapshot("s", a);

  await rejects(
    env.snapshot("s", b),
    answers("ALREADY_EXISTS", new RegExp(`source is volume ${uuidOf(a)}, asked is volume ${uuidOf(b)}`)),
  );
});

Deno.test("CreateSnapshot answers when the snapshot is Available, and GetSnapshot says before that it is not ready", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.behave({ holdCreations: true });
  const taking = env.snapshot("s", sourceVolumeId);
  const uuid = await eventually("the snapshot is begun", () => env.cluster.snapshots[0]?.uuid);
  const snapshotId = sourceVolumeId.replace(uuidOf(sourceVolumeId), uuid);

  const early = await env.call(getSnapshot, { snapshotId });
  env.control.releaseCreations();
  const taken = await taking;

  strictEqual(early.snapshot?.readyToUse, false);
  deepStrictEqual(taken, { ...early.snapshot, readyToUse: true });
});

Deno.test("CreateSnapshot that runs out of time says what it waited for, and its repeat answers the same snapshot", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.behave({ holdCreations: true });

  await rejects(
    env.call(createSnapshot, { name: "s", sourceVolumeId }, 1000),
    answers("DEADLINE_EXCEEDED", /in time: LightOS shows snapshot \S+ as Creating/),
  );
  env.control.releaseCreations();
  const snapshot = await env.snapshot("s", sourceVolumeId);

  deepStrictEqual(env.cluster.snapshots.map(({ uuid }) => uuid), [uuidOf(snapshot.snapshotId)]);
});

Deno.test("promise 18: CreateSnapshot ignores the husk of a failed one", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.behave({ failCreations: 1 });
  await rejects(
    env.snapshot("s", sourceVolumeId),
    answers("UNAVAILABLE", /is Failed\), the next attempt makes another/),
  );

  const snapshot = await env.snapshot("s", sourceVolumeId);

  strictEqual(snapshot.readyToUse, true);
  deepStrictEqual(env.cluster.snapshots.map(({ state }) => state).sort(), ["Available", "Failed"]);
});

Deno.test("CreateSnapshot answers ABORTED while a namesake is being deleted, and makes no husk", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  const { snapshotId } = await env.snapshot("s", sourceVolumeId);
  env.control.behave({ deletionMs: 60_000 });
  await env.call(deleteSnapshot, { snapshotId });

  await rejects(env.snapshot("s", sourceVolumeId), answers("ABORTED", /of that name is being deleted/));

  deepStrictEqual(env.cluster.snapshots.map(({ state }) => state), ["Deleting"]);
});

Deno.test("CreateSnapshot waits for a source that is Updating", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.setVolume(uuidOf(sourceVolumeId), { state: "Updating" });

  const taking = env.snapshot("s", sourceVolumeId);
  await eventually("LightOS has failed the call once", () => (env.control.calls()["CreateSnapshot"]?.total ?? 0) > 0);
  env.control.setVolume(uuidOf(sourceVolumeId), { state: "Available" });

  strictEqual((await taking).readyToUse, true);
});

Deno.test("CreateSnapshot passes on an error of LightOS that persists", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.fail({ rpc: "CreateSnapshot", code: "FAILED_PRECONDITION", message: "too many snapshots", count: 0 });

  await rejects(env.snapshot("s", sourceVolumeId), answers("FAILED_PRECONDITION", /too many snapshots/));
});

for (const when of ["before", "after"] as const) {
  Deno.test(`promise 8: CreateSnapshot whose connection is lost ${when} each of its calls leaves one snapshot`, async () => {
    await using env = await startSnapshots();
    const sourceVolumeId = await env.volume("v");

    for (let skip = 0; skip < 3; skip++) {
      env.control.fail({ rpc: "*", drop: true, when, skip });
      const { snapshotId } = await env.snapshot(`s${skip}`, sourceVolumeId);
      env.control.clearFaults();
      deepStrictEqual(env.kept(), [`s${skip}`]);
      await env.call(deleteSnapshot, { snapshotId });
    }
  });
}

Deno.test("promise 9: two CreateSnapshot calls at once for one name take one snapshot", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.behave({ holdCreations: true });
  const first = env.snapshot("s", sourceVolumeId);
  await eventually("the first has begun", () => env.cluster.snapshots.length === 1);

  await rejects(env.snapshot("s", sourceVolumeId), answers("ABORTED", /CreateSnapshot has been running for \d+ s/));
  env.control.releaseCreations();

  strictEqual((await first).readyToUse, true);
  strictEqual(env.cluster.snapshots.length, 1);
});

Deno.test("a snapshot's description says who took it and for whom", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  const prefix = "csi.storage.k8s.io/";

  await env.call(createSnapshot, {
    name: "s",
    sourceVolumeId,
    parameters: {
      [`${prefix}volumesnapshot/name`]: "nightly",
      [`${prefix}volumesnapshot/namespace`]: "shop",
      [`${prefix}volumesnapshotcontent/name`]: "snapcontent-1",
    },
  });

  strictEqual(
    env.cluster.snapshots[0]?.description,
    "made by lbcsi volumesnapshot=nightly namespace=shop content=snapcontent-1",
  );
});

Deno.test("the log line of a snapshot call names the snapshot by its UUID", async () => {
  await using env = await startSnapshots();
  const { snapshotId } = await env.snapshot("s", await env.volume("v"));

  await env.call(deleteSnapshot, { snapshotId });

  const line = env.lines.find((line) => line.includes('"rpc":"DeleteSnapshot"') && line.includes('"ms"'));
  match(line ?? "", new RegExp(`"snapshot":"${uuidOf(snapshotId)}"`));
});

for (const [what, id] of [["that is not ours", () => "reallyfakesnapshotid"], ["that is absent", absentAt]] as const) {
  Deno.test(`DeleteSnapshot of a snapshot ${what} succeeds, GetSnapshot answers NOT_FOUND`, async () => {
    await using env = await startSnapshots();
    const snapshotId = id(env);

    deepStrictEqual((await env.call(deleteSnapshot, { snapshotId })).$typeName, "csi.v1.DeleteSnapshotResponse");
    await rejects(env.call(getSnapshot, { snapshotId }), answers("NOT_FOUND", /Cannot (find|read) snapshot/));
  });
}

for (const method of [deleteSnapshot, getSnapshot]) {
  Deno.test(`${method.name} without snapshot_id answers INVALID_ARGUMENT`, async () => {
    await using env = await startSnapshots();

    await rejects(
      env.call(method as typeof getSnapshot, {}),
      answers("INVALID_ARGUMENT", /snapshot_id is missing/),
    );
  });
}

Deno.test("DeleteSnapshot waits for a snapshot that is Creating", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  const source = uuidOf(sourceVolumeId);
  env.control.behave({ holdCreations: true });
  const { uuid } = await env.cluster.createSnapshot({
    project: "default",
    name: "s",
    description: "",
    source: { uuid: source, name: "" },
    retentionMs: undefined,
  });

  const deleting = env.call(deleteSnapshot, { snapshotId: sourceVolumeId.replace(source, uuid) });
  await eventually("the snapshot is looked at", () => (env.control.calls()["GetSnapshot"]?.total ?? 0) > 0);
  env.control.releaseCreations();
  await deleting;

  deepStrictEqual(env.kept(), []);
});

for (const when of ["before", "after"] as const) {
  Deno.test(`DeleteSnapshot whose connection is lost ${when} the deletion succeeds all the same`, async () => {
    await using env = await startSnapshots();
    const { snapshotId } = await env.snapshot("s", await env.volume("v"));
    env.control.fail({ rpc: "DeleteSnapshot", drop: true, when });

    await env.call(deleteSnapshot, { snapshotId });

    deepStrictEqual(env.kept(), []);
  });
}

for (const snapshotWaitsForClones of [false, true]) {
  Deno.test(
    `DeleteSnapshot succeeds while a volume made from it lives, which it ${
      snapshotWaitsForClones ? "waits for" : "does not wait for"
    }`,
    async () => {
      await using env = await startSnapshots({ snapshotWaitsForClones });
      const { snapshotId } = await env.snapshot("s", await env.volume("v"));
      const restored = await env.volume("r", { volumeContentSource: fromSnapshot(snapshotId) });

      for (let i = 0; i < 2; i++) await env.call(deleteSnapshot, { snapshotId });

      deepStrictEqual(env.kept(), []);
      strictEqual(env.found(restored).state, "Available");
    },
  );
}

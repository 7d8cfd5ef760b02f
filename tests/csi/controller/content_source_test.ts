/** Restores and clones: CreateVolume with a content source, over real sockets, against a simulated cluster. */
import { deepStrictEqual, match, notStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { Controller, type VolumeContentSourceSchema } from "../../../proto/gen/csi_pb.ts";
import { answers, type Creation } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";
import { eventually } from "../../support/simulator.ts";
import {
  absentAt,
  fromSnapshot,
  fromVolume,
  makeSources,
  type Sources,
  startSnapshots,
  uuidOf,
} from "../../support/snapshots.ts";

type Source = MessageInitShape<typeof VolumeContentSourceSchema>;
const { deleteVolume, deleteSnapshot } = Controller.method;

for (
  const [kind, sourceOf] of [
    ["a snapshot", ({ snapshotId }: Sources) => fromSnapshot(snapshotId)],
    ["a volume", ({ volumeId }: Sources) => fromVolume(volumeId)],
  ] as const
) {
  Deno.test(`CreateVolume from ${kind} twice makes one volume, names its source, and leaves no helper`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));

    const first = await env.create("copy", { volumeContentSource, capacityRange: { requiredBytes: 2n * gib } });
    const again = await env.create("copy", { volumeContentSource, capacityRange: { requiredBytes: 2n * gib } });

    deepStrictEqual(again, first);
    deepStrictEqual(first.contentSource?.type.case, volumeContentSource.type?.case);
    deepStrictEqual(first.contentSource?.type.value, {
      ...first.contentSource?.type.value,
      ...volumeContentSource.type?.value,
    });
    strictEqual(first.capacityBytes, 2n * gib);
    strictEqual(env.cluster.volumes.length, 2);
    ok(env.found(first.volumeId).sourceSnapshotUuid);
    deepStrictEqual(env.kept(), ["origin-snapshot"]);
  });

  for (
    const [what, capacityRange, expected] of [
      ["no size", undefined, 2n * gib],
      ["a limit alone", { limitBytes: 5n * gib }, 2n * gib],
      ["what its source was asked for with, before it was rounded up", { requiredBytes: gib + 1n }, 2n * gib],
      ["a larger size", { requiredBytes: 4n * gib }, 4n * gib],
      ["a larger size to round up", { requiredBytes: 2n * gib + 1n }, 3n * gib],
    ] as const
  ) {
    Deno.test(`promise 15: CreateVolume from ${kind} with ${what} makes ${expected} bytes of 2 GiB`, async () => {
      await using env = await startSnapshots();
      const volumeContentSource = sourceOf(await makeSources(env));
      const request = { volumeContentSource, ...(capacityRange === undefined ? {} : { capacityRange }) };

      const volume = await env.create("copy", { capacityRange: {}, ...request });
      const again = await env.create("copy", { capacityRange: {}, ...request });

      strictEqual(volume.capacityBytes, expected);
      strictEqual(env.found(volume.volumeId).sizeBytes, expected);
      deepStrictEqual(again, volume);
    });
  }

  for (
    const [what, capacityRange, code, message] of [
      ["a smaller size", { requiredBytes: gib }, "OUT_OF_RANGE", /source has 2147483648 bytes, required_bytes/],
      ["a smaller limit", { limitBytes: gib }, "OUT_OF_RANGE", /source has 2147483648 bytes, limit_bytes/],
      [
        "a limit that rounding passes",
        { requiredBytes: 2n * gib + 1n, limitBytes: 2n * gib + 2n },
        "OUT_OF_RANGE",
        /whole GiB/,
      ],
      ["a negative size", { requiredBytes: -1n }, "INVALID_ARGUMENT", /negative/],
    ] as const
  ) {
    Deno.test(`CreateVolume from ${kind} with ${what} answers ${code} and leaves nothing`, async () => {
      await using env = await startSnapshots();
      const volumeContentSource = sourceOf(await makeSources(env));

      await rejects(env.create("copy", { volumeContentSource, capacityRange }), answers(code, message));

      strictEqual(env.cluster.volumes.length, 1);
      deepStrictEqual(env.kept(), ["origin-snapshot"]);
    });
  }

  Deno.test(`CreateVolume from ${kind} answers RESOURCE_EXHAUSTED on a full cluster and leaves nothing`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));

    await rejects(
      env.create("copy", { volumeContentSource, capacityRange: { requiredBytes: 1n << 50n } }),
      answers("RESOURCE_EXHAUSTED", /are free/),
    );

    deepStrictEqual(env.kept(), ["origin-snapshot"]);
  });

  Deno.test(`CreateVolume from ${kind} of another project answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await startSnapshots();
    env.control.addProject("other");
    const volumeContentSource = sourceOf(await makeSources(env));

    await rejects(
      env.create("copy", { volumeContentSource, parameters: env.parameters({ "project-name": "other" }) }),
      answers("INVALID_ARGUMENT", /is in project "default", StorageClass parameter "project-name" is "other"/),
    );
  });

  Deno.test(`CreateVolume from ${kind} of another scheme answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));

    await rejects(
      env.create("copy", { volumeContentSource, parameters: env.parameters({ "mgmt-scheme": "grpcs" }) }),
      answers("INVALID_ARGUMENT", /is reached over grpc, StorageClass parameter "mgmt-scheme" is "grpcs"/),
    );
  });

  Deno.test(`CreateVolume from ${kind} of another cluster answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await startSnapshots();
    await using other = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(other));
    const jwt = env.simulator.addresses.jwt;

    await rejects(
      env.create("copy", { volumeContentSource, secrets: { jwt } }),
      answers("INVALID_ARGUMENT", /is at 127\.0\.0\.1:\d+\S* and not on the cluster of StorageClass parameter/),
    );
    strictEqual(env.cluster.volumes.length, 0);
  });

  Deno.test(`CreateVolume from ${kind} encrypted on the host is encrypted too, and anything else is an error`, async () => {
    await using env = await startSnapshots();
    const { volumeId, snapshotId } = await makeSources(env);
    const encrypted = { volumeId: `${volumeId}|hostcrypto:luks2`, snapshotId: `${snapshotId}|hostcrypto:luks2` };
    const parameters = env.parameters({ "host-encryption": "enabled" });

    await rejects(
      env.create("copy", { volumeContentSource: sourceOf(encrypted) }),
      answers("INVALID_ARGUMENT", /is encrypted on the host, StorageClass parameter "host-encryption" is disabled/),
    );
    await rejects(
      env.create("copy", { volumeContentSource: sourceOf({ volumeId, snapshotId }), parameters }),
      answers("INVALID_ARGUMENT", /is not encrypted on the host, StorageClass parameter "host-encryption" is enabled/),
    );
    const made = await env.create("copy", {
      volumeContentSource: sourceOf(encrypted),
      parameters,
      capacityRange: { requiredBytes: 2n * gib },
    });
    match(made.volumeId, /\|hostcrypto:luks2$/);
  });

  Deno.test(`CreateVolume from ${kind} that is absent answers NOT_FOUND`, async () => {
    await using env = await startSnapshots();
    const absent = sourceOf({ volumeId: absentAt(env), snapshotId: absentAt(env) });
    const foreign = sourceOf({ volumeId: "non-existing-id", snapshotId: "non-existing-id" });

    await rejects(
      env.create("copy", { volumeContentSource: absent }),
      answers("NOT_FOUND", /Cannot create volume "copy"/),
    );
    await rejects(env.create("copy", { volumeContentSource: foreign }), answers("NOT_FOUND", /non-existing-id/));
    strictEqual(env.cluster.volumes.length, 0);
  });

  Deno.test(`CreateVolume from ${kind} answers what it made even after the source has gone for good`, async () => {
    await using env = await startSnapshots({ snapshotWaitsForClones: false });
    const { volumeId, snapshotId } = await makeSources(env);
    const request = {
      volumeContentSource: sourceOf({ volumeId, snapshotId }),
      capacityRange: { requiredBytes: 2n * gib },
    };
    const made = await env.create("copy", request);
    await env.call(deleteSnapshot, { snapshotId });
    await env.call(deleteVolume, { volumeId });
    await eventually(
      "the source has gone",
      () => env.cluster.snapshots.length === 0 && env.cluster.volumes.length === 1,
    );

    deepStrictEqual(await env.create("copy", request), made);
  });

  Deno.test(`CreateVolume from ${kind} answers what it made while the deleted source waits for it`, async () => {
    await using env = await startSnapshots();
    const { volumeId, snapshotId } = await makeSources(env);
    const request = {
      volumeContentSource: sourceOf({ volumeId, snapshotId }),
      capacityRange: { requiredBytes: 2n * gib },
    };
    const made = await env.create("copy", request);
    await env.call(deleteSnapshot, { snapshotId });
    await env.call(deleteVolume, { volumeId });
    await eventually("the source volume has gone", () => env.cluster.volumes.length === 1);

    deepStrictEqual(await env.create("copy", request), made);
    deepStrictEqual(env.kept(), []);
  });

  Deno.test(`CreateVolume from ${kind} without a project in the StorageClass makes it in the source's project`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));
    const { "project-name": _, ...parameters } = env.parameters();

    const copy = await env.volume("copy", { volumeContentSource, parameters, capacityRange: {} });

    strictEqual(parseVolumeId(copy).project, "default");
  });

  Deno.test(`CreateVolume from ${kind} lets LightOS decide on another replica count`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));

    const copy = await env.volume("copy", {
      volumeContentSource,
      parameters: env.parameters({ "replica-count": "2" }),
      capacityRange: {},
    });

    strictEqual(env.found(copy).replicaCount, 2);
  });

  Deno.test(`CreateVolume from ${kind} that LightOS made otherwise than asked is INVALID_ARGUMENT and leaves nothing`, async () => {
    await using env = await startSnapshots();
    const volumeContentSource = sourceOf(await makeSources(env));
    const make = env.cluster.createVolume.bind(env.cluster);
    env.cluster.createVolume = (request) => make({ ...request, replicaCount: 1 });

    await rejects(
      env.create("copy", {
        volumeContentSource,
        parameters: env.parameters({ "replica-count": "2" }),
        capacityRange: {},
      }),
      answers(
        "INVALID_ARGUMENT",
        /in another way than asked: replica-count is 1, asked is 2; a StorageClass that fits/,
      ),
    );

    deepStrictEqual(env.cluster.volumes.filter(({ state }) => state !== "Deleting").map(({ name }) => name), [
      "origin",
    ]);
    deepStrictEqual(env.kept(), ["origin-snapshot"]);
  });
}

Deno.test("CreateVolume from a snapshot that is Creating answers UNAVAILABLE", async () => {
  await using env = await startSnapshots();
  const sourceVolumeId = await env.volume("v");
  env.control.behave({ holdCreations: true });
  const taking = env.snapshot("s", sourceVolumeId).catch(() => {});
  const uuid = await eventually("the snapshot is begun", () => env.cluster.snapshots[0]?.uuid);

  const snapshotId = sourceVolumeId.replace(uuidOf(sourceVolumeId), uuid);
  await rejects(
    env.create("copy", { volumeContentSource: fromSnapshot(snapshotId) }),
    answers("UNAVAILABLE", /as Creating, it is not ready yet/),
  );
  env.control.releaseCreations();
  await taking;
});

Deno.test("CreateVolume from a snapshot that is being deleted answers NOT_FOUND", async () => {
  await using env = await startSnapshots({ deletionMs: 60_000 });
  const { snapshotId } = await makeSources(env);
  await env.call(deleteSnapshot, { snapshotId });

  await rejects(
    env.create("copy", { volumeContentSource: fromSnapshot(snapshotId), capacityRange: {} }),
    answers("NOT_FOUND", /LightOS shows snapshot \S+ as Deleting/),
  );
});

Deno.test("CreateVolume answers ALREADY_EXISTS for a name whose volume has another content source, and says both", async () => {
  await using env = await startSnapshots();
  const { volumeId, snapshotId } = await makeSources(env);
  const { snapshotId: other } = await env.snapshot("other-snapshot", volumeId);
  const requests = {
    none: undefined,
    [`snapshot ${uuidOf(snapshotId)}`]: fromSnapshot(snapshotId),
    [`snapshot ${uuidOf(other)}`]: fromSnapshot(other),
    [`volume ${uuidOf(volumeId)}`]: fromVolume(volumeId),
  };
  const creation = (source: Source | undefined): Creation => ({
    capacityRange: { requiredBytes: 2n * gib },
    ...(source === undefined ? {} : { volumeContentSource: source }),
  });

  for (const [is, source] of Object.entries(requests)) {
    await env.create(is.replaceAll(" ", "-"), creation(source));
    for (const [asked, otherSource] of Object.entries(requests).filter(([asked]) => asked !== is)) {
      await rejects(
        env.create(is.replaceAll(" ", "-"), creation(otherSource)),
        answers("ALREADY_EXISTS", new RegExp(`content source is ${is}, asked is ${asked}$`)),
      );
    }
  }
  deepStrictEqual(env.kept().sort(), ["origin-snapshot", "other-snapshot"]);
});

Deno.test("a clone's helper says what it is for, is known by its name, and is gone when CreateVolume answers", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  env.control.fail({ rpc: "CreateVolume", hold: true });

  const copying = env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  await eventually("the volume is asked for", () => env.control.held().length > 0);
  const helper = env.cluster.snapshots.find(({ name }) => name.startsWith("lbcsi-clone-"));
  env.control.releaseHeld();
  await copying;

  match(helper?.name ?? "", new RegExp(`^lbcsi-clone-[0-9a-f]{16}-${uuidOf(volumeId)}-[0-9a-f]{12}$`));
  strictEqual(
    helper?.description,
    `made by lbcsi to clone volume ${uuidOf(volumeId)} as copy, then to be deleted`,
  );
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("promise 18: a clone after a failed attempt is made from a snapshot of its own, and the old helper goes", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  env.control.behave({ failCreations: 0 });
  const request = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  env.control.fail({ rpc: "CreateVolume", count: 0, code: "UNAVAILABLE" });
  await rejects(env.create("copy", request), answers("UNAVAILABLE", /told to fail/));
  env.control.clearFaults();
  const [stale] = env.cluster.snapshots.filter(({ name }) => name.startsWith("lbcsi-clone-"));
  ok(stale);

  const clone = env.found(await env.volume("copy", request));

  notStrictEqual(clone.sourceSnapshotUuid, stale.uuid);
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("promise 18: a clone whose creation failed is made again, and no helper is left", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  const request = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  for (const skip of [0, 1]) {
    // The helper fails, then the volume.
    const { createVolume, createSnapshot } = env.cluster;
    if (skip === 0) env.control.behave({ failCreations: 1 });
    else {
      env.cluster.createVolume = (request) => {
        env.control.behave({ failCreations: 1 });
        return createVolume.call(env.cluster, request);
      };
    }
    await rejects(env.create("copy", request), answers("UNAVAILABLE", /is Failed/));
    Object.assign(env.cluster, { createVolume, createSnapshot });
  }

  await env.create("copy", request);

  deepStrictEqual(env.kept(), ["origin-snapshot"]);
  strictEqual(env.cluster.volumes.filter(({ state }) => state === "Available").length, 2);
});

Deno.test("promise 8: DeleteVolume of a clone removes a helper that came to the cluster late", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  env.control.fail({ rpc: "CreateVolume", hold: true });
  const copying = env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  await eventually("the volume is asked for", () => env.control.held().length > 0);
  const name = env.cluster.snapshots.find(({ name }) => name.startsWith("lbcsi-clone-"))?.name ?? "";
  env.control.releaseHeld();
  const clone = (await copying).volumeId;
  await env.cluster.createSnapshot({
    project: "default",
    name: name.replace(/[0-9a-f]{12}$/, "0123456789ab"),
    description: "",
    source: { uuid: uuidOf(volumeId), name: "" },
    retentionMs: undefined,
  });

  await env.call(deleteVolume, { volumeId: clone });

  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("CreateVolume leaves the helpers of other clones alone, also beyond a page of a thousand snapshots", async () => {
  await using env = await startSnapshots({ creationMs: 0 });
  const { volumeId } = await makeSources(env);
  const source = { uuid: uuidOf(volumeId), name: "" };
  const other = `lbcsi-clone-0000000000000000-${source.uuid}-`;
  for (let i = 0; i < 1500; i++) {
    const name = other + i.toString(16).padStart(12, "0");
    await env.cluster.createSnapshot({ project: "default", name, description: "", source, retentionMs: undefined });
  }

  await env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });

  deepStrictEqual(env.kept().filter((name) => !name.startsWith(other)), ["origin-snapshot"]);
  strictEqual(env.kept().length, 1501);
});

Deno.test("CreateVolume of a clone succeeds although LightOS refuses to delete the helper, which DeleteVolume tries again", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  env.control.fail({ rpc: "DeleteSnapshot", code: "PERMISSION_DENIED", count: 1 });

  const clone = await env.volume("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  strictEqual(env.kept().length, 2);
  ok(env.lines.some((line) => line.includes("could not delete a helper snapshot")));
  await env.call(deleteVolume, { volumeId: clone });

  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("DeleteVolume of a clone succeeds although LightOS refuses to list snapshots", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  const clone = await env.volume("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  env.control.fail({ rpc: "ListSnapshots", code: "PERMISSION_DENIED", count: 0 });

  await env.call(deleteVolume, { volumeId: clone });

  ok(env.lines.some((line) => line.includes("could not look for helper snapshots")));
  await eventually("the clone has gone", () => env.cluster.volumes.length === 1);
});

Deno.test("promise 9: two CreateVolume calls at once for one clone make one volume and leave no helper", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  const request = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  env.control.fail({ rpc: "CreateVolume", hold: true });
  const first = env.create("copy", request);
  await eventually("the volume is asked for", () => env.control.held().length > 0);

  await rejects(env.create("copy", request), answers("ABORTED", /CreateVolume has been running for/));
  env.control.releaseHeld();
  await first;

  strictEqual(env.cluster.volumes.length, 2);
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

/** Snapshots, restores and clones through the controller service, over real sockets, against a simulated cluster. */
import { deepStrictEqual, match, notStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../../lib/context.ts";
import { controllerHandlers } from "../../../lib/csi/controller/service.ts";
import { describeRequest, redactRequest } from "../../../lib/csi/request.ts";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { CallError, Channel } from "../../../lib/grpc/client.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import type { SimVolume } from "../../../lib/simulator/lightos/model.ts";
import type { StorageBackend, VolumeRequest } from "../../../lib/storage/backend.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import {
  Controller,
  type CreateVolumeRequestSchema,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
  type VolumeContentSourceSchema,
} from "../../../proto/gen/csi_pb.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
type Creation = Extract<MessageInitShape<typeof CreateVolumeRequestSchema>, { readonly $typeName?: never }>;
type Source = MessageInitShape<typeof VolumeContentSourceSchema>;
const writer: MessageInitShape<typeof VolumeCapabilitySchema> = {
  accessType: { case: "mount", value: {} },
  accessMode: { mode: Mode.SINGLE_NODE_WRITER },
};
const { createVolume, deleteVolume, createSnapshot, deleteSnapshot, getSnapshot } = Controller.method;

const fromSnapshot = (snapshotId: string): Source => ({ type: { case: "snapshot", value: { snapshotId } } });
const fromVolume = (volumeId: string): Source => ({ type: { case: "volume", value: { volumeId } } });
const uuidOf = (id: string) => parseVolumeId(id).uuid;

/** A controller behind a real socket, with a simulated cluster behind it. */
async function start(behaviour: Parameters<TestSimulator["control"]["behave"]>[0] = {}) {
  const stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator());
  simulator.control.behave({ creationMs: 0, ...behaviour });
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-snapshots-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  const backend = stack.use(openBackend(simulator));
  const server = await serve({
    listen: { path: `${directory}/csi.sock` },
    services: [
      service(
        Controller,
        controllerHandlers({ backend, locks: new KeyedLock(), defaultFsType: "ext4", nodeIdSuffix: ".node" }),
      ),
    ],
    log,
    describe: describeRequest,
    redact: redactRequest,
  });
  stack.defer(() => server.stop(5000));
  const channel = stack.use(new Channel({ address: `unix://${directory}/csi.sock` }));
  const { cluster } = simulator.control;
  const env = {
    simulator,
    control: simulator.control,
    cluster,
    backend,
    lines,
    call: <I extends DescMessage, O extends DescMessage>(
      method: DescMethodUnary<I, O>,
      request: MessageInitShape<I>,
      patienceMs = 15_000,
    ): Promise<MessageShape<O>> =>
      channel.call(method, request, {
        signal: AbortSignal.timeout(patienceMs + 5000),
        deadline: new Date(Date.now() + patienceMs),
      }),
    parameters: (changes: Record<string, string> = {}): Record<string, string> => ({
      "mgmt-endpoint": simulator.addresses.grpc.join(","),
      "mgmt-scheme": "grpc",
      "replica-count": "1",
      "project-name": "default",
      ...changes,
    }),
    /** The answer of CreateVolume, of 1 GiB unless told otherwise. */
    async create(name: string, changes: Creation = {}) {
      const { volume } = await env.call(createVolume, {
        name,
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [writer],
        parameters: env.parameters(),
        ...changes,
      });
      ok(volume);
      return volume;
    },
    /** The ID of a new volume. */
    volume: async (name: string, changes: Creation = {}) => (await env.create(name, changes)).volumeId,
    async snapshot(name: string, sourceVolumeId: string) {
      const { snapshot } = await env.call(createSnapshot, { name, sourceVolumeId });
      ok(snapshot);
      return snapshot;
    },
    found: (id: string): SimVolume => {
      const volume = cluster.volumes.find(({ uuid }) => uuid === uuidOf(id));
      ok(volume, `no volume ${id}`);
      return volume;
    },
    /** Snapshots that nobody has asked to delete, by name. */
    kept: () =>
      cluster.snapshots.filter(({ state }) => state !== "Deleting" && state !== "Failed").map(({ name }) => name),
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
  return env;
}

function openBackend(simulator: TestSimulator): StorageBackend {
  return lightosBackend({
    log: quiet,
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  });
}

const quiet = createLogger("error", "json", () => {});

function answers(code: StatusCode, message: RegExp) {
  return (error: unknown) => {
    ok(error instanceof CallError || error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    match(error.message, message);
    return true;
  };
}

const absentUuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const absentAt = (env: { simulator: TestSimulator }, project = "default") =>
  `mgmt:${env.simulator.addresses.grpc.join(",")}|nguid:${absentUuid}|proj:${project}|scheme:grpc`;

// ----------------------------------------------------------------------------------------------------- CreateSnapshot

Deno.test("a snapshot's life, every call twice", async () => {
  await using env = await start();
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

Deno.test("CreateSnapshot takes accessibility_requirements that ask for nothing, and refuses those that name a segment", async () => {
  await using env = await start();
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
  await using env = await start();
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
    await using env = await start();

    const call = env.call(createSnapshot, { name: "s", sourceVolumeId: absentAt(env), ...request });

    await rejects(call, answers("INVALID_ARGUMENT", message));
    strictEqual(env.control.callsInAll(), 0);
  });
}

for (const [what, id] of [["that is not ours", () => "fake-vol-id"], ["that is absent", absentAt]] as const) {
  Deno.test(`CreateSnapshot of a volume ${what} answers NOT_FOUND`, async () => {
    await using env = await start();

    await rejects(env.snapshot("s", id(env)), answers("NOT_FOUND", /Cannot (find volume|create snapshot "s")/));
  });
}

Deno.test("CreateSnapshot of a volume that is being deleted answers NOT_FOUND", async () => {
  await using env = await start({ deletionMs: 60_000 });
  const sourceVolumeId = await env.volume("v");
  await env.call(deleteVolume, { volumeId: sourceVolumeId });

  await rejects(env.snapshot("s", sourceVolumeId), answers("NOT_FOUND", /shows the volume as Deleting/));
});

Deno.test("CreateSnapshot answers ALREADY_EXISTS for a name that a snapshot of another volume has", async () => {
  await using env = await start();
  const [a, b] = [await env.volume("a"), await env.volume("b")];
  await env.snapshot("s", a);

  await rejects(
    env.snapshot("s", b),
    answers("ALREADY_EXISTS", new RegExp(`source is volume ${uuidOf(a)}, asked is volume ${uuidOf(b)}`)),
  );
});

Deno.test("CreateSnapshot answers when the snapshot is Available, and GetSnapshot says before that it is not ready", async () => {
  await using env = await start();
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
  await using env = await start();
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

Deno.test("promise 18: CreateSnapshot looks through the husk of a failed one", async () => {
  await using env = await start();
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
  await using env = await start();
  const sourceVolumeId = await env.volume("v");
  const { snapshotId } = await env.snapshot("s", sourceVolumeId);
  env.control.behave({ deletionMs: 60_000 });
  await env.call(deleteSnapshot, { snapshotId });

  await rejects(env.snapshot("s", sourceVolumeId), answers("ABORTED", /of that name is being deleted/));

  deepStrictEqual(env.cluster.snapshots.map(({ state }) => state), ["Deleting"]);
});

Deno.test("CreateSnapshot waits for a source that is Updating", async () => {
  await using env = await start();
  const sourceVolumeId = await env.volume("v");
  env.control.setVolume(uuidOf(sourceVolumeId), { state: "Updating" });

  const taking = env.snapshot("s", sourceVolumeId);
  await eventually("the cluster has refused once", () => (env.control.calls()["CreateSnapshot"]?.total ?? 0) > 0);
  env.control.setVolume(uuidOf(sourceVolumeId), { state: "Available" });

  strictEqual((await taking).readyToUse, true);
});

Deno.test("CreateSnapshot passes on a refusal that does not go away", async () => {
  await using env = await start();
  const sourceVolumeId = await env.volume("v");
  env.control.fail({ rpc: "CreateSnapshot", code: "FAILED_PRECONDITION", message: "too many snapshots", count: 0 });

  await rejects(env.snapshot("s", sourceVolumeId), answers("FAILED_PRECONDITION", /too many snapshots/));
});

for (const when of ["before", "after"] as const) {
  Deno.test(`promise 8: CreateSnapshot whose connection is lost ${when} each of its calls leaves one snapshot`, async () => {
    await using env = await start();
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
  await using env = await start();
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
  await using env = await start();
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
  await using env = await start();
  const { snapshotId } = await env.snapshot("s", await env.volume("v"));

  await env.call(deleteSnapshot, { snapshotId });

  const line = env.lines.find((line) => line.includes('"rpc":"DeleteSnapshot"') && line.includes('"ms"'));
  match(line ?? "", new RegExp(`"snapshot":"${uuidOf(snapshotId)}"`));
});

// ------------------------------------------------------------------------------------- DeleteSnapshot and GetSnapshot

for (const [what, id] of [["that is not ours", () => "reallyfakesnapshotid"], ["that is absent", absentAt]] as const) {
  Deno.test(`DeleteSnapshot of a snapshot ${what} succeeds, GetSnapshot answers NOT_FOUND`, async () => {
    await using env = await start();
    const snapshotId = id(env);

    deepStrictEqual((await env.call(deleteSnapshot, { snapshotId })).$typeName, "csi.v1.DeleteSnapshotResponse");
    await rejects(env.call(getSnapshot, { snapshotId }), answers("NOT_FOUND", /Cannot (find|read) snapshot/));
  });
}

for (const method of [deleteSnapshot, getSnapshot]) {
  Deno.test(`${method.name} without snapshot_id answers INVALID_ARGUMENT`, async () => {
    await using env = await start();

    await rejects(
      env.call(method as typeof getSnapshot, {}),
      answers("INVALID_ARGUMENT", /snapshot_id is missing/),
    );
  });
}

Deno.test("DeleteSnapshot waits for a snapshot that is Creating", async () => {
  await using env = await start();
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
    await using env = await start();
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
      await using env = await start({ snapshotWaitsForClones });
      const { snapshotId } = await env.snapshot("s", await env.volume("v"));
      const restored = await env.volume("r", { volumeContentSource: fromSnapshot(snapshotId) });

      for (let i = 0; i < 2; i++) await env.call(deleteSnapshot, { snapshotId });

      deepStrictEqual(env.kept(), []);
      strictEqual(env.found(restored).state, "Available");
    },
  );
}

// ---------------------------------------------------------------------------------------- volumes with a content source

interface Sources {
  readonly volumeId: string;
  readonly snapshotId: string;
}

/** A volume of 2 GiB and a snapshot of it. */
async function sources(env: Awaited<ReturnType<typeof start>>): Promise<Sources> {
  const volumeId = await env.volume("origin", { capacityRange: { requiredBytes: 2n * gib } });
  const { snapshotId } = await env.snapshot("origin-snapshot", volumeId);
  return { volumeId, snapshotId };
}

for (
  const [kind, sourceOf] of [
    ["a snapshot", ({ snapshotId }: Sources) => fromSnapshot(snapshotId)],
    ["a volume", ({ volumeId }: Sources) => fromVolume(volumeId)],
  ] as const
) {
  Deno.test(`CreateVolume from ${kind} twice makes one volume, names its source, and leaves no helper`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));

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
      await using env = await start();
      const volumeContentSource = sourceOf(await sources(env));
      const wish = { volumeContentSource, ...(capacityRange === undefined ? {} : { capacityRange }) };

      const volume = await env.create("copy", { capacityRange: {}, ...wish });
      const again = await env.create("copy", { capacityRange: {}, ...wish });

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
      await using env = await start();
      const volumeContentSource = sourceOf(await sources(env));

      await rejects(env.create("copy", { volumeContentSource, capacityRange }), answers(code, message));

      strictEqual(env.cluster.volumes.length, 1);
      deepStrictEqual(env.kept(), ["origin-snapshot"]);
    });
  }

  Deno.test(`CreateVolume from ${kind} answers RESOURCE_EXHAUSTED on a full cluster and leaves nothing`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));

    await rejects(
      env.create("copy", { volumeContentSource, capacityRange: { requiredBytes: 1n << 50n } }),
      answers("RESOURCE_EXHAUSTED", /are free/),
    );

    deepStrictEqual(env.kept(), ["origin-snapshot"]);
  });

  Deno.test(`CreateVolume from ${kind} of another project answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await start();
    env.control.addProject("other");
    const volumeContentSource = sourceOf(await sources(env));

    await rejects(
      env.create("copy", { volumeContentSource, parameters: env.parameters({ "project-name": "other" }) }),
      answers("INVALID_ARGUMENT", /is in project "default", StorageClass parameter "project-name" is "other"/),
    );
  });

  Deno.test(`CreateVolume from ${kind} of another scheme answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));

    await rejects(
      env.create("copy", { volumeContentSource, parameters: env.parameters({ "mgmt-scheme": "grpcs" }) }),
      answers("INVALID_ARGUMENT", /is reached over grpc, StorageClass parameter "mgmt-scheme" is "grpcs"/),
    );
  });

  Deno.test(`CreateVolume from ${kind} of another cluster answers INVALID_ARGUMENT and says both`, async () => {
    await using env = await start();
    await using other = await start();
    const volumeContentSource = sourceOf(await sources(other));
    const jwt = env.simulator.addresses.jwt;

    await rejects(
      env.create("copy", { volumeContentSource, secrets: { jwt } }),
      answers("INVALID_ARGUMENT", /is at 127\.0\.0\.1:\d+\S* and not on the cluster of StorageClass parameter/),
    );
    strictEqual(env.cluster.volumes.length, 0);
  });

  Deno.test(`CreateVolume from ${kind} encrypted on the host is encrypted too, and anything else is refused`, async () => {
    await using env = await start();
    const { volumeId, snapshotId } = await sources(env);
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
    await using env = await start();
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
    await using env = await start({ snapshotWaitsForClones: false });
    const { volumeId, snapshotId } = await sources(env);
    const wish = {
      volumeContentSource: sourceOf({ volumeId, snapshotId }),
      capacityRange: { requiredBytes: 2n * gib },
    };
    const made = await env.create("copy", wish);
    await env.call(deleteSnapshot, { snapshotId });
    await env.call(deleteVolume, { volumeId });
    await eventually(
      "the source has gone",
      () => env.cluster.snapshots.length === 0 && env.cluster.volumes.length === 1,
    );

    deepStrictEqual(await env.create("copy", wish), made);
  });

  Deno.test(`CreateVolume from ${kind} answers what it made while the deleted source waits for it`, async () => {
    await using env = await start();
    const { volumeId, snapshotId } = await sources(env);
    const wish = {
      volumeContentSource: sourceOf({ volumeId, snapshotId }),
      capacityRange: { requiredBytes: 2n * gib },
    };
    const made = await env.create("copy", wish);
    await env.call(deleteSnapshot, { snapshotId });
    await env.call(deleteVolume, { volumeId });
    await eventually("the source volume has gone", () => env.cluster.volumes.length === 1);

    deepStrictEqual(await env.create("copy", wish), made);
    deepStrictEqual(env.kept(), []);
  });

  Deno.test(`CreateVolume from ${kind} without a project in the StorageClass makes it in the source's project`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));
    const { "project-name": _, ...parameters } = env.parameters();

    const copy = await env.volume("copy", { volumeContentSource, parameters, capacityRange: {} });

    strictEqual(parseVolumeId(copy).project, "default");
  });

  Deno.test(`CreateVolume from ${kind} lets LightOS decide on another replica count`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));

    const copy = await env.volume("copy", {
      volumeContentSource,
      parameters: env.parameters({ "replica-count": "2" }),
      capacityRange: {},
    });

    strictEqual(env.found(copy).replicaCount, 2);
  });

  Deno.test(`CreateVolume from ${kind} that LightOS made otherwise than asked is INVALID_ARGUMENT and leaves nothing`, async () => {
    await using env = await start();
    const volumeContentSource = sourceOf(await sources(env));
    const make = env.cluster.createVolume.bind(env.cluster);
    env.cluster.createVolume = (wish) => make({ ...wish, replicaCount: 1 });

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
  await using env = await start();
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
  await using env = await start({ deletionMs: 60_000 });
  const { snapshotId } = await sources(env);
  await env.call(deleteSnapshot, { snapshotId });

  await rejects(
    env.create("copy", { volumeContentSource: fromSnapshot(snapshotId), capacityRange: {} }),
    answers("NOT_FOUND", /LightOS shows snapshot \S+ as Deleting/),
  );
});

Deno.test("CreateVolume answers ALREADY_EXISTS for a name whose volume has another content source, and says both", async () => {
  await using env = await start();
  const { volumeId, snapshotId } = await sources(env);
  const { snapshotId: other } = await env.snapshot("other-snapshot", volumeId);
  const wishes = {
    none: undefined,
    [`snapshot ${uuidOf(snapshotId)}`]: fromSnapshot(snapshotId),
    [`snapshot ${uuidOf(other)}`]: fromSnapshot(other),
    [`volume ${uuidOf(volumeId)}`]: fromVolume(volumeId),
  };
  const creation = (source: Source | undefined): Creation => ({
    capacityRange: { requiredBytes: 2n * gib },
    ...(source === undefined ? {} : { volumeContentSource: source }),
  });

  for (const [is, source] of Object.entries(wishes)) {
    await env.create(is.replaceAll(" ", "-"), creation(source));
    for (const [asked, otherSource] of Object.entries(wishes).filter(([asked]) => asked !== is)) {
      await rejects(
        env.create(is.replaceAll(" ", "-"), creation(otherSource)),
        answers("ALREADY_EXISTS", new RegExp(`content source is ${is}, asked is ${asked}$`)),
      );
    }
  }
  deepStrictEqual(env.kept().sort(), ["origin-snapshot", "other-snapshot"]);
});

Deno.test("CreateVolume finds a clone by its helper's name, or its helper, when its labels were changed", async () => {
  await using env = await start({ snapshotWaitsForClones: true });
  const { volumeId } = await sources(env);
  const wish = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  const made = await env.create("copy", wish);
  const clone = env.found(made.volumeId);

  clone.labels = [];
  deepStrictEqual(await env.create("copy", wish), made);
  clone.sourceSnapshotName = "";
  deepStrictEqual(await env.create("copy", wish), made);
});

Deno.test("CreateVolume takes a clone that the vendor's driver had made and could not report", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  const helper = await env.snapshot("snapshot-copy", volumeId);
  const made = await env.create("copy", { volumeContentSource: fromSnapshot(helper.snapshotId), capacityRange: {} });
  env.found(made.volumeId).labels = [];

  const found = await env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });

  strictEqual(found.volumeId, made.volumeId);
});

// ------------------------------------------------------------------------------------------------------------- clones

Deno.test("a clone's helper says what it is for, is known by its name, and is gone when CreateVolume answers", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  env.control.fail({ rpc: "CreateVolume", hold: true });

  const cloning = env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  await eventually("the volume is asked for", () => env.control.held().length > 0);
  const helper = env.cluster.snapshots.find(({ name }) => name.startsWith("lbcsi-clone-"));
  env.control.releaseHeld();
  await cloning;

  match(helper?.name ?? "", new RegExp(`^lbcsi-clone-[0-9a-f]{16}-${uuidOf(volumeId)}-[0-9a-f]{12}$`));
  strictEqual(
    helper?.description,
    `made by lbcsi to clone volume ${uuidOf(volumeId)} as copy, then to be deleted`,
  );
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("promise 18: a clone after a failed attempt is made from a snapshot of its own, and the old helper goes", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  env.control.behave({ failCreations: 0 });
  const wish = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  env.control.fail({ rpc: "CreateVolume", count: 0, code: "UNAVAILABLE" });
  await rejects(env.create("copy", wish), answers("UNAVAILABLE", /told to fail/));
  env.control.clearFaults();
  const [stale] = env.cluster.snapshots.filter(({ name }) => name.startsWith("lbcsi-clone-"));
  ok(stale);

  const clone = env.found(await env.volume("copy", wish));

  notStrictEqual(clone.sourceSnapshotUuid, stale.uuid);
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("promise 18: a clone whose creation failed is made anew, and no helper is left", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  const wish = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  for (const skip of [0, 1]) {
    // The helper fails, then the volume.
    const { createVolume, createSnapshot } = env.cluster;
    if (skip === 0) env.control.behave({ failCreations: 1 });
    else {
      env.cluster.createVolume = (wish) => {
        env.control.behave({ failCreations: 1 });
        return createVolume.call(env.cluster, wish);
      };
    }
    await rejects(env.create("copy", wish), answers("UNAVAILABLE", /is Failed/));
    Object.assign(env.cluster, { createVolume, createSnapshot });
  }

  await env.create("copy", wish);

  deepStrictEqual(env.kept(), ["origin-snapshot"]);
  strictEqual(env.cluster.volumes.filter(({ state }) => state === "Available").length, 2);
});

Deno.test("promise 8: DeleteVolume of a clone removes a helper that came to the cluster late", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  env.control.fail({ rpc: "CreateVolume", hold: true });
  const cloning = env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  await eventually("the volume is asked for", () => env.control.held().length > 0);
  const name = env.cluster.snapshots.find(({ name }) => name.startsWith("lbcsi-clone-"))?.name ?? "";
  env.control.releaseHeld();
  const clone = (await cloning).volumeId;
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
  await using env = await start({ creationMs: 0 });
  const { volumeId } = await sources(env);
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
  await using env = await start();
  const { volumeId } = await sources(env);
  env.control.fail({ rpc: "DeleteSnapshot", code: "PERMISSION_DENIED", count: 1 });

  const clone = await env.volume("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  strictEqual(env.kept().length, 2);
  ok(env.lines.some((line) => line.includes("could not delete a helper snapshot")));
  await env.call(deleteVolume, { volumeId: clone });

  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

Deno.test("DeleteVolume of a clone succeeds although LightOS refuses to list snapshots", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  const clone = await env.volume("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });
  env.control.fail({ rpc: "ListSnapshots", code: "PERMISSION_DENIED", count: 0 });

  await env.call(deleteVolume, { volumeId: clone });

  ok(env.lines.some((line) => line.includes("could not look for helper snapshots")));
  await eventually("the clone has gone", () => env.cluster.volumes.length === 1);
});

Deno.test("promise 9: two CreateVolume calls at once for one clone make one volume and leave no helper", async () => {
  await using env = await start();
  const { volumeId } = await sources(env);
  const wish = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  env.control.fail({ rpc: "CreateVolume", hold: true });
  const first = env.create("copy", wish);
  await eventually("the volume is asked for", () => env.control.held().length > 0);

  await rejects(env.create("copy", wish), answers("ABORTED", /CreateVolume has been running for/));
  env.control.releaseHeld();
  await first;

  strictEqual(env.cluster.volumes.length, 2);
  deepStrictEqual(env.kept(), ["origin-snapshot"]);
});

// ------------------------------------------------------------------------------------------------------------ cut-offs

/** The context of a caller who can go away at once. */
function leavable(): { readonly ctx: RequestContext; readonly leave: () => void } {
  const caller = new AbortController();
  return {
    ctx: requestContext(caller.signal, new Date(Date.now() + 60_000), quiet),
    leave: () => caller.abort(new StatusError("CANCELLED", "the caller has gone")),
  };
}

const none = new Secrets();

/** A source, a wish to copy it, and drivers that come and go. */
async function cloning(type: "volume" | "snapshot" = "volume") {
  const env = await start();
  const { volumeId, snapshotId } = await sources(env);
  const wanted: VolumeRequest = {
    name: "copy",
    requiredBytes: 3n * gib,
    limitBytes: 0n,
    parameters: env.parameters(),
    source: { type, id: type === "volume" ? volumeId : snapshotId },
  };
  return {
    ...env,
    sourceId: volumeId,
    wanted,
    /** What a new driver does, without the memory of earlier ones. */
    async fresh<T>(work: (backend: StorageBackend, ctx: RequestContext) => Promise<T>): Promise<T> {
      await using backend = openBackend(env.simulator);
      return await work(backend, leavable().ctx);
    },
    /** Runs `work` in a driver that is gone for good at its `skip`th management call; false: it was done before that. */
    async cutOff(
      skip: number,
      when: "before" | "after",
      work: (backend: StorageBackend, ctx: RequestContext) => Promise<unknown>,
    ): Promise<boolean> {
      await using backend = openBackend(env.simulator);
      const { ctx, leave } = leavable();
      // So that looks at the state are among the calls.
      env.control.behave({ creationMs: 5 });
      env.control.fail({ rpc: "*", hold: true, when, skip });
      const working = work(backend, ctx).then(() => "done", () => "failed");
      const end = await Promise.race([working, eventually("a call is held", () => env.control.held().length > 0)]);
      leave();
      await working;
      env.control.behave({ creationMs: 0 });
      env.control.clearFaults();
      env.control.releaseHeld();
      return end !== "done";
    },
    async noTraffic() {
      await eventually("no call is held", () => env.control.held().length === 0);
    },
  };
}

for (const when of ["before", "after"] as const) {
  for (const kind of ["volume", "snapshot"] as const) {
    Deno.test(`promise 8: CreateVolume from a ${kind}, killed ${when} any management call, converges to one volume and no helper`, async () => {
      await using env = await cloning(kind);
      let cuts = 0;

      for (;; cuts++) {
        const wasCut = await env.cutOff(cuts, when, (backend, ctx) => backend.createVolume(ctx, none, env.wanted));
        await env.noTraffic();
        const volume = await env.fresh((backend, ctx) => backend.createVolume(ctx, none, env.wanted));

        const copies = env.cluster.volumes.filter(({ name, state }) => name === "copy" && state === "Available");
        deepStrictEqual(
          copies.map(({ uuid, sizeBytes }) => [uuid, sizeBytes]),
          [[volume.uuid, 3n * gib]],
          `cut ${cuts}`,
        );
        deepStrictEqual(env.kept(), ["origin-snapshot"], `cut ${cuts}`);
        // Nor does anything come back once the clone is deleted.
        await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, volume.id));
        await eventually("all is gone", () => env.cluster.volumes.length === 1 && env.cluster.snapshots.length === 1);
        if (!wasCut) break;
      }

      // Version, look, source, volume and its state; for a clone also snapshot and its state, helpers, deletion.
      ok(cuts >= (kind === "volume" ? 9 : 5), `${cuts} cuts`);
    });
  }

  Deno.test(`promise 8: DeleteVolume of a clone with helpers left, killed ${when} any management call, leaves nothing`, async () => {
    await using env = await cloning();

    for (let cut = 0;; cut++) {
      const { id } = await env.fresh((backend, ctx) => backend.createVolume(ctx, none, env.wanted));
      const helper = env.cluster.volumes.find(({ name }) => name === "copy")?.sourceSnapshotName ?? "";
      await env.cluster.createSnapshot({
        project: "default",
        name: helper.replace(/[0-9a-f]{12}$/, cut.toString(16).padStart(12, "0")),
        description: "",
        source: { uuid: uuidOf(env.sourceId), name: "" },
        retentionMs: undefined,
      });
      const wasCut = await env.cutOff(cut, when, (backend, ctx) => backend.deleteVolume(ctx, none, id));
      await env.noTraffic();

      await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, id));

      await eventually("all is gone", () => env.cluster.volumes.length === 1 && env.cluster.snapshots.length === 1);
      if (!wasCut) break;
    }
  });

  Deno.test(`promise 8: CreateVolume of a clone whose connection is lost ${when} any management call goes on by itself or on repeat`, async () => {
    await using env = await cloning();

    for (let cut = 0; cut < 9; cut++) {
      env.control.fail({ rpc: "*", drop: true, when, skip: cut });
      const work = (backend: StorageBackend, ctx: RequestContext) => backend.createVolume(ctx, none, env.wanted);
      const volume = await env.fresh(async (backend, ctx) => {
        try {
          return await work(backend, ctx);
        } catch (error) {
          answers("UNAVAILABLE", /./)(error);
          return await work(backend, ctx);
        }
      });
      env.control.clearFaults();

      strictEqual(env.cluster.volumes.filter(({ name }) => name === "copy").length, 1, `cut ${cut}`);
      deepStrictEqual(env.kept(), ["origin-snapshot"], `cut ${cut}`);
      await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, volume.id));
      await eventually("the copy has gone", () => env.cluster.volumes.length === 1);
    }
  });
}

// -------------------------------------------------------------------------------------------------------------- labels

Deno.test("new volumes carry labels that say who made them and for which claim", async () => {
  await using env = await start();
  const prefix = "csi.storage.k8s.io/";
  const parameters = env.parameters({
    [`${prefix}pvc/name`]: "data-db-0",
    [`${prefix}pvc/namespace`]: "shop",
    [`${prefix}pv/name`]: "pvc-1",
  });

  const volumeId = await env.volume("v", { parameters });
  const clone = await env.volume("c", { parameters, volumeContentSource: fromVolume(volumeId) });

  const labels = (id: string) => Object.fromEntries(env.found(id).labels.map(({ key, value }) => [key, value]));
  const common = { madeby: "lbcsi", pvc: "data-db-0", namespace: "shop", pv: "pvc-1" };
  deepStrictEqual(labels(volumeId), common);
  deepStrictEqual(labels(clone), { ...common, clonedfrom: uuidOf(volumeId) });
});

Deno.test("labels take what LightOS takes: other characters are replaced, long values cut, empty ones left out", async () => {
  await using env = await start();
  const prefix = "csi.storage.k8s.io/";
  const parameters = env.parameters({
    [`${prefix}pvc/name`]: "näme with blanks/and more",
    [`${prefix}pvc/namespace`]: "",
    [`${prefix}pv/name`]: "p".repeat(300),
  });

  const volume = env.found(await env.volume("v", { parameters }));

  deepStrictEqual(volume.labels, [
    { key: "madeby", value: "lbcsi" },
    { key: "pvc", value: "n_me_with_blanks_and_more" },
    { key: "pv", value: "p".repeat(253) },
  ]);
});

Deno.test("CreateVolume repeated with other metadata of the sidecars answers the same volume", async () => {
  await using env = await start();
  const first = await env.create("v");

  const again = await env.create("v", { parameters: env.parameters({ "csi.storage.k8s.io/pvc/name": "new" }) });

  deepStrictEqual(again, first);
});

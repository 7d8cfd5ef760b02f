/** What every storage system gives to an orchestrator: one body, over real sockets to each of the simulators. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { Controller, ControllerServiceCapability_RPC_Type as Rpc } from "../../proto/gen/csi_pb.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { uuidInId } from "../../lib/volume_id.ts";
import { knownSystems } from "../../lib/storage/poseidon/cluster_file.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { answers, startController } from "../support/controller_service.ts";
import { poseidonParameters, startPoseidon } from "../support/poseidon.ts";
import { eventually, startSimulator } from "../support/simulator.ts";

const gib = 1n << 30n;
const { method } = Controller;

/** A controller before a simulated storage system. */
interface Deployment extends AsyncDisposable {
  readonly controller: Awaited<ReturnType<typeof startController>>;
  readonly parameters: Record<string, string>;
  readonly secrets: Record<string, string>;
  /** Cluster file given: these capabilities, by name. */
  readonly announces: readonly string[];
  readonly sharesVolumes: boolean;
  leftovers(): unknown;
}

const nothing = { volumes: [], snapshots: [], access: [], devices: [] };
const always = ["CREATE_DELETE_VOLUME", "PUBLISH_UNPUBLISH_VOLUME", "SINGLE_NODE_MULTI_WRITER", "MODIFY_VOLUME"];
const withFile = ["LIST_VOLUMES", "LIST_VOLUMES_PUBLISHED_NODES", "GET_VOLUME", "VOLUME_CONDITION", "GET_CAPACITY"];

const deployments = {
  async LightOS(clusterFile: boolean): Promise<Deployment> {
    const sim = await startSimulator();
    const { grpc, adminJwt, jwt } = sim.addresses;
    const file = `clusters: [{ name: a, scheme: grpc, endpoints: ${JSON.stringify(grpc)}, projects: [default] }]`;
    const controller = await startController({
      ...(clusterFile ? { clusterFile: file, globalJwt: () => adminJwt } : {}),
    });
    return {
      controller,
      parameters: {
        "mgmt-endpoint": grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
      },
      secrets: { jwt },
      announces: ["EXPAND_VOLUME", "CREATE_DELETE_SNAPSHOT", "CLONE_VOLUME", "GET_SNAPSHOT", "LIST_SNAPSHOTS"],
      sharesVolumes: true,
      leftovers: () => sim.control.leftovers(),
      async [Symbol.asyncDispose]() {
        await controller[Symbol.asyncDispose]();
        await sim[Symbol.asyncDispose]();
      },
    };
  },
  async PoseidonOS(clusterFile: boolean): Promise<Deployment> {
    const sim = await startPoseidon();
    const file = `systems: [{ name: a, endpoint: "${sim.addresses.dagent}", arrays: POSArray }]`;
    const controller = await startController({
      backend: (log) =>
        poseidonBackend({
          log,
          systems: clusterFile
            ? knownSystems("/systems.yaml", { stamp: () => "unchanged", read: () => file }, log)
            : undefined,
        }),
    });
    return {
      controller,
      parameters: poseidonParameters(sim),
      secrets: {},
      announces: [],
      sharesVolumes: false,
      leftovers: () => sim.control.leftovers(),
      async [Symbol.asyncDispose]() {
        await controller[Symbol.asyncDispose]();
        await sim[Symbol.asyncDispose]();
        deepStrictEqual(sim.control.api.harmful, []);
      },
    };
  },
} satisfies Record<string, (clusterFile: boolean) => Promise<Deployment>>;

const block = (mode = Mode.SINGLE_NODE_WRITER) => ({
  accessType: { case: "block" as const, value: {} },
  accessMode: { mode },
});

for (const [system, open] of Object.entries(deployments)) {
  for (const hasFile of [false, true]) {
    Deno.test(`${system}, ${hasFile ? "with" : "without"} a cluster file, announces exactly what it has`, async () => {
      await using t = await open(hasFile);

      const { capabilities } = await t.controller.call(method.controllerGetCapabilities, {});

      const names = capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "?");
      deepStrictEqual(names.sort(), [...always, ...(hasFile ? withFile : []), ...t.announces].sort());
    });
  }

  Deno.test(`a volume on ${system} goes through its life, each call twice, and leaves nothing`, async () => {
    await using t = await open(true);
    const { controller: { call }, parameters, secrets } = t;
    const twice = async <T>(work: () => Promise<T>): Promise<T> => {
      const first = await work();
      deepStrictEqual(await work(), first);
      return first;
    };

    const { volume } = await twice(() =>
      call(method.createVolume, {
        name: "pvc-1",
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [block()],
        parameters,
        secrets,
      })
    );
    ok(volume !== undefined);
    const { volumeId, volumeContext } = volume;
    strictEqual(volume.capacityBytes, gib);
    const publish = (nodeId: string) =>
      call(method.controllerPublishVolume, {
        volumeId,
        nodeId,
        volumeCapability: block(),
        volumeContext,
        secrets,
      });
    const { publishContext } = await twice(() => publish("a.node"));
    strictEqual(publishContext["uuid"], uuidInId(volumeId));
    ok(publishContext["subsystem-nqn"]?.startsWith("nqn."));
    ok(publishContext["addresses"] !== "");
    await rejects(publish("b.node"), answers("FAILED_PRECONDITION", /a\.node has it/));
    await rejects(
      call(method.deleteVolume, { volumeId, secrets }),
      answers("FAILED_PRECONDITION", /a\.node may still/),
    );
    const { confirmed } = await call(method.validateVolumeCapabilities, {
      volumeId,
      volumeCapabilities: [block()],
      secrets,
    });
    strictEqual(confirmed?.volumeCapabilities.length, 1);
    const listed = await call(method.listVolumes, {});
    deepStrictEqual(
      listed.entries.map(({ volume, status }) => [volume?.volumeId, status?.publishedNodeIds]),
      [[volumeId, ["a.node"]]],
    );
    const got = await call(method.controllerGetVolume, { volumeId });
    deepStrictEqual([got.status?.publishedNodeIds, got.status?.volumeCondition?.abnormal], [["a.node"], false]);
    ok((await call(method.getCapacity, { parameters })).availableCapacity > 0n);

    await twice(() => call(method.controllerUnpublishVolume, { volumeId, nodeId: "a.node", secrets }));
    await publish("b.node");
    await twice(() => call(method.controllerUnpublishVolume, { volumeId, nodeId: "", secrets }));
    await twice(() => call(method.deleteVolume, { volumeId, secrets }));
    await rejects(publish("a.node"), answers("NOT_FOUND"));

    await eventually("nothing is left", () => JSON.stringify(t.leftovers()) === JSON.stringify(nothing));
  });

  Deno.test(`promise 30: ${system} reports its capacity to the scheduler as each csi-provisioner asks for it`, async () => {
    await using t = await open(true);
    const { controller: { call }, parameters } = t;
    const capacityFor = async (request: object) =>
      (await call(method.getCapacity, { parameters, accessibleTopology: { segments: {} }, ...request }))
        .availableCapacity;
    const unknown = { accessType: { case: "mount" as const, value: {} }, accessMode: { mode: Mode.UNKNOWN } };

    const free = await capacityFor({});
    ok(free > 0n);
    strictEqual(await capacityFor({ volumeCapabilities: [unknown] }), free);
    const shared = await capacityFor({ volumeCapabilities: [block(Mode.MULTI_NODE_MULTI_WRITER)] });
    strictEqual(shared, t.sharesVolumes ? free : 0n);
  });

  Deno.test(`a volume for several nodes on ${system} is shared or refused by name, never half`, async () => {
    await using t = await open(false);
    const { controller: { call }, parameters, secrets } = t;
    const shared = block(Mode.MULTI_NODE_MULTI_WRITER);
    const create = (name: string, capability: ReturnType<typeof block>) =>
      call(method.createVolume, { name, volumeCapabilities: [capability], parameters, secrets });

    if (t.sharesVolumes) {
      ok((await create("pvc-1", shared)).volume);
      return;
    }
    const reason =
      /access mode MULTI_NODE_MULTI_WRITER is for several nodes, and PoseidonOS shows a volume in one place/;
    await rejects(create("pvc-1", shared), answers("INVALID_ARGUMENT", reason));
    const { volume } = await create("pvc-1", block());
    const volumeId = volume?.volumeId ?? "";
    const { confirmed, message } = await call(method.validateVolumeCapabilities, {
      volumeId,
      volumeCapabilities: [shared],
      secrets,
    });
    strictEqual(confirmed, undefined);
    ok(reason.test(message), message);
  });
}

Deno.test("calls for what PoseidonOS does not have are UNIMPLEMENTED, and it makes no volume from another", async () => {
  await using t = await deployments.PoseidonOS(false);
  const { controller: { call }, parameters } = t;
  const { volume } = await call(method.createVolume, { name: "pvc-1", volumeCapabilities: [block()], parameters });
  const volumeId = volume?.volumeId ?? "";
  const notAnnounced = answers("UNIMPLEMENTED", /this driver does not announce it/);

  await rejects(call(method.createSnapshot, { name: "s", sourceVolumeId: volumeId }), notAnnounced);
  await rejects(
    call(method.controllerExpandVolume, { volumeId, capacityRange: { requiredBytes: gib } }),
    notAnnounced,
  );
  await rejects(call(method.listSnapshots, {}), notAnnounced);
  await rejects(
    call(method.createVolume, {
      name: "pvc-2",
      volumeCapabilities: [block()],
      parameters,
      volumeContentSource: { type: { case: "volume", value: { volumeId } } },
    }),
    answers("INVALID_ARGUMENT", /announces neither snapshots nor clones/),
  );
});

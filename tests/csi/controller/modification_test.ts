import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { Controller, VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { answers, type Creation, startControlledCluster } from "../../support/controller_service.ts";
import { eventually, type startSimulator } from "../../support/simulator.ts";

const method = Controller.method;
const unknownUuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

/** A controller, and a cluster with the policies `gold` and `silver`. */
async function start(overrides: Parameters<typeof startSimulator>[0] = {}) {
  const env = await startControlledCluster({ simulator: { projects: ["default", "team-a"], ...overrides } });
  const { call, secrets, simulator: { control } } = env;
  const [gold, silver] = ["gold", "silver"].map((name) =>
    control.addPolicy({ name, description: "", limit: { kind: "iops", read: 256, write: 256 } })
  );
  return {
    ...env,
    control,
    gold: gold?.uuid ?? "",
    silver: silver?.uuid ?? "",
    create: async (changes: Creation = {}, parameters: Record<string, string> = {}): Promise<string> =>
      (await env.createVolume(changes, parameters)).volumeId,
    modify: (volumeId: string, mutableParameters: Record<string, string>) =>
      call(method.controllerModifyVolume, { volumeId, mutableParameters, secrets }),
    /** Policy and compression of a volume, as the cluster has them. */
    state(volumeId: string) {
      const volume = control.cluster.volumes.find(({ uuid }) => uuid === parseVolumeId(volumeId).uuid);
      ok(volume !== undefined);
      return { policy: control.cluster.policyName(volume), compression: volume.compression };
    },
    /** Calls of UpdateVolume so far. */
    updates: () => control.calls()["UpdateVolume"]?.total ?? 0,
  };
}

Deno.test("ControllerModifyVolume changes the QoS policy by name and by UUID while a node has the volume", async () => {
  await using env = await start();
  const volumeId = await env.create();
  const volumeCapability = {
    accessType: { case: "block" as const, value: {} },
    accessMode: { mode: Mode.SINGLE_NODE_WRITER },
  };
  await env.call(method.controllerPublishVolume, {
    volumeId,
    nodeId: "a.node",
    volumeCapability,
    secrets: env.secrets,
  });

  await env.modify(volumeId, { "qos-policy-name": "gold" });
  strictEqual(env.state(volumeId).policy, "gold");
  await env.modify(volumeId, { "qos-policy-uuid": env.silver.toUpperCase() });

  deepStrictEqual(env.state(volumeId), { policy: "silver", compression: false });
  deepStrictEqual(env.control.visible(hostNqn("a.node")), [parseVolumeId(volumeId).uuid]);
});

Deno.test("ControllerModifyVolume changes compression and policy in one call, and leaves alone what is not given", async () => {
  await using env = await start();
  const volumeId = await env.create();

  await env.modify(volumeId, { compression: "enabled", "qos-policy-name": "gold" });
  strictEqual(env.updates(), 1);
  deepStrictEqual(env.state(volumeId), { policy: "gold", compression: true });
  await env.modify(volumeId, { compression: "disabled" });

  deepStrictEqual(env.state(volumeId), { policy: "gold", compression: false });
});

Deno.test("promise 30: a class that an encrypted volume cannot have is INVALID_ARGUMENT, so that another can be chosen", async () => {
  await using env = await start();
  const volumeId = await env.create({}, { "host-encryption": "enabled" });

  await rejects(
    env.modify(volumeId, { compression: "enabled", "qos-policy-name": "gold" }),
    answers("INVALID_ARGUMENT", /it is encrypted on the host, and what is encrypted cannot be compressed/),
  );
  await env.modify(volumeId, { "qos-policy-name": "silver" });

  deepStrictEqual(env.state(volumeId), { policy: "silver", compression: false });
});

Deno.test("ControllerModifyVolume repeated answers OK and changes nothing again", async () => {
  await using env = await start();
  const volumeId = await env.create();
  const mutable = { compression: "enabled", "qos-policy-uuid": env.gold };

  await env.modify(volumeId, mutable);
  await env.modify(volumeId, mutable);

  strictEqual(env.updates(), 1);
  deepStrictEqual(env.state(volumeId), { policy: "gold", compression: true });
});

Deno.test("ControllerModifyVolume ignores the sidecar's metadata, also when nothing else is given", async () => {
  await using env = await start();
  const volumeId = await env.create();
  const metadata = { "csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pv/name": "pvc-1" };

  await env.modify(volumeId, metadata);
  await env.modify(volumeId, { ...metadata, "qos-policy-name": "gold" });

  strictEqual(env.state(volumeId).policy, "gold");
});

for (
  const [what, mutable, message] of [
    ["nothing", {}, /^Cannot modify a volume: mutable_parameters is missing$/],
    [
      "an unknown key beside a good one",
      { "qos-policy-name": "gold", XXX_FakeKey: "1" },
      /mutable parameter "XXX_FakeKey" unknown \(known: qos-policy-name, qos-policy-uuid, compression\)/,
    ],
    ["a parameter that is for creation", { "replica-count": "3" }, /"replica-count" unknown/],
    [
      "a bad value",
      { compression: "on", "qos-policy-name": "gold" },
      /"compression" "on" is not "enabled" or "disabled"/,
    ],
    ["an empty policy", { "qos-policy-name": "" }, /"qos-policy-name" "" is not the name of a policy/],
    ["a policy UUID that is none", { "qos-policy-uuid": "gold" }, /"qos-policy-uuid" "gold" is not a UUID/],
    [
      "a policy by name and by UUID",
      { "qos-policy-name": "gold", "qos-policy-uuid": unknownUuid },
      /"qos-policy-name" and "qos-policy-uuid" are both given, one is needed/,
    ],
  ] as const
) {
  Deno.test(`ControllerModifyVolume rejects ${what} with INVALID_ARGUMENT and changes nothing`, async () => {
    await using env = await start();
    const volumeId = await env.create();

    await rejects(env.modify(volumeId, mutable), answers("INVALID_ARGUMENT", /^Cannot modify a volume: /, message));
    strictEqual(env.updates(), 0);
    deepStrictEqual(env.state(volumeId), { policy: "", compression: false });
  });
}

Deno.test("ControllerModifyVolume with a policy that does not exist answers INVALID_ARGUMENT and changes nothing", async () => {
  await using env = await start();
  const volumeId = await env.create();

  for (const policy of [{ "qos-policy-name": "bronze" }, { "qos-policy-uuid": unknownUuid }]) {
    await rejects(
      env.modify(volumeId, { ...policy, compression: "enabled" }),
      answers("INVALID_ARGUMENT", /answered UpdateVolume with INVALID_ARGUMENT: .*there is no QoS policy/),
    );
  }

  deepStrictEqual(env.state(volumeId), { policy: "", compression: false });
});

Deno.test("ControllerModifyVolume answers INVALID_ARGUMENT when LightOS calls an absent policy NOT_FOUND", async () => {
  await using env = await start();
  const volumeId = await env.create();
  env.control.fail({ rpc: "UpdateVolume", code: "NOT_FOUND", message: "no policy bronze" });

  await rejects(
    env.modify(volumeId, { "qos-policy-name": "bronze" }),
    answers("INVALID_ARGUMENT", /answered UpdateVolume with NOT_FOUND: no policy bronze/),
  );
});

Deno.test("ControllerModifyVolume answers NOT_FOUND for absent volumes, and INVALID_ARGUMENT without an ID", async () => {
  await using env = await start();
  const volumeId = await env.create();
  const absent = volumeId.replace(parseVolumeId(volumeId).uuid, unknownUuid);
  const mutable = { "qos-policy-name": "gold" };

  await rejects(env.modify(absent, mutable), answers("NOT_FOUND", /^Cannot modify volume 0f2c6a5e/));
  await rejects(env.modify("x", mutable), answers("NOT_FOUND", /not one of this driver/));
  await rejects(env.modify("", mutable), answers("INVALID_ARGUMENT", /volume_id is missing/));
});

Deno.test("ControllerModifyVolume converges when the answer to the change is lost", async () => {
  await using env = await start();
  const volumeId = await env.create();
  env.control.fail({ rpc: "UpdateVolume", when: "after", drop: true });

  await env.modify(volumeId, { "qos-policy-name": "gold" });

  strictEqual(env.state(volumeId).policy, "gold");
  strictEqual(env.updates(), 1);
});

Deno.test("ControllerModifyVolume reads the volume again when it was changed between its read and its update", async () => {
  await using env = await start();
  const volumeId = await env.create();
  const ref = { project: "default", uuid: parseVolumeId(volumeId).uuid };
  env.control.fail({ rpc: "UpdateVolume", hold: true });

  const modified = env.modify(volumeId, { "qos-policy-name": "gold" });
  await eventually("the change is under way", () => env.control.held().length > 0);
  await env.control.cluster.updateVolume(ref, { compression: "true" }, undefined);
  env.control.releaseHeld();
  await modified;

  deepStrictEqual(env.state(volumeId), { policy: "gold", compression: true });
  strictEqual(env.updates(), 2);
});

Deno.test("ControllerModifyVolume waits while LightOS is still applying the change", async () => {
  await using env = await start();
  env.control.behave({ updateMs: 200 });
  const volumeId = await env.create();

  await env.modify(volumeId, { compression: "enabled" });
  await env.modify(volumeId, { compression: "disabled" });

  strictEqual(env.state(volumeId).compression, false);
});

Deno.test("promise 9: ControllerModifyVolume beside another one of the volume answers ABORTED and names it", async () => {
  await using env = await start();
  const volumeId = await env.create();
  env.control.fail({ rpc: "UpdateVolume", hold: true });

  const first = env.modify(volumeId, { "qos-policy-name": "gold" });
  await eventually("the first is under way", () => env.control.held().length > 0);
  await rejects(
    env.modify(volumeId, { "qos-policy-name": "silver" }),
    answers("ABORTED", /ControllerModifyVolume has been running for/),
  );
  env.control.releaseHeld();
  await first;

  strictEqual(env.state(volumeId).policy, "gold");
});

// ------------------------------------------------------------------------------------------------------------ creation

Deno.test("CreateVolume gives mutable parameters to the new volume, before StorageClass parameters of the same key", async () => {
  await using env = await start();
  const parameters = { "qos-policy-name": "silver", compression: "disabled" };
  const mutableParameters = { "qos-policy-name": "gold", compression: "enabled", "csi.storage.k8s.io/pvc/name": "c" };

  const volumeId = await env.create({ mutableParameters }, parameters);
  const again = await env.create({ mutableParameters }, parameters);

  deepStrictEqual(env.state(volumeId), { policy: "gold", compression: true });
  strictEqual(again, volumeId);
});

Deno.test("CreateVolume with a mutable policy by UUID passes over the StorageClass' policy by name", async () => {
  await using env = await start();

  const volumeId = await env.create({ mutableParameters: { "qos-policy-uuid": env.gold } }, {
    "qos-policy-name": "silver",
  });

  strictEqual(env.state(volumeId).policy, "gold");
});

Deno.test("CreateVolume takes the StorageClass parameter qos-policy-uuid, and distinguishes a volume of another policy", async () => {
  await using env = await start();
  const volumeId = await env.create({}, { "qos-policy-uuid": env.gold });

  strictEqual(env.state(volumeId).policy, "gold");
  strictEqual(await env.create({}, { "qos-policy-uuid": env.gold.toUpperCase() }), volumeId);
  await rejects(
    env.create({}, { "qos-policy-uuid": env.silver }),
    answers("ALREADY_EXISTS", new RegExp(`qos-policy-uuid is "${env.gold}", asked is "${env.silver}"`)),
  );
});

for (
  const [what, mutable, parameters, message] of [
    ["an unknown mutable key", { XXX_FakeKey: "1" }, {}, /mutable parameter "XXX_FakeKey" unknown/],
    ["a mutable key that only creation has", { "mkfs-options": "-m 0" }, {}, /"mkfs-options" unknown/],
    ["a policy that does not exist", { "qos-policy-name": "bronze" }, {}, /there is no QoS policy "bronze"/],
    [
      "two policies in the StorageClass",
      {},
      { "qos-policy-name": "gold", "qos-policy-uuid": unknownUuid },
      /both given/,
    ],
  ] as const
) {
  Deno.test(`CreateVolume with ${what} answers INVALID_ARGUMENT and makes nothing`, async () => {
    await using env = await start();

    await rejects(
      env.create({ mutableParameters: mutable }, parameters),
      answers("INVALID_ARGUMENT", /^Cannot create volume "pvc-1": /, message),
    );
    deepStrictEqual(env.control.cluster.volumes, []);
  });
}

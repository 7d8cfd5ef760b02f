/** CreateVolume, DeleteVolume and ValidateVolumeCapabilities, over real sockets, against a simulated cluster. */
import { deepStrictEqual, match, rejects, strictEqual } from "node:assert/strict";
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  Controller,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
} from "../../../proto/gen/csi_pb.ts";
import { answers, type Creation, startControlledCluster, writer } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";
import { mountCapability } from "../../support/node_calls.ts";

type Capability = MessageInitShape<typeof VolumeCapabilitySchema>;
const sharedBlock: Capability = {
  accessType: { case: "block", value: {} },
  accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER },
};

Deno.test("CreateVolume keeps mkfs options in the volume context and the sidecars' keys from the cluster", async () => {
  await using env = await startControlledCluster();
  const { parameters } = env.creation();

  const { volume } = await env.call(
    Controller.method.createVolume,
    env.creation({
      parameters: { ...parameters, "mkfs-options": "-m 1", "csi.storage.k8s.io/pvc/name": "claim" },
    }),
  );

  deepStrictEqual(volume?.volumeContext, { "mkfs-options": "-m 1" });
});

for (
  const [what, changes, message] of [
    ["no name", { name: "" }, /name is missing/],
    ["a name of 129 bytes", { name: "n".repeat(129) }, /name has 129 bytes, 128 are allowed/],
    ["control characters in the name", { name: "a\x07b" }, /control characters/],
    ["no capabilities", { volumeCapabilities: [] }, /volume_capabilities is missing/],
    ["an unknown file system", {
      volumeCapabilities: [{ ...writer, accessType: { case: "mount" as const, value: { fsType: "zfs" } } }],
    }, /file system "zfs"/],
    [
      "a topology to be in",
      { accessibilityRequirements: { requisite: [{}, { segments: { zone: "a" } }] } },
      /accessibility_requirements asks for "zone" "a", but every node reaches every volume/,
    ],
    [
      "a topology to prefer",
      { accessibilityRequirements: { preferred: [{ segments: { zone: "a" } }] } },
      /accessibility_requirements asks for "zone" "a"/,
    ],
    ["a content source without a type", { volumeContentSource: {} }, /is neither a snapshot nor a volume/],
    ["a content source without an ID", {
      volumeContentSource: { type: { case: "snapshot" as const, value: {} } },
    }, /volume_content_source.snapshot.snapshot_id is missing/],
    ["an unknown mutable parameter", { mutableParameters: { a: "b" } }, /mutable parameter "a" unknown \(known: qos-/],
    ["a mount flag that mounts something else", {
      volumeCapabilities: [{ ...writer, accessType: { case: "mount" as const, value: { mountFlags: ["bind"] } } }],
    }, /Cannot use mount flag "bind"/],
    ["a negative size", { capacityRange: { requiredBytes: -1n } }, /negative/],
  ] as const
) {
  Deno.test(`CreateVolume with ${what} answers INVALID_ARGUMENT and makes nothing`, async () => {
    await using env = await startControlledCluster();

    await rejects(
      env.call(
        Controller.method.createVolume,
        env.creation(changes as unknown as Creation),
      ),
      answers("INVALID_ARGUMENT", message),
    );
    strictEqual(env.simulator.control.callsInAll(), 0);
  });
}

for (
  const [what, accessibilityRequirements] of [
    ["nothing in it", {}],
    ["empty topologies", { requisite: [{ segments: {} }], preferred: [{ segments: {} }, {}] }],
  ] as const
) {
  Deno.test(`CreateVolume with accessibility_requirements that have ${what} asks for nothing, and is served`, async () => {
    await using env = await startControlledCluster();

    const { volume } = await env.call(
      Controller.method.createVolume,
      env.creation({ accessibilityRequirements } as unknown as Creation),
    );

    strictEqual(volume?.capacityBytes, gib);
    deepStrictEqual(volume?.accessibleTopology, []);
  });
}

Deno.test("CreateVolume with mkfs options that force or point elsewhere answers INVALID_ARGUMENT", async () => {
  await using env = await startControlledCluster();
  const { parameters } = env.creation();

  for (const options of ["-F", "-m 0 /dev/sda", "-J device=x", "stray"]) {
    await rejects(
      env.call(
        Controller.method.createVolume,
        env.creation({ parameters: { ...parameters, "mkfs-options": options } }),
      ),
      answers("INVALID_ARGUMENT", /^Cannot use mkfs-options ".*" for ext4: /),
    );
  }
});

Deno.test("delete-like calls for an ID that is not ours are done", async () => {
  await using env = await startControlledCluster();

  await env.call(Controller.method.deleteVolume, { volumeId: "fake-vol-id" });
  await env.call(Controller.method.controllerUnpublishVolume, { volumeId: "fake-vol-id", nodeId: "a.node" });

  strictEqual(env.simulator.control.callsInAll(), 0);
});

Deno.test("ValidateVolumeCapabilities confirms what the volume can do and says why it cannot the rest", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const impossible = mountCapability("", Mode.MULTI_NODE_MULTI_WRITER);

  const good = await env.call(Controller.method.validateVolumeCapabilities, {
    volumeId,
    secrets,
    volumeCapabilities: [writer, sharedBlock],
    volumeContext: { "storage.kubernetes.io/csiProvisionerIdentity": "x" },
  });
  const bad = await env.call(Controller.method.validateVolumeCapabilities, {
    volumeId,
    secrets,
    volumeCapabilities: [writer, impossible],
  });

  strictEqual(good.confirmed?.volumeCapabilities.length, 2);
  strictEqual(bad.confirmed, undefined);
  match(bad.message, /MULTI_NODE_MULTI_WRITER is for raw block volumes/);
});

Deno.test("ValidateVolumeCapabilities of an absent volume answers NOT_FOUND", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = (await env.create("pvc-1")).replace(/nguid:[^|]+/, `nguid:${crypto.randomUUID()}`);

  await rejects(
    env.call(Controller.method.validateVolumeCapabilities, { volumeId, secrets, volumeCapabilities: [writer] }),
    answers("NOT_FOUND", /^Cannot read volume /),
  );
});

Deno.test("promise 9: two calls at once for one name make one volume", async () => {
  await using env = await startControlledCluster();

  const results = await Promise.allSettled(
    Array.from({ length: 5 }, () => env.call(Controller.method.createVolume, env.creation())),
  );

  strictEqual(results.filter(({ status }) => status === "fulfilled").length, 1);
  for (const result of results) {
    if (result.status === "rejected") answers("ABORTED", /CreateVolume has been running/)(result.reason);
  }
  strictEqual(env.simulator.control.leftovers().volumes.length, 1);
});

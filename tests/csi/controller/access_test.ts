/** ControllerPublishVolume and ControllerUnpublishVolume, over real sockets, against a simulated cluster. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { hostNqn } from "../../../lib/namespace.ts";
import {
  Controller,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
} from "../../../proto/gen/csi_pb.ts";
import { answers, startControlledCluster, writer } from "../../support/controller_service.ts";

type Capability = MessageInitShape<typeof VolumeCapabilitySchema>;
const sharedBlock: Capability = {
  accessType: { case: "block", value: {} },
  accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER },
};

const absent = "mgmt:127.0.0.1:1|nguid:0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10|proj:default|scheme:grpc";

for (
  const [what, changes, message] of [
    ["no volume ID", { volumeId: "" }, /volume_id is missing/],
    ["no node ID", { nodeId: "" }, /node_id is missing/],
    ["no capability", { volumeCapability: undefined }, /volume_capability is missing/],
    ["readonly", { readonly: true }, /readonly is set/],
  ] as const
) {
  Deno.test(`ControllerPublishVolume with ${what} answers INVALID_ARGUMENT`, async () => {
    await using env = await startControlledCluster();
    const request = { volumeId: absent, nodeId: "a.node", volumeCapability: writer, ...changes };
    const given = Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined));

    await rejects(env.call(Controller.method.controllerPublishVolume, given), answers("INVALID_ARGUMENT", message));
  });
}

for (
  const [what, changes, message] of [
    ["an ID that is not ours", { volumeId: "fake-vol-id-1a2b3c4d-5" }, /Cannot find volume "fake-vol-id-1a2b3c4d-5"/],
    ["a node that cannot be", { nodeId: "fake-node-id-1a2b" }, /no node of this driver has that ID/],
    ["a node ID with a space", { nodeId: "a b.node" }, /no node of this driver has that ID/],
  ] as const
) {
  Deno.test(`ControllerPublishVolume for ${what} answers NOT_FOUND`, async () => {
    await using env = await startControlledCluster();
    const request = { volumeId: absent, nodeId: "a.node", volumeCapability: writer, ...changes };

    await rejects(env.call(Controller.method.controllerPublishVolume, request), answers("NOT_FOUND", message));
  });
}

Deno.test("promise 7: ControllerPublishVolume to a second node answers FAILED_PRECONDITION naming the first", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  await env.call(Controller.method.controllerPublishVolume, {
    volumeId,
    nodeId: "a.node",
    volumeCapability: writer,
    secrets,
  });

  await rejects(
    env.call(Controller.method.controllerPublishVolume, {
      volumeId,
      nodeId: "b.node",
      volumeCapability: writer,
      secrets,
    }),
    answers("FAILED_PRECONDITION", /a\.node has it/),
  );
});

Deno.test("ControllerPublishVolume of a shared raw block volume lets two nodes in", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");

  for (const nodeId of ["a.node", "b.node"]) {
    await env.call(Controller.method.controllerPublishVolume, {
      volumeId,
      nodeId,
      volumeCapability: sharedBlock,
      secrets,
    });
  }

  for (const nodeId of ["a.node", "b.node"]) strictEqual(env.simulator.control.visible(hostNqn(nodeId)).length, 1);
});

Deno.test("ControllerUnpublishVolume without a node ID takes every node's access", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  for (const nodeId of ["a.node", "b.node"]) {
    await env.call(Controller.method.controllerPublishVolume, {
      volumeId,
      nodeId,
      volumeCapability: sharedBlock,
      secrets,
    });
  }

  await env.call(Controller.method.controllerUnpublishVolume, { volumeId, secrets });

  deepStrictEqual(env.simulator.control.leftovers().access, []);
});

Deno.test("promise 30: a node attaches a shared volume while another is being attached: it waits, and both have it", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const { control } = env.simulator;
  const volumeId = await env.create("pvc-1");
  const publish = (nodeId: string) =>
    env.call(Controller.method.controllerPublishVolume, { volumeId, nodeId, volumeCapability: sharedBlock, secrets });
  control.fail({ rpc: "UpdateVolume", hold: true });

  const first = publish("a.node");
  await untilCalled(control, "UpdateVolume");
  const others = [publish("b.node"), publish("c.node")];
  await rejects(
    publish("a.node"),
    answers("ABORTED", /for volume .* and node "a.node": ControllerPublishVolume has been running for \d+ s/),
  );
  control.releaseHeld();

  await Promise.all([first, ...others]);
  const uuid = control.cluster.volumes[0]?.uuid;
  for (const node of ["a.node", "b.node", "c.node"]) deepStrictEqual(control.visible(hostNqn(node)), [uuid]);
});

async function untilCalled(
  control: { calls(): Readonly<Record<string, { readonly total: number }>> },
  rpc: string,
): Promise<void> {
  for (let tries = 0; (control.calls()[rpc]?.total ?? 0) === 0; tries++) {
    ok(tries < 500, `${rpc} was not called`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

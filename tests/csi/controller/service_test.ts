/** The controller service as a whole, over real sockets, against a simulated cluster. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import type { StatusCode } from "../../../lib/error.ts";
import { fromPublishContext, hostNqn } from "../../../lib/namespace.ts";
import { Controller, ControllerServiceCapability_RPC_Type as Rpc, Node } from "../../../proto/gen/csi_pb.ts";
import {
  answers,
  type ControlledCluster,
  startControlledCluster,
  startController,
  writer,
} from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";

Deno.test("ControllerGetCapabilities announces what is served", async () => {
  await using env = await startControlledCluster();

  const { capabilities } = await env.call(Controller.method.controllerGetCapabilities, {});

  deepStrictEqual(capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : ""), [
    "CREATE_DELETE_VOLUME",
    "PUBLISH_UNPUBLISH_VOLUME",
    "SINGLE_NODE_MULTI_WRITER",
    "EXPAND_VOLUME",
    "CREATE_DELETE_SNAPSHOT",
    "CLONE_VOLUME",
    "GET_SNAPSHOT",
    "LIST_SNAPSHOTS",
    "MODIFY_VOLUME",
  ]);
});

for (
  const method of [
    Controller.method.listVolumes,
    Controller.method.getCapacity,
    Controller.method.controllerGetVolume,
  ]
) {
  Deno.test(`${method.name} without clusters or a token of its own is not announced and answers UNIMPLEMENTED`, async () => {
    await using env = await startControlledCluster();

    await rejects(
      env.call(method as typeof Controller.method.listVolumes, {}),
      answers("UNIMPLEMENTED", new RegExp(`Cannot serve ${method.name}`)),
    );
  });
}

Deno.test("the controller takes a volume through its life, every call twice", async () => {
  await using env = await startControlledCluster();

  const first = await env.call(Controller.method.createVolume, env.creation());
  const again = await env.call(Controller.method.createVolume, env.creation());
  deepStrictEqual(again, first);
  const volumeId = first.volume?.volumeId ?? "";
  strictEqual(first.volume?.capacityBytes, gib);
  const { secrets } = env;
  const publish = { volumeId, nodeId: "a.node", volumeCapability: writer, secrets };
  const published = await env.call(Controller.method.controllerPublishVolume, publish);
  deepStrictEqual(await env.call(Controller.method.controllerPublishVolume, publish), published);
  const namespace = fromPublishContext(published.publishContext);
  strictEqual(namespace?.subsystemNqn, env.simulator.addresses.subsystemNqn);
  deepStrictEqual(env.simulator.control.visible(hostNqn("a.node")), [namespace?.uuid]);
  for (let i = 0; i < 2; i++) {
    await env.call(Controller.method.controllerUnpublishVolume, { volumeId, nodeId: "a.node", secrets });
    deepStrictEqual(env.simulator.control.visible(hostNqn("a.node")), []);
  }
  for (let i = 0; i < 2; i++) await env.call(Controller.method.deleteVolume, { volumeId, secrets });

  const { volumes, access } = env.simulator.control.leftovers();
  deepStrictEqual([volumes.filter((volume) => !volume.endsWith("Deleting")), access], [[], []]);
});

for (
  const [method, request] of [
    [Controller.method.deleteVolume, {}],
    [Controller.method.controllerUnpublishVolume, { nodeId: "a.node" }],
    [Controller.method.validateVolumeCapabilities, { volumeCapabilities: [writer] }],
  ] as const
) {
  Deno.test(`${method.name} without a volume ID answers INVALID_ARGUMENT`, async () => {
    await using env = await startControlledCluster();

    await rejects(
      env.call(method as typeof Controller.method.deleteVolume, request as Record<never, never>),
      answers("INVALID_ARGUMENT", /volume_id is missing/),
    );
  });
}

type Environment = ControlledCluster;
const callsOnFullCluster: readonly (readonly [
  what: string,
  rpc: string,
  code: StatusCode,
  message: RegExp,
  call: (env: Environment, volumeId: string) => Promise<unknown>,
])[] = [
  [
    "CreateSnapshot",
    "CreateSnapshot",
    "FAILED_PRECONDITION",
    /^Cannot .*the cluster is full.*; make room on the cluster, or delete the snapshot that was asked for$/,
    (env, sourceVolumeId) =>
      env.call(Controller.method.createSnapshot, { sourceVolumeId, name: "s1", secrets: env.secrets }),
  ],
  [
    "ControllerModifyVolume",
    "UpdateVolume",
    "FAILED_PRECONDITION",
    /^Cannot .*the cluster is full.*; make room on the cluster, or choose another class$/,
    (env, volumeId) =>
      env.call(Controller.method.controllerModifyVolume, {
        volumeId,
        mutableParameters: { "qos-policy-name": "p" },
        secrets: env.secrets,
      }),
  ],
  [
    "ControllerPublishVolume",
    "UpdateVolume",
    "UNAVAILABLE",
    /^Cannot .*the cluster is full.*; this is no limit of the node$/,
    (env, volumeId) =>
      env.call(Controller.method.controllerPublishVolume, {
        volumeId,
        nodeId: "a.node",
        volumeCapability: writer,
        secrets: env.secrets,
      }),
  ],
  [
    "CreateVolume",
    "CreateVolume",
    "RESOURCE_EXHAUSTED",
    /^Cannot .*the cluster is full/,
    (env) => env.call(Controller.method.createVolume, env.creation({ name: "pvc-2" })),
  ],
];

for (const [what, rpc, code, message, call] of callsOnFullCluster) {
  Deno.test(`promise 30: ${what} on a full cluster answers ${code}, so that what was asked for can be taken back`, async () => {
    await using env = await startControlledCluster();
    const { control } = env.simulator;
    const volumeId = await env.create("pvc-1");
    control.addPolicy({ name: "p", description: "", limit: { kind: "iops", read: 256, write: 256 } });
    control.fail({ rpc, code: "RESOURCE_EXHAUSTED", message: "the cluster is full" });

    await rejects(call(env, volumeId), answers(code, message));
  });
}

const callsOnBusyCluster: readonly (readonly [what: string, call: typeof callsOnFullCluster[number][4]])[] = [
  ...callsOnFullCluster.filter(([what]) => what !== "CreateVolume").map(([what, , , , call]) => [what, call] as const),
  [
    "ControllerExpandVolume",
    (env, volumeId) =>
      env.call(Controller.method.controllerExpandVolume, {
        volumeId,
        capacityRange: { requiredBytes: 2n << 30n },
        secrets: env.secrets,
      }),
  ],
];

for (const [what, call] of callsOnBusyCluster) {
  Deno.test(`promise 30: ${what} of a cluster that is too busy to be read answers UNAVAILABLE, not that it is full`, async () => {
    await using env = await startControlledCluster();
    const { control } = env.simulator;
    const volumeId = await env.create("pvc-1");
    control.addPolicy({ name: "p", description: "", limit: { kind: "iops", read: 256, write: 256 } });
    for (const rpc of ["GetVolume", "ListVolumes", "ListSnapshots"]) {
      control.fail({ rpc, count: 0, code: "RESOURCE_EXHAUSTED", message: "too many requests" });
    }

    await rejects(
      call(env, volumeId),
      answers("UNAVAILABLE", /^Cannot .* with RESOURCE_EXHAUSTED: too many requests; repeat the call$/),
    );
  });
}

Deno.test("promise 30: the controller answers csi-resizer's question for node capabilities with none, and serves no other node call", async () => {
  await using controller = await startController({});

  deepStrictEqual((await controller.call(Node.method.nodeGetCapabilities, {})).capabilities, []);
  await rejects(
    controller.call(Node.method.nodeGetInfo, {}),
    answers("UNIMPLEMENTED", /Cannot serve NodeGetInfo/),
  );
});

Deno.test("promise 9: a second call for one volume fails naming the call that runs, and calls for other volumes go on", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const [volumeId, otherId] = [await env.create("pvc-1"), await env.create("pvc-2")];
  const publish = { volumeId, nodeId: "a.node", volumeCapability: writer, secrets };
  env.simulator.control.fail({ rpc: "UpdateVolume", delayMs: 1500 });

  const slow = env.call(Controller.method.controllerPublishVolume, publish);
  await untilCalled(env.simulator.control, "UpdateVolume");
  await rejects(
    env.call(Controller.method.deleteVolume, { volumeId, secrets }),
    answers("ABORTED", /Cannot start DeleteVolume for volume .*: ControllerPublishVolume has been running for \d+ s/),
  );
  await env.call(Controller.method.controllerPublishVolume, { ...publish, volumeId: otherId });

  await slow;
  await env.call(Controller.method.controllerUnpublishVolume, { volumeId, secrets });
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

Deno.test("promise 10: no token appears in the log at its most verbose level", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  await env.call(Controller.method.controllerPublishVolume, {
    volumeId,
    nodeId: "a.node",
    volumeCapability: writer,
    secrets,
  });
  await env.call(Controller.method.controllerUnpublishVolume, { volumeId, secrets });
  await env.call(Controller.method.deleteVolume, { volumeId, secrets });

  const log = env.lines.join("");
  ok(log.includes('"event":"received"'), "the log is not verbose enough for this test");
  strictEqual(log.includes(env.simulator.addresses.jwt), false);
});

Deno.test("every call leaves one line with its outcome, and the volume's UUID in it", async () => {
  await using env = await startControlledCluster();
  const volumeId = await env.create("pvc-1");
  const uuid = /nguid:([^|]+)/.exec(volumeId)?.[1];
  env.lines.length = 0;

  await env.call(Controller.method.deleteVolume, { volumeId, secrets: env.secrets });

  const ends = env.lines.map((line) => JSON.parse(line)).filter(({ level, event }) =>
    level === "info" && event === "answered"
  );
  deepStrictEqual(ends.map(({ rpc, code, volume }) => ({ rpc, code, volume })), [
    { rpc: "DeleteVolume", code: "OK", volume: uuid },
  ]);
});

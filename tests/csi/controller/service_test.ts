import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { createLogger } from "../../../lib/context.ts";
import { controllerHandlers } from "../../../lib/csi/controller/service.ts";
import { identityHandlers } from "../../../lib/csi/identity.ts";
import { describeRequest, redactRequest } from "../../../lib/csi/request.ts";
import type { StatusCode } from "../../../lib/error.ts";
import { CallError, Channel } from "../../../lib/grpc/client.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { fromPublishContext, hostNqn } from "../../../lib/namespace.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as Rpc,
  type CreateVolumeRequestSchema,
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
} from "../../../proto/gen/csi_pb.ts";
import { startController } from "../../support/controller_service.ts";
import { startSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
type Capability = MessageInitShape<typeof VolumeCapabilitySchema>;
type Creation = Extract<MessageInitShape<typeof CreateVolumeRequestSchema>, { readonly $typeName?: never }>;
const writer: Capability = { accessType: { case: "mount", value: {} }, accessMode: { mode: Mode.SINGLE_NODE_WRITER } };
const sharedBlock: Capability = {
  accessType: { case: "block", value: {} },
  accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER },
};

/** A controller behind a real socket, with a simulated cluster behind it. */
async function start() {
  const stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator());
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-controller-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  const backend = stack.use(lightosBackend({
    log,
    globalJwt: () => undefined,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  }));
  const handlers = controllerHandlers({
    backend,
    locks: new KeyedLock(),
    defaultFsType: "ext4",
    nodeIdSuffix: ".node",
  });
  const path = `${directory}/csi.sock`;
  const server = await serve({
    listen: { path },
    services: [
      service(
        Identity,
        identityHandlers({ name: "csi.lightbitslabs.com", version: "1.2.3", expansion: true, snapshotMetadata: false }),
      ),
      service(Controller, handlers),
    ],
    log,
    describe: describeRequest,
    redact: redactRequest,
  });
  stack.defer(() => server.stop(5000));
  const channel = stack.use(new Channel({ address: `unix://${path}` }));
  const secrets = { jwt: simulator.addresses.jwt };
  const call = <I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> =>
    channel.call(method, request, { signal: AbortSignal.timeout(20_000), deadline: new Date(Date.now() + 15_000) });
  return {
    simulator,
    lines,
    secrets,
    call,
    creation: (changes: Creation = {}): Creation => ({
      name: "pvc-1",
      capacityRange: { requiredBytes: gib },
      volumeCapabilities: [writer],
      parameters: {
        "mgmt-endpoint": simulator.addresses.grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
      },
      secrets,
      ...changes,
    }),
    async create(name: string): Promise<string> {
      const { volume } = await call(Controller.method.createVolume, this.creation({ name }));
      return volume?.volumeId ?? "";
    },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

function answers(code: StatusCode, message: RegExp) {
  return (error: unknown) => {
    ok(error instanceof CallError, String(error));
    strictEqual(error.code, code, error.message);
    match(error.message, message);
    return true;
  };
}

const absent = "mgmt:127.0.0.1:1|nguid:0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10|proj:default|scheme:grpc";

Deno.test("Identity answers name, version, capabilities and Probe without calling the cluster", async () => {
  await using env = await start();

  const info = await env.call(Identity.method.getPluginInfo, {});
  const { capabilities } = await env.call(Identity.method.getPluginCapabilities, {});
  const probe = await env.call(Identity.method.probe, {});

  strictEqual(info.name, "csi.lightbitslabs.com");
  strictEqual(info.vendorVersion, "1.2.3");
  deepStrictEqual(capabilities.map(({ type }) => type.case), ["service", "volumeExpansion"]);
  strictEqual(probe.ready, true);
  strictEqual(env.simulator.control.callsInAll(), 0);
});

Deno.test("ControllerGetCapabilities announces what is served", async () => {
  await using env = await start();

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
  Deno.test(`${method.name} without clusters or a token of our own is not announced and answers UNIMPLEMENTED`, async () => {
    await using env = await start();

    await rejects(
      env.call(method as typeof Controller.method.listVolumes, {}),
      answers("UNIMPLEMENTED", new RegExp(`Cannot serve ${method.name}`)),
    );
  });
}

Deno.test("the controller takes a volume through its life, every call twice", async () => {
  await using env = await start();

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

Deno.test("CreateVolume keeps mkfs options in the volume context and the sidecars' keys from the cluster", async () => {
  await using env = await start();
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
    await using env = await start();

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
    await using env = await start();

    const { volume } = await env.call(
      Controller.method.createVolume,
      env.creation({ accessibilityRequirements } as unknown as Creation),
    );

    strictEqual(volume?.capacityBytes, gib);
    deepStrictEqual(volume?.accessibleTopology, []);
  });
}

Deno.test("CreateVolume with mkfs options that force or point elsewhere answers INVALID_ARGUMENT", async () => {
  await using env = await start();
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

for (
  const [what, changes, message] of [
    ["no volume ID", { volumeId: "" }, /volume_id is missing/],
    ["no node ID", { nodeId: "" }, /node_id is missing/],
    ["no capability", { volumeCapability: undefined }, /volume_capability is missing/],
    ["readonly", { readonly: true }, /readonly is set/],
  ] as const
) {
  Deno.test(`ControllerPublishVolume with ${what} answers INVALID_ARGUMENT`, async () => {
    await using env = await start();
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
    await using env = await start();
    const request = { volumeId: absent, nodeId: "a.node", volumeCapability: writer, ...changes };

    await rejects(env.call(Controller.method.controllerPublishVolume, request), answers("NOT_FOUND", message));
  });
}

Deno.test("promise 7: ControllerPublishVolume to a second node answers FAILED_PRECONDITION naming the first", async () => {
  await using env = await start();
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
  await using env = await start();
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
  await using env = await start();
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

Deno.test("delete-like calls for an ID that is not ours are done", async () => {
  await using env = await start();

  await env.call(Controller.method.deleteVolume, { volumeId: "fake-vol-id" });
  await env.call(Controller.method.controllerUnpublishVolume, { volumeId: "fake-vol-id", nodeId: "a.node" });

  strictEqual(env.simulator.control.callsInAll(), 0);
});

for (
  const [method, request] of [
    [Controller.method.deleteVolume, {}],
    [Controller.method.controllerUnpublishVolume, { nodeId: "a.node" }],
    [Controller.method.validateVolumeCapabilities, { volumeCapabilities: [writer] }],
  ] as const
) {
  Deno.test(`${method.name} without a volume ID answers INVALID_ARGUMENT`, async () => {
    await using env = await start();

    await rejects(
      env.call(method as typeof Controller.method.deleteVolume, request as Record<never, never>),
      answers("INVALID_ARGUMENT", /volume_id is missing/),
    );
  });
}

Deno.test("ValidateVolumeCapabilities confirms what the volume can do and says why it cannot the rest", async () => {
  await using env = await start();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const impossible: Capability = { ...writer, accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER } };

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
  await using env = await start();
  const { secrets } = env;
  const volumeId = (await env.create("pvc-1")).replace(/nguid:[^|]+/, `nguid:${crypto.randomUUID()}`);

  await rejects(
    env.call(Controller.method.validateVolumeCapabilities, { volumeId, secrets, volumeCapabilities: [writer] }),
    answers("NOT_FOUND", /^Cannot read volume /),
  );
});

Deno.test("ControllerExpandVolume grows a volume, twice in a row, and asks for the node's step", async () => {
  await using env = await start();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const request = { volumeId, secrets, capacityRange: { requiredBytes: 2n * gib + 1n }, volumeCapability: writer };

  const first = await env.call(Controller.method.controllerExpandVolume, request);
  const second = await env.call(Controller.method.controllerExpandVolume, request);

  deepStrictEqual([first.capacityBytes, first.nodeExpansionRequired], [3n * gib, true]);
  deepStrictEqual(second, first);
  strictEqual(env.simulator.control.cluster.volumes[0]?.sizeBytes, 3n * gib);
});

for (
  const [what, capacityRange, code, message] of [
    ["no capacity range", undefined, "INVALID_ARGUMENT", /capacity_range is missing/],
    ["a limit below whole GiB", { requiredBytes: gib + 1n, limitBytes: gib + 2n }, "OUT_OF_RANGE", /whole GiB/],
  ] as const
) {
  Deno.test(`ControllerExpandVolume with ${what} answers ${code}`, async () => {
    await using env = await start();
    const volumeId = await env.create("pvc-1");
    const request = { volumeId, secrets: env.secrets, ...(capacityRange === undefined ? {} : { capacityRange }) };

    await rejects(env.call(Controller.method.controllerExpandVolume, request), answers(code, message));
    strictEqual(env.simulator.control.cluster.volumes[0]?.sizeBytes, gib);
  });
}

Deno.test("ControllerExpandVolume never shrinks: a smaller size is done, a limit below the size is OUT_OF_RANGE", async () => {
  await using env = await start();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const grow = (requiredBytes: bigint, limitBytes = 0n) =>
    env.call(Controller.method.controllerExpandVolume, {
      volumeId,
      secrets,
      capacityRange: { requiredBytes, limitBytes },
    });
  await grow(3n * gib);

  strictEqual((await grow(2n * gib)).capacityBytes, 3n * gib);
  await rejects(grow(gib, 2n * gib), answers("OUT_OF_RANGE", /has 3221225472 bytes, above limit_bytes 2147483648/));
});

Deno.test("promise 30: ControllerExpandVolume on a full cluster answers OUT_OF_RANGE, after which Kubernetes takes a smaller size", async () => {
  await using env = await start();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const grow = (requiredBytes: bigint) =>
    env.call(Controller.method.controllerExpandVolume, { volumeId, secrets, capacityRange: { requiredBytes } });

  await rejects(
    grow(1n << 50n),
    answers(
      "OUT_OF_RANGE",
      /^Cannot expand volume .* are free.*; ask for less, .* claim, or make room on the cluster$/,
    ),
  );

  strictEqual((await grow(2n * gib)).capacityBytes, 2n * gib);
});

type Environment = Awaited<ReturnType<typeof start>>;
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
    await using env = await start();
    const { control } = env.simulator;
    const volumeId = await env.create("pvc-1");
    control.addPolicy({ name: "p", description: "", limit: { kind: "iops", read: 256, write: 256 } });
    control.fail({ rpc, code: "RESOURCE_EXHAUSTED", message: "the cluster is full" });

    await rejects(call(env, volumeId), answers(code, message));
  });
}

Deno.test("promise 30: a node attaches a shared volume while another is being attached: it waits, and both have it", async () => {
  await using env = await start();
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

Deno.test("promise 30: the controller answers csi-resizer's question for node capabilities with none, and serves no other node call", async () => {
  await using controller = await startController({});

  deepStrictEqual((await controller.call(Node.method.nodeGetCapabilities, {})).capabilities, []);
  await rejects(
    controller.call(Node.method.nodeGetInfo, {}),
    answers("UNIMPLEMENTED", /Cannot serve NodeGetInfo/),
  );
});

Deno.test("ControllerExpandVolume of an absent volume answers NOT_FOUND", async () => {
  await using env = await start();
  const volumeId = (await env.create("pvc-1")).replace(/nguid:[^|]+/, `nguid:${crypto.randomUUID()}`);

  await rejects(
    env.call(Controller.method.controllerExpandVolume, {
      volumeId,
      secrets: env.secrets,
      capacityRange: { requiredBytes: gib },
    }),
    answers("NOT_FOUND", /^Cannot expand volume /),
  );
});

Deno.test("promise 9: a second call for one volume is told which call runs, and other volumes go on", async () => {
  await using env = await start();
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

Deno.test("promise 9: two calls at once for one name make one volume", async () => {
  await using env = await start();

  const results = await Promise.allSettled(
    Array.from({ length: 5 }, () => env.call(Controller.method.createVolume, env.creation())),
  );

  strictEqual(results.filter(({ status }) => status === "fulfilled").length, 1);
  for (const result of results) {
    if (result.status === "rejected") answers("ABORTED", /CreateVolume has been running/)(result.reason);
  }
  strictEqual(env.simulator.control.leftovers().volumes.length, 1);
});

Deno.test("promise 10: no token appears in the log at its most verbose level", async () => {
  await using env = await start();
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
  await using env = await start();
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

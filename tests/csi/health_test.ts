/** The health calls of CSI 1.13, over real sockets. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  create,
  type DescMessage,
  type DescMethodUnary,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import { createLogger } from "../../lib/context.ts";
import { clipped } from "../../lib/csi/controller/health.ts";
import { conditionProbe } from "../../lib/csi/node/condition.ts";
import { nodeHealthHandlers } from "../../lib/csi/node/health.ts";
import { nodeHandlers } from "../../lib/csi/node/service.ts";
import { describeRequest, redactRequest } from "../../lib/csi/request.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { parseVolumeId } from "../../lib/volume_id.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as ControllerRpc,
  Node,
  NodeGetVolumeHealthRequestSchema,
  NodeServiceCapability_RPC_Type as NodeRpc,
  StorageHealthErrorType as StorageStatus,
  type VolumeHealth,
  VolumeHealthErrorType as Status,
} from "../../proto/gen/csi_pb.ts";
import { answers, startController } from "../support/controller_service.ts";
import { needs } from "../support/needs.ts";
import { blockCapability, callContext, type Capability, mountCapability } from "../support/node_calls.ts";
import { eventually, startSimulator } from "../support/simulator.ts";

const gib = 1n << 30n;
const nodeId = "a.node";
const controller = Controller.method;
const node = Node.method;

/** A simulated cluster and a controller. */
async function start(
  { volumeHealth = true, clusterFile = true, jwt = true, data = "none" as "none" | "loop" } = {},
) {
  await using stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator({ data }));
  const endpoints = simulator.addresses.grpc.join(",");
  const { call } = stack.use(
    await startController({
      volumeHealth,
      ...(clusterFile
        ? {
          clusterFile: `clusters: [{name: a, endpoints: "${endpoints}", scheme: grpc, projects: default${
            jwt ? ", jwt: /jwt" : ""
          }}]`,
        }
        : {}),
      files: { "/jwt": simulator.addresses.jwt },
    }),
  );
  const secrets = { jwt: simulator.addresses.jwt };
  const parts = stack.move();
  return {
    simulator,
    call,
    secrets,
    /** Its CSI ID. */
    async create(name: string, volumeCapability = blockCapability()): Promise<string> {
      const { volume } = await call(controller.createVolume, {
        name,
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [volumeCapability],
        parameters: {
          "mgmt-endpoint": endpoints,
          "mgmt-scheme": "grpc",
          "replica-count": "1",
          "project-name": "default",
        },
        secrets,
      });
      return volume?.volumeId ?? "";
    },
    protect(volumeId: string, protection: "FullyProtected" | "Degraded" | "ReadOnly" | "NotAvailable"): void {
      simulator.control.setVolume(parseVolumeId(volumeId).uuid, { protection });
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** What an answer says is wrong, by status and reason, and the messages. */
function told(health: VolumeHealth | undefined) {
  const statuses = health?.healthStatuses ?? [];
  return {
    what: statuses.map(({ status, reason }) => `${Status[status]} ${reason}`),
    messages: statuses.map(({ message }) => message).join("\n"),
  };
}

// ---------------------------------------------------------------------------------------------------------- controller

for (
  const [circumstance, settings, announced] of [
    ["without the switch", { volumeHealth: false }, []],
    ["with the switch", {}, ["GET_VOLUME_HEALTH", "LIST_VOLUME_HEALTH"]],
    ["with the switch and no cluster file", { clusterFile: false }, ["GET_VOLUME_HEALTH"]],
  ] as const
) {
  Deno.test(`the controller ${circumstance} announces ${announced.join(" and ") || "no health"}`, async () => {
    await using env = await start(settings);

    const { capabilities } = await env.call(controller.controllerGetCapabilities, {});

    const names = capabilities.map(({ type }) => type.case === "rpc" ? ControllerRpc[type.value.type] : "");
    assert.deepEqual(names.filter((name) => name?.endsWith("_HEALTH")), announced);
    // Unknown to 1.13, wanted by orchestrators of 1.12: the switch does not take it away.
    assert.equal(names.includes("VOLUME_CONDITION"), !("clusterFile" in settings));
  });
}

Deno.test("the health calls of the controller answer UNIMPLEMENTED without the switch", async () => {
  await using env = await start({ volumeHealth: false });
  const volumeId = await env.create("v1");

  await assert.rejects(
    env.call(controller.controllerGetVolumeHealth, { volumeId }),
    answers("UNIMPLEMENTED", /ControllerGetVolumeHealth/),
  );
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNIMPLEMENTED", /ControllerListVolumeHealth/),
  );
});

Deno.test("ControllerListVolumeHealth answers UNIMPLEMENTED without a cluster file", async () => {
  await using env = await start({ clusterFile: false });

  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNIMPLEMENTED", /ControllerListVolumeHealth/),
  );
});

for (
  const [protection, what, message] of [
    ["FullyProtected", [], /^$/],
    ["Degraded", ["DEGRADED ReplicaMissing"], /^a replica is missing: reads and writes go on \(LightOS: Degraded/],
    ["ReadOnly", ["INACCESSIBLE ReadOnly"], /^too few replicas are left: writes fail \(LightOS: ReadOnly/],
    ["NotAvailable", ["INACCESSIBLE NotAvailable"], /^no replica can be reached: .* \(LightOS: NotAvailable/],
  ] as const
) {
  Deno.test(
    `ControllerGetVolumeHealth of a volume that LightOS shows as ${protection} tells ${what[0] ?? "nothing"}`,
    async () => {
      await using env = await start({ clusterFile: false });
      const volumeId = await env.create("v1");
      env.protect(volumeId, protection);

      const { volumeHealth } = await env.call(controller.controllerGetVolumeHealth, { volumeId, secrets: env.secrets });

      assert.equal(volumeHealth?.volumeId, volumeId);
      const { what: found, messages } = told(volumeHealth);
      assert.deepEqual(found, what);
      assert.match(messages, message);
    },
  );
}

Deno.test("ControllerGetVolumeHealth of a volume that is being set back to a snapshot tells INACCESSIBLE", async () => {
  await using env = await start();
  const volumeId = await env.create("v1");
  env.simulator.control.setVolume(parseVolumeId(volumeId).uuid, { state: "Rollback" });

  const { volumeHealth } = await env.call(controller.controllerGetVolumeHealth, { volumeId });
  const { entries } = await env.call(controller.controllerListVolumeHealth, {});

  assert.deepEqual(told(volumeHealth).what, ["INACCESSIBLE Rollback"]);
  assert.match(told(volumeHealth).messages, /^its content is being set back to a snapshot/);
  assert.deepEqual(entries.map((entry) => told(entry).what), [["INACCESSIBLE Rollback"]]);
});

Deno.test("ControllerGetVolumeHealth answers NOT_FOUND for an unknown volume, INVALID_ARGUMENT for none", async () => {
  await using env = await start();
  const other = (await env.create("v1")).replace(/nguid:[^|]+/, "nguid:6bb32fb5-99aa-4a4c-a4e7-30b7787bbd66");
  const health = (volumeId: string) =>
    env.call(controller.controllerGetVolumeHealth, { volumeId, secrets: env.secrets });

  await assert.rejects(health(other), answers("NOT_FOUND", /read volume 6bb32fb5/));
  await assert.rejects(health("none-exist-id"), answers("NOT_FOUND", /none-exist-id/));
  await assert.rejects(health(""), answers("INVALID_ARGUMENT", /^Cannot tell the health of a volume: volume_id is/));
});

Deno.test("ControllerGetVolumeHealth without a token fails, and does not tell the volume as healthy", async () => {
  await using env = await start({ clusterFile: false });
  const volumeId = await env.create("v1");

  await assert.rejects(
    env.call(controller.controllerGetVolumeHealth, { volumeId }),
    answers("UNAUTHENTICATED", /GetVolume with UNAUTHENTICATED/),
  );
});

Deno.test("ControllerListVolumeHealth leaves healthy volumes out, and forgets those that have recovered", async () => {
  await using env = await start();
  const ids = [await env.create("v1"), await env.create("v2"), await env.create("v3")] as const;
  env.protect(ids[0], "Degraded");
  env.protect(ids[2], "NotAvailable");
  const list = async () =>
    (await env.call(controller.controllerListVolumeHealth, {})).entries
      .map((health) => `${health.volumeId} ${told(health).what.join()}`).sort();

  const before = await list();
  env.protect(ids[0], "FullyProtected");
  const after = await list();

  const gone = `${ids[2]} INACCESSIBLE NotAvailable`;
  assert.deepEqual(before, [`${ids[0]} DEGRADED ReplicaMissing`, gone].sort());
  assert.deepEqual(after, [gone]);
});

Deno.test("ControllerListVolumeHealth in pages of one tells each volume once, with few calls to the cluster", async () => {
  await using env = await start();
  const ids: string[] = [];
  for (let i = 0; i < 12; i++) ids.push(await env.create(`v${i}`));
  const troubled = ids.filter((_, i) => i % 4 === 1);
  for (const id of troubled) env.protect(id, "ReadOnly");
  env.simulator.control.resetCalls();

  const found: string[] = [];
  let startingToken = "";
  do {
    const page = await env.call(controller.controllerListVolumeHealth, { maxEntries: 1, startingToken });
    assert.equal(page.entries.length, 1);
    found.push(...page.entries.map(({ volumeId }) => volumeId));
    startingToken = page.nextToken;
  } while (startingToken !== "");

  assert.deepEqual(found.sort(), troubled.sort());
  // Two for each page: what there is, and that it was all.
  assert.ok((env.simulator.control.calls()["ListVolumes"]?.total ?? 0) <= 2 * troubled.length);
});

Deno.test("ControllerListVolumeHealth of a healthy cluster is empty", async () => {
  await using env = await start();
  await env.create("v1");

  const { entries, nextToken } = await env.call(controller.controllerListVolumeHealth, {});

  assert.deepEqual([entries, nextToken], [[], ""]);
});

Deno.test("ControllerListVolumeHealth takes its token from the secrets of the call where the file has none", async () => {
  await using env = await start({ jwt: false });
  env.protect(await env.create("v1"), "Degraded");

  const { entries } = await env.call(controller.controllerListVolumeHealth, { secrets: env.secrets });

  assert.equal(entries.length, 1);
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNAUTHENTICATED", /^Cannot list abnormal volumes: /),
  );
});

Deno.test("ControllerListVolumeHealth refuses bad pages", async () => {
  await using env = await start();

  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, { maxEntries: -1 }),
    answers("INVALID_ARGUMENT", /^Cannot list the health of volumes: max_entries -1 is negative$/),
  );
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, { startingToken: "x" }),
    answers("ABORTED", /starting_token "x" is not one that leads on/),
  );
});

Deno.test("messages of health have 1024 bytes at most, and end with whole characters", () => {
  assert.equal(clipped("fine"), "fine");
  assert.equal(clipped("é".repeat(512)), "é".repeat(512));
  const cut = clipped("é".repeat(513));
  assert.equal(cut, `${"é".repeat(510)} …`);
  assert.equal(new TextEncoder().encode(cut).length, 1024);
});

// ---------------------------------------------------------------------------------------------------------------- node

const ignore = !needs("root", "loop", "mkfs.ext4");

function nodeTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name, ignore, fn });
}

/** A cluster, a controller, and a node service on the machine that the simulator plays. */
async function startNode({ volumeHealth = true } = {}) {
  await using stack = new AsyncDisposableStack();
  const env = stack.use(await start({ data: "loop" }));
  const { discoveryDir = "", sysfsRoot = "", devRoot = "", subsystemNqn } = env.simulator.addresses;
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-health-" }));
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  stack.defer(async () => {
    const mounts = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
    for (const { path } of mounts.filter((mount) => mount.path.startsWith(`${directory}/`)).toReversed()) {
      await tool("umount", path);
    }
  });
  const log = createLogger("error", "json", () => {});
  const host = createLinuxHost({ log, sysfsRoot, devRoot });
  const handlers = nodeHandlers({
    host,
    attacher: createDiscoveryClientAttacher({ host, directory: discoveryDir, hostNqn: hostNqn(nodeId) }),
    locks: new KeyedLock(),
    nodeId,
    defaultFsType: "ext4",
    parseId: parseVolumeId,
    volumeHealth,
  });
  const path = join(directory, "csi.sock");
  const server = await serve({
    listen: { path },
    services: [service(Node, handlers)],
    log,
    describe: describeRequest,
    redact: redactRequest,
  });
  stack.defer(() => server.stop(5000));
  const channel = stack.use(new Channel({ address: `unix://${path}` }));
  const callNode = <I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> =>
    channel.call(method, request, { signal: AbortSignal.timeout(20_000), deadline: new Date(Date.now() + 15_000) });
  const stagingTargetPath = join(directory, "globalmount");
  const targetPath = join(directory, "pod");
  await Deno.mkdir(stagingTargetPath);
  const parts = stack.move();
  return {
    ...env,
    host,
    callNode,
    stagingTargetPath,
    targetPath,
    subsystemNqn,
    machine: () => env.simulator.control.machine(),
    /** A volume that a pod on the node has. */
    async published(volumeCapability: Capability = mountCapability("ext4")): Promise<string> {
      const volumeId = await env.create("v1", volumeCapability);
      const { publishContext } = await env.call(controller.controllerPublishVolume, {
        volumeId,
        nodeId,
        volumeCapability,
        secrets: env.secrets,
      });
      const request = { volumeId, publishContext, stagingTargetPath, volumeCapability };
      await callNode(node.nodeStageVolume, request);
      await callNode(node.nodePublishVolume, { ...request, targetPath });
      return volumeId;
    },
    async health(volumeId: string, paths = { volumePublishPath: targetPath, stagingTargetPath }) {
      const { volumeHealth } = await callNode(node.nodeGetVolumeHealth, { volumeId, ...paths });
      assert.equal(volumeHealth?.volumeId, volumeId);
      return told(volumeHealth);
    },
    async storage() {
      const { backendHealth } = await callNode(node.nodeGetStorageHealth, {});
      return backendHealth.map(({ status, reason, message }) => `${StorageStatus[status]} ${reason}: ${message}`);
    },
    /** Shows a connection in sysfs, beside what the simulator shows. */
    async connect(name: string, state: string, attributes: Readonly<Record<string, string>> = {}): Promise<void> {
      const entry = join(sysfsRoot, "class/nvme", name);
      await Deno.mkdir(entry, { recursive: true });
      const all = { subsysnqn: subsystemNqn, hostnqn: hostNqn(nodeId), transport: "tcp", state, ...attributes };
      for (const [key, text] of Object.entries(all)) await Deno.writeTextFile(join(entry, key), `${text}\n`);
    },
    /** Gives every connection that sysfs shows this state. */
    async setStates(state: string): Promise<void> {
      for await (const { name } of Deno.readDir(join(sysfsRoot, "class/nvme"))) {
        await Deno.writeTextFile(join(sysfsRoot, "class/nvme", name, "state"), `${state}\n`);
      }
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

async function tool(program: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await new Deno.Command(program, { args, env: { LC_ALL: "C" } }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
}

for (const [circumstance, volumeHealth] of [["without", false], ["with", true]] as const) {
  nodeTest(
    `the node ${circumstance} the switch announces ${volumeHealth ? "its health calls" : "no health"}`,
    async () => {
      await using n = await startNode({ volumeHealth });

      const { capabilities } = await n.callNode(node.nodeGetCapabilities, {});

      const names = capabilities.map(({ type }) => type.case === "rpc" ? NodeRpc[type.value.type] : "");
      const wanted = volumeHealth ? ["GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH"] : [];
      assert.deepEqual(names.filter((name) => name?.endsWith("_HEALTH")), wanted);
      assert.ok(names.includes("VOLUME_CONDITION"));
    },
  );
}

nodeTest("the health calls of the node answer UNIMPLEMENTED without the switch", async () => {
  await using n = await startNode({ volumeHealth: false });

  await assert.rejects(
    n.callNode(node.nodeGetVolumeHealth, { volumeId: "x" }),
    answers("UNIMPLEMENTED", /NodeGetVolumeHealth/),
  );
  await assert.rejects(n.callNode(node.nodeGetStorageHealth, {}), answers("UNIMPLEMENTED", /NodeGetStorageHealth/));
});

for (const [what, capability] of [["mounted", mountCapability("ext4")], ["raw block", blockCapability()]] as const) {
  nodeTest(`NodeGetVolumeHealth of a healthy ${what} volume tells nothing, with and without its paths`, async () => {
    await using n = await startNode();
    const volumeId = await n.published(capability);

    assert.deepEqual((await n.health(volumeId)).what, []);
    assert.deepEqual((await n.health(volumeId, { volumePublishPath: "", stagingTargetPath: "" })).what, []);
  });

  nodeTest(`NodeGetVolumeHealth of a ${what} volume tells DEGRADED while some connections are down`, async () => {
    await using n = await startNode();
    const volumeId = await n.published(capability);
    await n.connect("nvme90", "connecting");

    const during = await n.health(volumeId);
    await n.connect("nvme90", "live");
    const after = await n.health(volumeId);

    assert.deepEqual(during.what, ["DEGRADED PathsDown"]);
    assert.match(during.messages, /^1 of \d+ connections to nqn\.\S+ are not live \(nvme90 connecting\): reads and /);
    assert.deepEqual(after.what, []);
  });

  nodeTest(`NodeGetVolumeHealth of a ${what} volume tells INACCESSIBLE while no connection is live`, async () => {
    await using n = await startNode();
    const volumeId = await n.published(capability);
    await n.setStates("connecting");

    const during = await n.health(volumeId);
    await n.setStates("live");
    const after = await n.health(volumeId);

    assert.deepEqual(during.what, ["INACCESSIBLE NoLivePath"]);
    assert.match(during.messages, /has no live path to nqn\..* connecting.*reads and writes wait or fail/);
    assert.deepEqual(after.what, []);
  });
}

nodeTest("NodeGetVolumeHealth tells INACCESSIBLE when the device of a mounted volume has gone", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  await n.machine().remove(parseVolumeId(volumeId).uuid);

  const { what, messages } = await n.health(volumeId);

  assert.deepEqual(what, ["INACCESSIBLE DeviceGone"]);
  assert.match(messages, /^ext4 of .* at ".*\/pod" has lost its device: reads and writes fail/);
  // The staging mount alone tells it too.
  const staged = await n.health(volumeId, { volumePublishPath: "", stagingTargetPath: n.stagingTargetPath });
  assert.deepEqual(staged.what, ["INACCESSIBLE DeviceGone"]);
});

nodeTest("NodeGetVolumeHealth tells INACCESSIBLE when a volume for writing has become read-only", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  await tool("mount", "-o", "remount,ro", n.stagingTargetPath);

  const { what, messages } = await n.health(volumeId);

  assert.deepEqual(what, ["INACCESSIBLE ReadOnly"]);
  assert.match(messages, /is read-only although it should not/);
});

nodeTest("NodeGetVolumeHealth tells INACCESSIBLE when the device of a volume cannot be read", async () => {
  await using n = await startNode();
  const volumeId = await n.published(blockCapability());
  const { uuid } = parseVolumeId(volumeId);
  // As before a publish: what is published keeps the device of before the damage.
  await n.callNode(node.nodeUnpublishVolume, { volumeId, targetPath: n.targetPath });
  await n.machine().damage(uuid, "unreadable");

  const during = await n.health(volumeId);
  await n.machine().heal(uuid);
  const after = await n.health(volumeId);

  assert.deepEqual(during.what, ["INACCESSIBLE Unreadable"]);
  assert.match(during.messages, /cannot be read/);
  assert.deepEqual(after.what, []);
});

nodeTest("NodeGetVolumeHealth of a volume that does not answer tells so instead of waiting", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  const { nodeGetVolumeHealth } = nodeHealthHandlers({
    host: n.host,
    probe: conditionProbe({ ...n.host, usage: () => new Promise(() => {}) }, 100),
    hostNqn: hostNqn(nodeId),
    parseId: parseVolumeId,
  });
  const request = create(NodeGetVolumeHealthRequestSchema, { volumeId, volumePublishPath: n.targetPath });

  const { volumeHealth } = await nodeGetVolumeHealth(request, callContext());

  assert.deepEqual(volumeHealth.healthStatuses?.map(({ reason }) => reason), ["NotAnswering"]);
  assert.match(volumeHealth.healthStatuses?.[0]?.message ?? "", /^ext4 of .* at ".*\/pod" has not answered for \d+ s$/);
});

nodeTest("NodeGetVolumeHealth of a volume whose stage was tried tells that no device has come", async () => {
  await using n = await startNode();
  const volumeId = await n.create("v1");

  const { what, messages } = await n.health(volumeId);

  assert.deepEqual(what, ["INACCESSIBLE NoDevice"]);
  assert.equal(messages, "this node has no block device of it");
});

nodeTest("NodeGetVolumeHealth answers NOT_FOUND for a volume that this node knows nothing of", async () => {
  await using n = await startNode();
  const volumeId = await n.create("v1");
  const health = (volumeId: string, stagingTargetPath: string) =>
    n.callNode(node.nodeGetVolumeHealth, { volumeId, stagingTargetPath });

  await assert.rejects(
    health(volumeId, `${n.stagingTargetPath}-other`),
    answers("NOT_FOUND", /^Cannot tell the health of the volume \S+: this node has no block device of it, and none of/),
  );
  await assert.rejects(health(volumeId, "some/path"), answers("NOT_FOUND", /no block device/));
  await assert.rejects(health("none-exist-id", n.stagingTargetPath), answers("NOT_FOUND", /none-exist-id/));
  await assert.rejects(health("", n.stagingTargetPath), answers("INVALID_ARGUMENT", /volume_id is missing/));
});

nodeTest(
  "NodeGetStorageHealth tells nothing while all connections of this driver are live, or there are none",
  async () => {
    await using n = await startNode();
    const without = await n.storage();
    await n.published(blockCapability());
    // A discovery controller, another host's connection and a local drive are none of it.
    await n.connect("nvme90", "connecting", { subsysnqn: "nqn.2014-08.org.nvmexpress.discovery" });
    await n.connect("nvme91", "connecting", { hostnqn: hostNqn("b.node") });
    await n.connect("nvme92", "dead", { transport: "pcie", hostnqn: "" });

    assert.deepEqual(without, []);
    assert.deepEqual(await n.storage(), []);
  },
);

nodeTest(
  "NodeGetStorageHealth tells lost connections as degraded, and a subsystem without any as unreachable",
  async () => {
    await using n = await startNode();
    await n.published(blockCapability());
    await n.connect("nvme90", "connecting");
    const other = { subsysnqn: "nqn.2016-01.com.example:other" };
    await n.connect("nvme91", "connecting", other);
    await n.connect("nvme92", "resetting", other);

    const both = await n.storage();
    await n.connect("nvme90", "live");
    await n.connect("nvme91", "live", other);
    const one = await n.storage();

    assert.deepEqual(both, [
      "STORAGE_UNREACHABLE NoLivePath: this node has no live connection to nqn.2016-01.com.example:other " +
      "(nvme91 connecting, nvme92 resetting)",
      `STORAGE_DEGRADED PathsDown: this node has lost some of its connections to ${n.subsystemNqn} (nvme90 connecting)`,
    ]);
    assert.deepEqual(one, [
      "STORAGE_DEGRADED PathsDown: this node has lost some of its connections to nqn.2016-01.com.example:other " +
      "(nvme92 resetting)",
    ]);
  },
);

// -------------------------------------------------------------------------------------------------------------- switch

/** The names of the health capabilities that a process with these options and variables announces. */
async function announcedBy(role: "controller" | "node", args: readonly string[], env: Record<string, string>) {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-health-" });
  const main = fileURLToPath(new URL("../../main.ts", import.meta.url));
  const process = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", main, role, ...args],
    env: { CSI_ENDPOINT: `unix://${directory}/csi.sock`, LB_CSI_1_13: "", LB_CSI_NODE_ID: nodeId, ...env },
    stdout: "null",
    stderr: "null",
  }).spawn();
  try {
    using channel = new Channel({ address: `unix://${directory}/csi.sock` });
    return await eventually(`the ${role} answers`, async () => {
      const options = { signal: AbortSignal.timeout(5000), deadline: new Date(Date.now() + 5000) };
      try {
        if (role === "node") {
          const { capabilities } = await channel.call(node.nodeGetCapabilities, {}, options);
          return capabilities.map(({ type }) => type.case === "rpc" ? NodeRpc[type.value.type] : "");
        }
        const { capabilities } = await channel.call(controller.controllerGetCapabilities, {}, options);
        return capabilities.map(({ type }) => type.case === "rpc" ? ControllerRpc[type.value.type] : "");
      } catch {
        return undefined;
      }
    }, 30_000).then((names) => names.filter((name) => name?.endsWith("_HEALTH")));
  } finally {
    process.kill("SIGTERM");
    await process.status;
    await Deno.remove(directory, { recursive: true });
  }
}

for (
  const [what, role, args, env, announced] of [
    ["controller", "controller", [], {}, []],
    ["controller --csi-1.13", "controller", ["--csi-1.13"], {}, ["GET_VOLUME_HEALTH"]],
    ["node", "node", [], {}, []],
    ["node with LB_CSI_1_13=true", "node", [], { LB_CSI_1_13: "true" }, ["GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH"]],
  ] as const
) {
  Deno.test(`lbcsi ${what} announces ${announced.join(" and ") || "no health"}`, async () => {
    assert.deepEqual(await announcedBy(role, args, env), announced);
  });
}

/** The health calls of CSI 1.13 on the node, over real sockets. */
import assert from "node:assert/strict";
import { join } from "node:path";
import {
  create,
  type DescMessage,
  type DescMethodUnary,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import { nodeGetVolumeHealth } from "../../../lib/csi/node/health.ts";
import { nodeHandlers } from "../../../lib/csi/node/service.ts";
import { describeRequest, redactRequest } from "../../../lib/csi/request.ts";
import { Channel } from "../../../lib/grpc/client.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../../lib/host/host.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { createLogger } from "../../../lib/log.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import {
  Controller,
  Node,
  NodeGetVolumeHealthRequestSchema,
  NodeServiceCapability_RPC_Type as NodeRpc,
  StorageHealthErrorType as StorageStatus,
} from "../../../proto/gen/csi_pb.ts";
import { answers } from "../../support/controller_service.ts";
import { reportedHealth, startHealth } from "../../support/health.ts";
import { nodeTest } from "../../support/loop_node.ts";
import { blockCapability, callContext, type Capability, mountCapability } from "../../support/node_calls.ts";

const nodeId = "a.node";
const controller = Controller.method;
const node = Node.method;

/** A cluster, a controller, and a node service on the machine that the simulator plays. */
async function startNode({ volumeHealth = true } = {}) {
  await using stack = new AsyncDisposableStack();
  const env = stack.use(await startHealth({ data: "loop" }));
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
    canExpand: true,
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
      return reportedHealth(volumeHealth);
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
      const expected = volumeHealth ? ["GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH"] : [];
      assert.deepEqual(names.filter((name) => name?.endsWith("_HEALTH")), expected);
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
  nodeTest(`NodeGetVolumeHealth of a healthy ${what} volume reports nothing, with and without its paths`, async () => {
    await using n = await startNode();
    const volumeId = await n.published(capability);

    assert.deepEqual((await n.health(volumeId)).what, []);
    assert.deepEqual((await n.health(volumeId, { volumePublishPath: "", stagingTargetPath: "" })).what, []);
  });

  nodeTest(`NodeGetVolumeHealth of a ${what} volume reports DEGRADED while some connections are down`, async () => {
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

  nodeTest(`NodeGetVolumeHealth of a ${what} volume reports INACCESSIBLE while no connection is live`, async () => {
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

nodeTest("NodeGetVolumeHealth reports INACCESSIBLE when the device of a mounted volume has gone", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  await n.machine().remove(parseVolumeId(volumeId).uuid);

  const { what, messages } = await n.health(volumeId);

  assert.deepEqual(what, ["INACCESSIBLE DeviceGone"]);
  assert.match(messages, /^ext4 of .* at ".*\/pod" has lost its device: reads and writes fail/);
  // The staging mount alone shows it too.
  const staged = await n.health(volumeId, { volumePublishPath: "", stagingTargetPath: n.stagingTargetPath });
  assert.deepEqual(staged.what, ["INACCESSIBLE DeviceGone"]);
});

nodeTest("NodeGetVolumeHealth reports INACCESSIBLE when a volume for writing has become read-only", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  await tool("mount", "-o", "remount,ro", n.stagingTargetPath);

  const { what, messages } = await n.health(volumeId);

  assert.deepEqual(what, ["INACCESSIBLE ReadOnly"]);
  assert.match(messages, /is read-only although it should not/);
});

nodeTest("NodeGetVolumeHealth reports INACCESSIBLE when the device of a volume cannot be read", async () => {
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

nodeTest("NodeGetVolumeHealth of a volume that does not answer says so instead of waiting", async () => {
  await using n = await startNode();
  const volumeId = await n.published();
  const host: Host = { ...n.host, usage: () => new Promise(() => {}) };
  const options = { host, longestAnswerMs: 100, parseId: parseVolumeId };
  const request = create(NodeGetVolumeHealthRequestSchema, { volumeId, volumePublishPath: n.targetPath });

  const { volumeHealth } = await nodeGetVolumeHealth(options, request, callContext());

  assert.deepEqual(volumeHealth.healthStatuses?.map(({ reason }) => reason), ["NotAnswering"]);
  assert.match(volumeHealth.healthStatuses?.[0]?.message ?? "", /^ext4 of .* at ".*\/pod" has not answered for \d+ s$/);
});

nodeTest("NodeGetVolumeHealth of a volume whose stage has failed reports that no device has come", async () => {
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
    answers(
      "NOT_FOUND",
      /^Cannot report the health of the volume \S+: this node has no block device of it, and none of/,
    ),
  );
  await assert.rejects(health(volumeId, "some/path"), answers("NOT_FOUND", /no block device/));
  await assert.rejects(health("none-exist-id", n.stagingTargetPath), answers("NOT_FOUND", /none-exist-id/));
  await assert.rejects(health("", n.stagingTargetPath), answers("INVALID_ARGUMENT", /volume_id is missing/));
});

nodeTest(
  "NodeGetStorageHealth reports nothing while all connections of this driver are live, or there are none",
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
  "NodeGetStorageHealth reports lost connections as degraded, and a subsystem without any as unreachable",
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

/**
 * Many calls at once, through real sockets, on real loop devices: no cross-talk, no leak, one call per volume at a
 * time.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { sleep } from "../../lib/timing.ts";
import { controllerHandlers } from "../../lib/csi/controller/service.ts";
import { nodeHandlers } from "../../lib/csi/node/service.ts";
import type { StatusCode } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { createLogger } from "../../lib/log.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { parseVolumeId } from "../../lib/volume_id.ts";
import { Controller, Node } from "../../proto/gen/csi_pb.ts";
import { openLightos } from "../support/backends.ts";
import { needs } from "../support/needs.ts";
import { blockCapability, type Capability, mountCapability } from "../support/node_calls.ts";
import { eventually, startSimulator } from "../support/simulator.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");
const gib = 1n << 30n;
const nodeId = "crowd.node";
const { createVolume, deleteVolume, controllerPublishVolume, controllerUnpublishVolume } = Controller.method;
const { nodeStageVolume, nodeUnstageVolume, nodePublishVolume, nodeUnpublishVolume } = Node.method;

/** Controller and node behind sockets of their own, with a simulated cluster and machine. */
async function start() {
  await using stack = new AsyncDisposableStack();
  const sim = stack.use(await startSimulator({ data: "loop" }));
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-crowd-" }));
  const mounts = async () => {
    const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
    return table.map(({ path }) => path).filter((path) => path.startsWith(`${directory}/`));
  };
  stack.defer(async () => {
    // Never through a mount into a file system.
    for (const path of (await mounts()).toReversed()) await new Deno.Command("umount", { args: [path] }).output();
    assert.deepEqual(await mounts(), []);
    await Deno.remove(directory, { recursive: true });
  });
  const log = createLogger("error");
  const backend = stack.use(openLightos(sim, { log }));
  const { discoveryDir = "", devRoot = "", sysfsRoot = "" } = sim.addresses;
  const host = createLinuxHost({ log, sysfsRoot, devRoot });
  const services = {
    controller: service(
      Controller,
      controllerHandlers({ backend, locks: new KeyedLock(), defaultFsType: "ext4", nodeIdSuffix: ".node" }),
    ),
    node: service(
      Node,
      nodeHandlers({
        host,
        attacher: createDiscoveryClientAttacher({ host, directory: discoveryDir, hostNqn: hostNqn(nodeId) }),
        locks: new KeyedLock(),
        nodeId,
        defaultFsType: "ext4",
        parseId: (text) => parseVolumeId(text),
        canExpand: true,
      }),
    ),
  };
  const open = async (name: keyof typeof services): Promise<Channel> => {
    const path = join(directory, `${name}.sock`);
    const server = await serve({ listen: { path }, services: [services[name]], log });
    stack.defer(() => server.stop(5000));
    return stack.use(new Channel({ address: `unix://${path}` }));
  };
  const controller = await open("controller");
  const node = await open("node");
  const volume = async (name: string, capability: Capability): Promise<Volume> => {
    const staging = join(directory, "staging", name);
    const pod = join(directory, "pods", name);
    for (const path of [staging, pod]) await Deno.mkdir(path, { recursive: true });
    return { name, capability, staging, target: join(pod, "volume"), id: "", publishContext: {} };
  };
  const parts = stack.move();
  return {
    sim,
    directory,
    discoveryDir,
    controller,
    node,
    mounts,
    volume,
    async create(volume: Volume): Promise<void> {
      const { volume: made } = await call(controller, createVolume, {
        name: volume.name,
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [volume.capability],
        parameters: {
          "mgmt-endpoint": sim.addresses.grpc.join(","),
          "mgmt-scheme": "grpc",
          "replica-count": "1",
          "project-name": "default",
          // A journal of the usual size is most of what mkfs writes.
          ...(volume.capability.accessType?.case === "mount" ? { "mkfs-options": "-J size=4" } : {}),
        },
      });
      volume.id = made?.volumeId ?? "";
    },
    async attach(volume: Volume): Promise<void> {
      const request = { volumeId: volume.id, nodeId, volumeCapability: volume.capability };
      volume.publishContext = (await call(controller, controllerPublishVolume, request)).publishContext;
    },
    async stage({ id, publishContext, staging, capability }: Volume): Promise<void> {
      const volumeContext = capability.accessType?.case === "mount" ? { "mkfs-options": "-J size=4" } : {};
      const request = { volumeId: id, publishContext, volumeContext, stagingTargetPath: staging };
      await call(node, nodeStageVolume, { ...request, volumeCapability: capability });
    },
    async publish({ id, publishContext, staging, target, capability }: Volume): Promise<void> {
      const request = { volumeId: id, publishContext, stagingTargetPath: staging, targetPath: target };
      await call(node, nodePublishVolume, { ...request, volumeCapability: capability });
    },
    async unpublish({ id, target }: Volume): Promise<void> {
      await call(node, nodeUnpublishVolume, { volumeId: id, targetPath: target });
    },
    async unstage({ id, staging }: Volume): Promise<void> {
      await call(node, nodeUnstageVolume, { volumeId: id, stagingTargetPath: staging });
    },
    async detach({ id }: Volume): Promise<void> {
      await call(controller, controllerUnpublishVolume, { volumeId: id, nodeId });
    },
    async delete({ id }: Volume): Promise<void> {
      await call(controller, deleteVolume, { volumeId: id });
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

interface Volume {
  readonly name: string;
  readonly capability: Capability;
  readonly staging: string;
  readonly target: string;
  id: string;
  publishContext: Record<string, string>;
}

const longestCallMs = 900_000;

/**
 * Calls as an orchestrator does: a call whose connection was lost is sent again until it is known what became of it. On
 * a machine that is busy with other work this process, with both ends in it, can be late for its own keepalive.
 */
async function call<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
): Promise<MessageShape<O>> {
  // Against a call that never ends, and no measure of speed.
  const until = { signal: AbortSignal.timeout(longestCallMs + 5000), deadline: new Date(Date.now() + longestCallMs) };
  for (let wasLost = false;;) {
    try {
      return await channel.call(method, request, until);
    } catch (error) {
      if (!(error instanceof CallError)) throw error;
      const isLost = error.code === "UNAVAILABLE" &&
        (error.origin !== "server" || /was lost during|no LightOS management endpoint answers/.test(error.message));
      // What was lost may still be running.
      if (!isLost && !(wasLost && error.code === "ABORTED")) throw error;
      wasLost = true;
      await sleep(100, until.signal);
    }
  }
}

/** Does `work` for each item, with so many in flight. */
async function inFlight<T>(count: number, items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = [...items];
  const failures: unknown[] = [];
  // All have ended when the first failure is reported: no call runs after the test.
  await Promise.all(Array.from({ length: count }, async () => {
    for (let next = queue.shift(); next !== undefined && failures.length === 0; next = queue.shift()) {
      await work(next).catch((error) => failures.push(error));
    }
  }));
  if (failures.length > 0) throw failures[0];
}

/** The error of a call; undefined when it succeeds. */
function errorOf(work: Promise<unknown>): Promise<CallError | undefined> {
  return work.then(() => undefined, (error) => {
    if (error instanceof CallError) return error;
    throw error;
  });
}

function assertFailed(error: CallError | undefined, code: StatusCode, message: RegExp): void {
  assert(error !== undefined, "the call did not fail");
  assert.equal(error.code, code, error.message);
  assert.match(error.message, message);
}

/**
 * Sends a call twice at once: one of them must succeed, and the other may fail with ABORTED; answers how many failed.
 */
async function twice(work: () => Promise<void>): Promise<number> {
  const results = await Promise.allSettled([errorOf(work()), errorOf(work())]);
  const outcomes = results.map((one) => {
    if (one.status === "fulfilled") return one.value;
    throw one.reason;
  });
  const losers = outcomes.filter((error) => error !== undefined);
  const holder =
    /^Cannot start (\w+) for volume (name )?\S+( and node "\S+")?: \1 has been running for \d+ s, repeat the call later$/;
  for (const loser of losers) assertFailed(loser, "ABORTED", holder);
  assert(losers.length < 2, "both calls failed");
  return losers.length;
}

/** What a pod finds of its own in a volume: the volume's UUID and text that only it has. */
async function mark({ id, target, capability }: Volume, how: "write" | "read"): Promise<string> {
  const path = capability.accessType?.case === "block" ? target : join(target, "mark");
  const own = new TextEncoder().encode(id.padEnd(4096, "."));
  if (how === "write") {
    using file = await Deno.open(path, { write: true, create: capability.accessType?.case !== "block" });
    assert.equal(await file.write(own), own.length);
    await file.sync();
  }
  using file = await Deno.open(path, { read: true });
  const bytes = new Uint8Array(own.length);
  assert.equal(await file.read(bytes), own.length);
  return new TextDecoder().decode(bytes).replace(/\.+$/, "");
}

Deno.test({
  name: "promise 9: 200 volumes, 50 at a time, some calls sent twice, keep their contents apart and leave nothing",
  ignore,
  async fn() {
    await using env = await start();
    const running = new Map<string, string>();
    const overlaps: string[] = [];
    using _watch = env.sim.control.watchCalls(({ phase, rpc, subject }) => {
      if (subject === "") return;
      if (phase === "end") return void running.delete(subject);
      const other = running.get(subject);
      if (other !== undefined) overlaps.push(`${rpc} during ${other} of ${subject}`);
      running.set(subject, rpc);
    });
    // A tenth are file systems, which cost ten times as much.
    const volumes = await Promise.all(
      Array.from(
        { length: 200 },
        (_, n) => env.volume(`crowd-${n}`, n % 10 === 0 ? mountCapability("ext4") : blockCapability()),
      ),
    );
    const found = new Map<string, string[]>();
    let losers = 0;
    // A quarter of them has every call sent twice at once, and is attached a second time.
    const chosen = new Set(volumes.filter((_, n) => n % 4 === 0));
    const race = async (step: (volume: Volume) => Promise<void>, volume: Volume) => {
      if (chosen.has(volume)) losers += await twice(() => step(volume));
      else await step(volume);
    };
    const pass = async (volume: Volume, how: "write" | "read") => {
      await race(env.attach, volume);
      await race(env.stage, volume);
      await race(env.publish, volume);
      found.set(volume.id, [...found.get(volume.id) ?? [], await mark(volume, how)]);
      await race(env.unpublish, volume);
      await race(env.unstage, volume);
      await race(env.detach, volume);
    };

    await inFlight(50, volumes, (volume) => race(env.create, volume));
    const managed = env.sim.control.cluster.volumes.length;
    await inFlight(50, volumes, (volume) => pass(volume, "write"));
    // A device whose access was taken away a moment ago may still be there for NodeStageVolume, and go after it.
    await env.sim.control.waitUntilSettled();
    await inFlight(50, [...chosen], (volume) => pass(volume, "read"));
    await inFlight(50, volumes, (volume) => race(env.delete, volume));

    assert.equal(managed, 200);
    assert.equal(new Set(volumes.map(({ id }) => id)).size, 200);
    for (const volume of volumes) {
      const { id } = volume;
      const times = chosen.has(volume) ? 2 : 1;
      assert.deepEqual(found.get(id) ?? [], Array(times).fill(id));
    }
    for (const { publishContext, id } of volumes) assert.equal(publishContext["uuid"], parseVolumeId(id).uuid);
    assert.deepEqual(overlaps, []);
    assert(losers > 0, "no call failed because another one runs");
    await eventually("the cluster is empty", () => {
      return Object.values(env.sim.control.leftovers()).every((left) => left.length === 0);
    }, longestCallMs);
    assert.deepEqual(await env.mounts(), []);
    assert.deepEqual([...Deno.readDirSync(env.discoveryDir)].map(({ name }) => name), []);
    for (const { staging, target } of volumes) {
      await Deno.remove(staging);
      await assert.rejects(Deno.lstat(target), Deno.errors.NotFound);
    }
  },
});

Deno.test({
  name:
    "promise 9: while a volume is busy at the controller, a second call fails naming the holder, and calls for other volumes go on",
  ignore,
  async fn() {
    await using env = await start();
    const [busy, other] = await Promise.all(["busy", "other"].map((name) => env.volume(name, blockCapability())));
    assert(busy !== undefined && other !== undefined);
    await Promise.all([env.create(busy), env.create(other)]);
    env.sim.control.fail({ rpc: "UpdateVolume", hold: true });

    const first = env.attach(busy);
    first.catch(() => {}); // Looked at below, unless something else fails before.
    await eventually("the first call is at the cluster", () => env.sim.control.held().length === 1);
    const before = env.sim.control.callsInAll();
    const { uuid } = parseVolumeId(busy.id);
    const abortedFor = (call: string, holder: string) =>
      new RegExp(
        `^Cannot start ${call} for volume ${uuid}${holder}: ControllerPublishVolume has been running for \\d+ s, ` +
          `repeat the call later$`,
      );
    assertFailed(
      await errorOf(env.detach(busy)),
      "ABORTED",
      abortedFor("ControllerUnpublishVolume", ` and node "${nodeId}"`),
    );
    assertFailed(await errorOf(env.delete(busy)), "ABORTED", abortedFor("DeleteVolume", ""));
    const refusedCalls = env.sim.control.callsInAll() - before;
    await env.attach(other);
    env.sim.control.releaseHeld();
    await first;

    assert.equal(refusedCalls, 0);
    assert.deepEqual(
      env.sim.control.leftovers().access.toSorted(),
      [busy, other].map(({ id }) => `${parseVolumeId(id).uuid} ${hostNqn(nodeId)}`).sort(),
    );
    for (const volume of [busy, other]) await env.detach(volume);
  },
});

Deno.test({
  name:
    "promise 9: while a volume is busy on the node, a second call fails naming the holder, and calls for other volumes go on",
  ignore,
  async fn() {
    await using env = await start();
    const [busy, other] = await Promise.all(["busy", "other"].map((name) => env.volume(name, blockCapability())));
    assert(busy !== undefined && other !== undefined);
    for (const volume of [busy, other]) {
      await env.create(volume);
      await env.attach(volume);
    }
    // Its device stays away, so that the stage waits.
    await env.detach(busy);
    const entry = join(env.discoveryDir, parseVolumeId(busy.id).uuid);

    const first = env.stage(busy);
    first.catch(() => {}); // Looked at below, unless something else fails before.
    await eventually("the first call waits for its device", () => Deno.lstat(entry).then(() => true, () => false));
    const holder = `volume ${
      parseVolumeId(busy.id).uuid
    }: NodeStageVolume has been running for \\d+ s, repeat the call`;
    for (
      const [rpc, work] of [
        ["NodeStageVolume", env.stage],
        ["NodePublishVolume", env.publish],
        ["NodeUnpublishVolume", env.unpublish],
        ["NodeUnstageVolume", env.unstage],
      ] as const
    ) {
      assertFailed(await errorOf(work(busy)), "ABORTED", new RegExp(`^Cannot start ${rpc} for ${holder}`));
    }
    await env.stage(other);
    await env.publish(other);
    assert.equal(await mark(other, "write"), other.id);
    await env.attach(busy);
    await first;

    await env.publish(busy);
    assert.equal(await mark(busy, "write"), busy.id);
    assert.equal(await mark(other, "read"), other.id);
    for (const volume of [busy, other]) {
      await env.unpublish(volume);
      await env.unstage(volume);
      await env.detach(volume);
    }
  },
});

/**
 * Kills the driver at every step of every flow, for real: processes, sockets, loop devices, mounts and SIGKILL.
 *
 * usage: deno task test:faults [--backend lightos|poseidon] [--only TEXT] [--workers COUNT] [--keep]
 *
 * A controller is killed while its k-th call of the management API waits in the simulator, before the call's effect and
 * after it (the answer is never sent). A node is killed while its k-th tool waits: before it starts (it dies with the
 * node), before it starts but goes on alone while the repeat runs (as mkfs does when only the driver is killed), and after
 * it has ended. Either is also killed after its last step, so that its answer is lost. Then the process is started
 * again, and
 *
 * - `retry`: the call is repeated until it answers OK, as the orchestrator does;
 * - `undo`: the orchestrator changes its mind and repeats the opposite call until that answers OK.
 *
 * The volume's life continues from there to its deletion; data written before is read back, and at the end nothing may be
 * left on the cluster (volumes, snapshots, access list entries, devices) or the machine (mounts, loop devices, entries of
 * the Discovery-Client, files, processes).
 *
 * What of the node is cut between two tools: publish makes the target before its mount, unpublish removes it after its
 * umount, unstage removes the entry after its umount; so each of these lies between two cut points of the table. A stage
 * writes the discovery entry before its first tool, in more than one step: strace kills the node before it renames the
 * finished file. Every call to the machine, those that only look included, is cut off in cutoff_test.ts.
 *
 * Exit status: 0 when every life ended well and at least one cut was made in every flow; 1 otherwise.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import * as z from "zod";
import { type Backend, Testbed } from "../../lib/demo/testbed.ts";
import { messageOf } from "../../lib/error.ts";
import { CallError, type Channel } from "../../lib/grpc/client.ts";
import {
  Controller,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeContentSourceSchema,
  VolumeUsage_Unit as Unit,
} from "../../proto/gen/csi_pb.ts";
import { needs } from "../support/needs.ts";
import { eventually } from "../support/simulator.ts";
import { type ToolShims, toolShims } from "../support/tool_shims.ts";

const gib = 1n << 30n;
const nodeId = "faults.node";
/** Longer than any repeat should take; the orchestrator would go on. */
const convergeMs = 30_000;

const { values: settings } = parseArgs({
  options: {
    backend: { type: "string", default: "lightos" },
    only: { type: "string", default: "" },
    workers: { type: "string", default: "3" },
    keep: { type: "boolean", default: false },
  },
});
const backends: readonly Backend[] = ["lightos", "poseidon"];
const backend = backends.find((name) => name === settings.backend) ?? "lightos";
assert.equal(backend, settings.backend, `--backend is one of ${backends.join(", ")}`);

type Kind = "ext4" | "xfs" | "block";
type Step =
  | "create"
  | "attach"
  | "stage"
  | "publish"
  | "publish read-only"
  | "data"
  | "grow"
  | "grow node"
  | "unpublish"
  | "unstage"
  | "detach"
  | "delete"
  | "snapshot"
  | "delete snapshot"
  | "restore"
  | "clone"
  | "life of the copy"
  | "delete the copy";

/** What follows a state of the volume, to the end of its life. */
const lifeAfter = {
  nothing: ["create", "attach", "stage", "publish", "data", "unpublish", "unstage", "detach", "delete"],
  created: ["attach", "stage", "publish", "data", "unpublish", "unstage", "detach", "delete"],
  attached: ["stage", "publish", "data", "unpublish", "unstage", "detach", "delete"],
  staged: ["publish", "data", "unpublish", "unstage", "detach", "delete"],
  published: ["data", "unpublish", "unstage", "detach", "delete"],
  "published read-only": ["unpublish", "publish", "data", "unpublish", "unstage", "detach", "delete"],
  deleted: [],
} as const satisfies Record<string, readonly Step[]>;

const upTo = {
  attached: ["create", "attach"],
  staged: ["create", "attach", "stage"],
  published: ["create", "attach", "stage", "publish", "data"],
  unpublished: ["create", "attach", "stage", "publish", "data", "unpublish"],
  unstaged: ["create", "attach", "stage", "publish", "data", "unpublish", "unstage"],
  detached: ["create", "attach", "stage", "publish", "data", "unpublish", "unstage", "detach"],
} as const satisfies Record<string, readonly Step[]>;

interface Flow {
  readonly name: string;
  readonly on: "controller" | "node";
  readonly kind: Kind;
  readonly before: readonly Step[];
  readonly cut: Step;
  /** What follows the repeat. */
  readonly then: readonly Step[];
  /** The opposite call, or a repeat where that is what allows the opposite, and what follows. */
  readonly undo: readonly Step[];
}

const flows: readonly Flow[] = [
  // The ID of a volume or snapshot is known from the answer only: CSI has the orchestrator repeat the call before it may
  // delete, and an orchestrator that has changed its mind does so.
  {
    name: "CreateVolume",
    on: "controller",
    kind: "block",
    before: [],
    cut: "create",
    then: lifeAfter.created,
    undo: ["create", "delete"],
  },
  {
    name: "ControllerPublishVolume",
    on: "controller",
    kind: "block",
    before: ["create"],
    cut: "attach",
    then: lifeAfter.attached,
    undo: ["detach", "delete"],
  },
  {
    name: "ControllerUnpublishVolume",
    on: "controller",
    kind: "block",
    before: upTo.unstaged,
    cut: "detach",
    then: ["delete"],
    undo: lifeAfter.created,
  },
  {
    name: "ControllerExpandVolume",
    on: "controller",
    kind: "xfs",
    before: upTo.published,
    cut: "grow",
    then: ["grow node", ...lifeAfter.published],
    undo: lifeAfter.published,
  },
  {
    name: "DeleteVolume",
    on: "controller",
    kind: "block",
    before: upTo.detached,
    cut: "delete",
    then: lifeAfter.deleted,
    undo: lifeAfter.nothing,
  },
  {
    name: "CreateSnapshot",
    on: "controller",
    kind: "block",
    before: upTo.published,
    cut: "snapshot",
    then: ["restore", "life of the copy", "delete snapshot", ...lifeAfter.published],
    undo: ["snapshot", "delete snapshot", ...lifeAfter.published],
  },
  {
    name: "DeleteSnapshot",
    on: "controller",
    kind: "block",
    before: [...upTo.published, "snapshot"],
    cut: "delete snapshot",
    then: lifeAfter.published,
    undo: ["snapshot", "restore", "life of the copy", "delete snapshot", ...lifeAfter.published],
  },
  {
    name: "CreateVolume, from a snapshot",
    on: "controller",
    kind: "block",
    before: [...upTo.published, "snapshot"],
    cut: "restore",
    then: ["life of the copy", "delete snapshot", ...lifeAfter.published],
    undo: ["restore", "delete the copy", "delete snapshot", ...lifeAfter.published],
  },
  {
    name: "CreateVolume, larger clone of an xfs volume",
    on: "controller",
    kind: "xfs",
    before: upTo.published,
    cut: "clone",
    then: ["life of the copy", ...lifeAfter.published],
    undo: ["clone", "delete the copy", ...lifeAfter.published],
  },
  {
    name: "DeleteVolume, clone",
    on: "controller",
    kind: "block",
    before: [...upTo.published, "clone"],
    cut: "delete the copy",
    then: lifeAfter.published,
    undo: ["clone", "life of the copy", ...lifeAfter.published],
  },
  ...(["ext4", "xfs"] as const).flatMap((kind): Flow[] => [
    {
      name: `NodeStageVolume, new ${kind}`,
      on: "node",
      kind,
      before: upTo.attached,
      cut: "stage",
      then: lifeAfter.staged,
      undo: ["unstage", ...lifeAfter.attached],
    },
    {
      name: `NodeStageVolume, ${kind} with data`,
      on: "node",
      kind,
      before: upTo.unstaged,
      cut: "stage",
      then: lifeAfter.staged,
      undo: ["unstage", ...lifeAfter.created],
    },
  ]),
  {
    name: "NodeStageVolume, ext4 on a grown device",
    on: "node",
    kind: "ext4",
    before: [...upTo.unstaged, "grow"],
    cut: "stage",
    then: lifeAfter.staged,
    undo: ["unstage", ...lifeAfter.created],
  },
  {
    name: "NodeStageVolume, block",
    on: "node",
    kind: "block",
    before: upTo.attached,
    cut: "stage",
    then: lifeAfter.staged,
    undo: ["unstage", "detach", "delete"],
  },
  ...(["ext4", "block"] as const).map((kind): Flow => ({
    name: `NodePublishVolume, ${kind}`,
    on: "node",
    kind,
    before: upTo.staged,
    cut: "publish",
    then: lifeAfter.published,
    undo: ["unpublish", ...lifeAfter.staged],
  })),
  {
    name: "NodePublishVolume, block read-only",
    on: "node",
    kind: "block",
    before: upTo.unpublished,
    cut: "publish read-only",
    then: lifeAfter["published read-only"],
    undo: ["unpublish", ...lifeAfter.staged],
  },
  {
    name: "NodeExpandVolume, xfs",
    on: "node",
    kind: "xfs",
    before: [...upTo.published, "grow"],
    cut: "grow node",
    then: lifeAfter.published,
    // Growth cannot be undone; the volume is staged again, and must have its new size then.
    undo: ["unpublish", "unstage", ...lifeAfter.attached],
  },
  ...(["ext4", "block"] as const).map((kind): Flow => ({
    name: `NodeUnpublishVolume, ${kind}`,
    on: "node",
    kind,
    before: upTo.published,
    cut: "unpublish",
    then: lifeAfter.staged,
    undo: lifeAfter.staged,
  })),
  {
    name: "NodeUnpublishVolume, block read-only",
    on: "node",
    kind: "block",
    before: [...upTo.unpublished, "publish read-only"],
    cut: "unpublish",
    then: lifeAfter.staged,
    undo: ["publish read-only", "unpublish", ...lifeAfter.staged],
  },
  {
    name: "NodeUnstageVolume, ext4",
    on: "node",
    kind: "ext4",
    before: upTo.unpublished,
    cut: "unstage",
    then: lifeAfter.created,
    undo: lifeAfter.attached,
  },
];

// ----------------------------------------------------------------------------------------------------------- the place

/** A simulator, a controller and a node that can be killed anywhere. */
interface Place extends AsyncDisposable {
  readonly testbed: Testbed;
  readonly shims: ToolShims;
  startNode(): Promise<void>;
  startController(): Promise<void>;
}

const program = [Deno.execPath(), "run", "-A", fileURLToPath(new URL("../../main.ts", import.meta.url))];
/** Aborts when a user ends the run; every worker then cleans up. */
const interruption = new AbortController();
const patience = AbortSignal.any([AbortSignal.timeout(15 * 60_000), interruption.signal]);

async function openPlace(keep: boolean, report: (condition: string) => void): Promise<Place> {
  // The kernel's mount table shows paths without symbolic links.
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-faults-" }));
  const testbed = new Testbed(home, program, { backend });
  const dispose = async () => {
    await testbed.stopAll();
    for (const { done, what } of await testbed.cleanUp(keep)) report(`${done ? "cleaned up" : "left"}: ${what}`);
    if (keep) report(`kept: ${home}`);
  };
  try {
    await testbed.startSimulator("loop", patience);
    const shims = await toolShims(home, backend === "poseidon" ? testbed.addresses.programs : undefined);
    // Long enough that calls meet the states in between, short enough not to delay the run.
    const times = backend === "poseidon" ? { callMs: 5 } : { creationMs: 20, deletionMs: 150, updateMs: 50 };
    await testbed.ask("PATCH", "/behaviour", times);
    const startNode = async () => void await testbed.startNode(nodeId, patience, { PATH: shims.path });
    const startController = async () => void await testbed.startController(patience);
    await Promise.all([startController(), startNode()]);
    return { testbed, shims, startNode, startController, [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** One volume, with everything that an orchestrator remembers about it. */
interface Volume {
  readonly name: string;
  readonly kind: Kind;
  readonly staging: string;
  readonly pod: string;
  readonly target: string;
  readonly pattern: Uint8Array;
  readonly capability: NonNullable<MessageInitShape<typeof Node.method.nodeStageVolume.input>["volumeCapability"]>;
  id: string;
  publishContext: Record<string, string>;
  volumeContext: Record<string, string>;
  snapshotId: string;
  /** The volume that was made from it, or is being made. */
  copy: Volume | undefined;
  hasData: boolean;
  /** Bytes that it has on the cluster. */
  clusterBytes: bigint;
  /** Bytes that it must show. */
  sizeBytes: bigint;
}

async function newVolume({ testbed }: Place, kind: Kind): Promise<Volume> {
  const name = `faults-${crypto.randomUUID()}`;
  const staging = join(testbed.home, "staging", name);
  const pod = join(testbed.home, "pods", name);
  // The orchestrator makes the staging directory and the parent of the target path; the driver makes the target path.
  for (const directory of [staging, pod]) await Deno.mkdir(directory, { recursive: true });
  return {
    name,
    kind,
    staging,
    pod,
    target: join(pod, "volume"),
    pattern: crypto.getRandomValues(new Uint8Array(64 << 10)),
    capability: {
      accessType: kind === "block" ? { case: "block", value: {} } : { case: "mount", value: { fsType: kind } },
      accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
    },
    id: "",
    publishContext: {},
    volumeContext: {},
    snapshotId: "",
    copy: undefined,
    hasData: false,
    clusterBytes: gib,
    sizeBytes: gib,
  };
}

async function call<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
): Promise<MessageShape<O>> {
  return await channel.call(method, request, { signal: patience, deadline: new Date(Date.now() + 30_000) });
}

/** Takes one step of the volume's life; rejects with CallError when the driver answers with an error. */
async function take(step: Step, place: Place, volume: Volume): Promise<void> {
  await actions[step](place, volume);
}

type Action = (place: Place, volume: Volume) => Promise<void>;

const actions: Readonly<Record<Step, Action>> = {
  create: createAgain,
  restore: (place, volume) => copy(place, volume, gib, { case: "snapshot", value: { snapshotId: volume.snapshotId } }),
  clone: (place, volume) => copy(place, volume, 2n * gib, { case: "volume", value: { volumeId: volume.id } }),
  "life of the copy": lifeOfCopy,
  "delete the copy": deleteCopy,
  snapshot: takeSnapshot,
  "delete snapshot": async ({ testbed: { controller, secrets } }, { snapshotId }) => {
    await call(controller, Controller.method.deleteSnapshot, { snapshotId, secrets });
  },
  attach: async ({ testbed: { controller, secrets } }, volume) => {
    const { id: volumeId, capability: volumeCapability, volumeContext } = volume;
    const request = { volumeId, nodeId, volumeCapability, volumeContext, secrets };
    const answer = await call(controller, Controller.method.controllerPublishVolume, request);
    volume.publishContext = answer.publishContext;
  },
  stage: async ({ testbed: { node } }, volume) => {
    const { id: volumeId, publishContext, volumeContext, staging: stagingTargetPath } = volume;
    const request = { volumeId, publishContext, volumeContext, stagingTargetPath, volumeCapability: volume.capability };
    await call(node, Node.method.nodeStageVolume, request);
    volume.sizeBytes = volume.clusterBytes;
  },
  publish: (place, volume) => publish(place, volume, false),
  "publish read-only": async (place, volume) => {
    await publish(place, volume, true);
    await assert.rejects(writeAt(volume.target, 0n, new Uint8Array(4096)), "a read-only volume was written");
  },
  data: ({ testbed }, volume) => data(testbed, volume),
  grow: async ({ testbed: { controller, secrets } }, volume) => {
    const capacityRange = { requiredBytes: 2n * gib };
    const request = { volumeId: volume.id, capacityRange, volumeCapability: volume.capability, secrets };
    const grown = await call(controller, Controller.method.controllerExpandVolume, request);
    assert.equal(grown.capacityBytes, 2n * gib);
    volume.clusterBytes = 2n * gib;
  },
  "grow node": growNode,
  unpublish: async ({ testbed: { node } }, { id: volumeId, target: targetPath }) => {
    await call(node, Node.method.nodeUnpublishVolume, { volumeId, targetPath });
    await assert.rejects(Deno.lstat(targetPath), Deno.errors.NotFound, "the target path is left");
  },
  unstage: async ({ testbed: { node } }, { id: volumeId, staging: stagingTargetPath }) => {
    await call(node, Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath });
  },
  detach: async ({ testbed: { controller, secrets } }, { id: volumeId }) => {
    await call(controller, Controller.method.controllerUnpublishVolume, { volumeId, nodeId, secrets });
  },
  delete: async ({ testbed: { controller, secrets } }, { id: volumeId }) => {
    await call(controller, Controller.method.deleteVolume, { volumeId, secrets });
  },
};

async function createAgain({ testbed }: Place, volume: Volume): Promise<void> {
  // A volume of PoseidonOS that is created again has the same UUID, but none of its data.
  const exists = (await testbed.observe()).volumes.some(({ uuid }) => volume.id.includes(uuid));
  const before = volume.id;
  await create(testbed, volume);
  if (volume.id !== before || !exists) volume.hasData = false;
}

/** Creates a volume from a snapshot or another volume. */
async function copy(place: Place, volume: Volume, clusterBytes: bigint, type: ContentSource): Promise<void> {
  const made = volume.copy ??= {
    ...await newVolume(place, volume.kind),
    pattern: volume.pattern,
    hasData: true,
    clusterBytes,
  };
  await create(place.testbed, made, { type });
}

async function lifeOfCopy(place: Place, volume: Volume): Promise<void> {
  const { copy } = volume;
  assert(copy !== undefined);
  for (const directory of [copy.staging, copy.pod]) await Deno.mkdir(directory, { recursive: true });
  for (const next of lifeAfter.created) await take(next, place, copy);
  for (const directory of [copy.staging, copy.pod]) await Deno.remove(directory);
  volume.copy = undefined;
}

async function deleteCopy(place: Place, { copy }: Volume): Promise<void> {
  assert(copy !== undefined);
  await take("delete", place, copy);
  for (const directory of [copy.staging, copy.pod]) await Deno.remove(directory).catch(() => {});
}

async function takeSnapshot({ testbed: { controller, secrets } }: Place, volume: Volume): Promise<void> {
  const request = { name: `${volume.name}-snapshot`, sourceVolumeId: volume.id, secrets };
  const { snapshot } = await call(controller, Controller.method.createSnapshot, request);
  assert(snapshot !== undefined && snapshot.sizeBytes === gib && snapshot.readyToUse);
  volume.snapshotId = snapshot.snapshotId;
}

async function publish({ testbed: { node } }: Place, volume: Volume, readonly: boolean): Promise<void> {
  const { publishContext, volumeContext, capability: volumeCapability } = volume;
  await call(node, Node.method.nodePublishVolume, {
    volumeId: volume.id,
    publishContext,
    volumeContext,
    stagingTargetPath: volume.staging,
    targetPath: volume.target,
    volumeCapability,
    readonly,
  });
}

async function growNode({ testbed: { node } }: Place, volume: Volume): Promise<void> {
  const grown = await call(node, Node.method.nodeExpandVolume, {
    volumeId: volume.id,
    volumePath: volume.target,
    stagingTargetPath: volume.staging,
    capacityRange: { requiredBytes: volume.clusterBytes },
    volumeCapability: volume.capability,
  });
  assert.equal(grown.capacityBytes, volume.clusterBytes);
  volume.sizeBytes = volume.clusterBytes;
}

type ContentSource = Required<MessageInitShape<typeof VolumeContentSourceSchema>>["type"];

async function create(
  testbed: Testbed,
  volume: Volume,
  volumeContentSource?: MessageInitShape<typeof VolumeContentSourceSchema>,
): Promise<void> {
  const { volume: made } = await call(testbed.controller, Controller.method.createVolume, {
    name: volume.name,
    capacityRange: { requiredBytes: volume.clusterBytes },
    volumeCapabilities: [volume.capability],
    parameters: {
      ...testbed.parameters,
      ...(backend === "lightos" ? { "replica-count": "1" } : {}),
      // A journal of the usual size is most of what mkfs writes.
      ...(volume.kind === "ext4" ? { "mkfs-options": "-J size=4" } : {}),
    },
    secrets: testbed.secrets,
    ...(volumeContentSource === undefined ? {} : { volumeContentSource }),
  });
  assert(made !== undefined && made.capacityBytes === volume.clusterBytes);
  volume.id = made.volumeId;
  volume.volumeContext = made.volumeContext;
}

/** What a pod does: it writes on the first occasion, and finds it again on every other. */
async function data(testbed: Testbed, volume: Volume): Promise<void> {
  const { target, pattern } = volume;
  const places = volume.kind === "block"
    ? [0n, gib / 2n, gib - BigInt(pattern.length)].map((offset) => ({ path: target, offset }))
    : [{ path: join(target, "data"), offset: 0n }];
  if (!volume.hasData) {
    if (volume.kind !== "block") await Deno.writeFile(join(target, "data"), new Uint8Array());
    for (const { path, offset } of places) await writeAt(path, offset, pattern);
    volume.hasData = true;
  }
  for (const { path, offset } of places) {
    assert(same(await readAt(path, offset, pattern.length), pattern), `the data at byte ${offset} of ${path} is lost`);
  }
  const request = { volumeId: volume.id, volumePath: target };
  const { usage } = await call(testbed.node, Node.method.nodeGetVolumeStats, request);
  const total = usage.find(({ unit }) => unit === Unit.BYTES)?.total ?? 0n;
  const least = volume.kind === "block" ? volume.sizeBytes : volume.sizeBytes * 9n / 10n;
  assert(total >= least && total <= 2n * gib, `it shows ${total} bytes instead of ${volume.sizeBytes}`);
}

// ------------------------------------------------------------------------------------------------------------- the cuts

type Way = "before" | "alone" | "after" | "rename";

/** Where the driver was killed. */
interface Cut {
  /** `2 before UpdateVolume`. */
  readonly at: string;
  /** Whether the call ended without reaching the place: there is none further on. */
  readonly isLast: boolean;
  /** Lets a tool continue that outlived its node. */
  readonly resumeTool: (() => Promise<void>) | undefined;
}

const heldSchema = z.array(z.object({ rpc: z.string() }));

/** Where a flow is cut: at its k-th step, and how. */
interface CutPoint {
  readonly k: number;
  readonly way: Way;
}

/** Makes the call and kills the driver at a step; the driver is not started again. */
async function cutOff(flow: Flow, place: Place, volume: Volume, { k, way }: CutPoint): Promise<Cut> {
  const { testbed, shims } = place;
  const outcome: { error?: unknown; done: boolean } = { done: false };
  const onNode = flow.on === "node";
  if (way === "rename") {
    const node = testbed.running("node");
    assert(node !== undefined);
    const { code } = await killedAtRename(node.pid, () => take(flow.cut, place, volume));
    assert.equal(code, "UNAVAILABLE");
    await node.end("SIGKILL", 5000);
    return { at: "0, within the discovery entry", isLast: false, resumeTool: undefined };
  }
  const when = way === "after" ? "after" : "before";
  if (onNode) await shims.arm(k, when);
  else await testbed.ask("POST", "/faults", { rpc: "*", skip: k - 1, hold: true, when });
  const called = take(flow.cut, place, volume).catch((error) => void (outcome.error = error)).finally(() => {
    outcome.done = true;
  });
  const heldNow = async () => {
    if (onNode) return (await shims.held())?.program;
    return heldSchema.parse(await testbed.ask("GET", "/held"))[0]?.rpc;
  };
  const held = await eventually("the call is held, or ends", async () => {
    // Before the look: what ends after it may still have been held.
    const { done } = outcome;
    return await heldNow() ?? (done ? { done } : undefined);
  }, convergeMs);
  const isLast = typeof held !== "string";
  if (isLast && outcome.error !== undefined) throw outcome.error;
  await testbed.running(flow.on)?.end("SIGKILL", 5000);
  await called;
  if (!onNode) {
    await eventually("the cluster notices that its caller is gone", async () => await heldNow() === undefined);
    await testbed.ask("DELETE", "/faults");
  } else {
    await shims.disarm();
    if (way !== "alone") await shims.kill();
  }
  if (isLast) return { at: `after all, answer lost`, isLast, resumeTool: undefined };
  assert(outcome.error instanceof CallError, `${flow.cut} ended well although it was killed`);
  const word = way === "alone" ? "within" : way;
  return { at: `${k}, ${word} ${held}`, isLast, resumeTool: way === "alone" ? shims.release : undefined };
}

/** Makes a call while the process is killed as soon as it renames a file; answers the error of the call. */
async function killedAtRename(pid: number, act: () => Promise<void>): Promise<CallError> {
  const renames = "rename,renameat,renameat2";
  const strace = new Deno.Command("strace", {
    args: ["-f", "-p", `${pid}`, "-e", `trace=${renames}`, "-e", `inject=${renames}:signal=SIGKILL`, "-o", "/dev/null"],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  try {
    await eventually("strace watches every thread", async () => {
      const threads = await Array.fromAsync(Deno.readDir(`/proc/${pid}/task`));
      const states = await Promise.all(
        threads.map(({ name }) => Deno.readTextFile(`/proc/${pid}/task/${name}/status`)),
      );
      return states.every((state) => /^TracerPid:\t[1-9]/m.test(state));
    });
    const error = await act().then(() => undefined, (error) => error);
    assert(error instanceof CallError, `the node did not end at its rename: ${error}`);
    return error;
  } finally {
    // strace ends with the process.
    await eventually("the node has ended", () => Deno.stat(`/proc/${pid}/exe`).then(() => false, () => true));
    await strace.status;
  }
}

/** Repeats a call until it answers OK; resolves with all answers. */
async function untilOk(step: Step, place: Place, volume: Volume): Promise<string> {
  const answers = new Map<string, number>();
  const giveUpAt = Date.now() + convergeMs;
  for (;;) {
    try {
      await take(step, place, volume);
      return [...[...answers].map(([code, count]) => count === 1 ? code : `${code} ×${count}`), "OK"].join(", ");
    } catch (error) {
      if (!(error instanceof CallError) || Date.now() > giveUpAt || patience.aborted) throw error;
      answers.set(error.code, (answers.get(error.code) ?? 0) + 1);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }
}

/** What the volume has left behind. */
async function leftovers({ testbed }: Place, volume: Volume): Promise<readonly string[]> {
  const left: string[] = [];
  for (const [what, found] of Object.entries(await testbed.clusterWhenIdle(patience))) {
    left.push(...found.map((one) => `${what}: ${one}`));
  }
  // The cluster takes a device away a moment after the volume.
  let machine: string[] = [];
  for (let looks = 0; looks < 100; looks++) {
    const { mounts, loops, devices, entries } = await testbed.observe();
    // Connections are the Discovery-Client's to keep, and the node's own to drop.
    const connections = backend === "poseidon"
      ? await Array.fromAsync(Deno.readDir(join(testbed.addresses.sysfsRoot ?? "", "class/nvme")))
      : [];
    machine = [
      ...mounts.map(({ at }) => `mount: ${testbed.shorten(at)}`),
      ...loops.map((name) => `loop device: ${name}`),
      ...devices.map((name) => `device: ${name}`),
      ...entries.map((name) => `discovery entry: ${name}`),
      ...connections.map(({ name }) => `connection: ${name}`),
    ];
    if (machine.length === 0) break;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  left.push(...machine);
  // What the orchestrator made, it removes; anything that the driver made there is in its way.
  for (const directory of [volume.staging, volume.pod]) {
    await Deno.remove(directory).catch((error) =>
      left.push(`directory: ${testbed.shorten(directory)} (${messageOf(error)})`)
    );
  }
  return left;
}

// ----------------------------------------------------------------------------------------------------------- the report

interface Row {
  readonly at: string;
  readonly direction: "retry" | "undo";
  readonly answers: string;
  readonly leftovers: readonly string[];
  readonly failure: string | undefined;
}

interface Result {
  readonly flow: Flow;
  readonly rows: readonly Row[];
}

/** Cuts one flow at each step, in one direction, in a place of its own that is made again after a failure. */
async function playFlow(
  flow: Flow,
  direction: "retry" | "undo",
  place: () => Promise<Place>,
  discard: () => Promise<void>,
): Promise<readonly Row[]> {
  const rows: Row[] = [];
  const steps = direction === "retry" ? [flow.cut, ...flow.then] : flow.undo;
  // No call undoes what a tool does that continues alone after the opposite call was answered.
  const ways: readonly Way[] = flow.on === "node" && direction === "retry"
    ? ["before", "alone", "after"]
    : ["before", "after"];
  let failures = 0;
  for (let k = 1, isLast = false; !isLast; k++) {
    const hasEntry = flow.cut === "stage" && backend === "lightos";
    for (const way of k === 1 && hasEntry ? ["rename" as const, ...ways] : ways) {
      let at = `${k}, ${way}`;
      let answers = "";
      try {
        const here = await place();
        const volume = await newVolume(here, flow.kind);
        for (const step of flow.before) await take(step, here, volume);
        if (flow.on === "controller") {
          // A controller that knows the cluster already calls it less often.
          await here.testbed.running("controller")?.end("SIGTERM", 10_000);
          await here.startController();
        }
        const cut = await cutOff(flow, here, volume, { k, way });
        at = cut.at;
        isLast = cut.isLast;
        await (flow.on === "node" ? here.startNode() : here.startController());
        const [first, ...rest] = steps;
        const alone = cut.resumeTool?.();
        if (first !== undefined) answers = await untilOk(first, here, volume);
        await alone;
        for (const step of rest) await take(step, here, volume);
        const left = await leftovers(here, volume);
        rows.push({ at, direction, answers, leftovers: left, failure: undefined });
        if (left.length > 0) await discard();
      } catch (error) {
        rows.push({ at, direction, answers, leftovers: [], failure: messageOf(error) });
        await discard();
        // A flow that fails again and again may have no last step.
        if (++failures === 3 || patience.aborted) return rows;
      }
      if (isLast) break;
    }
  }
  return rows;
}

function print({ flow, rows }: Result): void {
  console.log(`\n${flow.name}`);
  for (const { at, direction, answers, leftovers, failure } of rows) {
    const left = leftovers.length === 0 ? "none" : leftovers.join("; ");
    const end = failure === undefined ? left : `FAILED: ${failure.split("\n", 1)[0]}`;
    console.log(`  ${at.padEnd(34)}${direction.padEnd(7)}${answers.padEnd(30)} ${end}`);
  }
}

function isGood({ leftovers, failure }: Row): boolean {
  return leftovers.length === 0 && failure === undefined;
}

async function writeAt(path: string, offset: bigint, bytes: Uint8Array): Promise<void> {
  using file = await Deno.open(path, { write: true });
  await file.seek(offset, Deno.SeekMode.Start);
  for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
  await file.sync();
}

async function readAt(path: string, offset: bigint, length: number): Promise<Uint8Array> {
  using file = await Deno.open(path, { read: true });
  await file.seek(offset, Deno.SeekMode.Start);
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length;) {
    const count = await file.read(bytes.subarray(at));
    if (count === null) return bytes.subarray(0, at);
    at += count;
  }
  return bytes;
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, at) => byte === b[at]);
}

// ------------------------------------------------------------------------------------------------------------- the play

if (!needs("root", "loop", "mkfs.ext4", "mkfs.xfs", "mkfifo", "strace")) Deno.exit(1);
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  Deno.addSignalListener(signal, () => interruption.abort(new Error(`interrupted by ${signal}`)));
}
const started = performance.now();
const conditions: string[] = [];
/** What PoseidonOS does not have. */
const onLightosOnly: readonly Step[] = [
  ...["grow", "grow node", "snapshot", "delete snapshot", "restore", "clone", "delete the copy"] as const,
];
const chosen = flows.filter(({ name, before, cut, then, undo = [] }) =>
  name.includes(settings.only) &&
  (backend === "lightos" || ![...before, cut, ...then, ...undo].some((step) => onLightosOnly.includes(step)))
);
const results = new Map(
  chosen.map((flow) => [flow, { flow, rows: [] as Row[], open: 2 }]),
);
// Node flows first: they are the longer ones, and the last to end decides when all is done.
const queue = chosen.flatMap((flow) => (["retry", "undo"] as const).map((direction) => ({ flow, direction }))).sort((
  a,
  b,
) => Number(b.flow.on === "node") - Number(a.flow.on === "node"));

await Promise.all(Array.from({ length: Number(settings.workers) }, async () => {
  let current: Place | undefined;
  const discard = async () => {
    const old = current;
    current = undefined;
    await old?.[Symbol.asyncDispose]();
  };
  const place = async () => current ??= await openPlace(settings.keep, (condition) => conditions.push(condition));
  for (let next = queue.shift(); next !== undefined && !patience.aborted; next = queue.shift()) {
    const result = results.get(next.flow);
    const rows = await playFlow(next.flow, next.direction, place, discard);
    if (result === undefined) continue;
    if (next.direction === "retry") result.rows.unshift(...rows);
    else result.rows.push(...rows);
    if (--result.open === 0) print(result);
  }
  await discard();
}));

const rows = [...results.values()].flatMap((result) => result.rows);
const bad = rows.filter((row) => !isGood(row)).length;
const uncut = [...results.values()].filter((result) => result.rows.length === 0).length;
console.log("");
for (const condition of conditions) console.log(condition);
const seconds = Math.round((performance.now() - started) / 1000);
console.log(
  `${results.size} flows, ${rows.length} kills, ${bad} ended badly, ${conditions.length} things to clean up; ${seconds} s`,
);
if (patience.aborted) console.log(`ended early: ${messageOf(patience.reason)}`);
Deno.exit(bad + uncut + conditions.length === 0 && rows.length > 0 && !patience.aborted ? 0 : 1);

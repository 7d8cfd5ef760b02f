/**
 * `lbcsi demo`: an orchestrator in small. It starts a simulated cluster, the controller and the node as processes of
 * their own, takes volumes through their whole lives over CSI, and looks after each call at what has become of the
 * cluster and of the machine. It knows the driver from outside only: sockets, logs, the simulator's control port and the
 * kernel's tables.
 *
 * Every line it prints is something it saw. Everything it makes is in one temporary directory, and goes with it.
 */
import { join } from "node:path";
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  Controller,
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeUsage_Unit as Unit,
} from "../../proto/gen/csi_pb.ts";
import type { Channel } from "../grpc/client.ts";
import { hostNqn } from "../namespace.ts";
import { checksum, differsAt, writeAt, writeFiles } from "./contents.ts";
import { CheckFailed, Interrupted, interruptedStatus, interruptions } from "./interrupt.ts";
import { findPlace, fsLacks, kindOf, listNames, machineLacks, processesNaming } from "./machine.ts";
import { hostsIn, Scenario } from "./scenario.ts";
import { formatBytes, Terminal } from "./terminal.ts";
import { type Backend, programOf, Testbed } from "./testbed.ts";

const demoFsTypes = ["ext4", "xfs", "btrfs"] as const;
/** A file system that the demo can play. */
export type DemoFsType = typeof demoFsTypes[number];

/** How the demo is to be played. */
export interface DemoSettings {
  /** Leaves the temporary directory, with the logs in it, for inspection. */
  readonly keep: boolean;
  /** Shows every command with its arguments, exit status and time. */
  readonly verbose: boolean;
  /** The storage system to simulate. */
  readonly backend: Backend;
  /** File systems to play; undefined: ext4, and each other one that this machine can make. */
  readonly fs: readonly DemoFsType[] | undefined;
}

/**
 * Plays the demo and prints it.
 *
 * @param print receives one line, without its newline
 * @param program what starts lbcsi
 * @returns the exit status: 0 when every check passed (also those of the smaller demo that a machine without root or loop
 *   devices gets), 1 when one failed or something was left over, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP
 */
export async function demo(
  settings: DemoSettings,
  print: (line: string) => void = console.log,
  program: readonly string[] = ownProgram(),
): Promise<number> {
  const screen = new Terminal(print, settings.verbose);
  const stop = new AbortController();
  const listeners = interruptions.map((signal) => [signal, () => stop.abort(new Interrupted(signal))] as const);
  for (const [signal, listener] of listeners) Deno.addSignalListener(signal, listener);
  try {
    return await play(settings, program, screen, stop.signal);
  } finally {
    for (const [signal, listener] of listeners) Deno.removeSignalListener(signal, listener);
  }
}

/** What starts this program again: the executable that holds it, or the runtime with the file it was started from. */
export function ownProgram(): readonly string[] {
  return Deno.build.standalone ? [Deno.execPath()] : [Deno.execPath(), "run", "-A", Deno.mainModule];
}

async function play(
  settings: DemoSettings,
  program: readonly string[],
  screen: Terminal,
  signal: AbortSignal,
): Promise<number> {
  const wanted = settings.fs ?? ["ext4"];
  const place = await findPlace();
  const missing = [...await machineLacks(place, wanted)];
  const full = missing.length === 0;
  const system = settings.backend === "lightos" ? "LightOS cluster" : "PoseidonOS";
  screen.title(`lbcsi demo: volumes from creation to deletion, on a simulated ${system}`);
  if (!full) {
    screen.line("This machine cannot play the part with real devices and file systems:");
    for (const { what, remedy } of missing) screen.line(`  ${screen.red("missing")}  ${what}: ${remedy}`);
    screen.line("So the control plane alone is played.");
  }
  // The kernel's tables have paths without symbolic links.
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-demo-", dir: place.directory }));
  const rig = new Testbed(home, program, program, settings.backend);
  let failure: unknown;
  try {
    await startAll(rig, screen, full, signal);
    const tale = new Scenario(rig, screen, signal);
    if (full) {
      for (const [number, fsType] of wanted.entries()) await fileSystemVolume(tale, fsType, number === 0);
      await blockVolume(tale);
      if (settings.fs === undefined) {
        for (const fsType of demoFsTypes) {
          if (wanted.includes(fsType)) continue;
          const lacks = fsLacks(fsType);
          if (lacks === undefined) await fileSystemVolume(tale, fsType, false);
          else screen.heading(`${fsType} volume: left out, ${lacks.what} is missing (${lacks.remedy})`);
        }
      }
    } else {
      await controlPlaneAlone(tale);
    }
    await nothingLeft(tale);
  } catch (error) {
    failure = error;
    screen.failure(error);
    if (!(error instanceof Interrupted)) {
      for (const { name, lines } of await rig.lastWords()) screen.excerpt(`last lines of ${name}`, lines);
    }
  }
  // What follows must not be cut short by a second Ctrl-C, so it takes no signal.
  const forced = await rig.cleanUp(settings.keep);
  for (const { done, what } of forced) screen.cleaned(done, what);
  if (settings.keep) screen.line(`kept: ${home}`);
  const left = forced.filter(({ done }) => !done).length;
  if (failure === undefined && forced.length > 0) failure = new CheckFailed("something was left over, see above");
  screen.summary(failure, left, full);
  if (failure instanceof Interrupted) return interruptedStatus[failure.signal];
  return failure === undefined ? 0 : 1;
}

// --------------------------------------------------------------------------------------------------------- the stories

const nodeId = "demo-1.node";
const otherNodeId = "demo-2.node";
const gib = 1n << 30n;

async function startAll(rig: Testbed, screen: Terminal, full: boolean, signal: AbortSignal): Promise<void> {
  screen.heading("start");
  screen.fact("directory", rig.home);
  const started = async (name: string, start: () => Promise<string>) => {
    signal.throwIfAborted();
    const began = performance.now();
    const said = await start();
    screen.fact(name, said, performance.now() - began);
  };
  await started("simulator", async () => {
    const { pid } = await rig.startSimulator(full ? "loop" : "none", signal);
    const { grpcs, dagent, data } = rig.addresses;
    const where = rig.backend === "lightos" ? `${grpcs.length} servers at ${grpcs.join(", ")}` : `DAgent at ${dagent}`;
    return `pid ${pid}, ${where}, data plane ${data}`;
  });
  await started("controller", async () => {
    const { pid } = await rig.startController(signal);
    return `pid ${pid}, ${await identify(rig.controller, signal)}`;
  });
  if (!full) return;
  await started("node", async () => {
    const { pid } = await rig.startNode(nodeId, signal);
    const info = await rig.node.call(Node.method.nodeGetInfo, {}, { signal });
    return `pid ${pid}, ${await identify(rig.node, signal)}, says it is ${info.nodeId}`;
  });
}

async function identify(channel: Channel, signal: AbortSignal): Promise<string> {
  const { name, vendorVersion } = await channel.call(Identity.method.getPluginInfo, {}, { signal });
  return `${name} ${vendorVersion}`;
}

type Capability = MessageInitShape<typeof Node.method.nodeStageVolume.input>["volumeCapability"];

/** A volume in the demo, with everything that an orchestrator remembers of it. */
interface Subject {
  readonly name: string;
  readonly capability: NonNullable<Capability>;
  readonly staging: string;
  readonly target: string;
  id: string;
  publishContext: Record<string, string>;
  volumeContext: Record<string, string>;
}

async function subject(tale: Scenario, name: string, capability: NonNullable<Capability>): Promise<Subject> {
  const staging = join(tale.rig.home, "staging", name);
  const pod = join(tale.rig.home, "pods", name);
  // The orchestrator makes the staging directory and the parent of the target, the driver makes the target.
  for (const directory of [staging, pod]) await Deno.mkdir(directory, { recursive: true, mode: 0o750 });
  return { name, capability, staging, target: join(pod, "volume"), id: "", publishContext: {}, volumeContext: {} };
}

/** @param thorough with crashes, a second node and every call twice */
async function fileSystemVolume(tale: Scenario, fsType: DemoFsType, thorough: boolean): Promise<void> {
  const { rig, screen, signal } = tale;
  screen.heading(`${fsType} volume`);
  const volume = await subject(tale, `demo-${fsType}`, {
    accessType: { case: "mount", value: { fsType } },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  const usedSize = await create(tale, volume);
  await publish(tale, volume);
  if (thorough) await secondNodeIsRefused(tale, volume);
  await stage(tale, volume);
  tale.check(`mkfs.${fsType} ran`, tale.commands.some(({ command }) => programOf(command) === `mkfs.${fsType}`));
  await nodePublish(tale, volume);
  const mount = tale.mountAt(volume.target);
  tale.check(`${fsType} is mounted at the target`, mount?.fsType === fsType, mount?.fsType ?? "no mount");

  const written = await tale.step("write files", "pod", () => writeFiles(volume.target), ({ files, bytes, sum }) => [
    `${files} files, ${formatBytes(BigInt(bytes))}, SHA-256 ${sum.slice(0, 12)}…`,
  ]);
  const same = async (when: string) => {
    const found = await checksum(volume.target);
    tale.verify(
      `the files are the same ${when}`,
      found.sum === written.sum,
      `${found.files} files, SHA-256 ${found.sum}`,
    );
  };
  const stats = await tale.call(rig.node, Node.method.nodeGetVolumeStats, {
    volumeId: volume.id,
    volumePath: volume.target,
  }, { unchanged: true, free: true });
  const bytes = stats.usage.find(({ unit }) => unit === Unit.BYTES);
  const inodes = stats.usage.find(({ unit }) => unit === Unit.INODES);
  screen.detail("answer", [
    `${formatBytes(bytes?.used ?? 0n)} of ${formatBytes(bytes?.total ?? 0n)} used`,
    inodes === undefined || inodes.total === 0n
      ? "no fixed number of inodes"
      : `${inodes.used} of ${inodes.total} inodes`,
  ]);
  tale.verify(
    "the statistics hold the written bytes and not more than the volume",
    bytes !== undefined && bytes.used >= BigInt(written.bytes) && bytes.total <= usedSize &&
      bytes.total > usedSize / 2n,
    `used ${bytes?.used}, total ${bytes?.total}`,
  );

  if (thorough) {
    await tale.crash("node", () => rig.startNode(nodeId, signal));
    await same("while no node process ran");
    screen.note("every call again: each must answer as before and change nothing");
    await create(tale, volume, "again");
    await publish(tale, volume, "again");
    await stage(tale, volume, "again");
    await nodePublish(tale, volume, "again");
    await same("after the crash");
  }

  await nodeUnpublish(tale, volume);
  await unstage(tale, volume);
  await unpublish(tale, volume);
  if (thorough) {
    await nodeUnpublish(tale, volume, "again");
    await unstage(tale, volume, "again");
    await unpublish(tale, volume, "again");
    await tale.crash("controller", () => rig.startController(signal));
  }

  screen.note("attach it once more: the data must be there");
  await publish(tale, volume);
  await stage(tale, volume);
  tale.verify("no mkfs ran", tale.commands.every(({ command }) => !programOf(command).startsWith("mkfs")));
  await nodePublish(tale, volume);
  await same("after a new stage");
  await nodeUnpublish(tale, volume);
  await unstage(tale, volume);
  await unpublish(tale, volume);
  await remove(tale, volume);
  if (thorough) await remove(tale, volume, "again");
}

async function blockVolume(tale: Scenario): Promise<void> {
  const { screen } = tale;
  screen.heading("raw block volume");
  const volume = await subject(tale, "demo-block", {
    accessType: { case: "block", value: {} },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  const size = await create(tale, volume);
  await publish(tale, volume);
  await stage(tale, volume);
  tale.verify("no mkfs ran", tale.commands.every(({ command }) => !programOf(command).startsWith("mkfs")));
  await nodePublish(tale, volume);
  const found = await Deno.stat(volume.target);
  tale.verify("the target is a block device", found.isBlockDevice === true);
  const pattern = crypto.getRandomValues(new Uint8Array(64 << 10));
  const offsets = [0n, size / 2n, size - BigInt(pattern.length)];
  await tale.step("write through the target", "pod", () => writeAt(volume.target, offsets, pattern), () => [
    `${formatBytes(BigInt(pattern.length))} of random bytes at ${offsets.map(String).join(", ")}`,
  ]);
  const same = async (when: string) => {
    const wrong = await differsAt(volume.target, offsets, pattern);
    tale.verify(`the bytes are the same ${when}`, wrong === undefined, `they differ at ${wrong}`);
  };
  await same("through the target");
  await nodePublish(tale, volume, "again");
  await nodeUnpublish(tale, volume);
  await unstage(tale, volume);
  await unpublish(tale, volume);
  screen.note("attach it once more: the data must be there");
  await publish(tale, volume);
  await stage(tale, volume);
  await nodePublish(tale, volume);
  await same("after a new stage");
  await nodeUnpublish(tale, volume);
  await unstage(tale, volume);
  await unpublish(tale, volume);
  await remove(tale, volume);
}

async function controlPlaneAlone(tale: Scenario): Promise<void> {
  tale.screen.heading("a volume on the control plane");
  const volume = await subject(tale, "demo", {
    accessType: { case: "mount", value: { fsType: "ext4" } },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  await create(tale, volume);
  await create(tale, volume, "again");
  await publish(tale, volume);
  await publish(tale, volume, "again");
  await secondNodeIsRefused(tale, volume);
  await tale.crash("controller", () => tale.rig.startController(tale.signal));
  await publish(tale, volume, "again");
  await unpublish(tale, volume);
  await unpublish(tale, volume, "again");
  await remove(tale, volume);
  await remove(tale, volume, "again");
}

// ------------------------------------------------------------------------------------------------- calls of the stories

type Repeat = "again" | undefined;

/** Answers the size in bytes. */
async function create(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<bigint> {
  const answer = await tale.call(tale.rig.controller, Controller.method.createVolume, {
    name: volume.name,
    capacityRange: { requiredBytes: gib },
    volumeCapabilities: [volume.capability],
    parameters: tale.rig.parameters,
    secrets: tale.rig.secrets,
  }, { unchanged: repeat === "again" });
  const made = answer.volume;
  const listed = tale.world.volumes.filter(({ name, state }) => name === volume.name && state === "Available");
  tale.check(
    "the cluster has exactly one such volume, of the size that the answer says",
    listed.length === 1 && made !== undefined && listed[0]?.sizeBytes === made.capacityBytes &&
      made.capacityBytes >= gib,
    `${listed.length} volumes, ${listed[0]?.sizeBytes} bytes, answer ${made?.capacityBytes}`,
  );
  if (repeat === "again") tale.check("the answer is the same volume", made?.volumeId === volume.id, made?.volumeId);
  volume.id = made?.volumeId ?? "";
  volume.volumeContext = made?.volumeContext ?? {};
  return made?.capacityBytes ?? 0n;
}

function controllerPublishRequest(tale: Scenario, volume: Subject, node: string) {
  return {
    volumeId: volume.id,
    nodeId: node,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
    secrets: tale.rig.secrets,
  };
}

async function publish(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  const answer = await tale.call(
    tale.rig.controller,
    Controller.method.controllerPublishVolume,
    controllerPublishRequest(tale, volume, nodeId),
    { unchanged: repeat === "again" },
  );
  const acl = tale.world.volumes.find(({ name }) => name === volume.name)?.acl ?? [];
  tale.check(`${nodeId} alone may connect`, acl.length === 1 && acl[0] === hostNqn(nodeId), acl.join(", "));
  volume.publishContext = answer.publishContext;
}

async function secondNodeIsRefused(tale: Scenario, volume: Subject): Promise<void> {
  await tale.refused(
    tale.rig.controller,
    Controller.method.controllerPublishVolume,
    controllerPublishRequest(tale, volume, otherNodeId),
    "FAILED_PRECONDITION",
    { name: `ControllerPublishVolume ${otherNodeId}`, named: nodeId },
  );
}

async function stage(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodeStageVolume, {
    volumeId: volume.id,
    publishContext: volume.publishContext,
    stagingTargetPath: volume.staging,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
  }, { unchanged: repeat === "again", free: true });
}

async function nodePublish(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodePublishVolume, {
    volumeId: volume.id,
    publishContext: volume.publishContext,
    stagingTargetPath: volume.staging,
    targetPath: volume.target,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
  }, { unchanged: repeat === "again", free: true });
  tale.check(
    "exactly one mount is at the target",
    tale.world.mounts.filter(({ at }) => at === volume.target).length === 1,
  );
}

async function nodeUnpublish(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodeUnpublishVolume, {
    volumeId: volume.id,
    targetPath: volume.target,
  }, { unchanged: repeat === "again", free: true });
  tale.check("the target is gone", await kindOf(volume.target) === "absent", await kindOf(volume.target));
}

async function unstage(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodeUnstageVolume, {
    volumeId: volume.id,
    stagingTargetPath: volume.staging,
  }, { unchanged: repeat === "again", free: true });
  tale.check(
    "nothing is mounted there, and the Discovery-Client has no entry of it",
    tale.mountAt(volume.staging) === undefined && !tale.world.entries.some((entry) => volume.id.includes(entry)),
    tale.world.entries.join(", "),
  );
}

async function unpublish(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.controller, Controller.method.controllerUnpublishVolume, {
    volumeId: volume.id,
    nodeId,
    secrets: tale.rig.secrets,
  }, { unchanged: repeat === "again" });
  const acl = tale.world.volumes.find(({ name }) => name === volume.name)?.acl;
  tale.check("no host may connect", acl !== undefined && hostsIn(acl).length === 0, acl?.join(", "));
}

async function remove(tale: Scenario, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.controller, Controller.method.deleteVolume, {
    volumeId: volume.id,
    secrets: tale.rig.secrets,
  }, { unchanged: repeat === "again" });
  const live = tale.world.volumes.filter(({ name, state }) => name === volume.name && state !== "Deleting");
  tale.check("the cluster has it no more, or is deleting it", live.length === 0, live.map(({ state }) => state).join());
  // An orchestrator removes the directories that it made. Neither may hold anything: this fails otherwise.
  if (repeat === "again") return;
  await Deno.remove(volume.staging);
  await Deno.remove(join(tale.rig.home, "pods", volume.name));
}

// ------------------------------------------------------------------------------------------------------------- the end

async function nothingLeft(tale: Scenario): Promise<void> {
  const { rig, screen } = tale;
  screen.heading("nothing left over");
  const left = await rig.clusterWhenIdle(tale.signal);
  for (const [what, found] of Object.entries(left)) {
    tale.verify(`cluster: no ${what}`, found.length === 0, found.join(", "));
  }
  const world = await rig.observe();
  const mounts = world.mounts.map(({ at }) => rig.short(at));
  tale.verify("machine: no mounts", mounts.length === 0, mounts.join(", "));
  tale.verify("machine: no loop devices", world.loops.length === 0, world.loops.join(", "));
  tale.verify("machine: no Discovery-Client entries", world.entries.length === 0, world.entries.join(", "));
  for (const directory of ["staging", "pods"]) {
    const names = await listNames(join(rig.home, directory)) ?? [];
    tale.verify(`machine: no ${directory} directories`, names.length === 0, names.join(", "));
  }
  if (rig.backend === "lightos") {
    const loud = await rig.logsThatHold([rig.addresses.jwt, rig.addresses.adminJwt]);
    tale.verify("the cluster's token is in no log", loud.length === 0, loud.join(", "));
  }
  for (const { name, ending } of await rig.stopAll()) {
    tale.verify(`${name} ended by itself on SIGTERM`, ending === "exit 0", ending);
  }
  const alive = await processesNaming(rig.home);
  tale.verify("no process is left", alive.length === 0, alive.join("; "));
}

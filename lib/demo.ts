/**
 * `lbcsi demo`: an orchestrator in small. It starts a simulated cluster, the controller and the node as processes of
 * their own, takes volumes through their whole lives over CSI, and looks after each call at what has become of the
 * cluster and of the machine. It knows the driver from outside only: sockets, logs, the simulator's control port and the
 * kernel's tables.
 *
 * Every line it prints is something it saw. Everything it makes is in one temporary directory, and goes with it.
 */
import { basename, isAbsolute, join } from "node:path";
import { type DescMessage, type DescMethodUnary, equals, type MessageInitShape } from "@bufbuild/protobuf";
import type { MessageShape } from "@bufbuild/protobuf";
import { z } from "zod";
import { sleep } from "./context.ts";
import { messageOf, type StatusCode, StatusError } from "./error.ts";
import { hostNqn, nodeIdOf } from "./namespace.ts";
import { CallError, Channel } from "./rpc.ts";
import {
  Controller,
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeUsage_Unit as Unit,
} from "../proto/gen/csi_pb.ts";

const demoFsTypes = ["ext4", "xfs", "btrfs"] as const;
/** A file system that the demo can play. */
export type DemoFsType = typeof demoFsTypes[number];

/** How the demo is to be played. */
export interface DemoSettings {
  /** Leaves the temporary directory, with the logs in it, for inspection. */
  readonly keep: boolean;
  /** Shows every command with its arguments, exit status and time. */
  readonly verbose: boolean;
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
  const screen = new Screen(print, settings.verbose);
  const stop = new AbortController();
  const listeners = interruptions.map((signal) => [signal, () => stop.abort(new Interrupted(signal))] as const);
  for (const [signal, listener] of listeners) Deno.addSignalListener(signal, listener);
  try {
    return await play(settings, program, screen, stop.signal);
  } finally {
    for (const [signal, listener] of listeners) Deno.removeSignalListener(signal, listener);
  }
}

// SIGHUP is what a terminal sends that is closed.
const interruptions = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
type Interruption = typeof interruptions[number];
/** What a shell makes of a program that ends by a signal: 128 and the signal's number. */
const interruptedStatus: Readonly<Record<Interruption, number>> = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 };

class Interrupted extends Error {
  readonly signal: Interruption;

  constructor(signal: Interruption) {
    super(`interrupted by ${signal}`);
    this.signal = signal;
  }
}

/** A check that did not pass. */
class CheckFailed extends Error {}

async function play(
  settings: DemoSettings,
  program: readonly string[],
  screen: Screen,
  signal: AbortSignal,
): Promise<number> {
  const wanted = settings.fs ?? ["ext4"];
  const place = await findPlace();
  const missing = [...await machineLacks(place, wanted)];
  const full = missing.length === 0;
  screen.title("lbcsi demo: volumes from creation to deletion, on a simulated LightOS cluster");
  if (!full) {
    screen.line("This machine cannot play the part with real devices and file systems:");
    for (const { what, remedy } of missing) screen.line(`  ${screen.red("missing")}  ${what}: ${remedy}`);
    screen.line("So the control plane alone is played.");
  }
  // The kernel's tables have paths without symbolic links.
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-demo-", dir: place.directory }));
  const rig = new Rig(home, program);
  let failure: unknown;
  try {
    await startAll(rig, screen, full, signal);
    const tale = new Tale(rig, screen, signal);
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

async function startAll(rig: Rig, screen: Screen, full: boolean, signal: AbortSignal): Promise<void> {
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
    const { grpcs, data } = rig.addresses;
    return `pid ${pid}, ${grpcs.length} servers at ${grpcs.join(", ")}, data plane ${data}`;
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

async function subject(tale: Tale, name: string, capability: NonNullable<Capability>): Promise<Subject> {
  const staging = join(tale.rig.home, "staging", name);
  const pod = join(tale.rig.home, "pods", name);
  // The orchestrator makes the staging directory and the parent of the target, the driver makes the target.
  for (const directory of [staging, pod]) await Deno.mkdir(directory, { recursive: true, mode: 0o750 });
  return { name, capability, staging, target: join(pod, "volume"), id: "", publishContext: {}, volumeContext: {} };
}

/** @param thorough with crashes, a second node and every call twice */
async function fileSystemVolume(tale: Tale, fsType: DemoFsType, thorough: boolean): Promise<void> {
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

async function blockVolume(tale: Tale): Promise<void> {
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

async function controlPlaneAlone(tale: Tale): Promise<void> {
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
async function create(tale: Tale, volume: Subject, repeat?: Repeat): Promise<bigint> {
  const { addresses } = tale.rig;
  const answer = await tale.call(tale.rig.controller, Controller.method.createVolume, {
    name: volume.name,
    capacityRange: { requiredBytes: gib },
    volumeCapabilities: [volume.capability],
    parameters: {
      "mgmt-endpoint": addresses.grpcs.join(","),
      "mgmt-scheme": "grpcs",
      "project-name": addresses.projects[0] ?? "",
      "replica-count": "2",
    },
    secrets: { jwt: addresses.jwt },
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

function controllerPublishRequest(tale: Tale, volume: Subject, node: string) {
  return {
    volumeId: volume.id,
    nodeId: node,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
    secrets: { jwt: tale.rig.addresses.jwt },
  };
}

async function publish(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
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

async function secondNodeIsRefused(tale: Tale, volume: Subject): Promise<void> {
  await tale.refused(
    tale.rig.controller,
    Controller.method.controllerPublishVolume,
    controllerPublishRequest(tale, volume, otherNodeId),
    "FAILED_PRECONDITION",
    { name: `ControllerPublishVolume ${otherNodeId}`, named: nodeId },
  );
}

async function stage(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodeStageVolume, {
    volumeId: volume.id,
    publishContext: volume.publishContext,
    stagingTargetPath: volume.staging,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
  }, { unchanged: repeat === "again", free: true });
}

async function nodePublish(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
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

async function nodeUnpublish(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.node, Node.method.nodeUnpublishVolume, {
    volumeId: volume.id,
    targetPath: volume.target,
  }, { unchanged: repeat === "again", free: true });
  tale.check("the target is gone", await kindOf(volume.target) === "absent", await kindOf(volume.target));
}

async function unstage(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
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

async function unpublish(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.controller, Controller.method.controllerUnpublishVolume, {
    volumeId: volume.id,
    nodeId,
    secrets: { jwt: tale.rig.addresses.jwt },
  }, { unchanged: repeat === "again" });
  const acl = tale.world.volumes.find(({ name }) => name === volume.name)?.acl;
  tale.check("no host may connect", acl !== undefined && hostsIn(acl).length === 0, acl?.join(", "));
}

async function remove(tale: Tale, volume: Subject, repeat?: Repeat): Promise<void> {
  await tale.call(tale.rig.controller, Controller.method.deleteVolume, {
    volumeId: volume.id,
    secrets: { jwt: tale.rig.addresses.jwt },
  }, { unchanged: repeat === "again" });
  const live = tale.world.volumes.filter(({ name, state }) => name === volume.name && state !== "Deleting");
  tale.check("the cluster has it no more, or is deleting it", live.length === 0, live.map(({ state }) => state).join());
  // An orchestrator removes the directories that it made. Neither may hold anything: this fails otherwise.
  if (repeat === "again") return;
  await Deno.remove(volume.staging);
  await Deno.remove(join(tale.rig.home, "pods", volume.name));
}

// --------------------------------------------------------------------------------------------------------- the contents

interface Written {
  readonly files: number;
  readonly bytes: number;
  /** SHA-256 over the names and contents of all files. */
  readonly sum: string;
}

async function writeFiles(directory: string): Promise<Written> {
  for (let folder = 0; folder < 3; folder++) {
    await Deno.mkdir(join(directory, `folder-${folder}`));
    for (let number = 0; number < 8; number++) {
      const content = new Uint8Array(1 << (10 + number + folder));
      for (let at = 0; at < content.length; at += 65536) crypto.getRandomValues(content.subarray(at, at + 65536));
      const file = await Deno.open(join(directory, `folder-${folder}`, `file-${number}`), {
        write: true,
        createNew: true,
      });
      try {
        for (let at = 0; at < content.length;) at += await file.write(content.subarray(at));
        await file.sync();
      } finally {
        file.close();
      }
    }
  }
  return await checksum(directory);
}

/** Reads every file below `directory`; what mkfs puts there (`lost+found`) is a directory without files. */
async function checksum(directory: string): Promise<Written> {
  const files: { readonly path: string; readonly content: Uint8Array }[] = [];
  const walk = async (path: string) => {
    const entries = await Array.fromAsync(Deno.readDir(join(directory, path)));
    for (const { name, isDirectory } of entries.sort((a, b) => a.name < b.name ? -1 : 1)) {
      const inside = join(path, name);
      if (isDirectory) await walk(inside);
      else files.push({ path: inside, content: await Deno.readFile(join(directory, inside)) });
    }
  };
  await walk("");
  const parts = files.flatMap((
    { path, content },
  ) => [new TextEncoder().encode(`${path}\0${content.length}\0`), content]);
  const digest = await crypto.subtle.digest("SHA-256", new Uint8Array(await new Blob(parts.map(plain)).arrayBuffer()));
  const sum = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { files: files.length, bytes: files.reduce((total, { content }) => total + content.length, 0), sum };
}

function plain(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(bytes);
}

async function writeAt(device: string, offsets: readonly bigint[], content: Uint8Array): Promise<void> {
  const file = await Deno.open(device, { write: true });
  try {
    for (const offset of offsets) {
      await file.seek(offset, Deno.SeekMode.Start);
      for (let at = 0; at < content.length;) at += await file.write(content.subarray(at));
    }
    await file.sync();
  } finally {
    file.close();
  }
}

/** The first of these offsets where the device holds something else; undefined when there is none. */
async function differsAt(
  device: string,
  offsets: readonly bigint[],
  content: Uint8Array,
): Promise<bigint | undefined> {
  const file = await Deno.open(device, { read: true });
  try {
    const found = new Uint8Array(content.length);
    for (const offset of offsets) {
      await file.seek(offset, Deno.SeekMode.Start);
      for (let at = 0; at < found.length;) {
        const count = await file.read(found.subarray(at));
        if (count === null) return offset + BigInt(at);
        at += count;
      }
      if (found.some((byte, at) => byte !== content[at])) return offset;
    }
    return undefined;
  } finally {
    file.close();
  }
}

// ------------------------------------------------------------------------------------------------------------- the end

async function nothingLeft(tale: Tale): Promise<void> {
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
  const loud = await rig.logsThatHold([rig.addresses.jwt, rig.addresses.adminJwt]);
  tale.verify("the cluster's token is in no log", loud.length === 0, loud.join(", "));
  for (const { name, ending } of await rig.stopAll()) {
    tale.verify(`${name} ended by itself on SIGTERM`, ending === "exit 0", ending);
  }
  const alive = await processesNaming(rig.home);
  tale.verify("no process is left", alive.length === 0, alive.join("; "));
}

// ----------------------------------------------------------------------------------------------------------- the teller

interface CallTelling {
  /** The world must be the same after the call. */
  readonly unchanged?: boolean;
  /** The call must not reach the management API: every call of the node. */
  readonly free?: boolean;
}

/** Does the steps, shows each with what it changed, and checks. */
class Tale {
  readonly rig: Rig;
  readonly screen: Screen;
  readonly signal: AbortSignal;
  /** What was seen after the last call. */
  world: World = emptyWorld;
  /** Commands that the driver ran during the last call. */
  commands: readonly RanCommand[] = [];

  constructor(rig: Rig, screen: Screen, signal: AbortSignal) {
    this.rig = rig;
    this.screen = screen;
    this.signal = signal;
  }

  mountAt(path: string): Mount | undefined {
    return this.world.mounts.find(({ at }) => at === path);
  }

  async call<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    telling: CallTelling = {},
  ): Promise<MessageShape<O>> {
    const before = await this.#look();
    const began = performance.now();
    let answer: MessageShape<O>;
    try {
      answer = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) });
    } catch (error) {
      await this.#tell(before, "bad", method.name, performance.now() - began, telling);
      if (this.signal.aborted) throw this.signal.reason;
      const answer = error instanceof CallError ? `${error.code}: ${error.message}` : messageOf(error);
      this.screen.detail("answer", [answer]);
      throw new CheckFailed(`${method.name} failed: ${answer}`);
    }
    await this.#tell(before, "good", method.name, performance.now() - began, telling);
    const key = `${method.parent.typeName}.${method.name} ${this.#subjectOf(request)}`;
    const earlier = this.#answers.get(key);
    if (telling.unchanged === true && earlier !== undefined) {
      this.check("the answer is the same", equals(method.output, earlier as MessageShape<O>, answer));
    }
    this.#answers.set(key, answer);
    return answer;
  }

  readonly #answers = new Map<string, unknown>();

  #subjectOf(request: object): string {
    const { name, volumeId } = request as { readonly name?: string; readonly volumeId?: string };
    return name ?? volumeId ?? "";
  }

  /**
   * A call, shown as `name`, that the driver must refuse with `code` and a message that names `named`, and that must
   * change nothing.
   */
  async refused<I extends DescMessage, O extends DescMessage>(
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    code: StatusCode,
    { name, named }: { readonly name: string; readonly named: string },
  ): Promise<void> {
    const before = await this.#look();
    const began = performance.now();
    const error = await channel.call(method, request, { signal: this.signal, deadline: inSeconds(60) })
      .then(() => undefined, (error) => error);
    if (this.signal.aborted) throw this.signal.reason;
    const known = error instanceof CallError;
    await this.#tell(before, "good", name, performance.now() - began, { unchanged: true });
    this.screen.detail("answer", [known ? `${error.code}: ${error.message}` : messageOf(error ?? "OK")]);
    this.verify(
      `it is refused with ${code}, and the answer names ${named}`,
      known && error.code === code && error.message.includes(named),
    );
  }

  /** Something else than a call: `place` is where it happens. */
  async step<T>(
    name: string,
    place: "pod" | "machine",
    work: () => Promise<T>,
    facts: (result: T) => readonly string[],
  ): Promise<T> {
    this.signal.throwIfAborted();
    const began = performance.now();
    const result = await work();
    this.screen.step("good", name, performance.now() - began, [{ place, facts: facts(result) }]);
    return result;
  }

  /** Ends a process with SIGKILL and starts it again. */
  async crash(name: "node" | "controller", start: () => Promise<Running>): Promise<void> {
    const old = this.rig.running(name);
    await this.step(`kill -9 ${name}, start it again`, "machine", async () => {
      await old?.end("SIGKILL", 5000);
      return await start();
    }, ({ pid }) => [`pid ${old?.pid} → ${pid}`]);
    this.verify(`the old ${name} is dead, the new one answers`, old?.isRunning === false);
  }

  /** A check that is worth a line. */
  verify(what: string, passed: boolean, found?: string): void {
    this.check(what, passed, found, false);
  }

  /** A check of routine, shown when it fails or with `--verbose`. */
  check(what: string, passed: boolean, found?: string, routine = true): void {
    this.screen.check(what, passed, found, routine);
    if (!passed) throw new CheckFailed(found === undefined || found === "" ? what : `${what}: found ${found}`);
  }

  async #look(): Promise<World> {
    this.signal.throwIfAborted();
    await this.rig.newLogLines();
    return this.world = await this.rig.observe();
  }

  async #tell(before: World, outcome: Outcome, name: string, ms: number, telling: CallTelling): Promise<void> {
    const after = this.world = await this.rig.observe();
    const log = await this.rig.newLogLines();
    this.commands = log.filter(({ event }) => event === "ran a command" || event === "ran a probe")
      .map(({ command = "", exit = 0, ms = 0 }) => ({ command, exit, ms }));
    const calls = countsBetween(before.calls, after.calls);
    const changes = changesBetween(this.rig, before, after);
    const ran = this.commands.map((one) => this.rig.shorten(one));
    const cluster = [...this.screen.managementCalls(calls), ...changes.cluster];
    const machine = [...this.screen.commands(ran), ...changes.machine];
    if (changes.cluster.length + changes.machine.length === 0) {
      (telling.free ? machine : cluster).push("changed nothing");
    }
    this.screen.step(outcome, name, ms, [{ place: "cluster", facts: cluster }, { place: "machine", facts: machine }]);
    if (outcome === "bad") return;
    if (telling.unchanged === true) {
      const changed = [...changes.cluster, ...changes.machine];
      this.check("nothing changed", changed.length === 0, changed.join("; "));
    }
    if (telling.free === true) {
      const made = Object.keys(calls);
      this.check("the management API was not called", made.length === 0, made.join(", "));
    }
  }
}

function inSeconds(seconds: number): Date {
  return new Date(Date.now() + seconds * 1000);
}

// ---------------------------------------------------------------------------------------------------------- the changes

function changesBetween(rig: Rig, before: World, after: World) {
  const cluster: string[] = [];
  for (const volume of after.volumes) {
    const old = before.volumes.find(({ uuid }) => uuid === volume.uuid);
    if (old === undefined) {
      cluster.push(`${volume.name} is new: ${volume.state}, ${formatBytes(volume.sizeBytes)}, ${whoMay(volume.acl)}`);
      continue;
    }
    if (old.state !== volume.state) cluster.push(`${volume.name}: ${old.state} → ${volume.state}`);
    if (old.sizeBytes !== volume.sizeBytes) {
      cluster.push(`${volume.name}: ${formatBytes(old.sizeBytes)} → ${formatBytes(volume.sizeBytes)}`);
    }
    if (old.acl.join() !== volume.acl.join()) cluster.push(`${volume.name}: ${whoMay(volume.acl)}`);
  }
  // A volume that is gone after it was seen Deleting goes without a call: not a change that a call made.
  for (const { uuid, name, state } of before.volumes) {
    if (state !== "Deleting" && !after.volumes.some((volume) => volume.uuid === uuid)) cluster.push(`${name} is gone`);
  }
  const machine: string[] = [];
  const { added, removed } = between(before.mounts, after.mounts, ({ at, source }) => `${source} ${at}`);
  for (const { at, fsType, source, root } of added) {
    // The bind mount of a device node shows the node as its root, within the file system where the node lies.
    const what = root === "/" || fsType === "btrfs" ? `${fsType} of ${basename(source)}` : basename(root);
    machine.push(`mounted ${what} at ${rig.short(at)}`);
  }
  for (const { at } of removed) machine.push(`unmounted ${rig.short(at)}`);
  const entries = between(before.entries, after.entries, (entry) => entry);
  for (const entry of entries.added) machine.push(`Discovery-Client entry ${entry.slice(0, 8)}… is new`);
  for (const entry of entries.removed) machine.push(`Discovery-Client entry ${entry.slice(0, 8)}… is gone`);
  const devices = between(before.devices, after.devices, (name) => name);
  for (const name of devices.added) machine.push(`device ${name} came`);
  for (const name of devices.removed) machine.push(`device ${name} went`);
  return { cluster, machine };
}

function between<T>(before: readonly T[], after: readonly T[], key: (item: T) => string) {
  const old = new Set(before.map(key));
  const now = new Set(after.map(key));
  return { added: after.filter((item) => !old.has(key(item))), removed: before.filter((item) => !now.has(key(item))) };
}

/** How often each RPC was called between two looks at the counters. */
export function countsBetween(
  before: Readonly<Record<string, number>>,
  after: Readonly<Record<string, number>>,
): Readonly<Record<string, number>> {
  return Object.fromEntries(
    Object.entries(after).map(([rpc, count]) => [rpc, count - (before[rpc] ?? 0)] as const)
      .filter(([, count]) => count > 0),
  );
}

function whoMay(acl: readonly string[]): string {
  const hosts = hostsIn(acl);
  return hosts.length === 0 ? "no host may connect" : `${hosts.map(nodeIdOf).join(", ")} may connect`;
}

function hostsIn(acl: readonly string[]): readonly string[] {
  return acl.filter((entry) => entry !== "ALLOW_NONE");
}

/** The program of a command line. */
function programOf(command: string): string {
  return command.split(" ", 1)[0] ?? "";
}

// ------------------------------------------------------------------------------------------------------------- the rig

const addressesSchema = z.object({
  grpc: z.array(z.string()),
  grpcs: z.array(z.string()),
  control: z.string(),
  ca: z.string().optional(),
  adminJwt: z.string(),
  jwt: z.string(),
  projects: z.array(z.string()),
  data: z.enum(["none", "loop"]),
  discoveryDir: z.string().optional(),
  devRoot: z.string().optional(),
  sysfsRoot: z.string().optional(),
});
/** Where a simulator listens, as it says itself when it has started. */
export type Addresses = z.infer<typeof addressesSchema>;

const modelSchema = z.object({
  volumes: z.array(z.object({
    uuid: z.string(),
    name: z.string(),
    state: z.string(),
    sizeBytes: z.coerce.bigint(),
    acl: z.array(z.string()),
  })),
});
const callsSchema = z.record(z.string(), z.object({ total: z.number() }));
const leftoversSchema = z.record(z.string(), z.array(z.string()));
const logLineSchema = z.object({
  event: z.string(),
  rpc: z.string().optional(),
  command: z.string().optional(),
  exit: z.number().optional(),
  ms: z.number().optional(),
});
/** The part of a line in the driver's log that tells of calls and commands. */
export type LogLine = z.infer<typeof logLineSchema>;

interface RanCommand {
  readonly command: string;
  readonly exit: number;
  readonly ms: number;
}

interface Mount {
  /** Mount point. */
  readonly at: string;
  /** What of the source is mounted there. */
  readonly root: string;
  readonly fsType: string;
  readonly source: string;
}

/** What there is on the cluster and, of the rig, on the machine. */
interface World {
  readonly volumes: z.infer<typeof modelSchema>["volumes"];
  readonly calls: Readonly<Record<string, number>>;
  readonly mounts: readonly Mount[];
  /** Loop devices whose files are in the rig's directory. */
  readonly loops: readonly string[];
  /** Block devices that the simulated kernel shows. */
  readonly devices: readonly string[];
  /** Files of the Discovery-Client's directory. */
  readonly entries: readonly string[];
}

const emptyWorld: World = { volumes: [], calls: {}, mounts: [], loops: [], devices: [], entries: [] };

/** What starts this program again: the executable that holds it, or the runtime with the file it was started from. */
export function ownProgram(): readonly string[] {
  return Deno.build.standalone ? [Deno.execPath()] : [Deno.execPath(), "run", "-A", Deno.mainModule];
}

/**
 * A simulator, a controller and a node as processes, with everything of theirs in one directory.
 *
 * The benchmark and the tests of bounds use it too.
 */
export class Rig {
  readonly home: string;
  readonly #program: readonly string[];
  readonly #simulator: readonly string[];
  readonly #processes = new Map<string, Running>();
  readonly #channels = new Map<string, Channel>();
  readonly #logRead = new Map<string, number>();
  #addresses: Addresses | undefined;

  /**
   * @param program what starts lbcsi, `ownProgram()`
   * @param simulator what starts the lbcsi that simulates; the same unless told otherwise
   */
  constructor(home: string, program: readonly string[], simulator = program) {
    this.home = home;
    this.#program = program;
    this.#simulator = simulator;
  }

  /** What the simulator said when it had started. */
  get addresses(): Addresses {
    if (this.#addresses === undefined) throw new Error("the simulator has not been started");
    return this.#addresses;
  }

  /** The connection to the controller. */
  get controller(): Channel {
    return this.channel("controller");
  }

  /** The connection to the node. */
  get node(): Channel {
    return this.channel("node");
  }

  /** The process of this name that was started last. */
  running(name: string): Running | undefined {
    return this.#processes.get(name);
  }

  /** Starts the simulator; with devices, they and their contents are in the rig's directory. */
  async startSimulator(data: "loop" | "none", signal: AbortSignal): Promise<Running> {
    const state = data === "loop" ? ["--state", join(this.home, "cluster")] : [];
    const words = ["simulate", "--data", data, ...state, "--log-level", "info"];
    const running = this.#start("simulator", [...this.#simulator, ...words]);
    const line = await running.until("its addresses", signal, async () => {
      const text = await readText(`${running.log}.out`) ?? "";
      return text.includes("\n") ? text.slice(0, text.indexOf("\n")) : undefined;
    });
    this.#addresses = addressesSchema.parse(JSON.parse(line));
    return running;
  }

  /** Starts the controller, which trusts the simulator's certificate. */
  async startController(signal: AbortSignal): Promise<Running> {
    const ca = join(this.home, "ca.pem");
    await Deno.writeTextFile(ca, this.addresses.ca ?? "");
    return await this.startService("controller", ["--mgmt-ca", ca, "--log-level", "debug"], signal);
  }

  /**
   * Starts the node on the simulator's machine.
   *
   * @param env added to the environment
   */
  async startNode(nodeId: string, signal: AbortSignal, env: Readonly<Record<string, string>> = {}): Promise<Running> {
    const { discoveryDir, devRoot, sysfsRoot } = this.addresses;
    const places = { "discovery-dir": discoveryDir, dev: devRoot, sysfs: sysfsRoot };
    const words = Object.entries(places).flatMap(([name, path]) => path === undefined ? [] : [`--${name}`, path]);
    return await this.startService("node", ["--node-id", nodeId, ...words, "--log-level", "debug"], signal, env);
  }

  /** Starts a service and waits until it answers a Probe. */
  async startService(
    role: "controller" | "node" | "identity",
    options: readonly string[],
    signal: AbortSignal,
    env: Readonly<Record<string, string>> = {},
  ): Promise<Running> {
    const socket = join(this.home, `${role}.sock`);
    this.#channels.get(role)?.[Symbol.dispose]();
    this.#channels.delete(role);
    // One that was killed leaves its socket file; without it here, the file tells that the new one listens.
    await removeIfThere(socket);
    const running = this.#start(role, [...this.#program, role, "--endpoint", `unix://${socket}`, ...options], env);
    await running.until("an answer to Probe", signal, async () => {
      if (await kindOf(socket) === "absent") return undefined;
      const channel = new Channel({ address: `unix://${socket}`, userAgent: "lbcsi-demo" });
      try {
        await channel.call(Identity.method.probe, {}, { signal, deadline: inSeconds(10) });
        this.#channels.set(role, channel);
        return true;
      } catch (error) {
        channel[Symbol.dispose]();
        if (error instanceof CallError && error.origin !== "server") return undefined;
        throw error;
      }
    });
    return running;
  }

  #start(name: string, command: readonly string[], env: Readonly<Record<string, string>> = {}): Running {
    const running = new Running(name, command, join(this.home, `${name}.log`), env);
    this.#processes.set(name, running);
    return running;
  }

  /** The connection to a service that has been started. */
  channel(role: string): Channel {
    const channel = this.#channels.get(role);
    if (channel === undefined) throw new Error(`the ${role} has not been started`);
    return channel;
  }

  /** Asks the simulator's control port. */
  async ask(method: "GET" | "POST" | "PATCH" | "DELETE", path: string, body?: unknown): Promise<unknown> {
    const response = await fetch(`${this.addresses.control}${path}`, {
      method,
      signal: AbortSignal.timeout(10_000),
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`the control port answered ${method} ${path} with ${response.status}: ${text}`);
    return JSON.parse(text);
  }

  /** Calls of the management API so far, by RPC. */
  async managementCalls(): Promise<Readonly<Record<string, number>>> {
    const counts = callsSchema.parse(await this.ask("GET", "/calls"));
    return Object.fromEntries(Object.entries(counts).map(([rpc, { total }]) => [rpc, total]));
  }

  /** Looks at the cluster and at the machine, once hosts see what they may. */
  async observe(): Promise<World> {
    await this.ask("GET", "/settled");
    const { devRoot, discoveryDir } = this.addresses;
    const names = devRoot === undefined ? [] : await listNames(devRoot) ?? [];
    const kinds = await Promise.all(names.map((name) => kindOf(join(devRoot ?? "", name))));
    return {
      volumes: modelSchema.parse(await this.ask("GET", "/model")).volumes,
      calls: await this.managementCalls(),
      mounts: await mountsBelow(this.home),
      loops: await loopsBelow(this.home),
      devices: names.filter((_name, at) => kinds[at] === "block"),
      entries: discoveryDir === undefined ? [] : await listNames(discoveryDir) ?? [],
    };
  }

  /** What is left on the cluster once deletions that go on by themselves have ended; waits for that for 10 s at most. */
  async clusterWhenIdle(signal: AbortSignal): Promise<Readonly<Record<string, readonly string[]>>> {
    for (let waitedMs = 0;; waitedMs += 50) {
      const left = leftoversSchema.parse(await this.ask("GET", "/leftovers"));
      if (Object.values(left).every((found) => found.length === 0) || waitedMs >= 10_000) return left;
      await sleep(50, signal);
    }
  }

  /** Lines that the controller and the node have logged since the last time. They log a call before they answer it. */
  async newLogLines(): Promise<readonly LogLine[]> {
    const lines: LogLine[] = [];
    for (const name of ["controller", "node"]) {
      const text = await readText(join(this.home, `${name}.log`)) ?? "";
      const whole = text.slice(0, text.lastIndexOf("\n") + 1);
      const fresh = whole.slice(this.#logRead.get(name) ?? 0);
      this.#logRead.set(name, whole.length);
      for (const line of fresh.split("\n")) {
        // A runtime that crashes writes lines of its own.
        const parsed = logLineSchema.safeParse(line.startsWith("{") ? parseJson(line) : undefined);
        if (parsed.success) lines.push(parsed.data);
      }
    }
    return lines;
  }

  /** The ends of the logs, without what tells nothing. */
  async lastWords(): Promise<readonly { readonly name: string; readonly lines: readonly string[] }[]> {
    const words = [];
    for (const { name, log } of this.#processes.values()) {
      const lines = (await readText(log) ?? "").split("\n")
        .filter((line) => line !== "" && !line.includes('"event":"received"') && !line.includes('"rpc":"Probe"')).slice(
          -8,
        );
      if (lines.length > 0) words.push({ name, lines: lines.map((line) => this.short(line)) });
    }
    return words;
  }

  /** Names of the logs in which one of `texts` stands. */
  async logsThatHold(texts: readonly string[]): Promise<readonly string[]> {
    const found: string[] = [];
    for (const { log } of this.#processes.values()) {
      const text = await readText(log) ?? "";
      if (texts.some((one) => text.includes(one))) found.push(log);
    }
    return found;
  }

  /** Stops every process with SIGTERM, in reverse order, and tells how each ended. */
  async stopAll(): Promise<readonly { readonly name: string; readonly ending: string }[]> {
    const endings = [];
    for (const channel of this.#channels.values()) channel[Symbol.dispose]();
    this.#channels.clear();
    for (const running of [...this.#processes.values()].reverse()) {
      if (running.isRunning) endings.push({ name: running.name, ending: await running.end("SIGTERM", 10_000) });
    }
    return endings;
  }

  /**
   * Takes away whatever is still there: processes, mounts, loop devices, the directory. Tells what it had to do besides
   * removing the directory, and what it could not do.
   */
  async cleanUp(keep: boolean): Promise<readonly { readonly done: boolean; readonly what: string }[]> {
    const forced: { done: boolean; what: string }[] = [];
    const attempt = async (what: string, work: () => Promise<unknown>) => {
      try {
        await work();
        forced.push({ done: true, what });
      } catch (error) {
        forced.push({ done: false, what: `${what}: ${messageOf(error)}` });
      }
    };
    for (const channel of this.#channels.values()) channel[Symbol.dispose]();
    // The simulator goes last: it takes its loop devices away when nothing uses them any more.
    const simulator = this.#processes.get("simulator");
    for (const running of this.#processes.values()) {
      if (running === simulator || !running.isRunning) continue;
      await attempt(`ended ${running.name}`, () => running.end("SIGTERM", 5000));
    }
    // The last mount first, as mounts can lie on one another.
    for (const { at } of (await mountsBelow(this.home)).reverse()) {
      await attempt(`unmounted ${this.short(at)}`, () => runTool("umount", at));
    }
    if (simulator?.isRunning) await attempt("ended simulator", () => simulator.end("SIGTERM", 5000));
    for (const loop of await loopsBelow(this.home)) {
      await attempt(`took ${loop} away`, () => runTool("losetup", "-d", `/dev/${loop}`));
    }
    for (const line of await processesNaming(this.home)) {
      forced.push({ done: false, what: `a process is left: ${line}` });
    }
    if (keep) return forced;
    const mounts = await mountsBelow(this.home);
    if (mounts.length > 0) {
      // A recursive removal would go through them into a file system.
      forced.push({ done: false, what: `${this.home} is left, as mounts are below it` });
      return forced;
    }
    try {
      await Deno.remove(this.home, { recursive: true });
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) {
        forced.push({ done: false, what: `removed ${this.home}: ${messageOf(error)}` });
      }
    }
    return forced;
  }

  /** A text without the rig's directory in its paths. */
  short(text: string): string {
    return text.replaceAll(`${this.home}/`, "");
  }

  shorten(ran: RanCommand): RanCommand {
    return { ...ran, command: this.short(ran.command) };
  }
}

/** A process of ours. Its stderr goes to the file `log`, its stdout to `log` with `.out` behind it. */
export class Running {
  readonly name: string;
  readonly log: string;
  readonly pid: number;
  readonly #child: Deno.ChildProcess;
  #status: Deno.CommandStatus | undefined;

  constructor(name: string, command: readonly string[], log: string, env: Readonly<Record<string, string>> = {}) {
    this.name = name;
    this.log = log;
    // The shell gives way to the program, which thus has this PID, and writes to files: what it wrote before it answered a
    // call is there when the answer is.
    this.#child = new Deno.Command("/bin/sh", {
      args: ["-c", 'exec "$@" >>"$0.out" 2>>"$0"', log, ...command],
      stdin: "null",
      stdout: "null",
      stderr: "null",
      // The logs are read as text.
      env: { NO_COLOR: "1", ...env },
      // Ctrl-C is for us alone: we end them in order.
      detached: true,
    }).spawn();
    this.pid = this.#child.pid;
    this.#child.status.then((status) => this.#status = status);
  }

  get isRunning(): boolean {
    return this.#status === undefined;
  }

  /**
   * Polls until `look` answers something, for 60 s at most (a first start on a fresh machine fetches packages); rejects
   * with the end of its log when the process ends instead.
   */
  async until<T>(what: string, signal: AbortSignal, look: () => Promise<T | undefined>): Promise<T> {
    const giveUpAt = performance.now() + 60_000;
    for (;;) {
      const ended = this.#status;
      const found = await look();
      if (found !== undefined) return found;
      if (ended !== undefined || performance.now() > giveUpAt) {
        const log = (await readText(this.log) ?? "").trimEnd().split("\n").slice(-5).join("\n");
        const fate = ended === undefined ? "it gave none for 60 s" : `it ended with status ${ended.code}`;
        throw new StatusError("UNAVAILABLE", `Cannot get ${what} from the ${this.name}: ${fate}\n${log}`);
      }
      await sleep(5, signal);
    }
  }

  /** Sends `signal`, waits, and sends SIGKILL after `graceMs`; tells how it ended, `exit 0` or the like. */
  async end(signal: "SIGTERM" | "SIGKILL", graceMs: number): Promise<string> {
    try {
      this.#child.kill(signal);
    } catch {
      // It has ended already.
    }
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), graceMs));
    const status = await Promise.race([this.#child.status, late]);
    clearTimeout(timer);
    if (status !== undefined) return status.signal === null ? `exit ${status.code}` : `ended by ${status.signal}`;
    this.#child.kill("SIGKILL");
    await this.#child.status;
    return `did not end within ${graceMs} ms, killed`;
  }
}

// ----------------------------------------------------------------------------------------------------------- the machine

interface Lack {
  readonly what: string;
  readonly remedy: string;
}

// Debian's names of the packages; most distributions use the same.
const packages: Readonly<Record<string, string>> = {
  losetup: "mount (Debian, Ubuntu) or util-linux",
  mount: "mount (Debian, Ubuntu) or util-linux",
  umount: "mount (Debian, Ubuntu) or util-linux",
  blkid: "util-linux",
  mknod: "coreutils",
  "mkfs.ext4": "e2fsprogs",
  "mkfs.xfs": "xfsprogs",
  "mkfs.btrfs": "btrfs-progs",
};

interface Place {
  /** Where the demo's directory is made. */
  readonly directory: string;
  /** Whether device nodes work there. */
  readonly devices: boolean;
}

/** A temporary directory on which device nodes work: some systems mount /tmp with `nodev`. */
async function findPlace(): Promise<Place> {
  const given = Deno.env.get("TMPDIR");
  const candidates = [...given !== undefined && isAbsolute(given) ? [given] : [], "/tmp", "/var/tmp"];
  const there = candidates.filter((directory) => kindOfSync(directory) === "directory");
  const options = await Promise.all(there.map(mountOptions));
  const good = there.find((_directory, at) => options[at]?.includes("nodev") === false);
  return { directory: good ?? there[0] ?? ".", devices: good !== undefined };
}

/** What a machine needs for devices and file systems, and has not. */
async function machineLacks(place: Place, fsTypes: readonly DemoFsType[]): Promise<readonly Lack[]> {
  if (Deno.build.os !== "linux") return [{ what: "Linux", remedy: "run it on Linux, or in a virtual machine" }];
  const lacks: Lack[] = [];
  if (Deno.uid() !== 0) lacks.push({ what: "root", remedy: "run it with sudo, or as root in a privileged container" });
  else {
    const capabilities = BigInt(
      `0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(await readText("/proc/self/status") ?? "")?.[1] ?? "0"}`,
    );
    for (const [name, bit] of [["CAP_SYS_ADMIN", 21n], ["CAP_MKNOD", 27n]] as const) {
      if ((capabilities >> bit & 1n) === 0n) {
        lacks.push({ what: `the right ${name}`, remedy: "start the container with --privileged" });
      }
    }
    const problem = await loopControlProblem();
    if (problem !== undefined) {
      const remedy = "modprobe loop; in a container also --privileged and -v /dev:/dev";
      lacks.push({ what: `loop devices (${problem})`, remedy });
    }
  }
  if (!place.devices) {
    const remedy = "set TMPDIR to a directory on a file system without it";
    lacks.push({ what: "a temporary directory for device nodes (all are mounted nodev)", remedy });
  }
  for (const name of ["losetup", "mount", "umount", "blkid"]) {
    if (!isOnPath(name)) lacks.push(missingProgram(name));
  }
  for (const fsType of fsTypes) {
    const lack = fsLacks(fsType);
    if (lack !== undefined) lacks.push(lack);
  }
  return lacks;
}

async function loopControlProblem(): Promise<string | undefined> {
  try {
    (await Deno.open("/dev/loop-control", { read: true, write: true })).close();
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}

/** What this machine needs to make and mount a file system, and has not. */
function fsLacks(fsType: DemoFsType): Lack | undefined {
  if (!isOnPath(`mkfs.${fsType}`)) return missingProgram(`mkfs.${fsType}`);
  const known = readTextSync("/proc/filesystems");
  if (known === undefined || new RegExp(`^\\s*${fsType}$`, "m").test(known)) return undefined;
  const release = readTextSync("/proc/sys/kernel/osrelease")?.trim() ?? "";
  const modules = readTextSync(`/lib/modules/${release}/modules.dep`) ?? "";
  // mount(8) has the kernel load it.
  if (modules.includes(`/${fsType}.ko`)) return undefined;
  return { what: `${fsType} in the kernel`, remedy: `load its module, ${fsType}` };
}

function missingProgram(name: string): Lack {
  return { what: name, remedy: `install the package ${packages[name] ?? name}` };
}

function isOnPath(name: string): boolean {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  // Where sudo finds them; PATH of an ordinary user often has none of these.
  if (Deno.uid() !== 0) path.push("/usr/local/sbin", "/usr/sbin", "/sbin");
  return path.some((directory) => kindOfSync(join(directory, name)) === "file");
}

/** Options of the mount that `path` is on. */
async function mountOptions(path: string): Promise<readonly string[]> {
  const real = await Deno.realPath(path);
  let best: { readonly at: string; readonly options: readonly string[] } | undefined;
  for (const { at, options } of await mountTable()) {
    const holds = at === "/" || real === at || real.startsWith(`${at}/`);
    if (holds && at.length >= (best?.at.length ?? 0)) best = { at, options };
  }
  return best?.options ?? [];
}

async function mountTable() {
  const text = await readText("/proc/self/mountinfo") ?? "";
  // proc(5): ID, parent, device, root, mount point, options, optional fields, "-", type, source, super options
  return text.split("\n").filter((line) => line !== "").map((line) => {
    const [left = "", right = ""] = line.split(" - ");
    const [, , , root = "", at = "", options = ""] = left.split(" ").map(unescapeMount);
    const [fsType = "", source = ""] = right.split(" ").map(unescapeMount);
    return { at, root, fsType, source, options: options.split(",") };
  });
}

function unescapeMount(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_match, octal) => String.fromCharCode(parseInt(octal, 8)));
}

/** Mounts below a directory, in the order in which they were made. */
async function mountsBelow(directory: string): Promise<Mount[]> {
  return (await mountTable()).filter(({ at }) => at.startsWith(`${directory}/`))
    .map(({ at, root, fsType, source }) => ({ at, root, fsType, source }));
}

/** Loop devices whose files are below a directory, deleted ones included. */
async function loopsBelow(directory: string): Promise<readonly string[]> {
  const found: string[] = [];
  for (const name of await listNames("/sys/block") ?? []) {
    if (!name.startsWith("loop")) continue;
    const file = await readText(`/sys/block/${name}/loop/backing_file`);
    if (file?.startsWith(`${directory}/`)) found.push(name);
  }
  return found;
}

/** Processes, other than this one, on whose command line a text stands. */
async function processesNaming(text: string): Promise<readonly string[]> {
  const found: string[] = [];
  for (const pid of await listNames("/proc") ?? []) {
    if (!/^\d+$/.test(pid) || Number(pid) === Deno.pid) continue;
    const words = (await readText(`/proc/${pid}/cmdline`) ?? "").replaceAll("\0", " ");
    if (words.includes(text)) found.push(`${pid} ${words.trim()}`);
  }
  return found;
}

async function runTool(program: string, ...args: readonly string[]): Promise<void> {
  const { success, stderr } = await new Deno.Command(program, { args: [...args], stdout: "null", stderr: "piped" })
    .output();
  if (!success) throw new Error(new TextDecoder().decode(stderr).trim());
}

async function readText(path: string): Promise<string | undefined> {
  try {
    return await Deno.readTextFile(path);
  } catch {
    return undefined;
  }
}

function readTextSync(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return undefined;
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

async function listNames(directory: string): Promise<readonly string[] | undefined> {
  try {
    return (await Array.fromAsync(Deno.readDir(directory), ({ name }) => name)).sort();
  } catch {
    return undefined;
  }
}

async function removeIfThere(path: string): Promise<void> {
  try {
    await Deno.remove(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

type Kind = "absent" | "directory" | "file" | "block" | "other";

function kindOf(path: string): Promise<Kind> {
  return Deno.stat(path).then(kind, absent);
}

/** What we may not look at is absent for us. */
function kindOfSync(path: string): Kind {
  try {
    return kind(Deno.statSync(path));
  } catch {
    return "absent";
  }
}

function kind(found: Deno.FileInfo): Kind {
  if (found.isDirectory) return "directory";
  if (found.isBlockDevice) return "block";
  return found.isFile ? "file" : "other";
}

function absent(error: unknown): "absent" {
  if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return "absent";
  throw error;
}

// ------------------------------------------------------------------------------------------------------------ the screen

type Outcome = "good" | "bad";

interface Facts {
  /** `cluster`, `machine`, `pod`. */
  readonly place: string;
  readonly facts: readonly string[];
}

const nameWidth = 36;
const timeWidth = 8;
const placeWidth = 9;

/** Lays the demo out: aligned, and with quiet colours where somebody looks. */
class Screen {
  readonly #print: (line: string) => void;
  readonly #verbose: boolean;
  readonly #colours: boolean;
  readonly #width: number;
  readonly #terminal: boolean;
  readonly #started = performance.now();
  readonly #passed: string[] = [];
  #steps = 0;
  #checks = 0;
  #failed = 0;
  #commands = 0;
  #managementCalls = 0;

  constructor(print: (line: string) => void, verbose: boolean) {
    this.#print = print;
    this.#verbose = verbose;
    this.#terminal = Deno.stdout.isTerminal();
    this.#colours = this.#terminal && (Deno.env.get("NO_COLOR") ?? "") === "";
    this.#width = this.#terminal ? Math.max(80, Deno.consoleSize().columns) : 120;
  }

  line(text: string): void {
    this.#flush();
    this.#print(text);
  }

  title(text: string): void {
    this.#print(this.#paint("1", text));
  }

  heading(text: string): void {
    this.#flush();
    this.#print("");
    this.#print(this.#paint("1", text));
  }

  note(text: string): void {
    this.#flush();
    this.#print(`  ${this.#paint("3", text)}`);
  }

  fact(name: string, text: string, ms?: number): void {
    this.#flush();
    const time = ms === undefined ? "" : formatTime(ms);
    this.#print(`  ${name.padEnd(nameWidth)}${time.padStart(timeWidth)}  ${this.#dim(text)}`);
  }

  step(outcome: Outcome, name: string, ms: number, places: readonly Facts[]): void {
    this.#flush();
    this.#steps++;
    if (outcome === "bad") this.#failed++;
    const filled = places.filter(({ facts }) => facts.length > 0);
    let head = `${this.#mark(outcome)} ${name.padEnd(nameWidth)}${formatTime(ms).padStart(timeWidth)}`;
    if (filled.length === 0) this.#print(head);
    for (const { place, facts } of filled) {
      this.#facts(head, place, facts);
      head = " ".repeat(2 + nameWidth + timeWidth);
    }
  }

  detail(place: string, facts: readonly string[]): void {
    this.#facts(" ".repeat(2 + nameWidth + timeWidth), place, facts);
  }

  /** Checks that pass are shown together, below their step. */
  check(what: string, passed: boolean, found = "", routine = false): void {
    this.#checks++;
    if (passed) {
      if (!routine || this.#verbose) this.#passed.push(what);
      return;
    }
    this.#failed++;
    this.#flush();
    this.#print(`    ${this.#mark("bad")} ${found === "" ? what : `${what}: found ${found}`}`);
  }

  #flush(): void {
    const passed = this.#passed.splice(0);
    if (passed.length > 0) this.#facts(" ".repeat(2 + nameWidth + timeWidth), "checked", passed, "32");
  }

  cleaned(done: boolean, what: string): void {
    this.#flush();
    this.#print(`  ${this.#mark(done ? "good" : "bad")} ${done ? "clean-up" : "left over"}: ${what}`);
  }

  excerpt(title: string, lines: readonly string[]): void {
    this.#flush();
    this.#print(`  ${title}:`);
    for (const line of lines) this.#print(`    ${this.#dim(line)}`);
  }

  /** Why the demo ends early; a check that failed has its line already. */
  failure(error: unknown): void {
    this.#flush();
    if (error instanceof CheckFailed) return;
    if (error instanceof Interrupted) this.#print(`\n${error.message}, cleaning up`);
    else if (error instanceof StatusError) this.#print(`\n${this.red("failed")}: ${error.message}`);
    else {this.#print(
        `\n${this.red("failed")}: ${error instanceof Error ? error.stack ?? error.message : String(error)}`,
      );}
  }

  managementCalls(calls: Readonly<Record<string, number>>): readonly string[] {
    for (const count of Object.values(calls)) this.#managementCalls += count;
    const names = Object.entries(calls).map(([rpc, count]) => count === 1 ? rpc : `${rpc} ×${count}`);
    return names.length === 0 ? [] : [`called ${names.join(", ")}`];
  }

  commands(commands: readonly RanCommand[]): readonly string[] {
    this.#commands += commands.length;
    if (commands.length === 0) return [];
    if (!this.#verbose) return [`ran ${commands.map(({ command }) => programOf(command)).join(", ")}`];
    return commands.map(({ command, exit, ms }) => `ran ${command} (exit ${exit}, ${formatTime(ms)})`);
  }

  summary(failure: unknown, left: number, full: boolean): void {
    this.#flush();
    const seconds = ((performance.now() - this.#started) / 1000).toFixed(1);
    this.#print("");
    this.#print(
      `${this.#steps} steps, ${this.#checks} checks, ${this.#failed} failed; ${this.#managementCalls} management calls, ` +
        `${this.#commands} commands on the machine; ${seconds} s`,
    );
    if (failure !== undefined) {
      const rest = left === 0 ? "nothing of it is left on this machine" : `${left} things are left, see above`;
      const what = failure instanceof Interrupted
        ? `${this.red("interrupted")} by ${failure.signal}`
        : `${this.red("FAILED")}: ${messageOf(failure).split("\n", 1)[0]}`;
      this.#print(`${what}; ${rest}`);
    } else if (full) {
      this.#print(`${this.#paint("32", "passed")}: every check passed, nothing is left over`);
    } else {
      this.#print(
        `${
          this.#paint("33", "passed in part")
        }: the control plane alone; devices and file systems were not played, see ` +
          `what is missing above`,
      );
    }
  }

  red(text: string): string {
    return this.#paint("31", text);
  }

  #facts(head: string, place: string, facts: readonly string[], colour = "36"): void {
    const indent = 2 + nameWidth + timeWidth + 2 + placeWidth;
    const room = this.#width - indent;
    const lines: string[] = [];
    for (const fact of facts) {
      const last = lines.at(-1);
      if (last !== undefined && !this.#verbose && last.length + 2 + fact.length <= room) {
        lines[lines.length - 1] = `${last}; ${fact}`;
      } else lines.push(...this.#terminal ? wrapped(fact, room) : [fact]); // In a file, lines are there to be searched.
    }
    this.#print(`${head}  ${this.#paint(colour, place.padEnd(placeWidth))}${this.#dim(lines[0] ?? "")}`);
    for (const line of lines.slice(1)) this.#print(" ".repeat(indent) + this.#dim(line));
  }

  #mark(outcome: Outcome): string {
    return outcome === "good" ? this.#paint("32", "✓") : this.#paint("31", "✗");
  }

  #dim(text: string): string {
    return this.#paint("2", text);
  }

  #paint(code: string, text: string): string {
    return this.#colours ? `\x1b[${code}m${text}\x1b[0m` : text;
  }
}

/** A text in lines of `width` characters, broken at spaces; a longer word has a line of its own. */
function wrapped(text: string, width: number): readonly string[] {
  const lines: string[] = [];
  for (const word of text.split(" ")) {
    const last = lines.at(-1);
    if (last !== undefined && last.length + 1 + word.length <= width) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
  }
  return lines;
}

function formatTime(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

function formatBytes(bytes: bigint): string {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let value = Number(bytes);
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit]}`;
}

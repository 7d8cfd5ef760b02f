/**
 * `lbcsi demo`: a small orchestrator. It starts a simulated cluster, the controller and the node as separate processes,
 * takes volumes through their whole lives over CSI, and after each call inspects the cluster and the machine. It sees the
 * driver from outside only: sockets, logs, the simulator's control port and the kernel's tables.
 *
 * Every line it prints is an observation. Everything it makes is in one temporary directory, which it removes at the end.
 */
import { join } from "node:path";
import {
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeUsage_Unit as Unit,
} from "../../proto/gen/csi_pb.ts";
import type { Channel } from "../grpc/client.ts";
import { checksum, differsAt, writeAt, writeFiles } from "./contents.ts";
import { CheckFailed, Interrupted, interruptedStatus, interruptions } from "./interrupt.ts";
import { findTemporaryRoot, fsLacks, listNames, machineLacks, processesNaming } from "./machine.ts";
import { Scenario } from "./scenario.ts";
import { formatBytes, Terminal } from "./terminal.ts";
import { type Backend, programOf, Testbed } from "./testbed.ts";
import {
  create,
  type DemoVolume,
  nodeId,
  nodePublish,
  prepareVolume,
  publish,
  publishToSecondNodeFails,
  remove,
  stage,
  takeFromNode,
  unpublish,
} from "./volume_calls.ts";

const demoFsTypes = ["ext4", "xfs", "btrfs"] as const;
/** A file system that the demo can use. */
export type DemoFsType = typeof demoFsTypes[number];

/** The options of the demo. */
export interface DemoSettings {
  /** Keeps the temporary directory, with the logs in it, for inspection. */
  readonly keep: boolean;
  /** Prints every command with its arguments, exit status and time. */
  readonly verbose: boolean;
  /** The storage system to simulate. */
  readonly backend: Backend;
  /** File systems to use; undefined: ext4, and each other one that this machine can make. */
  readonly fs: readonly DemoFsType[] | undefined;
}

/**
 * Runs the demo and prints it.
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
  const terminal = new Terminal(print, settings.verbose);
  const stop = new AbortController();
  const listeners = interruptions.map((signal) => [signal, () => stop.abort(new Interrupted(signal))] as const);
  for (const [signal, listener] of listeners) Deno.addSignalListener(signal, listener);
  try {
    return await runDemo(settings, program, terminal, stop.signal);
  } finally {
    for (const [signal, listener] of listeners) Deno.removeSignalListener(signal, listener);
  }
}

/** What starts this program again: the executable that holds it, or the runtime with the file it was started from. */
export function ownProgram(): readonly string[] {
  return Deno.build.standalone ? [Deno.execPath()] : [Deno.execPath(), "run", "-A", Deno.mainModule];
}

async function runDemo(
  settings: DemoSettings,
  program: readonly string[],
  terminal: Terminal,
  signal: AbortSignal,
): Promise<number> {
  const fsTypes = settings.fs ?? ["ext4"];
  const place = await findTemporaryRoot();
  const missing = [...await machineLacks(place, fsTypes)];
  const full = missing.length === 0;
  const system = settings.backend === "lightos" ? "LightOS cluster" : "PoseidonOS";
  terminal.title(`lbcsi demo: volumes from creation to deletion, on a simulated ${system}`);
  if (!full) {
    terminal.line("This machine cannot play the part with real devices and file systems:");
    for (const { what, remedy } of missing) terminal.line(`  ${terminal.red("missing")}  ${what}: ${remedy}`);
    terminal.line("So the control plane alone is played.");
  }
  // The kernel's mount table shows paths without symbolic links.
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-demo-", dir: place.directory }));
  const testbed = new Testbed(home, program, { backend: settings.backend });
  let failure: unknown;
  try {
    await startAll(testbed, terminal, full, signal);
    const scenario = new Scenario(testbed, terminal, signal);
    if (full) {
      for (const [number, fsType] of fsTypes.entries()) await fileSystemVolume(scenario, fsType, number === 0);
      await blockVolume(scenario);
      if (settings.fs === undefined) {
        for (const fsType of demoFsTypes) {
          if (fsTypes.includes(fsType)) continue;
          const lacks = fsLacks(fsType);
          if (lacks === undefined) await fileSystemVolume(scenario, fsType, false);
          else terminal.heading(`${fsType} volume: left out, ${lacks.what} is missing (${lacks.remedy})`);
        }
      }
    } else {
      await controlPlaneVolume(scenario);
    }
    await checkNothingIsLeft(scenario);
  } catch (error) {
    failure = error;
    terminal.failure(error);
    if (!(error instanceof Interrupted)) {
      for (const { name, lines } of await testbed.logTails()) terminal.excerpt(`last lines of ${name}`, lines);
    }
  }
  // A second Ctrl-C must not interrupt the clean-up, so it receives no signal.
  const forced = await testbed.cleanUp(settings.keep);
  for (const { done, what } of forced) terminal.cleaned(done, what);
  if (settings.keep) terminal.line(`kept: ${home}`);
  const left = forced.filter(({ done }) => !done).length;
  if (failure === undefined && forced.length > 0) failure = new CheckFailed("something was left over, see above");
  terminal.summary(failure, left, full);
  if (failure instanceof Interrupted) return interruptedStatus[failure.signal];
  return failure === undefined ? 0 : 1;
}

async function startAll(testbed: Testbed, terminal: Terminal, full: boolean, signal: AbortSignal): Promise<void> {
  terminal.heading("start");
  terminal.fact("directory", testbed.home);
  const startPart = async (name: string, start: () => Promise<string>) => {
    signal.throwIfAborted();
    const began = performance.now();
    const text = await start();
    terminal.fact(name, text, performance.now() - began);
  };
  await startPart("simulator", async () => {
    const { pid } = await testbed.startSimulator(full ? "loop" : "none", signal);
    const { grpcs, dagent, data } = testbed.addresses;
    const where = testbed.backend === "lightos"
      ? `${grpcs.length} servers at ${grpcs.join(", ")}`
      : `DAgent at ${dagent}`;
    return `pid ${pid}, ${where}, data plane ${data}`;
  });
  await startPart("controller", async () => {
    const { pid } = await testbed.startController(signal);
    return `pid ${pid}, ${await identify(testbed.controller, signal)}`;
  });
  if (!full) return;
  await startPart("node", async () => {
    const { pid } = await testbed.startNode(nodeId, signal);
    const info = await testbed.node.call(Node.method.nodeGetInfo, {}, { signal });
    return `pid ${pid}, ${await identify(testbed.node, signal)}, says it is ${info.nodeId}`;
  });
}

async function identify(channel: Channel, signal: AbortSignal): Promise<string> {
  const { name, vendorVersion } = await channel.call(Identity.method.getPluginInfo, {}, { signal });
  return `${name} ${vendorVersion}`;
}

/** @param thorough adds crashes, a second node, and each call twice */
async function fileSystemVolume(scenario: Scenario, fsType: DemoFsType, thorough: boolean): Promise<void> {
  const { testbed, terminal, signal } = scenario;
  terminal.heading(`${fsType} volume`);
  const volume = await prepareVolume(scenario, `demo-${fsType}`, {
    accessType: { case: "mount", value: { fsType } },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  const usedSize = await create(scenario, volume);
  await publish(scenario, volume);
  if (thorough) await publishToSecondNodeFails(scenario, volume);
  await stage(scenario, volume);
  scenario.check(
    `mkfs.${fsType} ran`,
    scenario.commands.some(({ command }) => programOf(command) === `mkfs.${fsType}`),
  );
  await nodePublish(scenario, volume);
  const mount = scenario.mountAt(volume.target);
  scenario.check(`${fsType} is mounted at the target`, mount?.fsType === fsType, mount?.fsType ?? "no mount");

  const written = await scenario.step(
    "write files",
    "pod",
    () => writeFiles(volume.target),
    ({ files, bytes, sum }) => [
      `${files} files, ${formatBytes(BigInt(bytes))}, SHA-256 ${sum.slice(0, 12)}…`,
    ],
  );
  const same = async (when: string) => {
    const found = await checksum(volume.target);
    scenario.verify(
      `the files are the same ${when}`,
      found.sum === written.sum,
      `${found.files} files, SHA-256 ${found.sum}`,
    );
  };
  await checkStats(scenario, volume, { writtenBytes: written.bytes, sizeBytes: usedSize });

  if (thorough) {
    await scenario.crash("node", () => testbed.startNode(nodeId, signal));
    await same("while no node process ran");
    terminal.note("every call again: each must answer as before and change nothing");
    await create(scenario, volume, "again");
    await publish(scenario, volume, "again");
    await stage(scenario, volume, "again");
    await nodePublish(scenario, volume, "again");
    await same("after the crash");
  }

  await takeFromNode(scenario, volume);
  if (thorough) {
    await takeFromNode(scenario, volume, "again");
    await scenario.crash("controller", () => testbed.startController(signal));
  }

  terminal.note("attach it once more: the data must be there");
  await publish(scenario, volume);
  await stage(scenario, volume);
  scenario.verify("no mkfs ran", scenario.commands.every(({ command }) => !programOf(command).startsWith("mkfs")));
  await nodePublish(scenario, volume);
  await same("after a new stage");
  await takeFromNode(scenario, volume);
  await remove(scenario, volume);
  if (thorough) await remove(scenario, volume, "again");
}

/** Asks for the statistics of a mounted volume, prints and checks them. */
async function checkStats(
  scenario: Scenario,
  volume: DemoVolume,
  { writtenBytes, sizeBytes }: { readonly writtenBytes: number; readonly sizeBytes: bigint },
): Promise<void> {
  const stats = await scenario.call(scenario.testbed.node, Node.method.nodeGetVolumeStats, {
    volumeId: volume.id,
    volumePath: volume.target,
  }, { unchanged: true, free: true });
  const bytes = stats.usage.find(({ unit }) => unit === Unit.BYTES);
  const inodes = stats.usage.find(({ unit }) => unit === Unit.INODES);
  scenario.terminal.detail("answer", [
    `${formatBytes(bytes?.used ?? 0n)} of ${formatBytes(bytes?.total ?? 0n)} used`,
    inodes === undefined || inodes.total === 0n
      ? "no fixed number of inodes"
      : `${inodes.used} of ${inodes.total} inodes`,
  ]);
  scenario.verify(
    "the statistics hold the written bytes and not more than the volume",
    bytes !== undefined && bytes.used >= BigInt(writtenBytes) && bytes.total <= sizeBytes &&
      bytes.total > sizeBytes / 2n,
    `used ${bytes?.used}, total ${bytes?.total}`,
  );
}

async function blockVolume(scenario: Scenario): Promise<void> {
  const { terminal } = scenario;
  terminal.heading("raw block volume");
  const volume = await prepareVolume(scenario, "demo-block", {
    accessType: { case: "block", value: {} },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  const size = await create(scenario, volume);
  await publish(scenario, volume);
  await stage(scenario, volume);
  scenario.verify("no mkfs ran", scenario.commands.every(({ command }) => !programOf(command).startsWith("mkfs")));
  await nodePublish(scenario, volume);
  const found = await Deno.stat(volume.target);
  scenario.verify("the target is a block device", found.isBlockDevice === true);
  const pattern = crypto.getRandomValues(new Uint8Array(64 << 10));
  const offsets = [0n, size / 2n, size - BigInt(pattern.length)];
  await scenario.step("write through the target", "pod", () => writeAt(volume.target, offsets, pattern), () => [
    `${formatBytes(BigInt(pattern.length))} of random bytes at ${offsets.map(String).join(", ")}`,
  ]);
  const same = async (when: string) => {
    const wrong = await differsAt(volume.target, offsets, pattern);
    scenario.verify(`the bytes are the same ${when}`, wrong === undefined, `they differ at ${wrong}`);
  };
  await same("through the target");
  await nodePublish(scenario, volume, "again");
  await takeFromNode(scenario, volume);
  terminal.note("attach it once more: the data must be there");
  await publish(scenario, volume);
  await stage(scenario, volume);
  await nodePublish(scenario, volume);
  await same("after a new stage");
  await takeFromNode(scenario, volume);
  await remove(scenario, volume);
}

async function controlPlaneVolume(scenario: Scenario): Promise<void> {
  scenario.terminal.heading("a volume on the control plane");
  const volume = await prepareVolume(scenario, "demo", {
    accessType: { case: "mount", value: { fsType: "ext4" } },
    accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
  });
  await create(scenario, volume);
  await create(scenario, volume, "again");
  await publish(scenario, volume);
  await publish(scenario, volume, "again");
  await publishToSecondNodeFails(scenario, volume);
  await scenario.crash("controller", () => scenario.testbed.startController(scenario.signal));
  await publish(scenario, volume, "again");
  await unpublish(scenario, volume);
  await unpublish(scenario, volume, "again");
  await remove(scenario, volume);
  await remove(scenario, volume, "again");
}

async function checkNothingIsLeft(scenario: Scenario): Promise<void> {
  const { testbed, terminal } = scenario;
  terminal.heading("nothing left over");
  const left = await testbed.clusterWhenIdle(scenario.signal);
  for (const [what, found] of Object.entries(left)) {
    scenario.verify(`cluster: no ${what}`, found.length === 0, found.join(", "));
  }
  const inventory = await testbed.observe();
  const mounts = inventory.mounts.map(({ at }) => testbed.shorten(at));
  scenario.verify("machine: no mounts", mounts.length === 0, mounts.join(", "));
  scenario.verify("machine: no loop devices", inventory.loops.length === 0, inventory.loops.join(", "));
  scenario.verify("machine: no Discovery-Client entries", inventory.entries.length === 0, inventory.entries.join(", "));
  for (const directory of ["staging", "pods"]) {
    const names = await listNames(join(testbed.home, directory)) ?? [];
    scenario.verify(`machine: no ${directory} directories`, names.length === 0, names.join(", "));
  }
  if (testbed.backend === "lightos") {
    const leaking = await testbed.logsContaining([testbed.addresses.jwt, testbed.addresses.adminJwt]);
    scenario.verify("the cluster's token is in no log", leaking.length === 0, leaking.join(", "));
  }
  for (const { name, exit } of await testbed.stopAll()) {
    scenario.verify(`${name} ended by itself on SIGTERM`, exit === "exit 0", exit);
  }
  const alive = await processesNaming(testbed.home);
  scenario.verify("no process is left", alive.length === 0, alive.join("; "));
}

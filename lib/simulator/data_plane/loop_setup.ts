/** What a loop data plane needs of its machine: directories of its own, loop devices, and what an earlier run left there. */
import { basename, dirname, join } from "node:path";
import { messageOf, StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import type { ClusterIdentity } from "../lightos/model.ts";
import { lockFile } from "../state_file.ts";
import { Contents, copySparse, exists, removeFile } from "./contents.ts";
import { allLoops, backingFile, deviceNumber } from "./loop_device.ts";
import { output, readText, run } from "./run_command.ts";
import { nameInTree } from "./sysfs.ts";

export interface LoopOptions {
  /** Where the contents live. */
  readonly contentDir: string;
  readonly discoveryDir: string;
  readonly devRoot: string;
  readonly sysfsRoot: string;
  /** Where the machine's `nvme` is put. */
  readonly programs: string;
  readonly identity: ClusterIdentity;
  readonly log: Logger;
}

/** File that marks a directory whose content the simulator may remove. The simulator that uses the directory locks it. */
export const marker = ".lbcsi-simulator";

/**
 * Locks the directories of a data plane and tries what it needs of the machine.
 *
 * @param held receives the locks
 * @throws StatusError FAILED_PRECONDITION that names what is missing, or a directory that holds something else
 */
export async function prepareMachine(options: LoopOptions, held: AsyncDisposableStack): Promise<void> {
  const machineError = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot use data plane "loop": ${problem}`, { cause });
  if (Deno.build.os !== "linux") throw machineError("loop devices need Linux");
  if (Deno.uid() !== 0) throw machineError("it needs root, this process has user ID " + Deno.uid());
  if (!exists("/dev/loop-control")) throw machineError("/dev/loop-control is missing, load the module loop");
  await Contents.open(options.contentDir);
  for (const root of [options.devRoot, options.sysfsRoot]) {
    await Deno.mkdir(root, { recursive: true });
    const names = [...Deno.readDirSync(root)].map(({ name }) => name);
    if (names.length > 0 && !names.includes(marker)) {
      throw machineError(`directory ${root} holds ${names[0]}, an empty one or one of its own is needed`);
    }
    held.use(await lockFile(join(root, marker), root));
  }
  // Tried once with a real device, because containers forbid these steps in different ways.
  const file = join(options.contentDir, `probe-${crypto.randomUUID()}`);
  const node = join(options.devRoot, `probe-${crypto.randomUUID()}`);
  let loop: string | undefined;
  try {
    await Deno.writeFile(file, new Uint8Array(4096));
    loop = await output("losetup", "-f", "--show", file).catch((cause) => {
      throw machineError(`no loop device can be set up (${messageOf(cause)})`, cause);
    });
    const [major = "", minor = ""] = deviceNumber(loop).split(":");
    await output("mknod", node, "b", major, minor).catch((cause) => {
      throw machineError(`no device node can be made in ${options.devRoot} (${messageOf(cause)})`, cause);
    });
    try {
      (await Deno.open(node)).close();
    } catch (cause) {
      throw machineError(`device nodes in ${options.devRoot} cannot be opened, it must not be mounted "nodev"`, cause);
    }
  } finally {
    if (loop !== undefined) await run("losetup", "-d", loop);
    await removeFile(node);
    await removeFile(file);
  }
}

/** A loop device of an earlier run, and the name that its namespace had. */
export interface AdoptableLoop {
  readonly loop: string;
  readonly name: string | undefined;
}

/**
 * Loop devices that an earlier run left behind, by the UUID of their volume. Those that cannot be taken over, because the
 * volume is gone or the device was already detached, are detached as far as possible.
 */
export async function adoptableLoops({ contentDir, sysfsRoot, log }: LoopOptions): Promise<Map<string, AdoptableLoop>> {
  const found = new Map<string, AdoptableLoop>();
  const volumes = join(contentDir, "volumes");
  for (const loop of allLoops()) {
    const file = backingFile(loop);
    if (file === undefined || dirname(file) !== volumes) continue;
    const uuid = /^([0-9a-f-]{36})\.img$/.exec(basename(file))?.[1];
    const isDetached = readText(`/sys/block/${basename(loop)}/loop/autoclear`) === "1";
    if (uuid !== undefined && !isDetached && exists(file) && !found.has(uuid)) {
      found.set(uuid, { loop, name: nameInTree(sysfsRoot, deviceNumber(loop)) });
      continue;
    }
    log.info("detaches a loop device of an earlier run", { device: loop });
    await run("losetup", "-d", loop);
    if (uuid === undefined || !exists(file)) continue;
    if (backingFile(loop) !== file) continue;
    // It is still mounted: the volume continues in a copy, so that two devices never write to one file.
    await Deno.link(file, `${file}.dead`);
    await copySparse(file, `${file}.new`);
    await Deno.rename(`${file}.new`, file);
    await Deno.truncate(`${file}.dead`, 0);
    await run("losetup", "-c", loop);
    await removeFile(`${file}.dead`);
  }
  return found;
}

/** Removes the device nodes and links of an earlier run. */
export function clearNodes(devRoot: string): void {
  for (const { name } of Deno.readDirSync(devRoot)) {
    if (/^(nvme\d+n\d+|probe-.*)~?$/.test(name)) Deno.removeSync(join(devRoot, name));
  }
  if (exists(join(devRoot, "disk"))) Deno.removeSync(join(devRoot, "disk"), { recursive: true });
}

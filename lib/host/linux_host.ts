/** The Linux machine that the driver runs on, through Deno. Volumes are touched on threads of their own (volume_threads.ts). */
import { StatusError } from "../error.ts";
import type { Logger } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import type { Host, PathKind, Roots } from "./host.ts";
import { PendingAnswers } from "./pending.ts";
import { runCommand } from "./run_command.ts";
import { SharedWatcher } from "./shared_watcher.ts";
import { VolumeThreads } from "./volume_threads.ts";

/** Where the machine's directories are, and what receives log lines and metrics. */
export interface LinuxHostOptions {
  readonly log: Logger;
  readonly metrics?: Metrics | undefined;
  readonly sysfsRoot?: string;
  readonly devRoot?: string;
  readonly procRoot?: string;
}

/** The machine that the driver runs on. */
export function createLinuxHost(options: LinuxHostOptions): Host {
  const { log, metrics } = options;
  const roots = {
    sysfs: options.sysfsRoot ?? "/sys",
    dev: options.devRoot ?? "/dev",
    proc: options.procRoot ?? "/proc",
  };
  const watchers = new Map<string, SharedWatcher>();
  const threads = new VolumeThreads();
  return {
    roots,
    pending: new PendingAnswers(),
    run: (program, args, run) => runCommand(program, args, run, { log: run.log ?? log, metrics }),
    kindOf,
    blockNumber,
    realPath: (path) => absentAsUndefined(Deno.realPath(path)),
    readLink: (path) => absentAsUndefined(Deno.readLink(path)),
    makeDirectory,
    makeFile,
    removeEmpty,
    list: (directory) => list(roots, directory),
    readText: (path) => readText(roots, path),
    replaceText,
    writeAttribute: (path, text) => Deno.writeTextFile(path, text, { create: false }),
    exchange,
    remove,
    readBytes: (path, offsetBytes, lengthBytes) => threads.perform("readBytes", path, offsetBytes, lengthBytes),
    writeDevice: (path, offsetBytes, bytes) => threads.perform("writeDevice", path, offsetBytes, bytes),
    lookUp: (directory) => threads.perform("lookUp", directory),
    tryWrite: (directory) => threads.perform("tryWrite", directory),
    usage: (path) => threads.perform("usage", path),
    watch(directory, changed) {
      const watcher = watchers.get(directory) ?? new SharedWatcher(directory, log);
      watchers.set(directory, watcher);
      return watcher.listen(changed);
    },
  };
}

/** `major:minor`, as in sysfs and mountinfo, for a `st_rdev` in the encoding of glibc. */
export function formatDeviceNumber(rdev: number): string {
  const bits = BigInt(rdev);
  const major = ((bits >> 8n) & 0xfffn) | ((bits >> 32n) & 0xfffff000n);
  const minor = (bits & 0xffn) | ((bits >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

async function kindOf(path: string): Promise<PathKind> {
  const found = await absentAsUndefined(Deno.lstat(path));
  if (found === undefined) return "absent";
  if (found.isDirectory) return "directory";
  if (found.isSymlink) return "symlink";
  if (found.isBlockDevice) return "block";
  return found.isFile ? "file" : "other";
}

async function blockNumber(path: string): Promise<string | undefined> {
  const found = await absentAsUndefined(Deno.stat(path));
  return found?.isBlockDevice && found.rdev !== null ? formatDeviceNumber(found.rdev) : undefined;
}

async function makeDirectory(path: string): Promise<void> {
  try {
    await Deno.mkdir(path, { mode: 0o750 });
  } catch (error) {
    if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
  }
}

async function makeFile(path: string): Promise<void> {
  (await Deno.open(path, { write: true, create: true, mode: 0o640 })).close();
}

async function removeEmpty(path: string): Promise<void> {
  const removeError = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot remove "${path}": ${problem}`, { cause });
  const found = await absentAsUndefined(Deno.lstat(path));
  if (found === undefined) return;
  if (found.isFile) {
    if (found.size > 0) throw removeError(`it is a file with ${found.size} bytes of content, which are left alone`);
  } else if (!found.isDirectory) {
    throw removeError("it is neither a directory nor a file, and left alone");
  }
  try {
    await remove(path);
  } catch (error) {
    if (!found.isDirectory) throw error;
    const names = await Array.fromAsync(Deno.readDir(path), (entry) => entry.name);
    if (names.length === 0) throw error;
    const some = names.sort().slice(0, 3).map((name) => `"${name}"`).join(", ");
    throw removeError(`it holds ${some}${names.length > 3 ? ", …" : ""}, which are left alone`, error);
  }
}

async function list(roots: Roots, directory: string): Promise<readonly string[] | undefined> {
  // The kernel's own directories answer from memory, 100 times as fast without the detour over a thread.
  const names = isKernelPath(roots, directory)
    ? Promise.try(() => Array.from(Deno.readDirSync(directory), (entry) => entry.name))
    : Array.fromAsync(Deno.readDir(directory), (entry) => entry.name);
  return (await absentAsUndefined(names))?.sort();
}

async function readText(roots: Roots, path: string): Promise<string | undefined> {
  const text = isKernelPath(roots, path) ? Promise.try(() => Deno.readTextFileSync(path)) : Deno.readTextFile(path);
  return await absentAsUndefined(text);
}

function isKernelPath(roots: Roots, path: string): boolean {
  return path.startsWith(`${roots.sysfs}/`) || path.startsWith(`${roots.proc}/`);
}

async function replaceText(path: string, text: string, temporary: string): Promise<void> {
  await remove(temporary);
  try {
    const file = await Deno.open(temporary, { write: true, createNew: true, mode: 0o600 });
    try {
      const bytes = new TextEncoder().encode(text);
      for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
      await file.sync();
    } finally {
      file.close();
    }
    await Deno.rename(temporary, path);
  } catch (error) {
    await remove(temporary);
    throw error;
  }
}

async function exchange(path: string, text: string): Promise<string> {
  using file = await Deno.open(path, { read: true, write: true });
  await file.write(new TextEncoder().encode(text));
  const answer = new Uint8Array(4096);
  const length = await file.read(answer) ?? 0;
  return new TextDecoder().decode(answer.subarray(0, length));
}

async function remove(path: string): Promise<void> {
  await absentAsUndefined(Deno.remove(path));
}

async function absentAsUndefined<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return undefined;
    throw error;
  }
}

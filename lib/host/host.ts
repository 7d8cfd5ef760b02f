/**
 * The Linux machine under the node service: all that the driver asks of it, low on purpose, so that the rooms above are
 * plain functions which a test can run against a make-believe machine. Only this file, volume_operations.ts and
 * volume_threads.ts use `Deno`.
 *
 * Paths are taken as given. Nothing here removes recursively, follows a device name to an identity, or knows NVMe.
 */
import { basename } from "node:path";
import type { Logger } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Metrics } from "../metrics.ts";
import { PendingAnswers } from "./pending.ts";
import type { VolumeOperations } from "./volume_operations.ts";
import { VolumeThreads } from "./volume_threads.ts";

/** What a command left behind. Output is cut at 1 MiB per stream. */
export interface CommandResult {
  /** Exit status; 128 + n when signal n ended it. */
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly signal: AbortSignal;
  /**
   * What becomes of the command when the signal aborts. `kill`, for probes: it is ended, and given up when it cannot be.
   * `finish`, for what changes the machine: it runs to its end, then `signal.reason` is thrown. A half-made file system
   * is worse than a late answer.
   */
  readonly onAbort: "kill" | "finish";
  /** Receives the line about this command; the machine's own logger when absent. */
  readonly log?: Logger;
  /** Text for its standard input; empty when absent. Never a place to save a secret in a log: it is not logged. */
  readonly stdin?: string;
}

/** What a path names, without following a symbolic link at its end. */
export type Kind = "absent" | "directory" | "file" | "block" | "symlink" | "other";

/** Where the kernel's directories are: a container can have the machine's at other places than `/sys`, `/dev`, `/proc`. */
export interface Roots {
  readonly sysfs: string;
  readonly dev: string;
  readonly proc: string;
}

export interface Host extends VolumeOperations {
  readonly roots: Roots;
  /** Which volumes owe an answer: one memory for all calls of a node. */
  readonly pending: PendingAnswers;
  /**
   * Runs a command with `LC_ALL=C` in a process group of its own. A non-zero exit is an answer, not a failure.
   *
   * @throws StatusError FAILED_PRECONDITION when the program is missing; DEADLINE_EXCEEDED when it was killed and does not
   *   end; `signal.reason` when the signal has aborted
   */
  run(program: string, args: readonly string[], options: RunOptions): Promise<CommandResult>;
  kindOf(path: string): Promise<Kind>;
  /** `major:minor` of the block device node at `path` (links and bind mounts followed); undefined for all else. */
  blockNumber(path: string): Promise<string | undefined>;
  /** `path` without symbolic links; undefined when it does not exist. */
  realPath(path: string): Promise<string | undefined>;
  /** Where a symbolic link points; undefined when there is none. */
  readLink(path: string): Promise<string | undefined>;
  /** Makes one directory, mode 0750, in an existing one. Exists: done. */
  makeDirectory(path: string): Promise<void>;
  /** Makes an empty file, mode 0640, in an existing directory. Exists: done, its content stays. */
  makeFile(path: string): Promise<void>;
  /**
   * Removes an empty directory or an empty file. Absent: done.
   *
   * @throws StatusError FAILED_PRECONDITION when something is in it, or it is neither
   */
  removeEmpty(path: string): Promise<void>;
  /** Names in a directory, sorted; undefined when it does not exist. */
  list(directory: string): Promise<readonly string[] | undefined>;
  /** A small text file; undefined when it does not exist. */
  readText(path: string): Promise<string | undefined>;
  /**
   * Makes or replaces a file (mode 0600) in one step: `temporary`, in the same directory, is written and renamed. What an
   * earlier process left there goes.
   */
  replaceText(path: string, text: string, temporary: string): Promise<void>;
  /** Writes an existing file in place, as attributes in sysfs want it. */
  writeAttribute(path: string, text: string): Promise<void>;
  /**
   * Writes `text` to a device in one piece and reads what the device answers to that, as `/dev/nvme-fabrics` wants it. Neither
   * is logged, for this is the way by which keys reach the kernel. It takes as long as the kernel does, which hears of no
   * signal; throws what the kernel answers, with `(os error N)` in the message.
   */
  exchange(path: string, text: string): Promise<string>;
  /** Removes one file. Absent: done. */
  remove(path: string): Promise<void>;
  /** Calls `changed` soon after an entry of `directory` came, went or was touched, until disposed. At best effort: poll too. */
  watch(directory: string, changed: () => void): Disposable;
}

/** What `path` names, symbolic links followed; `absent` also for a link that leads nowhere. */
export async function kindBehind(host: Pick<Host, "kindOf" | "realPath">, path: string): Promise<Kind> {
  const kind = await host.kindOf(path);
  if (kind !== "symlink") return kind;
  const real = await host.realPath(path);
  return real === undefined ? "absent" : await host.kindOf(real);
}

export interface LinuxHostOptions {
  readonly log: Logger;
  readonly metrics?: Metrics | undefined;
  readonly sysfsRoot?: string;
  readonly devRoot?: string;
  readonly procRoot?: string;
}

const longestOutputBytes = 1 << 20;
// From SIGTERM to SIGKILL, from there to giving up, and from the end of a command to the end of listening to children of
// its own which keep its output open.
const terminateMs = 1000;
const killMs = 2000;
const lingerMs = 500;

/** The machine that the driver runs on. */
export function linuxHost(options: LinuxHostOptions): Host {
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
    run: (program, args, run) => runCommand(program, args, run, run.log ?? options.log, options.metrics),
    async kindOf(path) {
      const found = await absentAsUndefined(Deno.lstat(path));
      if (found === undefined) return "absent";
      if (found.isDirectory) return "directory";
      if (found.isSymlink) return "symlink";
      if (found.isBlockDevice) return "block";
      return found.isFile ? "file" : "other";
    },
    async blockNumber(path) {
      const found = await absentAsUndefined(Deno.stat(path));
      return found?.isBlockDevice && found.rdev !== null ? formatDeviceNumber(found.rdev) : undefined;
    },
    realPath: (path) => absentAsUndefined(Deno.realPath(path)),
    readLink: (path) => absentAsUndefined(Deno.readLink(path)),
    async makeDirectory(path) {
      try {
        await Deno.mkdir(path, { mode: 0o750 });
      } catch (error) {
        if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
      }
    },
    async makeFile(path) {
      (await Deno.open(path, { write: true, create: true, mode: 0o640 })).close();
    },
    removeEmpty,
    readBytes: (path, offsetBytes, lengthBytes) => threads.perform("readBytes", path, offsetBytes, lengthBytes),
    writeDevice: (path, offsetBytes, bytes) => threads.perform("writeDevice", path, offsetBytes, bytes),
    lookUp: (directory) => threads.perform("lookUp", directory),
    tryWrite: (directory) => threads.perform("tryWrite", directory),
    usage: (path) => threads.perform("usage", path),
    async list(directory) {
      // The kernel's own directories answer from memory, 100 times as fast without the detour over a thread.
      if (isKernelPath(roots, directory)) {
        return await absentAsUndefined(
          Promise.try(() => Array.from(Deno.readDirSync(directory), (entry) => entry.name).sort()),
        );
      }
      return await absentAsUndefined(
        Array.fromAsync(Deno.readDir(directory), (entry) => entry.name).then((names) => names.sort()),
      );
    },
    readText: (path) =>
      absentAsUndefined(
        isKernelPath(roots, path) ? Promise.try(() => Deno.readTextFileSync(path)) : Deno.readTextFile(path),
      ),
    async replaceText(path, text, temporary) {
      await absentAsUndefined(Deno.remove(temporary));
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
        await absentAsUndefined(Deno.remove(temporary));
        throw error;
      }
    },
    writeAttribute: (path, text) => Deno.writeTextFile(path, text, { create: false }),
    async exchange(path, text) {
      using file = await Deno.open(path, { read: true, write: true });
      await file.write(new TextEncoder().encode(text));
      const answer = new Uint8Array(4096);
      const length = await file.read(answer) ?? 0;
      return new TextDecoder().decode(answer.subarray(0, length));
    },
    async remove(path) {
      await absentAsUndefined(Deno.remove(path));
    },
    watch(directory, changed) {
      const watcher = watchers.get(directory) ?? new SharedWatcher(directory, options.log);
      watchers.set(directory, watcher);
      return watcher.listen(changed);
    },
  };
}

/** `major:minor`, as sysfs and mountinfo write it, of a `st_rdev` in glibc's encoding. */
export function formatDeviceNumber(rdev: number): string {
  const bits = BigInt(rdev);
  const major = ((bits >> 8n) & 0xfffn) | ((bits >> 32n) & 0xfffff000n);
  const minor = (bits & 0xffn) | ((bits >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

function isKernelPath(roots: Roots, path: string): boolean {
  return path.startsWith(`${roots.sysfs}/`) || path.startsWith(`${roots.proc}/`);
}

async function absentAsUndefined<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return undefined;
    throw error;
  }
}

async function removeEmpty(path: string): Promise<void> {
  const refuse = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot remove "${path}": ${problem}`, { cause });
  const found = await absentAsUndefined(Deno.lstat(path));
  if (found === undefined) return;
  if (found.isFile) {
    if (found.size > 0) throw refuse(`it is a file with ${found.size} bytes of content, which are left alone`);
  } else if (!found.isDirectory) {
    throw refuse("it is neither a directory nor a file, and left alone");
  }
  try {
    await absentAsUndefined(Deno.remove(path));
  } catch (error) {
    if (!found.isDirectory) throw error;
    const names = await Array.fromAsync(Deno.readDir(path), (entry) => entry.name);
    if (names.length === 0) throw error;
    const some = names.sort().slice(0, 3).map((name) => `"${name}"`).join(", ");
    throw refuse(`it holds ${some}${names.length > 3 ? ", …" : ""}, which are left alone`, error);
  }
}

// ---------------------------------------------------------------------------------------------------------- commands

// Debian's names of the packages; most distributions use the same.
const packages: Readonly<Record<string, string>> = {
  "blkid": "util-linux",
  "blockdev": "util-linux",
  "wipefs": "util-linux",
  "mount": "mount (util-linux)",
  "umount": "mount (util-linux)",
  "mkfs.ext4": "e2fsprogs",
  "e2fsck": "e2fsprogs",
  "resize2fs": "e2fsprogs",
  "mkfs.xfs": "xfsprogs",
  "xfs_growfs": "xfsprogs",
  "mkfs.btrfs": "btrfs-progs",
  "btrfs": "btrfs-progs",
  "nvme": "nvme-cli",
  "cryptsetup": "cryptsetup",
};

async function runCommand(
  program: string,
  args: readonly string[],
  { signal, onAbort, stdin }: RunOptions,
  log: Logger,
  metrics: Metrics | undefined,
): Promise<CommandResult> {
  signal.throwIfAborted();
  const started = performance.now();
  const command = [program, ...args].join(" ");
  const child = spawn(program, args, stdin !== undefined);
  const listening = new AbortController();
  const stdout = capture(child.stdout, listening.signal);
  const stderr = capture(child.stderr, listening.signal);
  const fed = stdin === undefined ? Promise.resolve() : feed(child, stdin);
  const ended = child.status.then(async (status) => {
    const linger = setTimeout(() => listening.abort(), lingerMs);
    const [out, err] = await Promise.all([stdout, stderr, fed]);
    clearTimeout(linger);
    return { code: status.code, stdout: out, stderr: err };
  });

  let ending: Promise<CommandResult | undefined> | undefined;
  let abort: (() => void) | undefined;
  const aborted = new Promise<void>((resolve) => {
    if (onAbort === "finish") return;
    abort = () => {
      ending = endGroup(child, ended);
      resolve();
    };
    signal.addEventListener("abort", abort, { once: true });
  });
  const first = await Promise.race([ended, aborted]);
  if (abort !== undefined) signal.removeEventListener("abort", abort);
  const result = ending === undefined ? first ?? await ended : await ending;
  const ms = Math.round(performance.now() - started);
  // Of its arguments, which name devices, nothing.
  metrics?.count("lbcsi_commands_total", [basename(program), result === undefined ? "none" : String(result.code)]);
  metrics?.observe("lbcsi_command_duration_seconds", [basename(program)], ms / 1000);
  if (result === undefined) {
    listening.abort();
    // Nobody waits for it any more, so its end must not keep the driver from stopping.
    child.unref();
    log.warning("gave up a command that cannot be killed", { command, ms });
    throw new StatusError(
      "DEADLINE_EXCEEDED",
      `Cannot finish "${command}": it does not end although it was killed, most likely it waits for a device without a ` +
        `working path`,
      { cause: signal.reason },
    );
  }
  const facts = { command, exit: result.code, ms };
  if (onAbort === "finish") log.info("ran a command", facts);
  else log.debug("ran a probe", facts);
  signal.throwIfAborted();
  return result;
}

/** What the machine has too little of to start a program, by the code of the system, and what to do. */
const shortages: Readonly<Record<string, string>> = {
  EMFILE:
    "the driver has no file descriptor left, raise its limit (ulimit -n) or use fewer volumes at once on this node",
  ENFILE: "this node has no file descriptor left, raise fs.file-max or end what holds them",
  EAGAIN: "this node allows no further process, raise the limit of processes (pids) of the pod or of the node",
  ENOMEM: "this node has no memory left, give the pod or the node more",
};

function spawn(program: string, args: readonly string[], withInput: boolean): Deno.ChildProcess {
  try {
    return new Deno.Command(program, {
      args: [...args],
      env: { LC_ALL: "C" },
      stdin: withInput ? "piped" : "null",
      stdout: "piped",
      stderr: "piped",
      // A process group of its own, so that a signal reaches its children too.
      detached: true,
    }).spawn();
  } catch (error) {
    const shortage = shortages[systemCode(error) ?? ""];
    if (shortage !== undefined) {
      // Nothing has run, so the caller can undo or repeat what it has begun.
      throw new StatusError("UNAVAILABLE", `Cannot run ${program}: ${shortage}`, { cause: error });
    }
    if (!(error instanceof Deno.errors.NotFound) && !(error instanceof Deno.errors.PermissionDenied)) throw error;
    const problem = error instanceof Deno.errors.NotFound ? absenceOf(program) : messageOf(error);
    throw new StatusError("FAILED_PRECONDITION", `Cannot run ${program}: ${problem}${needOf(program)}`, {
      cause: error,
    });
  }
}

/**
 * Why a program cannot be run here, in the words of Host.run, and nothing is run to find out; undefined: it is in PATH. For
 * a command that is to say all that is missing before it begins.
 */
export function programProblem(program: string): string | undefined {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  if (path.some((directory) => isFile(`${directory}/${program}`))) return undefined;
  return `${absenceOf(program)}${needOf(program)}`;
}

/** Ends an error about a program that is missing. */
function needOf(program: string): string {
  const wanted = packages[basename(program)];
  return wanted === undefined ? "" : `, the package ${wanted} is needed on this node`;
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** Where distributions keep what only root can use; not in PATH of ordinary users, nor after `su` without `-`. */
const systemDirectories = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/** Why a program was not found. */
function absenceOf(program: string): string {
  const directory = program.includes("/")
    ? undefined
    : systemDirectories.find((directory) => isFile(`${directory}/${program}`));
  if (directory === undefined) return "it is not installed";
  return `it is in ${directory}, which is not in PATH (${Deno.env.get("PATH") ?? ""})`;
}

/** Ends the whole process group: SIGTERM, then SIGKILL. Undefined when even that does not end it. */
async function endGroup(
  child: Deno.ChildProcess,
  ended: Promise<CommandResult>,
): Promise<CommandResult | undefined> {
  for (const [signal, waitMs] of [["SIGTERM", terminateMs], ["SIGKILL", killMs]] as const) {
    try {
      Deno.kill(-child.pid, signal);
    } catch {
      // The group is gone already.
    }
    let timer: ReturnType<typeof setTimeout> | undefined;
    const late = new Promise<undefined>((resolve) => timer = setTimeout(() => resolve(undefined), waitMs));
    const result = await Promise.race([ended, late]);
    clearTimeout(timer);
    if (result !== undefined) {
      // The command went, a child of it that ignores SIGTERM may not have.
      try {
        Deno.kill(-child.pid, "SIGKILL");
      } catch {
        // None was left.
      }
      return result;
    }
  }
  return undefined;
}

async function capture(stream: ReadableStream<Uint8Array>, signal: AbortSignal): Promise<string> {
  const reader = stream.getReader();
  const stop = () => void reader.cancel().catch(() => {});
  signal.addEventListener("abort", stop, { once: true });
  const chunks: Uint8Array[] = [];
  let length = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    // What is over the cap is read and dropped: a command whose pipe is full would never end.
    const kept = value.subarray(0, longestOutputBytes - length);
    if (kept.length > 0) chunks.push(kept);
    length += kept.length;
  }
  signal.removeEventListener("abort", stop);
  const all = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    all.set(chunk, at);
    at += chunk.length;
  }
  return new TextDecoder().decode(all);
}

async function feed(child: Deno.ChildProcess, text: string): Promise<void> {
  const writer = child.stdin.getWriter();
  try {
    await writer.write(new TextEncoder().encode(text));
    await writer.close();
  } catch {
    // It ended without reading its input; its exit status tells.
  }
}

// ---------------------------------------------------------------------------------------------------------- watching

// A watcher opened in the same tick as another one on the same directory was closed never hears anything, for good
// (Deno 2.9, seen on /dev). So one watcher serves all listeners, and a new one keeps a distance to the old.
const reopenMs = 20;

class SharedWatcher {
  readonly #directory: string;
  readonly #log: Logger;
  readonly #listeners = new Set<() => void>();
  #watcher: Deno.FsWatcher | undefined;
  #opening: ReturnType<typeof setTimeout> | undefined;
  #closedAt = -Infinity;

  constructor(directory: string, log: Logger) {
    this.#directory = directory;
    this.#log = log;
  }

  listen(changed: () => void): Disposable {
    // A wrapper, so that one function can listen twice.
    const listener = () => changed();
    this.#listeners.add(listener);
    if (this.#watcher === undefined && this.#opening === undefined) {
      const waitMs = this.#closedAt + reopenMs - performance.now();
      if (waitMs <= 0) this.#open();
      else {
        this.#opening = setTimeout(() => {
          this.#open();
          // What happened in between was not seen.
          for (const listener of this.#listeners) listener();
        }, waitMs);
      }
    }
    return {
      [Symbol.dispose]: () => {
        this.#listeners.delete(listener);
        if (this.#listeners.size === 0) this.#close();
      },
    };
  }

  #open(): void {
    this.#opening = undefined;
    try {
      this.#watcher = Deno.watchFs(this.#directory, { recursive: false });
    } catch (error) {
      // Polling goes on; the directory may come later.
      this.#log.debug("cannot watch", { path: this.#directory, error: messageOf(error) });
      return;
    }
    this.#deliver(this.#watcher);
  }

  async #deliver(watcher: Deno.FsWatcher): Promise<void> {
    try {
      for await (const event of watcher) {
        // Every open and close in /dev is an event of kind access.
        if (event.kind === "access") continue;
        for (const listener of this.#listeners) listener();
      }
    } catch (error) {
      this.#log.debug("lost a watch", { path: this.#directory, error: messageOf(error) });
    }
  }

  #close(): void {
    clearTimeout(this.#opening);
    this.#opening = undefined;
    if (this.#watcher === undefined) return;
    this.#watcher.close();
    this.#watcher = undefined;
    this.#closedAt = performance.now();
  }
}

/**
 * The contract of the Linux machine under the node service: everything that the driver asks of it. It is low-level on purpose,
 * so that the code above consists of plain functions which tests can run against a fake machine. linux_host.ts implements it.
 *
 * Paths are taken as given. Nothing here removes recursively, looks for the identity behind a device name, or knows NVMe.
 */
import type { Logger } from "../log.ts";
import { PendingAnswers } from "./pending.ts";
import type { VolumeOperations } from "./volume_operations.ts";

/** The result of a command. Output is cut at 1 MiB per stream. */
export interface CommandResult {
  /** Exit status; 128 + n when signal n ended it. */
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** How a command is run. */
export interface RunOptions {
  readonly signal: AbortSignal;
  /**
   * What happens to the command when the signal aborts. `kill`, for probes: it is killed, and abandoned when that does not end
   * it. `finish`, for commands that change the machine: it runs to its end, then `signal.reason` is thrown. A half-made file
   * system is worse than a late answer.
   */
  readonly onAbort: "kill" | "finish";
  /** Receives the line about this command; absent: the machine's own logger. */
  readonly log?: Logger;
  /** Text for its standard input, which is not logged and so may be a secret; absent: empty. */
  readonly stdin?: string;
}

/** What is at a path, without following a symbolic link at its end. */
export type PathKind = "absent" | "directory" | "file" | "block" | "symlink" | "other";

/** Where the machine's `/sys`, `/dev` and `/proc` are; in a container they can be at other paths. */
export interface Roots {
  readonly sysfs: string;
  readonly dev: string;
  readonly proc: string;
}

/** The machine. All calls of a node share one. */
export interface Host extends VolumeOperations {
  readonly roots: Roots;
  /** Which volumes have not answered an operation. */
  readonly pending: PendingAnswers;
  /**
   * Runs a command with `LC_ALL=C` in a process group of its own. A non-zero exit is returned, not thrown.
   *
   * @throws StatusError FAILED_PRECONDITION when the program is missing; DEADLINE_EXCEEDED when it was killed and does not
   *   end; UNAVAILABLE when the machine has no process, memory or file descriptor left for it; `signal.reason` when the signal has aborted
   */
  run(program: string, args: readonly string[], options: RunOptions): Promise<CommandResult>;
  kindOf(path: string): Promise<PathKind>;
  /** `major:minor` of the block device node at `path` (links and bind mounts followed); undefined for everything else. */
  blockNumber(path: string): Promise<string | undefined>;
  /** `path` without symbolic links; undefined when it does not exist. */
  realPath(path: string): Promise<string | undefined>;
  /** Where a symbolic link points; undefined when there is none. */
  readLink(path: string): Promise<string | undefined>;
  /** Makes one directory, mode 0750, in an existing one. Does nothing when it exists. */
  makeDirectory(path: string): Promise<void>;
  /** Makes an empty file, mode 0640, in an existing directory. Does nothing when it exists: its content stays. */
  makeFile(path: string): Promise<void>;
  /**
   * Removes an empty directory or an empty file. Does nothing when it is absent.
   *
   * @throws StatusError FAILED_PRECONDITION when it is not empty, or neither of them
   */
  removeEmpty(path: string): Promise<void>;
  /** Names in a directory, sorted; undefined when it does not exist. */
  list(directory: string): Promise<readonly string[] | undefined>;
  /** A small text file; undefined when it does not exist. */
  readText(path: string): Promise<string | undefined>;
  /**
   * Makes or replaces a file (mode 0600) atomically: `temporary`, in the same directory, is written and renamed. A file that an
   * earlier process left there is replaced.
   */
  replaceText(path: string, text: string, temporary: string): Promise<void>;
  /** Writes an existing file in place, as attributes in sysfs require. */
  writeAttribute(path: string, text: string): Promise<void>;
  /**
   * Writes `text` to a device in one piece and reads its answer, as `/dev/nvme-fabrics` requires. Neither is logged, because
   * keys reach the kernel this way. It returns when the kernel does and cannot be cancelled; throws the error of the kernel,
   * with `(os error N)` in the message.
   */
  exchange(path: string, text: string): Promise<string>;
  /** Removes one file. Does nothing when it is absent. */
  remove(path: string): Promise<void>;
  /** Calls `changed` soon after an entry of `directory` appears, disappears or changes, until disposed. Not reliable: poll too. */
  watch(directory: string, changed: () => void): Disposable;
}

/** What is at `path`, symbolic links followed; `absent` also for a link that leads nowhere. */
export async function kindBehind(host: Pick<Host, "kindOf" | "realPath">, path: string): Promise<PathKind> {
  const kind = await host.kindOf(path);
  if (kind !== "symlink") return kind;
  const real = await host.realPath(path);
  return real === undefined ? "absent" : await host.kindOf(real);
}

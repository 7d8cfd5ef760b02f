/**
 * The Linux machine under the node service: all that the driver asks of it, low on purpose, so that the rooms above are
 * plain functions which a test can run against a make-believe machine. Only this file, volume_operations.ts and
 * volume_threads.ts use `Deno`.
 *
 * Paths are taken as given. Nothing here removes recursively, follows a device name to an identity, or knows NVMe.
 */
import type { Logger } from "../context.ts";
import { PendingAnswers } from "./pending.ts";
import type { VolumeOperations } from "./volume_operations.ts";

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

/** Runs commands: the only place that knows how `Deno.Command` behaves when a signal aborts (it never rejects). */
import { basename } from "node:path";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Logger } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import type { CommandResult, RunOptions } from "./host.ts";
import { absenceOf, needOf } from "./programs.ts";

/** Runs a command, see Host.run; logs and counts it. */
export async function runCommand(
  program: string,
  args: readonly string[],
  { signal, onAbort, stdin }: RunOptions,
  { log, metrics }: { readonly log: Logger; readonly metrics: Metrics | undefined },
): Promise<CommandResult> {
  signal.throwIfAborted();
  const started = performance.now();
  const command = [program, ...args].join(" ");
  const child = spawn(program, args, stdin !== undefined);
  const listening = new AbortController();
  const ended = collectResult(child, stdin, listening);
  const result = onAbort === "finish" ? await ended : await endedOrKilled(child, ended, signal);
  const ms = Math.round(performance.now() - started);
  // Without the arguments, which name devices.
  metrics?.count("lbcsi_commands_total", [basename(program), result === undefined ? "none" : String(result.code)]);
  metrics?.observe("lbcsi_command_duration_seconds", [basename(program)], ms / 1000);
  if (result === undefined) {
    listening.abort();
    // Nothing waits for it any more, so it must not keep the driver from stopping.
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
      // Nothing has run, so the caller can undo or repeat its work.
      throw new StatusError("UNAVAILABLE", `Cannot run ${program}: ${shortage}`, { cause: error });
    }
    if (!(error instanceof Deno.errors.NotFound) && !(error instanceof Deno.errors.PermissionDenied)) throw error;
    const problem = error instanceof Deno.errors.NotFound ? absenceOf(program) : messageOf(error);
    throw new StatusError("FAILED_PRECONDITION", `Cannot run ${program}: ${problem}${needOf(program)}`, {
      cause: error,
    });
  }
}

/** Feeds the command and collects its output until it has ended, or `listening` aborts. */
async function collectResult(
  child: Deno.ChildProcess,
  stdin: string | undefined,
  listening: AbortController,
): Promise<CommandResult> {
  const streams = Promise.all([
    capture(child.stdout, listening.signal),
    capture(child.stderr, listening.signal),
    stdin === undefined ? undefined : feed(child, stdin),
  ]);
  const { code } = await child.status;
  const linger = setTimeout(() => listening.abort(), lingerMs);
  const [stdout, stderr] = await streams;
  clearTimeout(linger);
  return { code, stdout, stderr };
}

/** The result of a command that is killed when `signal` aborts; undefined when it does not end then. */
async function endedOrKilled(
  child: Deno.ChildProcess,
  ended: Promise<CommandResult>,
  signal: AbortSignal,
): Promise<CommandResult | undefined> {
  let killed: Promise<CommandResult | undefined> | undefined;
  const aborted = Promise.withResolvers<void>();
  const kill = () => {
    killed = endGroup(child, ended);
    aborted.resolve();
  };
  signal.addEventListener("abort", kill, { once: true });
  const result = await Promise.race([ended, aborted.promise]);
  signal.removeEventListener("abort", kill);
  return killed === undefined ? result ?? await ended : await killed;
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
      // The command has ended; a child of it that ignores SIGTERM may not have.
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
    // Output beyond the limit is read and dropped: a command whose pipe is full would never end.
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
    // It ended without reading its input; its exit status says why.
  }
}

const longestOutputBytes = 1 << 20;
/** From SIGTERM to SIGKILL. */
const terminateMs = 1000;
/** From SIGKILL until the command is abandoned. */
const killMs = 2000;
/** How long output is read after a command has ended: its children may keep the output open. */
const lingerMs = 500;

/** What the machine lacks to start a program, by the code of the system, and what to do. */
const shortages: Readonly<Record<string, string>> = {
  EMFILE:
    "the driver has no file descriptor left, raise its limit (ulimit -n) or use fewer volumes at once on this node",
  ENFILE: "this node has no file descriptor left, raise fs.file-max or end what holds them",
  EAGAIN: "this node allows no further process, raise the limit of processes (pids) of the pod or of the node",
  ENOMEM: "this node has no memory left, give the pod or the node more",
};

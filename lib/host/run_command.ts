import { basename } from "node:path";
import type { Logger } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Metrics } from "../metrics.ts";
import type { CommandResult, RunOptions } from "./host.ts";
import { absenceOf, needOf } from "./programs.ts";

const longestOutputBytes = 1 << 20;

// From SIGTERM to SIGKILL, from there to giving up, and from the end of a command to the end of listening to children of
// its own which keep its output open.
const terminateMs = 1000;

const killMs = 2000;

const lingerMs = 500;

export async function runCommand(
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

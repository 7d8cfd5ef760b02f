/** A process of the program under test, and its log. */
import { sleep } from "../timing.ts";
import { StatusError } from "../error.ts";
import { readText } from "./machine.ts";

export interface ServiceProcessOptions {
  /** Added to the environment. */
  readonly env?: Readonly<Record<string, string>>;
  /** How long `until` waits. Default 60 s. */
  readonly startLimitMs?: number;
}

/**
 * A process that is started when the object is made. It appends stderr to the file `log` and stdout to `log` with the
 * suffix `.out`. End it with `end`.
 */
export class ServiceProcess {
  readonly name: string;
  readonly log: string;
  readonly pid: number;
  readonly #child: Deno.ChildProcess;
  readonly #startLimitMs: number;
  #status: Deno.CommandStatus | undefined;

  constructor(
    name: string,
    command: readonly string[],
    log: string,
    { env = {}, startLimitMs = 60_000 }: ServiceProcessOptions = {},
  ) {
    this.name = name;
    this.log = log;
    this.#startLimitMs = startLimitMs;
    // The shell replaces itself by the program, so this is the program's PID. The program writes to files, not pipes: what it
    // logged before it answered a call can be read as soon as the answer arrives.
    this.#child = new Deno.Command("/bin/sh", {
      args: ["-c", 'exec "$@" >>"$0.out" 2>>"$0"', log, ...command],
      stdin: "null",
      stdout: "null",
      stderr: "null",
      // The logs are read as plain text.
      env: { NO_COLOR: "1", ...env },
      // Ctrl-C must reach this process only, which ends the others in order.
      detached: true,
    }).spawn();
    this.pid = this.#child.pid;
    this.#child.status.then((status) => this.#status = status);
  }

  get isRunning(): boolean {
    return this.#status === undefined;
  }

  /**
   * Polls until `look` returns something.
   *
   * @throws StatusError UNAVAILABLE, with the last lines of the log, when the process ends first or the time limit passes
   */
  async until<T>(what: string, signal: AbortSignal, look: () => Promise<T | undefined>): Promise<T> {
    const began = performance.now();
    for (;;) {
      const ended = this.#status;
      const passed = performance.now() - began;
      const found = await look();
      if (found !== undefined) return found;
      if (ended !== undefined || passed > this.#startLimitMs) {
        const log = (await readText(this.log) ?? "").trimEnd().split("\n").slice(-5).join("\n");
        const outcome = ended === undefined
          ? `it gave none for ${this.#startLimitMs / 1000} s`
          : `it ended with status ${ended.code}`;
        throw new StatusError("UNAVAILABLE", `Cannot get ${what} from the ${this.name}: ${outcome}\n${log}`);
      }
      // On a slow machine polling takes CPU time from the process that starts, so the pauses grow.
      await sleep(Math.min(250, Math.max(5, passed / 20)), signal);
    }
  }

  /** Sends `signal`, and SIGKILL after `graceMs`. Resolves with how the process ended: `exit 0`, `ended by SIGKILL`. */
  async end(signal: "SIGTERM" | "SIGKILL", graceMs: number): Promise<string> {
    try {
      this.#child.kill(signal);
    } catch {
      // It has already ended.
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

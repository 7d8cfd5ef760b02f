import type * as z from "zod";
import { type StatusCode, StatusError } from "./error.ts";
import { isTakenAsItIs, secretKeyProblem } from "./secret_keys.ts";

export const logLevels = ["debug", "info", "warning", "error"] as const;
export type LogLevel = typeof logLevels[number];

/** The facts that a log line may carry. `volume` is the UUID: one grep follows a volume from creation to deletion. */
export interface Fields {
  readonly rpc?: string;
  /** Tells the lines of one call from those of another. */
  readonly call?: number;
  readonly volume?: string;
  /** UUID of a snapshot. */
  readonly snapshot?: string;
  readonly name?: string;
  readonly node?: string;
  readonly device?: string;
  readonly path?: string;
  readonly subsystem?: string;
  readonly address?: string;
  /** What a discovery controller lists: I/O controllers, and other discovery controllers. */
  readonly addresses?: readonly string[];
  readonly referrals?: readonly string[];
  readonly code?: string;
  /** What a call to a management API is called in the log of its other end: `X-request-Id`. */
  readonly requestId?: string;
  readonly ms?: number;
  /** Exit status of a command. */
  readonly exit?: number;
  /** Program and arguments of a command that changes the host. */
  readonly command?: string;
  /** A request with its secrets taken out, at level debug. */
  readonly request?: unknown;
  readonly error?: string;
  /** Which part of the driver speaks: `controller`, `node`, `simulator`. */
  readonly role?: string;
  readonly version?: string;
}

/** Writes one line per event to stderr: a constant verb phrase, with the facts in fields. */
export interface Logger {
  /** Whether debug lines are written: a caller need not build costly ones that are dropped. */
  readonly verbose: boolean;
  debug(event: string, fields?: Fields): void;
  info(event: string, fields?: Fields): void;
  warning(event: string, fields?: Fields): void;
  error(event: string, fields?: Fields): void;
  with(fields: Fields): Logger;
}

// Our own logger, not a library: @logtape/logtape costs 7 MiB of RSS in every node plugin for what is 30 lines here.

/**
 * A Logger that writes JSON lines (or, for people, text lines) of `level` and above.
 *
 * @param write receives one line with its newline; default: stderr
 */
export function createLogger(
  level: LogLevel,
  format: "json" | "text" = "json",
  write: (line: string) => void = writeToStderr,
): Logger {
  const threshold = logLevels.indexOf(level);
  const make = (fixed: Fields): Logger => {
    const at = (level: LogLevel) => (event: string, fields: Fields = {}) => {
      if (logLevels.indexOf(level) < threshold) return;
      const line = { ts: new Date().toISOString(), level, event, ...fixed, ...fields };
      write((format === "json" ? JSON.stringify(line, jsonValue) : textLine(line)) + "\n");
    };
    return {
      verbose: threshold <= logLevels.indexOf("debug"),
      debug: at("debug"),
      info: at("info"),
      warning: at("warning"),
      error: at("error"),
      with: (fields) => make({ ...fixed, ...fields }),
    };
  };
  return make({});
}

function jsonValue(_key: string, value: unknown): unknown {
  return typeof value === "bigint" ? value.toString() : value;
}

function textLine({ ts, level, event, ...fields }: { ts: string; level: LogLevel; event: string }): string {
  const facts = Object.entries(fields).filter(([, value]) => value !== undefined).map(([key, value]) => {
    const text = typeof value === "string" ? value : JSON.stringify(value, jsonValue);
    return `${key}=${/[\s"=]/.test(text) ? JSON.stringify(text) : text}`;
  });
  return [ts, level.padEnd(7), event, ...facts].join(" ");
}

const encoder = new TextEncoder();
function writeToStderr(line: string): void {
  let bytes = encoder.encode(line);
  // A full pipe takes part of a long line; a closed one must not end the driver.
  try {
    while (bytes.length > 0) bytes = bytes.subarray(Deno.stderr.writeSync(bytes));
  } catch {
    return;
  }
}

/** What a piece of work needs to know of the call that asked for it. */
export interface RequestContext {
  /** Aborts shortly before the deadline, or when the caller hangs up; its reason is a StatusError. */
  readonly signal: AbortSignal;
  /** When the caller stops listening. */
  readonly deadline: Date;
  readonly log: Logger;
  /** What is being done, as it stands after "Cannot" in an error: `stage the volume 0f2c6a5e-…`. */
  readonly action: string;
  /** The same call, with more facts in its log lines. */
  with(fields: Fields): RequestContext;
  /** The same call, for a part of its work that fails with errors of its own. */
  doing(action: string): RequestContext;
  /** The error that the action fails with: `Cannot <action>: <problem>`. The problem ends with what to do, without a period. */
  error(code: StatusCode, problem: string, options?: ErrorOptions): StatusError;
}

export function requestContext(
  signal: AbortSignal,
  deadline: Date,
  log: Logger,
  action = "go on",
): RequestContext {
  return {
    signal,
    deadline,
    log,
    action,
    with: (fields) => requestContext(signal, deadline, log.with(fields), action),
    doing: (action) => requestContext(signal, deadline, log, action),
    error: (code, problem, options) => new StatusError(code, `Cannot ${action}: ${problem}`, options),
  };
}

/** A RequestContext for work that no caller asked for (start-up, background): it ends after `timeoutMs`, or with `parent`. */
export function backgroundContext(what: string, log: Logger, timeoutMs: number, parent?: AbortSignal): RequestContext {
  const timeout = new AbortController();
  const timer = setTimeout(() => {
    timeout.abort(new StatusError("DEADLINE_EXCEEDED", `Cannot ${what}: not done within ${timeoutMs} ms`));
  }, timeoutMs);
  Deno.unrefTimer(timer);
  const signal = parent === undefined ? timeout.signal : AbortSignal.any([timeout.signal, parent]);
  return requestContext(signal, new Date(Date.now() + timeoutMs), log, what);
}

/**
 * A signal that aborts with `parent`, or with a TimeoutError after `ms`. Dispose it when the work is done: that ends the
 * timer and releases `parent`, which AbortSignal.any and AbortSignal.timeout would hold for longer.
 */
export function timeLimit(parent: AbortSignal, ms: number): Disposable & { readonly signal: AbortSignal } {
  const limit = new AbortController();
  const follow = () => limit.abort(parent.reason);
  if (parent.aborted) follow();
  else parent.addEventListener("abort", follow, { once: true });
  const timer = setTimeout(() => {
    limit.abort(new DOMException(`not done within ${ms} ms`, "TimeoutError"));
  }, Math.min(ms, 2 ** 31 - 1));
  return {
    signal: limit.signal,
    [Symbol.dispose]: () => {
      clearTimeout(timer);
      parent.removeEventListener("abort", follow);
    },
  };
}

/** A time for messages, in whole seconds: the repeat of a call says the same, and Kubernetes makes no new event of it. */
export function formatSeconds(ms: number): string {
  return ms < 950 ? `${Math.ceil(ms / 100) / 10} s` : `${Math.round(ms / 1000)} s`;
}

/** Resolves after `ms`, or rejects with `signal.reason` when that comes first. */
export function sleep(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    const giveUp = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", giveUp);
      resolve();
    }, ms);
    signal.addEventListener("abort", giveUp, { once: true });
  });
}

/** `promise`, or a rejection with `signal.reason` when that comes first. The work behind `promise` goes on. */
export function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const giveUp = () => reject(signal.reason);
    if (signal.aborted) {
      promise.catch(() => {});
      return giveUp();
    }
    signal.addEventListener("abort", giveUp, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", giveUp));
  });
}

/** What prints as `mark` wherever it ends up: JSON, template strings, `console.log`, an inspected error. */
export abstract class Unprintable {
  readonly #mark: string;

  constructor(mark: string) {
    this.#mark = mark;
  }

  toJSON(): string {
    return this.#mark;
  }

  toString(): string {
    return this.#mark;
  }

  [Symbol.for("nodejs.util.inspect.custom")](): string {
    return this.#mark;
  }

  [Symbol.for("Deno.customInspect")](): string {
    return this.#mark;
  }
}

/** The secrets of one call. They can be read through a schema only, and print as `[secrets]`. */
export class Secrets extends Unprintable {
  readonly #values: Readonly<Record<string, string>>;

  constructor(values: Readonly<Record<string, string>> = {}) {
    super("[secrets]");
    // A value that was made with `echo` ends in a newline, which is easy to miss.
    this.#values = Object.fromEntries(
      Object.entries(values).map(([key, value]) => [key, isTakenAsItIs(key) ? value : value.replace(/[\r\n]+$/, "")]),
    );
  }

  /**
   * The values that `schema` picks; throws INVALID_ARGUMENT that names the bad keys and never a value. Bad are also keys
   * that look like those of this driver and are none.
   */
  parse<T>(schema: z.ZodType<T>): T {
    const unknown = Object.keys(this.#values).flatMap((key) => {
      const problem = secretKeyProblem(key);
      return problem === undefined ? [] : [`${key}: ${problem}`];
    });
    const result = schema.safeParse(this.#values);
    if (result.success && unknown.length === 0) return result.data;
    const bad = result.error?.issues.map((issue) => `${issue.path.join(".") || "secrets"}: ${issue.message}`) ?? [];
    const problems = [...unknown, ...bad];
    throw new StatusError("INVALID_ARGUMENT", `Cannot use the secrets of this call: ${problems.join("; ")}`);
  }
}

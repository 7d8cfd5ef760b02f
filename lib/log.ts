/** The log: one line per event on stderr, a constant phrase with its facts in fields. */

/** The levels of log lines, the least important first. */
export const logLevels = ["debug", "info", "warning", "error"] as const;

/** A level of log lines. */
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
  /** The `X-request-Id` of a call to a management API, as the server logs it. */
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
  /** Whether debug lines are written: saves the making of costly ones. */
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
 * @param write receives one line with its newline; stderr unless told otherwise
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

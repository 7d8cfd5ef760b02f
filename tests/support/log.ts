/** A logger that keeps its lines, for tests. */
import { createLogger, type Logger, type LogLevel } from "../../lib/log.ts";

/** A logger and the lines it wrote. */
export function captureLog(level: LogLevel, format?: "json" | "text"): { log: Logger; lines: string[] } {
  const lines: string[] = [];
  return { log: createLogger(level, format, (line) => lines.push(line)), lines };
}

/** Files that hold the state of a simulator between runs, and their lock. */
import * as z from "zod";
import { messageOf, StatusError } from "../error.ts";

/**
 * The state in a file; undefined when the file does not exist.
 *
 * @param what the content, for the error
 * @throws StatusError FAILED_PRECONDITION when the content does not match the schema
 */
export async function readState<T>(file: string, schema: z.ZodType<T>, what: string): Promise<T | undefined> {
  let text: string;
  try {
    text = await Deno.readTextFile(file);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
  try {
    return schema.parse(JSON.parse(text));
  } catch (cause) {
    const problem = cause instanceof z.ZodError
      ? cause.issues.map(({ path, message }) => `${path.join(".")}: ${message}`).join("; ")
      : messageOf(cause);
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot read ${what} in ${file}: ${problem}; use another state directory`,
      { cause },
    );
  }
}

/** The state as JSON; bigints are strings, which `z.coerce.bigint()` reads. */
export function stateText(state: unknown): string {
  return JSON.stringify(state, (_key, value) => typeof value === "bigint" ? value.toString() : value, 1);
}

/** Replaces a file atomically. Synchronous, so that no answer is sent before its effect is stored. */
export function writeState(file: string, text: string): void {
  Deno.writeTextFileSync(`${file}.new`, text, { mode: 0o600 });
  Deno.renameSync(`${file}.new`, file);
}

/**
 * Locks a file against every other process, until the lock is disposed or this process ends in any way.
 *
 * @param what the thing that is in use, for the error
 * @throws StatusError FAILED_PRECONDITION when another simulator holds it
 */
export async function lockFile(path: string, what: string): Promise<Disposable> {
  const file = await Deno.open(path, { create: true, read: true, write: true, mode: 0o600 });
  if (await file.tryLock(true)) return file;
  file.close();
  throw new StatusError("FAILED_PRECONDITION", `Cannot use ${what}: another simulator does, end it or use another one`);
}

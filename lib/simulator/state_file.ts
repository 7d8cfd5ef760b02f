/** Files with which a simulator remembers itself. */
import * as z from "zod";
import { messageOf, StatusError } from "../error.ts";

/**
 * What a file holds; undefined when it is not there.
 *
 * @param what is in it, for the error
 * @throws StatusError FAILED_PRECONDITION when it cannot be read as that
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

/** A model as JSON; numbers that do not fit are strings, as `z.coerce.bigint()` takes them. */
export function stateText(state: unknown): string {
  return JSON.stringify(state, (_key, value) => typeof value === "bigint" ? value.toString() : value, 1);
}

/** Writes it whole or not at all. Synchronous, so that an answer is never given before what it says is remembered. */
export function writeState(file: string, text: string): void {
  Deno.writeTextFileSync(`${file}.new`, text, { mode: 0o600 });
  Deno.renameSync(`${file}.new`, file);
}

/**
 * Holds a file against every other process until it is disposed, or this process ends, however that may be.
 *
 * @param what is in use, for the error
 * @throws StatusError FAILED_PRECONDITION when another simulator holds it
 */
export async function lockFile(path: string, what: string): Promise<Disposable> {
  const file = await Deno.open(path, { create: true, read: true, write: true, mode: 0o600 });
  if (await file.tryLock(true)) return file;
  file.close();
  throw new StatusError("FAILED_PRECONDITION", `Cannot use ${what}: another simulator does, end it or use another one`);
}

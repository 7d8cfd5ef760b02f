import { StatusError } from "../error.ts";

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

/**
 * Reads a file of secrets for a command at a shell. They are not given as arguments, because every user of the machine can
 * read those. The file has one `key=value` per line, in the format of `kubectl create secret generic --from-env-file`, with
 * the keys of the Kubernetes Secret. Blank lines and lines that start with `#` are skipped.
 */
import { StatusError } from "../error.ts";
import { readRequiredFile } from "./option_files.ts";
import { UsageError } from "./options.ts";

/** The secrets in the text of a file. Throws INVALID_ARGUMENT that names the line, and shows nothing of its content. */
export function parseSecretFile(text: string): Readonly<Record<string, string>> {
  const secrets = new Map<string, string>();
  for (const [at, line] of text.split(/\r?\n/).entries()) {
    if (/^\s*(#|$)/.test(line)) continue;
    const [, key, value] = /^([A-Za-z0-9._-]+)=(.*)$/.exec(line) ?? [];
    const lineError = (problem: string) =>
      new StatusError("INVALID_ARGUMENT", `Cannot read the secrets: line ${at + 1} ${problem}`);
    if (key === undefined || value === undefined) throw lineError("is not of the form key=value");
    if (secrets.has(key)) throw lineError(`gives "${key}" a second time`);
    secrets.set(key, value);
  }
  return Object.fromEntries(secrets);
}

/** The secrets in the file at `path`. Throws UsageError, which shows nothing of its content. */
export function readSecretFile(path: string): Readonly<Record<string, string>> {
  const text = readRequiredFile("--secrets", path);
  try {
    return parseSecretFile(text);
  } catch (error) {
    throw error instanceof StatusError ? new UsageError(`--secrets "${path}": ${error.message}`) : error;
  }
}

/**
 * A file of secrets for a command at the shell, so that none has to be an argument, where every user of the machine could
 * read it. One `key=value` per line, as `kubectl create secret generic --from-env-file` takes them; blank lines and lines
 * that start with `#` are skipped. Keys are those of the Kubernetes Secret.
 */
import { StatusError } from "../error.ts";
import { readRequiredFile } from "./option_files.ts";
import { UsageError } from "./options.ts";

/** The secrets in a file's text. Throws INVALID_ARGUMENT that names the line, and nothing of what is in it. */
export function parseSecretFile(text: string): Readonly<Record<string, string>> {
  const secrets = new Map<string, string>();
  for (const [at, line] of text.split(/\r?\n/).entries()) {
    if (/^\s*(#|$)/.test(line)) continue;
    const [, key, value] = /^([A-Za-z0-9._-]+)=(.*)$/.exec(line) ?? [];
    const refuse = (problem: string) =>
      new StatusError("INVALID_ARGUMENT", `Cannot read the secrets: line ${at + 1} ${problem}`);
    if (key === undefined || value === undefined) throw refuse("is not of the form key=value");
    if (secrets.has(key)) throw refuse(`gives "${key}" a second time`);
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

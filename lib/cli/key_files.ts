/** DH-HMAC-CHAP keys in files. */
import { statSync } from "node:fs";
import { DhchapKey, type GivenKeys } from "../auth_key.ts";
import { messageOf } from "../error.ts";
import type { keyOptions } from "./option_groups.ts";
import { readRequiredFile } from "./option_files.ts";
import { type Settings, UsageError } from "./options.ts";

/** The keys in the files that the options name. Throws UsageError, which shows nothing of a key. */
export function readKeyFiles(settings: Settings<typeof keyOptions>): GivenKeys {
  const host = readKeyFile("dhchap-key-file", settings["dhchap-key-file"]);
  const controller = readKeyFile("dhchap-ctrl-key-file", settings["dhchap-ctrl-key-file"]);
  if (controller !== undefined && host === undefined) {
    throw new UsageError("--dhchap-ctrl-key-file: --dhchap-key-file is missing, with which the host authenticates");
  }
  return { host, controller };
}

function readKeyFile(option: keyof typeof keyOptions, path: string | undefined): DhchapKey | undefined {
  if (path === undefined) return undefined;
  const problemError = (problem: string) => new UsageError(`--${option} "${path}": ${problem}`);
  const text = readRequiredFile(`--${option}`, path);
  const mode = statSync(path).mode & 0o777;
  if ((mode & 0o077) !== 0) {
    throw problemError(`other users than its owner can access it (mode ${mode.toString(8)}), change that (chmod 600)`);
  }
  try {
    return DhchapKey.parse(text);
  } catch (error) {
    throw problemError(`its content ${messageOf(error)}`);
  }
}

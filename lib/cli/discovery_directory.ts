/** Checks of the directory that a Discovery-Client watches. */
import { statSync } from "node:fs";
import { messageOf, systemCode } from "../error.ts";
import { hostOptions } from "./option_groups.ts";
import { UsageError } from "./options.ts";

/**
 * Throws UsageError, which ends with `advice`, when `path` is not a directory. It is never created here: nothing else would
 * watch it or write to it.
 */
export function assertDirectory(path: string, advice: string): void {
  let problem = "there is no such directory";
  try {
    if (statSync(path).isDirectory()) return;
    problem = "it is not a directory";
  } catch (error) {
    if (systemCode(error) !== "ENOENT") problem = messageOf(error);
  }
  throw new UsageError(`--discovery-dir "${path}": ${problem}, ${advice}`);
}

/**
 * Throws UsageError when `path` is most likely a typing error, for commands that need the directory only where there is a
 * Discovery-Client. The default may be missing: only the daemon creates it, and it may be installed later.
 */
export function assertDiscoveryDirectory(path: string): void {
  if (path === hostOptions["discovery-dir"].fallback) return;
  assertDirectory(path, "give the one that the Discovery-Client watches");
}

/** Files that options name. A file that cannot be used is reported as a bad option. */
import { readFileSync, statSync } from "node:fs";
import { messageOf, StatusError } from "../error.ts";
import { pemProblem, readPem } from "../pem.ts";
import type { ConfigFiles } from "../storage/cluster_file.ts";
import { UsageError } from "./options.ts";

/** The text of a file that has to be readable. Throws UsageError that names the option. */
export function readRequiredFile(flag: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new UsageError(`${flag} "${path}": ${messageOf(error)}`);
  }
}

/** The text of a file; undefined when it cannot be read. */
export function readFileIfPresent(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}

/** The certificates in a PEM file. Throws UsageError when one of them cannot be used. */
export function readRequiredCertificates(flag: string, path: string): string {
  const read = readPem(readRequiredFile(flag, path));
  const problem = pemProblem(read);
  if (problem !== undefined) throw new UsageError(`${flag} "${path}": ${problem}`);
  return read.pem;
}

/** How a cluster file, and the files that it names, are read. */
export const clusterFiles: ConfigFiles = {
  stamp(path: string): string {
    const { dev, ino, size, mtimeNs, ctimeNs } = statSync(path, { bigint: true });
    return [dev, ino, size, mtimeNs, ctimeNs].join(" ");
  },
  read: (path: string) => readFileSync(path, "utf8"),
};

/** What `read` gives. A StatusError of a file that cannot be used at start becomes a UsageError. */
export function withUsageErrors<T>(read: () => T): T {
  try {
    return read();
  } catch (error) {
    if (error instanceof StatusError) throw new UsageError(error.message);
    throw error;
  }
}

/**
 * Cluster files (`lbcsi controller --config FILE`), which name the storage systems of a deployment: how they are read,
 * when they are read again, and how their mistakes are worded. Each backend defines the content of its own file.
 *
 * Before each use, inode and times of the file are compared: Kubernetes swaps a symbolic link where others write in
 * place, and a watch would have to know both. When a new file cannot be used, the content of the last good one stays
 * valid.
 */
import { parse as parseYaml } from "yaml";
import * as z from "zod";
import { messageOf, StatusError } from "../error.ts";
import type { Logger } from "../log.ts";
import { unknownKeys } from "../suggestion.ts";
import { type Endpoint, formatEndpoint } from "../volume_id.ts";

/** How files are read; both throw the error of the system. */
export interface ConfigFiles {
  /** A text that changes whenever the content of the file may have changed. */
  stamp(path: string): string;
  read(path: string): string;
}

/**
 * A getter for the content of a file, which reads the file again whenever it has changed.
 *
 * @param parse reads the text of the file; throws when it cannot be used
 * @throws StatusError INVALID_ARGUMENT when the file cannot be used now. The getter does not throw: it logs an error,
 *   once for each unusable version of the file, and returns the last good content
 */
export function reloadingFile<T>(path: string, files: ConfigFiles, log: Logger, parse: (text: string) => T): () => T {
  const load = (): { readonly stamp: string; readonly value: T } => {
    // The stamp first: a write in between is then seen as a change.
    const stamp = readOrThrow(path, () => files.stamp(path));
    return { stamp, value: parse(readOrThrow(path, () => files.read(path))) };
  };
  let current = load();
  let lastFailure = "";
  return () => {
    let stamp = "";
    try {
      stamp = files.stamp(path);
      if (stamp === current.stamp) return current.value;
      if (stamp === lastFailure) return current.value;
      current = load();
      lastFailure = "";
      log.info("read the cluster file again", { path });
    } catch (error) {
      const failure = stamp === "" ? messageOf(error) : stamp;
      if (failure !== lastFailure) log.error("kept the last good cluster file", { path, error: messageOf(error) });
      lastFailure = failure;
    }
    return current.value;
  };
}

function readOrThrow<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw fileError(path, messageOf(error), error);
  }
}

/** INVALID_ARGUMENT for a file that cannot be used. */
function fileError(path: string, problem: string, cause?: unknown): StatusError {
  return new StatusError("INVALID_ARGUMENT", `Cannot use cluster file ${path}: ${problem}`, { cause });
}

/** What the entries of a file are called and how one is read. */
interface EntryFormat<T> {
  /** The only key of the file, with the list of entries: `clusters`. */
  readonly plural: string;
  readonly schema: z.ZodType<T>;
  /** The keys that a map at some place of an entry may have, for suggestions. */
  readonly keysAt: (place: readonly PropertyKey[]) => readonly string[];
}

/**
 * Reads the entries in the text of a file, YAML or JSON (which is YAML too).
 *
 * @param path names the file in errors
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong
 */
export function parseEntries<T>(
  path: string,
  text: string,
  { plural, schema, keysAt }: EntryFormat<T>,
): readonly T[] {
  let content: unknown;
  try {
    // The warnings of the library would go to stderr, with lines of the file.
    content = parseYaml(text, { logLevel: "error" });
  } catch (error) {
    // The lines after the first one quote the file.
    throw fileError(path, (messageOf(error).split("\n", 1)[0] ?? "").replace(/:$/, ""), error);
  }
  const parsed = z.strictObject({
    [plural]: z.array(schema, { error: `is missing, give a list of ${plural}` }).min(1, "is empty"),
  }, { error: `is not a map with the key ${plural}` }).safeParse(content);
  if (parsed.success) return parsed.data[plural] ?? [];
  const keys = (place: readonly PropertyKey[]) => place.length === 0 ? [plural] : keysAt(place);
  throw fileError(path, parsed.error.issues.map((issue) => describeIssue(issue, content, keys)).join("; "));
}

/** Schema of a list of texts: one text with commas, or a list. `problem` is what errors say of anything else. */
export function textListSchema(problem: string) {
  return z.union([z.string().transform((text) => text.split(",")), z.array(z.string()).min(1, "is empty")], {
    error: problem,
  });
}

/** Schema of the name of one entry of a file; messages show it. */
export const entryNameSchema = z.string({ error: "is not a text, quotes make it one" })
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/, 'is not a name of 1 to 63 letters, digits, ".", "_", "-"');

/**
 * Throws INVALID_ARGUMENT for entries that share a name or an endpoint, because it would be unclear which of them a volume
 * ID belongs to.
 *
 * @param path names the file in errors
 * @param entries of `plural`, each with all endpoints that belong to it
 * @param others what else is wrong with the file
 */
export function assertDistinct(
  path: string,
  plural: string,
  entries: readonly { readonly name: string; readonly endpoints: readonly Endpoint[] }[],
  others: readonly string[] = [],
): void {
  const problems: string[] = [];
  const names = new Set<string>();
  const owners = new Map<string, string>();
  for (const { name, endpoints } of entries) {
    if (names.has(name)) problems.push(`two ${plural} have the name "${name}"`);
    names.add(name);
    for (const endpoint of new Set(endpoints.map(formatEndpoint))) {
      const owner = owners.get(endpoint);
      if (owner !== undefined) problems.push(`endpoint ${endpoint} belongs to both "${owner}" and "${name}"`);
      owners.set(endpoint, name);
    }
  }
  problems.push(...others);
  if (problems.length > 0) throw fileError(path, problems.join("; "));
}

function describeIssue(
  issue: z.core.$ZodIssue,
  content: unknown,
  keysAt: (place: readonly PropertyKey[]) => readonly string[],
): string {
  const place = issue.path.map((part, at) =>
    typeof part === "number" ? `[${part}]` : `${at > 0 ? "." : ""}${String(part)}`
  )
    .join("");
  const prefix = place === "" ? "" : `${place} `;
  if (issue.code === "unrecognized_keys") {
    return `${prefix}${unknownKeys(issue.keys, keysAt(issue.path))}`;
  }
  let parent: unknown;
  let value = content;
  for (const part of issue.path) {
    parent = value;
    // For a part of a list that was given as one text, the whole text is shown.
    if (isRecord(value)) value = value[String(part)];
  }
  // A user may have written the token itself in place of the path of its file: it must not get into a log.
  const isShowable = issue.path.at(-1) !== "jwt" && (typeof value === "string" || typeof value === "number");
  const shown = isShowable ? ` "${value}"` : "";
  const isMissing = isRecord(parent) && value === undefined && !issue.message.startsWith("is missing");
  const problem = isMissing ? "is missing" : issue.message;
  // Some problems quote the value, or a part of it.
  if (shown !== "" && problem.includes(shown.trim())) return `${place} ${problem}`.trim();
  return `${place}${shown}${shown !== "" && problem.startsWith('"') ? ":" : ""} ${problem}`.trim();
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null;
}

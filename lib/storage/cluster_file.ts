/**
 * Files that tell a process about storage of its own (`lbcsi controller --config FILE`): how they are read, when they are
 * read again, and how their mistakes are worded. What stands in them is each backend's affair.
 *
 * The file is looked at before each use by its inode and times, for Kubernetes swaps a symbolic link where others write in
 * place; a watch would have to know both. A new file that cannot be used leaves the old one in force.
 */
import { parse } from "yaml";
import * as z from "zod";
import type { Logger } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { unknownKeys } from "../suggestion.ts";

/** How files are read; throws what the system says. */
export interface ConfigFiles {
  /** A text that changes whenever the file may hold something else. */
  stamp(path: string): string;
  read(path: string): string;
}

/**
 * What `use` makes of the text of a file, made anew whenever the file has changed.
 *
 * @throws StatusError INVALID_ARGUMENT when the file cannot be used now. Later on that is logged as an error, once for
 *   each such file, and the last good one stays in force
 */
export function fileInForce<T>(path: string, files: ConfigFiles, log: Logger, use: (text: string) => T): () => T {
  const load = (): { readonly stamp: string; readonly value: T } => {
    // The stamp first: what is written in between is then seen as a change.
    const stamp = attempt(path, () => files.stamp(path));
    return { stamp, value: use(attempt(path, () => files.read(path))) };
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

function attempt<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw refusal(path, messageOf(error), error);
  }
}

/** INVALID_ARGUMENT for a file that cannot be used. */
export function refusal(path: string, problem: string, cause?: unknown): StatusError {
  return new StatusError("INVALID_ARGUMENT", `Cannot use cluster file ${path}: ${problem}`, { cause });
}

/**
 * What `schema` reads in the text of a file, YAML or JSON, which is YAML too.
 *
 * @param path names the file in errors
 * @param keysAt the keys that a map at a place of the file may have
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong
 */
export function parseConfigText<T>(
  path: string,
  text: string,
  schema: z.ZodType<T>,
  keysAt: (place: readonly PropertyKey[]) => readonly string[],
): T {
  let content: unknown;
  try {
    // Its warnings would go to stderr, with the lines that they are about.
    content = parse(text, { logLevel: "error" });
  } catch (error) {
    // The lines that follow the first one show the place in the file.
    throw refusal(path, (messageOf(error).split("\n", 1)[0] ?? "").replace(/:$/, ""), error);
  }
  const parsed = schema.safeParse(content);
  if (parsed.success) return parsed.data;
  throw refusal(path, parsed.error.issues.map((issue) => describe(issue, content, keysAt)).join("; "));
}

/** A text with commas, or a list of texts. */
export function textFields(problem: string) {
  return z.union([z.string().transform((text) => text.split(",")), z.array(z.string()).min(1, "is empty")], {
    error: problem,
  });
}

/** The name of one entry of a file, for messages. */
export const entryName = z.string({ error: "is not a text, quotes make it one" })
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/, 'is not a name of 1 to 63 letters, digits, ".", "_", "-"');

function describe(
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
    // A text that stands for a list is what is shown of its parts.
    if (isRecord(value)) value = value[String(part)];
  }
  // Who wrote a token where its file belongs does not want to read it in a log.
  const isShowable = issue.path.at(-1) !== "jwt" && (typeof value === "string" || typeof value === "number");
  const shown = isShowable ? ` "${value}"` : "";
  const isMissing = isRecord(parent) && value === undefined && !issue.message.startsWith("is missing");
  const problem = isMissing ? "is missing" : issue.message;
  // Some problems quote the value, or the part of it that they are about.
  if (shown !== "" && problem.includes(shown.trim())) return `${place} ${problem}`.trim();
  return `${place}${shown}${shown !== "" && problem.startsWith('"') ? ":" : ""} ${problem}`.trim();
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null;
}

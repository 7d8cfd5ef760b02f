/**
 * The Discovery-Client of the simulated machine: it reads files with connections to make, in a directory that it watches
 * (docs/reference/lightos-api.md 12.3).
 *
 * Its odd behaviour is simulated too: only files that are created or renamed into place count, a change in place and a
 * removal do not; one bad option makes it reject the whole file; it skips temporary names in events, but not when it reads
 * the directory at its start.
 */
import { isIP } from "node:net";
import { basename, join } from "node:path";
import * as z from "zod";
import { messageOf, StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";

/** One line of a file. */
export interface DiscoveryEntry {
  readonly traddr: string;
  readonly trsvcid: string;
  readonly hostNqn: string;
  readonly subsystemNqn: string;
  readonly hostId: string | undefined;
}

/** Prefix of the names of unfinished files. */
export const temporaryPrefix = "tmp.dc.";

const optionNames: Readonly<Record<string, string>> = {
  "-t": "transport",
  "--transport": "transport",
  "-a": "traddr",
  "--traddr": "traddr",
  "-s": "trsvcid",
  "--trsvcid": "trsvcid",
  "-q": "hostnqn",
  "--hostnqn": "hostnqn",
  "-n": "subsysnqn",
  "--subsysnqn": "subsysnqn",
  "-I": "hostid",
  "--hostid": "hostid",
  "-l": "ctrl-loss-tmo",
  "--ctrl-loss-tmo": "ctrl-loss-tmo",
};
const mandatory = ["transport", "traddr", "trsvcid", "hostnqn", "subsysnqn"];
const lineSchema = z.object({
  transport: z.literal("tcp"),
  traddr: z.string().refine((text) => isIP(text) !== 0 || /^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$/.test(text)),
  trsvcid: z.string().regex(/^\d{1,5}$/).refine((text) => Number(text) >= 1 && Number(text) <= 65535),
  hostnqn: z.string(),
  subsysnqn: z.string(),
  hostid: z.string().optional(),
  "ctrl-loss-tmo": z.string().regex(/^(-1|\d+)$/).optional(),
});

/**
 * Reads a file of the Discovery-Client's directory. Lines that lack a mandatory option are left out and reported in
 * `skipped`.
 *
 * @throws StatusError INVALID_ARGUMENT when the whole file is rejected: unknown option, bad address, port or transport
 */
export function parseDiscoveryFile(text: string): { readonly entries: DiscoveryEntry[]; readonly skipped: string[] } {
  const entries = new Map<string, DiscoveryEntry>();
  const skipped: string[] = [];
  for (const [at, line] of text.split("\n").entries()) {
    const lineError = (problem: string) =>
      new StatusError("INVALID_ARGUMENT", `Cannot use line ${at + 1} "${line.trim()}": ${problem}`);
    const words = line.replace(/#.*$/, "").split(/[\s=]+/).filter((word) => word !== "");
    if (words.length === 0) continue;
    const options: Record<string, string> = {};
    for (let next = 0; next < words.length; next++) {
      const word = words[next] ?? "";
      if (word === "-p" || word === "--persistent") continue;
      const name = optionNames[word];
      if (name === undefined) throw lineError(`"${word}" is not an option`);
      const value = words[++next];
      if (value === undefined) throw lineError(`${word} has no value`);
      options[name] = value;
    }
    const missing = mandatory.filter((name) => options[name] === undefined);
    if (missing.length > 0) {
      skipped.push(`line ${at + 1} has no ${missing.join(", ")}`);
      continue;
    }
    const parsed = lineSchema.safeParse(options);
    if (!parsed.success) throw lineError(`bad ${parsed.error.issues.map(({ path }) => path.join(".")).join(", ")}`);
    const { traddr, trsvcid, hostnqn, subsysnqn, hostid } = parsed.data;
    const key = [traddr, trsvcid, hostnqn, subsysnqn].join(" ");
    if (entries.has(key)) continue;
    entries.set(key, { traddr, trsvcid, hostNqn: hostnqn, subsystemNqn: subsysnqn, hostId: hostid });
  }
  return { entries: [...entries.values()], skipped };
}

/**
 * Watches `directory`, which it creates when missing, and reports the entries of each file that appears. It resolves when
 * the files that exist have been reported.
 */
export async function watchDiscoveryDirectory(
  directory: string,
  log: Logger,
  report: (entries: readonly DiscoveryEntry[]) => void,
): Promise<AsyncDisposable> {
  await Deno.mkdir(directory, { recursive: true });
  const read = async (path: string) => {
    try {
      if (!(await Deno.stat(path)).isFile) return;
      const { entries, skipped } = parseDiscoveryFile(await Deno.readTextFile(path));
      for (const problem of skipped) log.warning("discovery client skipped a line", { path, error: problem });
      report(entries);
    } catch (error) {
      if (error instanceof Deno.errors.NotFound) return; // It was removed before it was read.
      log.warning("discovery client refused a file", { path, error: messageOf(error) });
    }
  };
  const watcher = Deno.watchFs(directory, { recursive: false });
  for await (const { name } of Deno.readDir(directory)) await read(join(directory, name));
  const watching = (async () => {
    for await (const { kind, paths } of watcher) {
      if (kind !== "create" && kind !== "rename") continue;
      for (const path of new Set(paths)) {
        if (!basename(path).startsWith(temporaryPrefix)) await read(path);
      }
    }
  })();
  return {
    async [Symbol.asyncDispose]() {
      watcher.close();
      await watching;
    },
  };
}

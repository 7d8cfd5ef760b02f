/**
 * What a Discovery-Client is told: files in a directory, one entry per line, in the format of LightOS' daemon
 * (docs/reference/lightos-api.md 12.3), so that either of them can serve a node.
 *
 * Where that daemon is careless this one is not: it goes by what is in the directory now, not by events, so a changed file
 * counts and a removed one too. A file that cannot be read (any more) leaves what it said last in force, for nobody asked
 * to disconnect anything.
 *
 * Symbolic links are followed, for Kubernetes shows the files of a ConfigMap as such: `c1` leads to `..data/c1`, and `..data`
 * to the directory of the version that counts, whose name begins with two dots too. Entries that begin so are passed over.
 */
import * as z from "zod";
import type { Logger } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { temporaryPrefix } from "../host/attach/discovery_client.ts";
import { type Host, kindBehind } from "../host/host.ts";
import { formatAddress, parseAddress } from "../namespace.ts";

/** One line of a file: connect as this host to this subsystem, which that discovery controller knows. */
export interface Entry {
  /** IP address or host name. */
  readonly traddr: string;
  readonly trsvcid: string;
  readonly hostNqn: string;
  readonly subsystemNqn: string;
  readonly hostId: string | undefined;
  readonly controllerLossSeconds: number | undefined;
}

const fieldOf: Readonly<Record<string, keyof z.infer<typeof lineSchema>>> = {
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

// The last label is not a number, or it would be a mistyped address.
const hostName =
  /^(?=.{1,253}$)(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)*(?!\d+$)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?$/;
const nqn = z.string().startsWith("nqn.", "is not an NQN").max(223, "is longer than 223 bytes");
const lineSchema = z.object({
  transport: z.literal("tcp", { error: "is not tcp" }),
  traddr: z.string().refine((text) => isIpAddress(text) || hostName.test(text), "is no address"),
  trsvcid: z.string().regex(/^\d{1,5}$/, "is no port").transform(Number)
    .refine((port) => port >= 1 && port <= 65535, "is no port").transform(String),
  hostnqn: nqn,
  subsysnqn: nqn,
  hostid: z.guid({ error: "is not a UUID" }).toLowerCase().optional(),
  "ctrl-loss-tmo": z.string().regex(/^(-1|\d{1,9})$/, "is not a number of seconds, or -1").transform(Number).optional(),
});
const mandatory = ["transport", "traddr", "trsvcid", "hostnqn", "subsysnqn"] as const;

/**
 * The entries of a file, without duplicates. Lines that lack something mandatory are left out and named in `skipped`.
 *
 * @throws StatusError INVALID_ARGUMENT when the file as a whole counts for nothing: an unknown option, a bad value
 */
export function parseInput(text: string): { readonly entries: readonly Entry[]; readonly skipped: readonly string[] } {
  const entries = new Map<string, Entry>();
  const skipped: string[] = [];
  for (const [at, line] of text.split("\n").entries()) {
    const refuse = (problem: string) => new StatusError("INVALID_ARGUMENT", `Cannot read line ${at + 1}: ${problem}`);
    const words = line.replace(/#.*$/, "").split(/[\s=]+/).filter((word) => word !== "");
    if (words.length === 0) continue;
    const given: Record<string, string> = {};
    while (words.length > 0) {
      const word = words.shift() ?? "";
      if (word === "-p" || word === "--persistent") continue;
      const field = Object.hasOwn(fieldOf, word) ? fieldOf[word] : undefined;
      if (field === undefined) throw refuse(`${quoted(word)} is not an option`);
      const value = words.shift();
      if (value === undefined) throw refuse(`${word} has no value`);
      given[field] = value;
    }
    const missing = mandatory.filter((field) => given[field] === undefined);
    if (missing.length > 0) {
      skipped.push(`line ${at + 1} has no ${missing.join(", ")}`);
      continue;
    }
    const parsed = lineSchema.safeParse(given);
    if (!parsed.success) {
      const problems = parsed.error.issues.map(({ path, message }) =>
        `${path.join(".")} ${quoted(given[String(path[0])])} ${message}`
      );
      throw refuse(problems.join("; "));
    }
    const { traddr, trsvcid, hostnqn, subsysnqn, hostid, "ctrl-loss-tmo": controllerLossSeconds } = parsed.data;
    const key = [traddr, trsvcid, hostnqn, subsysnqn].join(" ");
    if (entries.has(key)) continue;
    entries.set(key, {
      traddr,
      trsvcid,
      hostNqn: hostnqn,
      subsystemNqn: subsysnqn,
      hostId: hostid,
      controllerLossSeconds,
    });
  }
  return { entries: [...entries.values()], skipped };
}

/** A log line need not hold a whole file that is something else. */
function quoted(text = ""): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
}

/** Whether an entry's traddr need not be resolved. */
export function isIpAddress(traddr: string): boolean {
  return parseAddress(formatAddress({ traddr, trsvcid: "1" })) !== undefined;
}

interface File {
  /** As it was read last. */
  text: string;
  /** When this text was read first. */
  since: number;
  /** Whether `text` has been taken up or refused. */
  settled: boolean;
  /** Of the last text that could be used. */
  entries: readonly Entry[];
}

/** What the files of a directory say now. */
export interface Input {
  /** Looks again. Undefined when the directory cannot be read: then nothing is known to have changed. */
  read(): Promise<readonly Entry[] | undefined>;
  /**
   * Namespace UUIDs of volumes that asked for a subsystem, by its NQN, as of the last `read`: the node service calls the file
   * of a volume by it.
   */
  namespaces(): ReadonlyMap<string, ReadonlySet<string>>;
}

// A file that does not end in a newline may be in the middle of being written by somebody who does not rename.
const settleMs = 2000;

/** Says once in the log what it takes up, drops, skips and refuses. */
export function discoveryInput(
  host: Host,
  directory: string,
  log: Logger,
  now: () => number = () => performance.now(),
): Input {
  const files = new Map<string, File>();
  /** Why files cannot be read now, by name. */
  const unreadable = new Map<string, string>();
  let condition: string | undefined;

  async function look(name: string): Promise<boolean> {
    const path = `${directory}/${name}`;
    const known = files.get(name);
    let text: string | undefined;
    let problem: string | undefined;
    try {
      const kind = await kindBehind(host, path);
      if (kind === "file") text = await host.readText(path);
      else if (kind !== "absent" || await host.kindOf(path) !== "symlink") return false;
      else problem = "it is a symbolic link that leads nowhere";
    } catch (error) {
      problem = messageOf(error);
    }
    if (problem !== unreadable.get(name) && problem !== undefined) {
      log.warning("could not read a file", { path, error: problem });
    }
    if (problem === undefined) unreadable.delete(name);
    else {
      unreadable.set(name, problem);
      return true;
    }
    if (text === undefined) return false;
    const file = known ?? { text: "", since: now(), settled: false, entries: [] };
    files.set(name, file);
    if (known === undefined || file.text !== text) Object.assign(file, { text, since: now(), settled: false });
    if (file.settled) return true;
    if (!text.endsWith("\n") && now() - file.since < settleMs) {
      log.debug("waits for the rest of a file", { path });
      return true;
    }
    file.settled = true;
    try {
      const { entries, skipped } = parseInput(text);
      for (const problem of skipped) log.warning("skipped a line of a file", { path, error: problem });
      file.entries = entries;
      log.info("took up a file", { path });
    } catch (error) {
      log.warning(file.entries.length === 0 ? "refused a file" : "refused a file and keeps what it said before", {
        path,
        error: messageOf(error),
      });
    }
    return true;
  }

  return {
    async read() {
      let names: readonly string[] | undefined;
      let problem: string | undefined;
      try {
        names = await host.list(directory);
        if (names === undefined) problem = "it is missing";
      } catch (error) {
        problem = messageOf(error);
      }
      if (problem !== condition && problem !== undefined) {
        log.warning("cannot read its directory", { path: directory, error: problem });
      }
      condition = problem;
      if (names === undefined) return undefined;
      const wanted = names.filter((name) => !name.startsWith(temporaryPrefix) && !name.startsWith(".."));
      const there = new Set<string>();
      for (const name of wanted) if (await look(name)) there.add(name);
      for (const name of unreadable.keys()) if (!there.has(name)) unreadable.delete(name);
      for (const name of files.keys()) {
        if (there.has(name)) continue;
        files.delete(name);
        log.info("dropped a file that was removed", { path: `${directory}/${name}` });
      }
      return [...files].sort(([a], [b]) => a < b ? -1 : 1).flatMap(([, file]) => file.entries);
    },
    namespaces() {
      const found = new Map<string, Set<string>>();
      for (const [name, { entries }] of files) {
        if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(name)) continue;
        for (const { subsystemNqn } of entries) {
          found.set(subsystemNqn, (found.get(subsystemNqn) ?? new Set()).add(name));
        }
      }
      return found;
    },
  };
}

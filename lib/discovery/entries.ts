/**
 * The format of the files that a Discovery-Client reads: one entry per line, as LightOS' daemon reads them
 * (docs/reference/lightos-api.md 12.3), so that either daemon can serve a node.
 */
import * as z from "zod";
import { StatusError } from "../error.ts";
import { formatAddress, parseAddress } from "../namespace.ts";

/** One line of a file: connect to a subsystem under a host NQN, and ask this discovery controller for its addresses. */
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

// The last label must not be a number, which would be a mistyped address.
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
 * The entries of a file, without duplicates. Lines that lack a mandatory option are left out and reported in `skipped`.
 *
 * @throws StatusError INVALID_ARGUMENT when the whole file is rejected: an unknown option, a bad value
 */
export function parseInput(text: string): { readonly entries: readonly Entry[]; readonly skipped: readonly string[] } {
  const entries = new Map<string, Entry>();
  const skipped: string[] = [];
  for (const [at, line] of text.split("\n").entries()) {
    const lineError = (problem: string) =>
      new StatusError("INVALID_ARGUMENT", `Cannot read line ${at + 1}: ${problem}`);
    const words = line.replace(/#.*$/, "").split(/[\s=]+/).filter((word) => word !== "");
    if (words.length === 0) continue;
    const given: Record<string, string> = {};
    while (words.length > 0) {
      const word = words.shift() ?? "";
      if (word === "-p" || word === "--persistent") continue;
      const field = Object.hasOwn(fieldOf, word) ? fieldOf[word] : undefined;
      if (field === undefined) throw lineError(`${quoted(word)} is not an option`);
      const value = words.shift();
      if (value === undefined) throw lineError(`${word} has no value`);
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
      throw lineError(problems.join("; "));
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

/** The text in quotes, shortened: the file may be something else entirely. */
function quoted(text = ""): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
}

/** Whether a traddr is an IP address, which needs no resolution. */
export function isIpAddress(traddr: string): boolean {
  return parseAddress(formatAddress({ traddr, trsvcid: "1" })) !== undefined;
}

/**
 * The cluster file: clusters that the process is told about itself, not by a call (`lbcsi controller --config FILE`).
 *
 * Some CSI calls bring neither parameters nor secrets (ListVolumes, ControllerGetVolume, mostly GetCapacity); they can be
 * served for clusters that a file names. The same file keeps old volume IDs alive: an ID holds the management endpoints
 * of the time when it was made, and the file says which cluster they belong to and where that answers today.
 *
 *     clusters:
 *       - name: rack1
 *         endpoints: 192.0.2.1:443,192.0.2.2:443   # a text, or a list of texts
 *         formerEndpoints: [198.51.100.1:443]      # where it answered before: volume IDs still have these
 *         idEndpoints: 198.51.100.1:443            # what lists write into volume IDs; default: endpoints
 *         scheme: grpcs                            # or grpc; default: grpcs
 *         projects: [default]                      # what is listed; default: all that the token may see
 *         ca: /etc/lbcsi/ca.pem                    # file of PEM certificates to trust
 *         serverName: lightos.example              # what the certificate must be for; default: the endpoint's host
 *         tlsPin: [sha256//pL1…=]                  # public keys, one of which it must have
 *         tlsVerify: true                          # false accepts any certificate
 *         jwt: /etc/lbcsi/jwt                      # file of a token, for calls that bring none
 *         ephemeral:                               # pods may have inline volumes here; needs jwt
 *           projects: [default]                    # in these projects
 *           maxSize: 100Gi                         # of one volume
 *
 * YAML or JSON, which is YAML too. Secrets are named by their files and read at each use. The file itself is looked at
 * before each use by its inode and times, for Kubernetes swaps a symbolic link where others write in place; a watch
 * would have to know both. A new file that cannot be used leaves the old one in force.
 */
import { parse } from "yaml";
import { z } from "zod";
import type { Logger } from "../context.ts";
import { messageOf, StatusError } from "../error.ts";
import { type Endpoint, formatEndpoint, isProjectName, parseEndpoints, type Scheme, schemes } from "../id.ts";
import { trustConfigSchema, type TrustWish } from "./lightos_trust.ts";
import { parseQuantity } from "../quantity.ts";

/** One cluster of the file, as text gives it. */
export interface ClusterEntry {
  readonly name: string;
  /** Where its management API answers today, sorted. */
  readonly endpoints: readonly Endpoint[];
  /** Where it answered before. */
  readonly formerEndpoints: readonly Endpoint[];
  /** The endpoints in the volume IDs of lists. */
  readonly idEndpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  /** Empty: all that the token may see. */
  readonly projects: readonly string[];
  /** File of PEM certificates to trust. */
  readonly caPath: string | undefined;
  /** File of a token. */
  readonly jwtPath: string | undefined;
  readonly trust: TrustWish;
  /** Which inline volumes pods may have here; undefined: none. With it there is a `jwtPath`. */
  readonly ephemeral: EphemeralRules | undefined;
}

/** What a cluster allows the authors of pods. */
export interface EphemeralRules {
  /** Never empty. */
  readonly projects: readonly string[];
  /** The largest size of one volume. */
  readonly maxSizeBytes: bigint;
}

/** A cluster of the file, with its secrets within reach. */
export interface KnownCluster extends ClusterEntry {
  /** The certificates to trust, or undefined when the file names none. Throws UNAVAILABLE when they cannot be read. */
  ca(): string | undefined;
  /** The token; undefined when it cannot be read now. */
  jwt(): string | undefined;
}

/** The clusters of the file, as it is now. */
export interface KnownClusters {
  /** All of them, never none, in the order of the file. */
  all(): readonly KnownCluster[];
  /** The cluster that any of these endpoints is, or was, one of. */
  owning(endpoints: readonly Endpoint[]): KnownCluster | undefined;
}

/** How files are read; throws what the system says. */
export interface ConfigFiles {
  /** A text that changes whenever the file may hold something else. */
  stamp(path: string): string;
  read(path: string): string;
}

/**
 * The clusters that `path` names, looked up anew whenever the file has changed.
 *
 * @throws StatusError INVALID_ARGUMENT when the file cannot be used now. Later on that is logged as an error, once for
 *   each such file, and the last good one stays in force
 */
export function knownClusters(path: string, files: ConfigFiles, log: Logger): KnownClusters {
  const load = (): { readonly stamp: string; readonly clusters: readonly KnownCluster[] } => {
    // The stamp first: what is written in between is then seen as a change.
    const stamp = attempt(path, () => files.stamp(path));
    const entries = parseConfig(path, attempt(path, () => files.read(path)));
    return { stamp, clusters: entries.map((entry) => known(entry, files)) };
  };
  let current = load();
  let lastFailure = "";
  const all = () => {
    let stamp = "";
    try {
      stamp = files.stamp(path);
      if (stamp === current.stamp) return current.clusters;
      if (stamp === lastFailure) return current.clusters;
      current = load();
      lastFailure = "";
      log.info("read the cluster file again", { path });
    } catch (error) {
      const failure = stamp === "" ? messageOf(error) : stamp;
      if (failure !== lastFailure) log.error("kept the last good cluster file", { path, error: messageOf(error) });
      lastFailure = failure;
    }
    return current.clusters;
  };
  return {
    all,
    owning: (endpoints) => {
      const wanted = new Set(endpoints.map(formatEndpoint));
      return all().find((cluster) =>
        [...cluster.endpoints, ...cluster.formerEndpoints, ...cluster.idEndpoints].some((endpoint) =>
          wanted.has(formatEndpoint(endpoint))
        )
      );
    },
  };
}

function known(entry: ClusterEntry, files: ConfigFiles): KnownCluster {
  const { caPath, jwtPath } = entry;
  return {
    ...entry,
    ca() {
      if (caPath === undefined) return undefined;
      const refuse = (problem: string, cause?: unknown) =>
        new StatusError("UNAVAILABLE", `Cannot trust cluster "${entry.name}": its ca ${caPath} ${problem}`, { cause });
      let text: string;
      try {
        text = files.read(caPath);
      } catch (error) {
        throw refuse(`cannot be read (${messageOf(error)})`, error);
      }
      if (text.includes("-----BEGIN CERTIFICATE-----")) return text;
      throw refuse("holds no PEM certificate");
    },
    jwt() {
      if (jwtPath === undefined) return undefined;
      try {
        return files.read(jwtPath);
      } catch {
        // The call goes out without a token, and LightOS' refusal then names this file.
        return undefined;
      }
    },
  };
}

function attempt<T>(path: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot use cluster file ${path}: ${messageOf(error)}`, { cause: error });
  }
}

// ------------------------------------------------------------------------------------------------------------- content

const texts = (problem: string) =>
  z.union([z.string().transform((text) => text.split(",")), z.array(z.string()).min(1, "is empty")], {
    error: problem,
  });

const endpointList = texts("is not host:port, several with commas or as a list").transform((list, check) => {
  const endpoints = parseEndpoints(list.join(","));
  if (typeof endpoints !== "string") return endpoints;
  check.addIssue(endpoints);
  return z.NEVER;
});

const file = z.string({ error: "is not the path of a file" }).startsWith("/", "is not an absolute path");

const projectList = texts("is not a project name, several with commas or as a list").pipe(
  z.array(z.string().refine(isProjectName, 'is not a project name (a-z, 0-9, ".", "-", 1 to 63 characters)')),
);

const ephemeralSchema = z.strictObject({
  projects: projectList,
  // YAML reads a size without a suffix as a number.
  maxSize: z.union([z.string(), z.number()], { error: "is not a size such as 100Gi" }).transform((size, check) => {
    const bytes = parseQuantity(String(size));
    if (bytes !== undefined) return bytes;
    check.addIssue("is not a size such as 100Gi");
    return z.NEVER;
  }),
}, { error: "is not a map with the keys projects and maxSize" });

const clusterSchema = z.strictObject({
  name: z.string({ error: "is missing" })
    .regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/, 'is not a name of 1 to 63 letters, digits, ".", "_", "-"'),
  endpoints: endpointList,
  formerEndpoints: endpointList.optional(),
  idEndpoints: endpointList.optional(),
  scheme: z.enum(schemes, { error: `is not one of ${schemes.join(", ")}` }).default("grpcs"),
  projects: projectList.optional(),
  ca: file.optional(),
  jwt: file.optional(),
  ...trustConfigSchema,
  ephemeral: ephemeralSchema.optional(),
}, { error: "is not a map of keys" }).refine(({ ephemeral, jwt }) => ephemeral === undefined || jwt !== undefined, {
  path: ["ephemeral"],
  error: "needs jwt beside it: whoever takes an inline volume away brings no token",
});

const configSchema = z.strictObject({
  clusters: z.array(clusterSchema, { error: "is missing, give a list of clusters" }).min(1, "is empty"),
}, { error: "is not a map with the key clusters" });

/**
 * The clusters in the text of a cluster file.
 *
 * @param path names the file in errors
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong; two clusters cannot share a name or an
 *   endpoint, for then nobody could tell whose a volume ID is
 */
export function parseConfig(path: string, text: string): readonly ClusterEntry[] {
  const refuse = (problem: string, cause?: unknown) =>
    new StatusError("INVALID_ARGUMENT", `Cannot use cluster file ${path}: ${problem}`, { cause });
  let content: unknown;
  try {
    // Its warnings would go to stderr, with the lines that they are about.
    content = parse(text, { logLevel: "error" });
  } catch (error) {
    // The lines that follow the first one show the place in the file.
    throw refuse((messageOf(error).split("\n", 1)[0] ?? "").replace(/:$/, ""), error);
  }
  const parsed = configSchema.safeParse(content);
  if (!parsed.success) throw refuse(parsed.error.issues.map((issue) => describe(issue, content)).join("; "));
  const entries = parsed.data.clusters.map(({ name, endpoints, formerEndpoints, idEndpoints, scheme, ...rest }) => ({
    name,
    endpoints,
    formerEndpoints: formerEndpoints ?? [],
    idEndpoints: idEndpoints ?? endpoints,
    scheme,
    projects: [...new Set(rest.projects ?? [])],
    caPath: rest.ca,
    jwtPath: rest.jwt,
    trust: { serverName: rest.serverName, pins: rest.tlsPin, verify: rest.tlsVerify },
    ephemeral: rest.ephemeral === undefined ? undefined : {
      projects: [...new Set(rest.ephemeral.projects)],
      maxSizeBytes: rest.ephemeral.maxSize,
    },
  }));
  const problems = sharedBetween(entries);
  if (problems.length > 0) throw refuse(problems.join("; "));
  return entries;
}

function describe(issue: z.core.$ZodIssue, content: unknown): string {
  const place = issue.path.map((part, at) =>
    typeof part === "number" ? `[${part}]` : `${at > 0 ? "." : ""}${String(part)}`
  )
    .join("");
  const prefix = place === "" ? "" : `${place} `;
  if (issue.code === "unrecognized_keys") {
    const schema = issue.path.length === 0
      ? configSchema
      : issue.path.at(-1) === "ephemeral"
      ? ephemeralSchema
      : clusterSchema;
    const known = Object.keys(schema.shape).join(", ");
    return `${prefix}${issue.keys.map((key) => `"${key}"`).join(", ")} unknown (known: ${known})`;
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
  return `${place}${shown} ${problem}`.trim();
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === "object" && value !== null;
}

function sharedBetween(entries: readonly ClusterEntry[]): readonly string[] {
  const problems: string[] = [];
  const names = new Set<string>();
  const owners = new Map<string, string>();
  for (const { name, endpoints, formerEndpoints, idEndpoints } of entries) {
    if (names.has(name)) problems.push(`two clusters have the name "${name}"`);
    names.add(name);
    for (const endpoint of new Set([...endpoints, ...formerEndpoints, ...idEndpoints].map(formatEndpoint))) {
      const owner = owners.get(endpoint);
      if (owner !== undefined) problems.push(`endpoint ${endpoint} belongs to both "${owner}" and "${name}"`);
      owners.set(endpoint, name);
    }
  }
  return problems;
}

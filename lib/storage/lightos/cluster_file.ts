/**
 * The cluster file of LightOS: the clusters of a deployment (`lbcsi controller --config FILE`).
 *
 * Some CSI calls bring neither parameters nor secrets (ListVolumes, ControllerGetVolume, mostly GetCapacity); they can
 * be served for the clusters of the file. The same file keeps old volume IDs valid: an ID holds the management
 * endpoints of the time when it was made, and the file says which cluster they belong to and where that cluster answers
 * today.
 *
 *     clusters:
 *       - name: rack1
 *         endpoints: 192.0.2.1:443,192.0.2.2:443   # a text, or a list of texts
 *         formerEndpoints: [198.51.100.1:443]      # where it answered before: volume IDs still have these; each text of
 *                                                  # a list may be one mgmt-endpoint of that time, with commas
 *         idEndpoints: 192.0.2.1:443               # what lists write into volume IDs; default: endpoints
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
 * YAML or JSON. The files that hold secrets are read at each use; when the cluster file itself is read again:
 * ../cluster_file.ts.
 */
import * as z from "zod";
import { messageOf, type StatusCode, StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import { pemProblem, readPem } from "../../pem.ts";
import { parseQuantity } from "../../quantity.ts";
import {
  type Endpoint,
  formatEndpoint,
  formatEndpoints,
  isProjectName,
  longestId,
  longestIdBytes,
  parseEndpoints,
  type Scheme,
  schemes,
} from "../../volume_id.ts";
import {
  assertDistinct,
  type ConfigFiles,
  entryNameSchema,
  parseEntries,
  reloadingFile,
  textListSchema,
} from "../cluster_file.ts";
import { trustConfigSchema, type TrustOptions } from "./trust.ts";

/** One cluster of the file. */
export interface ClusterEntry {
  readonly name: string;
  /** Where its management API answers today, sorted. */
  readonly endpoints: readonly Endpoint[];
  /** Where it answered before. */
  readonly formerEndpoints: readonly Endpoint[];
  /** The endpoints in the volume IDs of lists. */
  readonly idEndpoints: readonly Endpoint[];
  /** Each list of endpoints that volume IDs may have, `idEndpoints` or its parts first: lists have an entry for each. */
  readonly idForms: readonly (readonly Endpoint[])[];
  readonly scheme: Scheme;
  /** Empty: all that the token may see. */
  readonly projects: readonly string[];
  /** File of PEM certificates to trust. */
  readonly caPath: string | undefined;
  /** File of a token. */
  readonly jwtPath: string | undefined;
  readonly trust: TrustOptions;
  /** Which inline volumes pods may have here; undefined: none. Requires a `jwtPath`. */
  readonly inline: InlineRules | undefined;
}

/** What a cluster allows the authors of pods. */
export interface InlineRules {
  /** Never empty. */
  readonly projects: readonly string[];
  /** The largest size of one volume. */
  readonly maxSizeBytes: bigint;
}

/** A cluster of the file, with access to its secrets. */
export interface KnownCluster extends ClusterEntry {
  /**
   * The certificates to trust, or undefined when the file names none. Throws UNAVAILABLE when their file cannot be
   * read or holds none, INVALID_ARGUMENT when one of them is damaged.
   */
  ca(): string | undefined;
  /** The token; undefined when it cannot be read now. */
  jwt(): string | undefined;
}

/** The clusters of the file, as it is now. */
export interface KnownClusters {
  /** All of them, at least one, in the order of the file. */
  all(): readonly KnownCluster[];
  /** The cluster that one of these endpoints belongs to, or did. */
  owning(endpoints: readonly Endpoint[]): KnownCluster | undefined;
}

/**
 * The clusters of the file at `path`, which is read again whenever it has changed.
 *
 * @throws StatusError INVALID_ARGUMENT when the file cannot be used now. Later that is logged, as `reloadingFile` says
 */
export function knownClusters(path: string, files: ConfigFiles, log: Logger): KnownClusters {
  const all = reloadingFile(
    path,
    files,
    log,
    (text) => parseConfig(path, text).map((entry) => withSecrets(entry, files)),
  );
  return {
    all,
    owning: (endpoints) => {
      const asked = new Set(endpoints.map(formatEndpoint));
      return all().find((cluster) => allEndpoints(cluster).some((endpoint) => asked.has(formatEndpoint(endpoint))));
    },
  };
}

function allEndpoints({ endpoints, formerEndpoints, idEndpoints }: ClusterEntry): readonly Endpoint[] {
  return [...endpoints, ...formerEndpoints, ...idEndpoints];
}

function withSecrets(entry: ClusterEntry, files: ConfigFiles): KnownCluster {
  const { caPath, jwtPath } = entry;
  return {
    ...entry,
    ca() {
      if (caPath === undefined) return undefined;
      const caError = (code: StatusCode, problem: string, cause?: unknown) =>
        new StatusError(code, `Cannot trust cluster "${entry.name}": its ca ${caPath} ${problem}`, { cause });
      let text: string;
      try {
        text = files.read(caPath);
      } catch (error) {
        throw caError("UNAVAILABLE", `cannot be read (${messageOf(error)})`, error);
      }
      const read = readPem(text);
      const problem = pemProblem(read);
      // An empty file may be one that is just being written.
      if (problem !== undefined) {
        throw caError(read.problems.length === 0 ? "UNAVAILABLE" : "INVALID_ARGUMENT", problem);
      }
      return read.pem;
    },
    jwt() {
      if (jwtPath === undefined) return undefined;
      try {
        return files.read(jwtPath);
      } catch {
        // The call is sent without a token, and the error about LightOS' answer then names this file.
        return undefined;
      }
    },
  };
}

// ------------------------------------------------------------------------------------------------------------- content

const endpointsProblem = "is not host:port, several with commas or as a list";

const endpointList = textListSchema(endpointsProblem).transform((list, check) => {
  const endpoints = parseEndpoints(list.join(","));
  if (typeof endpoints !== "string") return endpoints;
  check.addIssue(endpoints);
  return z.NEVER;
});

/** Endpoints, and how they are grouped: each text of a list may have several. */
interface EndpointGroups {
  readonly all: readonly Endpoint[];
  readonly groups: readonly (readonly Endpoint[])[];
}

const endpointGroups = z.union([z.string().transform((text) => [text]), z.array(z.string()).min(1, "is empty")], {
  error: endpointsProblem,
}).transform((list, check): EndpointGroups => {
  const all = parseEndpoints(list.join(","));
  if (typeof all !== "string") {
    return { all, groups: list.map(parseEndpoints).filter((group) => typeof group !== "string") };
  }
  check.addIssue(all);
  return z.NEVER;
});

const file = z.string({ error: "is not the path of a file" }).startsWith("/", "is not an absolute path");

const projectList = textListSchema("is not a project name, several with commas or as a list").pipe(
  z.array(z.string().refine(isProjectName, 'is not a project name (a-z, 0-9, ".", "-", 1 to 63 characters)')),
);

const inlineSchema = z.strictObject({
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
  name: entryNameSchema,
  endpoints: endpointList,
  formerEndpoints: endpointGroups.optional(),
  idEndpoints: endpointGroups.optional(),
  scheme: z.enum(schemes, { error: `is not one of ${schemes.join(", ")}` }).default("grpcs"),
  projects: projectList.optional(),
  ca: file.optional(),
  jwt: file.optional(),
  ...trustConfigSchema,
  ephemeral: inlineSchema.optional(),
}, { error: "is not a map of keys" }).refine(({ ephemeral, jwt }) => ephemeral === undefined || jwt !== undefined, {
  path: ["ephemeral"],
  error: "needs jwt beside it: a call that removes an inline volume brings no token",
});

/**
 * The clusters in the text of a cluster file.
 *
 * @param path names the file in errors
 * @throws StatusError INVALID_ARGUMENT that lists each bad key with what is wrong; two clusters cannot share a name or
 *   an endpoint, because it would be unclear which of them a volume ID belongs to
 */
export function parseConfig(path: string, text: string): readonly ClusterEntry[] {
  const clusters = parseEntries(path, text, {
    plural: "clusters",
    schema: clusterSchema,
    keysAt: (place) => Object.keys((place.at(-1) === "ephemeral" ? inlineSchema : clusterSchema).shape),
  });
  const entries = clusters.map(({ name, endpoints, formerEndpoints, idEndpoints, scheme, ...rest }) => ({
    name,
    endpoints,
    formerEndpoints: formerEndpoints?.all ?? [],
    idEndpoints: idEndpoints?.all ?? endpoints,
    idForms: idFormsOf(idEndpoints ?? { all: endpoints, groups: [] }, formerEndpoints),
    scheme,
    projects: [...new Set(rest.projects ?? [])],
    caPath: rest.ca,
    jwtPath: rest.jwt,
    trust: { serverName: rest.serverName, pins: rest.tlsPin, verify: rest.tlsVerify },
    inline: rest.ephemeral === undefined ? undefined : {
      projects: [...new Set(rest.ephemeral.projects)],
      maxSizeBytes: rest.ephemeral.maxSize,
    },
  }));
  const named = entries.map((entry) => ({ name: entry.name, endpoints: allEndpoints(entry) }));
  assertDistinct(path, "clusters", named, longIdProblems(entries));
  return entries;
}

/**
 * The lists of endpoints that the IDs of a cluster's volumes may have. When texts of the configured list have several
 * endpoints each, every text is such a list; otherwise all endpoints together are one. Former endpoints that are
 * configured one by one may have been in use at different times, so each of them is a list of its own as well.
 */
function idFormsOf(id: EndpointGroups, former: EndpointGroups | undefined): readonly (readonly Endpoint[])[] {
  const isGrouped = ({ groups }: EndpointGroups) => groups.length > 1 && groups.some((group) => group.length > 1);
  const forms = isGrouped(id) ? [...id.groups] : [id.all];
  if (former !== undefined) forms.push(...isGrouped(former) ? former.groups : [former.all, ...former.groups]);
  return [...new Map(forms.map((form) => [formatEndpoints(form), form])).values()];
}

/** What is wrong with clusters whose volumes would get IDs in lists that are too long for every other call. */
function longIdProblems(entries: readonly ClusterEntry[]): readonly string[] {
  return entries.flatMap(({ name, idForms, scheme }) => {
    const bytes = Math.max(
      ...idForms.map((endpoints) => longestIdBytes({ endpoints, scheme, project: undefined, hostEncryption: "luks2" })),
    );
    if (bytes <= longestId) return [];
    return [
      `cluster "${name}" makes volume IDs of up to ${bytes} bytes, ${longestId} are allowed; name fewer endpoints, or ` +
      `those of the StorageClass in idEndpoints`,
    ];
  });
}

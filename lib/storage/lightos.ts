/**
 * LightOS behind the StorageBackend contract, through its gRPC management API (facts: spec/lightos.md sections 3, 6, 15).
 *
 * Three things decide the flows below:
 * - Every answer can be lost. So after any failure that leaves the outcome open, the cluster is looked at again before
 *   anything is repeated; the object that is found there, not the answer that we got, is the result.
 * - Names do not identify for ever. A volume that is being deleted, and the husk of a failed creation, keep their name
 *   without blocking it; both are looked through.
 * - Changes are made with the ETag of what was read (`if-match`), so two racing changes cannot both win.
 *
 * CreateVolume is tried before looking for the name: a new volume then costs one call and one look at its state, and the
 * cluster itself, not a gap between two calls of ours, decides whether the name is taken.
 */
import { z } from "zod";
import type { Logger, RequestContext } from "../context.ts";
import { hasCode, messageOf, StatusError } from "../error.ts";
import {
  type Endpoint,
  isProjectName,
  parseEndpoints,
  parseVolumeId,
  type Scheme,
  schemes,
  type VolumeId,
} from "../id.ts";
import { nodeIdOf, parseAddress, type RemoteNamespace, type TransportAddress } from "../namespace.ts";
import { DurosAPI, type Volume as LightosVolume, Volume_StateEnum as State } from "../../proto/gen/lightos_pb.ts";
import type { CapacityRange, StorageBackend, Volume, VolumeWanted } from "./backend.ts";
import { lightosBlocks } from "./lightos_blocks.ts";
import { type Cluster, ClusterPool, LightosError, type LightosOptions } from "./lightos_cluster.ts";
import { lightosCapacity, lightosListing } from "./lightos_listing.ts";
import { lightosModification, qosParameters, type QosPolicy, qosPolicyLike, qosPolicyOf } from "./lightos_modify.ts";
import {
  lightosSnapshots,
  type Origin,
  originOf,
  removeHelpersOf,
  sourceDifference,
  tidied,
  volumeLabels,
} from "./lightos_snapshots.ts";
import { refuseOtherTrust, trustSchema, type TrustWish, trustWish } from "./lightos_trust.ts";
import {
  aclOf,
  anybody,
  changeVolume,
  growingDelays,
  hostsIn,
  nobody,
  pause,
  readVolume,
  settled,
  surelyNotDone,
  toVolume,
  unknownState,
} from "./lightos_volumes.ts";

/** The LightOS backend. Its connections are made on first use, shared by all calls, and closed after ten idle minutes. */
export function lightosBackend(options: LightosOptions): StorageBackend {
  const clusters = new ClusterPool(options);
  const idOf = (volumeId: string) => parseVolumeId(volumeId);
  const snapshots = lightosSnapshots(clusters);
  const known = options.clusters;
  // Both are for calls without secrets. Space is asked for with parameters that name a cluster, so a token is enough.
  const listing = known === undefined ? {} : { listing: lightosListing(clusters, known, snapshots) };
  const capacity = lightosCapacity(clusters, known, parseCapacityParameters);
  return {
    name: "lightos",
    uuidOf: (volumeId) => idOf(volumeId).uuid,
    async createVolume(ctx, secrets, wanted) {
      const action = `create volume "${wanted.name}"`;
      const parameters = parseParameters(action, wanted.parameters);
      const { endpoints, scheme, trust } = parameters;
      refuseOtherTrust(action, trust, clusters.trust(secrets, endpoints, scheme));
      const cluster = clusters.open(secrets, endpoints, scheme);
      if (wanted.source === undefined) {
        return await createVolume(ctx, cluster, action, wanted, parameters, volumeSize(action, wanted));
      }
      checkRange(action, wanted);
      const origin = originOf(cluster, action, wanted.name, wanted.source, parameters);
      const inItsProject = { ...parameters, project: origin.project };
      return await tidied(
        ctx,
        origin,
        () => createVolume(ctx, cluster, action, wanted, inItsProject, wanted.requiredBytes, origin),
      );
    },
    async deleteVolume(ctx, secrets, volumeId) {
      const id = idOf(volumeId);
      await deleteVolume(ctx, clusters.open(secrets, id.endpoints, id.scheme), id);
    },
    async getVolume(ctx, secrets, volumeId) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      return toVolume(id, await readVolume(ctx, cluster, `read volume ${id.uuid}`, id));
    },
    async grantAccess(ctx, secrets, volumeId, { hostNqn, shared }) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const action = `give ${nodeIdOf(hostNqn)} access to volume ${id.uuid}`;
      await changeAcl(ctx, cluster, action, id, (acl) => aclWith(action, acl, hostNqn, shared));
      return await remoteNamespace(ctx, cluster, action, id.uuid);
    },
    async revokeAccess(ctx, secrets, volumeId, hostNqn) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const who = hostNqn === undefined ? "every host" : nodeIdOf(hostNqn);
      try {
        await changeAcl(
          ctx,
          cluster,
          `take access to volume ${id.uuid} from ${who}`,
          id,
          (acl) => aclWithout(acl, hostNqn),
        );
      } catch (error) {
        if (!hasCode(error, "NOT_FOUND")) throw error;
      }
    },
    expansion: {
      async expandVolume(ctx, secrets, volumeId, range) {
        const id = idOf(volumeId);
        const action = `expand volume ${id.uuid}`;
        const sizeBytes = volumeSize(action, range);
        const cluster = clusters.open(secrets, id.endpoints, id.scheme);
        const grown = await changeVolume(ctx, cluster, action, id, (volume) => {
          if (volume.size < sizeBytes) return { size: String(sizeBytes) };
          if (range.limitBytes === 0n || volume.size <= range.limitBytes) return undefined;
          throw new StatusError(
            "OUT_OF_RANGE",
            `Cannot ${action}: it has ${volume.size} bytes, above limit_bytes ${range.limitBytes}, and is never shrunk`,
          );
        });
        return toVolume(id, grown);
      },
    },
    snapshots,
    changedBlocks: lightosBlocks(clusters),
    modification: lightosModification(clusters),
    ...listing,
    // The token may come, or be taken away, later than the process starts (spec/lightos.md 3.5).
    get capacity() {
      return known === undefined && (options.globalJwt() ?? "").trim() === "" ? undefined : capacity;
    },
    async [Symbol.asyncDispose]() {
      await clusters[Symbol.asyncDispose]();
    },
  };
}

// ------------------------------------------------------------------------------------------------------- parameters

interface Parameters {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly replicaCount: number;
  readonly compression: boolean;
  readonly project: string | undefined;
  readonly qosPolicy: QosPolicy | undefined;
  readonly trust: TrustWish;
}

const onOff = (name: string) =>
  z.enum(["enabled", "disabled", ""], { error: `is not "enabled" or "disabled"` }).default("").transform((text) =>
    text === "enabled"
  ).describe(name);

/** StorageClass parameters (spec/lightos.md 3.1). */
const parametersSchema = z.strictObject({
  "mgmt-endpoint": z.string({ error: "is missing, give host:port of one or more management endpoints" })
    .transform((list, check) => {
      const endpoints = parseEndpoints(list);
      if (typeof endpoints !== "string") return endpoints;
      check.addIssue(endpoints);
      return z.NEVER;
    }),
  "mgmt-scheme": z.enum([...schemes, ""], { error: `is not one of ${schemes.join(", ")}` }).default("grpcs")
    .transform((scheme): Scheme => scheme === "" ? "grpcs" : scheme),
  "replica-count": z.string({ error: "is missing, give 1, 2 or 3" })
    .regex(/^[1-9]\d{0,2}$/, "is not a number from 1 to 128").transform(Number)
    .refine((count) => count <= 128, "is not a number from 1 to 128"),
  "compression": onOff("compression"),
  "project-name": z.string().refine(isProjectName, 'is not a project name (a-z, 0-9, ".", "-", 1 to 63 characters)')
    .optional(),
  "qos-policy-name": z.string().transform((name) => name === "" ? undefined : name).optional(),
  "qos-policy-uuid": qosParameters["qos-policy-uuid"].optional(),
  "host-encryption": onOff("host-encryption")
    .refine((enabled) => !enabled, "is enabled, but this version cannot encrypt on the host"),
  // The vendor's documents name these two and its driver never read them; classes that have them keep working.
  "encryption-secret-name": z.string().optional(),
  "encryption-secret-namespace": z.string().optional(),
  ...trustSchema,
});

function parseParameters(action: string, parameters: Readonly<Record<string, string>>): Parameters {
  const parsed = parametersSchema.safeParse(parameters);
  if (!parsed.success) {
    const problems = parsed.error.issues.map((issue) => {
      if (issue.code === "unrecognized_keys") {
        return `${issue.keys.map((key) => `"${key}"`).join(", ")} unknown (known: ${
          Object.keys(parametersSchema.shape).join(", ")
        })`;
      }
      const key = String(issue.path[0]);
      const value = parameters[key];
      return `"${key}"${value === undefined ? "" : ` "${value}"`} ${issue.message}`;
    });
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: StorageClass parameter ${problems.join("; ")}`);
  }
  const { data } = parsed;
  return {
    endpoints: data["mgmt-endpoint"],
    scheme: data["mgmt-scheme"],
    replicaCount: data["replica-count"],
    compression: data.compression,
    project: data["project-name"],
    qosPolicy: qosPolicyOf(action, data),
    trust: trustWish(data),
  };
}

/** GetCapacity may come without a number of replicas. */
function parseCapacityParameters(action: string, parameters: Readonly<Record<string, string>>): Parameters {
  return parseParameters(action, { "replica-count": "1", ...parameters });
}

const gib = 1n << 30n;
const largestInt64 = (1n << 63n) - 1n;

/** The size to ask LightOS for: whole GiB, at least one (spec/lightos.md 9.3). */
export function volumeSize(action: string, range: CapacityRange): bigint {
  checkRange(action, range);
  const { requiredBytes, limitBytes } = range;
  const wanted = requiredBytes === 0n ? gib : requiredBytes;
  const rounded = (wanted + gib - 1n) / gib * gib;
  if (rounded > largestInt64) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: ${requiredBytes} bytes rounded up to whole GiB are too many`,
    );
  }
  if (limitBytes !== 0n && rounded > limitBytes) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: LightOS allocates whole GiB, and ${rounded} bytes are above limit_bytes ${limitBytes}`,
    );
  }
  return rounded;
}

/** The size of a volume made from a source of `sourceBytes`: the source's, or a larger one in whole GiB. */
function sizeWithSource(action: string, range: CapacityRange, sourceBytes: bigint): bigint {
  const { requiredBytes, limitBytes } = range;
  if (requiredBytes > sourceBytes) return volumeSize(action, range);
  if (requiredBytes !== 0n && requiredBytes < sourceBytes) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: its source has ${sourceBytes} bytes, required_bytes ${requiredBytes} are fewer`,
    );
  }
  if (limitBytes !== 0n && limitBytes < sourceBytes) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: its source has ${sourceBytes} bytes, limit_bytes ${limitBytes} are fewer`,
    );
  }
  return sourceBytes;
}

function checkRange(action: string, { requiredBytes, limitBytes }: CapacityRange): void {
  if (requiredBytes < 0n || limitBytes < 0n) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: capacity_range has a negative number of bytes`);
  }
  if (limitBytes !== 0n && limitBytes < requiredBytes) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot ${action}: limit_bytes ${limitBytes} is below required_bytes ${requiredBytes}`,
    );
  }
}

// ---------------------------------------------------------------------------------------------------------- volumes

/** @param leastBytes the smallest volume of this name that fits the wish; without `origin`, the size of a new one */
async function createVolume(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  wanted: VolumeWanted,
  parameters: Parameters,
  leastBytes: bigint,
  origin?: Origin,
): Promise<Volume> {
  const projectName = parameters.project ?? "";
  const delays = growingDelays();
  for (;;) {
    // With a source, a look comes first: a snapshot would be taken for nothing, and the source may be gone by now.
    let found = origin === undefined ? undefined : await findByName(ctx, cluster, action, wanted.name, projectName);
    let isOurs = false;
    if (found === undefined) {
      const beginning = await origin?.begin(ctx, (sourceBytes) => sizeWithSource(action, wanted, sourceBytes));
      try {
        found = await cluster.call(ctx, action, DurosAPI.method.createVolume, {
          name: wanted.name,
          size: `${beginning?.sizeBytes ?? leastBytes}b`,
          acl: { values: [nobody] },
          compression: String(parameters.compression),
          replicaCount: parameters.replicaCount,
          projectName,
          labels: volumeLabels(wanted.madeFor, origin?.labels),
          ...(beginning === undefined ? {} : { sourceSnapshotUUID: beginning.snapshotUuid }),
          ...(parameters.qosPolicy === undefined ? {} : { qosPolicyID: parameters.qosPolicy }),
        });
        isOurs = true;
      } catch (error) {
        if (!(error instanceof LightosError) || surelyNotDone.has(error.code)) throw error;
        found = await findByName(ctx, cluster, action, wanted.name, projectName);
        if (found === undefined) {
          // Nobody has the name. Where the cluster said so a moment ago, or the answer was lost, trying again is right.
          if (error.code !== "ALREADY_EXISTS" && !error.outcomeUnknown) throw error;
          await pause(ctx, delays, action, messageOf(error));
          continue;
        }
      }
    }
    const created = await settled(
      ctx,
      cluster,
      action,
      "volume",
      found,
      delays,
      ({ UUID, projectName }) => cluster.call(ctx, action, DurosAPI.method.getVolume, { UUID, projectName }),
    );
    if (created === undefined) continue;
    const differences = differencesOf(created, wanted, parameters, leastBytes);
    if (!isOurs) {
      const difference = origin === undefined
        ? created.sourceSnapshotUUID === "" ? undefined : sourceDifference(created, "none")
        : await origin.differenceOf(ctx, created);
      if (difference !== undefined) differences.push(difference);
    }
    const id: VolumeId = {
      endpoints: parameters.endpoints,
      uuid: created.UUID.toLowerCase(),
      project: created.projectName === "" ? parameters.project : created.projectName,
      scheme: parameters.scheme,
      hostEncryption: undefined,
    };
    if (differences.length === 0) return toVolume(id, created);
    if (isOurs && origin !== undefined) {
      // Whether a copy can have other properties than its source is LightOS' affair. Left there, it would block the name.
      await deleteVolume(ctx, cluster, id);
      throw new StatusError(
        "INVALID_ARGUMENT",
        `Cannot ${action}: LightOS at ${cluster.lastAddress} made it from its source in another way than asked: ` +
          `${differences.join("; ")}; a StorageClass that fits the source is needed`,
      );
    }
    throw new StatusError(
      "ALREADY_EXISTS",
      `Cannot ${action}: volume ${created.UUID} has that name and differs: ${differences.join("; ")}`,
    );
  }
}

/** The living volume of this name: neither one that is being deleted nor the husk of a failed creation. */
async function findByName(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  name: string,
  projectName: string,
): Promise<LightosVolume | undefined> {
  const { volumes } = await cluster.call(ctx, action, DurosAPI.method.listVolumes, { name, projectName });
  const living = volumes.filter((volume) =>
    volume.name === name && ![State.Deleting, State.Deleted, State.Failed].includes(volume.state)
  );
  return living.find((volume) => volume.state !== State.Creating) ?? living[0];
}

/** How a volume differs from the wish, its source apart. */
function differencesOf(
  found: LightosVolume,
  wanted: VolumeWanted,
  parameters: Parameters,
  leastBytes: bigint,
): string[] {
  const differences: string[] = [];
  const differ = (what: string, is: unknown, asked: unknown) => differences.push(`${what} is ${is}, asked is ${asked}`);
  if (found.size < leastBytes) differ("size", `${found.size} bytes`, `${leastBytes} bytes`);
  else if (wanted.limitBytes !== 0n && found.size > wanted.limitBytes) {
    differ("size", `${found.size} bytes`, `at most ${wanted.limitBytes} bytes`);
  }
  if (found.replicaCount !== parameters.replicaCount) {
    differ("replica-count", found.replicaCount, parameters.replicaCount);
  }
  const compressed = found.compression.toLowerCase() === "true";
  if (compressed !== parameters.compression) differ("compression", compressed, parameters.compression);
  if (parameters.project !== undefined && found.projectName !== parameters.project) {
    differ("project-name", `"${found.projectName}"`, `"${parameters.project}"`);
  }
  const { qosPolicy } = parameters;
  if (qosPolicy !== undefined && qosPolicyLike(qosPolicy, found) !== qosPolicy.value) {
    const key = qosPolicy.case === "qosPolicyName" ? "qos-policy-name" : "qos-policy-uuid";
    differ(key, `"${qosPolicyLike(qosPolicy, found)}"`, `"${qosPolicy.value}"`);
  }
  return differences;
}

async function deleteVolume(ctx: RequestContext, cluster: Cluster, id: VolumeId): Promise<void> {
  const action = `delete volume ${id.uuid}`;
  const delays = growingDelays();
  for (;;) {
    let volume: LightosVolume;
    try {
      volume = await readVolume(ctx, cluster, action, id);
    } catch (error) {
      // Deleting, deleted, or a husk that LightOS does not let anybody delete.
      if (hasCode(error, "NOT_FOUND")) return;
      throw error;
    }
    if (![State.Available, State.Migrating].includes(volume.state)) {
      if (State[volume.state] === undefined) throw unknownState(action, "volume", volume);
      await pause(ctx, delays, action, `LightOS shows it as ${State[volume.state]}`);
      continue;
    }
    const hosts = hostsIn(aclOf(volume));
    if (hosts.length > 0) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: ${hosts.map(nodeIdOf).join(", ")} may still connect to it, detach it there first`,
      );
    }
    // First, for once the volume is gone nobody comes back for them.
    await removeHelpersOf(ctx, cluster, action, volume, id.project);
    try {
      await cluster.call(ctx, action, DurosAPI.method.deleteVolume, {
        UUID: id.uuid,
        projectName: id.project ?? "",
      });
      return;
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return;
      if (!(error instanceof LightosError) || surelyNotDone.has(error.code)) throw error;
      // INTERNAL is what older servers answer for a volume that is gone; the next look tells.
      const lastWords = messageOf(error);
      await pause(ctx, delays, action, lastWords);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- ACL

// An access list does not say with which access mode a host got in, so a shared request joins a host that has the volume
// for itself. Orchestrators use one mode for each volume: Kubernetes derives it from the PersistentVolume, where it cannot
// change. A label that remembers the mode, written with the list, was considered and left out: LightOS keeps 16 labels of
// which some are the owner's, older versions do not change them, and a volume of the incumbent driver has none.

/** The ACL with this host in it, or undefined when it needs no change. */
function aclWith(
  action: string,
  acl: readonly string[],
  hostNqn: string,
  shared: boolean,
): readonly string[] | undefined {
  if (acl.includes(anybody)) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: its access list is open to any host (${anybody}), set it to ${nobody} on LightOS first`,
    );
  }
  const hosts = hostsIn(acl);
  const others = hosts.filter((host) => host !== hostNqn);
  if (!shared && others.length > 0) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ${others.map(nodeIdOf).join(", ")} has it, and its access mode is for one node; ` +
        `it must be detached there first`,
    );
  }
  if (hosts.includes(hostNqn) && !acl.includes(nobody)) return undefined;
  return [...new Set([...hosts, hostNqn])].sort();
}

/** The ACL without this host (undefined: without any), or undefined when it needs no change. */
function aclWithout(acl: readonly string[], hostNqn: string | undefined): readonly string[] | undefined {
  // An open list was never made by us; taking one host from it means nothing, taking every host does.
  if (hostNqn !== undefined && !acl.includes(hostNqn) && acl.length > 0) return undefined;
  if (acl.length === 1 && acl[0] === nobody) return undefined;
  const left = hostNqn === undefined ? [] : acl.filter((entry) => entry !== hostNqn);
  return left.length === 0 ? [nobody] : left;
}

async function changeAcl(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: VolumeId,
  decide: (acl: readonly string[]) => readonly string[] | undefined,
): Promise<void> {
  await changeVolume(ctx, cluster, action, id, (volume) => {
    const values = decide(aclOf(volume));
    return values === undefined ? undefined : { acl: { values: [...values] } };
  }, "trust the answer");
}

async function remoteNamespace(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  uuid: string,
): Promise<RemoteNamespace> {
  const info = await cluster.info(ctx, action);
  const addresses = toAddresses(ctx.log, info.nvmeEndpoints);
  const discovery = toAddresses(ctx.log, info.discoveryEndpoints);
  if (addresses.length === 0 && discovery.length === 0) {
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${action}: LightOS at ${cluster.lastAddress} names no NVMe and no discovery endpoint`,
    );
  }
  return { uuid, subsystemNqn: info.subsystemNQN, addresses, discovery };
}

function toAddresses(log: Logger, endpoints: readonly string[]): readonly TransportAddress[] {
  return [...new Set(endpoints)].sort().flatMap((text) => {
    const address = parseAddress(text);
    if (address === undefined) log.warning("passed over an endpoint that is not an IP address", { address: text });
    return address === undefined ? [] : [address];
  });
}

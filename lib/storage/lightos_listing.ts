/**
 * Lists of volumes and snapshots, and the space that is left, on the clusters of the cluster file (facts: spec/lightos.md
 * sections 6.6, 9.9, 14 and 15.1).
 *
 * Lists go through the clusters in the order of the file and through their projects, each in LightOS' own pages, which
 * are ordered by UUID and start behind one. A token names the place and that UUID, and nothing is kept in between.
 *
 * Kubernetes compares volume IDs as texts. So an ID in a list is written as CreateVolume wrote it for a StorageClass whose
 * `mgmt-endpoint` is the `idEndpoints` of the cluster in the file (default: its `endpoints`) and whose `mgmt-scheme` is
 * its scheme. LightOS does not know which endpoints a volume was made with.
 */
import { createHash } from "node:crypto";
import { type RequestContext, Secrets } from "../context.ts";
import { hasCode, StatusError } from "../error.ts";
import { type Endpoint, formatEndpoints, isUuid, parseVolumeId, type Scheme, type VolumeId } from "../id.ts";
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as SnapshotState,
  type Volume as LightosVolume,
  Volume_StateEnum as VolumeState,
} from "../../proto/gen/lightos_pb.ts";
import type { Capacity, Listing, Page, PageWanted, Snapshot, Snapshots } from "./backend.ts";
import { type Cluster, type ClusterPool, LightosError } from "./lightos_cluster.ts";
import type { KnownCluster, KnownClusters } from "./lightos_config.ts";
import { encryptionOf, isHelperName, toSnapshot } from "./lightos_snapshots.ts";
import type { TrustWish } from "./lightos_trust.ts";
import { toVolume, troubleOf } from "./lightos_volumes.ts";

/** Most objects in one of LightOS' pages (spec/lightos.md section 15.1). */
const longestPage = 1000;
/**
 * Most entries in one answer of ours: gRPC clients refuse messages of more than 4 MiB, and with IDs of the longest kind
 * that we take an entry has 2 KiB.
 */
export const longestAnswer = 2000;

/** Lists of what is on the clusters of the file. */
export function lightosListing(clusters: ClusterPool, known: KnownClusters): Listing {
  return {
    listVolumes: (ctx, wanted) => page(ctx, "list volumes", placesIn(clusters, known), wanted, volumesIn),
    listTroubled: (ctx, secrets, wanted) =>
      page(ctx, "list volumes in trouble", placesIn(clusters, known, secrets), wanted, troubledVolumesIn),
  };
}

function placesIn(clusters: ClusterPool, known: KnownClusters, secrets = new Secrets()): readonly Place[] {
  return known.all().flatMap((cluster) => placesOf(cluster, clusters.open(secrets, cluster.endpoints, cluster.scheme)));
}

/**
 * ListSnapshots. An ID leads to its cluster, so only a list without one needs `known`: csi-snapshotter asks for imported
 * snapshots by their IDs, and takes any handle for a snapshot when nobody answers.
 */
export function lightosSnapshotList(
  clusters: ClusterPool,
  known: KnownClusters | undefined,
  getSnapshot: Snapshots["getSnapshot"],
): Snapshots["listSnapshots"] {
  const action = "list snapshots";
  return async (ctx, secrets, { snapshotId, sourceVolumeId }, wanted) => {
    const source = sourceVolumeId === undefined ? undefined : parsed(sourceVolumeId);
    if (snapshotId !== undefined) {
      if (wanted.startingToken !== "") throw badToken(action, wanted.startingToken);
      const found = await unlessNotFound(getSnapshot(ctx, secrets, snapshotId));
      const isWanted = found !== undefined && found.ready &&
        (sourceVolumeId === undefined || parsed(found.sourceVolumeId)?.uuid === source?.uuid);
      return { entries: isWanted ? [found] : [], nextToken: "" };
    }
    if (sourceVolumeId === undefined) {
      if (known !== undefined) return await page(ctx, action, placesIn(clusters, known), wanted, snapshotsIn);
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: without a cluster file (--config) the controller knows no cluster; give snapshot_id or ` +
          `source_volume_id, or a cluster file`,
      );
    }
    if (source === undefined) return { entries: [], nextToken: "" };
    return await page(ctx, action, [placeOfSource(clusters, secrets, source)], wanted, {
      read: snapshotsIn.read,
      entry: (place, snapshot) =>
        snapshot.sourceVolumeUUID.toLowerCase() === source.uuid ? snapshotsIn.entry(place, snapshot) : undefined,
    });
  };
}

function placeOfSource(clusters: ClusterPool, secrets: Secrets, source: VolumeId): Place {
  const { endpoints, scheme, project = "" } = source;
  return {
    key: `${formatEndpoints(endpoints)} ${project} ${source.uuid}`,
    cluster: clusters.open(secrets, endpoints, scheme),
    project,
    idEndpoints: endpoints,
    scheme,
  };
}

/** Undefined when there is none, or the ID is not one of this driver. */
async function unlessNotFound(snapshot: Promise<Snapshot>): Promise<Snapshot | undefined> {
  try {
    return await snapshot;
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

function parsed(id: string): VolumeId | undefined {
  try {
    return parseVolumeId(id);
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

// -------------------------------------------------------------------------------------------------------------- pages

/** A project of a cluster: what LightOS lists in one go. */
interface Place {
  /** Tells this place from others, in tokens. */
  readonly key: string;
  readonly cluster: Cluster;
  /** Empty: all that the token may see. */
  readonly project: string;
  readonly idEndpoints: readonly Endpoint[];
  readonly scheme: Scheme;
}

function placesOf({ name, projects, idEndpoints, scheme }: KnownCluster, cluster: Cluster): readonly Place[] {
  return (projects.length === 0 ? [""] : projects).map((project) => ({
    key: `${name} ${project}`,
    cluster,
    project,
    idEndpoints,
    scheme,
  }));
}

function idIn(
  place: Place,
  { UUID, projectName, labels }: Pick<LightosVolume | LightosSnapshot, "UUID" | "projectName" | "labels">,
): VolumeId {
  const project = projectName === "" ? place.project : projectName;
  return {
    endpoints: place.idEndpoints,
    uuid: UUID.toLowerCase(),
    project: project === "" ? undefined : project,
    scheme: place.scheme,
    // Volumes of the incumbent driver have no label that says so.
    hostEncryption: encryptionOf(labels),
  };
}

/** How objects of one kind are read, and what an entry of a list is made of. */
interface Kind<Raw extends { readonly UUID: string }, Entry> {
  read(
    place: Place,
    ctx: RequestContext,
    action: string,
    range: { readonly projectName: string; readonly offsetUUID: string; readonly limit: bigint },
  ): Promise<readonly Raw[]>;
  /** Undefined for what does not belong on the list. */
  entry(place: Place, raw: Raw): Entry | undefined;
  /** Most of what is read does not belong on the list, so as much as possible is read at once. */
  readonly isRare?: boolean;
}

const listedStates = [VolumeState.Available, VolumeState.Updating, VolumeState.Migrating, VolumeState.Rollback];

const volumesIn: Kind<LightosVolume, ReturnType<typeof toVolume>> = {
  read: async (place, ctx, action, range) =>
    (await place.cluster.call(ctx, action, DurosAPI.method.listVolumes, range)).volumes,
  entry: (place, volume) => listedStates.includes(volume.state) ? toVolume(idIn(place, volume), volume) : undefined,
};

const troubledVolumesIn: Kind<LightosVolume, ReturnType<typeof toVolume>> = {
  ...volumesIn,
  entry: (place, volume) => troubleOf(volume) === undefined ? undefined : volumesIn.entry(place, volume),
  isRare: true,
};

const snapshotsIn: Kind<LightosSnapshot, Snapshot> = {
  read: async (place, ctx, action, range) =>
    (await place.cluster.call(ctx, action, DurosAPI.method.listSnapshots, range)).snapshots,
  // One that is Creating may still end as Failed; the helper of a clone is gone in a moment.
  entry: (place, snapshot) =>
    snapshot.state === SnapshotState.Available && !isHelperName(snapshot.name)
      ? toSnapshot(idIn(place, snapshot), snapshot)
      : undefined,
};

/** One page of what is in `places`. Reads one object more than it answers, so that a token always leads to something. */
async function page<Raw extends { readonly UUID: string }, Entry>(
  ctx: RequestContext,
  action: string,
  places: readonly Place[],
  { maxEntries, startingToken }: PageWanted,
  kind: Kind<Raw, Entry>,
): Promise<Page<Entry>> {
  const most = maxEntries === 0 ? longestAnswer : Math.min(maxEntries, longestAnswer);
  const start = startingToken === "" ? { at: 0, after: "" } : placeOf(action, places, startingToken);
  const entries: Entry[] = [];
  let nextToken = "";
  let offsetUUID = start.after;
  for (const place of places.slice(start.at)) {
    // Whether LightOS counts what it leaves out towards the limit is not documented, so only an empty page is the end.
    for (;;) {
      const limit = BigInt(kind.isRare ? longestPage : Math.min(longestPage, most - entries.length + 1));
      const found = await kind.read(place, ctx, action, { projectName: place.project, offsetUUID, limit });
      for (const raw of found) {
        const entry = kind.entry(place, raw);
        if (entry === undefined) continue;
        if (entries.length === most) return { entries, nextToken };
        entries.push(entry);
        nextToken = `${digest(place)}.${raw.UUID.toLowerCase()}`;
      }
      const last = found.at(-1)?.UUID;
      if (last === undefined) break;
      if (last === offsetUUID) {
        throw new StatusError(
          "INTERNAL",
          `Cannot ${action}: LightOS at ${place.cluster.lastAddress} answers the page behind ${last} with itself`,
        );
      }
      offsetUUID = last;
    }
    offsetUUID = "";
  }
  return { entries, nextToken: "" };
}

/** Short, for CSI allows a token 128 bytes, and cluster and project alone may have as many. */
function digest({ key }: Place): string {
  return createHash("sha256").update(key).digest("hex").slice(0, 32);
}

function placeOf(
  action: string,
  places: readonly Place[],
  token: string,
): { readonly at: number; readonly after: string } {
  const [where, after = ""] = token.split(".", 2);
  const at = places.findIndex((place) => digest(place) === where);
  if (at < 0 || !isUuid(after)) throw badToken(action, token);
  return { at, after };
}

function badToken(action: string, token: string): StatusError {
  return new StatusError(
    "ABORTED",
    `Cannot ${action}: starting_token "${token}" is not one that leads on now, begin again without one`,
  );
}

// ----------------------------------------------------------------------------------------------------------- capacity

const gib = 1n << 30n;

/** What GetCapacity needs to know of StorageClass parameters. */
export interface CapacityParameters {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly replicaCount: number;
  readonly trust: TrustWish;
}

/**
 * The space that is left, as LightOS estimates it, shared out among replicas. LightOS tells it of whole clusters, to
 * tokens with a right to the cluster, and knows no quota of a project (spec/lightos.md sections 14 and 15).
 *
 * @param read reads StorageClass parameters; throws INVALID_ARGUMENT
 */
export function lightosCapacity(
  clusters: ClusterPool,
  known: KnownClusters | undefined,
  read: (action: string, parameters: Readonly<Record<string, string>>) => CapacityParameters,
): Capacity {
  const action = "measure the capacity";
  return {
    async getCapacity(ctx, parameters) {
      const wanted = Object.keys(parameters).length === 0 && known !== undefined
        ? known.all().map(({ endpoints, scheme }) => ({ endpoints, scheme, replicaCount: 1, trust: {} }))
        : [read(action, parameters)];
      const free = await Promise.all(
        wanted.map(({ endpoints, scheme, replicaCount, trust }) =>
          freeBytes(ctx, clusters.open(new Secrets(), endpoints, scheme, trust), action, replicaCount)
        ),
      );
      return { availableBytes: free.reduce((sum, bytes) => sum + bytes, 0n), minimumVolumeBytes: gib };
    },
  };
}

async function freeBytes(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  replicaCount: number,
): Promise<bigint> {
  try {
    const { statistics, currentMaxReplicas } = await cluster.call(ctx, action, DurosAPI.method.getCluster, {});
    if (statistics === undefined) {
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ${action}: LightOS at ${cluster.lastAddress} tells no statistics of the cluster now`,
      );
    }
    // No volume of that many replicas can be made. 0 is told for a moment while a cluster starts.
    if (currentMaxReplicas > 0 && replicaCount > currentMaxReplicas) return 0n;
    return statistics.estimatedFreeLogicalStorage / BigInt(replicaCount);
  } catch (error) {
    if (!(error instanceof LightosError) || !hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) throw error;
    throw new StatusError(
      error.code,
      `${error.message}; the statistics of a cluster need a token with a right to the cluster`,
      { cause: error },
    );
  }
}

/**
 * Lists of volumes and snapshots, and the space that is left, on the clusters of the cluster file (facts: docs/reference/lightos-api.md
 * sections 6.6, 9.9, 14 and 15.1).
 *
 * Lists go through the clusters in the order of the file and through their projects, each in LightOS' own pages, which
 * are ordered by UUID and start behind one. A token names the place and that UUID, and nothing is kept in between.
 *
 * Kubernetes compares volume IDs as texts. So an ID in a list is written as CreateVolume wrote it for a StorageClass whose
 * `mgmt-endpoint` is the `idEndpoints` of the cluster in the file (default: its `endpoints`) and whose `mgmt-scheme` is
 * its scheme. LightOS does not know which endpoints a volume was made with; so where the file names former ones, a volume
 * has an entry for each ID that it may have: Kubernetes looks up those that it knows, and would attach a volume again each
 * minute whose ID it misses.
 */
import { createHash } from "node:crypto";
import { type RequestContext, Secrets } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { type Endpoint, formatEndpoints, isUuid, parseVolumeId, type Scheme, type VolumeId } from "../../volume_id.ts";
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as SnapshotState,
  type Volume as LightosVolume,
  Volume_StateEnum as VolumeState,
} from "../../../proto/gen/lightos_pb.ts";
import type { Capacity, Listing, Page, PageRequest, Snapshot, Snapshots, Volume } from "../backend.ts";
import { AnswerPage } from "../listing_page.ts";
import { type Cluster, type ClusterPool, LightosError, readInParts } from "./cluster.ts";
import type { KnownCluster, KnownClusters } from "./cluster_file.ts";
import { encryptionOf, isHelperName, toSnapshot } from "./snapshots.ts";
import type { TrustOptions } from "./trust.ts";
import { conditionOf, toVolume } from "./volumes.ts";

/** Most objects in one of LightOS' pages (docs/reference/lightos-api.md section 15.1). */
const longestPage = 1000;

/** Lists of what is on the clusters of the file. */
export function lightosListing(clusters: ClusterPool, known: KnownClusters): Listing {
  return {
    listVolumes: (ctx, wanted) => page(ctx, "list volumes", placesIn(clusters, known), wanted, volumesIn),
    listAbnormal: (ctx, secrets, wanted) =>
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
      entries: (place, snapshot) =>
        snapshot.sourceVolumeUUID.toLowerCase() === source.uuid ? snapshotsIn.entries(place, snapshot) : [],
    });
  };
}

function placeOfSource(clusters: ClusterPool, secrets: Secrets, source: VolumeId): Place {
  const { endpoints, scheme, project = "" } = source;
  return {
    key: `${formatEndpoints(endpoints)} ${project} ${source.uuid}`,
    cluster: clusters.open(secrets, endpoints, scheme),
    project,
    idForms: [endpoints],
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
  /** The lists of endpoints that an ID may have, the likeliest first. */
  readonly idForms: readonly (readonly Endpoint[])[];
  readonly scheme: Scheme;
}

function placesOf({ name, projects, idForms, scheme }: KnownCluster, cluster: Cluster): readonly Place[] {
  return (projects.length === 0 ? [""] : projects).map((project) => ({
    key: `${name} ${project}`,
    cluster,
    project,
    idForms,
    scheme,
  }));
}

function idIn(
  place: Place,
  { UUID, projectName, labels }: Pick<LightosVolume | LightosSnapshot, "UUID" | "projectName" | "labels">,
  endpoints: readonly Endpoint[],
): VolumeId {
  const project = projectName === "" ? place.project : projectName;
  return {
    endpoints,
    uuid: UUID.toLowerCase(),
    project: project === "" ? undefined : project,
    scheme: place.scheme,
    // Volumes of the incumbent driver have no label that says so.
    hostEncryption: encryptionOf(labels),
  };
}

/** How objects of one kind are read, and what the entries of a list are made of. */
interface Kind<Raw extends { readonly UUID: string }, Entry> {
  read(
    place: Place,
    ctx: RequestContext,
    action: string,
    range: { readonly projectName: string; readonly offsetUUID: string; readonly limit: bigint },
  ): Promise<readonly Raw[]>;
  /** One entry for each ID that the object may have; none for what does not belong on the list. */
  entries(place: Place, raw: Raw): readonly Entry[];
  /** Most of what is read does not belong on the list, so as much as possible is read at once. */
  readonly isRare?: boolean;
}

const listedStates = [VolumeState.Available, VolumeState.Updating, VolumeState.Migrating, VolumeState.Rollback];

const volumesIn: Kind<LightosVolume, ReturnType<typeof toVolume>> = {
  read: async (place, ctx, action, range) =>
    (await place.cluster.call(ctx, action, DurosAPI.method.listVolumes, range)).volumes,
  entries: (place, volume) =>
    listedStates.includes(volume.state)
      ? place.idForms.map((endpoints) => toVolume(idIn(place, volume, endpoints), volume))
      : [],
};

const troubledVolumesIn: Kind<LightosVolume, ReturnType<typeof toVolume>> = {
  ...volumesIn,
  entries: (place, volume) => conditionOf(volume) === undefined ? [] : volumesIn.entries(place, volume),
  isRare: true,
};

const snapshotsIn: Kind<LightosSnapshot, Snapshot> = {
  read: async (place, ctx, action, range) =>
    (await place.cluster.call(ctx, action, DurosAPI.method.listSnapshots, range)).snapshots,
  // One that is Creating may still end as Failed; the helper of a clone is gone in a moment.
  entries: (place, snapshot) =>
    snapshot.state === SnapshotState.Available && !isHelperName(snapshot.name)
      ? place.idForms.slice(0, 1).map((endpoints) => toSnapshot(idIn(place, snapshot, endpoints), snapshot))
      : [],
};

/**
 * One page of what is in `places`. Where LightOS lets it, it reads one object more than it answers, so that a token leads to
 * something; a page as large as LightOS' own is not worth a second call for that, and its token may lead to an empty page.
 */
async function page<Raw extends { readonly UUID: string }, Entry extends Volume | Snapshot>(
  ctx: RequestContext,
  action: string,
  places: readonly Place[],
  { maxEntries, startingToken }: PageRequest,
  kind: Kind<Raw, Entry>,
): Promise<Page<Entry>> {
  const answer = new AnswerPage<Entry>(maxEntries);
  const start = startingToken === "" ? { at: 0, after: "", within: undefined } : placeOf(action, places, startingToken);
  let nextToken = "";
  let after = start.after;
  // A small page must not cost a call for each object that does not belong on it.
  let leastLimit = 1;
  for (const place of places.slice(start.at)) {
    // Whether LightOS counts what it leaves out towards the limit is not documented, so only an empty page is the end.
    for (;;) {
      const { room } = answer;
      const limit = kind.isRare ? longestPage : Math.min(longestPage, Math.max(room + 1, leastLimit));
      const found = await readInParts(
        limit,
        (limit) =>
          kind.read(place, ctx, action, { projectName: place.project, offsetUUID: after, limit: BigInt(limit) }),
      );
      const offset = after;
      for (const raw of found) {
        const uuid = raw.UUID.toLowerCase();
        const entries = kind.entries(place, raw);
        const { within } = start;
        for (const [at, entry] of entries.entries()) {
          if (within !== undefined && within.uuid === uuid && at < within.answered) continue;
          if (!answer.add(entry)) return { entries: answer.entries, nextToken };
          const answered = at + 1;
          nextToken = answered === entries.length
            ? `${digest(place)}.${uuid}`
            : `${digest(place)}.${after}.${uuid}.${answered}`;
        }
        after = uuid;
      }
      if (found.length === 0) break;
      if (answer.room === room) leastLimit *= 4;
      if (answer.room === 0 && found.length === longestPage) return { entries: answer.entries, nextToken };
      if (after === offset) {
        throw new StatusError(
          "INTERNAL",
          `Cannot ${action}: LightOS at ${place.cluster.lastAddress} answers the page behind ${after} with itself`,
        );
      }
    }
    after = "";
  }
  return { entries: answer.entries, nextToken: "" };
}

/** Short, for CSI allows a token 128 bytes, and cluster and project alone may have as many. */
function digest({ key }: Place): string {
  return createHash("sha256").update(key).digest("hex").slice(0, 32);
}

/**
 * Where a token leads: to the place, behind an object of it. The token of a page that has ended between the entries of one
 * object says which, and how many of its entries were answered.
 */
function placeOf(action: string, places: readonly Place[], token: string): {
  readonly at: number;
  readonly after: string;
  readonly within: { readonly uuid: string; readonly answered: number } | undefined;
} {
  const [where, after = "", uuid, answered = ""] = token.split(".", 4);
  const at = places.findIndex((place) => digest(place) === where);
  const isGood = uuid === undefined
    ? isUuid(after)
    : (after === "" || isUuid(after)) && isUuid(uuid) && /^[1-9]\d{0,5}$/.test(answered);
  if (at < 0 || !isGood) throw badToken(action, token);
  return { at, after, within: uuid === undefined ? undefined : { uuid, answered: Number(answered) } };
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
  readonly trust: TrustOptions;
}

/**
 * The space that is left, as LightOS estimates it, shared out among replicas. LightOS tells it of whole clusters, to
 * tokens with a right to the cluster, and knows no quota of a project (docs/reference/lightos-api.md sections 14 and 15).
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

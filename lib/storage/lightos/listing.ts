/**
 * ListVolumes and ListSnapshots on LightOS (facts: docs/reference/lightos-api.md sections 6.6, 14 and 15.1).
 *
 * Lists go through the clusters in the order of the file and through their projects, each in LightOS' own pages, which
 * are ordered by UUID and start behind one. A token names the place and that UUID, and nothing is kept in between.
 *
 * Kubernetes compares volume IDs as texts. So an ID in a list is written as CreateVolume wrote it for a StorageClass
 * whose `mgmt-endpoint` is the `idEndpoints` of the cluster in the file (default: its `endpoints`) and whose
 * `mgmt-scheme` is its scheme. LightOS does not know which endpoints a volume was made with; so where the file names
 * former ones, a volume has an entry for each ID that it may have: Kubernetes ignores IDs that it does not know, but
 * would attach a volume again each minute whose ID is missing.
 */
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as SnapshotState,
  type Volume as LightosVolume,
  Volume_StateEnum as VolumeState,
} from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import { Secrets } from "../../secrets.ts";
import { isUuid } from "../../uuid.ts";
import { type Endpoint, formatEndpoints, parseVolumeId, type Scheme, type VolumeId } from "../../volume_id.ts";
import type { Listing, Page, PageRequest, Snapshot, Snapshots, Volume } from "../backend.ts";
import { AnswerPage, tokenError, tokenKey } from "../listing_page.ts";
import type { Cluster } from "./cluster.ts";
import type { KnownCluster, KnownClusters } from "./cluster_file.ts";
import { isHelperName } from "./helper_snapshots.ts";
import { encryptionOf } from "./labels.ts";
import { longestPage, type PageRange, readInParts } from "./paging.ts";
import type { ClusterPool } from "./pool.ts";
import { toSnapshot } from "./snapshots.ts";
import { toVolume, volumeCondition } from "./volumes.ts";

/** The listing part of the LightOS backend: what is on the clusters of the file. */
export function lightosListing(clusters: ClusterPool, known: KnownClusters): Listing {
  return {
    listVolumes: (call, page) => readPage(call.doing("list volumes"), knownPlaces(clusters, known), page, volumeKind),
    listAbnormal: (call, secrets, page) =>
      readPage(call.doing("list abnormal volumes"), knownPlaces(clusters, known, secrets), page, abnormalVolumeKind),
  };
}

/**
 * ListSnapshots. An ID leads to its cluster, so only a list without one needs `known`: csi-snapshotter asks for imported
 * snapshots by their IDs, and takes any handle for a snapshot when the call is not implemented.
 */
export function lightosSnapshotList(
  clusters: ClusterPool,
  known: KnownClusters | undefined,
  getSnapshot: Snapshots["getSnapshot"],
): Snapshots["listSnapshots"] {
  return async (call, secrets, { snapshotId, sourceVolumeId }, page) => {
    const ctx = call.doing("list snapshots");
    const source = sourceVolumeId === undefined ? undefined : parseIfOurs(sourceVolumeId);
    if (snapshotId !== undefined) {
      if (page.startingToken !== "") throw tokenError(ctx, page.startingToken);
      const found = await unlessNotFound(getSnapshot(ctx, secrets, snapshotId));
      const isListed = found !== undefined && found.ready &&
        (sourceVolumeId === undefined || parseIfOurs(found.sourceVolumeId)?.uuid === source?.uuid);
      return { entries: isListed ? [found] : [], nextToken: "" };
    }
    if (sourceVolumeId === undefined) {
      if (known !== undefined) return await readPage(ctx, knownPlaces(clusters, known), page, snapshotKind);
      throw ctx.error(
        "FAILED_PRECONDITION",
        "without a cluster file (--config) the controller knows no cluster; give snapshot_id or " +
          "source_volume_id, or a cluster file",
      );
    }
    if (source === undefined) return { entries: [], nextToken: "" };
    return await readPage(ctx, [placeOfSource(clusters, secrets, source)], page, {
      read: snapshotKind.read,
      entries: (place, snapshot) =>
        snapshot.sourceVolumeUUID.toLowerCase() === source.uuid ? snapshotKind.entries(place, snapshot) : [],
    });
  };
}

/** Undefined when there is no such snapshot, or the ID is not one of this driver. */
async function unlessNotFound(snapshot: Promise<Snapshot>): Promise<Snapshot | undefined> {
  try {
    return await snapshot;
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

/** Undefined when the ID is not one of this driver. */
function parseIfOurs(id: string): VolumeId | undefined {
  try {
    return parseVolumeId(id);
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

/** A project of a cluster: LightOS lists one at a time. */
interface ProjectPlace {
  /** Identifies this place in tokens. */
  readonly key: string;
  readonly cluster: Cluster;
  /** Empty: all that the token may see. */
  readonly project: string;
  /** The lists of endpoints that an ID may have, the most likely first. */
  readonly idForms: readonly (readonly Endpoint[])[];
  readonly scheme: Scheme;
}

function knownPlaces(clusters: ClusterPool, known: KnownClusters, secrets = new Secrets()): readonly ProjectPlace[] {
  return known.all().flatMap((cluster) => placesOf(cluster, clusters.open(secrets, cluster.endpoints, cluster.scheme)));
}

function placesOf({ name, projects, idForms, scheme }: KnownCluster, cluster: Cluster): readonly ProjectPlace[] {
  return (projects.length === 0 ? [""] : projects).map((project) => ({
    key: tokenKey(`${name} ${project}`),
    cluster,
    project,
    idForms,
    scheme,
  }));
}

function placeOfSource(clusters: ClusterPool, secrets: Secrets, source: VolumeId): ProjectPlace {
  const { endpoints, scheme, project = "" } = source;
  return {
    key: tokenKey(`${formatEndpoints(endpoints)} ${project} ${source.uuid}`),
    cluster: clusters.open(secrets, endpoints, scheme),
    project,
    idForms: [endpoints],
    scheme,
  };
}

function idIn(
  place: ProjectPlace,
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

/** How objects of one kind are read, and which entries of a list they become. */
interface ListKind<Raw extends { readonly UUID: string }, Entry> {
  read(ctx: RequestContext, place: ProjectPlace, range: PageRange): Promise<readonly Raw[]>;
  /** One entry for each ID that the object may have; none for what does not belong on the list. */
  entries(place: ProjectPlace, raw: Raw): readonly Entry[];
  /** Most of what is read does not belong on the list, so as much as possible is read at once. */
  readonly isRare?: boolean;
}

const listedStates = [VolumeState.Available, VolumeState.Updating, VolumeState.Migrating, VolumeState.Rollback];

const volumeKind: ListKind<LightosVolume, Volume> = {
  async read(ctx, { cluster, project }, range) {
    return (await cluster.call(ctx, DurosAPI.method.listVolumes, { projectName: project, ...range })).volumes;
  },
  entries: (place, volume) =>
    listedStates.includes(volume.state)
      ? place.idForms.map((endpoints) => toVolume(idIn(place, volume, endpoints), volume))
      : [],
};

const abnormalVolumeKind: ListKind<LightosVolume, Volume> = {
  ...volumeKind,
  entries: (place, volume) => volumeCondition(volume) === undefined ? [] : volumeKind.entries(place, volume),
  isRare: true,
};

const snapshotKind: ListKind<LightosSnapshot, Snapshot> = {
  async read(ctx, { cluster, project }, range) {
    return (await cluster.call(ctx, DurosAPI.method.listSnapshots, { projectName: project, ...range })).snapshots;
  },
  // One that is Creating may still end as Failed; the helper of a clone is removed in a moment.
  entries: (place, snapshot) =>
    snapshot.state === SnapshotState.Available && !isHelperName(snapshot.name)
      ? place.idForms.slice(0, 1).map((endpoints) => toSnapshot(idIn(place, snapshot, endpoints), snapshot))
      : [],
};

/**
 * One page of what is in `places`. Where LightOS allows it, one object more is read than returned, so that a token
 * leads to something; a page as large as LightOS' own is not worth a second call for that, and its token may lead to an
 * empty page.
 */
async function readPage<Raw extends { readonly UUID: string }, Entry extends Volume | Snapshot>(
  ctx: RequestContext,
  places: readonly ProjectPlace[],
  { maxEntries, startingToken }: PageRequest,
  kind: ListKind<Raw, Entry>,
): Promise<Page<Entry>> {
  const answer = new AnswerPage<Entry>(maxEntries);
  const start = startingToken === "" ? { at: 0, after: "", within: undefined } : parseToken(ctx, places, startingToken);
  let nextToken = "";
  let after = start.after;
  // A small page must not cost a call for each object that does not belong on it.
  let leastLimit = 1;
  for (const place of places.slice(start.at)) {
    // Whether LightOS counts what it leaves out towards the limit is not documented, so only an empty page is the end.
    for (;;) {
      const { room } = answer;
      const limit = kind.isRare ? longestPage : Math.min(longestPage, Math.max(room + 1, leastLimit));
      const offsetUUID = after;
      const found = await readInParts(limit, (limit) => kind.read(ctx, place, { offsetUUID, limit }));
      for (const raw of found) {
        const uuid = raw.UUID.toLowerCase();
        const entries = kind.entries(place, raw);
        const { within } = start;
        for (const [at, entry] of entries.entries()) {
          if (within !== undefined && within.uuid === uuid && at < within.answered) continue;
          if (!answer.add(entry)) return { entries: answer.entries, nextToken };
          const answered = at + 1;
          nextToken = answered === entries.length
            ? `${place.key}.${uuid}`
            : `${place.key}.${after}.${uuid}.${answered}`;
        }
        after = uuid;
      }
      if (found.length === 0) break;
      if (answer.room === room) leastLimit *= 4;
      if (answer.room === 0 && found.length === longestPage) return { entries: answer.entries, nextToken };
      if (after === offsetUUID) {
        throw ctx.error(
          "INTERNAL",
          `LightOS at ${place.cluster.lastAddress} answers the page behind ${after} with itself`,
        );
      }
    }
    after = "";
  }
  return { entries: answer.entries, nextToken: "" };
}

/** Where a page starts. */
interface ListStart {
  /** Index of the place. */
  readonly at: number;
  /** UUID of the last object of the page before; empty: from the beginning. */
  readonly after: string;
  /** The object between whose entries the page before ended, and how many of them it had. */
  readonly within: { readonly uuid: string; readonly answered: number } | undefined;
}

/** Where a token leads; throws ABORTED when it does not lead to a place (any more). */
function parseToken(ctx: RequestContext, places: readonly ProjectPlace[], token: string): ListStart {
  const [key, after = "", uuid, answered = ""] = token.split(".", 4);
  const at = places.findIndex((place) => place.key === key);
  const isGood = uuid === undefined
    ? isUuid(after)
    : (after === "" || isUuid(after)) && isUuid(uuid) && /^[1-9]\d{0,5}$/.test(answered);
  if (at < 0 || !isGood) throw tokenError(ctx, token);
  return { at, after, within: uuid === undefined ? undefined : { uuid, answered: Number(answered) } };
}

/**
 * What the CSI controller asks of a storage cluster.
 *
 * Every method is an intent and may be repeated: after success it answers the same again, after a failure or a lost
 * answer it goes on from what the cluster shows. States of the cluster, polling and retries stay behind it; it answers
 * when the wish has come true or throws a StatusError before `ctx.signal` has aborted, shortly before the orchestrator
 * stops listening. Calls for different volumes may run at once; the caller keeps calls for one volume apart.
 *
 * Error messages reach the person who reads `kubectl describe`: they name the volume, the management endpoint that
 * answered and the cluster's own words.
 *
 * Optional parts: present means announced in the CSI capabilities, absent means not. No flag can disagree.
 */
import type { Check } from "../check.ts";
import type { RequestContext, Secrets } from "../context.ts";
import type { AuthKind, DhchapKeys } from "../auth_key.ts";
import type { RemoteNamespace, TransportAddress } from "../namespace.ts";

/** How large a volume is to be, in bytes; 0 when not given. */
export interface CapacityRange {
  readonly requiredBytes: bigint;
  readonly limitBytes: bigint;
}

/** What CreateVolume asks for. */
export interface VolumeRequest extends CapacityRange {
  /** CSI's idempotency key. */
  readonly name: string;
  /** StorageClass parameters that are the backend's to read. */
  readonly parameters: Readonly<Record<string, string>>;
  /** What the new volume holds at first; undefined: nothing. */
  readonly source?: ContentSource | undefined;
  /** For whom it is made, for people who find it on the cluster: names by what they name (`pvc`, `namespace`, `pv`). */
  readonly madeFor?: Readonly<Record<string, string>> | undefined;
}

/** A snapshot, or a volume as it is when the call comes in. */
export interface ContentSource {
  readonly type: "snapshot" | "volume";
  /** CSI snapshot or volume ID. */
  readonly id: string;
}

/** A volume as the cluster shows it. */
export interface Volume {
  /** CSI volume ID. */
  readonly id: string;
  /** NVMe namespace UUID. */
  readonly uuid: string;
  readonly name: string;
  readonly capacityBytes: bigint;
  /** Host NQNs that may connect. */
  readonly hosts: readonly string[];
  /** What is wrong with the volume now, or undefined when it is well. */
  readonly condition: AbnormalCondition | undefined;
  /** What `grantAccess` has to be told of it again, for the orchestrator to keep; absent: nothing. */
  readonly context?: Readonly<Record<string, string>>;
}

/** Something that is wrong with a volume. */
export interface AbnormalCondition {
  /** Whether reads and writes go on. */
  readonly usable: boolean;
  /** For programs: CamelCase, the same word for the same trouble as long as it lasts. */
  readonly reason: string;
  /** For people. */
  readonly message: string;
}

export interface Grant {
  readonly hostNqn: string;
  /** Whether other hosts may have access at the same time. */
  readonly shared: boolean;
  /** `context` of the volume, or the attributes of a PersistentVolume that somebody wrote by hand. */
  readonly volumeContext?: Readonly<Record<string, string>>;
}

export interface StorageBackend extends AsyncDisposable {
  readonly name: "lightos" | "poseidon";
  /**
   * Why a volume can be with one host at a time only, for an error message; such access modes are refused. Absent: hosts
   * may share volumes.
   */
  readonly oneHostOnly?: string;
  /** The UUID in a volume ID, for logs and locks. Throws NOT_FOUND for an ID that is not one of this backend. */
  uuidOf(volumeId: string): string;
  /**
   * Same name, same wish: same volume. Throws ALREADY_EXISTS that lists each difference when the name is taken by
   * another wish, OUT_OF_RANGE for an impossible size (below its source's is one), INVALID_ARGUMENT for bad parameters or
   * a source that these parameters cannot reach, NOT_FOUND for an absent source, UNAVAILABLE for one that is not ready.
   * Sources are for backends with `snapshots`.
   */
  createVolume(ctx: RequestContext, secrets: Secrets, wanted: VolumeRequest): Promise<Volume>;
  /** Absent: done. Throws FAILED_PRECONDITION while a host may still connect; never succeeds while the volume exists. */
  deleteVolume(ctx: RequestContext, secrets: Secrets, volumeId: string): Promise<void>;
  /** Absent: NOT_FOUND. */
  getVolume(ctx: RequestContext, secrets: Secrets, volumeId: string): Promise<Volume>;
  /**
   * Lets a host connect and says where. Where the volume's connections have to be authenticated, the host's keys are there
   * before it may connect: those in the secrets (`dhchap-key`, `dhchap-ctrl-key`), or the cluster's. Throws FAILED_PRECONDITION that names the other hosts when access cannot be
   * shared with them. Two racing calls for one volume cannot both win exclusive access.
   */
  grantAccess(ctx: RequestContext, secrets: Secrets, volumeId: string, grant: Grant): Promise<RemoteNamespace>;
  /** Takes access away from a host, or from every host when `hostNqn` is undefined. Absent volume or host: done. */
  revokeAccess(ctx: RequestContext, secrets: Secrets, volumeId: string, hostNqn: string | undefined): Promise<void>;
  readonly expansion?: Expansion;
  readonly snapshots?: Snapshots;
  readonly changedBlocks?: ChangedBlocks;
  readonly listing?: Listing;
  /** May come and go with the credentials of the process. */
  readonly capacity?: Capacity | undefined;
  readonly modification?: Modification;
  readonly inline?: InlineVolumeStore;
  readonly authentication?: Authentication;
}

/** The cluster keeps the keys that hosts authenticate their connections with; `grantAccess` sees to it that they are there. */
export interface Authentication {
  /**
   * The keys that a host has to connect with to reach a volume that was granted with this kind of authentication: at least
   * what that kind needs. Throws FAILED_PRECONDITION when the cluster has none.
   */
  keysOf(
    ctx: RequestContext,
    secrets: Secrets,
    volumeId: string,
    hostNqn: string,
    kind: AuthKind,
  ): Promise<DhchapKeys>;
}

/** Volumes can grow, also while hosts use them. */
export interface Expansion {
  /**
   * Grows a volume to at least `requiredBytes`; never shrinks one. Large enough already: done. Answers the volume with
   * its size afterwards, as the cluster shows or confirms it. Throws OUT_OF_RANGE when that is, or would be, above `limitBytes`, NOT_FOUND.
   */
  expandVolume(ctx: RequestContext, secrets: Secrets, volumeId: string, range: CapacityRange): Promise<Volume>;
}

/** A run of bytes on a volume; never empty. */
export interface BlockRange {
  readonly offsetBytes: bigint;
  readonly lengthBytes: bigint;
}

/** The cluster can tell which blocks of a snapshot hold data, and which differ from an older snapshot. */
export interface ChangedBlocks {
  /**
   * The blocks of a snapshot, or those that differ from an older one of the same volume; blocks that do not may be among
   * them, but none that does is missing. The ranges ascend and do not overlap, also across pages; the first one ends
   * behind `startingOffsetBytes`. Pages are asked for as they are read. Throws NOT_FOUND for a missing snapshot,
   * OUT_OF_RANGE for an offset beyond its size.
   */
  changedBlocks(
    ctx: RequestContext,
    secrets: Secrets,
    wanted: {
      readonly snapshotId: string;
      readonly baseSnapshotId: string | undefined;
      readonly startingOffsetBytes: bigint;
    },
  ): Promise<{ readonly capacityBytes: bigint; readonly pages: AsyncIterable<readonly BlockRange[]> }>;
}

/** What CreateSnapshot asks for. */
export interface SnapshotRequest {
  /** CSI's idempotency key. */
  readonly name: string;
  /** CSI volume ID. */
  readonly sourceVolumeId: string;
  /** See VolumeWanted: `volumesnapshot`, `namespace`, `content`. */
  readonly madeFor?: Readonly<Record<string, string>> | undefined;
}

/** A snapshot as the cluster shows it. */
export interface Snapshot {
  /** CSI snapshot ID. */
  readonly id: string;
  /** CSI volume ID of its source, in canonical form. */
  readonly sourceVolumeId: string;
  /** The smallest size of a volume made from it. */
  readonly sizeBytes: bigint;
  /** The point in time of its content. */
  readonly createdAt: Date;
  /** Whether volumes can be made from it now. */
  readonly ready: boolean;
}

/** Snapshots can be taken, and volumes made from snapshots and from volumes, of the source's size or larger. */
export interface Snapshots {
  /** The UUID in a snapshot ID, for locks. Throws NOT_FOUND for an ID that is not one of this backend. */
  uuidOf(snapshotId: string): string;
  /**
   * Same name, same source: same snapshot; answers when it is ready. Throws ALREADY_EXISTS when the name is taken by a
   * snapshot of another volume, NOT_FOUND for an absent source, ABORTED while a namesake is being deleted.
   */
  createSnapshot(ctx: RequestContext, secrets: Secrets, wanted: SnapshotRequest): Promise<Snapshot>;
  /** Absent: done. Volumes made from it live on. */
  deleteSnapshot(ctx: RequestContext, secrets: Secrets, snapshotId: string): Promise<void>;
  /** Absent: NOT_FOUND. Also one that is not ready. */
  getSnapshot(ctx: RequestContext, secrets: Secrets, snapshotId: string): Promise<Snapshot>;
  /**
   * Those that match every given filter and are ready, on any cluster that an ID leads to; an unknown ID matches nothing.
   * Without a filter, those on the backend's own clusters, as `Listing` says; throws FAILED_PRECONDITION when it has none.
   */
  listSnapshots(
    ctx: RequestContext,
    secrets: Secrets,
    filter: SnapshotFilter,
    wanted: PageRequest,
  ): Promise<Page<Snapshot>>;
}

/** Which snapshots are listed: CSI IDs of the snapshot, of its source; undefined: all. */
export interface SnapshotFilter {
  readonly snapshotId: string | undefined;
  readonly sourceVolumeId: string | undefined;
}

/** Which part of a list is wanted. */
export interface PageRequest {
  /** 0: as many as the backend puts into one answer. */
  readonly maxEntries: number;
  /** `nextToken` of the page before; empty: the first page. */
  readonly startingToken: string;
}

/** A part of a list. */
export interface Page<T> {
  readonly entries: readonly T[];
  /** Where the next page starts; empty: this was the last one. */
  readonly nextToken: string;
}

/**
 * The backend has clusters of its own to look at, for calls that name none. Lists hold what can be used, neither husks nor
 * what is being made or deleted. Throws ABORTED for a token that is not, or no longer, one of its own; an unreachable
 * cluster fails the call, for its volumes would seem to be gone.
 */
export interface Listing {
  listVolumes(ctx: RequestContext, wanted: PageRequest): Promise<Page<Volume>>;
  /** Those that are in trouble. */
  listAbnormal(ctx: RequestContext, secrets: Secrets, wanted: PageRequest): Promise<Page<Volume>>;
}

/** The backend can tell how much space is left. */
export interface Capacity {
  /**
   * The bytes that volumes with these StorageClass parameters can still have in all, and the least that one of them has.
   * Without parameters: on all of the backend's clusters. Throws INVALID_ARGUMENT for bad parameters.
   */
  getCapacity(
    ctx: RequestContext,
    parameters: Readonly<Record<string, string>>,
  ): Promise<{ readonly availableBytes: bigint; readonly minimumVolumeBytes: bigint }>;
}

/** Some parameters of volumes can change while hosts use them. */
export interface Modification {
  /**
   * The StorageClass parameters with `mutable` ones (of a VolumeAttributesClass) in place of those that they replace.
   * Throws INVALID_ARGUMENT for mutable parameters that are unknown or bad.
   */
  merge(
    action: string,
    parameters: Readonly<Record<string, string>>,
    mutable: Readonly<Record<string, string>>,
  ): Readonly<Record<string, string>>;
  /** All or nothing; others than those given stay. Throws what `merge` throws, before anything is done; NOT_FOUND. */
  modifyVolume(
    ctx: RequestContext,
    secrets: Secrets,
    volumeId: string,
    mutable: Readonly<Record<string, string>>,
  ): Promise<void>;
}

/** What a pod asks of a volume that lives as long as it does (a CSI inline volume). */
export interface InlineVolumeRequest {
  /** CSI's volume ID: made by the orchestrator for this pod, and the same in all calls. */
  readonly volumeId: string;
  /** What the author of the pod wrote. It decides what is made, within what the operator allows, and never where. */
  readonly attributes: Readonly<Record<string, string>>;
  readonly nodeId: string;
  /** Where the node is to show it. Kept with the volume: once this place is gone there, nobody asks for it any more. */
  readonly targetPath: string;
  readonly pod: { readonly namespace: string; readonly name: string; readonly uid: string };
  /** Whether an earlier call may have made the volume already. */
  readonly isRepeat: boolean;
}

/** An inline volume as the cluster shows it. */
export interface InlineVolume {
  /** CSI's volume ID. */
  readonly volumeId: string;
  /** The ID that the other calls of this backend know it by. */
  readonly storageId: string;
  /** NVMe namespace UUID. */
  readonly uuid: string;
  readonly capacityBytes: bigint;
  /** Which cluster and project it is in, for people. */
  readonly place: string;
  /** For which node it was made, and where on it; undefined when the cluster does not tell. */
  readonly nodeId: string | undefined;
  readonly targetPath: string | undefined;
  readonly pod: { readonly namespace: string; readonly name: string; readonly uid: string };
  /** Host NQNs that are connected and may reach it now. */
  readonly connectedHosts: readonly string[];
}

/**
 * Volumes that a node makes for a pod by itself and takes away after it, on clusters whose operator allows that.
 *
 * A volume is told by a mark on the cluster that holds its CSI volume ID. What has the right name and not the mark is
 * neither used nor removed.
 */
export interface InlineVolumeStore {
  /** Why no volume can be made now, whatever is asked for; undefined: they can be. */
  obstacle(): string | undefined;
  /**
   * Makes the volume, unless it is there, lets the node connect, and says where. `secrets` pay for the making; everything
   * else is done with the operator's token.
   *
   * After a failure that is final (see `isFinal`), nothing of it is on the cluster. Throws INVALID_ARGUMENT for bad
   * attributes, OUT_OF_RANGE for a size that is not allowed, FAILED_PRECONDITION when a volume of that name is not ours.
   */
  makeVolume(ctx: RequestContext, secrets: Secrets, wanted: InlineVolumeRequest): Promise<RemoteNamespace>;
  /**
   * The volume of this CSI volume ID, wherever it is; undefined: nowhere. Throws UNAVAILABLE when it was not found and
   * some cluster could not be asked.
   */
  findVolume(ctx: RequestContext, volumeId: string): Promise<InlineVolume | undefined>;
  /** Takes access away from the node that it was made for, and removes it. Absent: done. */
  removeVolume(ctx: RequestContext, volume: InlineVolume): Promise<void>;
  /** All volumes that were made for a node, and, for people, which clusters could not be asked. */
  listVolumes(
    ctx: RequestContext,
    nodeId: string,
  ): Promise<{ readonly volumes: readonly InlineVolume[]; readonly problems: readonly string[] }>;
}

/** A look at one storage system, for `lbcsi doctor`: see check.ts. Nothing there is changed by it. */
export interface SystemReport {
  /** `cluster rack1`, for people. */
  readonly name: string;
  readonly checks: readonly Check[];
  /** Where a node has to reach it for data: I/O controllers, and discovery controllers. */
  readonly addresses: readonly TransportAddress[];
  readonly discovery: readonly TransportAddress[];
  /** False: it is simulated, and nothing listens at these addresses. */
  readonly hasDataPath?: boolean;
  /** Who is connected there under the host NQN that was asked about; undefined: nobody, or it does not tell. */
  readonly connected: { readonly address: string; readonly hostname: string } | undefined;
  /** Whether hosts have to authenticate on the data path (DH-HMAC-CHAP); undefined: it does not tell. */
  readonly inBandAuth: boolean | undefined;
}

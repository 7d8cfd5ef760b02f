/**
 * The contract between the CSI services and a storage cluster.
 *
 * Every method is an intent and may be repeated: after success it returns the same again, after a failure or a lost
 * answer it continues from what the cluster shows. States of the cluster, polling and retries stay behind it; it
 * returns when the request is fulfilled, or throws a StatusError before `ctx.signal` has aborted, shortly before the
 * orchestrator stops waiting. Calls for different volumes may run at once; the caller
 * never runs two calls for one volume at once.
 *
 * Each method names its own action: its errors begin with `Cannot <action>: `. They reach the person who reads `kubectl
 * describe`, and name the volume, the management endpoint that answered and the cluster's own words.
 *
 * Optional parts: present means announced in the CSI capabilities, absent means not announced. No flag can contradict.
 */
import type { AuthKind, DhchapKeys } from "../auth_key.ts";
import type { Check } from "../check.ts";
import type { RequestContext } from "../context.ts";
import type { RemoteNamespace, TransportAddress } from "../namespace.ts";
import type { Secrets } from "../secrets.ts";

/** The requested size of a volume, in bytes; 0 when not given. */
export interface CapacityRange {
  readonly requiredBytes: bigint;
  readonly limitBytes: bigint;
}

/** The volume that CreateVolume requests. */
export interface VolumeRequest extends CapacityRange {
  /** CSI's idempotency key. */
  readonly name: string;
  /** The StorageClass parameters that the backend reads. */
  readonly parameters: Readonly<Record<string, string>>;
  /** The content of the new volume; undefined: it begins empty. */
  readonly source?: ContentSource | undefined;
  /** For people who find it on the cluster: the names of its owners, by their kind (`pvc`, `namespace`, `pv`). */
  readonly owner?: Readonly<Record<string, string>> | undefined;
}

/** A snapshot, or a volume with the content that it has when the call arrives. */
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
  /** What is wrong with the volume now; undefined: nothing. */
  readonly condition: AbnormalCondition | undefined;
  /** What `grantAccess` needs to know of it later; the orchestrator keeps it. Absent: nothing. */
  readonly context?: Readonly<Record<string, string>>;
}

/** Something that is wrong with a volume. */
export interface AbnormalCondition {
  /** Whether reads and writes go on. */
  readonly usable: boolean;
  /** For programs: CamelCase, the same word for the same condition as long as it lasts. */
  readonly reason: string;
  /** For people. */
  readonly message: string;
}

/** Which host is granted access, and how. */
export interface Grant {
  readonly hostNqn: string;
  /** Whether other hosts may have access at the same time. */
  readonly shared: boolean;
  /** `context` of the volume, or the attributes of a PersistentVolume that was written by hand. */
  readonly volumeContext?: Readonly<Record<string, string>>;
}

/** A storage system, for the CSI services. Dispose it to close its connections. */
export interface StorageBackend extends AsyncDisposable {
  /** As `--backend` names it. */
  readonly name: string;
  /**
   * Why only one host at a time can have a volume, for the error about access modes that need more. Absent: hosts may
   * share volumes.
   */
  readonly oneHostOnly?: string;
  /** The UUID in a volume ID, for logs and locks. Throws NOT_FOUND for an ID that is not one of this backend. */
  uuidOf(volumeId: string): string;
  /**
   * Same name, same request: same volume. Throws ALREADY_EXISTS that lists each difference when another request has
   * made a volume of that name, OUT_OF_RANGE for an impossible size (such as one below its source's), INVALID_ARGUMENT
   * for bad parameters or a source that is not on the cluster of these parameters, NOT_FOUND for an absent source,
   * UNAVAILABLE for one that is not ready. Only backends with `snapshots` accept sources.
   */
  createVolume(ctx: RequestContext, secrets: Secrets, request: VolumeRequest): Promise<Volume>;
  /** Absent: done. Throws FAILED_PRECONDITION while a host may still connect; never succeeds while the volume exists. */
  deleteVolume(ctx: RequestContext, secrets: Secrets, volumeId: string): Promise<void>;
  /** Absent: NOT_FOUND. */
  getVolume(ctx: RequestContext, secrets: Secrets, volumeId: string): Promise<Volume>;
  /**
   * Lets a host connect, and returns where. When the volume's connections have to be authenticated, the cluster has the
   * host's keys before the host may connect: those in the secrets (`dhchap-key`, `dhchap-ctrl-key`), or the cluster's
   * own. Throws FAILED_PRECONDITION that names the other hosts when access cannot be shared with them. Two racing calls
   * for one volume cannot both win exclusive access.
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

/** The cluster keeps the keys that hosts authenticate their connections with; `grantAccess` ensures that they exist. */
export interface Authentication {
  /**
   * The keys with which a host has to connect to a volume that was granted with this kind of authentication: at least
   * those that the kind needs. Throws FAILED_PRECONDITION when the cluster has none.
   */
  keysOf(
    ctx: RequestContext,
    secrets: Secrets,
    volumeId: string,
    host: { readonly hostNqn: string; readonly kind: AuthKind },
  ): Promise<DhchapKeys>;
}

/** Volumes can grow, even while hosts use them. */
export interface Expansion {
  /**
   * Grows a volume to at least `requiredBytes`; never shrinks one. Large enough already: done. Returns the volume with
   * its size afterwards, as the cluster shows or confirms it. Throws OUT_OF_RANGE when that is, or would be, above
   * `limitBytes`; NOT_FOUND.
   */
  expandVolume(ctx: RequestContext, secrets: Secrets, volumeId: string, range: CapacityRange): Promise<Volume>;
}

/** A run of bytes on a volume; never empty. */
export interface BlockRange {
  readonly offsetBytes: bigint;
  readonly lengthBytes: bigint;
}

/** The cluster knows which blocks of a snapshot hold data, and which differ from an older snapshot. */
export interface ChangedBlocks {
  /**
   * The blocks of a snapshot with data, or those that differ from an older one of the same volume. The result may
   * include unchanged blocks, but never omits a changed one. The ranges ascend and do not overlap, also across pages; the first one ends behind
   * `startingOffsetBytes`. Pages are requested as they are read. Throws NOT_FOUND for an absent snapshot, OUT_OF_RANGE
   * for an offset beyond its size.
   */
  changedBlocks(
    ctx: RequestContext,
    secrets: Secrets,
    request: {
      readonly snapshotId: string;
      readonly baseSnapshotId: string | undefined;
      readonly startingOffsetBytes: bigint;
    },
  ): Promise<{ readonly capacityBytes: bigint; readonly pages: AsyncIterable<readonly BlockRange[]> }>;
}

/** The snapshot that CreateSnapshot requests. */
export interface SnapshotRequest {
  /** CSI's idempotency key. */
  readonly name: string;
  /** CSI volume ID. */
  readonly sourceVolumeId: string;
  /** As in VolumeRequest: `volumesnapshot`, `namespace`, `content`. */
  readonly owner?: Readonly<Record<string, string>> | undefined;
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
   * Same name, same source: same snapshot; returns when it is ready. Throws ALREADY_EXISTS when a snapshot of another
   * volume has the name, NOT_FOUND for an absent source, ABORTED while a namesake is being deleted.
   */
  createSnapshot(ctx: RequestContext, secrets: Secrets, request: SnapshotRequest): Promise<Snapshot>;
  /** Absent: done. Volumes that were made from it stay. */
  deleteSnapshot(ctx: RequestContext, secrets: Secrets, snapshotId: string): Promise<void>;
  /** Absent: NOT_FOUND. Returns one that is not ready, too. */
  getSnapshot(ctx: RequestContext, secrets: Secrets, snapshotId: string): Promise<Snapshot>;
  /**
   * The snapshots that match every given filter and are ready, on the cluster that an ID leads to; an unknown ID
   * matches nothing. Without a filter, those on the clusters of the cluster file, as `Listing` says; throws
   * FAILED_PRECONDITION when there is no such file.
   */
  listSnapshots(
    ctx: RequestContext,
    secrets: Secrets,
    filter: SnapshotFilter,
    page: PageRequest,
  ): Promise<Page<Snapshot>>;
}

/** Which snapshots are listed: CSI IDs of the snapshot, of its source; undefined: all. */
export interface SnapshotFilter {
  readonly snapshotId: string | undefined;
  readonly sourceVolumeId: string | undefined;
}

/** Which part of a list is requested. */
export interface PageRequest {
  /** 0: no limit but that of one answer. */
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
 * Lists of the volumes on the clusters of the cluster file, for calls that name no cluster. Lists hold what can be
 * used, not what is being made or deleted, nor what is left of failed creations. Throws ABORTED for a token that is
 * not, or no longer, one of its own; an unreachable cluster fails the call, because its volumes would seem to be gone.
 */
export interface Listing {
  listVolumes(ctx: RequestContext, page: PageRequest): Promise<Page<Volume>>;
  /** The volumes with an abnormal condition. */
  listAbnormal(ctx: RequestContext, secrets: Secrets, page: PageRequest): Promise<Page<Volume>>;
}

/** The backend knows how much space is left. */
export interface Capacity {
  /**
   * The bytes that are left for volumes with these StorageClass parameters, and the smallest size of one of them.
   * Without parameters: on all clusters of the cluster file. Throws INVALID_ARGUMENT for bad parameters.
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
   * Throws INVALID_ARGUMENT for mutable parameters that are unknown or bad; the error names the action of `ctx`.
   */
  merge(
    ctx: RequestContext,
    parameters: Readonly<Record<string, string>>,
    mutable: Readonly<Record<string, string>>,
  ): Readonly<Record<string, string>>;
  /**
   * Changes all given parameters or none; others stay. Throws what `merge` throws, before anything is done; NOT_FOUND.
   */
  modifyVolume(
    ctx: RequestContext,
    secrets: Secrets,
    volumeId: string,
    mutable: Readonly<Record<string, string>>,
  ): Promise<void>;
}

/** The CSI inline volume that a pod requests; it exists as long as the pod. */
export interface InlineVolumeRequest {
  /** CSI's volume ID: made by the orchestrator for this pod, and the same in all calls. */
  readonly volumeId: string;
  /** What the author of the pod wrote. It decides what is made, within the limits of the operator, and never where. */
  readonly attributes: Readonly<Record<string, string>>;
  readonly nodeId: string;
  /** CSI's target path on the node. Kept with the volume: when it does not exist any more, the volume is a leftover. */
  readonly targetPath: string;
  readonly pod: { readonly namespace: string; readonly name: string; readonly uid: string };
  /** Whether an earlier call may have made the volume already. */
  readonly isRepeat: boolean;
}

/** An inline volume as the cluster shows it. */
export interface InlineVolume {
  /** CSI's volume ID. */
  readonly volumeId: string;
  /** Its volume ID for the other calls of this backend. */
  readonly storageId: string;
  /** NVMe namespace UUID. */
  readonly uuid: string;
  readonly capacityBytes: bigint;
  /** Which cluster and project it is in, for people. */
  readonly place: string;
  /** The node that it was made for, and the target path there; undefined when the cluster does not say. */
  readonly nodeId: string | undefined;
  readonly targetPath: string | undefined;
  readonly pod: { readonly namespace: string; readonly name: string; readonly uid: string };
  /** Host NQNs that are connected and have access now. */
  readonly connectedHosts: readonly string[];
}

/**
 * Inline volumes: a node makes them for a pod without the controller and removes them after it, on clusters whose
 * operator allows that.
 *
 * A mark on the cluster, which holds the CSI volume ID, identifies such a volume. A volume that has the right name and
 * not the mark is neither used nor removed.
 */
export interface InlineVolumeStore {
  /** Why no volume can be made now, whatever is requested; undefined: volumes can be made. */
  obstacle(): string | undefined;
  /**
   * Makes the volume, unless it exists, lets the node connect, and returns where. The volume is created with the token
   * in `secrets`, if there is one; everything else is done with the operator's.
   *
   * After a failure that is final (see `isFinal`), nothing of the volume is on the cluster. Throws INVALID_ARGUMENT for
   * bad attributes, OUT_OF_RANGE for a size that is not allowed, FAILED_PRECONDITION when a volume of that name is not
   * ours.
   */
  makeVolume(ctx: RequestContext, secrets: Secrets, request: InlineVolumeRequest): Promise<RemoteNamespace>;
  /**
   * The volume of this CSI volume ID, wherever it is; undefined: nowhere. Throws UNAVAILABLE when it was not found and
   * some cluster could not be asked.
   */
  findVolume(ctx: RequestContext, volumeId: string): Promise<InlineVolume | undefined>;
  /** Revokes the access of the node that it was made for, and removes it. Absent: done. */
  removeVolume(ctx: RequestContext, volume: InlineVolume): Promise<void>;
  /** All volumes that were made for a node, and, for messages, which clusters could not be asked. */
  listVolumes(
    ctx: RequestContext,
    nodeId: string,
  ): Promise<{ readonly volumes: readonly InlineVolume[]; readonly problems: readonly string[] }>;
}

/** The checks of one storage system, for `lbcsi doctor`: see check.ts. They change nothing there. */
export interface SystemReport {
  /** `cluster rack1`, for people. */
  readonly name: string;
  readonly checks: readonly Check[];
  /** Where nodes have to connect for data: I/O controllers, and discovery controllers. */
  readonly addresses: readonly TransportAddress[];
  readonly discovery: readonly TransportAddress[];
  /** False: it is simulated, and nothing listens at these addresses. */
  readonly hasDataPath?: boolean;
  /** The host that is connected there under the host NQN in question; undefined: none, or it does not say. */
  readonly connected: { readonly address: string; readonly hostname: string } | undefined;
  /** Whether hosts have to authenticate on the data path (DH-HMAC-CHAP); undefined: it does not say. */
  readonly inBandAuth: boolean | undefined;
}

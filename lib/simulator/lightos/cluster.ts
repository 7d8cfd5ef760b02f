/**
 * The model of a LightOS cluster: what it holds, which states its objects go through, and what it refuses.
 *
 * Free of gRPC: lightos.ts speaks for it. Facts are from docs/reference/lightos-api.md sections 6, 14 and 15. Where those do not say
 * how LightOS behaves, the stricter of two behaviours was taken, so that a driver that works here works there. Where they
 * say something else than the vendor's tests of a real cluster show, the latter counts (`Behaviour.asDocumented`).
 *
 * - Creation, deletion and rollback go on after the call that asked for them; objects show it by their state. Times are
 *   kept as points in time, so that a simulator that is started again goes on with what was half done.
 * - A name is taken by live objects of its project only: a Deleting or Failed one does not block it. A Failed volume is
 *   the husk of a creation that failed; it cannot be deleted.
 * - Every change of a volume, its state included, gives it a new ETag; a snapshot or clone of it does too. A new volume and
 *   its clone may have equal ones.
 * - Space is reserved: size times replicas, from creation until the volume is gone.
 */
import * as z from "zod";
import type { Logger } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import { readState, stateText, writeState } from "../state_file.ts";
import { isProjectName } from "../../volume_id.ts";
import type { DataPlane } from "../data_plane/data_plane.ts";
import { mayAccess } from "../data_plane/data_plane.ts";
import { ObjectIndex } from "./object_index.ts";

export const volumeStates = [
  "Creating",
  "Available",
  "Deleting",
  "Failed",
  "Updating",
  "Rollback",
  "Migrating",
] as const;
export type VolumeState = typeof volumeStates[number];
export const protections = ["Unknown", "FullyProtected", "Degraded", "ReadOnly", "NotAvailable"] as const;
export type Protection = typeof protections[number];
export const snapshotStates = ["Creating", "Available", "Deleting", "Failed"] as const;

const labelSchema = z.object({ key: z.string(), value: z.string() });

const volumeSchema = z.object({
  uuid: z.string(),
  name: z.string(),
  project: z.string(),
  state: z.enum(volumeStates),
  protection: z.enum(protections),
  replicaCount: z.number(),
  sizeBytes: z.coerce.bigint(),
  acl: z.array(z.string()),
  ipAcl: z.array(z.string()),
  compression: z.boolean(),
  etag: z.string(),
  nsid: z.number(),
  sectorSizeBytes: z.number(),
  sourceSnapshotUuid: z.string().optional(),
  sourceSnapshotName: z.string().optional(),
  qosPolicyUuid: z.string().optional(),
  labels: z.array(labelSchema),
  nodeUuids: z.array(z.string()),
  createdAtMs: z.number(),
  /** When the state changes by itself; absent while it does not. */
  dueAtMs: z.number().optional(),
  /** The creation is to end as Failed. */
  doomed: z.boolean().optional(),
  /** The creation waits until it is released. */
  held: z.boolean().optional(),
  /** What a rollback is to restore. */
  rollbackTo: z.string().optional(),
});
/** A volume as the cluster knows it. */
export type SimVolume = z.infer<typeof volumeSchema>;

const snapshotSchema = z.object({
  uuid: z.string(),
  name: z.string(),
  project: z.string(),
  state: z.enum(snapshotStates),
  description: z.string(),
  sourceVolumeUuid: z.string(),
  sourceVolumeName: z.string(),
  replicaCount: z.number(),
  sizeBytes: z.coerce.bigint(),
  compression: z.boolean(),
  sectorSizeBytes: z.number(),
  etag: z.string(),
  nsid: z.number(),
  labels: z.array(labelSchema),
  nodeUuids: z.array(z.string()),
  createdAtMs: z.number(),
  dueAtMs: z.number().optional(),
  doomed: z.boolean().optional(),
  held: z.boolean().optional(),
  /** When the snapshot deletes itself. */
  expiresAtMs: z.number().optional(),
});
export type SimSnapshot = z.infer<typeof snapshotSchema>;

const policySchema = z.object({
  uuid: z.string(),
  name: z.string(),
  description: z.string(),
  /** Projects that may use it; absent: all. */
  projects: z.array(z.string()).optional(),
  limit: z.discriminatedUnion("kind", [
    z.object({ kind: z.literal("iops"), read: z.number(), write: z.number() }),
    z.object({ kind: z.literal("bandwidth"), read: z.number(), write: z.number() }),
    z.object({ kind: z.literal("iopsPerGb"), read: z.number(), write: z.number() }),
  ]),
});
export type SimPolicy = z.infer<typeof policySchema>;

const trustedHostSchema = z.object({
  uuid: z.string(),
  name: z.string(),
  project: z.string(),
  hostNqn: z.string(),
  labels: z.array(labelSchema),
  authRequired: z.string(),
  hostSecret: z.string(),
  targetSecret: z.string(),
});
export type SimTrustedHost = z.infer<typeof trustedHostSchema>;

const projectSchema = z.object({ uuid: z.string(), name: z.string(), description: z.string() });
export type SimProject = z.infer<typeof projectSchema>;

const modelSchema = z.object({
  format: z.literal(1),
  revision: z.number(),
  nextNsid: z.number(),
  projects: z.array(projectSchema),
  volumes: z.array(volumeSchema),
  snapshots: z.array(snapshotSchema),
  policies: z.array(policySchema),
  trustedHosts: z.array(trustedHostSchema),
  features: z.record(z.string(), z.boolean()),
  inBandAuthentication: z.boolean(),
});
export type ClusterModel = z.infer<typeof modelSchema>;

/** One storage server with its one node. */
export interface ServerPlace {
  readonly uuid: string;
  readonly nodeUuid: string;
  readonly name: string;
  /** `address:port` of the node's I/O controller. */
  readonly nvmeEndpoint: string;
  /** `address:port` of the server's discovery controller. */
  readonly discoveryEndpoint: string;
}

/** What makes the cluster this cluster. */
export interface ClusterIdentity {
  readonly uuid: string;
  readonly name: string;
  readonly subsystemNqn: string;
  readonly servers: readonly ServerPlace[];
}

/** How the cluster behaves now; may be changed while it runs. */
export interface Behaviour {
  /** How long a volume or snapshot is Creating. 0: it is Available in the answer already. */
  creationMs: number;
  /** How long a volume or snapshot is Deleting. */
  deletionMs: number;
  /** How long a volume is Updating. 0: it stays Available. */
  updateMs: number;
  /** How long a volume is in Rollback. */
  rollbackMs: number;
  /** New volumes and snapshots stay Creating until `releaseCreations`. */
  holdCreations: boolean;
  /** So many of the next creations end as Failed. */
  failCreations: number;
  /** GetVolume by name answers the Deleting or Failed namesake of a live volume, as some versions of LightOS do. */
  nameShowsDead: boolean;
  /** A deleted snapshot stays Deleting while clones of it live. */
  snapshotWaitsForClones: boolean;
  /** CreateVolume checks everything else, space too, before it looks whether the name is taken. */
  nameCheckedLast: boolean;
  /**
   * Answers as the REST documentation says, where the vendor's tests of a real cluster show something else: sizes that are no
   * multiple of 4 KiB are refused and not rounded up, access lists hold host NQNs only, snapshots have an ETag, ETags are
   * unique in the cluster and a snapshot leaves its source's alone, and an update of a Deleting or Failed volume is
   * INVALID_ARGUMENT and not FAILED_PRECONDITION.
   */
  asDocumented: boolean;
}

/** The behaviour of a small, idle cluster. */
export const defaultBehaviour: Behaviour = {
  creationMs: 50,
  deletionMs: 50,
  updateMs: 0,
  rollbackMs: 50,
  holdCreations: false,
  failCreations: 0,
  nameShowsDead: false,
  nameCheckedLast: false,
  snapshotWaitsForClones: true,
  asDocumented: false,
};

export interface ClusterOptions {
  readonly identity: ClusterIdentity;
  readonly projects: readonly string[];
  readonly capacityBytes: bigint;
  readonly behaviour: Behaviour;
  readonly dataPlane: DataPlane;
  readonly log: Logger;
  /** File that remembers the model; undefined: memory only. */
  readonly file: string | undefined;
}

/** Which object is meant: by UUID, or by name when the UUID is empty. */
export interface ObjectRef {
  readonly project: string;
  readonly uuid?: string;
  readonly name?: string;
}

export interface SimulatedVolumeRequest {
  readonly project: string;
  readonly name: string;
  /** Text form; empty with a source snapshot: the snapshot's size. */
  readonly size: string;
  readonly replicaCount: number;
  readonly compression: string;
  readonly acl: readonly string[] | undefined;
  readonly ipAcl: readonly string[] | undefined;
  /** 0, 512 or 4096. */
  readonly sectorSizeBytes: number;
  readonly sourceSnapshot: { readonly uuid: string; readonly name: string };
  readonly qosPolicy: { readonly uuid: string; readonly name: string };
  readonly labels: readonly { readonly key: string; readonly value: string }[];
}

/** What UpdateVolume may change; undefined leaves a property alone. */
export interface VolumeChange {
  readonly acl?: readonly string[] | undefined;
  readonly ipAcl?: readonly string[] | undefined;
  readonly size?: string | undefined;
  readonly force?: boolean | undefined;
  readonly compression?: string | undefined;
  readonly newName?: string | undefined;
  readonly qosPolicy?: { readonly uuid: string; readonly name: string } | undefined;
  readonly labels?: readonly { readonly key: string; readonly value: string }[] | undefined;
}

export interface SimulatedSnapshotRequest {
  readonly project: string;
  readonly name: string;
  readonly description: string;
  readonly source: { readonly uuid: string; readonly name: string };
  readonly retentionMs: number | undefined;
}

export interface ListRequest {
  readonly project: string | undefined;
  readonly uuid?: string;
  readonly name?: string;
  /** Exclusive start. */
  readonly offsetUuid?: string;
  /** 0: the most that is allowed. */
  readonly limit?: number;
  /** Deleting ones too. */
  readonly showAll?: boolean;
  /** Volumes made from this snapshot. */
  readonly snapshotUuid?: string;
  readonly failureDomain?: string;
}

/** Most objects in one page of a list (docs/reference/lightos-api.md 15.1). */
export const longestPage = 1000;
const longestTimerMs = 2 ** 31 - 1;
const featureNames = ["event-log", "evict-data", "fail-in-place", "in-band-authentication", "proactive-rebalance"];

/** A cluster. Dispose it to stop its clock; a model that is kept in a file goes on when it is opened again. */
export class Cluster implements AsyncDisposable {
  readonly identity: ClusterIdentity;
  readonly behaviour: Behaviour;
  readonly capacityBytes: bigint;
  readonly dataPlane: DataPlane;
  readonly #log: Logger;
  readonly #file: string | undefined;
  readonly #initialProjects: readonly string[];
  #model: ClusterModel;
  readonly #volumes = new ObjectIndex<SimVolume>({
    source: ({ sourceSnapshotUuid }) => sourceSnapshotUuid,
    bytes: ({ state, sizeBytes, replicaCount }) => state === "Failed" ? 0n : sizeBytes * BigInt(replicaCount),
  });
  readonly #snapshots = new ObjectIndex<SimSnapshot>({
    source: ({ sourceVolumeUuid }) => sourceVolumeUuid,
    bytes: () => 0n,
  });
  readonly #timers = new Map<string, ReturnType<typeof setTimeout>>();
  readonly #work = new Set<Promise<void>>();
  #closed = false;

  private constructor(options: ClusterOptions, model: ClusterModel) {
    this.identity = options.identity;
    this.behaviour = { ...options.behaviour };
    this.capacityBytes = options.capacityBytes;
    this.dataPlane = options.dataPlane;
    this.#log = options.log;
    this.#file = options.file;
    this.#initialProjects = options.projects;
    this.#model = model;
    for (const volume of model.volumes) this.#volumes.put(volume);
    for (const snapshot of model.snapshots) this.#snapshots.put(snapshot);
  }

  /**
   * Opens the cluster that `options.file` remembers, or a new one, and goes on with creations and deletions that were
   * under way.
   *
   * @throws StatusError FAILED_PRECONDITION when the file is there but cannot be read as a model
   */
  static async open(options: ClusterOptions): Promise<Cluster> {
    const { file } = options;
    const found = file === undefined ? undefined : await readState(file, modelSchema, "the cluster");
    const cluster = new Cluster(options, found ?? emptyModel());
    for (const name of options.projects) {
      if (!cluster.#model.projects.some((project) => project.name === name)) cluster.#addProject(name, "");
    }
    for (const snapshot of cluster.#snapshots.values()) await cluster.#resumeSnapshot(snapshot);
    for (const volume of cluster.#volumes.values()) cluster.#resumeVolume(volume);
    cluster.#tellKeys();
    await options.dataPlane.start();
    cluster.#save();
    return cluster;
  }

  // -------------------------------------------------------------------------------------------------------- volumes

  /** Starts the creation of a volume. @throws StatusError as LightOS would answer */
  async createVolume(wish: SimulatedVolumeRequest): Promise<SimVolume> {
    const action = `create volume "${wish.name}"`;
    this.#checkProject(action, wish.project);
    checkName(action, wish.name);
    if (!this.behaviour.nameCheckedLast) this.#checkNameIsFree(action, wish);
    const source = this.#sourceSnapshot(action, wish);
    const sizeBytes = wish.size === "" && source !== undefined ? source.sizeBytes : this.#parseSize(action, wish.size);
    if (source !== undefined && sizeBytes < source.sizeBytes) {
      throw invalid(action, `size ${sizeBytes} is below the ${source.sizeBytes} bytes of snapshot ${source.uuid}`);
    }
    const replicaCount = this.#checkReplicas(action, wish.replicaCount);
    this.#checkSpace(action, sizeBytes * BigInt(replicaCount));
    const policy = this.#policyFor(action, wish.project, wish.qosPolicy);
    if (![0, 512, 4096].includes(wish.sectorSizeBytes)) {
      throw invalid(action, `sector size ${wish.sectorSizeBytes} is not 512 or 4096`);
    }
    const labels = wish.labels.length === 0 && source !== undefined ? source.labels : checkLabels(action, wish.labels);
    if (this.behaviour.nameCheckedLast) this.#checkNameIsFree(action, wish);
    const doomed = this.behaviour.failCreations > 0;
    if (doomed) this.behaviour.failCreations--;
    const held = this.behaviour.holdCreations;
    const nsid = this.#model.nextNsid++;
    const volume: SimVolume = {
      uuid: crypto.randomUUID(),
      name: wish.name,
      project: wish.project,
      state: "Creating",
      protection: "Unknown",
      replicaCount,
      sizeBytes,
      // LightOS' own answer to an absent list is not known; nobody is the safe one.
      acl: this.#checkAcl(action, wish.acl ?? ["ALLOW_NONE"]),
      ipAcl: checkIpAcl(action, wish.ipAcl ?? ["ALLOW_ANY"]),
      compression: parseCompression(action, wish.compression) ?? false,
      etag: this.#newEtag(undefined),
      nsid,
      sectorSizeBytes: wish.sectorSizeBytes === 0 ? 4096 : wish.sectorSizeBytes,
      labels: [...labels],
      nodeUuids: this.#placement(nsid, replicaCount),
      createdAtMs: Date.now(),
      ...(source === undefined ? {} : { sourceSnapshotUuid: source.uuid, sourceSnapshotName: source.name }),
      ...(policy === undefined ? {} : { qosPolicyUuid: policy.uuid }),
      ...(doomed ? { doomed } : {}),
      ...(held ? { held } : { dueAtMs: Date.now() + this.behaviour.creationMs }),
    };
    this.#volumes.put(volume);
    this.#touchSource(source?.sourceVolumeUuid);
    this.#save();
    const created = this.#makeContent(volume);
    if (this.behaviour.creationMs === 0 && !held) {
      await created;
      await this.#finishVolume(volume);
    } else {
      this.#resumeVolume(volume);
    }
    return volume;
  }

  #checkNameIsFree(action: string, { project, name }: SimulatedVolumeRequest): void {
    const namesake = this.#liveVolume(project, name);
    if (namesake === undefined) return;
    throw new StatusError("ALREADY_EXISTS", `Cannot ${action}: volume ${namesake.uuid} has this name`);
  }

  /** The volume, or NOT_FOUND. By name a live volume comes first, then a Deleting one, then a Failed one. */
  getVolume(ref: ObjectRef): SimVolume {
    const action = `get volume ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    return this.#findVolume(action, ref);
  }

  /** One page, ordered by UUID, without Deleting ones unless `showAll`. */
  listVolumes(wish: ListRequest): SimVolume[] {
    if (wish.project !== undefined) this.#checkProject("list volumes", wish.project);
    return page(
      candidates(this.#volumes, wish).filter((volume) =>
        (wish.showAll === true || volume.state !== "Deleting") &&
        (!wish.snapshotUuid || volume.sourceSnapshotUuid === wish.snapshotUuid) &&
        (!wish.failureDomain || this.identity.servers.some((server) =>
          server.name === wish.failureDomain && volume.nodeUuids.includes(server.nodeUuid)
        ))
      ),
      wish,
    );
  }

  /**
   * Changes a volume.
   *
   * @param ifMatch the ETag that the caller has seen, or undefined to change it in any case
   * @throws StatusError FAILED_PRECONDITION for another ETag, UNAVAILABLE while the volume is Creating, Updating or in
   *   Rollback, FAILED_PRECONDITION when it is Deleting or Failed, INVALID_ARGUMENT when the change is impossible
   */
  async updateVolume(ref: ObjectRef, change: VolumeChange, ifMatch: string | undefined): Promise<void> {
    const action = `update volume ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    const volume = this.#findVolume(action, ref);
    checkEtag(action, volume.etag, ifMatch);
    checkIdle(action, "volume", volume.state, this.behaviour.asDocumented ? "INVALID_ARGUMENT" : "FAILED_PRECONDITION");
    const sizeBytes = change.size ? this.#parseSize(action, change.size) : volume.sizeBytes;
    if (sizeBytes < volume.sizeBytes && change.force !== true) {
      throw invalid(action, `size ${sizeBytes} is below the current ${volume.sizeBytes} bytes`);
    }
    if (sizeBytes > volume.sizeBytes) {
      this.#checkSpace(action, (sizeBytes - volume.sizeBytes) * BigInt(volume.replicaCount));
    }
    const acl = change.acl === undefined ? volume.acl : this.#checkAcl(action, change.acl);
    const ipAcl = change.ipAcl === undefined ? volume.ipAcl : checkIpAcl(action, change.ipAcl);
    const labels = change.labels === undefined ? volume.labels : checkLabels(action, change.labels);
    const compression = parseCompression(action, change.compression ?? "") ?? volume.compression;
    const policy = change.qosPolicy === undefined
      ? undefined
      : this.#policyFor(action, volume.project, change.qosPolicy);
    if (change.newName) {
      checkName(action, change.newName);
      const namesake = this.#liveVolume(volume.project, change.newName);
      if (namesake !== undefined && namesake !== volume) {
        throw new StatusError("ALREADY_EXISTS", `Cannot ${action}: "${change.newName}" is volume ${namesake.uuid}`);
      }
      volume.name = change.newName;
    }
    const resized = sizeBytes !== volume.sizeBytes;
    Object.assign(volume, { sizeBytes, acl, ipAcl, labels, compression });
    if (policy !== undefined) volume.qosPolicyUuid = policy.uuid;
    if (this.behaviour.updateMs > 0) {
      volume.state = "Updating";
      volume.dueAtMs = Date.now() + this.behaviour.updateMs;
    }
    this.#touch(volume);
    if (resized) await this.dataPlane.resizeVolume(volume.uuid, sizeBytes);
    if (volume.state === "Updating") this.#resumeVolume(volume);
    else this.#show(volume);
  }

  /**
   * Starts the deletion of a volume, whoever is connected to it; its snapshots live on.
   *
   * @throws StatusError NOT_FOUND, UNAVAILABLE while it is Creating, Updating or in Rollback, INVALID_ARGUMENT when it
   *   is Deleting or Failed
   */
  deleteVolume(ref: ObjectRef, ifMatch: string | undefined): void {
    const action = `delete volume ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    const volume = this.#findVolume(action, ref);
    checkEtag(action, volume.etag, ifMatch);
    checkIdle(action, "volume", volume.state);
    volume.state = "Deleting";
    volume.dueAtMs = Date.now() + this.behaviour.deletionMs;
    this.#touch(volume);
    this.#resumeVolume(volume);
  }

  /** Gives a volume the content and the size of one of its snapshots. */
  rollbackVolume(ref: ObjectRef, snapshotRef: { readonly uuid: string; readonly name: string }): void {
    const action = `roll back volume ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    const volume = this.#findVolume(action, ref);
    // Unlike the other calls, this one is documented to answer 503 for a Deleting volume (docs/reference/lightos-api.md 15.1).
    if (volume.state === "Deleting") throw new StatusError("UNAVAILABLE", `Cannot ${action}: it is Deleting`);
    checkIdle(action, "volume", volume.state);
    const snapshot = this.#findSnapshot(action, { ...snapshotRef, project: ref.project });
    if (snapshot.sourceVolumeUuid !== volume.uuid) {
      throw invalid(action, `snapshot ${snapshot.uuid} is of volume ${snapshot.sourceVolumeUuid}`);
    }
    if (snapshot.state !== "Available") {
      throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: snapshot ${snapshot.uuid} is ${snapshot.state}`);
    }
    volume.state = "Rollback";
    volume.rollbackTo = snapshot.uuid;
    volume.dueAtMs = Date.now() + this.behaviour.rollbackMs;
    this.#touch(volume);
    this.#resumeVolume(volume);
  }

  // ------------------------------------------------------------------------------------------------------ snapshots

  /**
   * Takes a snapshot: its content is the volume's at the time of the call, its state becomes Available later.
   *
   * @throws StatusError FAILED_PRECONDITION while the source is neither Available nor Migrating. A name that a Deleting
   *   snapshot still has is accepted, and the new snapshot ends as Failed (docs/reference/lightos-api.md 6.7)
   */
  async createSnapshot(wish: SimulatedSnapshotRequest): Promise<SimSnapshot> {
    const action = `create snapshot "${wish.name}"`;
    this.#checkProject(action, wish.project);
    checkName(action, wish.name);
    const namesakes = this.#snapshots.named(wish.project, wish.name);
    const living = namesakes.find((other) => other.state === "Available" || other.state === "Creating");
    if (living !== undefined) {
      throw new StatusError("ALREADY_EXISTS", `Cannot ${action}: snapshot ${living.uuid} has this name`);
    }
    const volume = this.#findVolume(action, { ...wish.source, project: wish.project });
    if (volume.state !== "Available" && volume.state !== "Migrating") {
      throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: volume ${volume.uuid} is ${volume.state}`);
    }
    const doomed = this.behaviour.failCreations > 0 || namesakes.some((other) => other.state === "Deleting");
    if (this.behaviour.failCreations > 0) this.behaviour.failCreations--;
    const held = this.behaviour.holdCreations;
    const snapshot: SimSnapshot = {
      uuid: crypto.randomUUID(),
      name: wish.name,
      project: wish.project,
      state: "Creating",
      description: wish.description,
      sourceVolumeUuid: volume.uuid,
      sourceVolumeName: volume.name,
      replicaCount: volume.replicaCount,
      sizeBytes: volume.sizeBytes,
      compression: volume.compression,
      sectorSizeBytes: volume.sectorSizeBytes,
      etag: this.#newEtag(undefined),
      nsid: this.#model.nextNsid++,
      labels: [...volume.labels],
      nodeUuids: [...volume.nodeUuids],
      createdAtMs: Date.now(),
      ...(wish.retentionMs ? { expiresAtMs: Date.now() + wish.retentionMs } : {}),
      ...(doomed ? { doomed } : {}),
    };
    this.#snapshots.put(snapshot);
    this.#touchSource(volume.uuid);
    this.#save();
    // The content is taken before the answer: what the caller writes afterwards is not part of the snapshot.
    try {
      await this.dataPlane.createSnapshot(snapshot.uuid, volume.uuid);
    } catch (error) {
      this.#log.warning("could not copy a volume", { volume: volume.uuid, error: messageOf(error) });
      snapshot.doomed = true;
    }
    if (held) snapshot.held = true;
    else snapshot.dueAtMs = Date.now() + this.behaviour.creationMs;
    if (this.behaviour.creationMs === 0 && !held) this.#finishSnapshot(snapshot);
    else await this.#resumeSnapshot(snapshot);
    this.#save();
    return snapshot;
  }

  getSnapshot(ref: ObjectRef): SimSnapshot {
    const action = `get snapshot ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    return this.#findSnapshot(action, ref);
  }

  listSnapshots(wish: ListRequest): SimSnapshot[] {
    if (wish.project !== undefined) this.#checkProject("list snapshots", wish.project);
    return page(
      candidates(this.#snapshots, wish).filter((snapshot) => wish.showAll === true || snapshot.state !== "Deleting"),
      wish,
    );
  }

  /** Starts the deletion of a snapshot; clones of it live on. */
  deleteSnapshot(ref: ObjectRef): void {
    const action = `delete snapshot ${refText(ref)}`;
    this.#checkProject(action, ref.project);
    const snapshot = this.#findSnapshot(action, ref);
    if (snapshot.state === "Creating") throw new StatusError("UNAVAILABLE", `Cannot ${action}: it is Creating`);
    if (snapshot.state !== "Available") throw invalid(action, `it is ${snapshot.state}`);
    this.#startSnapshotDeletion(snapshot);
  }

  /** Blocks that changed between two snapshots of one volume, or since the volume was blank. */
  changedBlocks(
    project: string,
    ref: { readonly uuid: string; readonly name: string },
    base: { readonly uuid: string; readonly name: string } | undefined,
  ): { readonly snapshot: SimSnapshot; readonly base: SimSnapshot | undefined } {
    const action = `list changed blocks of snapshot ${refText(ref)}`;
    this.#checkProject(action, project);
    const usable = (ref: { readonly uuid: string; readonly name: string }) => {
      const snapshot = this.#findSnapshot(action, { ...ref, project });
      if (snapshot.state === "Available") return snapshot;
      throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${snapshot.uuid} is ${snapshot.state}`);
    };
    const snapshot = usable(ref);
    const from = base === undefined ? undefined : usable(base);
    if (from !== undefined && from.sourceVolumeUuid !== snapshot.sourceVolumeUuid) {
      throw invalid(action, `base ${from.uuid} is of another volume`);
    }
    if (from !== undefined && from.createdAtMs > snapshot.createdAtMs) {
      throw invalid(action, `base ${from.uuid} is newer`);
    }
    return { snapshot, base: from };
  }

  // --------------------------------------------------------------------------------- projects, policies, hosts, rest

  listProjects(): readonly SimProject[] {
    return this.#model.projects;
  }

  hasProject(name: string): boolean {
    return this.#model.projects.some((project) => project.name === name);
  }

  /** Adds a project. Present already: nothing. @throws StatusError INVALID_ARGUMENT for a bad name */
  addProject(name: string, description = ""): void {
    if (this.hasProject(name)) return;
    this.#addProject(name, description);
    this.#save();
  }

  listPolicies(project: string | undefined): SimPolicy[] {
    return this.#model.policies.filter((policy) =>
      project === undefined || policy.projects === undefined || policy.projects.includes(project)
    );
  }

  /** Adds a QoS policy, or replaces the one of that name. */
  addPolicy(policy: Omit<SimPolicy, "uuid">): SimPolicy {
    checkName(`create policy "${policy.name}"`, policy.name);
    const at = this.#model.policies.findIndex((other) => other.name === policy.name);
    const stored = { ...policy, uuid: this.#model.policies[at]?.uuid ?? crypto.randomUUID() };
    if (at >= 0) this.#model.policies[at] = stored;
    else this.#model.policies.push(stored);
    this.#save();
    return stored;
  }

  /** Features by name; whether each is on. */
  get features(): Readonly<Record<string, boolean>> {
    return this.#model.features;
  }

  setFeature(name: string, enabled: boolean): void {
    this.#model.features[name] = enabled;
    this.#save();
  }

  get inBandAuthentication(): boolean {
    return this.#model.inBandAuthentication;
  }

  setInBandAuthentication(enabled: boolean): void {
    this.#model.inBandAuthentication = enabled;
    this.setFeature("in-band-authentication", enabled);
    this.#tellKeys();
  }

  get trustedHosts(): readonly SimTrustedHost[] {
    return this.#model.trustedHosts;
  }

  /** Adds or replaces; keyed by project and name. */
  putTrustedHost(host: SimTrustedHost): void {
    this.#checkProject(`store trusted host "${host.name}"`, host.project);
    this.removeTrustedHost(host.project, host.name);
    this.#model.trustedHosts.push(host);
    this.#tellKeys();
    this.#save();
  }

  removeTrustedHost(project: string, name: string): boolean {
    const at = this.#model.trustedHosts.findIndex((host) => host.project === project && host.name === name);
    if (at < 0) return false;
    this.#model.trustedHosts.splice(at, 1);
    this.#tellKeys();
    this.#save();
    return true;
  }

  /** The most replicas that a volume can have with the servers there are. */
  get maxReplicas(): number {
    return Math.min(3, this.identity.servers.length);
  }

  /** Bytes reserved by volumes and their replicas. */
  get reservedBytes(): bigint {
    return this.#volumes.reservedBytes;
  }

  get freeBytes(): bigint {
    const free = this.capacityBytes - this.reservedBytes;
    return free < 0n ? 0n : free;
  }

  /** Every volume and snapshot, dead ones included. */
  get volumes(): readonly SimVolume[] {
    return [...this.#volumes.values()];
  }

  get snapshots(): readonly SimSnapshot[] {
    return [...this.#snapshots.values()];
  }

  /** UUIDs of the volumes that a host may reach now. */
  visibleTo(hostNqn: string): string[] {
    return this.volumes.filter((volume) => isServed(volume) && mayAccess(effectiveAcl(volume), hostNqn)).map((
      { uuid },
    ) => uuid);
  }

  /** Connected hosts that a volume's access list admits. */
  hostsOf(volume: SimVolume): string[] {
    if (!isServed(volume)) return [];
    return this.dataPlane.connectedHosts().map(({ hostNqn }) => hostNqn).filter((nqn) =>
      mayAccess(effectiveAcl(volume), nqn)
    );
  }

  /** The name of a volume's QoS policy; empty when it has none. */
  policyName(volume: SimVolume): string {
    return this.#model.policies.find(({ uuid }) => uuid === volume.qosPolicyUuid)?.name ?? "";
  }

  // -------------------------------------------------------------------------------------------- what only tests need

  /** Lets creations that are held go on, and holds no more. */
  releaseCreations(): void {
    this.behaviour.holdCreations = false;
    for (const volume of this.#volumes.values()) {
      if (volume.held !== true) continue;
      delete volume.held;
      volume.dueAtMs = Date.now();
      this.#resumeVolume(volume);
    }
    for (const snapshot of this.#snapshots.values()) {
      if (snapshot.held !== true) continue;
      delete snapshot.held;
      snapshot.dueAtMs = Date.now();
      void this.#resumeSnapshot(snapshot);
    }
    this.#save();
  }

  /** Puts a volume into a state that it then keeps. @throws StatusError NOT_FOUND */
  setVolume(uuid: string, to: { readonly state?: VolumeState; readonly protection?: Protection }): void {
    const volume = this.#volumes.get(uuid);
    if (volume === undefined) throw new StatusError("NOT_FOUND", `Cannot set volume ${uuid}: it does not exist`);
    this.#stopTimer(uuid);
    delete volume.dueAtMs;
    if (to.state !== undefined) volume.state = to.state;
    if (to.protection !== undefined) volume.protection = to.protection;
    this.#touch(volume);
    this.#show(volume);
  }

  /** Forgets every volume, snapshot, policy and trusted host, as a cluster that was installed anew. */
  async forget(): Promise<void> {
    this.pause();
    this.#volumes.clear();
    this.#snapshots.clear();
    const { revision } = this.#model;
    this.#model = { ...emptyModel(), revision };
    for (const name of this.#initialProjects) this.#addProject(name, "");
    this.#tellKeys();
    await this.dataPlane.clear();
    this.#save();
  }

  /** Stops the clock: nothing changes by itself until `resume`. */
  pause(): void {
    for (const uuid of [...this.#timers.keys()]) this.#stopTimer(uuid);
  }

  /** Goes on with everything that is half done. */
  async resume(): Promise<void> {
    for (const snapshot of this.#snapshots.values()) await this.#resumeSnapshot(snapshot);
    for (const volume of this.#volumes.values()) this.#resumeVolume(volume);
  }

  /** The model as JSON would hold it; sizes as decimal text. */
  dump(): unknown {
    return JSON.parse(this.#text());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true;
    this.pause();
    while (this.#work.size > 0) await Promise.allSettled(this.#work);
  }

  // ---------------------------------------------------------------------------------------------------------- inside

  #findVolume(action: string, ref: ObjectRef): SimVolume {
    if (ref.uuid) {
      const found = this.#volumes.get(ref.uuid.toLowerCase());
      if (found?.project === ref.project) return found;
    } else if (ref.name) {
      const namesakes = this.#volumes.named(ref.project, ref.name);
      const rank = ({ state }: SimVolume) => state === "Failed" ? 2 : state === "Deleting" ? 1 : 0;
      const order = this.behaviour.nameShowsDead ? [1, 2, 0] : [0, 1, 2];
      for (const wanted of order) {
        const found = namesakes.find((volume) => rank(volume) === wanted);
        if (found !== undefined) return found;
      }
    } else {
      throw invalid(action, "neither UUID nor name is given");
    }
    throw new StatusError("NOT_FOUND", `Cannot ${action}: there is no such volume in project "${ref.project}"`);
  }

  #findSnapshot(action: string, ref: ObjectRef): SimSnapshot {
    if (!ref.uuid && !ref.name) throw invalid(action, "neither UUID nor name is given");
    const found = this.#snapshotLike(ref.project, ref.uuid ?? "", ref.name ?? "");
    if (found !== undefined) return found;
    throw new StatusError("NOT_FOUND", `Cannot ${action}: there is no such snapshot in project "${ref.project}"`);
  }

  /** By UUID, or without one by name: a live one first. */
  #snapshotLike(project: string, uuid: string, name: string): SimSnapshot | undefined {
    if (uuid !== "") {
      const found = this.#snapshots.get(uuid.toLowerCase());
      return found?.project === project ? found : undefined;
    }
    const namesakes = this.#snapshots.named(project, name);
    return namesakes.find(({ state }) => state === "Available" || state === "Creating") ?? namesakes[0];
  }

  #liveVolume(project: string, name: string): SimVolume | undefined {
    return this.#volumes.named(project, name).find(({ state }) => state !== "Deleting" && state !== "Failed");
  }

  #sourceSnapshot(action: string, wish: SimulatedVolumeRequest): SimSnapshot | undefined {
    const { uuid, name } = wish.sourceSnapshot;
    if (uuid === "" && name === "") return undefined;
    const snapshot = this.#snapshotLike(wish.project, uuid, name);
    // CreateVolume has no documented 404: an unknown source is a bad argument.
    if (snapshot === undefined) throw invalid(action, `there is no snapshot "${uuid || name}"`);
    if (snapshot.state === "Available") return snapshot;
    if (snapshot.state === "Creating") {
      throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: snapshot ${snapshot.uuid} is Creating`);
    }
    throw invalid(action, `snapshot ${snapshot.uuid} is ${snapshot.state}`);
  }

  #policyFor(
    action: string,
    project: string,
    { uuid, name }: { readonly uuid: string; readonly name: string },
  ): SimPolicy | undefined {
    if (uuid === "" && name === "") return undefined;
    const policy = this.listPolicies(project).find((other) => uuid !== "" ? other.uuid === uuid : other.name === name);
    if (policy === undefined) {
      throw invalid(action, `there is no QoS policy "${uuid || name}" for project "${project}"`);
    }
    return policy;
  }

  #checkProject(action: string, project: string): void {
    if (project === "") throw invalid(action, "no project is given");
    if (this.hasProject(project)) return;
    throw new StatusError("PERMISSION_DENIED", `Cannot ${action}: there is no project "${project}" for this token`);
  }

  #checkReplicas(action: string, count: number): number {
    if (count >= 1 && count <= this.maxReplicas) return count;
    throw invalid(action, `replica count ${count} is not between 1 and ${this.maxReplicas}`);
  }

  #checkSpace(action: string, moreBytes: bigint): void {
    if (moreBytes <= this.freeBytes) return;
    throw new StatusError(
      "RESOURCE_EXHAUSTED",
      `Cannot ${action}: it needs ${moreBytes} bytes with its replicas, ${this.freeBytes} are free`,
    );
  }

  #placement(nsid: number, replicaCount: number): string[] {
    const { servers } = this.identity;
    const nodes: string[] = [];
    for (let replica = 0; replica < replicaCount; replica++) {
      const server = servers[(nsid + replica) % servers.length];
      if (server !== undefined) nodes.push(server.nodeUuid);
    }
    return nodes;
  }

  #addProject(name: string, description: string): void {
    if (!isProjectName(name)) throw invalid(`create project "${name}"`, "it is not a project name");
    this.#model.projects.push({ uuid: crypto.randomUUID(), name, description });
  }

  /** The content is made at once and may be ready long before the state says so. */
  #makeContent(volume: SimVolume): Promise<void> {
    return this.dataPlane.createVolume(volume.uuid, volume.sizeBytes, volume.sourceSnapshotUuid).catch((error) => {
      this.#log.warning("could not make the content of a volume", { volume: volume.uuid, error: messageOf(error) });
      volume.doomed = true;
    });
  }

  #resumeVolume(volume: SimVolume): void {
    if (isServed(volume)) this.#show(volume);
    else this.dataPlane.hide(volume.uuid);
    if (volume.dueAtMs !== undefined) this.#at(volume.uuid, volume.dueAtMs, () => this.#finishVolume(volume));
  }

  async #finishVolume(volume: SimVolume): Promise<void> {
    switch (volume.state) {
      case "Creating":
        await this.#makeContent(volume);
        if (this.#volumes.get(volume.uuid) !== volume) return;
        volume.state = volume.doomed === true ? "Failed" : "Available";
        volume.protection = volume.doomed === true ? "NotAvailable" : "FullyProtected";
        if (volume.doomed === true) await this.dataPlane.deleteVolume(volume.uuid);
        break;
      case "Rollback": {
        const snapshot = this.#snapshots.get(volume.rollbackTo ?? "");
        if (snapshot !== undefined) {
          await this.dataPlane.rollbackVolume(volume.uuid, snapshot.uuid, snapshot.sizeBytes);
          volume.sizeBytes = snapshot.sizeBytes;
        }
        delete volume.rollbackTo;
        volume.state = "Available";
        break;
      }
      case "Updating":
        volume.state = "Available";
        break;
      case "Deleting":
        await this.dataPlane.deleteVolume(volume.uuid);
        if (this.#volumes.get(volume.uuid) === volume) this.#volumes.delete(volume);
        this.#releaseSnapshotsOf(volume);
        this.#save();
        return;
    }
    delete volume.dueAtMs;
    delete volume.doomed;
    if (this.#volumes.get(volume.uuid) !== volume) return;
    this.#touch(volume);
    if (isServed(volume)) this.#show(volume);
  }

  async #resumeSnapshot(snapshot: SimSnapshot): Promise<void> {
    if (snapshot.state === "Creating" && !await this.dataPlane.hasSnapshot(snapshot.uuid)) {
      // The simulator ended while it copied; a later copy would not be the content at the time of the call.
      snapshot.doomed = true;
      snapshot.dueAtMs ??= Date.now();
    }
    if (snapshot.dueAtMs !== undefined) {
      this.#at(snapshot.uuid, snapshot.dueAtMs, () => this.#finishSnapshot(snapshot));
    } else if (snapshot.expiresAtMs !== undefined && snapshot.state === "Available") {
      this.#at(snapshot.uuid, snapshot.expiresAtMs, () => this.#startSnapshotDeletion(snapshot));
    }
  }

  #finishSnapshot(snapshot: SimSnapshot): Promise<void> | void {
    delete snapshot.dueAtMs;
    if (snapshot.state === "Creating") {
      snapshot.state = snapshot.doomed === true ? "Failed" : "Available";
      delete snapshot.doomed;
      this.#touch(snapshot);
      if (snapshot.state === "Failed") return this.dataPlane.deleteSnapshot(snapshot.uuid);
      return this.#resumeSnapshot(snapshot);
    }
    if (snapshot.state !== "Deleting") return;
    if (this.behaviour.snapshotWaitsForClones && this.#clonesOf(snapshot) > 0) return this.#save();
    return this.dataPlane.deleteSnapshot(snapshot.uuid).then(() => {
      this.#snapshots.delete(snapshot);
      this.#save();
    });
  }

  #startSnapshotDeletion(snapshot: SimSnapshot): void {
    snapshot.state = "Deleting";
    snapshot.dueAtMs = Date.now() + this.behaviour.deletionMs;
    this.#touch(snapshot);
    this.#at(snapshot.uuid, snapshot.dueAtMs, () => this.#finishSnapshot(snapshot));
  }

  #clonesOf(snapshot: SimSnapshot): number {
    return this.#volumes.madeFrom(snapshot.uuid).filter(({ state }) => state !== "Failed").length;
  }

  #releaseSnapshotsOf(volume: SimVolume): void {
    const snapshot = this.#snapshots.get(volume.sourceSnapshotUuid ?? "");
    if (snapshot?.state === "Deleting" && snapshot.dueAtMs === undefined && this.#clonesOf(snapshot) === 0) {
      this.#at(snapshot.uuid, Date.now(), () => this.#finishSnapshot(snapshot));
    }
  }

  #show(volume: SimVolume): void {
    if (!isServed(volume)) return this.dataPlane.hide(volume.uuid);
    const { uuid, nsid, sizeBytes, sectorSizeBytes } = volume;
    const { subsystemNqn } = this.identity;
    this.dataPlane.expose({ uuid, subsystemNqn, nsid, sizeBytes, sectorSizeBytes, acl: [...effectiveAcl(volume)] });
  }

  /** A host connects to the whole cluster: of trusted hosts of one NQN in several projects the last one counts. */
  #tellKeys(): void {
    const withSecrets = this.trustedHosts.filter(({ hostSecret }) => hostSecret !== "");
    this.dataPlane.authenticate?.(
      this.inBandAuthentication
        ? new Map(withSecrets.map((host) => [host.hostNqn, { host: host.hostSecret, target: host.targetSecret }]))
        : undefined,
    );
  }

  #at(uuid: string, dueAtMs: number, step: () => Promise<void> | void): void {
    this.#stopTimer(uuid);
    if (this.#closed) return;
    const leftMs = Math.max(0, dueAtMs - Date.now());
    const timer = setTimeout(() => {
      if (leftMs > longestTimerMs) return this.#at(uuid, dueAtMs, step);
      this.#timers.delete(uuid);
      const work: Promise<void> = (async () => await step())()
        .catch((error) => this.#log.error("could not finish a change", { volume: uuid, error: messageOf(error) }))
        .finally(() => this.#work.delete(work));
      this.#work.add(work);
    }, Math.min(leftMs, longestTimerMs));
    this.#timers.set(uuid, timer);
  }

  #stopTimer(uuid: string): void {
    clearTimeout(this.#timers.get(uuid));
    this.#timers.delete(uuid);
  }

  /** The ETag after `last`; that of a new object without one. */
  #newEtag(last: string | undefined): string {
    this.#model.revision++;
    // A volume's own changes are counted, so new volumes have equal ones.
    return String(this.behaviour.asDocumented ? this.#model.revision : Number(last ?? "0") + 1);
  }

  #touch(object: SimVolume | SimSnapshot): void {
    object.etag = this.#newEtag(object.etag);
    if ("sourceVolumeUuid" in object) this.#snapshots.put(object);
    else this.#volumes.put(object);
    this.#save();
  }

  /** A snapshot or clone was made of this volume. */
  #touchSource(volumeUuid: string | undefined): void {
    const volume = this.#volumes.get(volumeUuid ?? "");
    if (volume !== undefined && !this.behaviour.asDocumented) this.#touch(volume);
  }

  #parseSize(action: string, text: string): bigint {
    const bytes = parseSize(action, text);
    const rest = bytes % sizeStep;
    if (rest === 0n) return bytes;
    if (this.behaviour.asDocumented) throw invalid(action, `size "${text}" is not a multiple of ${sizeStep} bytes`);
    return bytes + sizeStep - rest;
  }

  #checkAcl(action: string, acl: readonly string[]): string[] {
    for (const entry of acl) {
      const special = entry === "ALLOW_NONE" || entry === "ALLOW_ANY";
      if (special && acl.length > 1) throw invalid(action, `${entry} is not alone in the ACL`);
      const isAllowed = this.behaviour.asDocumented ? /^nqn\.[\x21-\x7e]{1,219}$/.test(entry) : entry !== "";
      if (!special && !isAllowed) throw invalid(action, `"${entry}" is not a host NQN`);
    }
    if (new Set(acl).size < acl.length) throw invalid(action, "the ACL holds an entry twice");
    return [...acl];
  }

  #text(): string {
    return stateText({ ...this.#model, volumes: this.volumes, snapshots: this.snapshots });
  }

  #save(): void {
    if (this.#file !== undefined) writeState(this.#file, this.#text());
  }
}

/** Whether hosts can reach the volume in its present state. */
function isServed({ state, protection }: SimVolume): boolean {
  return (state === "Available" || state === "Updating" || state === "Migrating") && protection !== "NotAvailable";
}

/** The access list by NQN, if the one by IP address admits the hosts, which all connect from this machine. */
function effectiveAcl({ acl, ipAcl }: SimVolume): readonly string[] {
  return ipAcl.includes("ALLOW_ANY") || ipAcl.includes("127.0.0.1") ? acl : [];
}

function emptyModel(): ClusterModel {
  return {
    format: 1,
    revision: 0,
    nextNsid: 1,
    projects: [],
    volumes: [],
    snapshots: [],
    policies: [],
    trustedHosts: [],
    features: Object.fromEntries(featureNames.map((name) => [name, false])),
    inBandAuthentication: false,
  };
}

function invalid(action: string, problem: string): StatusError {
  return new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${problem}`);
}

function refText({ uuid, name }: { readonly uuid?: string; readonly name?: string }): string {
  return uuid ? uuid : `"${name ?? ""}"`;
}

function checkName(action: string, name: string): void {
  if (!/^[A-Za-z0-9_.-]{1,253}$/.test(name)) {
    throw invalid(action, `"${name}" is not a name of 1 to 253 letters, digits, "-", "_" and "."`);
  }
}

function checkEtag(action: string, etag: string, ifMatch: string | undefined): void {
  if (ifMatch === undefined || ifMatch === etag) return;
  throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: its ETag is ${etag}, not ${ifMatch}`);
}

/** UNAVAILABLE for a state that passes, `dead` for one that does not. */
function checkIdle(
  action: string,
  what: string,
  state: VolumeState,
  dead: "INVALID_ARGUMENT" | "FAILED_PRECONDITION" = "INVALID_ARGUMENT",
): void {
  if (state === "Available" || state === "Migrating") return;
  if (state === "Deleting" || state === "Failed") {
    throw new StatusError(dead, `Cannot ${action}: the ${what} is ${state}`);
  }
  throw new StatusError("UNAVAILABLE", `Cannot ${action}: the ${what} is ${state}`);
}

const sizeUnits: Readonly<Record<string, bigint>> = {
  "": 1n,
  b: 1n,
  kib: 1n << 10n,
  mib: 1n << 20n,
  gib: 1n << 30n,
  tib: 1n << 40n,
  pib: 1n << 50n,
};

/** Sizes are multiples of this. */
const sizeStep = 4096n;

/** Bytes in a size text: `10737418240b`, `10737418240`, `5 gib` (docs/reference/lightos-api.md 6.5 and 14). */
export function parseSize(action: string, text: string): bigint {
  const match = /^(\d{1,20})\s*([a-z]*)$/i.exec(text.trim());
  const unit = sizeUnits[(match?.[2] ?? "?").toLowerCase()];
  if (match === null || unit === undefined) throw invalid(action, `size "${text}" is not a number of bytes`);
  const bytes = BigInt(match[1] ?? "0") * unit;
  if (bytes === 0n) throw invalid(action, `size "${text}" is zero`);
  if (bytes >= 1n << 63n) throw invalid(action, `size "${text}" is out of range`);
  return bytes;
}

function parseCompression(action: string, text: string): boolean | undefined {
  switch (text.toLowerCase()) {
    case "":
      return undefined;
    case "true":
      return true;
    case "false":
      return false;
    default:
      throw invalid(action, `compression "${text}" is neither "true" nor "false"`);
  }
}

function checkIpAcl(action: string, acl: readonly string[]): string[] {
  for (const entry of acl) {
    if (entry === "ALLOW_NONE" || entry === "ALLOW_ANY" || /^[0-9a-fA-F.:/]+$/.test(entry)) continue;
    throw invalid(action, `"${entry}" is not an IP address`);
  }
  return [...acl];
}

function checkLabels(
  action: string,
  labels: readonly { readonly key: string; readonly value: string }[],
): { key: string; value: string }[] {
  if (labels.length > 16) throw invalid(action, `${labels.length} labels are given, 16 are allowed`);
  for (const { key, value } of labels) {
    for (const text of [key, value]) {
      if (!/^[A-Za-z0-9_.-]{1,253}$/.test(text)) throw invalid(action, `"${text}" is not part of a label`);
    }
  }
  return labels.map(({ key, value }) => ({ key, value }));
}

/** Those that a list with this name or UUID can hold. */
function candidates<T extends { readonly uuid: string; readonly name: string; readonly project: string }>(
  index: ObjectIndex<T>,
  wish: ListRequest,
): readonly T[] {
  if (wish.uuid) {
    const found = index.get(wish.uuid.toLowerCase());
    return found === undefined ? [] : [found];
  }
  if (wish.name && wish.project !== undefined) return index.named(wish.project, wish.name);
  return [...index.values()];
}

function page<T extends { readonly uuid: string; readonly name: string; readonly project: string }>(
  all: readonly T[],
  wish: ListRequest,
): T[] {
  const limit = wish.limit ? wish.limit : longestPage;
  if (limit < 0 || limit > longestPage) throw invalid("list", `limit ${limit} is not between 1 and ${longestPage}`);
  return all
    .filter(({ uuid, name, project }) =>
      (wish.project === undefined || project === wish.project) &&
      (!wish.uuid || uuid === wish.uuid.toLowerCase()) &&
      (!wish.name || name === wish.name) &&
      (!wish.offsetUuid || uuid > wish.offsetUuid.toLowerCase())
    )
    .sort((a, b) => a.uuid < b.uuid ? -1 : 1)
    .slice(0, limit);
}

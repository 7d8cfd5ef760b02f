/** What a simulated cluster holds: the model, indexes over its volumes and snapshots, and the file that remembers it. */
import type { Logger } from "../../log.ts";
import type { DataPlane } from "../data_plane/data_plane.ts";
import { stateText, writeState } from "../state_file.ts";
import type { Action } from "./action.ts";
import type { Behaviour } from "./behaviour.ts";
import {
  type ClusterIdentity,
  type ClusterModel,
  emptyModel,
  policiesOf,
  type SimPolicy,
  type SimSnapshot,
  type SimVolume,
} from "./model.ts";
import { ObjectIndex } from "./object_index.ts";
import { StateTimers } from "./state_timers.ts";

/** Names an object: by UUID, or by name when the UUID is empty. */
export interface ObjectRef {
  readonly project: string;
  readonly uuid?: string;
  readonly name?: string;
}

/** Names an object in the project of the call. */
export interface LocalRef {
  readonly uuid: string;
  readonly name: string;
}

/** How an object is named in errors. */
export function refText({ uuid, name }: Partial<LocalRef>): string {
  return uuid ? uuid : `"${name ?? ""}"`;
}

export interface StoreOptions {
  readonly identity: ClusterIdentity;
  readonly capacityBytes: bigint;
  readonly behaviour: Behaviour;
  readonly dataPlane: DataPlane;
  readonly log: Logger;
  /** File that remembers the model; undefined: memory only. */
  readonly file: string | undefined;
}

/** The state that volumes, snapshots and the rest of the cluster share. */
export class ClusterStore {
  readonly identity: ClusterIdentity;
  readonly capacityBytes: bigint;
  readonly behaviour: Behaviour;
  readonly dataPlane: DataPlane;
  readonly log: Logger;
  readonly timers: StateTimers;
  readonly volumes = new ObjectIndex<SimVolume>({
    source: ({ sourceSnapshotUuid }) => sourceSnapshotUuid,
    bytes: ({ state, sizeBytes, replicaCount }) => state === "Failed" ? 0n : sizeBytes * BigInt(replicaCount),
  });
  readonly snapshots = new ObjectIndex<SimSnapshot>({
    source: ({ sourceVolumeUuid }) => sourceVolumeUuid,
    bytes: () => 0n,
  });
  readonly #file: string | undefined;
  #model: ClusterModel;

  constructor(options: StoreOptions, model: ClusterModel) {
    this.identity = options.identity;
    this.capacityBytes = options.capacityBytes;
    this.behaviour = { ...options.behaviour };
    this.dataPlane = options.dataPlane;
    this.log = options.log;
    this.timers = new StateTimers(options.log);
    this.#file = options.file;
    this.#model = model;
    for (const volume of model.volumes) this.volumes.put(volume);
    for (const snapshot of model.snapshots) this.snapshots.put(snapshot);
  }

  /** Projects, policies, trusted hosts and features. Volumes and snapshots in it are those of the last start. */
  get model(): ClusterModel {
    return this.#model;
  }

  /** Forgets everything but the revision, so that no ETag occurs twice. */
  reset(): void {
    this.volumes.clear();
    this.snapshots.clear();
    this.#model = { ...emptyModel(), revision: this.#model.revision };
  }

  // ------------------------------------------------------------------------------------------------------- look-ups

  /** Throws INVALID_ARGUMENT for no project, PERMISSION_DENIED for one that does not exist. */
  assertProject(action: Action, project: string): void {
    if (project === "") throw action.invalid("no project is given");
    if (this.#model.projects.some(({ name }) => name === project)) return;
    throw action.error("PERMISSION_DENIED", `there is no project "${project}" for this token`);
  }

  /** The volume, or NOT_FOUND. By name a live volume comes first, then a Deleting one, then a Failed one. */
  findVolume(action: Action, ref: ObjectRef): SimVolume {
    if (ref.uuid) {
      const found = this.volumes.get(ref.uuid.toLowerCase());
      if (found?.project === ref.project) return found;
    } else if (ref.name) {
      const namesakes = this.volumes.named(ref.project, ref.name);
      const rankOf = ({ state }: SimVolume) => state === "Failed" ? 2 : state === "Deleting" ? 1 : 0;
      for (const rank of this.behaviour.nameShowsDead ? [1, 2, 0] : [0, 1, 2]) {
        const found = namesakes.find((volume) => rankOf(volume) === rank);
        if (found !== undefined) return found;
      }
    } else {
      throw action.invalid("neither UUID nor name is given");
    }
    throw action.error("NOT_FOUND", `there is no such volume in project "${ref.project}"`);
  }

  /** The volume of this name that is neither Deleting nor Failed. */
  liveVolume(project: string, name: string): SimVolume | undefined {
    return this.volumes.named(project, name).find(({ state }) => state !== "Deleting" && state !== "Failed");
  }

  /** The snapshot, or NOT_FOUND. By name a live snapshot comes first. */
  findSnapshot(action: Action, ref: ObjectRef): SimSnapshot {
    if (!ref.uuid && !ref.name) throw action.invalid("neither UUID nor name is given");
    const found = this.snapshot(ref);
    if (found !== undefined) return found;
    throw action.error("NOT_FOUND", `there is no such snapshot in project "${ref.project}"`);
  }

  /** The snapshot, undefined when there is none. By name a live snapshot comes first. */
  snapshot({ project, uuid, name }: ObjectRef): SimSnapshot | undefined {
    if (uuid) {
      const found = this.snapshots.get(uuid.toLowerCase());
      return found?.project === project ? found : undefined;
    }
    const namesakes = this.snapshots.named(project, name ?? "");
    return namesakes.find(({ state }) => state === "Available" || state === "Creating") ?? namesakes[0];
  }

  /** The QoS policy that a volume of this project asks for; undefined for none. Throws INVALID_ARGUMENT. */
  findPolicy(action: Action, project: string, { uuid, name }: LocalRef): SimPolicy | undefined {
    if (uuid === "" && name === "") return undefined;
    const policies = policiesOf(this.#model, project);
    const policy = policies.find((other) => uuid !== "" ? other.uuid === uuid : other.name === name);
    if (policy !== undefined) return policy;
    throw action.invalid(`there is no QoS policy "${uuid || name}" for project "${project}"`);
  }

  // ---------------------------------------------------------------------------------------------------- space and NSID

  /** The largest replica count of a volume with the present servers. */
  get maxReplicas(): number {
    return Math.min(3, this.identity.servers.length);
  }

  /** Bytes reserved by volumes and their replicas. */
  get reservedBytes(): bigint {
    return this.volumes.reservedBytes;
  }

  get freeBytes(): bigint {
    const free = this.capacityBytes - this.reservedBytes;
    return free < 0n ? 0n : free;
  }

  /** Throws RESOURCE_EXHAUSTED when the cluster has less free space. */
  assertSpace(action: Action, bytes: bigint): void {
    if (bytes <= this.freeBytes) return;
    throw action.error(
      "RESOURCE_EXHAUSTED",
      `it needs ${bytes} bytes with its replicas, ${this.freeBytes} are free`,
    );
  }

  /** A namespace ID that no volume or snapshot has had. */
  newNsid(): number {
    return this.#model.nextNsid++;
  }

  // --------------------------------------------------------------------------------------------------------- changes

  /** Takes one creation off `Behaviour.failCreations`; true when it will fail. */
  takeFailure(): boolean {
    if (this.behaviour.failCreations <= 0) return false;
    this.behaviour.failCreations--;
    return true;
  }

  /** The ETag that follows `last`; undefined: the one of a new object. */
  newEtag(last: string | undefined): string {
    this.#model.revision++;
    // LightOS counts the changes of each volume, so new volumes have equal ETags.
    return String(this.behaviour.asDocumented ? this.#model.revision : Number(last ?? "0") + 1);
  }

  /** Gives a changed object a new ETag and saves the model. */
  touch(object: SimVolume | SimSnapshot): void {
    object.etag = this.newEtag(object.etag);
    if ("sourceVolumeUuid" in object) this.snapshots.put(object);
    else this.volumes.put(object);
    this.save();
  }

  /** Gives a volume a new ETag after a snapshot or clone was made of it. */
  touchSource(volumeUuid: string | undefined): void {
    const volume = this.volumes.get(volumeUuid ?? "");
    if (volume !== undefined && !this.behaviour.asDocumented) this.touch(volume);
  }

  /** The model as JSON text. */
  text(): string {
    const volumes = [...this.volumes.values()];
    const snapshots = [...this.snapshots.values()];
    return stateText({ ...this.#model, volumes, snapshots });
  }

  /** Writes the model to its file, if it has one. */
  save(): void {
    if (this.#file !== undefined) writeState(this.#file, this.text());
  }
}

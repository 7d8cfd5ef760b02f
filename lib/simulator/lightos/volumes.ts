/** Volumes of a simulated cluster: creation, change, rollback, deletion, and the states in between. */
import { messageOf, StatusError } from "../../error.ts";
import { Action } from "./action.ts";
import {
  assertEtag,
  assertIdle,
  assertName,
  type Label,
  parseAcl,
  parseCompression,
  parseIpAcl,
  parseLabels,
  parseVolumeSize,
} from "./arguments.ts";
import { listPage, type ListRequest } from "./listing.ts";
import {
  effectiveAcl,
  isServed,
  type Protection,
  type SimSnapshot,
  type SimVolume,
  type VolumeState,
} from "./model.ts";
import type { Snapshots } from "./snapshots.ts";
import { type ClusterStore, type LocalRef, type ObjectRef, refText } from "./store.ts";

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
  readonly sourceSnapshot: LocalRef;
  readonly qosPolicy: LocalRef;
  readonly labels: readonly Label[];
}

/** What UpdateVolume may change; undefined leaves a property alone. */
export interface VolumeChange {
  readonly acl?: readonly string[] | undefined;
  readonly ipAcl?: readonly string[] | undefined;
  readonly size?: string | undefined;
  readonly force?: boolean | undefined;
  readonly compression?: string | undefined;
  readonly newName?: string | undefined;
  readonly qosPolicy?: LocalRef | undefined;
  readonly labels?: readonly Label[] | undefined;
}

/** The volumes of one cluster. */
export class Volumes {
  readonly #store: ClusterStore;
  readonly #snapshots: Snapshots;

  constructor(store: ClusterStore, snapshots: Snapshots) {
    this.#store = store;
    this.#snapshots = snapshots;
  }

  /** Starts the creation of a volume. @throws StatusError as LightOS would answer */
  async create(request: SimulatedVolumeRequest): Promise<SimVolume> {
    const store = this.#store;
    const { behaviour } = store;
    const action = new Action(`create volume "${request.name}"`);
    const { source, ...facts } = this.#factsOf(action, request);
    const doomed = store.takeFailure();
    const held = behaviour.holdCreations;
    const nsid = store.newNsid();
    const volume: SimVolume = {
      ...facts,
      uuid: crypto.randomUUID(),
      name: request.name,
      project: request.project,
      state: "Creating",
      protection: "Unknown",
      etag: store.newEtag(undefined),
      nsid,
      nodeUuids: this.#placement(nsid, facts.replicaCount),
      createdAtMs: Date.now(),
      ...(source === undefined ? {} : { sourceSnapshotUuid: source.uuid, sourceSnapshotName: source.name }),
      ...(doomed ? { doomed } : {}),
      ...(held ? { held } : { dueAtMs: Date.now() + behaviour.creationMs }),
    };
    store.volumes.put(volume);
    store.touchSource(source?.sourceVolumeUuid);
    store.save();
    const created = this.#createContent(volume);
    if (behaviour.creationMs === 0 && !held) {
      await created;
      await this.#finish(volume);
    } else {
      this.#resume(volume);
    }
    return volume;
  }

  /** The volume, or NOT_FOUND. By name a live volume comes first, then a Deleting one, then a Failed one. */
  get(ref: ObjectRef): SimVolume {
    const action = new Action(`get volume ${refText(ref)}`);
    this.#store.assertProject(action, ref.project);
    return this.#store.findVolume(action, ref);
  }

  /** One page, ordered by UUID, without Deleting ones unless `showAll`. */
  list(request: ListRequest): SimVolume[] {
    const { volumes, identity } = this.#store;
    if (request.project !== undefined) this.#store.assertProject(new Action("list volumes"), request.project);
    return listPage(volumes, request, (volume) =>
      (request.showAll === true || volume.state !== "Deleting") &&
      (!request.snapshotUuid || volume.sourceSnapshotUuid === request.snapshotUuid) &&
      (!request.failureDomain || identity.servers.some(({ name, nodeUuid }) =>
        name === request.failureDomain && volume.nodeUuids.includes(nodeUuid)
      )));
  }

  /**
   * Changes a volume.
   *
   * @param ifMatch the ETag that the caller has seen, or undefined to change it in any case
   * @throws StatusError FAILED_PRECONDITION for another ETag, UNAVAILABLE while the volume is Creating, Updating or in
   *   Rollback, FAILED_PRECONDITION when it is Deleting or Failed, INVALID_ARGUMENT when the change is impossible
   */
  async update(ref: ObjectRef, change: VolumeChange, ifMatch: string | undefined): Promise<void> {
    const store = this.#store;
    const { behaviour } = store;
    const action = new Action(`update volume ${refText(ref)}`);
    store.assertProject(action, ref.project);
    const volume = store.findVolume(action, ref);
    assertEtag(action, volume.etag, ifMatch);
    assertIdle(action, volume.state, behaviour.asDocumented ? "INVALID_ARGUMENT" : "FAILED_PRECONDITION");
    const changed = this.#changedFacts(action, volume, change);
    const isResized = changed.sizeBytes !== volume.sizeBytes;
    Object.assign(volume, changed);
    if (behaviour.updateMs > 0) {
      volume.state = "Updating";
      volume.dueAtMs = Date.now() + behaviour.updateMs;
    }
    store.touch(volume);
    if (isResized) await store.dataPlane.resizeVolume(volume.uuid, changed.sizeBytes);
    if (volume.state === "Updating") this.#resume(volume);
    else this.#show(volume);
  }

  /**
   * Starts the deletion of a volume, even while hosts are connected to it. Its snapshots stay.
   *
   * @throws StatusError NOT_FOUND, UNAVAILABLE while it is Creating, Updating or in Rollback, INVALID_ARGUMENT when it
   *   is Deleting or Failed
   */
  delete(ref: ObjectRef, ifMatch: string | undefined): void {
    const action = new Action(`delete volume ${refText(ref)}`);
    this.#store.assertProject(action, ref.project);
    const volume = this.#store.findVolume(action, ref);
    assertEtag(action, volume.etag, ifMatch);
    assertIdle(action, volume.state);
    volume.state = "Deleting";
    volume.dueAtMs = Date.now() + this.#store.behaviour.deletionMs;
    this.#store.touch(volume);
    this.#resume(volume);
  }

  /** Gives a volume the content and the size of one of its snapshots. */
  rollback(ref: ObjectRef, snapshotRef: LocalRef): void {
    const store = this.#store;
    const action = new Action(`roll back volume ${refText(ref)}`);
    store.assertProject(action, ref.project);
    const volume = store.findVolume(action, ref);
    // Unlike the other calls, this one is documented to answer 503 for a Deleting volume (docs/reference/lightos-api.md 15.1).
    if (volume.state === "Deleting") throw action.error("UNAVAILABLE", "it is Deleting");
    assertIdle(action, volume.state);
    const snapshot = store.findSnapshot(action, { ...snapshotRef, project: ref.project });
    if (snapshot.sourceVolumeUuid !== volume.uuid) {
      throw action.invalid(`snapshot ${snapshot.uuid} is of volume ${snapshot.sourceVolumeUuid}`);
    }
    if (snapshot.state !== "Available") {
      throw action.error("FAILED_PRECONDITION", `snapshot ${snapshot.uuid} is ${snapshot.state}`);
    }
    volume.state = "Rollback";
    volume.rollbackTo = snapshot.uuid;
    volume.dueAtMs = Date.now() + store.behaviour.rollbackMs;
    store.touch(volume);
    this.#resume(volume);
  }

  /** Puts a volume into a state that it keeps from now on. @throws StatusError NOT_FOUND */
  set(uuid: string, to: { readonly state?: VolumeState; readonly protection?: Protection }): void {
    const volume = this.#store.volumes.get(uuid);
    if (volume === undefined) throw new StatusError("NOT_FOUND", `Cannot set volume ${uuid}: it does not exist`);
    this.#store.timers.stop(uuid);
    delete volume.dueAtMs;
    if (to.state !== undefined) volume.state = to.state;
    if (to.protection !== undefined) volume.protection = to.protection;
    this.#store.touch(volume);
    this.#show(volume);
  }

  /** Continues everything that is half done, after a start or a pause. */
  resume(): void {
    for (const volume of this.#store.volumes.values()) this.#resume(volume);
  }

  /** Lets held creations continue. */
  releaseCreations(): void {
    for (const volume of this.#store.volumes.values()) {
      if (volume.held !== true) continue;
      delete volume.held;
      volume.dueAtMs = Date.now();
      this.#resume(volume);
    }
  }

  // ------------------------------------------------------------------------------------------------------- requests

  /** The properties that a request gives to a new volume, and its source snapshot; throws as LightOS would answer. */
  #factsOf(action: Action, request: SimulatedVolumeRequest) {
    const store = this.#store;
    store.assertProject(action, request.project);
    assertName(action, request.name);
    if (!store.behaviour.nameCheckedLast) this.#assertNameIsFree(action, request);
    const source = this.#sourceSnapshot(action, request);
    const sizeBytes = request.size === "" && source !== undefined
      ? source.sizeBytes
      : parseVolumeSize(action, request.size, store.behaviour);
    if (source !== undefined && sizeBytes < source.sizeBytes) {
      throw action.invalid(`size ${sizeBytes} is below the ${source.sizeBytes} bytes of snapshot ${source.uuid}`);
    }
    const { replicaCount, sectorSizeBytes } = request;
    if (!(replicaCount >= 1 && replicaCount <= store.maxReplicas)) {
      throw action.invalid(`replica count ${replicaCount} is not between 1 and ${store.maxReplicas}`);
    }
    store.assertSpace(action, sizeBytes * BigInt(replicaCount));
    const policy = store.findPolicy(action, request.project, request.qosPolicy);
    if (![0, 512, 4096].includes(sectorSizeBytes)) {
      throw action.invalid(`sector size ${sectorSizeBytes} is not 512 or 4096`);
    }
    const labels = request.labels.length === 0 && source !== undefined
      ? [...source.labels]
      : parseLabels(action, request.labels);
    if (store.behaviour.nameCheckedLast) this.#assertNameIsFree(action, request);
    return {
      source,
      sizeBytes,
      replicaCount,
      // What LightOS does without a list is not documented; to admit no host is the safe choice.
      acl: parseAcl(action, request.acl ?? ["ALLOW_NONE"], store.behaviour),
      ipAcl: parseIpAcl(action, request.ipAcl ?? ["ALLOW_ANY"]),
      compression: parseCompression(action, request.compression) ?? false,
      sectorSizeBytes: sectorSizeBytes === 0 ? 4096 : sectorSizeBytes,
      labels,
      ...(policy === undefined ? {} : { qosPolicyUuid: policy.uuid }),
    };
  }

  /** The properties that a change gives to a volume; throws as LightOS would answer. */
  #changedFacts(action: Action, volume: SimVolume, change: VolumeChange) {
    const store = this.#store;
    const sizeBytes = change.size ? parseVolumeSize(action, change.size, store.behaviour) : volume.sizeBytes;
    if (sizeBytes < volume.sizeBytes && change.force !== true) {
      throw action.invalid(`size ${sizeBytes} is below the current ${volume.sizeBytes} bytes`);
    }
    if (sizeBytes > volume.sizeBytes) {
      store.assertSpace(action, (sizeBytes - volume.sizeBytes) * BigInt(volume.replicaCount));
    }
    const acl = change.acl === undefined ? volume.acl : parseAcl(action, change.acl, store.behaviour);
    const ipAcl = change.ipAcl === undefined ? volume.ipAcl : parseIpAcl(action, change.ipAcl);
    const labels = change.labels === undefined ? volume.labels : parseLabels(action, change.labels);
    const compression = parseCompression(action, change.compression ?? "") ?? volume.compression;
    const policy = change.qosPolicy === undefined
      ? undefined
      : store.findPolicy(action, volume.project, change.qosPolicy);
    const name = change.newName ? change.newName : volume.name;
    if (change.newName) {
      assertName(action, name);
      const namesake = store.liveVolume(volume.project, name);
      if (namesake !== undefined && namesake !== volume) {
        throw action.error("ALREADY_EXISTS", `"${name}" is volume ${namesake.uuid}`);
      }
    }
    const qosPolicy = policy === undefined ? {} : { qosPolicyUuid: policy.uuid };
    return { name, sizeBytes, acl, ipAcl, labels, compression, ...qosPolicy };
  }

  #assertNameIsFree(action: Action, { project, name }: SimulatedVolumeRequest): void {
    const namesake = this.#store.liveVolume(project, name);
    if (namesake !== undefined) throw action.error("ALREADY_EXISTS", `volume ${namesake.uuid} has this name`);
  }

  #sourceSnapshot(action: Action, { project, sourceSnapshot }: SimulatedVolumeRequest): SimSnapshot | undefined {
    const { uuid, name } = sourceSnapshot;
    if (uuid === "" && name === "") return undefined;
    const snapshot = this.#store.snapshot({ project, uuid, name });
    // CreateVolume has no documented 404: an unknown source is a bad argument.
    if (snapshot === undefined) throw action.invalid(`there is no snapshot "${uuid || name}"`);
    if (snapshot.state === "Available") return snapshot;
    const code = snapshot.state === "Creating" ? "FAILED_PRECONDITION" : "INVALID_ARGUMENT";
    throw action.error(code, `snapshot ${snapshot.uuid} is ${snapshot.state}`);
  }

  /** The LightOS nodes that hold the replicas of a volume. */
  #placement(nsid: number, replicaCount: number): string[] {
    const { servers } = this.#store.identity;
    const nodes: string[] = [];
    for (let replica = 0; replica < replicaCount; replica++) {
      const server = servers[(nsid + replica) % servers.length];
      if (server !== undefined) nodes.push(server.nodeUuid);
    }
    return nodes;
  }

  // --------------------------------------------------------------------------------------------------------- states

  /** Makes the content at once, which may be long before the state says that it is ready. */
  #createContent(volume: SimVolume): Promise<void> {
    const { dataPlane, log } = this.#store;
    return dataPlane.createVolume(volume.uuid, volume.sizeBytes, volume.sourceSnapshotUuid).catch((error) => {
      log.warning("could not make the content of a volume", { volume: volume.uuid, error: messageOf(error) });
      volume.doomed = true;
    });
  }

  #resume(volume: SimVolume): void {
    this.#show(volume);
    if (volume.dueAtMs !== undefined) {
      this.#store.timers.at(volume.uuid, volume.dueAtMs, () => this.#finish(volume));
    }
  }

  /** Ends Creating, Rollback, Updating or Deleting. */
  async #finish(volume: SimVolume): Promise<void> {
    const { dataPlane, volumes } = this.#store;
    switch (volume.state) {
      case "Creating":
        await this.#createContent(volume);
        if (volumes.get(volume.uuid) !== volume) return;
        volume.state = volume.doomed === true ? "Failed" : "Available";
        volume.protection = volume.doomed === true ? "NotAvailable" : "FullyProtected";
        if (volume.doomed === true) await dataPlane.deleteVolume(volume.uuid);
        break;
      case "Rollback":
        await this.#restoreSnapshot(volume);
        volume.state = "Available";
        break;
      case "Updating":
        volume.state = "Available";
        break;
      case "Deleting":
        await dataPlane.deleteVolume(volume.uuid);
        if (volumes.get(volume.uuid) === volume) volumes.delete(volume);
        this.#snapshots.releaseSource(volume);
        this.#store.save();
        return;
    }
    delete volume.dueAtMs;
    delete volume.doomed;
    if (volumes.get(volume.uuid) !== volume) return;
    this.#store.touch(volume);
    if (isServed(volume)) this.#show(volume);
  }

  async #restoreSnapshot(volume: SimVolume): Promise<void> {
    const { dataPlane, snapshots } = this.#store;
    const snapshot = snapshots.get(volume.rollbackTo ?? "");
    if (snapshot !== undefined) {
      await dataPlane.rollbackVolume(volume.uuid, snapshot.uuid, snapshot.sizeBytes);
      volume.sizeBytes = snapshot.sizeBytes;
    }
    delete volume.rollbackTo;
  }

  /** Exposes the volume to the hosts of its ACL, or hides it, as its state demands. */
  #show(volume: SimVolume): void {
    const { dataPlane, identity } = this.#store;
    if (!isServed(volume)) return dataPlane.hide(volume.uuid);
    const { uuid, nsid, sizeBytes, sectorSizeBytes } = volume;
    const { subsystemNqn } = identity;
    dataPlane.expose({ uuid, subsystemNqn, nsid, sizeBytes, sectorSizeBytes, acl: [...effectiveAcl(volume)] });
  }
}

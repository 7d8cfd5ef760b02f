/** Snapshots of a simulated cluster: creation, deletion, and the states in between. */
import { messageOf } from "../../error.ts";
import { Action } from "./action.ts";
import { assertName } from "./arguments.ts";
import { listPage, type ListRequest } from "./listing.ts";
import type { SimSnapshot, SimVolume } from "./model.ts";
import { type ClusterStore, type LocalRef, type ObjectRef, refText } from "./store.ts";

export interface SimulatedSnapshotRequest {
  readonly project: string;
  readonly name: string;
  readonly description: string;
  readonly source: LocalRef;
  /** When the snapshot deletes itself, after its creation; undefined or 0: never. */
  readonly retentionMs: number | undefined;
}

/** The snapshots of one cluster. */
export class Snapshots {
  readonly #store: ClusterStore;

  constructor(store: ClusterStore) {
    this.#store = store;
  }

  /**
   * Takes a snapshot. Its content is the volume's at the time of the call; its state becomes Available later.
   *
   * @throws StatusError FAILED_PRECONDITION while the source is neither Available nor Migrating. A name that a Deleting
   *   snapshot still has is accepted, and the new snapshot ends as Failed (docs/reference/lightos-api.md 6.7)
   */
  async create(request: SimulatedSnapshotRequest): Promise<SimSnapshot> {
    const store = this.#store;
    const { behaviour } = store;
    const action = new Action(`create snapshot "${request.name}"`);
    store.assertProject(action, request.project);
    assertName(action, request.name);
    const namesakes = store.snapshots.named(request.project, request.name);
    const live = namesakes.find(({ state }) => state === "Available" || state === "Creating");
    if (live !== undefined) throw action.error("ALREADY_EXISTS", `snapshot ${live.uuid} has this name`);
    const volume = store.findVolume(action, { ...request.source, project: request.project });
    if (volume.state !== "Available" && volume.state !== "Migrating") {
      throw action.error("FAILED_PRECONDITION", `volume ${volume.uuid} is ${volume.state}`);
    }
    const hasToFail = store.takeFailure();
    const doomed = hasToFail || namesakes.some(({ state }) => state === "Deleting");
    const held = behaviour.holdCreations;
    const snapshot: SimSnapshot = {
      ...this.#copyOfFacts(volume),
      name: request.name,
      project: request.project,
      description: request.description,
      ...(request.retentionMs ? { expiresAtMs: Date.now() + request.retentionMs } : {}),
      ...(doomed ? { doomed } : {}),
    };
    store.snapshots.put(snapshot);
    store.touchSource(volume.uuid);
    store.save();
    // The content is copied before the answer: what the caller writes afterwards is not part of the snapshot.
    try {
      await store.dataPlane.createSnapshot(snapshot.uuid, volume.uuid);
    } catch (error) {
      store.log.warning("could not copy a volume", { volume: volume.uuid, error: messageOf(error) });
      snapshot.doomed = true;
    }
    if (held) snapshot.held = true;
    else snapshot.dueAtMs = Date.now() + behaviour.creationMs;
    if (behaviour.creationMs === 0 && !held) this.#finish(snapshot);
    else await this.#resume(snapshot);
    store.save();
    return snapshot;
  }

  /** @throws StatusError NOT_FOUND */
  get(ref: ObjectRef): SimSnapshot {
    const action = new Action(`get snapshot ${refText(ref)}`);
    this.#store.assertProject(action, ref.project);
    return this.#store.findSnapshot(action, ref);
  }

  /** One page, ordered by UUID, without Deleting ones unless `showAll`. */
  list(request: ListRequest): SimSnapshot[] {
    const store = this.#store;
    if (request.project !== undefined) store.assertProject(new Action("list snapshots"), request.project);
    return listPage(store.snapshots, request, ({ state }) => request.showAll === true || state !== "Deleting");
  }

  /** Starts the deletion of a snapshot. Its clones stay. */
  delete(ref: ObjectRef): void {
    const action = new Action(`delete snapshot ${refText(ref)}`);
    this.#store.assertProject(action, ref.project);
    const snapshot = this.#store.findSnapshot(action, ref);
    if (snapshot.state === "Creating") throw action.error("UNAVAILABLE", "it is Creating");
    if (snapshot.state !== "Available") throw action.invalid(`it is ${snapshot.state}`);
    this.#startDeletion(snapshot);
  }

  /** The snapshots that a list of changed blocks compares: two of one volume, or one and the blank volume. */
  compared(
    project: string,
    ref: LocalRef,
    base: LocalRef | undefined,
  ): { readonly snapshot: SimSnapshot; readonly base: SimSnapshot | undefined } {
    const action = new Action(`list changed blocks of snapshot ${refText(ref)}`);
    this.#store.assertProject(action, project);
    const available = (ref: LocalRef) => {
      const snapshot = this.#store.findSnapshot(action, { ...ref, project });
      if (snapshot.state === "Available") return snapshot;
      throw action.error("FAILED_PRECONDITION", `${snapshot.uuid} is ${snapshot.state}`);
    };
    const snapshot = available(ref);
    const older = base === undefined ? undefined : available(base);
    if (older !== undefined && older.sourceVolumeUuid !== snapshot.sourceVolumeUuid) {
      throw action.invalid(`base ${older.uuid} is of another volume`);
    }
    if (older !== undefined && older.createdAtMs > snapshot.createdAtMs) {
      throw action.invalid(`base ${older.uuid} is newer`);
    }
    return { snapshot, base: older };
  }

  /** Continues everything that is half done, after a start or a pause. */
  async resume(): Promise<void> {
    for (const snapshot of this.#store.snapshots.values()) await this.#resume(snapshot);
  }

  /** Lets held creations continue. */
  releaseCreations(): void {
    for (const snapshot of this.#store.snapshots.values()) {
      if (snapshot.held !== true) continue;
      delete snapshot.held;
      snapshot.dueAtMs = Date.now();
      void this.#resume(snapshot);
    }
  }

  /** Continues the deletion of a volume's source snapshot if that waits for its last clone, which is this volume. */
  releaseSource(volume: SimVolume): void {
    const { snapshots, timers } = this.#store;
    const snapshot = snapshots.get(volume.sourceSnapshotUuid ?? "");
    if (snapshot?.state === "Deleting" && snapshot.dueAtMs === undefined && this.#cloneCount(snapshot) === 0) {
      timers.at(snapshot.uuid, Date.now(), () => this.#finish(snapshot));
    }
  }

  /** What a new snapshot takes over from its volume, and the facts of its own. */
  #copyOfFacts(volume: SimVolume) {
    const store = this.#store;
    return {
      uuid: crypto.randomUUID() as string,
      state: "Creating" as const,
      sourceVolumeUuid: volume.uuid,
      sourceVolumeName: volume.name,
      replicaCount: volume.replicaCount,
      sizeBytes: volume.sizeBytes,
      compression: volume.compression,
      sectorSizeBytes: volume.sectorSizeBytes,
      etag: store.newEtag(undefined),
      nsid: store.newNsid(),
      labels: [...volume.labels],
      nodeUuids: [...volume.nodeUuids],
      createdAtMs: Date.now(),
    };
  }

  async #resume(snapshot: SimSnapshot): Promise<void> {
    const { dataPlane, timers } = this.#store;
    if (snapshot.state === "Creating" && !await dataPlane.hasSnapshot(snapshot.uuid)) {
      // The simulator ended during the copy. A later copy would not be the content at the time of the call.
      snapshot.doomed = true;
      snapshot.dueAtMs ??= Date.now();
    }
    if (snapshot.dueAtMs !== undefined) {
      timers.at(snapshot.uuid, snapshot.dueAtMs, () => this.#finish(snapshot));
    } else if (snapshot.expiresAtMs !== undefined && snapshot.state === "Available") {
      timers.at(snapshot.uuid, snapshot.expiresAtMs, () => this.#startDeletion(snapshot));
    }
  }

  /** Ends Creating or Deleting. */
  #finish(snapshot: SimSnapshot): Promise<void> | void {
    const store = this.#store;
    delete snapshot.dueAtMs;
    if (snapshot.state === "Creating") {
      snapshot.state = snapshot.doomed === true ? "Failed" : "Available";
      delete snapshot.doomed;
      store.touch(snapshot);
      if (snapshot.state === "Failed") return store.dataPlane.deleteSnapshot(snapshot.uuid);
      return this.#resume(snapshot);
    }
    if (snapshot.state !== "Deleting") return;
    if (store.behaviour.snapshotWaitsForClones && this.#cloneCount(snapshot) > 0) return store.save();
    return store.dataPlane.deleteSnapshot(snapshot.uuid).then(() => {
      store.snapshots.delete(snapshot);
      store.save();
    });
  }

  #startDeletion(snapshot: SimSnapshot): void {
    const { behaviour, timers } = this.#store;
    snapshot.state = "Deleting";
    snapshot.dueAtMs = Date.now() + behaviour.deletionMs;
    this.#store.touch(snapshot);
    timers.at(snapshot.uuid, snapshot.dueAtMs, () => this.#finish(snapshot));
  }

  #cloneCount(snapshot: SimSnapshot): number {
    return this.#store.volumes.madeFrom(snapshot.uuid).filter(({ state }) => state !== "Failed").length;
  }
}

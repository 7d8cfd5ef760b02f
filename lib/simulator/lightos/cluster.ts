/**
 * A simulated LightOS cluster: what it holds, the states of its objects, and the calls that it rejects.
 *
 * Free of gRPC: service.ts serves it. Facts are from docs/reference/lightos-api.md sections 6, 14 and 15. Where those leave
 * open how LightOS behaves, the stricter of two behaviours was taken, so that a driver that works here works there. Where
 * they differ from the vendor's tests of a real cluster, the tests count (`Behaviour.asDocumented`).
 *
 * - Creation, deletion and rollback continue after the call that asked for them; objects show it by their state. Times are
 *   stored as points in time, so that a simulator that starts again continues what was half done.
 * - A name is taken by live objects of its project only: a Deleting or Failed one does not block it. A Failed volume is
 *   what remains of a creation that failed; it cannot be deleted.
 * - Every change of a volume, its state included, gives it a new ETag; so does a snapshot or clone of it. A new volume and
 *   its clone may have equal ETags.
 * - Space is reserved: size times replicas, from creation until the volume is gone.
 */
import { type DataPlane, mayAccess } from "../data_plane/data_plane.ts";
import { isProjectName } from "../../volume_id.ts";
import { readState } from "../state_file.ts";
import { Action } from "./action.ts";
import { assertName } from "./arguments.ts";
import type { Behaviour } from "./behaviour.ts";
import type { ListRequest } from "./listing.ts";
import {
  type ClusterIdentity,
  effectiveAcl,
  emptyModel,
  isServed,
  modelSchema,
  policiesOf,
  type Protection,
  type SimPolicy,
  type SimProject,
  type SimSnapshot,
  type SimTrustedHost,
  type SimVolume,
  type VolumeState,
} from "./model.ts";
import { type SimulatedSnapshotRequest, Snapshots } from "./snapshots.ts";
import { ClusterStore, type LocalRef, type ObjectRef, type StoreOptions } from "./store.ts";
import { type SimulatedVolumeRequest, type VolumeChange, Volumes } from "./volumes.ts";

export interface ClusterOptions extends StoreOptions {
  /** Projects that the cluster has from the start. */
  readonly projects: readonly string[];
}

/** A cluster. Dispose it to stop its timers; one with a file continues when it is opened again. */
export class Cluster implements AsyncDisposable {
  readonly #store: ClusterStore;
  readonly #volumes: Volumes;
  readonly #snapshots: Snapshots;
  readonly #initialProjects: readonly string[];

  private constructor(store: ClusterStore, projects: readonly string[]) {
    this.#store = store;
    this.#snapshots = new Snapshots(store);
    this.#volumes = new Volumes(store, this.#snapshots);
    this.#initialProjects = projects;
  }

  /**
   * Opens the cluster that `options.file` remembers, or a new one, and continues the creations and deletions that were
   * running.
   *
   * @throws StatusError FAILED_PRECONDITION when the file exists but cannot be read as a model
   */
  static async open(options: ClusterOptions): Promise<Cluster> {
    const { file } = options;
    const found = file === undefined ? undefined : await readState(file, modelSchema, "the cluster");
    const cluster = new Cluster(new ClusterStore(options, found ?? emptyModel()), options.projects);
    for (const name of options.projects) if (!cluster.hasProject(name)) cluster.#storeProject(name, "");
    await cluster.resume();
    cluster.#announceKeys();
    await options.dataPlane.start();
    cluster.#store.save();
    return cluster;
  }

  get identity(): ClusterIdentity {
    return this.#store.identity;
  }

  /** May be changed at any time. */
  get behaviour(): Behaviour {
    return this.#store.behaviour;
  }

  get dataPlane(): DataPlane {
    return this.#store.dataPlane;
  }

  // ------------------------------------------------------------------------------------------ volumes and snapshots

  /** See Volumes.create. */
  createVolume(request: SimulatedVolumeRequest): Promise<SimVolume> {
    return this.#volumes.create(request);
  }

  /** See Volumes.get. */
  getVolume(ref: ObjectRef): SimVolume {
    return this.#volumes.get(ref);
  }

  /** See Volumes.list. */
  listVolumes(request: ListRequest): SimVolume[] {
    return this.#volumes.list(request);
  }

  /** See Volumes.update. */
  updateVolume(ref: ObjectRef, change: VolumeChange, ifMatch: string | undefined): Promise<void> {
    return this.#volumes.update(ref, change, ifMatch);
  }

  /** See Volumes.delete. */
  deleteVolume(ref: ObjectRef, ifMatch: string | undefined): void {
    this.#volumes.delete(ref, ifMatch);
  }

  /** See Volumes.rollback. */
  rollbackVolume(ref: ObjectRef, snapshotRef: LocalRef): void {
    this.#volumes.rollback(ref, snapshotRef);
  }

  /** See Snapshots.create. */
  createSnapshot(request: SimulatedSnapshotRequest): Promise<SimSnapshot> {
    return this.#snapshots.create(request);
  }

  /** See Snapshots.get. */
  getSnapshot(ref: ObjectRef): SimSnapshot {
    return this.#snapshots.get(ref);
  }

  /** See Snapshots.list. */
  listSnapshots(request: ListRequest): SimSnapshot[] {
    return this.#snapshots.list(request);
  }

  /** See Snapshots.delete. */
  deleteSnapshot(ref: ObjectRef): void {
    this.#snapshots.delete(ref);
  }

  /** See Snapshots.compared. */
  changedBlocks(project: string, ref: LocalRef, base: LocalRef | undefined) {
    return this.#snapshots.compared(project, ref, base);
  }

  /** Every volume, Deleting and Failed ones included. */
  get volumes(): readonly SimVolume[] {
    return [...this.#store.volumes.values()];
  }

  /** Every snapshot, Deleting and Failed ones included. */
  get snapshots(): readonly SimSnapshot[] {
    return [...this.#store.snapshots.values()];
  }

  /** UUIDs of the volumes that a host may access now. */
  visibleTo(hostNqn: string): string[] {
    return this.volumes.filter((volume) => isServed(volume) && mayAccess(effectiveAcl(volume), hostNqn))
      .map(({ uuid }) => uuid);
  }

  /** NQNs of connected hosts that the ACL of a volume admits. */
  hostsOf(volume: SimVolume): string[] {
    if (!isServed(volume)) return [];
    return this.dataPlane.connectedHosts().map(({ hostNqn }) => hostNqn)
      .filter((nqn) => mayAccess(effectiveAcl(volume), nqn));
  }

  // ---------------------------------------------------------------------------------------------------------- space

  get capacityBytes(): bigint {
    return this.#store.capacityBytes;
  }

  /** The largest replica count of a volume with the present servers. */
  get maxReplicas(): number {
    return this.#store.maxReplicas;
  }

  /** Bytes reserved by volumes and their replicas. */
  get reservedBytes(): bigint {
    return this.#store.reservedBytes;
  }

  get freeBytes(): bigint {
    return this.#store.freeBytes;
  }

  // ---------------------------------------------------------------------------------------- projects, policies, hosts

  listProjects(): readonly SimProject[] {
    return this.#store.model.projects;
  }

  hasProject(name: string): boolean {
    return this.#store.model.projects.some((project) => project.name === name);
  }

  /** Adds a project. Exists already: nothing. @throws StatusError INVALID_ARGUMENT for a bad name */
  addProject(name: string, description = ""): void {
    if (this.hasProject(name)) return;
    this.#storeProject(name, description);
    this.#store.save();
  }

  /** The QoS policies that a project may use; all of them when it is undefined. */
  listPolicies(project: string | undefined): SimPolicy[] {
    return policiesOf(this.#store.model, project);
  }

  /** Adds a QoS policy, or replaces the one of that name. */
  addPolicy(policy: Omit<SimPolicy, "uuid">): SimPolicy {
    assertName(new Action(`create policy "${policy.name}"`), policy.name);
    const { policies } = this.#store.model;
    const at = policies.findIndex((other) => other.name === policy.name);
    const stored = { ...policy, uuid: policies[at]?.uuid ?? crypto.randomUUID() };
    if (at >= 0) policies[at] = stored;
    else policies.push(stored);
    this.#store.save();
    return stored;
  }

  /** The name of a volume's QoS policy; empty when it has none. */
  policyName(volume: SimVolume): string {
    return this.#store.model.policies.find(({ uuid }) => uuid === volume.qosPolicyUuid)?.name ?? "";
  }

  /** Features by name; whether each is on. */
  get features(): Readonly<Record<string, boolean>> {
    return this.#store.model.features;
  }

  setFeature(name: string, enabled: boolean): void {
    this.#store.model.features[name] = enabled;
    this.#store.save();
  }

  get inBandAuthentication(): boolean {
    return this.#store.model.inBandAuthentication;
  }

  setInBandAuthentication(enabled: boolean): void {
    this.#store.model.inBandAuthentication = enabled;
    this.setFeature("in-band-authentication", enabled);
    this.#announceKeys();
  }

  get trustedHosts(): readonly SimTrustedHost[] {
    return this.#store.model.trustedHosts;
  }

  /** Adds or replaces a trusted host; its key is project and name. */
  putTrustedHost(host: SimTrustedHost): void {
    this.#store.assertProject(new Action(`store trusted host "${host.name}"`), host.project);
    this.removeTrustedHost(host.project, host.name);
    this.#store.model.trustedHosts.push(host);
    this.#announceKeys();
    this.#store.save();
  }

  /** Removes a trusted host; false when there is none. */
  removeTrustedHost(project: string, name: string): boolean {
    const { trustedHosts } = this.#store.model;
    const at = trustedHosts.findIndex((host) => host.project === project && host.name === name);
    if (at < 0) return false;
    trustedHosts.splice(at, 1);
    this.#announceKeys();
    this.#store.save();
    return true;
  }

  // ------------------------------------------------------------------------------------------------ for tests only

  /** Lets held creations continue, and holds no more. */
  releaseCreations(): void {
    this.behaviour.holdCreations = false;
    this.#volumes.releaseCreations();
    this.#snapshots.releaseCreations();
    this.#store.save();
  }

  /** See Volumes.set. */
  setVolume(uuid: string, to: { readonly state?: VolumeState; readonly protection?: Protection }): void {
    this.#volumes.set(uuid, to);
  }

  /** Forgets every volume, snapshot, policy and trusted host, as a cluster that was installed again. */
  async forget(): Promise<void> {
    this.pause();
    this.#store.reset();
    for (const name of this.#initialProjects) this.#storeProject(name, "");
    this.#announceKeys();
    await this.dataPlane.clear();
    this.#store.save();
  }

  /** Stops the timers: nothing changes by itself until `resume`. */
  pause(): void {
    this.#store.timers.stopAll();
  }

  /** Continues everything that is half done. */
  async resume(): Promise<void> {
    await this.#snapshots.resume();
    this.#volumes.resume();
  }

  /** The model as JSON would hold it; sizes as decimal text. */
  dump(): unknown {
    return JSON.parse(this.#store.text());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#store.timers.close();
  }

  #storeProject(name: string, description: string): void {
    if (!isProjectName(name)) throw new Action(`create project "${name}"`).invalid("it is not a project name");
    this.#store.model.projects.push({ uuid: crypto.randomUUID(), name, description });
  }

  /** Passes the keys of hosts to the data plane. Of trusted hosts with one NQN in several projects the last one counts. */
  #announceKeys(): void {
    const withSecrets = this.trustedHosts.filter(({ hostSecret }) => hostSecret !== "");
    this.dataPlane.authenticate?.(
      this.inBandAuthentication
        ? new Map(withSecrets.map((host) => [host.hostNqn, { host: host.hostSecret, target: host.targetSecret }]))
        : undefined,
    );
  }
}

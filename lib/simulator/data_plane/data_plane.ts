/**
 * The contract between a simulated cluster and its data plane, which holds the data and shows it to hosts.
 *
 * The model decides; the data plane carries out. Changes of contents (`createVolume` to `rollbackVolume`) are complete when
 * the promise resolves, and may be repeated after a crash. Changes of what hosts see (`expose`, `hide`) take effect soon
 * after the call, as in a real cluster, which notifies its hosts. The calls of one data plane take effect in their order.
 */

/** A namespace and the hosts that may access it. */
export interface ExposedNamespace {
  /** Namespace UUID, which is the volume's. */
  readonly uuid: string;
  /** Its subsystem. LightOS has one for the whole cluster. */
  readonly subsystemNqn: string;
  /** Namespace ID in the subsystem. */
  readonly nsid: number;
  readonly sizeBytes: bigint;
  /** 512 or 4096. */
  readonly sectorSizeBytes: number;
  /** Host NQNs, or `ALLOW_ANY`, or `ALLOW_NONE`. */
  readonly acl: readonly string[];
}

/** Blocks of `snapshot` that differ from the base, as runs. */
export interface ChangedRun {
  /** First block, and the one after the last; blocks of `blockSizeBytes`. */
  readonly start: bigint;
  readonly end: bigint;
}

/** A host that is connected to the subsystem. */
export interface ConnectedHost {
  readonly hostNqn: string;
  readonly address: string;
  readonly hostname: string;
}

/** The block device of a namespace on the simulated machine. */
export interface ShownDevice {
  /** Namespace UUID. */
  readonly uuid: string;
  /** `nvme0n1`. */
  readonly name: string;
  /** Device node. */
  readonly path: string;
  /** The loop device behind it, `/dev/loop5`. */
  readonly loop: string;
  /** Major and minor number, `7:5`. */
  readonly number: string;
}

/** Changes to the block devices of a machine. Each throws NOT_FOUND when the namespace has no device there. */
export interface Machine {
  readonly devices: readonly ShownDevice[];
  /** Removes the device until `restore`; a mount of it gets I/O errors. */
  remove(uuid: string): Promise<void>;
  /** Brings a removed device back under another name: `name`, or the lowest free one. */
  restore(uuid: string, name?: string): Promise<ShownDevice>;
  /** Exchanges the names of two devices, as a reconnect in another order does. */
  swap(uuid: string, otherUuid: string): Promise<void>;
  /**
   * From now on, the device node opens a device of the right size whose reads fail (`unreadable`), or one of size zero
   * (`empty`). Open files of the device are not affected.
   */
  damage(uuid: string, how: "unreadable" | "empty"): Promise<void>;
  /** Ends `damage`. `written`: whether the damaged device was written to. */
  heal(uuid: string): Promise<{ readonly written: boolean }>;
}

/** States of asymmetric namespace access that a port can report. */
export const anaStates = ["optimized", "non-optimized", "inaccessible", "persistent-loss", "change"] as const;
export type AnaState = typeof anaStates[number];

/** Where the I/O controllers of one server listen. */
export interface PathPort {
  /** `127.0.0.1:4420`. */
  readonly address: string;
  /** Whether it listens. */
  readonly up: boolean;
  readonly ana: AnaState | undefined;
}

/** The I/O ports of the cluster, one per server, by its number. Changes throw NOT_FOUND for an unknown server. */
export interface Paths {
  list(): readonly PathPort[];
  /** Down: connections end and new ones are rejected, as by a server that was switched off. */
  take(server: number, up: boolean): Promise<void>;
  setAna(server: number, state: AnaState): Promise<void>;
}

/** DH-HMAC-CHAP keys in text form; `target` is empty when the host does not authenticate the cluster. */
export interface HostSecrets {
  readonly host: string;
  readonly target: string;
}

export interface DataPlane extends AsyncDisposable {
  readonly kind: "none" | "loop" | "nvmet";
  /** The machine that the data plane simulates; absent when it simulates none. */
  readonly machine?: Machine;
  /** Absent when hosts cannot connect. */
  readonly paths?: Paths;
  /** Shows what was exposed, and from now on each change. Called once, when the model is complete. */
  start(): Promise<void>;
  /** Makes the content of a volume: zeros, or a copy of a snapshot with zeros behind it. Exists already: nothing. */
  createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void>;
  /** Changes the size and keeps the content that fits. */
  resizeVolume(uuid: string, sizeBytes: bigint): Promise<void>;
  /** Hides the volume from every host and deletes its content. Absent: nothing. */
  deleteVolume(uuid: string): Promise<void>;
  /** Copies the volume's content as it is when the call is made. */
  createSnapshot(uuid: string, volumeUuid: string): Promise<void>;
  /** Whether the content of a snapshot is whole: false after a crash during its creation. */
  hasSnapshot(uuid: string): Promise<boolean>;
  deleteSnapshot(uuid: string): Promise<void>;
  /** Gives the volume the content and the size of the snapshot. */
  rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void>;
  /** Runs of blocks in which a snapshot differs from a base (from zeros when undefined), from block `start` on. */
  changedRuns(
    snapshotUuid: string,
    baseUuid: string | undefined,
    blockSizeBytes: number,
    start: bigint,
  ): AsyncIterable<ChangedRun>;
  /** Shows the namespace to the hosts of its ACL, or changes its ACL and size. */
  expose(namespace: ExposedNamespace): void;
  /** Hides the namespace from every host. */
  hide(uuid: string): void;
  /**
   * Sets the keys of the hosts that may connect, by host NQN. All other hosts are rejected and lose their connections.
   * Undefined: all hosts may connect, without keys. Absent when the data plane does not support keys.
   */
  authenticate?(hosts: ReadonlyMap<string, HostSecrets> | undefined): void;
  /** Hosts that are connected now. */
  connectedHosts(): readonly ConnectedHost[];
  /** Resolves when every earlier `expose` and `hide` has taken effect. */
  waitUntilSettled(): Promise<void>;
  /** Deletes all contents and hides everything from the hosts. */
  clear(): Promise<void>;
}

/** Whether the ACL of a namespace admits a host NQN. */
export function mayAccess(acl: readonly string[], hostNqn: string): boolean {
  return acl.includes("ALLOW_ANY") || (acl.includes(hostNqn) && !acl.includes("ALLOW_NONE"));
}

/** A data plane without data, for the management API alone. No host is ever connected. */
export function noDataPlane(): DataPlane {
  const done = () => Promise.resolve();
  return {
    kind: "none",
    start: done,
    createVolume: done,
    resizeVolume: done,
    deleteVolume: done,
    createSnapshot: done,
    hasSnapshot: () => Promise.resolve(true),
    deleteSnapshot: done,
    rollbackVolume: done,
    async *changedRuns() {},
    expose() {},
    hide() {},
    connectedHosts: () => [],
    waitUntilSettled: done,
    clear: done,
    [Symbol.asyncDispose]: done,
  };
}

/**
 * What the simulated cluster asks of the part of it that holds the data and shows it to hosts.
 *
 * The model says what should be; a data plane makes it so. Contents (`createVolume` to `rollbackVolume`) are done when
 * the promise resolves, each may be repeated after a crash. What a host may see (`expose`, `hide`) takes effect soon
 * after, as with a real cluster that tells its hosts through change notifications. The calls of one data plane take
 * effect in the order in which they were made.
 */

/** A namespace and who may see it. */
export interface ExposedNamespace {
  /** Namespace UUID, which is the volume's. */
  readonly uuid: string;
  /** The subsystem that it is part of. LightOS has one for the whole cluster. */
  readonly subsystemNqn: string;
  /** Number of the namespace in its subsystem. */
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

/** A block device that stands for a namespace on the simulated machine. */
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

/** What can happen to the block devices of a machine. Each throws NOT_FOUND when the namespace has no device there. */
export interface Machine {
  readonly devices: readonly ShownDevice[];
  /** The device vanishes, and stays away until `restore`; a mount of it gets I/O errors. */
  remove(uuid: string): Promise<void>;
  /** Lets a removed device come back, under another name: `name`, or the lowest free one. */
  restore(uuid: string, name?: string): Promise<ShownDevice>;
  /** Each of two devices takes the name of the other, as after a reconnect in another order. */
  swap(uuid: string, otherUuid: string): Promise<void>;
  /**
   * From now on each opening of the device node meets a device of the right size whose every read fails
   * (`unreadable`), or one of size zero (`empty`). What was open before stays as it was.
   */
  damage(uuid: string, how: "unreadable" | "empty"): Promise<void>;
  /** Ends `damage`. `written` tells whether anybody wrote to the damaged device. */
  heal(uuid: string): Promise<{ readonly written: boolean }>;
}

/** How a port says that it reaches namespaces (NVMe's asymmetric namespace access). */
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

/** The ways to the cluster's namespaces, one per server, by its number. Changes throw NOT_FOUND for a server that is not. */
export interface Paths {
  list(): readonly PathPort[];
  /** Down: connections end and new ones are refused, as of a server that was switched off. */
  take(server: number, up: boolean): Promise<void>;
  setAna(server: number, state: AnaState): Promise<void>;
}

/** In text form; `target` is empty where the host does not ask the cluster to prove itself. */
export interface HostSecrets {
  readonly host: string;
  readonly target: string;
}

export interface DataPlane extends AsyncDisposable {
  readonly kind: "none" | "loop" | "nvmet";
  /** The machine whose kernel the data plane plays; absent without one. */
  readonly machine?: Machine;
  /** Absent where no host ever connects. */
  readonly paths?: Paths;
  /** Shows what has been exposed, and from now on each change: called once, when the model is complete. */
  start(): Promise<void>;
  /** Makes the content of a volume: zeros, or a copy of a snapshot with zeros behind it. Done already: nothing. */
  createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void>;
  /** Changes the size, keeping what fits. */
  resizeVolume(uuid: string, sizeBytes: bigint): Promise<void>;
  /** Takes the volume away from every host and forgets its content. Absent: done. */
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
  /** Lets hosts see the namespace, or changes who may and how large it is. */
  expose(namespace: ExposedNamespace): void;
  /** Takes the namespace away from every host. */
  hide(uuid: string): void;
  /**
   * Who may connect with which keys, by host NQN: nobody else may then, and who is connected without a key is cut off.
   * Undefined: everybody may, without. Absent where nothing that connects could have a key.
   */
  authenticate?(hosts: ReadonlyMap<string, HostSecrets> | undefined): void;
  /** Hosts that are connected now. */
  connectedHosts(): readonly ConnectedHost[];
  /** Resolves when every earlier `expose` and `hide` has taken effect. */
  settled(): Promise<void>;
  /** Forgets every content and takes everything away from the hosts. */
  clear(): Promise<void>;
}

/** Whether a host NQN may see a namespace with this access list. */
export function mayAccess(acl: readonly string[], hostNqn: string): boolean {
  return acl.includes("ALLOW_ANY") || (acl.includes(hostNqn) && !acl.includes("ALLOW_NONE"));
}

/** A data plane without data: the management side alone. No host is ever connected. */
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
    settled: done,
    clear: done,
    [Symbol.asyncDispose]: done,
  };
}

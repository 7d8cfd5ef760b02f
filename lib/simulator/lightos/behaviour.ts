/** How a simulated LightOS cluster behaves: times, and the cases in which versions of LightOS differ. */

/** How the cluster behaves. The values may be changed while it runs. */
export interface Behaviour {
  /** How long a volume or snapshot is Creating. 0: the answer shows it as Available. */
  creationMs: number;
  /** How long a volume or snapshot is Deleting. */
  deletionMs: number;
  /** How long a volume is Updating. 0: it stays Available. */
  updateMs: number;
  /** How long a volume is in Rollback. */
  rollbackMs: number;
  /** New volumes and snapshots stay Creating until `releaseCreations`. */
  holdCreations: boolean;
  /** How many of the next creations end as Failed. */
  failCreations: number;
  /** GetVolume by name finds a Deleting or Failed volume before a live one of the same name, as in some LightOS versions. */
  nameShowsDead: boolean;
  /** A deleted snapshot stays Deleting while clones of it exist. */
  snapshotWaitsForClones: boolean;
  /** CreateVolume checks everything else, space too, before it checks whether the name is taken. */
  nameCheckedLast: boolean;
  /**
   * Answers as the REST documentation says where the vendor's tests of a real cluster show something else: a size that is
   * not a multiple of 4 KiB is an error and not rounded up, ACLs hold host NQNs only, snapshots have an ETag, ETags are
   * unique in the cluster, a snapshot does not change the ETag of its source, and an update of a Deleting or Failed volume
   * fails with INVALID_ARGUMENT instead of FAILED_PRECONDITION.
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

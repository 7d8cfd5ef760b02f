/** What the handlers of the controller service need, and the locks that they take. */
import type { FsType } from "../../host/filesystem/fs_type.ts";
import type { KeyedLock } from "../../lock.ts";
import type { StorageBackend } from "../../storage/backend.ts";

export interface ControllerOptions {
  readonly backend: StorageBackend;
  readonly locks: KeyedLock;
  /** The file system of a volume whose StorageClass names none, for validating mkfs options early. */
  readonly defaultFsType: FsType;
  /**
   * How every node ID of this deployment ends; empty when that is not known. The cluster knows host NQNs and no nodes,
   * so a node that cannot exist can be recognised only by this.
   */
  readonly nodeIdSuffix: string;
  /** Whether the health calls of CSI 1.13 are announced and served; tools for 1.12 fail on their capabilities. */
  readonly volumeHealth?: boolean;
}

/**
 * How long attaching and detaching wait for another call for the volume, in milliseconds. csi-attacher has ten workers
 * by default, and each of them waits here.
 */
const longestWaitMs = 10_000;

type Locking = Pick<ControllerOptions, "backend" | "locks">;

/** Takes the volume for a call, or throws ABORTED. The caller disposes it when the work has ended. */
export function lockVolume({ backend, locks }: Locking, rpc: string, volumeId: string): Disposable {
  return locks.take(`volume ${backend.uuidOf(volumeId)}`, rpc);
}

/** Like lockVolume, but first waits a while for other nodes that attach or detach a shared volume at the moment. */
export function lockVolumeSoon(
  { backend, locks }: Locking,
  rpc: string,
  volumeId: string,
  signal: AbortSignal,
): Promise<Disposable> {
  return locks.takeWithin(longestWaitMs, `volume ${backend.uuidOf(volumeId)}`, rpc, signal);
}

/** Taken before lockVolumeSoon, so that a repeated call for the same node gets ABORTED at once. */
export function lockVolumeOnNode(
  { backend, locks }: Locking,
  rpc: string,
  volumeId: string,
  nodeId: string,
): Disposable {
  return locks.take(`volume ${backend.uuidOf(volumeId)} and node "${nodeId}"`, rpc);
}

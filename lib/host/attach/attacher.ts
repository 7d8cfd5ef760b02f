/**
 * The contract of attachers, which make the kernel connect to a namespace's subsystem, or release it.
 *
 * attach is idempotent, also for a namespace that is connected. When it returns, the attacher has done its part for the
 * connection; the device itself may appear later, and waitForDevice waits for it.
 *
 * detach is idempotent, also for a namespace that was never attached. Its file system must be unmounted before. It needs only
 * the UUID, because NodeUnstageVolume has no publish context. Other namespaces of the same subsystem keep their connection.
 *
 * With keys, attach leaves no connection of ours without them. It first makes another connection beside the old one, and drops
 * the old one only when the other works and leads to the same namespaces. So a wrong key fails on a connection that carries
 * nothing, and changing keys interrupts no I/O. The driver does not write a new key to the attribute `dhchap_secret` of a live
 * connection: the kernel accepts it without a check, and host key and controller key cannot be changed in one step. A wrong
 * key breaks the connection and leaves I/O hanging, and writing the right key back then never returned (Linux 6.12).
 *
 * There are two implementations, and the node service does not know which one it has. With the Discovery-Client of LightOS, a
 * daemon connects and follows the cluster when its servers change; the driver writes one file per namespace for it. The direct
 * attacher uses nvme-cli, and with keys the kernel's own interface.
 */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import type { RemoteNamespace } from "../../namespace.ts";
import { nameUuid } from "../../uuid.ts";

/** Connects namespaces to this machine. See the head of this file. */
export interface Attacher {
  /** Advice for the error that an attached namespace does not appear as a device. */
  readonly hint: string;
  /** Whether attach needs the keys of authenticated connections; false: a daemon connects, which has its own keys. */
  readonly takesKeys: boolean;
  /**
   * Makes the kernel connect.
   *
   * @param keys for authenticated connections; a connection without them is replaced
   * @throws StatusError FAILED_PRECONDITION when this node lacks what the attacher needs, or the keys are rejected;
   *   UNAVAILABLE when no controller of the subsystem could be connected
   */
  attach(ctx: RequestContext, namespace: RemoteNamespace, keys?: DhchapKeys): Promise<void>;
  /**
   * Releases a namespace.
   *
   * @param subsystemNqn where it is known, also drops a connection that shows no namespace any more
   * @throws StatusError FAILED_PRECONDITION while something uses the subsystem's devices; UNAVAILABLE when it failed and may
   *   be repeated
   */
  detach(ctx: RequestContext, namespaceUuid: string, subsystemNqn?: string): Promise<void>;
  /**
   * Makes connections again that the kernel has given up (`ctrl_loss_tmo` after their loss), so that a volume in use regains
   * the paths it was attached with; heals connections without a usable path (connection_watch.ts); and drops connections that
   * have shown no namespace since the last call. Call it every `reconcileEveryMs`; with nothing to do it only reads sysfs.
   * Absent where a daemon does this.
   *
   * It knows the addresses of namespaces that this process has attached. After a restart it learns from sysfs which addresses
   * are connected, and the others with the next attach.
   */
  reconcile?(ctx: RequestContext): Promise<void>;
}

/**
 * The NVMe host ID of a node: a UUID (version 8) that is derived from the node ID, so that it is the same after each restart and
 * differs between nodes. The kernel requires a fixed pair of host NQN and host ID, and nvme-cli would choose a random ID.
 */
export function hostIdOf(nodeId: string): string {
  return nameUuid(`nvme host ID of ${nodeId}`);
}

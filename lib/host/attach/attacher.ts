/**
 * Attachers: what makes the kernel connect to a namespace's subsystem, or let go of it.
 *
 * attach: may be repeated, also for a namespace that is connected. When it returns, what this strategy can do for the
 * connection has been done; the device itself may still be on its way, and waitForDevice is who waits for it.
 *
 * detach: may be repeated, also for a namespace that was never attached. Its file system must be unmounted before. It
 * needs nothing but the UUID: NodeUnstageVolume has no publish context. Other namespaces of the same subsystem keep
 * their connection.
 *
 * With keys, attach leaves no connection of ours without them: first another one is made beside it, and only when that one
 * works and leads to the same namespaces, the old one goes. So a wrong key is found out by a connection that carries nothing,
 * and changing keys interrupts no I/O. Writing a new key to the attribute `dhchap_secret` of a live connection was left out:
 * the kernel takes it without a look, and host and controller key cannot be changed in one step. A wrong one costs the
 * connection and leaves I/O hanging, and writing the right one back then never returned (Linux 6.12).
 *
 * Two strategies, and the node service cannot tell which it has. With the Discovery-Client of LightOS, a daemon connects
 * and follows the cluster as it moves; the driver tells it what to know by one file per namespace. Direct uses nvme-cli,
 * and with keys the kernel's own interface.
 */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import type { RemoteNamespace } from "../../namespace.ts";
import { nameUuid } from "../../uuid.ts";

export interface Attacher {
  /** What to look at when an attached namespace does not show up as a device; ends the error that says so. */
  readonly hint: string;
  /** Whether attach needs the keys of an authenticated connection; false: a daemon connects, and has keys of its own. */
  readonly takesKeys: boolean;
  /**
   * Makes the kernel connect.
   *
   * @param keys for authenticated connections; a connection without them is replaced
   * @throws StatusError FAILED_PRECONDITION when this node lacks what the strategy needs, or the keys are refused;
   *   UNAVAILABLE when no controller of the subsystem could be connected
   */
  attach(ctx: RequestContext, namespace: RemoteNamespace, keys?: DhchapKeys): Promise<void>;
  /**
   * Lets go of a namespace; throws UNAVAILABLE when that failed and may be repeated.
   *
   * @param subsystemNqn lets go of a connection that shows no namespace any more too, where it is known
   */
  detach(ctx: RequestContext, namespaceUuid: string, subsystemNqn?: string): Promise<void>;
  /**
   * Makes connections again that the kernel has given up (`ctrl_loss_tmo` after their loss), so that a volume in use gets
   * back the paths it was attached with; heals those that give no path (healing.ts); and drops those that have shown no
   * namespace since the last call. To be called every `lookMs`; with nothing to do it reads sysfs and nothing more. Absent
   * where a daemon does it.
   *
   * It knows the addresses of what this process has attached: one that is started anew learns from sysfs those that are
   * connected, and the rest with the next attach.
   */
  reconcile?(ctx: RequestContext): Promise<void>;
}

/**
 * The NVMe host ID of a node: a UUID (version 8) made of the node ID, so that it is the same after each restart and
 * differs between nodes. The kernel wants host NQN and host ID in pairs, and nvme-cli would take a random ID.
 */
export function hostIdOf(nodeId: string): string {
  return nameUuid(`nvme host ID of ${nodeId}`);
}

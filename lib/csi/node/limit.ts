/**
 * How many volumes a node may have (`--max-volumes`). NodeGetInfo reports the number to the orchestrator; a volume
 * beyond it is an error before anything is done, instead of a connect or mount that hangs because something has run
 * out.
 *
 * A volume counts while it is in use: mounted, held by another device, or being staged. A volume that the cluster
 * merely shows to this node does not count. With LightOS a volume appears as soon as the node has access, so volumes
 * beyond the limit would otherwise block all others, also those that were there before a reboot.
 */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { volumesInUse } from "../../host/volume_mounts.ts";

/** Admits volumes to this node, up to a number. */
export interface VolumeLimit {
  /**
   * Admits a volume; it counts as in use until the answer is disposed. A volume that is in use already is always
   * admitted.
   *
   * @param key identifies the volume: its namespace UUID, or its volume ID where the UUID is not known yet
   * @throws StatusError RESOURCE_EXHAUSTED that names limit and count
   */
  admit(ctx: RequestContext, key: string): Promise<Disposable>;
}

/**
 * A limit for the volumes of this driver on a node.
 *
 * @param most 0: no limit
 * @param isOurs whether a subsystem is of this driver; another driver on the node has volumes of its own
 */
export function volumeLimit(host: Host, most: number, isOurs: (subsystemNqn: string) => boolean): VolumeLimit {
  /** Volumes that are being staged, in the order of their calls: an earlier call never fails because of a later one. */
  const admitted = new Set<string>();
  return {
    async admit(ctx, key) {
      if (most === 0) return { [Symbol.dispose]: () => {} };
      const before = [...admitted].filter((other) => other !== key);
      admitted.add(key);
      try {
        const used = (await volumesInUse(host)).filter(({ subsystemNqn }) => isOurs(subsystemNqn));
        const others = new Set([...used.map(({ uuid }) => uuid), ...before]);
        if (others.has(key) || others.size < most) return { [Symbol.dispose]: () => void admitted.delete(key) };
        throw ctx.error(
          "RESOURCE_EXHAUSTED",
          `this node has ${others.size} volumes in use, ${most} are allowed (--max-volumes); end a pod here that uses ` +
            `one, or let this one run on another node`,
        );
      } catch (error) {
        admitted.delete(key);
        throw error;
      }
    },
  };
}

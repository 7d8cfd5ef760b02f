/**
 * How many volumes a node may have (`--max-volumes`): NodeGetInfo tells the orchestrator, and what it sends beyond that is
 * refused before anything has been done, instead of hanging in a connect or a mount for want of something.
 *
 * What counts is what is in use: mounted, held by another device, or on its way there. What the cluster merely shows this
 * node does not count. With LightOS a volume appears as soon as the node has access, so of the volumes that are one too
 * many for a node each would stand in the way of all others, also of those that were there before a reboot.
 */
import { StatusError } from "../../error.ts";
import type { Host } from "../../host/host.ts";
import { volumesInUse } from "../../host/volume_mounts.ts";

export interface VolumeLimit {
  /**
   * Admits a volume; it counts as in use until the answer is disposed. In use already: admitted, whatever the limit is.
   *
   * @param key tells it from others: its namespace UUID, or what is known in its place
   * @throws StatusError RESOURCE_EXHAUSTED that tells limit and count
   */
  admit(action: string, key: string): Promise<Disposable>;
}

/**
 * @param most 0: no limit
 * @param isOurs whether a subsystem is of this driver; a node can have another one, with volumes of its own
 */
export function volumeLimit(host: Host, most: number, isOurs: (subsystemNqn: string) => boolean): VolumeLimit {
  /** In the order in which they came: who came first is not refused for who came after it. */
  const coming = new Set<string>();
  return {
    async admit(action, key) {
      if (most === 0) return { [Symbol.dispose]: () => {} };
      const before = [...coming].filter((other) => other !== key);
      coming.add(key);
      try {
        const used = (await volumesInUse(host)).filter(({ subsystemNqn }) => isOurs(subsystemNqn));
        const others = new Set([...used.map(({ uuid }) => uuid), ...before]);
        if (others.has(key) || others.size < most) return { [Symbol.dispose]: () => void coming.delete(key) };
        throw new StatusError(
          "RESOURCE_EXHAUSTED",
          `Cannot ${action}: this node has ${others.size} volumes in use, ${most} are allowed (--max-volumes); end a pod ` +
            `here that uses one, or let this one run on another node`,
        );
      } catch (error) {
        coming.delete(key);
        throw error;
      }
    },
  };
}

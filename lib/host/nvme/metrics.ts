/** Metrics of this machine's NVMe connections, read from sysfs each time. */
import type { MetricSample } from "../../metrics.ts";
import { isNodeHostNqn } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { volumesInUse } from "../volume_mounts.ts";
import { allControllers } from "./controllers.ts";
import { attachedVolumes } from "./devices.ts";
import { isLivePath, pathsOf } from "./paths.ts";

/**
 * Samples of the volumes and connections that this machine has under a host NQN of this driver. Touches no device.
 *
 * @param isOurs whether a subsystem belongs to this driver; a node can run more than one
 */
export async function machineSamples(
  host: Host,
  isOurs: (subsystemNqn: string) => boolean,
): Promise<readonly MetricSample[]> {
  const controllers = (await allControllers(host)).filter(({ transport, hostNqn, subsystemNqn }) =>
    transport === "tcp" && isNodeHostNqn(hostNqn) && isOurs(subsystemNqn)
  );
  const devices = (await attachedVolumes(host)).filter(({ subsystemNqn }) => isOurs(subsystemNqn));
  const used = (await volumesInUse(host)).filter(({ subsystemNqn }) => isOurs(subsystemNqn));
  let withoutPath = 0;
  for (const device of devices) {
    if (!(await pathsOf(host, device, controllers)).some(isLivePath)) withoutPath++;
  }
  return [
    ["lbcsi_volumes_attached", [], devices.length],
    ["lbcsi_volumes_in_use", [], used.length],
    ["lbcsi_volumes_without_path", [], withoutPath],
    ["lbcsi_volumes_not_answering", [], host.pending.unanswered.volumes],
    ["lbcsi_longest_unanswered_seconds", [], host.pending.unanswered.longestMs / 1000],
    ...controllers.map(({ isDiscovery, state }): MetricSample => [
      "lbcsi_nvme_connections",
      [isDiscovery ? "discovery" : "io", state],
      1,
    ]),
  ];
}

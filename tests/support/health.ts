/** A controller with the health calls of CSI 1.13 in front of a simulated cluster, for tests. */
import { parseVolumeId } from "../../lib/volume_id.ts";
import { type VolumeHealth, VolumeHealthErrorType as Status } from "../../proto/gen/csi_pb.ts";
import { clusterFileEntry, startControlledCluster } from "./controller_service.ts";
import { blockCapability } from "./node_calls.ts";

/** The controller and the cluster. Dispose it, with `await using`. */
export async function startHealth(
  { volumeHealth = true, clusterFile = true, jwt = true, data = "none" as "none" | "loop" } = {},
) {
  const env = await startControlledCluster({
    simulator: { data },
    controller: (simulator) => ({
      volumeHealth,
      ...(clusterFile
        ? {
          clusterFile: `clusters: [${
            clusterFileEntry("a", simulator, `projects: default${jwt ? ", jwt: /jwt" : ""}`)
          }]`,
        }
        : {}),
      files: { "/jwt": simulator.addresses.jwt },
    }),
  });
  return {
    ...env,
    /** The ID of a new volume. */
    create: async (name: string, capability = blockCapability()): Promise<string> =>
      (await env.createVolume({ name, volumeCapabilities: [capability] })).volumeId,
    protect(volumeId: string, protection: "FullyProtected" | "Degraded" | "ReadOnly" | "NotAvailable"): void {
      env.simulator.control.setVolume(parseVolumeId(volumeId).uuid, { protection });
    },
  };
}

/** What an answer says is wrong, by status and reason, and the messages. */
export function reportedHealth(health: VolumeHealth | undefined) {
  const statuses = health?.healthStatuses ?? [];
  return {
    what: statuses.map(({ status, reason }) => `${Status[status]} ${reason}`),
    messages: statuses.map(({ message }) => message).join("\n"),
  };
}

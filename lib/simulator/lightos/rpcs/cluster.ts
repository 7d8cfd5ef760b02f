/** The RPCs that describe the cluster and its features. */
import {
  ClusterHealth_State,
  ClusterInfo_AuthenticationMode,
  type DurosAPI,
} from "../../../../proto/gen/lightos_pb.ts";
import { simulatorMark } from "../../../check.ts";
import { StatusError } from "../../../error.ts";
import type { Handlers } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import type { SimVolume } from "../model.ts";
import type { ServiceParts } from "./access.ts";

/** Version, cluster and feature flags. */
export function clusterRpcs({ cluster, apiEndpoints }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    getVersion: () => Promise.resolve({ apiVersion: "v2.0" }),
    getCluster: () =>
      Promise.try(() => {
        const count = (protection: SimVolume["protection"]) =>
          cluster.volumes.filter((volume) => volume.protection === protection && volume.state !== "Failed").length;
        const healthy = count("FullyProtected");
        const notAvailable = count("NotAvailable");
        const impaired = count("Degraded") + count("ReadOnly") + notAvailable;
        return {
          ...clusterFacts(cluster, apiEndpoints()),
          statistics: {
            installedPhysicalStorage: cluster.capacityBytes,
            managedPhysicalStorage: cluster.capacityBytes,
            effectivePhysicalStorage: cluster.capacityBytes,
            logicalStorage: cluster.capacityBytes,
            logicalUsedStorage: cluster.reservedBytes,
            physicalUsedStorage: cluster.reservedBytes,
            physicalUsedStorageIncludingParity: cluster.reservedBytes,
            freePhysicalStorage: cluster.freeBytes,
            estimatedFreeLogicalStorage: cluster.freeBytes,
            estimatedLogicalStorage: cluster.capacityBytes,
            compressionRatio: 1,
          },
          health: {
            state: notAvailable > 0
              ? ClusterHealth_State.Error
              : impaired > 0
              ? ClusterHealth_State.Warning
              : ClusterHealth_State.OK,
            numDegradedVolumes: count("Degraded"),
            numReadOnlyVolumes: count("ReadOnly"),
            numNotAvailableVolumes: notAvailable,
            numHealthyVolumes: healthy,
          },
        };
      }),
    getClusterInfo: () =>
      Promise.try(() => ({
        ...clusterFacts(cluster, apiEndpoints()),
        // Only lbcsi doctor reads the ETag here, to recognise a simulator.
        ETag: `${simulatorMark}:${cluster.dataPlane.kind}`,
        nvmeEndpoints: cluster.identity.servers.map(({ nvmeEndpoint }) => nvmeEndpoint),
      })),
    getFeatureFlag: (request) =>
      Promise.try(() => {
        const enabled = cluster.features[request.name];
        if (enabled !== undefined) return { name: request.name, enabled };
        throw new StatusError("INVALID_ARGUMENT", `Cannot get feature flag "${request.name}": it is unknown`);
      }),
    listFeatureFlags: () =>
      Promise.try(() => ({
        featureFlags: Object.fromEntries(
          Object.entries(cluster.features).map(([name, enabled]) => [name, { name, enabled }]),
        ),
      })),
  };
}

function clusterFacts(cluster: Cluster, apiEndpoints: readonly string[]) {
  const { uuid, name, subsystemNqn, servers } = cluster.identity;
  return {
    UUID: uuid,
    subsystemNQN: subsystemNqn,
    clusterName: name,
    currentMaxReplicas: cluster.maxReplicas,
    supportedMaxReplicas: cluster.maxReplicas,
    ETag: "1",
    apiEndpoints: [...apiEndpoints],
    discoveryEndpoints: servers.map(({ discoveryEndpoint }) => discoveryEndpoint),
    inBandAuthMode: cluster.inBandAuthentication
      ? ClusterInfo_AuthenticationMode.Enabled
      : ClusterInfo_AuthenticationMode.Disabled,
  };
}

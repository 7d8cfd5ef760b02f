/** The RPCs of LightOS nodes, storage servers and connected hosts. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  ClusterHealth_State,
  type DurosAPI,
  DurosNodeInfo_State,
  DurosNodeInfo_StatusEnum,
  type DurosNodeInfoSchema,
  Server_RiskOfServiceLossEnum,
  Server_ServerStateEnum,
  type ServerSchema,
} from "../../../../proto/gen/lightos_pb.ts";
import { StatusError } from "../../../error.ts";
import type { CallContext, Handlers } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import type { StorageServer } from "../model.ts";
import type { Access, ServiceParts } from "./access.ts";

/** Nodes, servers and hosts. */
export function serverRpcs({ access, cluster, apiEndpoints }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    listNodes: (request) =>
      Promise.try(() => ({
        nodes: cluster.identity.servers
          .filter((server) =>
            (request.UUID === "" || server.nodeUuid === request.UUID) &&
            (request.name === "" || nodeName(server) === request.name) &&
            (request.failureDomain === "" || server.name === request.failureDomain)
          )
          .map((server) => nodeMessage(cluster, server)),
      })),
    getNode: (request) =>
      Promise.try(() => {
        const server = cluster.identity.servers.find(({ nodeUuid }) => nodeUuid === request.UUID);
        if (server !== undefined) return nodeMessage(cluster, server);
        throw new StatusError("NOT_FOUND", `Cannot find node ${request.UUID}`);
      }),
    listServers: (request) =>
      Promise.try(() => ({
        servers: cluster.identity.servers
          .map((server, number) => ({ server, number }))
          .filter(({ server }) =>
            (request.UUID === "" || server.uuid === request.UUID) &&
            (request.Name === "" || server.name === request.Name)
          )
          .map(({ server, number }) => serverMessage(server, apiEndpoints()[number])),
      })),
    getServer: (request) =>
      Promise.try(() => {
        const number = cluster.identity.servers.findIndex(({ uuid }) => uuid === request.UUID);
        const server = cluster.identity.servers[number];
        if (server !== undefined) return serverMessage(server, apiEndpoints()[number]);
        throw new StatusError("NOT_FOUND", `Cannot find server ${request.UUID}`);
      }),
    getHost: (request, call) =>
      Promise.try(() => {
        const host = connectedHosts(cluster, access, call).find(({ hostNQN }) => hostNQN === request.hostNQN);
        if (host !== undefined) return host;
        throw new StatusError("NOT_FOUND", `Cannot find host ${request.hostNQN}: it is not connected`);
      }),
    listHosts: (request, call) =>
      Promise.try(() => ({
        connectedHosts: connectedHosts(cluster, access, call).filter((host) =>
          (request.hostNQN === "" || host.hostNQN === request.hostNQN) &&
          (request.volumeUUID === "" || host.volumeUUIDs.includes(request.volumeUUID))
        ),
      })),
  };
}

/** The hosts that are connected, each with the volumes that the caller may see and the host may access. */
function connectedHosts(cluster: Cluster, access: Access, call: CallContext) {
  return cluster.dataPlane.connectedHosts().map(({ hostNqn, address, hostname }) => ({
    hostNQN: hostNqn,
    iPAddress: address,
    hostname,
    volumeUUIDs: cluster.volumes
      .filter((volume) => access.mayUse(call, volume.project) && cluster.hostsOf(volume).includes(hostNqn))
      .map(({ uuid }) => uuid),
  }));
}

function nodeName(server: StorageServer): string {
  return `${server.name}-0`;
}

function nodeMessage(cluster: Cluster, server: StorageServer): MessageInitShape<typeof DurosNodeInfoSchema> {
  const share = BigInt(cluster.identity.servers.length);
  return {
    name: nodeName(server),
    UUID: server.nodeUuid,
    state: DurosNodeInfo_State.Active,
    status: DurosNodeInfo_StatusEnum.ConnectivityOK,
    nvmeEndpoint: server.nvmeEndpoint,
    failureDomains: [server.name],
    hostname: server.name,
    numManagedDevices: 4,
    maxNvmeDevices: 24,
    statistics: {
      managedPhysicalStorage: cluster.capacityBytes / share,
      estimatedLogicalStorage: cluster.capacityBytes / share,
      estimatedFreeLogicalStorage: cluster.freeBytes / share,
      compressionRatio: 1,
    },
    serverUUID: server.uuid,
    ETag: "1",
  };
}

function serverMessage(
  server: StorageServer,
  endpoint: string | undefined,
): MessageInitShape<typeof ServerSchema> {
  return {
    UUID: server.uuid,
    name: server.name,
    RiskOfServiceLossState: Server_RiskOfServiceLossEnum.NoRiskOfServiceLoss,
    NodesUUIDs: [server.nodeUuid],
    state: Server_ServerStateEnum.Enabled,
    ServerEndpoints: [server.nvmeEndpoint],
    ETag: "1",
    LightOSVersion: "simulated",
    ApiEndpoints: endpoint === undefined ? [] : [endpoint],
    health: ClusterHealth_State.OK,
  };
}

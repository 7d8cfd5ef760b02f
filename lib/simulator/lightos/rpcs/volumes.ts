/** The RPCs of volumes. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import {
  type DurosAPI,
  ProtectionStateEnum,
  Volume_StateEnum,
  type VolumeSchema,
} from "../../../../proto/gen/lightos_pb.ts";
import type { Handlers } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import type { SimVolume } from "../model.ts";
import type { VolumeChange } from "../volumes.ts";
import type { ServiceParts } from "./access.ts";

/** Creation, look-up, change, rollback and deletion of volumes. */
export function volumeRpcs({ access, cluster }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    createVolume: async (request, call) => {
      const volume = await cluster.createVolume({
        project: access.admit(call, request.projectName),
        name: request.name,
        size: request.size,
        replicaCount: request.replicaCount,
        compression: request.compression,
        acl: request.acl?.values,
        ipAcl: request.IPAcl?.values,
        sectorSizeBytes: request.sectorSize,
        sourceSnapshot: { uuid: request.sourceSnapshotUUID, name: request.sourceSnapshotName },
        qosPolicy: policyRef(request.qosPolicyID),
        labels: request.labels,
      });
      return volumeMessage(cluster, volume);
    },
    getVolume: (request, call) =>
      Promise.try(() =>
        volumeMessage(
          cluster,
          cluster.getVolume({
            project: access.admit(call, request.projectName),
            uuid: request.UUID,
            name: request.name,
          }),
        )
      ),
    listVolumes: (request, call) =>
      Promise.try(() => ({
        volumes: cluster.listVolumes({
          project: access.projectFilter(call, request.projectName),
          uuid: request.UUID,
          name: request.name,
          failureDomain: request.failureDomain,
          offsetUuid: request.offsetUUID,
          limit: Number(request.limit),
          snapshotUuid: request.snapshotUUID,
          showAll: request.showAll,
        }).map((volume) => volumeMessage(cluster, volume)),
      })),
    updateVolume: async (request, call) => {
      const change: VolumeChange = {
        acl: request.acl?.values,
        ipAcl: request.IPAcl?.values,
        size: request.size,
        force: request.Force,
        compression: request.compression,
        newName: request.newName,
        qosPolicy: request.qosPolicyID.case === undefined ? undefined : policyRef(request.qosPolicyID),
        // A repeated field cannot say "none": an empty one leaves the labels alone.
        labels: request.labels.length === 0 ? undefined : request.labels,
      };
      const ref = { project: access.admit(call, request.projectName), uuid: request.UUID, name: request.name };
      await cluster.updateVolume(ref, change, call.header("if-match"));
      return {};
    },
    deleteVolume: (request, call) =>
      Promise.try(() => {
        const ref = { project: access.admit(call, request.projectName), uuid: request.UUID, name: request.name };
        cluster.deleteVolume(ref, call.header("if-match"));
        return {};
      }),
    rollbackVolume: (request, call) =>
      Promise.try(() => {
        const ref = { project: access.admit(call, request.projectName), uuid: request.UUID, name: request.Name };
        cluster.rollbackVolume(ref, { uuid: request.srcSnapshotUUID, name: request.srcSnapshotName });
        return {};
      }),
  };
}

function policyRef(
  id: { readonly case: "qosPolicyUUID" | "qosPolicyName"; readonly value: string } | { readonly case: undefined },
): { uuid: string; name: string } {
  return {
    uuid: id.case === "qosPolicyUUID" ? id.value : "",
    name: id.case === "qosPolicyName" ? id.value : "",
  };
}

function volumeMessage(cluster: Cluster, volume: SimVolume): MessageInitShape<typeof VolumeSchema> {
  return {
    state: Volume_StateEnum[volume.state],
    protectionState: ProtectionStateEnum[volume.protection],
    replicaCount: volume.replicaCount,
    nodeList: [...volume.nodeUuids],
    UUID: volume.uuid,
    nsid: volume.nsid,
    acl: { values: [...volume.acl] },
    compression: String(volume.compression),
    size: volume.sizeBytes,
    name: volume.name,
    rebuildProgress: "",
    statistics: { physicalCapacity: volume.sizeBytes, compressionRatio: 1, totalCompressionRatio: 1 },
    IPAcl: { values: [...volume.ipAcl] },
    ETag: volume.etag,
    connectedHosts: cluster.hostsOf(volume),
    sectorSize: volume.sectorSizeBytes,
    projectName: volume.project,
    sourceSnapshotUUID: volume.sourceSnapshotUuid ?? "",
    sourceSnapshotName: volume.sourceSnapshotName ?? "",
    qosPolicyUUID: volume.qosPolicyUuid ?? "",
    qosPolicyName: cluster.policyName(volume),
    primaryNodeUUID: volume.nodeUuids[0] ?? "",
    creationTime: timestampFromMs(volume.createdAtMs),
    labels: volume.labels.map(({ key, value }) => ({ key, value })),
    clusterId: cluster.identity.uuid,
  };
}

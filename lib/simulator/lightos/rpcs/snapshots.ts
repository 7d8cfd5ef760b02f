/** The RPCs of snapshots, and the list of blocks that changed between two of them. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { type DurosAPI, Snapshot_StateEnum, type SnapshotSchema } from "../../../../proto/gen/lightos_pb.ts";
import type { Handlers } from "../../../grpc/server.ts";
import type { Cluster } from "../cluster.ts";
import type { SimSnapshot } from "../model.ts";
import type { ServiceParts } from "./access.ts";

/** Creation, look-up and deletion of snapshots, and ListChangedBlocks. */
export function snapshotRpcs({ access, cluster }: ServiceParts): Handlers<typeof DurosAPI> {
  return {
    createSnapshot: async (request, call) => {
      const { retentionTime } = request;
      const snapshot = await cluster.createSnapshot({
        project: access.admit(call, request.projectName),
        name: request.name,
        description: request.description,
        source: { uuid: request.sourceVolumeUUID, name: request.sourceVolumeName },
        retentionMs: retentionTime === undefined
          ? undefined
          : Number(retentionTime.seconds) * 1000 + retentionTime.nanos / 1e6,
      });
      return snapshotMessage(cluster, snapshot);
    },
    getSnapshot: (request, call) =>
      Promise.try(() =>
        snapshotMessage(
          cluster,
          cluster.getSnapshot({
            project: access.admit(call, request.projectName),
            uuid: request.UUID,
            name: request.Name,
          }),
        )
      ),
    listSnapshots: (request, call) =>
      Promise.try(() => ({
        snapshots: cluster.listSnapshots({
          project: access.projectFilter(call, request.projectName),
          uuid: request.UUID,
          name: request.Name,
          offsetUuid: request.offsetUUID,
          limit: Number(request.limit),
          showAll: request.showAll,
        }).map((snapshot) => snapshotMessage(cluster, snapshot)),
      })),
    deleteSnapshot: (request, call) =>
      Promise.try(() => {
        cluster.deleteSnapshot({
          project: access.admit(call, request.projectName),
          uuid: request.UUID,
          name: request.name,
        });
        return {};
      }),
    listChangedBlocks: async (request, call) => {
      const withBase = request.baseSnapshotUUID !== "" || request.baseSnapshotName !== "";
      const { snapshot, base } = cluster.changedBlocks(
        access.admit(call, request.projectName),
        { uuid: request.snapshotUUID, name: request.snapshotName },
        withBase ? { uuid: request.baseSnapshotUUID, name: request.baseSnapshotName } : undefined,
      );
      return await changedRanges(cluster, snapshot, base, request.offsetLBA);
    },
  };
}

function snapshotMessage(cluster: Cluster, snapshot: SimSnapshot): MessageInitShape<typeof SnapshotSchema> {
  const { expiresAtMs, createdAtMs } = snapshot;
  return {
    state: Snapshot_StateEnum[snapshot.state],
    UUID: snapshot.uuid,
    name: snapshot.name,
    description: snapshot.description,
    creationTime: timestampFromMs(createdAtMs),
    ...(expiresAtMs === undefined
      ? {}
      : { retentionTime: { seconds: BigInt(Math.floor((expiresAtMs - createdAtMs) / 1000)) } }),
    sourceVolumeUUID: snapshot.sourceVolumeUuid,
    sourceVolumeName: snapshot.sourceVolumeName,
    replicaCount: snapshot.replicaCount,
    nodeList: [...snapshot.nodeUuids],
    nsid: snapshot.nsid,
    compression: snapshot.compression,
    size: snapshot.sizeBytes,
    sectorSize: snapshot.sectorSizeBytes,
    statistics: { physicalCapacity: snapshot.sizeBytes },
    ETag: cluster.behaviour.asDocumented ? snapshot.etag : "",
    projectName: snapshot.project,
    primaryNodeUUID: snapshot.nodeUuids[0] ?? "",
    labels: snapshot.labels.map(({ key, value }) => ({ key, value })),
    clusterId: cluster.identity.uuid,
  };
}

/** Blocks in one range. */
const windowBlocks = 64n;
/** Ranges in one answer. */
const mostRanges = 10_000;

/**
 * The blocks that changed, from block `offset` on.
 *
 * The API's definition names the fields and the rounding to 64 blocks, but not the order of the bits nor whether lbaEnd
 * belongs to the range. Chosen here: one range per 64 blocks, lbaEnd is its last block, bit n of byte n/8 (lowest first) is
 * block n.
 */
async function changedRanges(
  cluster: Cluster,
  snapshot: SimSnapshot,
  base: SimSnapshot | undefined,
  offset: bigint,
) {
  const blocks = snapshot.sizeBytes / BigInt(snapshot.sectorSizeBytes);
  const start = offset - offset % windowBlocks;
  const ranges: { lbaStart: bigint; lbaEnd: bigint; dataBitMap: Uint8Array }[] = [];
  const runs = cluster.dataPlane.changedRuns(snapshot.uuid, base?.uuid, snapshot.sectorSizeBytes, start);
  for await (const run of runs) {
    for (let block = run.start; block < run.end; block++) {
      const lbaStart = block - block % windowBlocks;
      let range = ranges.at(-1);
      if (range?.lbaStart !== lbaStart) {
        if (ranges.length === mostRanges) return { nextOffsetLBA: lbaStart, lbaRanges: ranges };
        const last = lbaStart + windowBlocks <= blocks ? lbaStart + windowBlocks - 1n : blocks - 1n;
        range = { lbaStart, lbaEnd: last, dataBitMap: new Uint8Array(8) };
        ranges.push(range);
      }
      const bit = Number(block - lbaStart);
      range.dataBitMap[bit >> 3] = (range.dataBitMap[bit >> 3] ?? 0) | (1 << (bit & 7));
    }
  }
  return { nextOffsetLBA: 0n, lbaRanges: ranges };
}

/**
 * The CSI SnapshotMetadata service (alpha): which blocks of a snapshot a backup has to read. Served only with the
 * option `--snapshot-metadata`.
 */
import { BlockMetadataType, type SnapshotMetadata } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Handlers } from "../../grpc/server.ts";
import { Secrets } from "../../secrets.ts";
import type { BlockRange, ChangedBlocks } from "../../storage/backend.ts";
import { longestVolumeId, requireText } from "../request.ts";

/** Tuples in one message when the caller sets no limit: about 18 KiB. */
const tuplesPerMessage = 1024;

interface BlocksRequest {
  readonly snapshotId: string;
  readonly baseSnapshotId: string | undefined;
  readonly startingOffset: bigint;
  readonly maxResults: number;
  readonly secrets: Readonly<Record<string, string>>;
}

/** The SnapshotMetadata service over a backend that knows changed blocks. */
export function snapshotMetadataHandlers(blocks: ChangedBlocks): Handlers<typeof SnapshotMetadata> {
  return {
    /** CSI specification, "GetMetadataAllocated". */
    getMetadataAllocated(request, call) {
      const ctx = call.doing("list allocated blocks");
      const snapshotId = requireText(ctx, "snapshot_id", request.snapshotId, longestVolumeId);
      return streamBlocks(blocks, ctx, { ...request, snapshotId, baseSnapshotId: undefined });
    },

    /** CSI specification, "GetMetadataDelta". */
    getMetadataDelta(request, call) {
      const ctx = call.doing("list changed blocks");
      const baseSnapshotId = requireText(ctx, "base_snapshot_id", request.baseSnapshotId, longestVolumeId);
      const snapshotId = requireText(ctx, "target_snapshot_id", request.targetSnapshotId, longestVolumeId);
      return streamBlocks(blocks, ctx, { ...request, snapshotId, baseSnapshotId });
    },
  };
}

async function* streamBlocks(blocks: ChangedBlocks, ctx: RequestContext, request: BlocksRequest) {
  const { snapshotId, baseSnapshotId, startingOffset, maxResults } = request;
  if (maxResults < 0) throw ctx.error("INVALID_ARGUMENT", `max_results ${maxResults} is negative`);
  const { capacityBytes, pages } = await blocks.changedBlocks(ctx, new Secrets(request.secrets), {
    snapshotId,
    baseSnapshotId,
    startingOffsetBytes: startingOffset,
  });
  const most = maxResults === 0 ? tuplesPerMessage : Math.min(maxResults, tuplesPerMessage);
  const message = (ranges: readonly BlockRange[]) => ({
    blockMetadataType: BlockMetadataType.VARIABLE_LENGTH,
    volumeCapacityBytes: capacityBytes,
    blockMetadata: ranges.map(({ offsetBytes, lengthBytes }) => ({ byteOffset: offsetBytes, sizeBytes: lengthBytes })),
  });
  let sent = false;
  for await (const ranges of pages) {
    for (let at = 0; at < ranges.length; at += most) {
      yield message(ranges.slice(at, at + most));
      sent = true;
    }
  }
  // One empty message, so that the caller learns the size of a snapshot without blocks.
  if (!sent) yield message([]);
}

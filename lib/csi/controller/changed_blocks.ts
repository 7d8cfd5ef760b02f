/**
 * The CSI SnapshotMetadata service (alpha): which blocks of a snapshot a backup has to read. Announced by a switch only,
 * see main.ts.
 */
import { Secrets } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { CallContext, Handlers } from "../../grpc/server.ts";
import type { BlockRange, ChangedBlocks } from "../../storage/backend.ts";
import { BlockMetadataType, type SnapshotMetadata } from "../../../proto/gen/csi_pb.ts";
import { longestVolumeId, requireText } from "../request.ts";

/** Tuples in one message when the caller does not say: 18 KiB or so. */
const tuplesPerMessage = 1024;

interface Wanted {
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
      const snapshotId = requireText("list allocated blocks", "snapshot_id", request.snapshotId, longestVolumeId);
      return stream(blocks, call, "list allocated blocks", { ...request, snapshotId, baseSnapshotId: undefined });
    },

    /** CSI specification, "GetMetadataDelta". */
    getMetadataDelta(request, call) {
      const action = "list changed blocks";
      const baseSnapshotId = requireText(action, "base_snapshot_id", request.baseSnapshotId, longestVolumeId);
      const snapshotId = requireText(action, "target_snapshot_id", request.targetSnapshotId, longestVolumeId);
      return stream(blocks, call, action, { ...request, snapshotId, baseSnapshotId });
    },
  };
}

async function* stream(blocks: ChangedBlocks, call: CallContext, action: string, wanted: Wanted) {
  if (wanted.maxResults < 0) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: max_results ${wanted.maxResults} is negative`);
  }
  const { capacityBytes, pages } = await blocks.changedBlocks(call, new Secrets(wanted.secrets), {
    snapshotId: wanted.snapshotId,
    baseSnapshotId: wanted.baseSnapshotId,
    startingOffsetBytes: wanted.startingOffset,
  });
  const most = wanted.maxResults === 0 ? tuplesPerMessage : Math.min(wanted.maxResults, tuplesPerMessage);
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
  // So that a caller learns the size of a snapshot without blocks too.
  if (!sent) yield message([]);
}

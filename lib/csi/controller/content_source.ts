/** The snapshot or volume that a new volume is a copy of. */
import type { VolumeContentSource } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { ContentSource } from "../../storage/backend.ts";
import { longestVolumeId, requireText } from "../request.ts";

/**
 * The content source of a CreateVolume request; undefined when it has none.
 *
 * @throws StatusError INVALID_ARGUMENT for one of an unknown type (the volume would be made without its content) or
 *   without an ID
 */
export function parseContentSource(
  ctx: RequestContext,
  source: VolumeContentSource | undefined,
): ContentSource | undefined {
  if (source === undefined) return undefined;
  const field = "volume_content_source";
  switch (source.type.case) {
    case "snapshot": {
      const { snapshotId } = source.type.value;
      return { type: "snapshot", id: requireText(ctx, `${field}.snapshot.snapshot_id`, snapshotId, longestVolumeId) };
    }
    case "volume": {
      const { volumeId } = source.type.value;
      return { type: "volume", id: requireText(ctx, `${field}.volume.volume_id`, volumeId, longestVolumeId) };
    }
    case undefined:
      throw ctx.error("INVALID_ARGUMENT", `${field} is neither a snapshot nor a volume`);
  }
}

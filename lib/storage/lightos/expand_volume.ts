/** ControllerExpandVolume on LightOS (facts: docs/reference/lightos-api.md sections 6.8 and 9.3). */
import { parseVolumeId } from "../../volume_id.ts";
import type { Expansion } from "../backend.ts";
import type { ClusterPool } from "./pool.ts";
import { volumeSize } from "./size.ts";
import { changeVolume, toVolume } from "./volumes.ts";

/** The expansion part of the LightOS backend. */
export function lightosExpansion(clusters: ClusterPool): Expansion {
  return {
    async expandVolume(call, secrets, volumeId, range) {
      const id = parseVolumeId(volumeId);
      const ctx = call.doing(`expand volume ${id.uuid}`);
      const sizeBytes = volumeSize(ctx, range);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const grown = await changeVolume(ctx, cluster, id, {
        decide: (volume) => {
          if (volume.size < sizeBytes) return { size: String(sizeBytes) };
          if (range.limitBytes === 0n || volume.size <= range.limitBytes) return undefined;
          throw ctx.error(
            "OUT_OF_RANGE",
            `it has ${volume.size} bytes, above limit_bytes ${range.limitBytes}, and is never shrunk`,
          );
        },
        confirmation: "trust the answer",
      });
      // The volume may have been read before LightOS confirmed that it has grown.
      const size = grown.size < sizeBytes ? sizeBytes : grown.size;
      return toVolume(id, { ...grown, size });
    },
  };
}

/**
 * The health calls of CSI 1.13 on the controller (docs/reference/csi.md section 20).
 * They are announced and served only with a switch, because tools that were made for 1.12 fail on their capability
 * numbers.
 *
 * A healthy volume is answered without a condition, from which the orchestrator learns that it has recovered. A call
 * that fails says nothing about the volume.
 */
import type { Controller } from "../../../proto/gen/csi_pb.ts";
import type { Handlers } from "../../grpc/server.ts";
import { Secrets } from "../../secrets.ts";
import type { StorageBackend } from "../../storage/backend.ts";
import { longestVolumeId, requireText } from "../request.ts";
import { toVolumeHealth } from "../volume_health.ts";
import { parsePageRequest } from "./paging.ts";

/** ControllerGetVolumeHealth, and ControllerListVolumeHealth for a backend that has clusters of its own. */
export function healthHandlers(backend: StorageBackend) {
  const { listing } = backend;
  return {
    /** CSI specification 1.13, "ControllerGetVolumeHealth". */
    async controllerGetVolumeHealth(request, call) {
      const ctx = call.doing("report the health of a volume");
      const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
      const { condition } = await backend.getVolume(ctx, new Secrets(request.secrets), volumeId);
      // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
      return { volumeHealth: toVolumeHealth(volumeId, condition === undefined ? [] : [condition]) };
    },

    ...(listing === undefined ? {} : {
      /** CSI specification 1.13, "ControllerListVolumeHealth". */
      async controllerListVolumeHealth(request, call) {
        const ctx = call.doing("list the health of volumes");
        const page = parsePageRequest(ctx, request);
        const { entries, nextToken } = await listing.listAbnormal(ctx, new Secrets(request.secrets), page);
        return {
          entries: entries.flatMap(({ id, condition }) =>
            condition === undefined ? [] : [toVolumeHealth(id, [condition])]
          ),
          nextToken,
        };
      },
    } satisfies Handlers<typeof Controller>),
  } satisfies Handlers<typeof Controller>;
}

/** ControllerExpandVolume: grows volumes that may be in use. */
import type { Controller } from "../../../proto/gen/csi_pb.ts";
import type { Handlers } from "../../grpc/server.ts";
import { Secrets } from "../../secrets.ts";
import type { Expansion } from "../../storage/backend.ts";
import { longestVolumeId, parseCapability, requireText, statedCapability } from "../request.ts";
import { withFullClusterCode } from "./full_cluster.ts";
import { type ControllerOptions, lockVolume } from "./options.ts";

/** The call of the Controller service that grows volumes, for a backend that can. */
export function expansionHandlers(controller: ControllerOptions, expansion: Expansion) {
  return {
    /** CSI specification, "ControllerExpandVolume". */
    async controllerExpandVolume(request, call) {
      const ctx = call.doing("expand a volume");
      const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
      const range = request.capacityRange;
      if (range === undefined) throw ctx.error("INVALID_ARGUMENT", "capacity_range is missing");
      const capability = statedCapability(request.volumeCapability);
      if (capability !== undefined) parseCapability(ctx, capability);
      using _held = lockVolume(controller, "ControllerExpandVolume", volumeId);
      const { capacityBytes } = await withFullClusterCode(
        "OUT_OF_RANGE",
        "; ask for less, in Kubernetes by a smaller size in the claim, or make room on the cluster",
        () => expansion.expandVolume(ctx, new Secrets(request.secrets), volumeId, range),
      );
      // For block devices too: the node makes sure that the kernel shows the new size, and answers the size of the
      // device.
      return { capacityBytes, nodeExpansionRequired: true };
    },
  } satisfies Handlers<typeof Controller>;
}

/** VolumeAttributesClass: ControllerModifyVolume for volumes in use, and mutable parameters of new volumes. */
import type { Controller } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Handlers } from "../../grpc/server.ts";
import { Secrets } from "../../secrets.ts";
import type { Modification } from "../../storage/backend.ts";
import { longestVolumeId, requireText, withoutOrchestratorKeys } from "../request.ts";
import { withFullClusterCode } from "./full_cluster.ts";
import { type ControllerOptions, lockVolume } from "./options.ts";

/** The call of the Controller service that changes parameters, for a backend that can. */
export function modificationHandlers(controller: ControllerOptions, modification: Modification) {
  return {
    /** CSI specification, "ControllerModifyVolume". */
    async controllerModifyVolume(request, call) {
      const ctx = call.doing("modify a volume");
      const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
      if (Object.keys(request.mutableParameters).length === 0) {
        throw ctx.error("INVALID_ARGUMENT", "mutable_parameters is missing");
      }
      const mutable = withoutOrchestratorKeys(request.mutableParameters);
      // Bad parameters are an error before an unknown volume is.
      modification.merge(ctx, {}, mutable);
      using _held = lockVolume(controller, "ControllerModifyVolume", volumeId);
      await withFullClusterCode(
        "FAILED_PRECONDITION",
        "; make room on the cluster, or choose another class",
        () => modification.modifyVolume(ctx, new Secrets(request.secrets), volumeId, mutable),
      );
      return {};
    },
  } satisfies Handlers<typeof Controller>;
}

/** The parameters of a new volume, with mutable ones in place of those that they replace. Throws INVALID_ARGUMENT. */
export function mergeMutable(
  ctx: RequestContext,
  modification: Modification | undefined,
  parameters: Readonly<Record<string, string>>,
  given: Readonly<Record<string, string>>,
): Readonly<Record<string, string>> {
  const mutable = withoutOrchestratorKeys(given);
  if (Object.keys(mutable).length === 0) return parameters;
  if (modification !== undefined) return modification.merge(ctx, parameters, mutable);
  throw ctx.error(
    "INVALID_ARGUMENT",
    "mutable_parameters is given, but this driver does not announce MODIFY_VOLUME",
  );
}

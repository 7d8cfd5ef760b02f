/** Changing parameters of volumes that are in use, and giving them to new ones: VolumeAttributesClass. */
import { type RequestContext, Secrets } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { Modification } from "../../storage/backend.ts";
import type { Controller } from "../../../proto/gen/csi_pb.ts";
import { whenFull } from "./full_cluster.ts";
import { longestVolumeId, requireText, withoutOrchestratorKeys } from "../request.ts";

/** @param hold takes a volume for a call, or throws ABORTED */
export function modifyHandlers(modification: Modification, hold: (rpc: string, volumeId: string) => Disposable) {
  return {
    /** CSI specification, "ControllerModifyVolume". */
    async controllerModifyVolume(request, call) {
      const action = "modify a volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      if (Object.keys(request.mutableParameters).length === 0) {
        throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: mutable_parameters is missing`);
      }
      const mutable = withoutOrchestratorKeys(request.mutableParameters);
      // Bad parameters are told before an unknown volume is.
      modification.merge(call.doing(action), {}, mutable);
      using _held = hold("ControllerModifyVolume", volumeId);
      await whenFull(
        "FAILED_PRECONDITION",
        "; make room on the cluster, or choose another class",
        () => modification.modifyVolume(call, new Secrets(request.secrets), volumeId, mutable),
      );
      return {};
    },
  } satisfies Handlers<typeof Controller>;
}

/** The parameters of a new volume, with mutable ones in place of those that they replace. Throws INVALID_ARGUMENT. */
export function withMutable(
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

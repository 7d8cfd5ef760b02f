/**
 * The health calls of CSI 1.13 on the controller, and how trouble is worded in them (docs/reference/csi.md section 20). They are
 * announced and served behind a switch, for their capability numbers fail tools that were made for 1.12.
 *
 * A volume that is well is answered with nothing, which tells the orchestrator that it has recovered. A call that fails
 * tells nothing.
 */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Secrets } from "../../context.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { AbnormalCondition, StorageBackend } from "../../storage/backend.ts";
import {
  type Controller,
  VolumeHealthErrorType as Status,
  type VolumeHealthSchema,
} from "../../../proto/gen/csi_pb.ts";
import { pageRequest } from "./listing.ts";
import { longestVolumeId, requireText } from "../request.ts";

/** ControllerGetVolumeHealth, and ControllerListVolumeHealth for a backend that has clusters of its own. */
export function healthHandlers(backend: StorageBackend) {
  const { listing } = backend;
  return {
    /** CSI specification 1.13, "ControllerGetVolumeHealth". */
    async controllerGetVolumeHealth(request, call) {
      const action = "tell the health of a volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const { condition } = await backend.getVolume(call, new Secrets(request.secrets), volumeId);
      // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
      return { volumeHealth: toVolumeHealth(volumeId, condition === undefined ? [] : [condition]) };
    },

    ...(listing === undefined ? {} : {
      /** CSI specification 1.13, "ControllerListVolumeHealth". */
      async controllerListVolumeHealth(request, call) {
        const wanted = pageRequest("list the health of volumes", request);
        const { entries, nextToken } = await listing.listAbnormal(call, new Secrets(request.secrets), wanted);
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

type VolumeHealth = MessageInitShape<typeof VolumeHealthSchema>;

/**
 * A volume's health as CSI words it. What cannot be used is INACCESSIBLE, also when only writes fail: DEGRADED is for
 * volumes that can be used. DATA_LOSS is never said, for neither cluster nor node can tell it.
 */
export function toVolumeHealth(volumeId: string, conditions: readonly AbnormalCondition[]): VolumeHealth {
  return {
    volumeId,
    healthStatuses: conditions.map(({ usable, reason, message }) => ({
      status: usable ? Status.DEGRADED : Status.INACCESSIBLE,
      reason,
      message: clipped(message),
    })),
  };
}

/** At most the 1024 bytes that Kubernetes has for a message. */
export function clipped(message: string): string {
  const { read } = new TextEncoder().encodeInto(message, new Uint8Array(1024));
  if (read === message.length) return message;
  const { read: fits } = new TextEncoder().encodeInto(message, new Uint8Array(1024 - 4));
  return `${message.slice(0, fits)} …`;
}

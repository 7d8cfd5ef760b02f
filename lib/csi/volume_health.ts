/** Conditions of volumes, as the health calls of CSI 1.13 report them on controller and node. */
import type { MessageInitShape } from "@bufbuild/protobuf";
import { VolumeHealthErrorType as Status, type VolumeHealthSchema } from "../../proto/gen/csi_pb.ts";
import type { AbnormalCondition } from "../storage/backend.ts";

/**
 * A volume's conditions in CSI's words. A volume that cannot be used is INACCESSIBLE, also when only writes fail:
 * DEGRADED is for volumes that can be used. DATA_LOSS never occurs, because neither cluster nor node can detect it.
 */
export function toVolumeHealth(
  volumeId: string,
  conditions: readonly AbnormalCondition[],
): MessageInitShape<typeof VolumeHealthSchema> {
  return {
    volumeId,
    healthStatuses: conditions.map(({ usable, reason, message }) => ({
      status: usable ? Status.DEGRADED : Status.INACCESSIBLE,
      reason,
      message: clipMessage(message),
    })),
  };
}

/** A message, cut to the 1024 bytes that Kubernetes stores. */
export function clipMessage(message: string): string {
  const { read } = new TextEncoder().encodeInto(message, new Uint8Array(1024));
  if (read === message.length) return message;
  const { read: fits } = new TextEncoder().encodeInto(message, new Uint8Array(1024 - 4));
  return `${message.slice(0, fits)} …`;
}

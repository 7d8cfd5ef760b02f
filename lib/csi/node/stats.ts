/** NodeGetVolumeStats: how full a volume is, and its condition. */
import { type NodeGetVolumeStatsRequest, VolumeUsage_Unit as Unit } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { inlineUuid, isInlineId } from "../inline/inline_id.ts";
import { longestPath, longestVolumeId, requireText } from "../request.ts";
import { probeDeadMount, probeDevice, probeMount, type VolumeReport } from "./condition.ts";
import type { NodeParts } from "./options.ts";
import { findAtPath, type ShownVolume } from "./volume_path.ts";

/**
 * CSI specification, "NodeGetVolumeStats" (docs/reference/csi.md 7.7, 11). A path that does not show this volume is
 * NOT_FOUND. A volume that is dead, does not answer or has become read-only is answered with that condition.
 */
export async function nodeGetVolumeStats(node: NodeParts, request: NodeGetVolumeStatsRequest, call: RequestContext) {
  const parsing = call.doing("measure the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const given = requireText(parsing, "volume_path", request.volumePath, longestPath);
  const id = isInlineId(volumeId) ? { uuid: await inlineUuid(node.host, volumeId, given) } : node.parseId(volumeId);
  const ctx = call.with({ volume: id.uuid }).doing(`measure the volume ${id.uuid}`);
  const shown = await findAtPath(node.host, ctx, id, given);
  const { usage, condition } = await probeShown(node, ctx, id.uuid, shown);
  // Logged, because kubelet shows a condition only where its administrator has switched that on.
  if (condition !== undefined) {
    ctx.log.warning("found an abnormal volume condition", { path: given, error: condition.message });
  }
  return {
    usage: usage === undefined ? sizeOnly(shown) : usageEntries(usage),
    volumeCondition: { abnormal: condition !== undefined, message: condition?.message ?? "healthy" },
  };
}

function probeShown(node: NodeParts, ctx: RequestContext, uuid: string, shown: ShownVolume): Promise<VolumeReport> {
  switch (shown.kind) {
    case "mount":
      return probeMount(node, ctx, shown.device, shown.mount);
    case "block":
      return probeDevice(node, ctx, shown.device);
    case "dead":
      return probeDeadMount(node, ctx, uuid, shown.mount);
  }
}

/** Kubelet ignores a condition that comes without any usage. */
function sizeOnly(shown: ShownVolume) {
  return shown.kind === "dead" ? [] : [{ unit: Unit.BYTES, total: shown.device.sizeBytes }];
}

function usageEntries(usage: NonNullable<VolumeReport["usage"]>) {
  return [
    {
      unit: Unit.BYTES,
      total: usage.totalBytes,
      available: usage.availableBytes,
      used: usage.totalBytes - usage.freeBytes,
    },
    {
      unit: Unit.INODES,
      total: usage.totalInodes,
      available: usage.freeInodes,
      used: usage.totalInodes - usage.freeInodes,
    },
  ];
}

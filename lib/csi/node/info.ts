/** NodeGetInfo and NodeGetCapabilities: which node this is, and what its service can do. */
import { NodeServiceCapability_RPC_Type as Capability } from "../../../proto/gen/csi_pb.ts";
import type { NodeParts } from "./options.ts";

/** CSI specification, "NodeGetInfo" (docs/reference/csi.md 7.2). */
export function nodeGetInfo({ nodeId, maxVolumes = 0 }: NodeParts) {
  return Promise.resolve({ nodeId, maxVolumesPerNode: BigInt(maxVolumes) });
}

/** CSI specification, "NodeGetCapabilities" (docs/reference/csi.md 7.1). */
export function nodeGetCapabilities({ canExpand, volumeHealth = false }: NodeParts) {
  const types = [
    Capability.STAGE_UNSTAGE_VOLUME,
    Capability.GET_VOLUME_STATS,
    Capability.VOLUME_CONDITION,
    ...(canExpand ? [Capability.EXPAND_VOLUME] : []),
    Capability.SINGLE_NODE_MULTI_WRITER,
    ...(volumeHealth ? [Capability.GET_VOLUME_HEALTH, Capability.GET_STORAGE_HEALTH] : []),
  ];
  return Promise.resolve({
    capabilities: types.map((type) => ({ type: { case: "rpc" as const, value: { type } } })),
  });
}

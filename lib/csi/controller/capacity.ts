/** GetCapacity: the space for new volumes. It changes nothing, so it locks nothing. */
import type { Controller, VolumeCapability } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { StorageBackend } from "../../storage/backend.ts";
import {
  assertNoTopology,
  isShared,
  mkfsOptionsKey,
  parseCapability,
  statedCapability,
  withoutOrchestratorKeys,
} from "../request.ts";

/** GetCapacity. It answers UNIMPLEMENTED while the backend has no part for it. */
export function capacityHandlers(backend: Pick<StorageBackend, "capacity" | "oneHostOnly">) {
  return {
    /**
     * CSI specification, "GetCapacity". The largest volume may have all the free space: no other bound is known.
     * Capabilities are advice: for volumes that CreateVolume would reject there is no space, and incomplete
     * capabilities are ignored. After an error, csi-provisioner publishes nothing, and pods whose volumes bind late
     * stay pending for ever.
     */
    async getCapacity(request, call) {
      const ctx = call.doing("measure the capacity");
      const { capacity } = backend;
      if (capacity === undefined) {
        throw call.doing("serve GetCapacity").error(
          "UNIMPLEMENTED",
          "the controller has no credentials of its own now, and this call brings none",
        );
      }
      const topology = request.accessibleTopology;
      assertNoTopology(ctx, "accessible_topology", topology === undefined ? [] : [topology]);
      // Parameters for the node do not affect the space.
      const { [mkfsOptionsKey]: _, ...parameters } = withoutOrchestratorKeys(request.parameters);
      const { availableBytes, minimumVolumeBytes } = await capacity.getCapacity(ctx, parameters);
      const isPossible = request.volumeCapabilities.every((capability) => isServed(ctx, backend, capability));
      return { availableCapacity: isPossible ? availableBytes : 0n, minimumVolumeSize: minimumVolumeBytes };
    },
  } satisfies Handlers<typeof Controller>;
}

/** Whether CreateVolume would accept a capability. */
function isServed(
  ctx: RequestContext,
  backend: Pick<StorageBackend, "oneHostOnly">,
  capability: VolumeCapability,
): boolean {
  if (statedCapability(capability) === undefined) return true;
  try {
    const { mode } = parseCapability(ctx, capability);
    return backend.oneHostOnly === undefined || !isShared(mode);
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    return false;
  }
}

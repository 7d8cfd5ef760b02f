/**
 * The calls of the CSI controller service that tell what is there: lists, one volume, and the space that is left.
 *
 * None of them changes anything, so none holds a volume: an attach may go on while the lists are read.
 */
import { Secrets } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { nodeIdOf } from "../../namespace.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { Listing, StorageBackend, Volume } from "../../storage/backend.ts";
import type { Controller, VolumeCapability } from "../../../proto/gen/csi_pb.ts";
import {
  assertNoTopology,
  isShared,
  longestVolumeId,
  mkfsOptionsKey,
  parseCapability,
  requireText,
  statedCapability,
  withoutOrchestratorKeys,
} from "../request.ts";

/** ListVolumes and ControllerGetVolume, for a backend that has clusters of its own. */
export function listingHandlers(backend: StorageBackend, listing: Listing) {
  return {
    /** CSI specification, "ListVolumes". */
    async listVolumes(request, call) {
      const page = await listing.listVolumes(call, pageRequest("list volumes", request));
      return { entries: page.entries.map(describeVolume), nextToken: page.nextToken };
    },

    /** CSI specification, "ControllerGetVolume". */
    async controllerGetVolume(request, call) {
      const volumeId = requireText("describe a volume", "volume_id", request.volumeId, longestVolumeId);
      const { volume, status } = describeVolume(await backend.getVolume(call, new Secrets(), volumeId));
      // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
      return { volume: { ...volume, volumeId }, status };
    },
  } satisfies Handlers<typeof Controller>;
}

/** GetCapacity, which answers UNIMPLEMENTED while the backend has no part for it. */
export function capacityHandlers(backend: Pick<StorageBackend, "capacity" | "oneHostOnly">) {
  return {
    /**
     * CSI specification, "GetCapacity". The largest volume is what is left: no other bound is known. Capabilities are advice:
     * there is no space for volumes that CreateVolume would refuse, and what is not given asks for nothing. After an error,
     * csi-provisioner publishes nothing, and pods whose volumes bind late then pend for ever.
     */
    async getCapacity(request, call) {
      const action = "measure the capacity";
      const { capacity } = backend;
      if (capacity === undefined) {
        throw new StatusError(
          "UNIMPLEMENTED",
          "Cannot serve GetCapacity: the controller has no credentials of its own now, and this call brings none",
        );
      }
      const topology = request.accessibleTopology;
      assertNoTopology(action, "accessible_topology", topology === undefined ? [] : [topology]);
      // What is for the node does not take space.
      const { [mkfsOptionsKey]: _, ...parameters } = withoutOrchestratorKeys(request.parameters);
      const { availableBytes, minimumVolumeBytes } = await capacity.getCapacity(call, parameters);
      const isPossible = request.volumeCapabilities.every((capability) => isServed(action, backend, capability));
      return { availableCapacity: isPossible ? availableBytes : 0n, minimumVolumeSize: minimumVolumeBytes };
    },
  } satisfies Handlers<typeof Controller>;
}

/** Whether CreateVolume would take a capability. */
function isServed(
  action: string,
  backend: Pick<StorageBackend, "oneHostOnly">,
  capability: VolumeCapability,
): boolean {
  if (statedCapability(capability) === undefined) return true;
  try {
    const { mode } = parseCapability(action, capability);
    return backend.oneHostOnly === undefined || !isShared(mode);
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    return false;
  }
}

/** The page that a request asks for; throws INVALID_ARGUMENT for a negative number of entries. */
export function pageRequest(action: string, request: { readonly maxEntries: number; readonly startingToken: string }) {
  const { maxEntries, startingToken } = request;
  if (maxEntries >= 0) return { maxEntries, startingToken };
  throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: max_entries ${maxEntries} is negative`);
}

function describeVolume({ id, capacityBytes, hosts, condition }: Volume) {
  return {
    volume: { volumeId: id, capacityBytes },
    status: {
      // Hosts that were let in by somebody else are no nodes of the orchestrator's.
      publishedNodeIds: hosts.filter((nqn) => nodeIdOf(nqn) !== nqn).map(nodeIdOf),
      volumeCondition: { abnormal: condition !== undefined, message: condition?.message ?? "healthy" },
    },
  };
}

/** ListVolumes and ControllerGetVolume. They change nothing, so they lock nothing: an attach may run beside them. */
import type { Controller } from "../../../proto/gen/csi_pb.ts";
import type { Handlers } from "../../grpc/server.ts";
import { nodeIdOf } from "../../namespace.ts";
import { Secrets } from "../../secrets.ts";
import type { Listing, StorageBackend, Volume } from "../../storage/backend.ts";
import { longestVolumeId, requireText } from "../request.ts";
import { parsePageRequest } from "./paging.ts";

/** ListVolumes and ControllerGetVolume, for a backend that has clusters of its own. */
export function listingHandlers(backend: StorageBackend, listing: Listing) {
  return {
    /** CSI specification, "ListVolumes". */
    async listVolumes(request, call) {
      const ctx = call.doing("list volumes");
      const page = await listing.listVolumes(ctx, parsePageRequest(ctx, request));
      return { entries: page.entries.map(describeVolume), nextToken: page.nextToken };
    },

    /** CSI specification, "ControllerGetVolume". */
    async controllerGetVolume(request, call) {
      const ctx = call.doing("describe a volume");
      const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
      const { volume, status } = describeVolume(await backend.getVolume(ctx, new Secrets(), volumeId));
      // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
      return { volume: { ...volume, volumeId }, status };
    },
  } satisfies Handlers<typeof Controller>;
}

function describeVolume({ id, capacityBytes, hosts, condition }: Volume) {
  return {
    volume: { volumeId: id, capacityBytes },
    status: {
      // A host that got access by other means is not a node of the orchestrator.
      publishedNodeIds: hosts.filter((nqn) => nodeIdOf(nqn) !== nqn).map(nodeIdOf),
      volumeCondition: { abnormal: condition !== undefined, message: condition?.message ?? "healthy" },
    },
  };
}

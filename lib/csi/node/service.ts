/**
 * The CSI node service: turns a place on the cluster into a device, a mount, a path in a pod. One file per call.
 *
 * No state is kept between calls. Each call looks at sysfs, the device and the mount table, does what is missing, and
 * leaves the rest. So a repeated call continues where the last one ended, however that ended, and unstage and unpublish
 * undo any part of stage and publish. One call at a time runs per volume; a second one fails with ABORTED, naming the
 * call that runs.
 *
 * Order of checks: docs/reference/csi.md 2.3.
 */
import type { Node } from "../../../proto/gen/csi_pb.ts";
import type { Handlers } from "../../grpc/server.ts";
import { inlineVolumes } from "../inline/inline_volumes.ts";
import { nodeExpandVolume } from "./expand.ts";
import { nodeGetStorageHealth, nodeGetVolumeHealth } from "./health.ts";
import { nodeGetCapabilities, nodeGetInfo } from "./info.ts";
import type { NodeOptions, NodeParts } from "./options.ts";
import { nodePublishVolume } from "./publish.ts";
import { nodeStageVolume } from "./stage.ts";
import { nodeGetVolumeStats } from "./stats.ts";
import { nodeUnpublishVolume } from "./unpublish.ts";
import { nodeUnstageVolume } from "./unstage.ts";

/** The handlers of CSI's Node service. The health calls of CSI 1.13 answer UNIMPLEMENTED without `volumeHealth`. */
export function nodeHandlers(options: NodeOptions): Handlers<typeof Node> {
  const node: NodeParts = {
    ...options,
    inline: options.inline ?? inlineVolumes({ ...options, volumes: undefined }),
  };
  return {
    nodeStageVolume: (request, call) => nodeStageVolume(node, request, call),
    nodeUnstageVolume: (request, call) => nodeUnstageVolume(node, request, call),
    nodePublishVolume: (request, call) => nodePublishVolume(node, request, call),
    nodeUnpublishVolume: (request, call) => nodeUnpublishVolume(node, request, call),
    nodeGetVolumeStats: (request, call) => nodeGetVolumeStats(node, request, call),
    nodeExpandVolume: (request, call) => nodeExpandVolume(node, request, call),
    nodeGetInfo: () => nodeGetInfo(node),
    nodeGetCapabilities: () => nodeGetCapabilities(node),
    ...(options.volumeHealth
      ? {
        nodeGetVolumeHealth: (request, call) => nodeGetVolumeHealth(node, request, call),
        nodeGetStorageHealth: () => nodeGetStorageHealth(node),
      } satisfies Handlers<typeof Node>
      : {}),
  };
}

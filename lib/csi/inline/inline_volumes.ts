/**
 * CSI inline volumes: volumes that are written into a pod, made when the pod starts on this node and removed after it
 * (docs/reference/csi.md section 15).
 *
 * Only the node is called for them. NodePublishVolume makes the volume on the cluster, lets this host connect,
 * attaches, formats, and mounts it at the target path itself, without staging. NodeUnpublishVolume, which gets only the
 * volume ID and the target path, undoes any part of that. Each looks at the machine and the cluster first and does what
 * is missing.
 *
 * The target directory is made before anything on the cluster is, and removed after everything there has gone. So a
 * node that cannot reach the cluster can still distinguish a volume that may be left from one that never existed.
 *
 * A final answer makes the orchestrator forget the volume without another call. So once there may be something on the
 * cluster, publish fails with UNAVAILABLE, whatever the reason: then the orchestrator asks for its removal in the end.
 */
import type { InlineOptions, InlineVolumes } from "./options.ts";
import { publishInlineVolume } from "./publish.ts";
import { sweepInlineVolumes } from "./sweep.ts";
import { unpublishInlineVolume } from "./unpublish.ts";

/** The inline volumes of a node. */
export function inlineVolumes(options: InlineOptions): InlineVolumes {
  return {
    publish: (request, call) => publishInlineVolume(options, request, call),
    unpublish: (request, call) => unpublishInlineVolume(options, request, call),
    sweep: (ctx) => sweepInlineVolumes(options, ctx),
  };
}

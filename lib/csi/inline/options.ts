/** What the calls for inline volumes need. */
import type { NodePublishVolumeRequest, NodeUnpublishVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import type { Host } from "../../host/host.ts";
import type { KeyedLock } from "../../lock.ts";
import type { InlineVolumeStore } from "../../storage/backend.ts";
import type { VolumeLimit } from "../node/limit.ts";

export interface InlineOptions {
  readonly host: Host;
  readonly attacher: Attacher;
  /** `volume <CSI volume ID>` is taken here. */
  readonly locks: KeyedLock;
  readonly nodeId: string;
  readonly defaultFsType: FsType;
  /** Undefined: this node has no cluster file. */
  readonly volumes: InlineVolumeStore | undefined;
  /** Shared with the node service. */
  readonly limit?: VolumeLimit;
  /** Whether volumes may be mounted in directories of the operating system. */
  readonly allowSystemPaths?: boolean;
}

/** Where this node makes inline volumes, or, as text, why it cannot make any now. */
export function inlineStore({ volumes }: InlineOptions): InlineVolumeStore | string {
  if (volumes === undefined) {
    return "this node knows no cluster for them, start it with --config and a cluster file that has the key ephemeral";
  }
  return volumes.obstacle() ?? volumes;
}

/** What the node service does with inline volumes. */
export interface InlineVolumes {
  /** NodePublishVolume, for an ID of which isInlineId is true. */
  publish(request: NodePublishVolumeRequest, call: RequestContext): Promise<void>;
  /** NodeUnpublishVolume, likewise. */
  unpublish(request: NodeUnpublishVolumeRequest, call: RequestContext): Promise<void>;
  /**
   * Removes, once, the volumes that were made for this node and that no pod on it uses any more. Answers whether the
   * sweep is complete, or must be repeated later.
   */
  sweep(ctx: RequestContext): Promise<boolean>;
}

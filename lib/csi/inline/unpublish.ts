/** NodeUnpublishVolume of an inline volume: unmounts it and removes it from the cluster. */
import type { NodeUnpublishVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { assertUnmountCanEnd, unmountAll } from "../../host/unmount.ts";
import { canonicalPath, removeMountPoint } from "../../host/mount_point.ts";
import { deviceUnder } from "../../host/volume_mounts.ts";
import { mountsAt, mountTable } from "../../host/mount_table.ts";
import { requirePath } from "../request.ts";
import { inlineLock } from "./inline_id.ts";
import { type InlineOptions, inlineStore } from "./options.ts";
import { removeInlineVolume } from "./removal.ts";

/**
 * Undoes any part of a publish; idempotent.
 *
 * @throws StatusError FAILED_PRECONDITION when the mount is busy, or when something may be left on a cluster that this
 *   node cannot use; UNAVAILABLE when a cluster does not answer
 */
export async function unpublishInlineVolume(
  options: InlineOptions,
  request: NodeUnpublishVolumeRequest,
  call: RequestContext,
): Promise<void> {
  const { host } = options;
  const { volumeId } = request;
  const ctx = call.doing(`unpublish the inline volume ${volumeId}`);
  const given = requirePath(ctx, "target_path", request.targetPath);
  using _held = options.locks.take(inlineLock(volumeId), "NodeUnpublishVolume");

  const path = await canonicalPath(host, given);
  const there = path === undefined ? undefined : mountsAt(await mountTable(host), path).at(-1);
  // Only the cluster knows for sure which volume it is. But a namespace that is mounted where kubelet keeps this volume
  // cannot be another one, and its data must be written before anything else happens, also when the cluster does not
  // answer.
  const mounted = there === undefined ? undefined : await deviceUnder(host, there);
  if (path !== undefined) {
    if (mounted !== undefined) {
      await assertUnmountCanEnd(host, ctx, { device: mounted, path });
    }
    await unmountAll(host, ctx, path, mounted);
  }
  const store = inlineStore(options);
  if (typeof store === "string") {
    // The target path is made before anything else, and removed last.
    if (path === undefined || await host.kindOf(path) === "absent") return;
    const what = mounted === undefined
      ? "a volume may be left on the cluster"
      : `namespace ${mounted.uuid} of ${mounted.subsystemNqn} is unmounted, and left on the cluster and attached`;
    throw ctx.error("FAILED_PRECONDITION", `${what}; ${store}`);
  }
  const volume = await store.findVolume(ctx, volumeId);
  const uuid = volume?.uuid ?? mounted?.uuid;
  if (uuid !== undefined) {
    const removal = ctx.with({ volume: uuid, name: volumeId });
    await removeInlineVolume(options, removal, uuid, volume);
    if (volume === undefined) removal.log.warning("found no inline volume on any cluster that allows them");
  }
  if (path !== undefined) await removeMountPoint(host, path);
}

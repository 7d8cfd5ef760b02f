/** NodeUnpublishVolume: unmounts at the target path and removes that path. */
import type { NodeUnpublishVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath, removeMountPoint } from "../../host/mount_point.ts";
import { mountsAt, mountsElsewhere, mountTable } from "../../host/mount_table.ts";
import { mountsOf, relationOf } from "../../host/volume_mounts.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { isInlineId } from "../inline/inline_id.ts";
import { longestVolumeId, requirePath, requireText } from "../request.ts";
import type { NodeParts } from "./options.ts";
import { setReadOnly } from "./read_only.ts";
import { unmountVolume } from "./unmount.ts";
import { findVolumeDevice, parseIdIfMounted } from "./volume.ts";

/** CSI specification, "NodeUnpublishVolume" (docs/reference/csi.md 7.6). It undoes any part of a publish. */
export async function nodeUnpublishVolume(
  node: NodeParts,
  request: NodeUnpublishVolumeRequest,
  call: RequestContext,
) {
  const { host } = node;
  const parsing = call.doing("unpublish the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  if (isInlineId(volumeId)) {
    await node.inline.unpublish(request, call);
    return {};
  }
  const given = requirePath(parsing, "target_path", request.targetPath);
  const path = await canonicalPath(host, given);
  const id = await parseIdIfMounted(node, volumeId, path);
  if (id === undefined || path === undefined) return {};
  const ctx = call.with({ volume: id.uuid }).doing(`unpublish the volume ${id.uuid}`);
  using _held = node.locks.take(`volume ${id.uuid}`, "NodeUnpublishVolume");

  const device = await findVolumeDevice(host, id);
  if (device !== undefined) await makeWritable(host, ctx, device, path);
  await unmountVolume(host, ctx, { path, device, uuid: id.uuid });
  await removeMountPoint(host, path);
  return {};
}

/** Ends the write protection of a raw block volume whose last target is at `path`. */
async function makeWritable(host: Host, ctx: RequestContext, device: BlockDevice, path: string): Promise<void> {
  const table = await mountTable(host);
  const mount = mountsAt(table, path).at(-1);
  if (!device.readOnly && mount?.options.includes("ro") !== true) return;
  const others = mountsElsewhere(table, await mountsOf(host, table, device), path);
  // Without a mount: a publish ended between the write protection and its mount.
  const isBlock = mount === undefined || await relationOf(host, mount, device) === "our device node";
  if (isBlock && others.length === 0) {
    await setReadOnly(host, ctx, device, { readOnly: false, force: mount !== undefined });
  }
}

/** NodeUnstageVolume: unmounts at the staging path and detaches the volume. */
import type { NodeUnstageVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { closeMapper } from "../../host/luks.ts";
import { assertFileSystemInactive } from "../../host/unmount.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { mountsOf } from "../../host/volume_mounts.ts";
import { mountTable } from "../../host/mount_table.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { usersOf } from "../../host/users.ts";
import { assertNotInline } from "../inline/inline_id.ts";
import { longestVolumeId, requirePath, requireText } from "../request.ts";
import type { NodeParts } from "./options.ts";
import { unmountVolume } from "./unmount.ts";
import { findVolumeDevice, parseIdIfMounted } from "./volume.ts";

/** CSI specification, "NodeUnstageVolume" (docs/reference/csi.md 7.4). It undoes any part of a stage. */
export async function nodeUnstageVolume(node: NodeParts, request: NodeUnstageVolumeRequest, call: RequestContext) {
  const { host } = node;
  const parsing = call.doing("unstage the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const given = requirePath(parsing, "staging_target_path", request.stagingTargetPath);
  assertNotInline(parsing, volumeId);
  const path = await canonicalPath(host, given);
  const id = await parseIdIfMounted(node, volumeId, path);
  if (id === undefined) return {};
  const ctx = call.with({ volume: id.uuid }).doing(`unstage the volume ${id.uuid}`);
  using _held = node.locks.take(`volume ${id.uuid}`, "NodeUnstageVolume");

  const device = await findVolumeDevice(host, id);
  if (path !== undefined) await unmountVolume(host, ctx, { path, device, uuid: id.uuid });
  if (device !== undefined) await assertUnmounted(host, ctx, device);
  if (id.hostEncryption !== undefined) await closeMapper(host, ctx, id.uuid);
  await assertNoUsers(host, ctx, id.uuid);
  await node.attacher.detach(ctx, id.uuid);
  return {};
}

/** Throws FAILED_PRECONDITION while the volume is mounted anywhere. */
async function assertUnmounted(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const mounts = await mountsOf(host, await mountTable(host), device);
  if (mounts.length > 0) {
    const paths = mounts.map((mount) => `"${mount.path}"`).join(", ");
    throw ctx.error("FAILED_PRECONDITION", `it is still mounted at ${paths}, unpublish it there first`);
  }
  await assertFileSystemInactive(host, ctx, device);
}

/** Throws FAILED_PRECONDITION while a device on top of the namespace uses it, which an unmount does not end. */
async function assertNoUsers(host: Host, ctx: RequestContext, uuid: string): Promise<void> {
  const device = await findDevice(host, uuid);
  const users = device === undefined ? [] : await usersOf(host, device);
  if (device === undefined || users.length === 0) return;
  throw ctx.error(
    "FAILED_PRECONDITION",
    `${device.path} is in use by ${users.join(", ")}, which has to end first`,
  );
}

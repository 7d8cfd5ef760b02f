/** Detaches a volume that attachVolume has attached. */
import type { RequestContext } from "../context.ts";
import type { Host } from "../host/host.ts";
import { assertUnmountCanEnd, unmountAll } from "../host/unmount.ts";
import { canonicalPath } from "../host/mount_point.ts";
import { type BlockDevice, findDevice } from "../host/nvme/devices.ts";
import { recheckDevice } from "../host/nvme/recheck.ts";
import { allUsersOf } from "../host/users.ts";
import type { AttachRequest, LocalMachine } from "./attach_volume.ts";

/**
 * Unmounts the volume at `mountPath` if that is given, disconnects its namespace, and revokes the access of this host (with
 * a volume ID). It undoes any part of an attachment, and may be repeated.
 *
 * @throws StatusError FAILED_PRECONDITION, before anything but the mount at `mountPath` was changed, when something else on
 *   this machine uses the volume; UNAVAILABLE when unmounting would wait for a path; and what Attacher.detach and
 *   StorageBackend.revokeAccess throw
 */
export async function detachVolume(
  ctx: RequestContext,
  { host, attacher, hostNqn, discoveryDirectory }: LocalMachine,
  request: AttachRequest,
  mountPath: string | undefined,
): Promise<void> {
  const uuid = "namespace" in request ? request.namespace.uuid : request.backend.uuidOf(request.volumeId);
  const subsystemNqn = "namespace" in request ? request.namespace.subsystemNqn : undefined;
  const volume = ctx.with({ volume: uuid }).doing(`detach namespace ${uuid}`);
  const discoveryFile = `${discoveryDirectory}/${uuid}`;
  if (discoveryDirectory !== undefined && await host.kindOf(discoveryFile) !== "absent") {
    throw volume.error(
      "FAILED_PRECONDITION",
      `"${discoveryFile}" asks the Discovery-Client to keep it connected, most likely for the node ` +
        `service; detach it with --attach=discovery-client if it is no longer needed`,
    );
  }
  const device = await findDevice(host, uuid, subsystemNqn);
  const path = mountPath === undefined ? undefined : await canonicalPath(host, mountPath);
  if (path !== undefined) {
    if (device !== undefined) await assertUnmountCanEnd(host, volume, { device, path });
    await unmountAll(host, volume, path, device);
  }
  if (device !== undefined) await assertUnused(host, volume, device);
  await attacher.detach(volume, uuid, subsystemNqn);
  if ("backend" in request) await request.backend.revokeAccess(volume, request.secrets, request.volumeId, hostNqn);
}

async function assertUnused(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const users = await allUsersOf(host, await recheckDevice(host, ctx, device));
  if (users.length === 0) return;
  throw ctx.error("FAILED_PRECONDITION", `${device.path} is in use by ${users.join(", ")}`);
}

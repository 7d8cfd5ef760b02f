/** What a path of this node shows of a volume, for the calls that get a path and no access type. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { type Mount, mountsAt, mountTable } from "../../host/mount_table.ts";
import { relationOf } from "../../host/volume_mounts.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { findVolumeDevice, type VolumeOnNode } from "./volume.ts";

/** A mounted file system, a device node, or a mount that has lost its device. */
export type ShownVolume =
  | { readonly kind: "mount"; readonly device: BlockDevice; readonly mount: Mount }
  | { readonly kind: "block"; readonly device: BlockDevice }
  | { readonly kind: "dead"; readonly mount: Mount };

/**
 * Looks at the path of a volume.
 *
 * @param given the path as the orchestrator gave it
 * @throws StatusError NOT_FOUND when the path is missing or does not show this volume
 */
export async function findAtPath(
  host: Host,
  ctx: RequestContext,
  id: VolumeOnNode,
  given: string,
): Promise<ShownVolume> {
  const path = given.startsWith("/") ? await canonicalPath(host, given) : undefined;
  if (path === undefined) throw ctx.error("NOT_FOUND", `"${given}" is not there`);
  const device = await findVolumeDevice(host, id);
  const mount = mountsAt(await mountTable(host), path).at(-1);
  if (mount !== undefined) {
    const relation = await relationOf(host, mount, device);
    if (device !== undefined && relation === "ours") return { kind: "mount", device, mount };
    if (device !== undefined && relation === "our device node") return { kind: "block", device };
    if (relation === "dead") return { kind: "dead", mount };
  } else if (device !== undefined && await host.blockNumber(path) === device.number) {
    return { kind: "block", device };
  }
  throw ctx.error(
    "NOT_FOUND",
    device === undefined ? `this node has no block device of it` : `"${given}" does not show ${device.path}`,
  );
}

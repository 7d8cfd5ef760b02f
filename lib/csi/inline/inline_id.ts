/** Volume IDs of inline volumes, which kubelet makes up. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { deviceUnder } from "../../host/volume_mounts.ts";
import { mountsAt, mountTable } from "../../host/mount_table.ts";

/** Whether a volume ID is one that kubelet makes up for an inline volume. No ID of this driver has that form. */
export function isInlineId(volumeId: string): boolean {
  return /^csi-[0-9a-f]{64}$/.test(volumeId);
}

/** Throws INVALID_ARGUMENT for an inline volume, in calls that make no sense for one and that kubelet never sends. */
export function assertNotInline(ctx: RequestContext, volumeId: string): void {
  if (!isInlineId(volumeId)) return;
  throw ctx.doing(`${ctx.action} ${volumeId}`).error(
    "INVALID_ARGUMENT",
    "it is an inline volume of a pod, which is published and unpublished and nothing else",
  );
}

/**
 * The namespace of the inline volume that is mounted at a path, for calls that bring no cluster to ask. When nothing is
 * mounted there, the volume ID itself, which is no namespace's UUID.
 */
export async function inlineUuid(host: Host, volumeId: string, path: string): Promise<string> {
  const canonical = path.startsWith("/") ? await canonicalPath(host, path) : undefined;
  const mount = canonical === undefined ? undefined : mountsAt(await mountTable(host), canonical).at(-1);
  const device = mount === undefined ? undefined : await deviceUnder(host, mount);
  return device?.uuid ?? volumeId;
}

/** The lock that every call for an inline volume holds. */
export function inlineLock(volumeId: string): string {
  return `volume ${volumeId}`;
}

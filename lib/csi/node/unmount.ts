/** The unmount of a staging or target path. */
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import type { Host } from "../../host/host.ts";
import { assertUnmountCanEnd, unmountAll } from "../../host/unmount.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";

/**
 * Unmounts everything at `path` that is the volume's or dead. Nothing is mounted there: done.
 *
 * While the volume has not answered an operation, its mount is busy. That passes, so the error is UNAVAILABLE, not
 * FAILED_PRECONDITION.
 *
 * @param path free of symbolic links
 * @param device the volume's device; undefined: it has gone
 * @throws StatusError as assertUnmountCanEnd and unmountAll do
 */
export async function unmountVolume(
  host: Host,
  ctx: RequestContext,
  { path, device, uuid }: { readonly path: string; readonly device: BlockDevice | undefined; readonly uuid: string },
): Promise<void> {
  if (device !== undefined) await assertUnmountCanEnd(host, ctx, { device, path });
  try {
    await unmountAll(host, ctx, path, device);
  } catch (error) {
    if (hasCode(error, "FAILED_PRECONDITION")) host.pending.assertAnswering(ctx, uuid);
    throw error;
  }
}

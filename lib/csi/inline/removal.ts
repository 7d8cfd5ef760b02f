/** The removal of an inline volume, which unpublish and sweep share. */
import type { RequestContext } from "../../context.ts";
import { mountsOf } from "../../host/volume_mounts.ts";
import { mountTable } from "../../host/mount_table.ts";
import { findDevice } from "../../host/nvme/devices.ts";
import type { InlineVolume } from "../../storage/backend.ts";
import type { InlineOptions } from "./options.ts";

/**
 * Detaches a namespace that is unmounted, and removes its volume.
 *
 * @param volume undefined: it is not on any cluster
 * @throws StatusError FAILED_PRECONDITION while it is mounted
 */
export async function removeInlineVolume(
  { host, attacher, volumes }: InlineOptions,
  ctx: RequestContext,
  uuid: string,
  volume: InlineVolume | undefined,
): Promise<void> {
  const device = await findDevice(host, uuid);
  const mounts = device === undefined ? [] : await mountsOf(host, await mountTable(host), device);
  if (mounts.length > 0) {
    const paths = mounts.map(({ path }) => `"${path}"`).join(", ");
    throw ctx.error("FAILED_PRECONDITION", `namespace ${uuid} is still mounted at ${paths}`);
  }
  await attacher.detach(ctx, uuid);
  if (volume !== undefined) await volumes?.removeVolume(ctx, volume);
}

/**
 * What the handlers of the node service know of a volume: its ID, its place on the cluster, its device on this node.
 */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { mountsAt, mountTable } from "../../host/mount_table.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { findMapper } from "../../host/mapper.ts";
import { fromPublishContext, type RemoteNamespace } from "../../namespace.ts";
import type { VolumeId } from "../../volume_id.ts";
import type { NodeParts } from "./options.ts";

/** The part of a volume ID that the node uses. */
export type VolumeOnNode = Pick<VolumeId, "uuid"> & Partial<Pick<VolumeId, "hostEncryption">>;

/**
 * The device that this node reads and writes the volume through: an encrypted volume's mapper, never the device below
 * it.
 */
export async function findVolumeDevice(
  host: Host,
  { uuid, hostEncryption }: VolumeOnNode,
): Promise<BlockDevice | undefined> {
  return await (hostEncryption === undefined ? findDevice(host, uuid) : findMapper(host, uuid));
}

/**
 * Where the volume's namespace is, by its publish context; undefined: another driver made that context.
 *
 * @throws StatusError INVALID_ARGUMENT when the context is of another volume
 */
export function parseRemoteNamespace(
  ctx: RequestContext,
  { uuid }: VolumeOnNode,
  publishContext: Readonly<Record<string, string>>,
): RemoteNamespace | undefined {
  const namespace = fromPublishContext(publishContext);
  if (namespace === undefined || namespace.uuid === uuid) return namespace;
  throw ctx.error("INVALID_ARGUMENT", `the publish context is of namespace ${namespace.uuid}`);
}

/**
 * The parsed ID of a volume to unstage or unpublish. Undefined when the ID is not one of this driver and nothing is
 * mounted at `path`: then there is nothing to do.
 */
export async function parseIdIfMounted(
  { host, parseId }: NodeParts,
  volumeId: string,
  path: string | undefined,
): Promise<VolumeOnNode | undefined> {
  try {
    return parseId(volumeId);
  } catch (error) {
    if (path === undefined || mountsAt(await mountTable(host), path).length === 0) return undefined;
    throw error;
  }
}

/**
 * The label in the LUKS header that tells whether a volume was ever used.
 *
 * A new mapper shows noise, not zeros, so its content does not show whether it is blank. The label is "lbcsi-new" from
 * luksFormat until the first file system has been made, or until a pod gets the block device. With that label nothing inside
 * was ever used, and mkfs may begin, or begin again; without it only a file system that blkid recognises is mounted.
 */
import { Buffer } from "node:buffer";
import type { RequestContext } from "../context.ts";
import { cryptsetupError, runCryptsetup } from "./cryptsetup.ts";
import type { Host } from "./host.ts";
import type { BlockDevice } from "./nvme/devices.ts";

/** The label of a volume that was never used. */
export const newLabel = "lbcsi-new";
const usedLabel = "lbcsi";

/** Whether nothing inside was ever used, by the label in the header that `read` reads. */
export async function isNeverUsed(
  device: BlockDevice,
  read: (offsetBytes: bigint, lengthBytes: number) => Promise<Uint8Array>,
): Promise<boolean> {
  if (device.sizeBytes < 4096n) return false;
  const header = Buffer.from(await read(0n, 4096));
  // The LUKS2 on-disk format: magic, version (big endian), two 64-bit numbers, then the label, 48 bytes.
  if (!header.subarray(0, 6).equals(Buffer.from("LUKS\xba\xbe", "latin1")) || header.readUInt16BE(6) !== 2) {
    return false;
  }
  return header.subarray(24, 72).toString("latin1").replace(/\0.*$/s, "") === newLabel;
}

/** Reads the LUKS header of a volume; throws UNAVAILABLE while the volume has a pending operation. */
export function headerReader(host: Host, ctx: RequestContext, device: BlockDevice) {
  return (offsetBytes: bigint, lengthBytes: number) =>
    host.pending.answer(
      ctx.doing(`read the encryption of namespace ${device.uuid}`),
      { volume: device.uuid, what: `a read of ${device.path}` },
      () => host.readBytes(device.path, offsetBytes, lengthBytes),
    );
}

/**
 * Replaces the label of a new volume: from now on it may have been used. Call it before anything can use it. Does nothing
 * for a device without host encryption.
 */
export async function markUsed(host: Host, ctx: RequestContext, mapper: BlockDevice): Promise<void> {
  const beneath = mapper.encrypts?.beneath;
  if (beneath === undefined) return;
  if (!await isNeverUsed(beneath, headerReader(host, ctx, beneath))) return;
  const marked = await runCryptsetup(host, ctx, ["config", "--label", usedLabel, beneath.path]);
  if (marked.code !== 0) throw cryptsetupError(ctx, "UNAVAILABLE", "config", marked);
}

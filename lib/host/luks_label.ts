import { Buffer } from "node:buffer";
import type { RequestContext } from "../context.ts";
import { cryptsetupError, runCryptsetup } from "./cryptsetup.ts";
import type { Host } from "./host.ts";
import type { BlockDevice } from "./nvme/devices.ts";

export const newLabel = "lbcsi-new";

const usedLabel = "lbcsi";

/** Whether nobody has ever used what is inside: see the head of this file. */
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

export function readerOf(host: Host, ctx: RequestContext, device: BlockDevice) {
  return (offsetBytes: bigint, lengthBytes: number) =>
    host.pending.answer(
      ctx.doing(`read the encryption of namespace ${device.uuid}`),
      { volume: device.uuid, what: `a read of ${device.path}` },
      () => host.readBytes(device.path, offsetBytes, lengthBytes),
    );
}

/** Writes down that from now on somebody may have used what is inside. Do it before anybody can. */
export async function markUsed(host: Host, ctx: RequestContext, mapper: BlockDevice): Promise<void> {
  const beneath = mapper.encrypts?.beneath;
  if (beneath === undefined) return;
  if (!await isNeverUsed(beneath, readerOf(host, ctx, beneath))) return;
  const marked = await runCryptsetup(host, ctx, ["config", "--label", usedLabel, beneath.path]);
  if (marked.code !== 0) throw cryptsetupError(ctx, "UNAVAILABLE", "config", marked);
}

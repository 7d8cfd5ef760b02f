/** Reads of a volume's device: they end with the caller, and no volume with a pending operation is read (pending.ts). */
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import type { BlockDevice } from "../nvme/devices.ts";

/** Reads bytes of one device; throws when it cannot. */
export type DeviceReader = (offsetBytes: bigint, lengthBytes: number) => Promise<Uint8Array>;

/** A reader of `device` that throws UNAVAILABLE when the device cannot be read or its volume has a pending operation. */
export function createDeviceReader(host: Host, ctx: RequestContext, device: BlockDevice): DeviceReader {
  const ask = volumeQuestioner(host, ctx, device);
  return async (offsetBytes, lengthBytes) => {
    try {
      return await ask(`a read of ${device.path}`, () => host.readBytes(device.path, offsetBytes, lengthBytes));
    } catch (error) {
      if (error instanceof StatusError) throw error;
      ctx.signal.throwIfAborted();
      throw ctx.error("UNAVAILABLE", `${device.path} cannot be read at byte ${offsetBytes} (${messageOf(error)})`, {
        cause: error,
      });
    }
  };
}

/** Asks the volume of `device` something that can block; see PendingAnswers.answer. */
export function volumeQuestioner(host: Host, ctx: RequestContext, { uuid }: BlockDevice) {
  return <T>(what: string, question: () => Promise<T>): Promise<T> =>
    host.pending.answer(ctx, { volume: uuid, what }, question);
}

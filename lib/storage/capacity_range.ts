/**
 * How large a new volume can be: the range that CSI's CreateVolume and ControllerExpandVolume give, in whole units of a
 * storage system.
 */
import type { RequestContext } from "../context.ts";
import type { CapacityRange } from "./backend.ts";

/** Throws INVALID_ARGUMENT for a range that no size can meet. */
export function assertCapacityRange(ctx: RequestContext, { requiredBytes, limitBytes }: CapacityRange): void {
  if (requiredBytes < 0n || limitBytes < 0n) {
    throw ctx.error("INVALID_ARGUMENT", "capacity_range has a negative number of bytes");
  }
  if (limitBytes !== 0n && limitBytes < requiredBytes) {
    throw ctx.error("INVALID_ARGUMENT", `limit_bytes ${limitBytes} is below required_bytes ${requiredBytes}`);
  }
}

/** `bytes`, rounded up to whole units. */
export function roundUp(bytes: bigint, unitBytes: bigint): bigint {
  return (bytes + unitBytes - 1n) / unitBytes * unitBytes;
}

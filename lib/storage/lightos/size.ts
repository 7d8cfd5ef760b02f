/** How large a LightOS volume is: whole GiB (docs/reference/lightos-api.md 9.3). */
import type { RequestContext } from "../../context.ts";
import type { CapacityRange } from "../backend.ts";
import { assertCapacityRange, roundUp } from "../capacity_range.ts";

/** The unit in which LightOS allocates volumes. */
export const gib = 1n << 30n;

const largestInt64 = (1n << 63n) - 1n;

/**
 * The size to ask LightOS for: whole GiB, at least one (docs/reference/lightos-api.md 9.3). Throws OUT_OF_RANGE,
 * INVALID_ARGUMENT.
 */
export function volumeSize(ctx: RequestContext, range: CapacityRange): bigint {
  assertCapacityRange(ctx, range);
  const { requiredBytes, limitBytes } = range;
  const rounded = roundUp(requiredBytes === 0n ? gib : requiredBytes, gib);
  if (rounded > largestInt64) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `${requiredBytes} bytes rounded up to whole GiB are too many`,
    );
  }
  if (limitBytes !== 0n && rounded > limitBytes) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `LightOS allocates whole GiB, and ${rounded} bytes are above limit_bytes ${limitBytes}`,
    );
  }
  return rounded;
}

/**
 * The size of a volume made from a source of `sourceBytes`: the source's, or a larger one in whole GiB. Throws
 * OUT_OF_RANGE when the source does not fit the range.
 */
export function sizeWithSource(ctx: RequestContext, range: CapacityRange, sourceBytes: bigint): bigint {
  const { requiredBytes, limitBytes } = range;
  if (requiredBytes > sourceBytes) return volumeSize(ctx, range);
  // A source that was requested with this size was rounded up to whole GiB, as an empty volume would be.
  if (requiredBytes !== 0n && roundUp(requiredBytes, gib) < sourceBytes) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `its source has ${sourceBytes} bytes, required_bytes ${requiredBytes} are fewer`,
    );
  }
  if (limitBytes !== 0n && limitBytes < sourceBytes) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `its source has ${sourceBytes} bytes, limit_bytes ${limitBytes} are fewer`,
    );
  }
  return sourceBytes;
}

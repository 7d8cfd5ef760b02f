/** The sizes of LightOS volumes. */
import { strictEqual, throws } from "node:assert/strict";
import { volumeSize } from "../../../lib/storage/lightos/size.ts";
import { failsWith, gib, within } from "../../support/backends.ts";

for (
  const [what, requiredBytes, limitBytes, expected] of [
    ["no size", 0n, 0n, gib],
    ["one byte", 1n, 0n, gib],
    ["exactly 1 GiB", gib, gib, gib],
    ["a byte more than 1 GiB", gib + 1n, 0n, 2n * gib],
    ["a limit alone", 0n, 5n * gib, gib],
    ["the largest that CSI can say, in whole GiB", (1n << 63n) - gib, 0n, (1n << 63n) - gib],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is ${expected} bytes`, () => {
    strictEqual(volumeSize(within(1000), { requiredBytes, limitBytes }), expected);
  });
}

for (
  const [what, requiredBytes, limitBytes, code, message] of [
    ["a negative size", -1n, 0n, "INVALID_ARGUMENT", /negative/],
    ["a negative limit", 0n, -1n, "INVALID_ARGUMENT", /negative/],
    ["a limit below the size", 2n * gib, gib, "INVALID_ARGUMENT", /limit_bytes 1073741824 is below required_bytes/],
    ["a limit below 1 GiB", 0n, gib - 1n, "OUT_OF_RANGE", /whole GiB/],
    ["a limit that rounding passes", gib + 1n, gib + 2n, "OUT_OF_RANGE", /2147483648 bytes are above limit_bytes/],
    ["a size that overflows when rounded", (1n << 63n) - 1n, 0n, "OUT_OF_RANGE", /too many/],
  ] as const
) {
  Deno.test(`volumeSize refuses ${what} with ${code}`, () => {
    throws(() => volumeSize(within(1000), { requiredBytes, limitBytes }), failsWith(code, message));
  });
}

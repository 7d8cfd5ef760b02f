import { strictEqual } from "node:assert/strict";
import { parseQuantity } from "../lib/quantity.ts";

for (
  const [text, bytes] of [
    ["1", 1n],
    ["1073741824", 1n << 30n],
    ["10Gi", 10n << 30n],
    ["1Ki", 1024n],
    ["2Ei", 2n << 60n],
    ["10G", 10_000_000_000n],
    ["1k", 1000n],
    ["1.5Gi", 3n << 29n],
    [".5Ki", 512n],
    ["1.Ki", 1024n],
    ["0.1", 1n],
    ["1.0000000001Ki", 1025n],
    ["1e9", 1_000_000_000n],
    ["1.5E3", 1500n],
    ["+1Gi", 1n << 30n],
    ["1E", 10n ** 18n],
  ] as const
) {
  Deno.test(`parseQuantity of ${text} is ${bytes} bytes`, () => {
    strictEqual(parseQuantity(text), bytes);
  });
}

const bad = ["", " ", ".", "Gi", "-1Gi", "0", "0Gi", "0.0", "1 Gi", "1gi", "1KI", "1Kib", "1GB", "100m", "1e", "1e-3"];
for (const text of [...bad, "1Gi\n", "0x10", "1_000", "1,5Gi", "NaN", "9".repeat(21), "1e999", "१Gi"]) {
  Deno.test(`parseQuantity of ${JSON.stringify(text)} is undefined`, () => {
    strictEqual(parseQuantity(text), undefined);
  });
}

import { strictEqual } from "node:assert/strict";
import { formatList, simulatorCheck } from "../lib/check.ts";

Deno.test("formatList shortens a long list, and says how many more items there are", () => {
  const list = (count: number) => Array.from({ length: count }, (_, at) => `m${at}`);

  strictEqual(formatList(list(7)), "m0, m1, m2, m3, m4, m5, m6");
  strictEqual(formatList(list(50), "; "), "m0; m1; m2; m3; m4; m5; and 44 more");
  strictEqual(formatList([]), "");
});

Deno.test("simulatorCheck recognises a simulated storage system, and whether it has a data path", () => {
  strictEqual(simulatorCheck("lbcsi-simulator:nvmet")?.hasDataPath, true);
  strictEqual(simulatorCheck("lbcsi-simulator:loop")?.hasDataPath, false);
  strictEqual(simulatorCheck("1"), undefined);
});

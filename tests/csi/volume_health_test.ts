import assert from "node:assert/strict";
import { clipMessage } from "../../lib/csi/volume_health.ts";

Deno.test("messages of health have 1024 bytes at most, and end with whole characters", () => {
  assert.equal(clipMessage("fine"), "fine");
  assert.equal(clipMessage("é".repeat(512)), "é".repeat(512));
  const cut = clipMessage("é".repeat(513));
  assert.equal(cut, `${"é".repeat(510)} …`);
  assert.equal(new TextEncoder().encode(cut).length, 1024);
});

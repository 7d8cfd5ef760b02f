import assert from "node:assert/strict";
import { hostIdOf } from "../../../lib/host/attach/attacher.ts";

Deno.test("hostIdOf is the same for a node at each start, and differs between nodes", () => {
  assert.equal(hostIdOf("n1.node"), "6f8a6b22-4bd9-812a-984c-1ad22b6c8d6a");
  assert.notEqual(hostIdOf("n1.node"), hostIdOf("n2.node"));
});

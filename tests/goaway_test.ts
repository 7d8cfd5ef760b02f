import assert from "node:assert/strict";
import { fate, support } from "./support/goaway.ts";

Deno.test("serve lives through clients that send GOAWAY when they close", async () => {
  assert.deepEqual(await fate((path) => [support("probe_server.ts"), path], 2, 50), { end: "alive", served: 2 });
});

Deno.test("the tests above notice a server without the guard of lib/goaway.ts", async () => {
  // When this fails after an upgrade of Deno, denoland/deno#36788 may be fixed, and the guard can go.
  const { end } = await fate((path) => [support("unguarded_probe_server.ts"), path], 3, 50);

  assert.match(end, /^SIG(SEGV|ABRT|BUS|ILL)$/);
});

import { strictEqual } from "node:assert/strict";
import { absolutePath, unixEndpoint } from "../../lib/cli/option_schemas.ts";

for (const text of ["unix://relative.sock", "unix:/one.sock", "/plain", "unix:////double", "http://x", ""]) {
  Deno.test(`unixEndpoint rejects "${text}"`, () => strictEqual(unixEndpoint.safeParse(text).success, false));
}

Deno.test("absolutePath rejects a relative path", () => {
  strictEqual(absolutePath.safeParse("etc/x").success, false);
  strictEqual(absolutePath.safeParse("/etc/x").success, true);
});

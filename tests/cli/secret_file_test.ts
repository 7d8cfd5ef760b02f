import assert from "node:assert/strict";
import { parseSecretFile } from "../../lib/cli/secret_file.ts";

Deno.test("parseSecretFile reads key=value lines, and does not change values", () => {
  const text = "# token\njwt=a.b=c #d\r\n\n mgmt=1".replace(" mgmt", "mgmt");

  assert.deepEqual(parseSecretFile(text), { jwt: "a.b=c #d", mgmt: "1" });
  assert.deepEqual(parseSecretFile(""), {});
});

for (
  const [text, problem] of [
    ["jwt=1\nTOPSECRET", /^Cannot read the secrets: line 2 is not of the form key=value$/],
    ["=TOPSECRET", /line 1 is not of the form/],
    ["jwt: TOPSECRET", /line 1 is not of the form/],
    ["jwt=TOPSECRET\njwt=TOPSECRET", /line 2 gives "jwt" a second time$/],
  ] as const
) {
  Deno.test(`promise 10: parseSecretFile rejects ${JSON.stringify(text)} without showing it`, () => {
    assert.throws(() => parseSecretFile(text), (error) => {
      assert.ok(error instanceof Error);
      assert.match(error.message, problem);
      assert.doesNotMatch(error.message, /TOPSECRET/);
      return true;
    });
  });
}

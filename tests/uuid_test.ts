import assert from "node:assert/strict";
import { hasUuidForm, isUuid, nameUuid } from "../lib/uuid.ts";

Deno.test("nameUuid is a UUID that depends on the name alone", () => {
  assert.match(nameUuid("a"), /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.equal(nameUuid("a"), nameUuid("a"));
  assert.notEqual(nameUuid("a"), nameUuid("b"));
});

for (
  const [text, isOne] of [
    ["0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10", true],
    ["0F2C6A5E-54D1-4C39-9A77-2B1F0C9D8E10", true],
    ["0f2c6a5e54d14c399a772b1f0c9d8e10", false],
    ["", false],
  ] as const
) {
  Deno.test(`"${text}" is ${isOne ? "a" : "not a"} UUID`, () => {
    assert.equal(isUuid(text), isOne);
    assert.equal(hasUuidForm(text), isOne);
  });
}

Deno.test("the nil UUID has the form of a UUID and is not taken for one", () => {
  assert.equal(hasUuidForm("00000000-0000-0000-0000-000000000000"), true);
  assert.equal(isUuid("00000000-0000-0000-0000-000000000000"), false);
});

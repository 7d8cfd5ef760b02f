import assert from "node:assert/strict";
import { nameUuid } from "../lib/uuid.ts";

Deno.test("nameUuid is a UUID that depends on the name alone", () => {
  assert.match(nameUuid("a"), /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.equal(nameUuid("a"), nameUuid("a"));
  assert.notEqual(nameUuid("a"), nameUuid("b"));
});

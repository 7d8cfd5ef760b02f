/** The cluster file of PoseidonOS. */
import { throws } from "node:assert/strict";
import { parseSystems } from "../../../lib/storage/poseidon/cluster_file.ts";
import { failsWith } from "../../support/backends.ts";

for (
  const [text, message] of [
    ["", /is not a map with the key systems/],
    ["systems: []", /systems is empty/],
    ["systems: [{ name: a, endpoint: x, arrays: a1 }]", /systems\[0\]\.endpoint "x" is not host:port/],
    ["systems: [{ name: a, endpoint: 'h:1,i:2', arrays: a1 }]", /is more than one host:port/],
    ["systems: [{ name: a, endpoint: 'h:1' }]", /systems\[0\]\.arrays/],
    ["systems: [{ name: a, endpoint: 'h:1', arrays: ['x'] }]", /is not the name of an array/],
    ["systems: [{ name: a, endpoint: 'h:1', arrays: a1, jwt: x }]", /"jwt" unknown \(known: name, endpoint, /],
    [
      "systems: [{ name: a, endpoint: 'h:1', arrays: a1 }, { name: a, endpoint: 'h:1', arrays: a1 }]",
      /two systems have the name "a"; endpoint h:1 belongs to both "a" and "a"/,
    ],
  ] as const
) {
  Deno.test(`parseSystems refuses ${text || "an empty file"}`, () => {
    throws(
      () => parseSystems("/c.yaml", text),
      failsWith("INVALID_ARGUMENT", /^Cannot use cluster file \/c\.yaml: /, message),
    );
  });
}

import { equal } from "node:assert/strict";
import { closestWord, didYouMean, unknownKeys } from "../lib/suggestion.ts";

const known = ["mgmt-endpoint", "mgmt-scheme", "replica-count", "compression", "project-name", "mkfs-options"];

Deno.test("the closest known word: a slip of the keyboard is found", () => {
  for (
    const [word, meant] of [
      ["replica-counts", "replica-count"],
      ["replica_count", "replica-count"],
      ["replicaCount", "replica-count"],
      ["mgmt-endpiont", "mgmt-endpoint"],
      ["mgmt-endpoints", "mgmt-endpoint"],
      ["MGMT-SCHEME", "mgmt-scheme"],
      ["compresion", "compression"],
      ["mkfs-option", "mkfs-options"],
    ] as const
  ) {
    equal(closestWord(word, known), meant, word);
  }
});

Deno.test("the closest known word: a word that is like none has none", () => {
  for (const word of ["", "x", "reclaim-policy", "fsType", "m".repeat(10_000)]) {
    equal(closestWord(word, known), undefined, word);
  }
  equal(closestWord("anything", []), undefined);
});

Deno.test("the closest known word: of two that are close, the closer one", () => {
  equal(closestWord("qos-policy-nam", ["qos-policy-uuid", "qos-policy-name"]), "qos-policy-name");
});

Deno.test("unknown keys are named with what was meant by each, and with those that are known", () => {
  equal(
    unknownKeys(["replica-cuont", "colour"], ["replica-count", "compression"]),
    '"replica-cuont" (did you mean "replica-count"?), "colour" unknown (known: replica-count, compression)',
  );
});

Deno.test("a suggestion reads on from the unknown word, and is empty without one", () => {
  equal(didYouMean("replica-cuont", known), ', did you mean "replica-count"?');
  equal(didYouMean("zzz", known), "");
});

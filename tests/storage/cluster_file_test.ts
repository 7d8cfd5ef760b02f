/** Cluster files are read again when they have changed, and a bad new version does no harm. */
import { deepStrictEqual, strictEqual, throws } from "node:assert/strict";
import { createLogger } from "../../lib/log.ts";
import { knownClusters } from "../../lib/storage/lightos/cluster_file.ts";
import { failsWith, memoryFiles, quiet } from "../support/backends.ts";

/** A cluster file with one cluster. */
const named = (name: string) => `clusters: [{name: ${name}, endpoints: "192.0.2.1:443"}]`;

Deno.test("knownClusters reads the file again when it has changed, and only then", () => {
  const files = memoryFiles({ "/c": named("before") });
  const clusters = knownClusters("/c", files, quiet);
  const names = () => clusters.all().map(({ name }) => name);

  deepStrictEqual([names(), names()], [["before"], ["before"]]);
  strictEqual(files.reads.length, 1);
  files.write("/c", named("after"));

  deepStrictEqual([names(), names()], [["after"], ["after"]]);
  strictEqual(files.reads.length, 2);
});

Deno.test("knownClusters keeps the last good file while the new one is broken or gone, and logs each once", () => {
  const lines: string[] = [];
  const files = memoryFiles({ "/c": named("good") });
  const clusters = knownClusters("/c", files, createLogger("error", "json", (line) => lines.push(line)));
  const look = () => strictEqual(clusters.all()[0]?.name, "good");

  files.write("/c", "clusters: []");
  look();
  look();
  strictEqual(files.reads.length, 2, "a file that is known to be broken is not read again");
  files.remove("/c");
  look();
  look();

  deepStrictEqual(lines.map((line) => JSON.parse(line).error), [
    "Cannot use cluster file /c: clusters is empty",
    "ENOENT: /c",
  ]);
  files.write("/c", named("better"));
  strictEqual(clusters.all()[0]?.name, "better");
});

Deno.test("knownClusters refuses to begin with a file that is missing", () => {
  throws(
    () => knownClusters("/c", memoryFiles({}), quiet),
    failsWith("INVALID_ARGUMENT", /^Cannot use cluster file \/c: ENOENT/),
  );
});

/** The committed manifests and examples: up to date, complete in what they refer to, and unambiguous YAML. */
import assert from "node:assert/strict";
import { parseAllDocuments } from "yaml";
import {
  driverManifests,
  examples,
  manifestRanges,
  manifests,
  minorsIn,
  type RenderedFile,
  renderedFiles,
  renderFiles,
  supportedMinors,
} from "../../k8s/rendered_files.ts";
import { existingObjects, manifestPath, readK8sFile } from "../support/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";
import { objectsOf, referenceProblems } from "../support/objects.ts";

Deno.test({
  name: "the committed manifests and examples are those that the charts render",
  ignore: !needs("go"),
  fn: async () => {
    const textByPath = await unlessGoLacks(renderFiles);
    if (textByPath === undefined) return;

    const files = ["manifests/", "manifests/lightos/", "manifests/poseidon/", "examples/"].flatMap((directory) =>
      [...Deno.readDirSync(new URL(`../../k8s/${directory}`, import.meta.url))].filter(({ isFile }) => isFile)
        .map(({ name }) => directory + name)
    );
    assert.deepEqual(files.toSorted(), [...textByPath.keys()].toSorted());
    for (const [path, text] of textByPath) {
      assert.ok(readK8sFile(path) === text, `${path}: run \`deno task manifests\``);
    }
  },
});

Deno.test("the ranges of the manifests are every supported Kubernetes version once, and neighbours differ", () => {
  assert.deepEqual(manifestRanges.flatMap(minorsIn), minorsIn(supportedMinors));
  for (const [i, file] of driverManifests.entries()) {
    const next = driverManifests[i + 1];
    if (next === undefined || next.minors.first < file.minors.first) continue;
    const objects = ({ path }: RenderedFile) => readK8sFile(path).replaceAll(/^#.*\n/gm, "");
    assert.ok(objects(file) !== objects(next), `${file.path} and ${next.path} could be one file`);
  }
});

Deno.test("manifests mean the same in YAML 1.1 and YAML 1.2", () => {
  for (const { path } of renderedFiles) {
    for (const document of parseAllDocuments(readK8sFile(path), { version: "1.1" })) {
      assert.deepEqual(document.errors, [], path);
    }
    assert.doesNotMatch(readK8sFile(path), /[ \t]$/m, path);
    // 0440 is 288 in YAML 1.1 and 440 in YAML 1.2.
    assert.doesNotMatch(readK8sFile(path), /: 0\d+$/m, path);
  }
});

for (const { path } of manifests) {
  Deno.test(`in ${path} every object that another one names exists, and none is there twice`, () => {
    const objects = objectsOf(readK8sFile(path));

    assert.ok(objects.length >= 7);
    assert.deepEqual(referenceProblems(objects, existingObjects), []);
  });
}

Deno.test("every object that an example names is in one of the examples", () => {
  const files = examples.map(({ path }) => path);
  // The two examples of a volume that exists already name their objects alike, so they are alternatives.
  for (
    const left of ["examples/preprovisioned-block-workload.yaml", "examples/preprovisioned-filesystem-workload.yaml"]
  ) {
    const objects = files.filter((path) => path !== left).flatMap((path) => objectsOf(readK8sFile(path)));

    assert.ok(objects.length > 25);
    assert.deepEqual(referenceProblems(objects, existingObjects), []);
  }
});

const brokenReferences: readonly (readonly [kind: string, change: (text: string) => string, problem: RegExp])[] = [
  [
    "ServiceAccount",
    (text) => text.replace(/serviceAccountName: .*/, "serviceAccountName: gone"),
    /ServiceAccount .*gone/,
  ],
  ["ClusterRole", (text) => text.replace(/(kind: ClusterRole\n {2}name:) .*/, "$1 gone"), /ClusterRole gone/],
  [
    "volume",
    (text) => text.replace("- name: socket-dir\n          emptyDir:", "- name: gone\n          emptyDir:"),
    /socket-dir/,
  ],
  ["subject", (text) => text.replace(/(kind: ServiceAccount\n {4}name:) .*/, "$1 gone"), /gone/],
  ["selector", (text) => text.replace("role: controller", "role: gone"), /its selector does not find its pods/],
];
for (const [kind, change, problem] of brokenReferences) {
  Deno.test(`a broken reference to a ${kind} is found`, () => {
    const text = readK8sFile(manifestPath("lb-csi-plugin-k8s-v1.30.yaml"));
    assert.notEqual(change(text), text);

    assert.match(referenceProblems(objectsOf(change(text)), existingObjects).join("\n"), problem);
  });
}

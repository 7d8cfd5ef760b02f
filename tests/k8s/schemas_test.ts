/**
 * Validates every manifest and example for every Kubernetes version that it is for: with the OpenAPI documents of API
 * servers, which a Go module has for 1.23 to 1.35, and with the Go types of each version, 1.17 to 1.37.
 */
import assert from "node:assert/strict";
import { parseAllDocuments } from "yaml";
import { chartDirectory, documents, render, type RenderRequest, runGo, type Values } from "../../k8s/charts.ts";
import { minorsIn, renderedFiles, supportedMinors } from "../../k8s/rendered_files.ts";
import { readK8sFile } from "../support/charts.ts";
import { goModules, unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";

const minors = minorsIn(supportedMinors);

/** The OpenAPI documents that API servers publish, from the sources of a validator for kubectl. */
const openAPI = "sigs.k8s.io/kubectl-validate@v0.0.5-0.20260105161640-a97ccfaca20b";
/** The Go types of the first release of a minor version. A field that a patch release added would count as unknown. */
const typesOf = (minor: number) => [`k8s.io/api@v0.${minor}.0`, `k8s.io/apimachinery@v0.${minor}.0`] as const;

interface Manifest {
  readonly name: string;
  readonly kubeVersion: string;
  readonly text: string;
  readonly crds: string;
}
interface Verdict {
  readonly objects: number;
  readonly openapi: number;
  readonly types: number;
  readonly crds: number;
  readonly problems: readonly string[];
}

/** Validates manifests; undefined if Go modules cannot be fetched. */
async function validate(manifests: readonly Manifest[]): Promise<readonly Verdict[] | undefined> {
  return await unlessGoLacks(async () => {
    const directories = await goModules([openAPI, ...minors.flatMap(typesOf)]);
    const types = minors.map((minor) => `1.${minor}=${typesOf(minor).map((one) => directories.get(one)).join(":")}`);
    const builtins = `${directories.get(openAPI)}/pkg/openapiclient/builtins`;
    return await runGo("tests/go/k8s_schemas", [builtins, ...types], manifests) as readonly Verdict[];
  });
}

/** The snapshot API that a cluster of this version has. */
const snapshotApi = (minor: number) =>
  readK8sFile(`manifests/snapshot-controller-${minor < 20 ? 3 : minor < 25 ? 4 : 8}.yaml`);

function assertValid(manifests: readonly Manifest[], found: readonly Verdict[]): void {
  assert.equal(found.length, manifests.length);
  for (const [i, { name, kubeVersion }] of manifests.entries()) {
    assert.deepEqual([name, kubeVersion, found[i]?.problems], [name, kubeVersion, []]);
    assert.ok((found[i]?.objects ?? 0) > 0, name);
  }
}

Deno.test({
  name: "every manifest and example is valid for every Kubernetes version that it is for",
  ignore: !needs("go"),
  fn: async () => {
    const manifests = renderedFiles.flatMap(({ path, minors }) =>
      minorsIn(minors).map((minor) => ({
        name: path,
        kubeVersion: `1.${minor}`,
        text: readK8sFile(path),
        crds: snapshotApi(minor),
      }))
    );

    const found = await validate(manifests);

    if (found === undefined) return;
    assertValid(manifests, found);
    const sum = (count: (verdict: Verdict) => number) => found.reduce((sum, verdict) => sum + count(verdict), 0);
    console.log(
      `${renderedFiles.length} files, ${manifests.length} pairs of a file and a version: ${
        sum(({ objects }) => objects)
      } objects, ` +
        `${sum(({ openapi }) => openapi)} validated with OpenAPI documents, ${
          sum(({ types }) => types)
        } with Go types, ` +
        `${sum(({ crds }) => crds)} with custom resource definitions`,
    );
    // Every object was validated by something, and each source validated some.
    assert.ok(sum(({ types, crds, openapi }) => types + crds + openapi) > sum(({ objects }) => objects) * 1.4);
    assert.ok(sum(({ openapi }) => openapi) > 500 && sum(({ types }) => types) > 800 && sum(({ crds }) => crds) > 30);
  },
});

/** Values that render what the defaults leave out. */
const allFeatures: Values = {
  clusters: [{ name: "rack1", endpoints: "192.0.2.1:443", ephemeral: { projects: ["default"], maxSize: "1Ti" } }],
  inlineVolumes: true,
  discoveryClient: "lbcsi",
  mgmtCa: "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
  jwtSecret: [{ name: "token", jwt: "YWJj" }, { name: "other", file: "rack1" }],
  caFiles: { "rack1.pem": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n" },
  controllerPriorityClassName: "",
  controllerPodAnnotations: { "example.com/team": "storage" },
  nodePodAnnotations: { "example.com/team": "storage" },
  controllerExtraVolumes: [{ name: "more", emptyDir: {} }],
  controllerExtraVolumeMounts: [{ name: "more", mountPath: "/etc/lbcsi", readOnly: true }],
  nodeExtraVolumes: [{ name: "more", emptyDir: {} }],
  nodeExtraVolumeMounts: [{ name: "more", mountPath: "/etc/lbcsi", readOnly: true }],
  registryName: "r.example",
  registryUsername: "u",
  registryPassword: "p",
  imagePullSecrets: ["pull"],
  maxVolumes: 100,
  maxIOQueues: 4,
  volumeHealth: true,
  mgmtTlsVerify: false,
  controllerNodeSelector: { zone: "a" },
  nodeNodeSelector: { zone: "a" },
  lbControllerTolerations: { key: "storage", operator: "Exists", effect: "NoExecute", tolerationSeconds: 60 },
  nodeMaxUnavailable: "10%",
  secretNames: ["example-secret"],
};

Deno.test({
  name: "the driver's chart with all its features is valid for every Kubernetes version",
  ignore: !needs("go"),
  fn: async () => {
    const requests = minors.flatMap((minor): RenderRequest[] => {
      const newerFeatures = {
        storageCapacity: minor >= 21,
        enableHealthMonitor: minor >= 25,
        volumeAttributesClassGate: minor >= 31,
      };
      return [
        { ...allFeatures, ...newerFeatures, controllerKind: "StatefulSet" },
        { ...allFeatures, ...newerFeatures, controllerKind: "Deployment" },
        {
          ...newerFeatures,
          backend: "poseidon",
          systems: [{ name: "rack1", endpoint: "192.0.2.1:3000" }],
          maxVolumes: 100,
        },
      ].map((values) => ({
        chart: chartDirectory("lb-csi-plugin"),
        release: "lb-csi",
        namespace: "storage",
        kubeVersion: `v1.${minor}.0`,
        values,
      }));
    });
    const rendered = await unlessGoLacks(() => render(requests));
    if (rendered === undefined) return;
    assert.deepEqual(rendered.flatMap(({ error }) => error ?? []), []);
    const manifests = requests.map(({ kubeVersion }, i) => ({
      name: `lb-csi-plugin with all features, ${i}`,
      kubeVersion: kubeVersion.slice(1, -2),
      text: rendered.slice(i, i + 1).flatMap(documents).join("\n---\n"),
      crds: "",
    }));

    const found = await validate(manifests);

    if (found !== undefined) assertValid(manifests, found);
  },
});

/** Invalid manifests: the expected problem, the minor version, the text. */
const invalid: readonly (readonly [problem: RegExp, minor: number, text: string])[] = [
  [
    /seLinuxMount/,
    24,
    "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: a}\nspec: {seLinuxMount: true}",
  ],
  [
    /fsGroupPolicy/,
    18,
    "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: a}\nspec: {fsGroupPolicy: File}",
  ],
  [
    /'ReadWriteOnceWithFSType', 'File', 'None'/,
    36,
    "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: a}\nspec: {fsGroupPolicy: Files}",
  ],
  [
    /knows no CSIDriver of storage.k8s.io\/v1beta1/,
    22,
    "apiVersion: storage.k8s.io/v1beta1\nkind: CSIDriver\nmetadata: {name: a}\nspec: {}",
  ],
  [
    /knows no PodDisruptionBudget of policy\/v1/,
    20,
    "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: a}\nspec: {}",
  ],
  [/missing property 'name'/, 37, "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{image: a}]}"],
  [/missing property 'name'/, 17, "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{image: a}]}"],
  [
    /got string, want integer/,
    30,
    'apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {priority: "1", containers: [{name: a}]}',
  ],
  [/containerz/, 30, "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a}], containerz: []}"],
  [/labelz/, 37, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, labelz: {}}"],
  [/already set in map/, 30, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\nmetadata: {name: b}"],
  [/knows no Nonsense of v1/, 30, "apiVersion: v1\nkind: Nonsense\nmetadata: {name: a}"],
  [
    /deletionPolicy/,
    30,
    "apiVersion: snapshot.storage.k8s.io/v1\nkind: VolumeSnapshotClass\nmetadata: {name: a}\ndriver: a\ndeletionPolicy: Keep",
  ],
  [
    /knows no VolumeSnapshotClass/,
    30,
    "apiVersion: snapshot.storage.k8s.io/v1beta1\nkind: VolumeSnapshotClass\nmetadata: {name: a}\ndriver: a\ndeletionPolicy: Delete",
  ],
];

Deno.test({
  name: "validation of an invalid manifest names the invalid field",
  ignore: !needs("go"),
  fn: async () => {
    const found = await validate(invalid.map(([problem, minor, text]) => ({
      name: String(problem),
      kubeVersion: `1.${minor}`,
      text,
      crds: snapshotApi(minor),
    })));
    if (found === undefined) return;

    for (const [i, [problem]] of invalid.entries()) assert.match(found[i]?.problems.join("\n") ?? "", problem);
  },
});

// ------------------------------------------------------------------------------------------------- the snapshot API

/** The definitions without prose: descriptions, messages of rules, annotations of tools. */
function structure(node: unknown): unknown {
  if (Array.isArray(node)) return node.map(structure);
  if (typeof node !== "object" || node === null) return node;
  return Object.fromEntries(
    Object.entries(node)
      .filter(([key, value]) => !(/^(description|deprecationWarning)$/.test(key) && typeof value === "string"))
      .filter(([key]) => !(key === "message" && "rule" in node))
      .map(([key, value]) => [key, structure(value)]),
  );
}

const specs = (text: string) =>
  parseAllDocuments(text).flatMap((document): { kind: string; metadata: { name: string }; spec: unknown }[] =>
    document.toJS() ?? []
  ).filter(({ kind }) => kind === "CustomResourceDefinition")
    .map(({ metadata, spec }) => [metadata.name, structure(spec)]);

for (
  const [path, module] of [
    ["helm/snapshot-controller-3/crds.yaml", "github.com/kubernetes-csi/external-snapshotter/client/v3@v3.0.0"],
    ["helm/snapshot-controller-4/crds-1.20.yaml", "github.com/kubernetes-csi/external-snapshotter/client/v6@v6.3.0"],
    ["helm/snapshot-controller-4/crds-1.25.yaml", "github.com/kubernetes-csi/external-snapshotter/client/v8@v8.6.0"],
  ] as const
) {
  Deno.test({
    name: `${path} defines the snapshot API of ${module}`,
    ignore: !needs("go"),
    fn: async () => {
      const directory = (await unlessGoLacks(() => goModules([module])))?.get(module);
      if (directory === undefined) return;

      const theirs = ["volumesnapshotclasses", "volumesnapshotcontents", "volumesnapshots"].flatMap((name) =>
        specs(Deno.readTextFileSync(`${directory}/config/crd/snapshot.storage.k8s.io_${name}.yaml`))
      );
      assert.equal(theirs.length, 3);
      assert.deepEqual(specs(readK8sFile(path)), theirs);
    },
  });
}

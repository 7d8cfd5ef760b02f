/** The charts, manifests and examples of k8s/: rendered by Helm, compared with each other and with the driver. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { controllerOptions, discoveryOptions, doctorOptions, nodeOptions } from "../../lib/cli/option_groups.ts";
import type { Options } from "../../lib/cli/options.ts";
import { parseConfig } from "../../lib/storage/lightos/cluster_file.ts";
import { parseSystems } from "../../lib/storage/poseidon/cluster_file.ts";
import { parse, parseAllDocuments } from "yaml";
import {
  chartDirectory,
  type ChartName,
  chartNames,
  documents,
  generated,
  manifests,
  minors,
  render,
  type Rendered,
  type RenderRequest,
  type Values,
  version,
} from "../../k8s/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";
import { type Container, objectsOf, podOf, referenceProblems } from "../support/objects.ts";

const go = needs("go");
const k8s = new URL("../../k8s/", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, k8s));

/** The first minor that a chart is for, and the last. */
const rangeOf: Readonly<Record<ChartName, readonly [number, number]>> = {
  "lb-csi-plugin": [17, 37],
  "lb-csi-workload-examples": [17, 37],
  "snapshot-controller-3": [17, 19],
  "snapshot-controller-4": [20, 37],
};

const requestFor = (chart: ChartName, minor: number, values: Values = {}): RenderRequest => ({
  chart: chartDirectory(chart),
  release: "lb-csi",
  namespace: "kube-system",
  kubeVersion: `v1.${minor}.0`,
  values,
});

const textOf = (rendered: Rendered) => documents(rendered).join("\n---\n");

Deno.test({
  name: "the committed manifests and examples are what the charts make",
  ignore: !go,
  fn: async () => {
    const wanted = await unlessGoLacks(manifests);
    if (wanted === undefined) return;

    const files = ["", "examples/"].flatMap((directory) =>
      [...Deno.readDirSync(new URL(directory, k8s))].map(({ name }) => directory + name)
    ).filter((path) => path.endsWith(".yaml"));
    assert.deepEqual(files.toSorted(), [...wanted.keys()].toSorted());
    for (const [path, text] of wanted) assert.ok(read(path) === text, `${path}: run \`deno task manifests\``);
  },
});

Deno.test({
  name: "each chart renders for each Kubernetes version that it is for, and helm lint finds nothing",
  ignore: !go,
  fn: async () => {
    const wanted = chartNames.flatMap((chart) => minors.map((minor) => ({ chart, minor })));
    const rendered = await unlessGoLacks(() =>
      render(wanted.map(({ chart, minor }) => ({ ...requestFor(chart, minor), lint: true })))
    );
    if (rendered === undefined) return;

    for (const [i, { chart, minor }] of wanted.entries()) {
      const [first, last] = rangeOf[chart];
      if (minor >= first && minor <= last) {
        assert.deepEqual([chart, minor, rendered[i]?.error, rendered[i]?.messages], [chart, minor, undefined, []]);
      } else {
        assert.match(
          rendered[i]?.error ?? "",
          new RegExp(`^${chart} is for Kubernetes .*, not for v1\\.${minor}\\.0$`),
        );
      }
    }
  },
});

Deno.test("charts and the default image have the driver's version", () => {
  for (const chart of chartNames) {
    const about: { version: string; appVersion: string } = parse(read(`helm/${chart}/Chart.yaml`));
    assert.equal(about.version, version, chart);
    if (chart.startsWith("lb-csi")) assert.equal(about.appVersion, version, chart);
  }
  assert.equal(parse(read("helm/lb-csi-plugin/values.yaml")).image, `lbcsi:${version}`);
});

// -------------------------------------------------------------------------------------------------- values have effect

/** Another value than the default, for each value; with others that it needs to have an effect, and since when. */
type Flips = Readonly<Record<string, { to: unknown; with?: Values; minor?: number }>>;

const pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
const toleration = { key: "storage", operator: "Exists" };
const registry = { registryName: "r.example", registryUsername: "u", registryPassword: "p" };
const container = { requests: { cpu: "1" } };

const rack1 = { name: "rack1", endpoints: "192.0.2.1:443" };
const inline = [{ ...rack1, ephemeral: { projects: ["default"], maxSize: "1Ti" } }];

const extraVolume = { name: "tokens", emptyDir: {} };
const extraMount = { name: "tokens", mountPath: "/etc/lbcsi", readOnly: true };

const flips: Readonly<Record<ChartName, Flips>> = {
  "lb-csi-plugin": {
    backend: { to: "poseidon" },
    kubeVersion: { to: "1.20" },
    imageRegistry: { to: "registry.example/storage" },
    image: { to: "lbcsi:other" },
    controllerImage: { to: "lbcsi-controller:other" },
    imagePullPolicy: { to: "Always" },
    imagePullSecrets: { to: ["pull"] },
    registryName: { to: "other.example", with: registry },
    registryUsername: { to: "other", with: registry },
    registryPassword: { to: "other", with: registry },
    sidecarImageRegistry: { to: "mirror.example" },
    sidecarImages: { to: { "csi-attacher": "mirror.example/attacher:v1" } },
    attach: { to: "direct" },
    discoveryClientInContainer: { to: false },
    discoveryClient: { to: "lbcsi" },
    discoveryClientImageRegistry: { to: "mirror.example" },
    discoveryClientImage: { to: "dc:other" },
    maxIOQueues: { to: 4 },
    loadNvmeTcp: { to: false },
    initImage: { to: "mirror.example/busybox:1" },
    defaultFsType: { to: "xfs" },
    enableSnapshot: { to: false },
    enableExpandVolume: { to: false },
    volumeAttributesClassGate: { to: true, minor: 33 },
    enableHealthMonitor: { to: true },
    storageCapacity: { to: true },
    inlineVolumes: { to: true, with: { clusters: inline } },
    inlineVolumesProfile: { to: "restricted", with: { clusters: inline, inlineVolumes: true } },
    volumeHealth: { to: true },
    extraCreateMetadata: { to: false },
    controllerOptions: { to: { LB_CSI_SNAPSHOT_METADATA: true } },
    nodeOptions: { to: { LB_CSI_LUKS_PBKDF_MEMORY: 1_048_576 } },
    discoveryClientOptions: { to: { LB_CSI_DISCOVERY_POLL: 5 }, with: { discoveryClient: "lbcsi" } },
    maxVolumes: { to: 100 },
    nodeIdSuffix: { to: ".other" },
    logLevel: { to: "debug" },
    logFormat: { to: "text" },
    sidecarLogLevel: { to: 5 },
    timeout: { to: "2m" },
    jwtSecret: { to: [{ name: "token", jwt: "YWJj" }] },
    caFiles: { to: { "rack1.pem": pem } },
    mgmtCa: { to: pem },
    mgmtTlsVerify: { to: false },
    clusters: { to: [{ name: "rack1", endpoints: "192.0.2.1:443" }] },
    systems: { to: [{ name: "rack1", endpoint: "192.0.2.1:3000" }], with: { backend: "poseidon" } },
    secretNames: { to: ["example-secret"] },
    kubeletRootDir: { to: "/data/kubelet" },
    controllerServiceAccountName: { to: "other-ctrl" },
    nodeServiceAccountName: { to: "other-node" },
    vendorRbacNames: { to: true },
    controllerKind: { to: "StatefulSet" },
    controllerReplicas: { to: 3 },
    controllerPriorityClassName: { to: "other" },
    nodePriorityClassName: { to: "other" },
    controllerPodAnnotations: { to: { "example.com/team": "storage" } },
    nodePodAnnotations: { to: { "example.com/team": "storage" } },
    controllerExtraVolumes: { to: [extraVolume], with: { controllerExtraVolumeMounts: [extraMount] } },
    controllerExtraVolumeMounts: { to: [extraMount], with: { controllerExtraVolumes: [extraVolume] } },
    nodeExtraVolumes: { to: [extraVolume], with: { nodeExtraVolumeMounts: [extraMount] } },
    nodeExtraVolumeMounts: { to: [extraMount], with: { nodeExtraVolumes: [extraVolume] } },
    runAsUser: { to: 1_000_650_000 },
    runAsGroup: { to: 1_000_650_000 },
    lbControllerTolerations: { to: toleration },
    lbNodeTolerations: { to: [toleration] },
    controllerNodeSelector: { to: { zone: "a" } },
    nodeNodeSelector: { to: { zone: "a" } },
    nodeMaxUnavailable: { to: "10%" },
    controllerResources: { to: container },
    nodeResources: { to: container },
    sidecarResources: { to: container },
    controllerLivenessPort: { to: 0 },
    nodeLivenessPort: { to: 0 },
    registrarLivenessPort: { to: 0 },
    controllerMetricsPort: { to: 9810 },
    nodeMetricsPort: { to: 9810 },
    discoveryClientMetricsPort: { to: 9811, with: { discoveryClient: "lbcsi" } },
  },
  "lb-csi-workload-examples": {
    kubeVersion: { to: "1.19", with: { snaps: { enabled: true } } },
    storageClassName: { to: "other", with: { block: { enabled: true } } },
    secretName: { to: "other", with: { storageclass: { enabled: true } } },
    secretNamespace: { to: "other", with: { storageclass: { enabled: true } } },
    mgmtEndpoint: { to: "192.0.2.9:443", with: { storageclass: { enabled: true } } },
    mgmtScheme: { to: "grpc", with: { storageclass: { enabled: true } } },
    projectName: { to: "other", with: { storageclass: { enabled: true } } },
    podImage: { to: "busybox:other", with: { block: { enabled: true } } },
    "storageclass.enabled": { to: true },
    "storageclass.jwt": { to: "" },
    "storageclass.mgmtCa": { to: pem },
    "storageclass.replicaCount": { to: 2 },
    "storageclass.compression": { to: "enabled" },
    "storageclass.qosPolicyName": { to: "gold" },
    "storageclass.fsType": { to: "xfs" },
    "storageclass.mkfsOptions": { to: "-m 0" },
    "storageclass.reclaimPolicy": { to: "Retain" },
    "storageclass.volumeBindingMode": { to: "WaitForFirstConsumer" },
    "block.enabled": { to: true },
    "block.size": { to: "4Gi" },
    "filesystem.enabled": { to: true },
    "filesystem.size": { to: "4Gi" },
    "preprovisioned.enabled": { to: true },
    "preprovisioned.volumeMode": { to: "Block" },
    "preprovisioned.size": { to: "4Gi" },
    "preprovisioned.uuid": { to: "99999999-2222-4333-8444-555555555555" },
    "encrypted.enabled": { to: true },
    "encrypted.size": { to: "4Gi" },
    "encrypted.passphrase": { to: "other" },
    "statefulset.enabled": { to: true },
    "statefulset.size": { to: "4Gi" },
    "snaps.enabled": { to: true },
    "snaps.stage": { to: "snapshot-from-pvc" },
    "snaps.size": { to: "4Gi", with: { snaps: { enabled: true, stage: "example-pvc" } } },
    "inline.enabled": { to: true },
    "inline.size": { to: "4Gi" },
    "poseidon.enabled": { to: true },
    "poseidon.stage": { to: "blockpod" },
    "poseidon.provisionerIP": { to: "192.0.2.2" },
    "poseidon.provisionerPort": { to: 3001 },
    "poseidon.arrayName": { to: "other" },
    "poseidon.targetAddress": { to: "192.0.2.11" },
    "poseidon.transportServiceId": { to: 4420 },
    "poseidon.fsType": { to: "xfs" },
    "poseidon.size": { to: "4Gi", with: { poseidon: { enabled: true, stage: "testpod" } } },
    "rwop.enabled": { to: true },
    "rwop.size": { to: "4Gi" },
    "attributes.enabled": { to: true },
    "attributes.size": { to: "4Gi" },
    "attributes.qosPolicyName": { to: "bronze" },
    "attributes.otherQosPolicyName": { to: "bronze" },
  },
  "snapshot-controller-3": {
    sidecarImageRegistry: { to: "mirror.example" },
    image: { to: "controller:other" },
    imagePullPolicy: { to: "Always" },
    imagePullSecrets: { to: ["pull"] },
    installCRDs: { to: false },
    priorityClassName: { to: "other" },
    runAsUser: { to: 1_000_650_000 },
    runAsGroup: { to: 1_000_650_000 },
    logLevel: { to: 5 },
    tolerations: { to: [toleration] },
    nodeSelector: { to: { zone: "a" } },
    resources: { to: container },
  },
  "snapshot-controller-4": {
    kubeVersion: { to: "1.24" },
    sidecarImageRegistry: { to: "mirror.example" },
    image: { to: "controller:other" },
    imagePullPolicy: { to: "Always" },
    imagePullSecrets: { to: ["pull"] },
    installCRDs: { to: false },
    replicas: { to: 3 },
    priorityClassName: { to: "other" },
    runAsUser: { to: 1_000_650_000 },
    runAsGroup: { to: 1_000_650_000 },
    logLevel: { to: 5 },
    tolerations: { to: [toleration] },
    nodeSelector: { to: { zone: "a" } },
    resources: { to: container },
  },
};

/** The names of a chart's values; of the examples, which have parts, with the part's. */
function valueNames(chart: ChartName): readonly string[] {
  const values: Record<string, unknown> = parse(read(`helm/${chart}/values.yaml`));
  return Object.entries(values).flatMap(([name, value]) =>
    typeof value === "object" && value !== null && "enabled" in value
      ? Object.keys(value).map((inner) => `${name}.${inner}`)
      : [name]
  );
}

/** Requests without and with another value. An example's part is enabled for its other values. */
function flipOf(chart: ChartName, name: string): readonly [RenderRequest, RenderRequest] {
  const flip = flips[chart][name];
  assert.ok(flip !== undefined, `${chart} has a value ${name} that no test changes`);
  const [part, inner] = name.split(".");
  assert.ok(part !== undefined);
  const minor = flip.minor ?? rangeOf[chart][1];
  if (inner === undefined) {
    return [requestFor(chart, minor, flip.with), requestFor(chart, minor, { ...flip.with, [part]: flip.to })];
  }
  const on = inner === "enabled" ? {} : { enabled: true };
  const base: Values = { [part]: on, ...flip.with };
  const changed = { ...(base[part] as Values), [inner]: flip.to };
  return [requestFor(chart, minor, base), requestFor(chart, minor, { ...base, [part]: changed })];
}

Deno.test({
  name: "every value of every chart changes what is rendered, and every reference in it still has its object",
  ignore: !go,
  fn: async () => {
    const wanted = chartNames.flatMap((chart) => valueNames(chart).map((name) => ({ chart, name })));
    const rendered = await unlessGoLacks(() => render(wanted.flatMap(({ chart, name }) => flipOf(chart, name))));
    if (rendered === undefined) return;

    for (const chart of chartNames) {
      assert.deepEqual(Object.keys(flips[chart]).toSorted(), valueNames(chart).toSorted());
    }
    for (const [i, { chart, name }] of wanted.entries()) {
      const [before, after] = rendered.slice(2 * i, 2 * i + 2);
      assert.ok(before !== undefined && after !== undefined);
      assert.deepEqual([chart, name, before.error, after.error], [chart, name, undefined, undefined]);
      assert.ok(textOf(before) !== textOf(after), `${chart}: ${name} changes nothing`);
      // Templates print large numbers so, and Kubernetes does not take them.
      assert.doesNotMatch(textOf(after), /\de\+\d/, `${chart}: ${name}`);
      if (chart !== "lb-csi-workload-examples") {
        assert.deepEqual(referenceProblems(objectsOf(textOf(after)), outside), [], `${chart}: ${name}`);
      }
    }
  },
});

const refused: readonly (readonly [ChartName, Values, RegExp, number?])[] = [
  ["lb-csi-plugin", { rwx: true }, /additional properties 'rwx' not allowed/],
  ["lb-csi-plugin", { attach: "iscsi" }, /attach.*must be one of '', 'discovery-client', 'direct'/s],
  ["lb-csi-plugin", { maxIOQueues: -1 }, /maxIOQueues/],
  ["lb-csi-plugin", { kubeletRootDir: "var/lib/kubelet" }, /kubeletRootDir/],
  ["lb-csi-plugin", { mgmtCa: "no certificate" }, /mgmtCa/],
  ["lb-csi-plugin", { image: "" }, /image/],
  ["lb-csi-plugin", { timeout: "60" }, /timeout/],
  ["lb-csi-plugin", { runAsUser: 0 }, /runAsUser/],
  ["lb-csi-plugin", { jwtSecret: [{ name: "a" }, { name: "b", file: "jwt" }] }, /another entry is \/etc\/lb-csi\/jwt/],
  ["lb-csi-plugin", { jwtSecret: [{ name: "a", file: "../b" }] }, /jwtSecret.*file/s],
  ["lb-csi-plugin", { caFiles: { "clusters.yaml": pem } }, /invalid propertyName 'clusters\.yaml'/],
  ["lb-csi-plugin", { caFiles: { "a.pem": "none" } }, /caFiles/],
  [
    "lb-csi-plugin",
    { clusters: [{ ...rack1, jwt: "/etc/lb-csi/jwt" }] },
    /clusters rack1: the controller pod has no file \/etc\/lb-csi\/jwt, which jwt names; add it to jwtSecret/,
  ],
  [
    "lb-csi-plugin",
    { clusters: [{ ...rack1, ca: "/etc/lbcsi/rack1.pem" }] },
    /clusters rack1: the controller pod has no file \/etc\/lbcsi\/rack1\.pem, which ca names; add it to caFiles, or mount/,
  ],
  [
    "lb-csi-plugin",
    {
      inlineVolumes: true,
      clusters: [{ ...inline[0], jwt: "/etc/lbcsi/jwt" }],
      controllerExtraVolumes: [extraVolume],
      controllerExtraVolumeMounts: [extraMount],
    },
    /clusters rack1: the node pod has no file \/etc\/lbcsi\/jwt/,
  ],
  ["lb-csi-plugin", { clusters: [{ ...rack1, schem: "grpc" }] }, /schem/],
  ["lb-csi-plugin", { clusters: [{ ...rack1, ephemeral: { projects: "a" } }] }, /maxSize/],
  ["lb-csi-plugin", { controllerOptions: { LB_CSI_LOG_LEVLE: "debug" } }, /LB_CSI_LOG_LEVLE/],
  ["lb-csi-plugin", { nodeOptions: { LB_CSI_JWT: "x" } }, /LB_CSI_JWT/],
  ["lb-csi-plugin", { discoveryClientOptions: { LB_CSI_POLL: 5 } }, /LB_CSI_POLL/],
  ["lb-csi-plugin", { jwtSecret: [{ name: "a", jwt: "not base64!" }] }, /jwtSecret/],
  ["lb-csi-plugin", { jwtSecret: [{ name: "a", namespace: "other" }] }, /its namespace is other, but .* kube-system/],
  ["lb-csi-plugin", { registryUsername: "u" }, /registryUsername needs registryName/],
  ["lb-csi-plugin", { clusters: [{ name: "rack1" }] }, /endpoints/],
  ["lb-csi-plugin", { nodeOptions: { PATH: "/tmp" } }, /nodeOptions.*PATH/s],
  ["lb-csi-plugin", { sidecarImages: { "csi-other": "x" } }, /csi-other/],
  ["lb-csi-plugin", { storageCapacity: true }, /storageCapacity needs Kubernetes 1\.21/, 20],
  ["lb-csi-plugin", { volumeAttributesClassGate: true }, /volumeAttributesClassGate needs Kubernetes 1\.31/, 30],
  ["lb-csi-plugin", { enableHealthMonitor: true }, /enableHealthMonitor needs Kubernetes 1\.25/, 24],
  ["lb-csi-plugin", { backend: "other" }, /backend.*must be one of 'lightos', 'poseidon'/s],
  ["lb-csi-plugin", { backend: "poseidon", attach: "discovery-client" }, /attach discovery-client is for LightOS/],
  ["lb-csi-plugin", { backend: "poseidon", controllerKind: "Deployment" }, /controllerKind Deployment is for LightOS/],
  ["lb-csi-plugin", { backend: "poseidon", jwtSecret: [{ name: "a" }] }, /jwtSecret, .* are for LightOS/],
  ["lb-csi-plugin", { backend: "poseidon", clusters: inline }, /clusters is for LightOS/],
  ["lb-csi-plugin", { backend: "poseidon", inlineVolumes: true }, /inlineVolumes is for LightOS/],
  ["lb-csi-plugin", { backend: "poseidon", vendorRbacNames: true }, /vendorRbacNames is for LightOS/],
  ["lb-csi-plugin", { systems: [{ name: "a", endpoint: "192.0.2.1:3000" }] }, /systems is for PoseidonOS/],
  ["lb-csi-plugin", { inlineVolumes: true }, /inlineVolumes needs one of clusters to have the key ephemeral/],
  ["lb-csi-workload-examples", { attributes: { enabled: true } }, /attributes needs Kubernetes 1\.31/, 30],
  ["lb-csi-workload-examples", { block: { enabled: true, size: "100M" } }, /size/],
  ["lb-csi-workload-examples", { mgmtEndpoint: "192.0.2.1" }, /mgmtEndpoint/],
  ["snapshot-controller-4", { replicas: 0 }, /replicas/],
];

Deno.test({
  name: "values that mean nothing, or harm, are refused with their name",
  ignore: !go,
  fn: async () => {
    const rendered = await unlessGoLacks(() =>
      render(refused.map(([chart, values, , minor]) => requestFor(chart, minor ?? rangeOf[chart][1], values)))
    );
    if (rendered === undefined) return;

    for (const [i, [, , message]] of refused.entries()) assert.match(rendered[i]?.error ?? "", message);
  },
});

// --------------------------------------------------------------------------------------------------------- references

/** What a cluster has without us. */
const outside = new Set([
  "PriorityClass system-cluster-critical",
  "PriorityClass system-node-critical",
  "PriorityClass other",
  // Named, but never made: a StatefulSet has to name one, and its pods here need no host names.
  "Service kube-system/lb-csi-ctrl-svc",
  "Service kube-system/poscsi-controller",
  "Service kube-system/snapshot-controller",
  "Secret kube-system/pull",
]);

for (const { path } of generated.filter(({ path }) => !path.startsWith("examples/"))) {
  Deno.test(`in ${path} every name that is referred to is there, and nothing is there twice`, () => {
    const objects = objectsOf(read(path));

    assert.ok(objects.length >= 7);
    assert.deepEqual(referenceProblems(objects, outside), []);
  });
}

Deno.test("in the examples every name that is referred to is in one of them", () => {
  const files = generated.map(({ path }) => path).filter((path) => path.startsWith("examples/"));
  // The two ways to bring a volume of one's own are two answers to one question.
  for (
    const left of ["examples/preprovisioned-block-workload.yaml", "examples/preprovisioned-filesystem-workload.yaml"]
  ) {
    const objects = files.filter((path) => path !== left).flatMap((path) => objectsOf(read(path)));

    assert.ok(objects.length > 25);
    assert.deepEqual(referenceProblems(objects, outside), []);
  }
});

const brokenReferences: readonly (readonly [what: string, change: (text: string) => string, problem: RegExp])[] = [
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
for (const [what, change, problem] of brokenReferences) {
  Deno.test(`a broken reference to a ${what} is found`, () => {
    const text = read("lb-csi-plugin-k8s-v1.30.yaml");
    assert.notEqual(change(text), text);

    assert.match(referenceProblems(objectsOf(change(text)), outside).join("\n"), problem);
  });
}

// ------------------------------------------------------------------------------------------- the driver and its manifests

const pluginFiles = generated.filter(({ chart }) => chart === "lb-csi-plugin").map(({ path }) => path);
const lightosFiles = pluginFiles.filter((path) => path.startsWith("lb-csi-plugin-"));
const poseidonFiles = pluginFiles.filter((path) => path.startsWith("poscsi-"));
const minorOf = (path: string) => Number(/v1\.(\d+)/.exec(path)?.[1]);

/** The driver's container in the pods of a role. */
function driverContainer(path: string, role: string): Container {
  const pods = objectsOf(read(path)).flatMap((object) => podOf(object) ?? []);
  const containers = pods.flatMap(({ spec }) => spec.containers).filter(({ args }) => args?.[0] === role);
  const [container] = containers;
  assert.deepEqual(containers.map(({ name }) => name), [path.startsWith("poscsi-") ? "poscsi" : "lb-csi-plugin"]);
  assert.ok(container !== undefined);
  return container;
}

for (const role of ["controller", "node"]) {
  Deno.test(`every argument and variable that manifests give to the ${role} is one of its own`, async () => {
    const { stdout } = await new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", fileURLToPath(new URL("../../main.ts", import.meta.url)), role, "--help"],
      stderr: "null",
    }).output();
    const help = new TextDecoder().decode(stdout);
    const known = new Set([...help.matchAll(/env: (\w+)/g)].map(([, name]) => name));
    const templates = read("helm/lb-csi-plugin/templates/controller.yaml") +
      read("helm/lb-csi-plugin/templates/node.yaml") + read("helm/lb-csi-plugin/templates/_helpers.tpl");

    for (const path of pluginFiles) {
      const { args, env = [] } = driverContainer(path, role);
      const names = env.map(({ name }) => name);
      assert.deepEqual(args, [role]);
      assert.ok(names.length >= 5);
      assert.deepEqual(names.filter((name) => name !== "KUBE_NODE_NAME" && !known.has(name)), [], path);
    }
    // Those that only other values bring.
    const all = [...templates.matchAll(/- name: ((?:LB_CSI|CSI)_\w+)/g)].map(([, name]) => name ?? "");
    const other = role === "controller" ? ["LB_CSI_NODE_ID", "LB_CSI_ATTACH", "LB_CSI_MAX_VOLUMES"] : [];
    // Of other commands that run in these pods: discovery-client, doctor.
    const others = ["LB_CSI_DISCOVERY_IO_QUEUES", "LB_CSI_DISCOVERY_METRICS_ADDRESS", "LB_CSI_KUBELET_DIR"];
    assert.ok(all.length > 10);
    assert.deepEqual(all.filter((name) => !known.has(name) && ![...other, ...others].includes(name)), []);
  });
}

Deno.test("names, node IDs and paths are those of the vendor's driver, so that volumes stay where they are", () => {
  for (const path of lightosFiles) {
    const objects = objectsOf(read(path));
    const find = (kind: string) => objects.filter((object) => object.kind === kind);
    const names = (kind: string) => find(kind).map(({ metadata }) => metadata.name).toSorted();
    const [daemonSet] = find("DaemonSet");
    const controller = [...find("Deployment"), ...find("StatefulSet")][0];
    const minor = minorOf(path);

    assert.deepEqual(names("CSIDriver"), ["csi.lightbitslabs.com"]);
    assert.deepEqual(names("ServiceAccount"), ["lb-csi-ctrl-sa", "lb-csi-node-sa"]);
    assert.deepEqual(names("ClusterRole"), [
      "lb-csi-attacher-role",
      "lb-csi-provisioner-role",
      "lb-csi-resizer-role",
      "lb-csi-snapshotter-role",
    ]);
    assert.deepEqual(names("ClusterRoleBinding"), [
      "lb-csi-attacher-binding",
      "lb-csi-provisioner-binding",
      "lb-csi-resizer-binding",
      "lb-csi-snapshotter-binding",
    ]);
    assert.equal(controller?.kind, minor >= 25 ? "Deployment" : "StatefulSet");
    assert.equal(controller.metadata.name, "lb-csi-controller");
    assert.deepEqual(controller.spec?.selector?.matchLabels, { app: "lb-csi-plugin", role: "controller" });
    assert.ok(controller.kind === "Deployment" || controller.spec.serviceName === "lb-csi-ctrl-svc");
    assert.equal(daemonSet?.metadata.name, "lb-csi-node");
    assert.deepEqual(daemonSet.spec?.selector?.matchLabels, { app: "lb-csi-plugin", role: "node" });

    const pod = daemonSet.spec.template?.spec;
    const node = driverContainer(path, "node");
    const value = (name: string) => node.env?.find((entry) => entry.name === name)?.value;
    assert.equal(value("LB_CSI_NODE_ID"), "$(KUBE_NODE_NAME).node");
    assert.equal(value("CSI_ENDPOINT"), "unix:///csi/csi.sock");
    const hostPaths = pod?.volumes?.flatMap(({ hostPath }) => hostPath?.path ?? []);
    const plugin = "/var/lib/kubelet/plugins/csi.lightbitslabs.com";
    assert.deepEqual(hostPaths, [
      plugin,
      "/var/lib/kubelet/plugins_registry/",
      "/var/lib/kubelet/plugins/kubernetes.io/csi",
      "/var/lib/kubelet/pods",
      "/dev",
      "/",
      path.includes("-dc") ? `${plugin}/discovery.d` : "/etc/discovery-client/discovery.d",
    ]);
    assert.ok(pod?.containers[1]?.args?.includes(`--kubelet-registration-path=${plugin}/csi.sock`));
  }
});

/** The kinds of objects whose names all drivers of a cluster, or of a Kubernetes namespace, share. */
const rbacKinds = ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];

Deno.test("roles and bindings have names of this driver's own, which no other CSI driver can take", () => {
  for (const path of pluginFiles) {
    const prefix = path.startsWith("lb-csi") ? "lb-csi-" : "poscsi-";
    const rights = objectsOf(read(path)).filter(({ kind }) => rbacKinds.includes(kind));

    assert.ok(rights.length >= 4);
    assert.deepEqual(rights.filter(({ metadata }) => !metadata.name.startsWith(prefix)), [], path);
  }
});

Deno.test({
  name: "with vendorRbacNames, roles and bindings have the names of the vendor's driver, each with the same rules",
  ignore: !go,
  fn: async () => {
    const requests = [{}, { vendorRbacNames: true }].map((values) =>
      requestFor("lb-csi-plugin", 37, { ...values, enableHealthMonitor: true })
    );
    const rendered = await unlessGoLacks(() => render(requests));
    if (rendered === undefined) return;
    const [own = [], vendors = []] = rendered.map((one) =>
      objectsOf(textOf(one)).filter(({ kind }) => rbacKinds.includes(kind))
    );
    const names = (kind: string) => vendors.filter((one) => one.kind === kind).map(({ metadata }) => metadata.name);

    assert.deepEqual(names("ClusterRole"), [
      "external-provisioner-runner",
      "external-attacher-runner",
      "lb-csi-external-resizer-runner-role",
      "external-snapshotter-runner",
      "lb-csi-health-monitor-role",
    ]);
    assert.deepEqual(names("RoleBinding"), [
      "csi-provisioner-role-cfg",
      "csi-attacher-role-cfg",
      "csi-resizer-role-cfg",
      "external-snapshotter-leaderelection",
      "lb-csi-health-monitor-cfg",
    ]);
    assert.deepEqual(vendors.map(({ rules }) => rules), own.map(({ rules }) => rules));
  },
});

Deno.test({
  name: "each cluster of the chart can have a token and certificates of its own, as files of the pod",
  ignore: !go,
  fn: async () => {
    const values = {
      jwtSecret: [{ name: "global" }, { name: "rack1", jwt: "YWJj" }, { name: "secret-of-rack2", file: "rack2.jwt" }],
      caFiles: { "rack1.pem": pem },
      mgmtCa: pem,
      controllerExtraVolumes: [extraVolume],
      controllerExtraVolumeMounts: [extraMount],
      controllerPriorityClassName: "",
      nodePriorityClassName: "",
      clusters: [
        { ...rack1, jwt: "/etc/lb-csi/rack1", ca: "/etc/lb-csi-config/rack1.pem" },
        { name: "rack2", endpoints: "192.0.2.9:443", jwt: "/etc/lb-csi/rack2.jwt", ca: "/etc/lb-csi-config/ca.pem" },
        { name: "rack3", endpoints: "192.0.2.17:443", jwt: "/etc/lbcsi/jwt", ca: "/etc/lbcsi/ca.pem" },
      ],
    };
    const rendered = await unlessGoLacks(() => render([requestFor("lb-csi-plugin", 37, values)]));
    if (rendered === undefined) return;
    const [only] = rendered;
    assert.ok(only !== undefined && only.error === undefined, JSON.stringify(only));
    const objects = objectsOf(textOf(only));
    const config = objects.find(({ kind }) => kind === "ConfigMap") as unknown as { data: Record<string, string> };
    const pod = objects.find(({ kind }) => kind === "Deployment")?.spec?.template?.spec as unknown as {
      volumes: { name: string; projected?: { sources: { secret: { name: string; items: { path: string }[] } }[] } }[];
    };
    const tokens = pod.volumes.find(({ name }) => name === "jwt")?.projected?.sources ?? [];

    assert.deepEqual(tokens.map(({ secret }) => [secret.name, secret.items.map(({ path }) => path)]), [
      ["global", ["jwt"]],
      ["rack1", ["rack1"]],
      ["secret-of-rack2", ["rack2.jwt"]],
    ]);
    assert.deepEqual(Object.keys(config.data).sort(), ["ca.pem", "clusters.yaml", "rack1.pem"]);
    assert.deepEqual(objects.filter(({ kind }) => kind === "Secret").map(({ metadata }) => metadata.name), ["rack1"]);
    assert.doesNotMatch(textOf(only), /priorityClassName/);
  },
});

Deno.test({
  name: "certificates of the chart may have text around them, in files of any name, and private keys are refused",
  ignore: !go,
  fn: async () => {
    const bundle = `# our CA\nsubject=CN = ca\n${pem}`;
    const key = "-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY-----\n";
    const rendered = await unlessGoLacks(() =>
      render([
        requestFor("lb-csi-plugin", 37, { mgmtCa: bundle, caFiles: { "1e3": bundle.replaceAll("\n", "\r\n") } }),
        requestFor("lb-csi-plugin", 37, { mgmtCa: `${pem}${key}` }),
        requestFor("lb-csi-plugin", 37, { caFiles: { "ca.crt": `${key}${pem}` } }),
        requestFor("lb-csi-plugin", 37, { mgmtCa: "/etc/ca.pem" }),
      ])
    );
    if (rendered === undefined) return;
    const [good, ...bad] = rendered;
    assert.ok(good !== undefined && good.error === undefined, JSON.stringify(good));
    const config = objectsOf(textOf(good)).find(({ kind }) => kind === "ConfigMap") as unknown as {
      data: Record<string, string>;
    };

    assert.deepEqual(Object.keys(config.data).sort(), ["1e3", "ca.pem"]);
    for (const text of Object.values(config.data)) assert.equal(text.trim(), bundle.trim());
    for (const [at, { error }] of bad.entries()) assert.match(error ?? "", /mgmtCa|caFiles/, `${at}`);
  },
});

Deno.test({
  name: "the notes of the chart find the pods of the release",
  ignore: !go,
  fn: async () => {
    const backends = ["lightos", "poseidon"].map((backend) => requestFor("lb-csi-plugin", 37, { backend }));
    const rendered = await unlessGoLacks(() => render(backends));
    if (rendered === undefined) return;

    for (const one of rendered) {
      const notes = one.files?.["lb-csi-plugin/templates/NOTES.txt"] ?? "";
      const [, apps = ""] = /get pods -l 'app in \(([^)]+)\)'/.exec(notes) ?? [];
      const workloads = objectsOf(textOf(one)).filter(({ kind }) => /^(DaemonSet|Deployment|StatefulSet)$/.test(kind));
      const labels = workloads.map(({ spec }) => (spec?.selector?.matchLabels as { app?: string } | undefined)?.app);
      assert.equal(labels.length, 2);
      assert.deepEqual(labels.filter((app) => !apps.split(", ").includes(app ?? "")), [], notes);
    }
  },
});

Deno.test("the chart's schema has each variable that the driver has and the chart does not set, and each key of cluster files", () => {
  const { properties }: { properties: Record<string, { properties: object; items: { properties: object } }> } = JSON
    .parse(read("helm/lb-csi-plugin/values.schema.json"));
  const variables = (...tables: readonly Options[]) =>
    new Set(tables.flatMap((table) => Object.values(table).flatMap(({ env = [] }) => env)));
  const setByChart = (role: string) =>
    driverContainer("lb-csi-plugin-k8s-v1.37.yaml", role).env?.map(({ name }) => name);
  const allowed = (value: string) => Object.keys(properties[value]?.properties ?? {}).sort();
  const without = (all: ReadonlySet<string>, taken: readonly string[] = []) =>
    [...all].filter((name) => !taken.includes(name)).sort();
  const keysOf = (read: () => unknown) => {
    try {
      read();
    } catch (error) {
      return /known: ([^)]+)\)/.exec(error instanceof Error ? error.message : "")?.[1]?.split(", ").sort();
    }
    return undefined;
  };
  const keysIn = (value: string) => Object.keys(properties[value]?.items.properties ?? {}).sort();

  assert.deepEqual(allowed("controllerOptions"), without(variables(controllerOptions), setByChart("controller")));
  assert.deepEqual(allowed("nodeOptions"), without(variables(nodeOptions, doctorOptions), setByChart("node")));
  assert.deepEqual(
    allowed("discoveryClientOptions"),
    without(variables(discoveryOptions), ["LB_CSI_LOG_LEVEL", "LB_CSI_LOG_FMT", "LB_CSI_DISCOVERY_IO_QUEUES"]),
  );
  assert.deepEqual(keysIn("clusters"), keysOf(() => parseConfig("f", "clusters: [{ zzz: 1 }]")));
  assert.deepEqual(keysIn("systems"), keysOf(() => parseSystems("f", "systems: [{ zzz: 1 }]")));
});

Deno.test("PoseidonOS gets a driver of its own, with one controller, beside the one for LightOS", () => {
  for (const path of poseidonFiles) {
    const objects = objectsOf(read(path));
    const lightos = objectsOf(read(path.replace("poscsi-", "lb-csi-plugin-")));
    const key = ({ kind, metadata }: { kind: string; metadata: { name: string } }) => `${kind} ${metadata.name}`;
    const controller = objects.find(({ metadata }) => metadata.name === "poscsi-controller");
    const value = (role: string, name: string) =>
      driverContainer(path, role).env?.find((entry) => entry.name === name)?.value;

    const shared = objects.map(key).filter((one) => lightos.map(key).includes(one));
    assert.deepEqual(shared, []);
    assert.ok(objects.some((object) => key(object) === "CSIDriver csi.pos.io"));
    assert.equal(controller?.kind, "StatefulSet");
    assert.deepEqual(["controller", "node"].map((role) => value(role, "LB_CSI_BACKEND")), ["poseidon", "poseidon"]);
    assert.equal(value("node", "LB_CSI_ATTACH"), "direct");
    assert.match(read(path), /--kubelet-registration-path=.*\/plugins\/csi\.pos\.io\/csi\.sock/);
    assert.doesNotMatch(read(path), /lightos|secrets|snapshot/);
  }
  assert.equal(poseidonFiles.length, minors.length);
});

Deno.test("each Kubernetes version gets the CSIDriver fields that it knows, and none that cannot be applied over the vendor's", () => {
  const fieldsOf = (minor: number) => {
    const objects = objectsOf(read(`lb-csi-plugin-k8s-v1.${minor}.yaml`));
    const driver = objects.find(({ kind }) => kind === "CSIDriver");
    return [driver?.apiVersion, driver?.spec];
  };
  const oldest = { attachRequired: true, podInfoOnMount: true, volumeLifecycleModes: ["Persistent"] };
  const since20 = { ...oldest, fsGroupPolicy: "ReadWriteOnceWithFSType", requiresRepublish: false };
  const since23 = { ...since20, storageCapacity: false };
  const since25 = { ...since23, seLinuxMount: true };

  for (const minor of minors) {
    const fields = minor < 20
      ? oldest
      : minor < 23
      ? since20
      : minor < 25
      ? since23
      : minor < 29
      ? since25
      : { ...since25, fsGroupPolicy: "File" };
    assert.deepEqual(fieldsOf(minor), [`storage.k8s.io/v1${minor < 18 ? "beta1" : ""}`, fields], `1.${minor}`);
  }
});

Deno.test("only what must be privileged is, and the controller is nobody, on a file system that it cannot write", () => {
  for (const path of pluginFiles) {
    const pods = objectsOf(read(path)).flatMap((object) => podOf(object) ?? []);
    const containers = pods.flatMap(({ spec }) => [...spec.initContainers ?? [], ...spec.containers]);
    const privileged = containers.filter(({ securityContext }) => securityContext?.privileged);
    const controller = pods.find(({ spec }) => spec.containers.some(({ args }) => args?.[0] === "controller"))?.spec;

    assert.deepEqual(privileged.map(({ name }) => name), [
      "init-nvme-tcp",
      driverContainer(path, "node").name,
      ...path.includes("-dc") ? ["lb-nvme-discovery-client"] : [],
    ]);
    assert.ok(containers.length - privileged.length >= 6);
    for (const { name, securityContext } of containers.filter((container) => !privileged.includes(container))) {
      // Beside the driver on the node they are root without a capability, in the controller the pod's user.
      const onNode = pods.some(({ spec }) =>
        spec.hostNetwork && spec.containers.some((one) => one.securityContext === securityContext)
      );
      assert.ok(!onNode || ["csi-node-driver-registrar", "livenessprobe"].includes(name));
      assert.deepEqual(securityContext, {
        ...onNode ? { runAsUser: 0 } : {},
        allowPrivilegeEscalation: false,
        readOnlyRootFilesystem: true,
        capabilities: { drop: ["ALL"] },
      });
    }
    assert.equal(controller?.securityContext?.runAsNonRoot, true);
    assert.equal(controller.hostNetwork, undefined);
  }
});

Deno.test("sidecars that elect a leader may, and others need no lease", () => {
  for (const path of pluginFiles) {
    const objects = objectsOf(read(path));
    const controller = objects.find(({ metadata }) => /^(lb-csi|poscsi)-controller$/.test(metadata.name));
    const sidecars = controller?.spec?.template?.spec.containers.filter(({ name }) => name.startsWith("csi-")) ?? [];
    const electing = sidecars.filter(({ args }) => args?.includes("--leader-election"));
    const leases = objects.filter(({ kind, rules }) => kind === "Role" && rules?.[0]?.resources.includes("leases"));

    // PoseidonOS has no snapshots and grows nothing; what can change its volumes is a resizer that Kubernetes 1.34 brings.
    assert.equal(sidecars.length, path.startsWith("lb-csi") ? 4 : minorOf(path) < 34 ? 2 : 3);
    assert.equal(electing.length, controller?.kind === "Deployment" ? 4 : 0, path);
    assert.equal(leases.length, electing.length, path);
    assert.equal(objects.filter(({ kind }) => kind === "PodDisruptionBudget").length, electing.length > 0 ? 1 : 0);
  }
});

Deno.test("manifests are YAML that both parsers of today understand alike", () => {
  for (const { path } of generated) {
    for (const document of parseAllDocuments(read(path), { version: "1.1" })) {
      assert.deepEqual(document.errors, [], path);
    }
    assert.doesNotMatch(read(path), /[ \t]$/m, path);
    // 0440 is 288 to some and 440 to others.
    assert.doesNotMatch(read(path), /: 0\d+$/m, path);
  }
});

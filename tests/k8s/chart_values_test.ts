/** The values of each chart: every one has an effect, and invalid ones are rejected. */
import assert from "node:assert/strict";
import { parse } from "yaml";
import { type ChartName, chartNames, render, type RenderRequest, type Values } from "../../k8s/charts.ts";
import {
  chartMinors,
  existingObjects,
  extraMount,
  extraVolume,
  pem,
  readK8sFile,
  renderRequest,
  textOf,
} from "../support/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";
import { objectsOf, referenceProblems } from "../support/objects.ts";

const go = needs("go");

/** For each value: another one than the default, other values that it needs to have an effect, and since which minor. */
type OtherValues = Readonly<Record<string, { to: unknown; with?: Values; minor?: number }>>;

const toleration = { key: "storage", operator: "Exists" };
const registry = { registryName: "r.example", registryUsername: "u", registryPassword: "p" };
const container = { requests: { cpu: "1" } };

const rack1 = { name: "rack1", endpoints: "192.0.2.1:443" };
const inline = [{ ...rack1, ephemeral: { projects: ["default"], maxSize: "1Ti" } }];

const otherValues: Readonly<Record<ChartName, OtherValues>> = {
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

/** The names of a chart's values. The examples have parts, whose values are named `part.value`. */
function valueNames(chart: ChartName): readonly string[] {
  const values: Record<string, unknown> = parse(readK8sFile(`helm/${chart}/values.yaml`));
  return Object.entries(values).flatMap(([name, value]) =>
    typeof value === "object" && value !== null && "enabled" in value
      ? Object.keys(value).map((inner) => `${name}.${inner}`)
      : [name]
  );
}

/** Requests without and with another value. A part of the examples is enabled when another of its values changes. */
function requestPair(chart: ChartName, name: string): readonly [RenderRequest, RenderRequest] {
  const other = otherValues[chart][name];
  assert.ok(other !== undefined, `${chart} has a value ${name} that no test changes`);
  const [part, inner] = name.split(".");
  assert.ok(part !== undefined);
  const minor = other.minor ?? chartMinors[chart].last;
  if (inner === undefined) {
    return [renderRequest(chart, minor, other.with), renderRequest(chart, minor, { ...other.with, [part]: other.to })];
  }
  const on = inner === "enabled" ? {} : { enabled: true };
  const base: Values = { [part]: on, ...other.with };
  const changed = { ...(base[part] as Values), [inner]: other.to };
  return [renderRequest(chart, minor, base), renderRequest(chart, minor, { ...base, [part]: changed })];
}

Deno.test({
  name: "every value of every chart changes the rendered objects, and every object that they refer to exists",
  ignore: !go,
  fn: async () => {
    const cases = chartNames.flatMap((chart) => valueNames(chart).map((name) => ({ chart, name })));
    const rendered = await unlessGoLacks(() => render(cases.flatMap(({ chart, name }) => requestPair(chart, name))));
    if (rendered === undefined) return;

    for (const chart of chartNames) {
      assert.deepEqual(Object.keys(otherValues[chart]).toSorted(), valueNames(chart).toSorted());
    }
    for (const [i, { chart, name }] of cases.entries()) {
      const [before, after] = rendered.slice(2 * i, 2 * i + 2);
      assert.ok(before !== undefined && after !== undefined);
      assert.deepEqual([chart, name, before.error, after.error], [chart, name, undefined, undefined]);
      assert.ok(textOf(before) !== textOf(after), `${chart}: ${name} changes nothing`);
      // Templates print large numbers with an exponent, which Kubernetes rejects.
      assert.doesNotMatch(textOf(after), /\de\+\d/, `${chart}: ${name}`);
      if (chart !== "lb-csi-workload-examples") {
        assert.deepEqual(referenceProblems(objectsOf(textOf(after)), existingObjects), [], `${chart}: ${name}`);
      }
    }
  },
});

const invalid: readonly (readonly [ChartName, Values, RegExp, number?])[] = [
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
  name: "values without effect and harmful values are rejected with their name",
  ignore: !go,
  fn: async () => {
    const rendered = await unlessGoLacks(() =>
      render(invalid.map(([chart, values, , minor]) => renderRequest(chart, minor ?? chartMinors[chart].last, values)))
    );
    if (rendered === undefined) return;

    for (const [i, [, , message]] of invalid.entries()) assert.match(rendered[i]?.error ?? "", message);
  },
});

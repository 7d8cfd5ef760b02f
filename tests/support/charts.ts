/** The charts and manifests of k8s/, as tests render and read them. */
import assert from "node:assert/strict";
import {
  chartDirectory,
  type ChartName,
  documents,
  type RenderedChart,
  type RenderRequest,
  type Values,
} from "../../k8s/charts.ts";
import { type MinorRange, renderedFiles, supportedMinors } from "../../k8s/rendered_files.ts";
import { type Container, objectsOf, podOf } from "./objects.ts";

const k8s = new URL("../../k8s/", import.meta.url);

/** The text of a file of k8s/. */
export const readK8sFile = (path: string) => Deno.readTextFileSync(new URL(path, k8s));

/** The path in k8s/ of a manifest that the bundle names after one Kubernetes version, `poscsi-k8s-v1.30.yaml`. */
export function manifestPath(bundleName: string): string {
  const file = renderedFiles.find(({ bundlePaths }) => bundlePaths.includes(`k8s/${bundleName}`));
  if (file === undefined) throw new Error(`the bundle has no k8s/${bundleName}`);
  return file.path;
}

/** The Kubernetes versions that a chart is for. */
export const chartMinors: Readonly<Record<ChartName, MinorRange>> = {
  "lb-csi-plugin": supportedMinors,
  "lb-csi-workload-examples": supportedMinors,
  "snapshot-controller-3": { first: 17, last: 19 },
  "snapshot-controller-4": { first: 20, last: supportedMinors.last },
};

/** A request to render a chart for a minor version of Kubernetes 1. */
export const renderRequest = (chart: ChartName, minor: number, values: Values = {}): RenderRequest => ({
  chart: chartDirectory(chart),
  release: "lb-csi",
  namespace: "kube-system",
  kubeVersion: `v1.${minor}.0`,
  values,
});

/** The YAML text of a rendered chart. */
export const textOf = (rendered: RenderedChart) => documents(rendered).join("\n---\n");

/** Objects that a cluster has without us, as `referenceProblems` takes them. */
export const existingObjects: ReadonlySet<string> = new Set([
  "PriorityClass system-cluster-critical",
  "PriorityClass system-node-critical",
  "PriorityClass other",
  // Named but never made: a StatefulSet has to name a Service, and its pods here need no host names.
  "Service kube-system/lb-csi-ctrl-svc",
  "Service kube-system/poscsi-controller",
  "Service kube-system/snapshot-controller",
  "Secret kube-system/pull",
]);

/** Text in the form of a certificate. */
export const pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";

/** A volume of the user's own for the pods of a chart, and its mount. */
export const extraVolume = { name: "tokens", emptyDir: {} };
export const extraMount = { name: "tokens", mountPath: "/etc/lbcsi", readOnly: true };

/** The kinds of objects whose names all drivers of a cluster, or of a Kubernetes namespace, share. */
export const rbacKinds: readonly string[] = ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];

/** The driver's container in the pods of a role, `controller` or `node`, of a manifest. */
export function driverContainer(path: string, role: string): Container {
  const pods = objectsOf(readK8sFile(path)).flatMap((object) => podOf(object) ?? []);
  const containers = pods.flatMap(({ spec }) => spec.containers).filter(({ args }) => args?.[0] === role);
  const [container] = containers;
  assert.deepEqual(containers.map(({ name }) => name), [
    path.startsWith("manifests/poseidon/") ? "poscsi" : "lb-csi-plugin",
  ]);
  assert.ok(container !== undefined);
  return container;
}

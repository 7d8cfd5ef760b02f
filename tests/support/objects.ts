/** Kubernetes objects, and whether what they refer to is there. */
import { parseAllDocuments } from "yaml";

type StringMap = Readonly<Record<string, string>>;

export interface Container {
  readonly name: string;
  readonly image: string;
  readonly args?: readonly string[];
  readonly env?: readonly { readonly name: string; readonly value?: string }[];
  readonly securityContext?: { readonly privileged?: boolean; readonly runAsUser?: number };
  readonly volumeMounts?: readonly { readonly name: string; readonly mountPath: string }[];
  readonly volumeDevices?: readonly { readonly name: string; readonly devicePath: string }[];
}

export interface PodSpec {
  readonly containers: readonly Container[];
  readonly initContainers?: readonly Container[];
  readonly serviceAccountName?: string;
  readonly priorityClassName?: string;
  readonly imagePullSecrets?: readonly { readonly name: string }[];
  readonly securityContext?: { readonly runAsNonRoot?: boolean };
  readonly hostNetwork?: boolean;
  readonly volumes?: readonly {
    readonly name: string;
    readonly hostPath?: { readonly path: string };
    readonly persistentVolumeClaim?: { readonly claimName: string };
    readonly secret?: { readonly secretName: string };
    readonly configMap?: { readonly name: string };
  }[];
}

interface Metadata {
  readonly name: string;
  readonly namespace?: string;
  readonly labels?: StringMap;
}

/** A pod, or what a controller makes pods of. */
export interface PodTemplate {
  readonly metadata: Metadata;
  readonly spec: PodSpec;
}

/** What the kinds that we use have, as far as tests look at it. Other tests check that it has this form. */
export interface KubeObject {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: Metadata;
  readonly rules?: readonly { readonly resources: readonly string[] }[];
  readonly subjects?: readonly { readonly kind: string; readonly name: string; readonly namespace: string }[];
  readonly roleRef?: { readonly kind: string; readonly name: string };
  readonly parameters?: StringMap;
  readonly data?: StringMap;
  readonly spec?: Partial<PodSpec> & {
    readonly template?: PodTemplate;
    readonly selector?: { readonly matchLabels?: StringMap };
    readonly serviceName?: string;
    readonly storageClassName?: string;
    readonly volumeAttributesClassName?: string;
    readonly volumeSnapshotClassName?: string;
    readonly dataSource?: { readonly kind: string; readonly name: string };
    readonly source?: { readonly persistentVolumeClaimName?: string };
    readonly csi?: Readonly<Record<string, unknown>> & { readonly volumeHandle: string };
    readonly volumeClaimTemplates?: readonly KubeObject[];
  };
}

/** What an object makes pods of; undefined when it makes none. */
export function podOf({ kind, metadata, spec }: KubeObject): PodTemplate | undefined {
  if (kind !== "Pod" || spec?.containers === undefined) return spec?.template;
  return { metadata, spec: { ...spec, containers: spec.containers } };
}

/** The objects of a YAML text. */
export function objectsOf(text: string): readonly KubeObject[] {
  return parseAllDocuments(text, { version: "1.1" }).flatMap((document) => {
    const problem = document.errors[0];
    if (problem !== undefined) throw problem;
    const object: KubeObject | null = document.toJS();
    return object ?? [];
  });
}

const clusterScoped = [
  "ClusterRole",
  "ClusterRoleBinding",
  "CSIDriver",
  "CustomResourceDefinition",
  "PersistentVolume",
  "PriorityClass",
  "StorageClass",
  "VolumeAttributesClass",
  "VolumeSnapshotClass",
];
const keyOf = (kind: string, name: string, namespace: string | undefined) =>
  clusterScoped.includes(kind) ? `${kind} ${name}` : `${kind} ${namespace}/${name}`;

/**
 * Names that objects refer to and no object has, objects that are there twice, mounts of volumes that a pod does not have,
 * volumes that no container mounts, and selectors that do not find their pods. `outside`: what else is there, "KIND NAME" or
 * "KIND NAMESPACE/NAME".
 */
export function referenceProblems(objects: readonly KubeObject[], outside: ReadonlySet<string>): readonly string[] {
  const problems: string[] = [];
  const present = new Set(outside);
  for (const { kind, metadata } of objects) {
    const key = keyOf(kind, metadata.name, metadata.namespace);
    if (present.has(key)) problems.push(`${key} is there twice`);
    present.add(key);
    if (!clusterScoped.includes(kind) && metadata.namespace === undefined) problems.push(`${key} has no namespace`);
  }
  for (const object of objects) {
    const { kind, metadata, spec, parameters = {} } = object;
    const self = `${kind} ${metadata.name}`;
    const refer = (kind: string, name: string | undefined, namespace = metadata.namespace) => {
      if (name === undefined) return;
      const key = keyOf(kind, name, namespace);
      if (!present.has(key)) problems.push(`${self} refers to ${key}, which is not there`);
    };
    for (const { kind, name, namespace } of object.subjects ?? []) refer(kind, name, namespace);
    if (object.roleRef !== undefined) refer(object.roleRef.kind, object.roleRef.name);
    for (const claim of [object, ...spec?.volumeClaimTemplates ?? []]) {
      refer("StorageClass", claim.spec?.storageClassName);
      refer("VolumeAttributesClass", claim.spec?.volumeAttributesClassName);
    }
    if (spec?.dataSource !== undefined) refer(spec.dataSource.kind, spec.dataSource.name);
    refer("VolumeSnapshotClass", spec?.volumeSnapshotClassName);
    refer("PersistentVolumeClaim", spec?.source?.persistentVolumeClaimName);
    for (const [key, name] of Object.entries(parameters)) {
      if (key.endsWith("secret-name")) refer("Secret", name, parameters[key.replace(/name$/, "namespace")]);
    }
    for (const [key, secret] of Object.entries(spec?.csi ?? {})) {
      if (!key.endsWith("SecretRef")) continue;
      const { name, namespace } = secret as { name: string; namespace: string };
      refer("Secret", name, namespace);
    }
    if (kind === "StatefulSet") refer("Service", spec?.serviceName);
    const pod = podOf(object);
    if (pod === undefined) continue;
    for (const [name, value] of Object.entries(spec?.selector?.matchLabels ?? {})) {
      if (pod.metadata.labels?.[name] !== value) {
        problems.push(`${self}: its selector does not find its pods by ${name}`);
      }
    }
    refer("ServiceAccount", pod.spec.serviceAccountName);
    refer("PriorityClass", pod.spec.priorityClassName);
    for (const { name } of pod.spec.imagePullSecrets ?? []) refer("Secret", name);
    for (const { persistentVolumeClaim, secret, configMap } of pod.spec.volumes ?? []) {
      refer("PersistentVolumeClaim", persistentVolumeClaim?.claimName);
      refer("Secret", secret?.secretName);
      refer("ConfigMap", configMap?.name);
    }
    const claims = (spec?.volumeClaimTemplates ?? []).map(({ metadata }) => metadata.name);
    problems.push(...mountProblems(pod.spec, claims).map((problem) => `${self}: ${problem}`));
  }
  return problems;
}

function mountProblems({ containers, initContainers = [], volumes = [] }: PodSpec, claims: readonly string[]) {
  const problems: string[] = [];
  const there = [...volumes.map(({ name }) => name), ...claims];
  const mounted = new Set<string>();
  const all = [...initContainers, ...containers];
  for (const { name: container, volumeMounts = [], volumeDevices = [] } of all) {
    const mounts = [
      ...volumeMounts.map(({ name, mountPath }) => ({ name, path: mountPath })),
      ...volumeDevices.map(({ name, devicePath }) => ({ name, path: devicePath })),
    ];
    for (const { name, path } of mounts) {
      mounted.add(name);
      if (!there.includes(name)) problems.push(`container ${container} mounts ${name}, which is no volume of its pod`);
      if (mounts.some((other) => other.path === path && other.name !== name)) problems.push(`two volumes at ${path}`);
    }
  }
  for (const name of there) if (!mounted.has(name)) problems.push(`no container mounts volume ${name}`);
  if (new Set(all.map(({ name }) => name)).size < all.length) problems.push("two containers have one name");
  return problems;
}

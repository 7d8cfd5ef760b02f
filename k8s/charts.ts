/**
 * The charts of this directory, and the manifests and examples that are rendered from them.
 *
 * The charts are the source of everything else: a manifest is what `helm template` makes of a chart, so users of Helm and
 * of kubectl run the same objects, with the same comments, and each of them is checked once. Rendering takes Go, with
 * Helm's own packages; a generator in TypeScript would have had to be written twice, as objects and as templates.
 */
import { fileURLToPath } from "node:url";
import config from "../deno.json" with { type: "json" };

/** This directory, with a slash at its end. */
export const k8sRoot = fileURLToPath(new URL("./", import.meta.url));

export const chartNames = [
  "lb-csi-plugin",
  "lb-csi-workload-examples",
  "snapshot-controller-3",
  "snapshot-controller-4",
] as const;
export type ChartName = typeof chartNames[number];

/** Minor versions of Kubernetes 1 that there are manifests for. */
export const minors: readonly number[] = Array.from({ length: 37 - 17 + 1 }, (_, i) => 17 + i);

export type Values = Readonly<Record<string, unknown>>;

export interface RenderRequest {
  readonly chart: string;
  readonly release: string;
  readonly namespace: string;
  readonly kubeVersion: string;
  readonly values: Values;
  readonly lint?: boolean;
}

export interface Rendered {
  /** Text of each template by its path in the chart, for example `lb-csi-plugin/templates/node.yaml`. */
  readonly files: Readonly<Record<string, string>> | null;
  /** What `helm lint` says. */
  readonly messages: readonly string[] | null;
  readonly error?: string;
}

/** The directory of a chart. */
export const chartDirectory = (name: ChartName) => `${k8sRoot}helm/${name}`;

/**
 * Runs a Go program of this repository, `source` from its root, on one JSON value and gives the one that it prints. Throws
 * with what Go said when it cannot be built, for instance because its modules cannot be fetched.
 */
export async function runGo(source: string, args: readonly string[], input: unknown): Promise<unknown> {
  // Go keeps what `go run` has built, so only the first run takes long.
  const child = new Deno.Command("go", {
    // The types of Kubernetes are most of what Helm needs, and to optimize them would be most of the time that this takes.
    args: ["run", "-gcflags=k8s.io/...=-N -l", ".", ...args],
    cwd: fileURLToPath(new URL(`../${source}`, import.meta.url)),
    env: { GOFLAGS: "-mod=readonly -buildvcs=false", GOWORK: "off", GOTOOLCHAIN: "local" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  const written = writer.write(new TextEncoder().encode(JSON.stringify(input))).then(() => writer.close());
  const { success, stdout, stderr } = await child.output();
  const said = new TextDecoder().decode(stderr);
  if (!success) {
    await written.catch(() => undefined); // it ended before it had read all: what it said is the reason
    throw new Error(`Cannot run ${source}: ${said}`);
  }
  await written;
  return JSON.parse(new TextDecoder().decode(stdout));
}

/** Renders charts, as `helm template` does, and lints those that ask for it; answers are in the order of the requests. */
export async function render(requests: readonly RenderRequest[]): Promise<readonly Rendered[]> {
  return await runGo("k8s/render", [], requests) as readonly Rendered[];
}

/** A file that is rendered from a chart. */
export interface Generated {
  /** Path under this directory. */
  readonly path: string;
  readonly chart: ChartName;
  readonly kubeVersion: string;
  readonly namespace: string;
  readonly values: Values;
  /** For people: what it is, one line each. */
  readonly about: readonly string[];
}

/** The driver's version, which charts, the default image and the bundle have too. */
export const version = config.version;

const imageAdvice = 'Put the name of your image for "localhost/lbcsi".';

const poseidon: readonly Generated[] = minors.map((minor) => ({
  path: `poscsi-k8s-v1.${minor}.yaml`,
  chart: "lb-csi-plugin",
  kubeVersion: `v1.${minor}.0`,
  namespace: "kube-system",
  values: { backend: "poseidon" },
  about: [`lbcsi for PoseidonOS on Kubernetes 1.${minor}.`, imageAdvice],
}));

const plugins: readonly Generated[] = minors.flatMap((minor) =>
  [false, true].map((inPod): Generated => ({
    path: `lb-csi-plugin-k8s-v1.${minor}${inPod ? "-dc" : ""}.yaml`,
    chart: "lb-csi-plugin",
    kubeVersion: `v1.${minor}.0`,
    namespace: "kube-system",
    values: { discoveryClientInContainer: inPod },
    about: [
      `lbcsi for LightOS on Kubernetes 1.${minor}, with ` +
      (inPod ? "the Discovery-Client in the node pod." : "the Discovery-Client that runs on each node."),
      imageAdvice,
    ],
  }))
);

const snapshotControllers: readonly Generated[] = ([
  ["3", "snapshot-controller-3", 17, "1.17 to 1.19"],
  ["4", "snapshot-controller-4", 20, "1.20 to 1.24"],
  ["8", "snapshot-controller-4", 25, "1.25 and later"],
] as const).map(([name, chart, minor, range]) => ({
  path: `snapshot-controller-${name}.yaml`,
  chart,
  kubeVersion: `v1.${minor}.0`,
  namespace: "kube-system",
  values: {},
  about: [
    `The controller of volume snapshots and its API for Kubernetes ${range}.`,
    "One for the whole cluster, whatever drivers it has: many clusters come with it.",
  ],
}));

const exampleOf = (file: string, about: string, values: Values, minor = Math.max(...minors)): Generated => ({
  path: `examples/${file}.yaml`,
  chart: "lb-csi-workload-examples",
  kubeVersion: `v1.${minor}.0`,
  namespace: "default",
  values,
  about: [about],
});
const enabled = { enabled: true };

const examples: readonly Generated[] = [
  exampleOf(
    "secret-and-storage-class",
    "The token and the class that the other examples use: put in your own values.",
    {
      storageclass: enabled,
    },
  ),
  exampleOf("block-workload", "A pod with a raw block device.", { block: enabled }),
  exampleOf("filesystem-workload", "A pod with a file system.", { filesystem: enabled }),
  ...(["Block", "Filesystem"] as const).map((volumeMode) =>
    exampleOf(
      `preprovisioned-${volumeMode.toLowerCase()}-workload`,
      "A pod with a volume that is on the cluster already: put its UUID and your endpoints into volumeHandle.",
      { preprovisioned: { enabled: true, volumeMode } },
    )
  ),
  exampleOf("encrypted-workload", "A pod whose volume is encrypted on its node; needs secret-and-storage-class.yaml.", {
    encrypted: enabled,
  }),
  exampleOf("statefulset-workload", "Three pods, each with a volume of its own.", { statefulset: enabled }),
  ...([
    ["snaps-example-snapshot-class", "snapshot-class", "The class of the snapshots."],
    ["snaps-example-pvc-workload", "example-pvc", "A pod with the volume that is copied."],
    ["snaps-snapshot-from-pvc-workload", "snapshot-from-pvc", "A snapshot of that volume."],
    ["snaps-pvc-from-snapshot-workload", "pvc-from-snapshot", "A pod with a new volume from that snapshot."],
    ["snaps-pvc-from-pvc-workload", "pvc-from-pvc", "A pod with a clone of that volume."],
  ] as const).map(([file, stage, about]) => exampleOf(file, about, { snaps: { enabled: true, stage } })),
  exampleOf("rwop-workload", "A volume for one pod in the whole cluster (Kubernetes 1.22, without a gate 1.27).", {
    rwop: enabled,
  }),
  exampleOf("volume-attributes-workload", "A volume whose QoS policy changes while it is in use (Kubernetes 1.34).", {
    attributes: enabled,
  }),
  exampleOf(
    "inline-ephemeral-workload",
    "Volumes that come and go with their pod (Kubernetes 1.23; the second one needs the chart's inlineVolumes).",
    { inline: enabled },
  ),
  exampleOf("storageclass", "PoseidonOS: the class that the other examples use: put in your own values.", {
    poseidon: enabled,
  }),
  exampleOf("testpod", "PoseidonOS: a pod with a file system.", { poseidon: { enabled: true, stage: "testpod" } }),
  exampleOf("blockpod", "PoseidonOS: a pod with a raw block device.", {
    poseidon: { enabled: true, stage: "blockpod", size: "256Mi" },
  }),
];

/** Every file that is rendered. */
export const generated: readonly Generated[] = [...plugins, ...poseidon, ...snapshotControllers, ...examples];

/** Kinds in the order in which they are applied; others follow. */
const order = [
  "CustomResourceDefinition",
  "ServiceAccount",
  "Secret",
  "ConfigMap",
  "ClusterRole",
  "ClusterRoleBinding",
  "Role",
  "RoleBinding",
  "CSIDriver",
  "StorageClass",
  "VolumeAttributesClass",
  "PersistentVolume",
  "PersistentVolumeClaim",
];

/** The YAML documents of a rendered chart, in the order in which they are to be applied. */
export function documents({ files }: Rendered): readonly string[] {
  const all = Object.keys(files ?? {}).filter((path) => path.endsWith(".yaml")).sort()
    .flatMap((path) => `\n${files?.[path] ?? ""}`.split(/^---$/m))
    .map((text) => text.trim().replace(/[ \t]+$/gm, "").replace(/\n{2,}/g, "\n"))
    .filter((text) => /^kind: /m.test(text));
  const rank = (text: string) => {
    const place = order.indexOf(/^kind: (\w+)/m.exec(text)?.[1] ?? "");
    return place < 0 ? order.length : place;
  };
  return all.toSorted((a, b) => rank(a) - rank(b));
}

/** The texts of all generated files, by path. Throws with each chart's complaint. */
export async function manifests(): Promise<ReadonlyMap<string, string>> {
  const rendered = await render(generated.map(({ chart, kubeVersion, namespace, values }) => ({
    chart: chartDirectory(chart),
    release: "lb-csi",
    namespace,
    kubeVersion,
    values,
  })));
  return new Map(generated.map(({ path, chart, about }, index) => {
    const answer = rendered[index];
    if (answer === undefined || answer.error !== undefined) throw new Error(`Cannot render ${path}: ${answer?.error}`);
    const head = [...about, `Rendered from helm/${chart} by \`deno task manifests\`; change that, not this.`];
    return [path, [head.map((line) => `# ${line}`).join("\n"), ...documents(answer)].join("\n---\n") + "\n"];
  }));
}

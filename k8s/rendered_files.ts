/** The list of the manifests and examples that are rendered from the charts, and their text. */
import { chartDirectory, type ChartName, documents, render, type Values } from "./charts.ts";

/** Minor versions of Kubernetes 1, both included. */
export interface MinorRange {
  readonly first: number;
  readonly last: number;
}

/** The minor versions of Kubernetes 1 that the driver supports. */
export const supportedMinors: MinorRange = { first: 17, last: 37 };

/** The minor versions of a range. */
export const minorsIn = ({ first, last }: MinorRange): readonly number[] =>
  Array.from({ length: last - first + 1 }, (_, index) => first + index);

/** A manifest or example that is rendered from a chart. */
export interface RenderedFile {
  /** Path in this directory. */
  readonly path: string;
  /** Paths in the bundle, which has a file of its own for each minor version, as the vendor's bundle has. */
  readonly bundlePaths: readonly string[];
  readonly chart: ChartName;
  /** The Kubernetes versions that the file is for. */
  readonly minors: MinorRange;
  /** Those of them for which the chart is rendered; each gives the same text. */
  readonly renderedMinors: readonly number[];
  readonly namespace: string;
  readonly values: Values;
  /** Comment lines at the top of the file: what it is. */
  readonly heading: readonly string[];
}

/** The ranges of Kubernetes versions for which the driver's manifests have the same text. */
export const manifestRanges: readonly MinorRange[] = [
  { first: 17, last: 17 },
  { first: 18, last: 18 },
  { first: 19, last: 19 },
  { first: 20, last: 22 },
  { first: 23, last: 24 },
  { first: 25, last: 28 },
  { first: 29, last: 33 },
  { first: 34, last: 37 },
];

/** The end of a manifest's name in this directory: `v1.19`, `v1.20-v1.22`. */
const rangeName = ({ first, last }: MinorRange) => first === last ? `v1.${first}` : `v1.${first}-v1.${last}`;

/** A range in prose: `1.19`, `1.20 to 1.22`. */
const rangeText = ({ first, last }: MinorRange) => first === last ? `1.${first}` : `1.${first} to 1.${last}`;

/** Where the driver's manifests for a storage backend are, how they are named, and what they render. */
interface ManifestSeries {
  readonly directory: string;
  readonly prefix: string;
  readonly suffix: string;
  readonly values: Values;
  /** Continues "… on Kubernetes 1.34". */
  readonly title: (kubernetes: string) => string;
}

const manifestSeries: readonly ManifestSeries[] = [
  {
    directory: "manifests/lightos",
    prefix: "lb-csi-plugin-k8s-",
    suffix: "",
    values: { discoveryClientInContainer: false },
    title: (kubernetes) => `lbcsi for LightOS on ${kubernetes}, with the Discovery-Client that runs on each node.`,
  },
  {
    directory: "manifests/lightos",
    prefix: "lb-csi-plugin-k8s-",
    suffix: "-dc",
    values: { discoveryClientInContainer: true },
    title: (kubernetes) => `lbcsi for LightOS on ${kubernetes}, with the Discovery-Client in the node pod.`,
  },
  {
    directory: "manifests/poseidon",
    prefix: "poscsi-k8s-",
    suffix: "",
    values: { backend: "poseidon" },
    title: (kubernetes) => `lbcsi for PoseidonOS on ${kubernetes}.`,
  },
];

/** The driver's manifests. */
export const driverManifests: readonly RenderedFile[] = manifestSeries.flatMap((series) =>
  manifestRanges.map((minors): RenderedFile => {
    const { directory, prefix, suffix, values, title } = series;
    return {
      path: `${directory}/${prefix}${rangeName(minors)}${suffix}.yaml`,
      bundlePaths: minorsIn(minors).map((minor) => `k8s/${prefix}v1.${minor}${suffix}.yaml`),
      chart: "lb-csi-plugin",
      minors,
      renderedMinors: minorsIn(minors),
      namespace: "kube-system",
      values,
      heading: [title(`Kubernetes ${rangeText(minors)}`), 'Replace "localhost/lbcsi" with the name of your image.'],
    };
  })
);

const snapshotControllers: readonly RenderedFile[] = ([
  ["3", "snapshot-controller-3", { first: 17, last: 19 }],
  ["4", "snapshot-controller-4", { first: 20, last: 24 }],
  ["8", "snapshot-controller-4", { first: 25, last: supportedMinors.last }],
] as const).map(([name, chart, minors]) => ({
  path: `manifests/snapshot-controller-${name}.yaml`,
  bundlePaths: [`k8s/snapshot-controller-${name}.yaml`],
  chart,
  minors,
  // From 1.21 on the chart renders policy/v1, but every API server up to 1.24 accepts the policy/v1beta1 of 1.20 too.
  renderedMinors: [minors.first],
  namespace: "kube-system",
  values: {},
  heading: [
    `The snapshot controller and its API for Kubernetes ${
      minors.last === supportedMinors.last ? `1.${minors.first} and later` : rangeText(minors)
    }.`,
    "A cluster needs one, whatever CSI drivers it has; many clusters come with one.",
  ],
}));

/** An example. Some need a Kubernetes version of their own, which their title names. */
function example(
  name: string,
  title: string,
  values: Values,
  firstMinor = supportedMinors.first,
): RenderedFile {
  const path = `examples/${name}.yaml`;
  return {
    path,
    bundlePaths: [path],
    chart: "lb-csi-workload-examples",
    minors: { first: firstMinor, last: supportedMinors.last },
    renderedMinors: [firstMinor, supportedMinors.last],
    namespace: "default",
    values,
    heading: [title],
  };
}

const enabled = { enabled: true };

const lightosExamples: readonly RenderedFile[] = [
  example(
    "secret-and-storage-class",
    "The token and the StorageClass that the other examples use: put in your own values.",
    { storageclass: enabled },
  ),
  example("block-workload", "A pod with a raw block device.", { block: enabled }),
  example("filesystem-workload", "A pod with a file system.", { filesystem: enabled }),
  ...(["Block", "Filesystem"] as const).map((volumeMode) =>
    example(
      `preprovisioned-${volumeMode.toLowerCase()}-workload`,
      "A pod with a volume that is on the cluster already: put its UUID and your endpoints into volumeHandle.",
      { preprovisioned: { enabled: true, volumeMode } },
    )
  ),
  example("encrypted-workload", "A pod whose volume is encrypted on its node; needs secret-and-storage-class.yaml.", {
    encrypted: enabled,
  }),
  example("statefulset-workload", "Three pods, each with a volume of its own.", { statefulset: enabled }),
  ...([
    ["snaps-example-snapshot-class", "snapshot-class", "The class of the snapshots."],
    ["snaps-example-pvc-workload", "example-pvc", "A pod with the volume that is copied."],
    ["snaps-snapshot-from-pvc-workload", "snapshot-from-pvc", "A snapshot of that volume."],
    ["snaps-pvc-from-snapshot-workload", "pvc-from-snapshot", "A pod with a new volume from that snapshot."],
    ["snaps-pvc-from-pvc-workload", "pvc-from-pvc", "A pod with a clone of that volume."],
  ] as const).map(([name, stage, title]) => example(name, title, { snaps: { enabled: true, stage } }, 20)),
  example(
    "rwop-workload",
    "A volume for one pod in the whole cluster (Kubernetes 1.22 with a feature gate, 1.27 without).",
    { rwop: enabled },
    22,
  ),
  example(
    "volume-attributes-workload",
    "A volume whose QoS policy changes while it is in use (Kubernetes 1.34).",
    { attributes: enabled },
    34,
  ),
  example(
    "inline-ephemeral-workload",
    "Volumes that are made and deleted with their pod (Kubernetes 1.23; the second one needs the chart's inlineVolumes).",
    { inline: enabled },
    // An alpha field before 1.23, which API servers accept since 1.19.
    19,
  ),
];

const poseidonExamples: readonly RenderedFile[] = [
  example("storageclass", "PoseidonOS: the StorageClass that the other examples use: put in your own values.", {
    poseidon: enabled,
  }),
  example("testpod", "PoseidonOS: a pod with a file system.", { poseidon: { enabled: true, stage: "testpod" } }),
  example("blockpod", "PoseidonOS: a pod with a raw block device.", {
    poseidon: { enabled: true, stage: "blockpod", size: "256Mi" },
  }),
];

/** The examples. */
export const examples: readonly RenderedFile[] = [...lightosExamples, ...poseidonExamples];

/** The manifests, those of the snapshot controller included. */
export const manifests: readonly RenderedFile[] = [...driverManifests, ...snapshotControllers];

/** Every file that is rendered. */
export const renderedFiles: readonly RenderedFile[] = [...manifests, ...examples];

/**
 * Renders every file; the result maps paths to text. Throws when a chart cannot be rendered, or renders different text
 * for the Kubernetes versions of one file.
 */
export async function renderFiles(): Promise<ReadonlyMap<string, string>> {
  const jobs = renderedFiles.flatMap((file) => file.renderedMinors.map((minor) => ({ file, minor })));
  const charts = await render(jobs.map(({ file: { chart, namespace, values }, minor }) => ({
    chart: chartDirectory(chart),
    release: "lb-csi",
    namespace,
    kubeVersion: `v1.${minor}.0`,
    values,
  })));
  const textByPath = new Map<string, string>();
  for (const [index, { file: { path, chart, heading }, minor }] of jobs.entries()) {
    const rendered = charts[index];
    if (rendered === undefined || rendered.error !== undefined) {
      throw new Error(`Cannot render ${path} for Kubernetes 1.${minor}: ${rendered?.error}`);
    }
    const comments = [
      ...heading,
      `Rendered from k8s/helm/${chart} by \`deno task manifests\`: change the chart instead.`,
    ];
    const text = `${[comments.map((line) => `# ${line}`).join("\n"), ...documents(rendered)].join("\n---\n")}\n`;
    if ((textByPath.get(path) ?? text) !== text) {
      throw new Error(
        `Cannot render ${path}: its text for Kubernetes 1.${minor} differs from that for earlier versions`,
      );
    }
    textByPath.set(path, text);
  }
  return textByPath;
}

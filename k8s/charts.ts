/**
 * The Helm charts of this directory and how to render them.
 *
 * The charts are the source of every manifest and example: a manifest is the output of `helm template`, so users of Helm
 * and of kubectl run the same objects with the same comments, and each object is tested once. Rendering needs Go, because
 * it uses Helm's own packages.
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

/** The driver's version. The charts, the default image and the bundle have the same one. */
export const version = config.version;

/** Values of a chart, as in a `values.yaml`. */
export type Values = Readonly<Record<string, unknown>>;

/** What `helm template` needs to know. */
export interface RenderRequest {
  /** Directory or archive of the chart. */
  readonly chart: string;
  readonly release: string;
  readonly namespace: string;
  /** With a `v`, for example `v1.34.0`. */
  readonly kubeVersion: string;
  readonly values: Values;
  /** Also run `helm lint`. */
  readonly lint?: boolean;
}

/** A rendered chart, or the reason why it could not be rendered. */
export interface RenderedChart {
  /** Text of each template by its path in the chart, for example `lb-csi-plugin/templates/node.yaml`. */
  readonly files: Readonly<Record<string, string>>;
  /** Warnings and errors of `helm lint`. */
  readonly messages: readonly string[];
  readonly error?: string;
}

/** The directory of a chart. */
export const chartDirectory = (name: ChartName) => `${k8sRoot}helm/${name}`;

/** Renders charts, as `helm template` does, and lints those that ask for it. Results are in the order of the requests. */
export async function render(requests: readonly RenderRequest[]): Promise<readonly RenderedChart[]> {
  const answers = await runGo("k8s/render", [], requests) as readonly Partial<RenderedChart>[];
  return answers.map((answer) => ({ files: {}, messages: [], ...answer }));
}

/**
 * Runs a Go program of this repository, whose directory `source` is relative to the root. It reads `input` as JSON and
 * prints JSON, which is returned. Throws with Go's message if the program fails or cannot be built, for instance because
 * its modules cannot be fetched.
 */
export async function runGo(source: string, args: readonly string[], input: unknown): Promise<unknown> {
  // `go run` caches what it has built, so only the first run takes long.
  const child = new Deno.Command("go", {
    // Kubernetes' types are most of what Helm imports, and to optimize them would take most of the build's time.
    args: ["run", "-gcflags=k8s.io/...=-N -l", ".", ...args],
    cwd: fileURLToPath(new URL(`../${source}`, import.meta.url)),
    env: { GOFLAGS: "-mod=readonly -buildvcs=false", GOWORK: "off", GOTOOLCHAIN: "local" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  const inputWritten = writer.write(new TextEncoder().encode(JSON.stringify(input))).then(() => writer.close());
  const { success, stdout, stderr } = await child.output();
  if (!success) {
    await inputWritten.catch(() => undefined); // it ended before it had read everything; stderr has the reason
    throw new Error(`Cannot run ${source}: ${new TextDecoder().decode(stderr)}`);
  }
  await inputWritten;
  return JSON.parse(new TextDecoder().decode(stdout));
}

/** Kinds in the order in which they are applied; all others follow. */
const kindsInOrder = [
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

/** The YAML documents of a rendered chart, in the order in which they have to be applied. */
export function documents({ files }: RenderedChart): readonly string[] {
  const unordered = Object.keys(files).filter((path) => path.endsWith(".yaml")).sort()
    .flatMap((path) => `\n${files[path] ?? ""}`.split(/^---$/m))
    .map((text) => text.trim().replace(/[ \t]+$/gm, "").replace(/\n{2,}/g, "\n"))
    .filter((text) => /^kind: /m.test(text));
  const rank = (text: string) => {
    const index = kindsInOrder.indexOf(/^kind: (\w+)/m.exec(text)?.[1] ?? "");
    return index < 0 ? kindsInOrder.length : index;
  };
  return unordered.toSorted((a, b) => rank(a) - rank(b));
}

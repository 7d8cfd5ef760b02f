/**
 * `deno task bundle [DIRECTORY]`: packs everything that an installation needs into `lb-csi-bundle-<version>.tar.gz`, in
 * `dist/` or the given directory:
 *
 *     lb-csi-bundle-<version>/
 *       README.md LICENSE docs/*.md docs/reference/*.md
 *       k8s/*.yaml                             a manifest for each Kubernetes version, named as in the vendor's bundle
 *       helm/charts/<chart>-<version>.tgz
 *       examples/*.yaml
 *
 * In the documents, manifests and examples have their paths in the bundle. The same files always give the same bytes, so anyone can verify a bundle by making it again.
 */
import { chartDirectory, chartNames, k8sRoot, version } from "./charts.ts";
import { renderedFiles } from "./rendered_files.ts";
import { type ArchiveEntry, tarGzip } from "./tar.ts";

const root = `${k8sRoot}..`;
const name = `lb-csi-bundle-${version}`;
const directory = Deno.args[0] ?? `${root}/dist`;

const bundle = tarGzip(
  [
    { path: "LICENSE", content: Deno.readFileSync(`${root}/LICENSE`) },
    ...[
      { path: "README.md", content: Deno.readFileSync(`${root}/README.md`) },
      ...filesBelow(`${root}/docs`, "docs").filter(({ path }) => path.endsWith(".md")),
    ].map(withBundlePaths),
    ...renderedFiles.flatMap(({ path, bundlePaths }) => {
      const content = Deno.readFileSync(k8sRoot + path);
      return bundlePaths.map((path) => ({ path, content }));
    }),
    ...chartNames.map((chart) => ({
      path: `helm/charts/${chart}-${version}.tgz`,
      content: tarGzip(filesBelow(chartDirectory(chart), chart)),
    })),
  ].map(({ path, content }) => ({ path: `${name}/${path}`, content })),
);
await Deno.mkdir(directory, { recursive: true });
await Deno.writeFile(`${directory}/${name}.tar.gz`, bundle);
console.log(`${directory}/${name}.tar.gz: ${bundle.length} bytes`);

/** A document in which manifests and examples have their paths in the bundle, so that its commands work there. */
function withBundlePaths({ path, content }: ArchiveEntry): ArchiveEntry {
  const text = renderedFiles.reduce(
    (text, { path, bundlePaths: [bundlePath = path] }) => text.replaceAll(`k8s/${path}`, bundlePath),
    new TextDecoder().decode(content),
  );
  return { path, content: new TextEncoder().encode(text) };
}

/** The files below a directory, without hidden ones, each with its path below `prefix`. */
function filesBelow(directory: string, prefix: string): readonly ArchiveEntry[] {
  return [...Deno.readDirSync(directory)].filter(({ name }) => !name.startsWith(".")).flatMap(
    ({ name, isDirectory }) => {
      const path = `${directory}/${name}`;
      return isDirectory
        ? filesBelow(path, `${prefix}/${name}`)
        : [{ path: `${prefix}/${name}`, content: Deno.readFileSync(path) }];
    },
  );
}

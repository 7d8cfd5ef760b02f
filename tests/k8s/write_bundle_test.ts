/** `deno task bundle`: what the bundle contains, and that it is reproducible. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { chartDirectory, chartNames, documents, render, type RenderRequest, version } from "../../k8s/charts.ts";
import { minorsIn, renderedFiles, supportedMinors } from "../../k8s/rendered_files.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";

const root = new URL("../../", import.meta.url);
const name = `lb-csi-bundle-${version}`;

async function run(program: string, args: readonly string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, { args: [...args] }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
  assert.equal(new TextDecoder().decode(stderr), "");
  return new TextDecoder().decode(stdout);
}

async function withBundles(count: number, body: (directories: readonly string[]) => Promise<void>): Promise<void> {
  const parent = await Deno.makeTempDir({ prefix: "lbcsi-bundle-" });
  try {
    const directories = Array.from({ length: count }, (_, i) => `${parent}/${i}`);
    for (const directory of directories) {
      await run(Deno.execPath(), ["run", "-A", fileURLToPath(new URL("k8s/write_bundle.ts", root)), directory]);
    }
    await body(directories);
  } finally {
    await Deno.remove(parent, { recursive: true });
  }
}

Deno.test({
  name: "the bundle has one top directory with every manifest, example, chart and document, owned by root",
  ignore: !needs("tar"),
  fn: async () => {
    await withBundles(1, async ([directory]) => {
      const packed = `${directory}/${name}.tar.gz`;
      const documents = ["docs/", "docs/reference/"].flatMap((folder) =>
        [...Deno.readDirSync(new URL(folder, root))].map((entry) => folder + entry.name)
      ).filter((path) => path.endsWith(".md"));

      const listed = (await run("tar", ["-tvf", packed, "--numeric-owner", "--utc"])).trim().split("\n")
        .map((line) => line.split(/ +/));
      await run("tar", ["-xf", packed, "-C", directory ?? ""]);

      const paths = listed.map((fields) => fields[5]);
      assert.ok(documents.length > 20);
      assert.deepEqual(
        paths,
        [
          ...["README.md", "LICENSE", ...documents],
          ...renderedFiles.flatMap(({ bundlePaths }) => bundlePaths),
          ...chartNames.map((chart) => `helm/charts/${chart}-${version}.tgz`),
        ].map((path) => `${name}/${path}`).toSorted(),
      );
      for (const [mode, owner, , date] of listed) {
        assert.deepEqual([mode, owner, date], ["-rw-r--r--", "0/0", "2020-01-01"]);
      }
      for (const { path, bundlePaths } of renderedFiles) {
        const text = await Deno.readTextFile(new URL(`k8s/${path}`, root));
        for (const one of bundlePaths) assert.ok(await Deno.readTextFile(`${directory}/${name}/${one}`) === text, one);
      }
      let count = 0;
      for (const path of ["README.md", ...documents]) {
        const text = await Deno.readTextFile(`${directory}/${name}/${path}`);
        for (const [, file = ""] of text.matchAll(/(?<![\w./-])(?:\.\.\/)?((?:k8s|examples)\/[\w./-]+\.yaml)/g)) {
          if (file.startsWith("k8s/helm/")) continue; // charts are archives in the bundle
          assert.ok((await Deno.stat(`${directory}/${name}/${file}`)).isFile, `${path}: ${file}`);
          count++;
        }
      }
      assert.ok(count > 20, `${count}`);
    });
  },
});

Deno.test("the bundle has a manifest for each Kubernetes version, named as in the vendor's bundle", () => {
  const paths = renderedFiles.flatMap(({ bundlePaths }) => bundlePaths).filter((path) => path.startsWith("k8s/"));

  assert.deepEqual(
    paths.toSorted(),
    [
      ...minorsIn(supportedMinors).flatMap((minor) => [
        `k8s/lb-csi-plugin-k8s-v1.${minor}.yaml`,
        `k8s/lb-csi-plugin-k8s-v1.${minor}-dc.yaml`,
        `k8s/poscsi-k8s-v1.${minor}.yaml`,
      ]),
      ...["3", "4", "8"].map((series) => `k8s/snapshot-controller-${series}.yaml`),
    ].toSorted(),
  );
});

Deno.test("the same files give the same bundle, byte for byte", async () => {
  await withBundles(2, async ([first, second]) => {
    assert.deepEqual(await Deno.readFile(`${first}/${name}.tar.gz`), await Deno.readFile(`${second}/${name}.tar.gz`));
  });
});

Deno.test({
  name: "Helm renders the packed charts as it renders their directories",
  ignore: !needs("go", "tar"),
  fn: async () => {
    await withBundles(1, async ([directory]) => {
      await run("tar", ["-xf", `${directory}/${name}.tar.gz`, "-C", directory ?? ""]);
      const requests = chartNames.map((chart): RenderRequest => ({
        chart: chartDirectory(chart),
        release: "lb-csi",
        namespace: "kube-system",
        kubeVersion: chart === "snapshot-controller-3" ? "v1.19.0" : "v1.37.0",
        values: chart === "lb-csi-workload-examples" ? { block: { enabled: true } } : {},
      }));
      const packed = chartNames.map((chart) => `${directory}/${name}/helm/charts/${chart}-${version}.tgz`);

      const rendered = await unlessGoLacks(() =>
        render([...requests, ...requests.map((request, i) => ({ ...request, chart: packed[i] ?? "" }))])
      );

      if (rendered === undefined) return;
      assert.deepEqual(rendered.flatMap(({ error }) => error ?? []), []);
      const manifests = rendered.map(documents);
      assert.deepEqual(manifests.slice(chartNames.length), manifests.slice(0, chartNames.length));
      for (const text of manifests) assert.ok(text.length > 0);
    });
  },
});

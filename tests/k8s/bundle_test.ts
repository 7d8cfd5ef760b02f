/** What `deno task bundle` packs. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import {
  chartDirectory,
  chartNames,
  documents,
  generated,
  render,
  type RenderRequest,
  version,
} from "../../k8s/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";

const k8s = new URL("../../k8s/", import.meta.url);
const name = `lb-csi-bundle-${version}.tar.gz`;

async function run(program: string, args: readonly string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, { args: [...args] }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
  assert.equal(new TextDecoder().decode(stderr), "");
  return new TextDecoder().decode(stdout);
}

async function withBundles(count: number, body: (directories: readonly string[]) => Promise<void>): Promise<void> {
  const root = await Deno.makeTempDir({ prefix: "lbcsi-bundle-" });
  try {
    const directories = Array.from({ length: count }, (_, i) => `${root}/${i}`);
    for (const directory of directories) {
      await run(Deno.execPath(), ["run", "-A", fileURLToPath(new URL("bundle.ts", k8s)), directory]);
    }
    await body(directories);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
}

Deno.test({
  name: "the bundle holds every manifest, example and chart as it is, owned by root, in one order",
  ignore: !needs("tar"),
  fn: async () => {
    await withBundles(1, async ([directory]) => {
      const packed = `${directory}/${name}`;

      const listed = (await run("tar", ["-tvf", packed, "--numeric-owner", "--utc"])).trim().split("\n")
        .map((line) => line.split(/ +/));
      await run("tar", ["-xf", packed, "-C", directory ?? ""]);

      const paths = listed.map((fields) => fields[5]);
      assert.deepEqual(
        paths,
        [
          ...generated.map(({ path }) => path.startsWith("examples/") ? path : `k8s/${path}`),
          ...chartNames.map((chart) => `helm/charts/${chart}-${version}.tgz`),
        ].toSorted(),
      );
      for (const [mode, owner, , date] of listed) {
        assert.deepEqual([mode, owner, date], ["-rw-r--r--", "0/0", "2020-01-01"]);
      }
      for (const { path } of generated) {
        const unpacked = await Deno.readTextFile(`${directory}/${path.startsWith("examples/") ? path : `k8s/${path}`}`);
        assert.ok(unpacked === await Deno.readTextFile(new URL(path, k8s)), path);
      }
    });
  },
});

Deno.test("the same files give the same bundle, byte for byte", async () => {
  await withBundles(2, async ([first, second]) => {
    assert.deepEqual(await Deno.readFile(`${first}/${name}`), await Deno.readFile(`${second}/${name}`));
  });
});

Deno.test({
  name: "Helm renders the packed charts as it renders their directories",
  ignore: !needs("go", "tar"),
  fn: async () => {
    await withBundles(1, async ([directory]) => {
      await run("tar", ["-xf", `${directory}/${name}`, "-C", directory ?? ""]);
      const requests = chartNames.map((chart): RenderRequest => ({
        chart: chartDirectory(chart),
        release: "lb-csi",
        namespace: "kube-system",
        kubeVersion: chart === "snapshot-controller-3" ? "v1.19.0" : "v1.37.0",
        values: chart === "lb-csi-workload-examples" ? { block: { enabled: true } } : {},
      }));
      const packed = chartNames.map((chart) => `${directory}/helm/charts/${chart}-${version}.tgz`);

      const rendered = await unlessGoLacks(() =>
        render([...requests, ...requests.map((request, i) => ({ ...request, chart: packed[i] ?? "" }))])
      );

      if (rendered === undefined) return;
      assert.deepEqual(rendered.flatMap(({ error }) => error ?? []), []);
      const texts = rendered.map(documents);
      assert.deepEqual(texts.slice(chartNames.length), texts.slice(0, chartNames.length));
      for (const text of texts) assert.ok(text.length > 0);
    });
  },
});

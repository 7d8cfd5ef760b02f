/**
 * `deno task manifests`: writes the manifests and examples of this directory from its charts. `--check`: writes nothing
 * and ends with status 1 when a file differs, is missing, or is there although no chart makes it. Needs Go.
 */
import { k8sRoot, manifests } from "./charts.ts";

const check = Deno.args.includes("--check");
const wanted = await manifests();
const stale: string[] = [];
await Deno.mkdir(`${k8sRoot}examples`, { recursive: true });
for (const directory of ["", "examples/"]) {
  for (const { name } of Deno.readDirSync(k8sRoot + directory)) {
    const path = directory + name;
    if (!name.endsWith(".yaml") || wanted.has(path)) continue;
    stale.push(path);
    if (!check) Deno.removeSync(k8sRoot + path);
  }
}
for (const [path, text] of wanted) {
  if (await Deno.readTextFile(k8sRoot + path).catch(() => undefined) === text) continue;
  stale.push(path);
  if (!check) await Deno.writeTextFile(k8sRoot + path, text);
}
if (!check) console.log(`${wanted.size} files, ${stale.length} changed`);
else if (stale.length > 0) {
  console.error(`not up to date, run \`deno task manifests\`:\n${stale.join("\n")}`);
  Deno.exit(1);
}

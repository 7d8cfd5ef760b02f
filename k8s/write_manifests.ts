/**
 * `deno task manifests`: renders the manifests and examples of this directory from its charts. Needs Go.
 *
 * With `--check` it writes nothing and exits with status 1 if a file is out of date or missing, or is not rendered from
 * any chart.
 */
import { k8sRoot } from "./charts.ts";
import { renderFiles } from "./rendered_files.ts";

const isCheck = Deno.args.includes("--check");
const textByPath = await renderFiles();
const stale = [...filesBelow("manifests"), ...filesBelow("examples")].filter((path) => !textByPath.has(path));
if (!isCheck) { for (const path of stale) Deno.removeSync(k8sRoot + path); }
for (const [path, text] of textByPath) {
  if (await Deno.readTextFile(k8sRoot + path).catch(() => undefined) === text) continue;
  stale.push(path);
  if (!isCheck) await Deno.writeTextFile(k8sRoot + path, text);
}
if (!isCheck) console.log(`${textByPath.size} files, ${stale.length} changed`);
else if (stale.length > 0) {
  console.error(`not up to date, run \`deno task manifests\`:\n${stale.join("\n")}`);
  Deno.exit(1);
}

/** The files below a directory of this one, as paths relative to this one. */
function filesBelow(directory: string): readonly string[] {
  return [...Deno.readDirSync(k8sRoot + directory)].flatMap(({ name, isDirectory }) =>
    isDirectory ? filesBelow(`${directory}/${name}`) : [`${directory}/${name}`]
  );
}

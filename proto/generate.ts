/**
 * Makes proto/gen/*.ts from proto/*.proto; with `--check`, says instead which of them are not up to date.
 *
 * buf and its plugin come from npm in the versions of deno.json and are run by Deno itself, so that a machine with
 * nothing but npm can do it. protoc would have to be installed; the npm packages of protoc fetch it at run time.
 */
import deno from "../deno.json" with { type: "json" };

const here = import.meta.dirname ?? ".";
const check = Deno.args.includes("--check");
const committed = `${here}/gen`;
const output = check ? await Deno.makeTempDir({ prefix: "lbcsi-proto-" }) : committed;
let different: string[] = [];
try {
  await generate(output);
  different = changed(output);
} finally {
  if (check) await Deno.remove(output, { recursive: true });
}
if (different.length > 0) {
  console.error(`Not up to date, run "deno task proto": ${different.map((name) => `proto/gen/${name}`).join(", ")}`);
  Deno.exit(1);
}

async function generate(output: string): Promise<void> {
  const plugin = {
    local: [Deno.execPath(), "run", "-A", "--quiet", deno.imports["@bufbuild/protoc-gen-es"]],
    out: output,
    opt: ["target=ts", "import_extension=ts"],
  };
  const template = JSON.stringify({ version: "v2", plugins: [plugin] });
  const { code } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--quiet", deno.imports["@bufbuild/buf"], "generate", here, "--template", template],
    // Deno's configuration, and with it the lock file, is found from here.
    cwd: here,
  }).spawn().status;
  if (code !== 0) throw new Error(`Cannot generate proto/gen: buf ended with exit status ${code}`);
}

/** The names of the files that differ between `output` and what is committed, or are in only one of them. */
function changed(output: string): string[] {
  const names = new Set([...Deno.readDirSync(output), ...Deno.readDirSync(committed)].map(({ name }) => name));
  return [...names].sort().filter((name) => read(`${output}/${name}`) !== read(`${committed}/${name}`));
}

function read(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

/** Makes the JavaScript that is compiled into the executables. */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { BuildError } from "./build_error.ts";

/** The directory of the checkout. */
export const repository = fileURLToPath(new URL("../../", import.meta.url));

/**
 * Bundles a program into a directory, which is emptied first. Chunks stay separate files, so that a node never loads the
 * simulator. Throws a BuildError.
 *
 * Names and white space are shortened, syntax is not: `deno bundle --minify` drops the disposal of `using` declarations.
 */
export async function makeJs(directory: string, commit: string, entry: string): Promise<void> {
  await Deno.remove(directory, { recursive: true }).catch((error) => {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  });
  await denoOutput("bundle", repository, ["bundle", "--quiet", "--code-splitting", "--outdir", directory, entry]);
  const files = [...Deno.readDirSync(directory)].map(({ name }) => join(directory, name));
  await denoOutput("make the bundle smaller", repository, [
    ...["run", "-A", "npm:esbuild@0.25.5", ...files],
    ...["--minify-whitespace", "--minify-identifiers", "--format=esm", "--target=esnext"],
    ...[`--define:LBCSI_COMMIT=${JSON.stringify(commit)}`],
    ...[`--outdir=${directory}`, "--allow-overwrite", "--log-level=warning"],
  ]);
}

/** The output of a command of Deno. Throws a BuildError `Cannot <action>: …` when it fails. */
export async function denoOutput(action: string, cwd: string, args: readonly string[]): Promise<string> {
  const { code, output } = await runDeno(cwd, args);
  if (code !== 0) throw new BuildError(`Cannot ${action}: exit ${code}\n${output}`);
  return output;
}

/** Runs a command of Deno; `output` is what it wrote to stderr and then what it wrote to stdout. */
export async function runDeno(
  cwd: string,
  args: readonly string[],
): Promise<{ readonly code: number; readonly output: string }> {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [...args],
    cwd,
    env: { NO_COLOR: "1" },
    stdin: "null",
  }).output();
  return { code, output: new TextDecoder().decode(stderr) + new TextDecoder().decode(stdout) };
}

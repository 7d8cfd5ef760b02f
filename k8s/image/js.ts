/** Makes the JavaScript that is compiled into the executables. */
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** The checkout. */
export const root = fileURLToPath(new URL("../../", import.meta.url));

/** A reason not to go on, worded for who builds. */
export class Refusal extends Error {}

export async function run(
  cwd: string,
  args: readonly string[],
): Promise<{ readonly code: number; readonly said: string }> {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [...args],
    cwd,
    env: { NO_COLOR: "1" },
    stdin: "null",
  }).output();
  return { code, said: new TextDecoder().decode(stderr) + new TextDecoder().decode(stdout) };
}

export async function must(action: string, cwd: string, ...args: readonly string[]): Promise<string> {
  const { code, said } = await run(cwd, args);
  if (code !== 0) throw new Refusal(`Cannot ${action}: exit ${code}\n${said}`);
  return said;
}

/**
 * Bundles a program into a directory, which is emptied before. Chunks stay apart, so that a node never loads a simulator.
 *
 * Names and blanks go, syntax stays: `deno bundle --minify` drops the disposal of `using` declarations.
 */
export async function makeJs(directory: string, commit: string, entry: string): Promise<void> {
  await Deno.remove(directory, { recursive: true }).catch((error) => {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  });
  await must("bundle", root, "bundle", "--quiet", "--code-splitting", "--outdir", directory, entry);
  const files = [...Deno.readDirSync(directory)].map(({ name }) => join(directory, name));
  await must(
    ...["make the bundle smaller", root, "run", "-A", "npm:esbuild@0.25.5", ...files] as const,
    ...["--minify-whitespace", "--minify-identifiers", "--format=esm", "--target=esnext"],
    ...[`--define:LBCSI_COMMIT=${JSON.stringify(commit)}`],
    ...[`--outdir=${directory}`, "--allow-overwrite", "--log-level=warning"],
  );
}

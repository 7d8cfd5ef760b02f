/** Commands and files that the data planes use on their machine. */
import { StatusError } from "../../error.ts";

/** How a command ended. */
export interface Finished {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a command to its end. A program that is not installed ends with 127. */
export async function run(program: string, ...args: readonly string[]): Promise<Finished> {
  try {
    const { code, stdout, stderr } = await new Deno.Command(program, { args: [...args], env: { LC_ALL: "C" } })
      .output();
    const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
    return { code, stdout: text(stdout), stderr: text(stderr) };
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return { code: 127, stdout: "", stderr: `${program} is not installed` };
    throw error;
  }
}

/** Runs a command and resolves with what it printed; throws INTERNAL with its error text when it fails. */
export async function output(program: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await run(program, ...args);
  if (code === 0) return stdout;
  throw new StatusError("INTERNAL", `Cannot run ${[program, ...args].join(" ")}: exit ${code}, ${stderr}`);
}

/** The text of a file; undefined when it cannot be read. */
export function readText(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch {
    return undefined;
  }
}

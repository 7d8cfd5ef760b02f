/** Runs lbcsi from its sources, as a process of its own. */
import { fileURLToPath } from "node:url";

/** The program, for tests that run it in their own way. */
export const mainPath = fileURLToPath(new URL("../../main.ts", import.meta.url));

/** What a process printed, and its exit status. */
export interface Finished {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

/** lbcsi with arguments, and with variables besides those of this process; stdout and stderr are piped. */
export function lbcsiCommand(
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
  stdin: "null" | "piped" = "null",
): Deno.Command {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", mainPath, ...args],
    env: { NO_COLOR: "1", ...env },
    stdin,
    stdout: "piped",
    stderr: "piped",
  });
}

/** Waits until a process has ended. */
export async function finished(process: Deno.ChildProcess): Promise<Finished> {
  const { code, stdout, stderr } = await process.output();
  return { code, out: new TextDecoder().decode(stdout), err: new TextDecoder().decode(stderr) };
}

/** Runs lbcsi until it ends. */
export async function runLbcsi(args: readonly string[], env: Readonly<Record<string, string>> = {}): Promise<Finished> {
  return await finished(lbcsiCommand(args, env).spawn());
}

/**
 * The code that guests run, made ready on the host: bundles, and Deno's cache with their bytecode, which is valid for the
 * same file at the same path alone. With it `lbcsi node` starts in 5 s under emulation, without it in 13 and more.
 */
import { join } from "node:path";

/** Places in a directory that host and guests have at the same path. */
export interface Code {
  readonly directory: string;
  /** What follows `deno` to start the checks, before their arguments. */
  readonly checks: readonly string[];
  /** What follows `deno` to start lbcsi, before its arguments. */
  readonly program: readonly string[];
  /** The folder of the bundle of inside.ts and the files of checks. */
  readonly checksDir: string;
  /** The folder of the bundle of main.ts. */
  readonly programDir: string;
  /** To be copied to a place of one's own, as DENO_DIR: SQLite does not work on a share. */
  readonly cache: string;
}

/** Where everything is below a directory. */
export function codeAt(directory: string): Code {
  const [checksDir, programDir] = [join(directory, "checks"), join(directory, "program")];
  // V8's compilers cost more than they gain under emulation. Bytecode is valid with the same flags alone.
  const flags = "--v8-flags=--jitless,--max-old-space-size=64";
  return {
    directory,
    checks: ["run", "-A", flags, join(checksDir, "inside.js")],
    program: ["run", "-A", flags, join(programDir, "main.js")],
    checksDir,
    programDir,
    cache: join(directory, "cache"),
  };
}

/** `lbcsi version`: which version this is, and from which commit it was built. */
import { statSync } from "node:fs";
import { fileURLToPath } from "node:url";
import config from "../../deno.json" with { type: "json" };

/** The version of the driver, as `deno.json` has it. */
export const version = config.version;

/** The commit that the program was built from. The build defines it; without a build the name does not exist. */
declare const LBCSI_COMMIT: string | undefined;

/** The line that `lbcsi version` prints. */
export function describeProgram(): string {
  return `lbcsi ${version} (commit ${commitOfProgram() ?? "unknown"}, CSI 1.12, Deno ${Deno.version.deno})`;
}

/** The commit of the build or, in a checkout, of its files: with `-dirty` when a file differs from it. */
function commitOfProgram(): string | undefined {
  if (typeof LBCSI_COMMIT === "string") return LBCSI_COMMIT;
  try {
    const root = fileURLToPath(new URL("../../", import.meta.url));
    // Without this check, git would describe any repository that these files happen to be in.
    if (!statSync(`${root}/.git`)) return undefined;
    const { success, stdout } = new Deno.Command("git", {
      args: ["-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
      stderr: "null",
    }).outputSync();
    return success ? new TextDecoder().decode(stdout).trim() : undefined;
  } catch {
    return undefined; // It is not a checkout, or git is not installed.
  }
}

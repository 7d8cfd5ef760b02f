/**
 * Whether all that a test needs is on this machine; prints what is missing otherwise. For `ignore: !needs("root")`.
 *
 * `root`: user ID 0. `loop`: loop devices can be made. Anything else: a program of that name is on PATH.
 */
export function needs(...what: readonly string[]): boolean {
  const missing = what.filter((need) => !isHere(need));
  if (missing.length > 0) console.warn(`skipped, this machine has no ${missing.join(", ")}:`);
  return missing.length === 0;
}

function isHere(need: string): boolean {
  if (need === "root") return Deno.uid() === 0;
  if (need === "loop") return exists("/dev/loop-control") && isHere("losetup");
  return (Deno.env.get("PATH") ?? "").split(":").some((directory) => exists(`${directory}/${need}`));
}

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

/** Go programs in tests: what a machine lacks is a reason to skip, anything else is a failure. */

/**
 * What `body` gives, or undefined, with the reason printed, when Go modules cannot be fetched here. A machine without Go
 * is for `needs("go")` to find.
 */
export async function unlessGoLacks<T>(body: () => Promise<T>): Promise<T | undefined> {
  try {
    return await body();
  } catch (error) {
    const lacking =
      /^.*(dial tcp|no such host|module lookup disabled|connection refused|timeout|requires go >=|proxyconnect).*$/m
        .exec(String(error));
    if (lacking === null) throw error;
    console.warn(`skipped, Go cannot fetch what it needs: ${lacking[0]}`);
    return undefined;
  }
}

/** Directories of Go modules, `path@version`, which are fetched when they are not here yet. */
export async function goModules(modules: readonly string[]): Promise<ReadonlyMap<string, string>> {
  const { success, stdout, stderr } = await new Deno.Command("go", {
    args: ["mod", "download", "-json", ...modules],
    // Outside of any module, whose settings would count.
    cwd: "/",
    env: { GOFLAGS: "", GOWORK: "off", GOTOOLCHAIN: "local" },
  }).output();
  const text = new TextDecoder().decode(stdout);
  if (!success) throw new Error(`Cannot fetch Go modules: ${text}${new TextDecoder().decode(stderr)}`);
  return new Map(
    text.split(/(?<=^})\n/m).filter((one) => one.trim() !== "").map((one) => {
      const { Path, Version, Dir }: { Path: string; Version: string; Dir: string } = JSON.parse(one);
      return [`${Path}@${Version}`, Dir];
    }),
  );
}

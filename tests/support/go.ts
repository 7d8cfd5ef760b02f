/** Go programs in tests: what a machine lacks is a reason to skip, anything else is a failure. */

const lacking =
  /^.*(dial tcp|no such host|module lookup disabled|connection refused|timeout|requires go >=|proxyconnect|: 50[0-9] ).*$/m;
// A proxy of modules that is overloaded, or is being replaced, is back within seconds.
const passing = /: (50[0-9]|429) |connection reset|unexpected EOF|timeout/;
const pausesMs = [2_000, 10_000, 30_000] as const;

/** Repeats what failed for a temporary reason, up to three times. */
export async function fetching<T>(body: () => Promise<T>): Promise<T> {
  for (const pauseMs of pausesMs) {
    try {
      return await body();
    } catch (error) {
      if (!passing.test(String(error))) throw error;
      console.warn(`again in ${pauseMs / 1000} s: ${String(error).split("\n").find((line) => passing.test(line))}`);
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
    }
  }
  return await body();
}

/**
 * What `body` gives, or undefined, with the reason printed, when Go modules cannot be fetched here. A machine without Go
 * is for `needs("go")` to find.
 */
export async function unlessGoLacks<T>(body: () => Promise<T>): Promise<T | undefined> {
  try {
    return await fetching(body);
  } catch (error) {
    const line = lacking.exec(String(error));
    if (line === null) throw error;
    console.warn(`skipped, Go cannot fetch what it needs: ${line[0]}`);
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

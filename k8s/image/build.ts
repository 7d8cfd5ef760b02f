/**
 * `deno task build`: makes the executables, for x86_64 and aarch64.
 *
 *     dist/x86_64/lbcsi               everything, with all permissions: node, tools, also the controller
 *     dist/x86_64/lbcsi-controller    `controller` and `identity` with the permissions of permissions.ts
 *     dist/aarch64/...                the same
 *
 *   --target LIST    x86_64, aarch64; default: both
 *   --out DIR        instead of dist
 *   --commit TEXT    the commit that `lbcsi version` prints; default: that of the checkout
 *   --js DIR         only make the JavaScript, in DIR
 *   --from DIR       compile the JavaScript that an earlier --js has made
 *   --any-deno       allow a version of Deno whose gRPC is not tested, to test the build
 *
 * Sources are bundled and then compiled, because `deno compile` of sources would embed the npm cache (362 MB instead of 90).
 * Deno downloads its base binary, `denort`, from its own site. Where that site cannot be accessed, $DENORT_BIN is the path
 * of a base binary; then only its own target can be built. Its version must be that of the Deno that compiles.
 */
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { BuildError, exitOnBuildError } from "./build_error.ts";
import { denoOutput, makeJs, repository, runDeno } from "./js.ts";
import { controllerPermissions } from "./permissions.ts";

/** The only version that compiles releases. Others cannot serve gRPC (before 2.7.14), leak (before 2.9.4), or are not tested. */
const testedDeno = "2.9.5";

const triples = { x86_64: "x86_64-unknown-linux-gnu", aarch64: "aarch64-unknown-linux-gnu" } as const;
type Target = keyof typeof triples;

/** The target of a machine number (e_machine) in an ELF header. */
const machines: Readonly<Record<number, Target>> = { 62: "x86_64", 183: "aarch64" };

// Interpreted code is fast enough for CSI and keeps a service below 30 MiB. The heap limit makes V8 collect garbage earlier.
const v8Flags = "--v8-flags=--lite-mode,--max-old-space-size=64";

/** The executables, and the permissions that are compiled into them. */
const executables: Readonly<Record<string, readonly string[]>> = {
  // Only programs with all permissions can access /sys, /proc and /dev; a single --deny flag would take that away.
  "lbcsi": ["-A", "--no-prompt"],
  "lbcsi-controller": controllerPermissions,
};

/** The commit of the checkout, as the program itself prints it. */
async function checkoutCommit(): Promise<string> {
  const args = ["run", "-A", "--no-check", "main.ts", "version"];
  const output = await denoOutput("ask main.ts for its commit", repository, args);
  return /\(commit ([^,]+),/.exec(output)?.[1] ?? "unknown";
}

/** The target that a base binary is made for. */
async function targetOf(base: string): Promise<Target> {
  const header = new Uint8Array(20);
  try {
    using file = await Deno.open(base);
    await file.read(header);
  } catch (error) {
    throw new BuildError(`Cannot use DENORT_BIN "${base}": ${error instanceof Error ? error.message : error}`);
  }
  const machine = new DataView(header.buffer).getUint16(18, true);
  const target = header[0] === 0x7f ? machines[machine] : undefined;
  if (target === undefined) {
    throw new BuildError(`Cannot use DENORT_BIN "${base}": it is not an ELF file of a known machine`);
  }
  return target;
}

async function compile(js: string, target: Target, directory: string): Promise<void> {
  await Deno.mkdir(directory, { recursive: true });
  for (const [name, permissions] of Object.entries(executables)) {
    const path = join(directory, name);
    const { code, output: message } = await runDeno(js, [
      ...["compile", "--no-config", "--no-check", "--no-code-cache", "--target", triples[target]],
      // The chunks, which are loaded on demand, are included.
      ...[...permissions, v8Flags, "--include", ".", "--output", path, "main.js"],
    ]);
    if (code !== 0) {
      const version = Deno.version.deno;
      const help = /denort|dl\.deno\.land/.test(message)
        ? `\nDeno's base binary could not be downloaded. Give this machine access to https://dl.deno.land, or get\n` +
          `  https://dl.deno.land/release/v${version}/denort-${triples[target]}.zip\n` +
          `elsewhere, unpack it, and build with DENORT_BIN=…/denort deno task build --target ${target}`
        : "";
      throw new BuildError(`Cannot compile ${name} for ${target}: exit ${code}\n${message.trim()}${help}`);
    }
    console.log(`${path}: ${(await Deno.stat(path)).size} bytes`);
  }
}

/** The targets to build: those of `--target`, else that of the given base binary, else all. */
async function selectTargets(list: string | undefined, base: string | undefined): Promise<readonly Target[]> {
  const targets = (list?.split(",") ?? (base === undefined ? Object.keys(triples) : [await targetOf(base)]))
    .map((name): Target => {
      if (Object.hasOwn(triples, name)) return name as Target;
      throw new BuildError(`Cannot build for "${name}": only ${Object.keys(triples).join(" and ")} are known`);
    });
  if (base === undefined) return targets;
  const machine = await targetOf(base);
  const others = targets.filter((target) => target !== machine);
  if (others.length === 0) return targets;
  throw new BuildError(`Cannot build for ${others.join()} with DENORT_BIN "${base}": it is made for ${machine}`);
}

function assertTestedDeno(): void {
  if (Deno.version.deno === testedDeno) return;
  throw new BuildError(
    `Cannot build with Deno ${Deno.version.deno}: the driver is tested with ${testedDeno}, use ` +
      `npx -y deno@${testedDeno} task build (or, to test the build alone, --any-deno)`,
  );
}

async function main(): Promise<void> {
  const { values: options } = parseArgs({
    args: Deno.args,
    options: {
      target: { type: "string" },
      out: { type: "string", default: join(repository, "dist") },
      commit: { type: "string" },
      js: { type: "string" },
      from: { type: "string" },
      "any-deno": { type: "boolean", default: false },
    },
  });
  const commit = async () => {
    const text = options.commit ?? await checkoutCommit();
    if (/^[\w.-]{1,64}$/.test(text)) return text;
    throw new BuildError(
      `Cannot build with commit "${text}": it is not 1 to 64 letters, digits or characters of "._-"`,
    );
  };
  const targets = await selectTargets(options.target, Deno.env.get("DENORT_BIN") || undefined);
  if (options.js !== undefined) return await makeJs(resolve(options.js), await commit(), "main.ts");
  if (!options["any-deno"]) assertTestedDeno();
  const js = resolve(options.from ?? join(options.out, "js"));
  if (options.from === undefined) await makeJs(js, await commit(), "main.ts");
  for (const target of targets) await compile(js, target, join(resolve(options.out), target));
}

await exitOnBuildError(main);

/**
 * `deno task build`: makes the executables, for x86_64 and aarch64.
 *
 *     dist/x86_64/lbcsi               everything, with all permissions: node, tools, also the controller
 *     dist/x86_64/lbcsi-controller    `controller` and `identity` with the permissions of permissions.ts
 *     dist/aarch64/...                the same
 *
 *   --target LIST    x86_64, aarch64; default: both
 *   --out DIR        instead of dist
 *   --commit TEXT    what `lbcsi version` shows as the commit; default: what git says
 *   --js DIR         make the JavaScript alone, there
 *   --from DIR       compile the JavaScript of a former --js
 *   --any-deno       compile with another Deno than the one whose gRPC was tested, to test the build
 *
 * Sources are bundled and then compiled: `deno compile` of sources would embed the npm cache (362 MB instead of 90). The
 * base binary, `denort`, is downloaded by Deno from its own site; where that cannot be reached, $DENORT_BIN names one, for
 * the one target that it is made for. It has to be of the version of Deno which compiles.
 */
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { makeJs, must, Refusal, root, run } from "./js.ts";
import { controllerPermissions } from "./permissions.ts";

/**
 * The only one that compiles what is shipped. Others cannot serve gRPC (before 2.7.14), leak (before 2.9.4), or were not
 * tested.
 */
const testedDeno = "2.9.5";

const triples = { x86_64: "x86_64-unknown-linux-gnu", aarch64: "aarch64-unknown-linux-gnu" } as const;
type Target = keyof typeof triples;

/** e_machine of an ELF header. */
const machines: Readonly<Record<number, Target>> = { 62: "x86_64", 183: "aarch64" };

// Interpreted code is fast enough for CSI and keeps a service below 30 MiB; the heap's bound makes V8 collect earlier.
const v8Flags = "--v8-flags=--lite-mode,--max-old-space-size=64";

const executables: Readonly<Record<string, readonly string[]>> = {
  // /sys, /proc and /dev are open to programs with all permissions only, and a single --deny flag would take that away.
  "lbcsi": ["-A", "--no-prompt"],
  "lbcsi-controller": controllerPermissions,
};

/** What git says, in the words of the program. */
async function commitOfCheckout(): Promise<string> {
  const said = await must("ask main.ts for its commit", root, "run", "-A", "--no-check", "main.ts", "version");
  return /\(commit ([^,]+),/.exec(said)?.[1] ?? "unknown";
}

async function targetOf(base: string): Promise<Target> {
  const header = new Uint8Array(20);
  try {
    using file = await Deno.open(base);
    await file.read(header);
  } catch (error) {
    throw new Refusal(`Cannot use DENORT_BIN "${base}": ${error instanceof Error ? error.message : error}`);
  }
  const machine = new DataView(header.buffer).getUint16(18, true);
  const target = header[0] === 0x7f ? machines[machine] : undefined;
  if (target === undefined) throw new Refusal(`Cannot use DENORT_BIN "${base}": it is no ELF file of a known machine`);
  return target;
}

async function compile(js: string, target: Target, directory: string): Promise<void> {
  await Deno.mkdir(directory, { recursive: true });
  for (const [name, permissions] of Object.entries(executables)) {
    const output = join(directory, name);
    const { code, said } = await run(js, [
      ...["compile", "--no-config", "--no-check", "--no-code-cache", "--target", triples[target]],
      // Chunks that are loaded on demand.
      ...[...permissions, v8Flags, "--include", ".", "--output", output, "main.js"],
    ]);
    if (code !== 0) {
      const version = Deno.version.deno;
      const help = /denort|dl\.deno\.land/.test(said)
        ? `\nDeno's base binary could not be had. Let this machine reach https://dl.deno.land, or get\n` +
          `  https://dl.deno.land/release/v${version}/denort-${triples[target]}.zip\n` +
          `elsewhere, unpack it, and build with DENORT_BIN=…/denort deno task build --target ${target}`
        : "";
      throw new Refusal(`Cannot compile ${name} for ${target}: exit ${code}\n${said.trim()}${help}`);
    }
    console.log(`${output}: ${(await Deno.stat(output)).size} bytes`);
  }
}

async function main(): Promise<void> {
  const { values: options } = parseArgs({
    args: Deno.args,
    options: {
      target: { type: "string" },
      out: { type: "string", default: join(root, "dist") },
      commit: { type: "string" },
      js: { type: "string" },
      from: { type: "string" },
      "any-deno": { type: "boolean", default: false },
    },
  });
  const base = Deno.env.get("DENORT_BIN") || undefined;
  const targets = (options.target?.split(",") ?? (base === undefined ? Object.keys(triples) : [await targetOf(base)]))
    .map((name): Target => {
      if (Object.hasOwn(triples, name)) return name as Target;
      throw new Refusal(`Cannot build for "${name}": only ${Object.keys(triples).join(" and ")} are known`);
    });
  const commit = async () => {
    const text = options.commit ?? await commitOfCheckout();
    if (!/^[\w.-]{1,64}$/.test(text)) throw new Refusal(`Cannot write the commit "${text}" down: it is none`);
    return text;
  };
  if (options.js !== undefined) return await makeJs(resolve(options.js), await commit(), "main.ts");
  if (Deno.version.deno !== testedDeno && !options["any-deno"]) {
    throw new Refusal(
      `Cannot build with Deno ${Deno.version.deno}: the driver is tested with ${testedDeno}, use ` +
        `npx -y deno@${testedDeno} task build (or, to test the build alone, --any-deno)`,
    );
  }
  if (base !== undefined) {
    const machine = await targetOf(base);
    const others = targets.filter((target) => target !== machine);
    if (others.length > 0) {
      throw new Refusal(`Cannot build for ${others.join()} with DENORT_BIN "${base}": it is made for ${machine}`);
    }
  }
  const js = resolve(options.from ?? join(options.out, "js"));
  if (options.from === undefined) await makeJs(js, await commit(), "main.ts");
  for (const target of targets) await compile(js, target, join(resolve(options.out), target));
}

try {
  await main();
} catch (error) {
  if (!(error instanceof Refusal)) throw error;
  console.error(error.message);
  Deno.exit(1);
}

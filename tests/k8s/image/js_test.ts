/** The JavaScript of `deno task bundle:js`, which `deno compile` embeds, behaves like the sources. */
import { deepStrictEqual, ok, strictEqual } from "node:assert/strict";
import { fileURLToPath } from "node:url";
import config from "../../../deno.json" with { type: "json" };
import { makeJs } from "../../../k8s/image/js.ts";
import { fate } from "../../support/goaway.ts";

const root = fileURLToPath(new URL("../../../", import.meta.url));

async function withBundle(body: (directory: string) => Promise<void>): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-bundle-" });
  try {
    const { success, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["task", "--eval", config.tasks["bundle:js"].replaceAll("dist/js", directory)],
      cwd: root,
      stdout: "null",
      stderr: "piped",
    }).output();
    ok(success, new TextDecoder().decode(stderr));
    await body(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

Deno.test("the bundle keeps every `using` of the sources, which `deno bundle --minify` would drop", async () => {
  await withBundle(async (directory) => {
    const inSources = await countUsings([`${root}main.ts`, ...await scriptFiles(`${root}lib`, ".ts")]);
    const inBundle = await countUsings(await scriptFiles(directory, ".js"));

    ok(inSources > 20);
    strictEqual(inBundle, inSources);
  });
});

Deno.test("the bundle survives clients that send GOAWAY: its guard is loaded before its gRPC library", async () => {
  await withBundle(async (directory) => {
    const server = (path: string) => [`${directory}/main.js`, "identity", "--endpoint", `unix://${path}`];

    deepStrictEqual(await fate(server, 2, 50), { end: "alive", served: 2 });
  });
});

Deno.test("the bundle loads the simulator only when a command needs it", async () => {
  await withBundle(async (directory) => {
    const names = [...Deno.readDirSync(directory)].map(({ name }) => name);
    const atStart = staticImports(directory, "main.js");
    const main = await Deno.readTextFile(`${directory}/main.js`);

    ok(names.some((name) => /^simulator-[A-Z0-9]+\.js$/.test(name)), names.join());
    ok(atStart.length > 5, atStart.join());
    deepStrictEqual(atStart.filter((name) => name.startsWith("simulat")), []);
    ok(main.length < 100_000, `main.js has ${main.length} characters`);
  });
});

/** The files that are loaded with a file of the bundle, itself included. */
function staticImports(directory: string, name: string): readonly string[] {
  const loaded = new Set([name]);
  for (const one of loaded) {
    const text = Deno.readTextFileSync(`${directory}/${one}`);
    for (const [, imported = ""] of text.matchAll(/(?:from|import)"\.\/([^"]+)"/g)) loaded.add(imported);
  }
  return [...loaded];
}

Deno.test("the bundle reads a volume while 40 others block: workers receive their program as text", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-bundle-" });
  try {
    await makeJs(`${directory}/js`, "test", "tests/support/blocked_reads.ts");
    const pipes = Array.from({ length: 40 }, (_, n) => `${directory}/pipe${n}`);
    ok((await new Deno.Command("mkfifo", { args: pipes }).output()).success);
    await Deno.writeTextFile(`${directory}/file`, "healthy");

    const { stdout } = await new Deno.Command(Deno.execPath(), {
      args: [
        "run",
        "-A",
        "--no-config",
        "--v8-flags=--lite-mode",
        `${directory}/js/blocked_reads.js`,
        `${directory}/file`,
        ...pipes,
      ],
    }).output();

    strictEqual(new TextDecoder().decode(stdout), "healthy true\n");
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

async function scriptFiles(directory: string, suffix: string): Promise<string[]> {
  const found: string[] = [];
  for await (const { name, isDirectory } of Deno.readDir(directory)) {
    if (isDirectory) found.push(...await scriptFiles(`${directory}/${name}`, suffix));
    else if (name.endsWith(suffix)) found.push(`${directory}/${name}`);
  }
  return found;
}

/** The number of declarations with `using`. */
async function countUsings(files: readonly string[]): Promise<number> {
  const sources = await Promise.all(files.map((file) => Deno.readTextFile(file)));
  // In prose the word is not followed by a declaration.
  return sources.reduce((sum, text) => sum + [...text.matchAll(/(?<![\w`])using [\w$]+ ?= ?/g)].length, 0);
}

/** What `deno task bundle:js` makes, and `deno compile` embeds, must behave as the sources do. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
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

Deno.test("the bundle keeps every `using` of the sources, which a full minifier would take away", async () => {
  await withBundle(async (directory) => {
    const inSources = await usings([`${root}main.ts`, ...await scripts(`${root}lib`, ".ts")]);
    const inBundle = await usings(await scripts(directory, ".js"));

    ok(inSources > 20);
    strictEqual(inBundle, inSources);
  });
});

Deno.test("the bundle lives through clients that send GOAWAY: its guard comes before its gRPC library", async () => {
  await withBundle(async (directory) => {
    const server = (path: string) => [`${directory}/main.js`, "identity", "--endpoint", `unix://${path}`];

    deepStrictEqual(await fate(server, 2, 50), { end: "alive", served: 2 });
  });
});

Deno.test("the bundle loads the simulator for those alone who simulate", async () => {
  await withBundle(async (directory) => {
    const main = await Deno.readTextFile(`${directory}/main.js`);

    const [, command = ""] = /import\("\.\/(simulate-[A-Z0-9]+\.js)"\)/.exec(main) ?? [];
    match(await Deno.readTextFile(`${directory}/${command}`), /import\("\.\/simulator-[A-Z0-9]+\.js"\)/);
    ok(main.length < 100_000, `main.js has ${main.length} characters`);
  });
});

Deno.test("the bundle reads a volume while 40 others block: workers get their program as text", async () => {
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

async function scripts(directory: string, suffix: string): Promise<string[]> {
  const found: string[] = [];
  for await (const { name, isDirectory } of Deno.readDir(directory)) {
    if (isDirectory) found.push(...await scripts(`${directory}/${name}`, suffix));
    else if (name.endsWith(suffix)) found.push(`${directory}/${name}`);
  }
  return found;
}

/** How many declarations with `using` there are. */
async function usings(files: readonly string[]): Promise<number> {
  const texts = await Promise.all(files.map((file) => Deno.readTextFile(file)));
  // In prose the word is followed by other things.
  return texts.reduce((sum, text) => sum + [...text.matchAll(/(?<![\w`])using [\w$]+ ?= ?/g)].length, 0);
}

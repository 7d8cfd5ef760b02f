/** What `deno task bundle` makes, and `deno compile` embeds, must behave as the sources do. */
import { deepStrictEqual, match, ok } from "node:assert/strict";
import { fileURLToPath } from "node:url";
import config from "../deno.json" with { type: "json" };
import { fate } from "./support/goaway.ts";

const root = fileURLToPath(new URL("../", import.meta.url));

async function withBundle(body: (directory: string) => Promise<void>): Promise<void> {
  // The task's own command, into another directory.
  const command = /deno (bundle .*) --outdir \S+ (main\.ts)$/.exec(config.tasks.bundle);
  ok(command, config.tasks.bundle);
  const [, flags = "", entry = ""] = command;
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-bundle-" });
  try {
    const { success, stderr } = await new Deno.Command(Deno.execPath(), {
      args: [...flags.split(" "), "--outdir", directory, entry],
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

Deno.test("the bundle keeps every `using` of the sources, which its minifier would take away", async () => {
  await withBundle(async (directory) => {
    const inSources = await usings([`${root}main.ts`, ...await scripts(`${root}lib`, ".ts")]);
    const inBundle = await usings(await scripts(directory, ".js"));

    ok(inSources.length > 20);
    deepStrictEqual(inBundle, inSources);
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

    match(main, /import\("\.\/simulate-[A-Z0-9]+\.js"\)/);
    ok(main.length < 100_000, `main.js has ${main.length} characters`);
  });
});

async function scripts(directory: string, suffix: string): Promise<string[]> {
  const found: string[] = [];
  for await (const { name, isDirectory } of Deno.readDir(directory)) {
    if (isDirectory) found.push(...await scripts(`${directory}/${name}`, suffix));
    else if (name.endsWith(suffix)) found.push(`${directory}/${name}`);
  }
  return found;
}

/** The names declared with `using`, sorted; a bundler may number them. */
async function usings(files: readonly string[]): Promise<readonly string[]> {
  const texts = await Promise.all(files.map((file) => Deno.readTextFile(file)));
  return texts.flatMap((text) =>
    [...text.matchAll(/^\s*(?:await )?using (\w+?)\d* = /gm)].map(([, name]) => name ?? "")
  )
    .sort();
}

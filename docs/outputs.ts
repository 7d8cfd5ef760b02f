/**
 * The commands in the documents, and their output.
 *
 * A block "```sh run" can run anywhere: the tests run it in an empty directory with `lbcsi` in its PATH. A block "```text"
 * directly after it quotes its output. `deno task docs` updates these quotes; with `--check` it writes nothing and ends
 * with status 1 if one differs.
 */
import { fileURLToPath } from "node:url";

/** The root of the repository, with a slash at its end. */
export const root = fileURLToPath(new URL("../", import.meta.url));

/** Paths of all documents from the root: those of the root, of this directory and of its `reference`. */
export const documentPaths: readonly string[] = [
  "README.md",
  "CHANGELOG.md",
  "CONTRIBUTING.md",
  "SECURITY.md",
  ...documentsIn("docs"),
  ...documentsIn("docs/reference"),
];

function documentsIn(directory: string): readonly string[] {
  return [...Deno.readDirSync(root + directory)].map(({ name }) => `${directory}/${name}`)
    .filter((path) => path.endsWith(".md")).sort();
}

/** A fenced block of a document. */
export interface Block {
  /** The text after the fence: `sh run`. */
  readonly info: string;
  readonly text: string;
  /** The lines of the opening and the closing fence, from 0. */
  readonly from: number;
  readonly to: number;
}

/** The fenced blocks of a document, in order. */
export function blocksOf(markdown: string): readonly Block[] {
  const lines = markdown.split("\n");
  const blocks: Block[] = [];
  for (let from = 0; from < lines.length; from++) {
    // Within a list, blocks are indented.
    const [, indent, info] = /^( *)```(.*)$/.exec(lines[from] ?? "") ?? [];
    if (indent === undefined || info === undefined) continue;
    const to = lines.indexOf(`${indent}\`\`\``, from + 1);
    if (to < 0) throw new Error(`Cannot read a document: the block at line ${from + 1} has no end`);
    const text = lines.slice(from + 1, to).map((line) => line.slice(indent.length)).join("\n");
    blocks.push({ info, text, from, to });
    from = to;
  }
  return blocks;
}

/** A block that can be run, and the block that quotes its output, if there is one. */
export interface Run {
  readonly command: Block;
  readonly output: Block | undefined;
}

/** The blocks of a document that can be run. */
export function runsOf(markdown: string): readonly Run[] {
  const blocks = blocksOf(markdown);
  return blocks.flatMap((command, at) => {
    if (command.info !== "sh run") return [];
    const next = blocks[at + 1];
    const isOutput = next?.info === "text" && next.from <= command.to + 2;
    return [{ command, output: isOutput ? next : undefined }];
  });
}

/**
 * Runs a block in a new directory and returns its output. Throws, with its error output, if it fails or takes more than a
 * minute.
 */
export async function run({ text }: Block): Promise<string> {
  const directory = await Deno.makeTempDir();
  try {
    const program = `${directory}/bin/lbcsi`;
    await Deno.mkdir(`${directory}/bin`);
    await Deno.mkdir(`${directory}/work`);
    await Deno.writeTextFile(
      program,
      `#!/bin/sh\nexec "${Deno.execPath()}" run -A --no-check --quiet "${root}main.ts" "$@"\n`,
      { mode: 0o755 },
    );
    const { code, stdout, stderr } = await new Deno.Command("bash", {
      args: ["-euo", "pipefail", "-c", text],
      cwd: `${directory}/work`,
      env: { PATH: `${directory}/bin:${Deno.env.get("PATH") ?? ""}`, NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      signal: AbortSignal.timeout(60_000),
    }).output();
    if (code !== 0) throw new Error(`Cannot run ${text}: exit ${code}, ${new TextDecoder().decode(stderr)}`);
    return new TextDecoder().decode(stdout).trimEnd();
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** The document with the current output of its commands. */
export async function refreshed(markdown: string): Promise<string> {
  const lines = markdown.split("\n");
  for (const { command, output } of runsOf(markdown).toReversed()) {
    if (output === undefined) continue;
    lines.splice(output.from + 1, output.to - output.from - 1, ...(await run(command)).split("\n"));
  }
  return lines.join("\n");
}

if (import.meta.main) {
  const check = Deno.args.includes("--check");
  const stale: string[] = [];
  for (const path of documentPaths) {
    const text = await Deno.readTextFile(root + path);
    const now = await refreshed(text);
    if (now === text) continue;
    stale.push(path);
    if (!check) await Deno.writeTextFile(root + path, now);
  }
  if (stale.length > 0) {
    console.log(`${check ? "not up to date, run `deno task docs`" : "changed"}: ${stale.join(", ")}`);
  }
  if (check && stale.length > 0) Deno.exit(1);
}

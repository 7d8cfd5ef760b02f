/** The completion scripts, sourced by the shells that they are for. */
import assert from "node:assert/strict";
import { join } from "node:path";
import * as z from "zod";
import { choicesOf } from "../../lib/cli/option_schemas.ts";
import { completionScript, type Shell } from "../../lib/cli/completion_scripts.ts";
import { mainPath } from "../support/lbcsi.ts";
import { needs } from "../support/needs.ts";

/** What a shell offers at the end of each line, by line. */
async function offers(shell: Shell, lines: readonly string[]): Promise<readonly string[][]> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-completion-" });
  try {
    await Deno.mkdir(join(directory, "somewhere"));
    await Deno.writeTextFile(join(directory, "some.jwt"), "");
    const script = await run(directory, Deno.execPath(), "run", "-A", "--no-check", mainPath, "completion", shell);
    await Deno.writeTextFile(join(directory, "script"), script);
    const found: string[][] = [];
    for (const line of lines) {
      found.push(await ask[shell](directory, line));
      for (const name of ["ready", "found", "finished"]) await Deno.remove(join(directory, name)).catch(() => {});
    }
    return found;
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

const ask: Readonly<Record<Shell, (directory: string, line: string) => Promise<string[]>>> = {
  async bash(directory, line) {
    // Readline itself splits a line at "=" (COMP_WORDBREAKS).
    const words = line.split(/ |(=)/).filter((word) => word !== undefined);
    const driver = `set -u
source ./script
complete -p lbcsi >/dev/null
compopt() { :; }
COMP_WORDS=(${words.map((word) => `'${word}'`).join(" ")})
COMP_CWORD=${words.length - 1}
_lbcsi
printf '%s\\n' "\${COMPREPLY[@]}"`;
    return (await run(directory, "bash", "--norc", "-c", driver)).split("\n").filter((word) => word !== "").sort();
  },
  async fish(directory, line) {
    const out = await run(directory, "fish", "--no-config", "-c", `source script; complete -C '${line}'`);
    return out.split("\n").filter((word) => word !== "").map((word) => word.replace(/\t.*/, "")).sort();
  },
  async zsh(directory, line) {
    // A line editor on a terminal of its own; what it would offer is caught where completion hands it over.
    const driver = `zmodload zsh/zpty zsh/zselect
zpty z zsh -f -i
zpty -w z 'PS1=""; autoload -U compinit; compinit -u -D; source ./script'
zpty -w z 'compadd() { local -a found; builtin compadd -A found "$@"; builtin compadd "$@"; print -rl -- $found >>found }'
zpty -w z 'finish() { : >finished }; zle -N finish; bindkey "^X" finish; bindkey "^I" complete-word; : >ready'
waitfor() { for i in {1..400}; do [[ -e $1 ]] && return; zselect -t 2; zpty -r -t z x; done }
waitfor ready
zpty -w -n z $'${line}\\t\\x18'
waitfor finished
zpty -d z
[[ -e found ]] && cat found || true`;
    const out = await run(directory, "zsh", "-f", "-c", driver);
    return [...new Set(out.split("\n").filter((word) => word !== ""))].sort();
  },
};

async function run(cwd: string, program: string, ...args: string[]): Promise<string> {
  const env = { HOME: cwd, XDG_CONFIG_HOME: cwd, XDG_DATA_HOME: cwd, TERM: "dumb", DENO_DIR: denoDir };
  const process = new Deno.Command(program, { args, cwd, env, stdin: "null", stderr: "piped" });
  const { code, stdout, stderr } = await process.output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  return new TextDecoder().decode(stdout);
}

// HOME is another one above, and the shell under test must not download the packages again.
const denoDir = Deno.env.get("DENO_DIR") ?? join(Deno.env.get("HOME") ?? "/root", ".cache/deno");

for (const shell of ["bash", "zsh", "fish"] as const) {
  Deno.test({
    name: `lbcsi completion ${shell} offers commands, options, values, files and directories`,
    ignore: !needs(shell),
    async fn() {
      const lines = [
        "lbcsi at",
        "lbcsi list --",
        "lbcsi attach --fs ",
        "lbcsi node --jwt",
        "lbcsi attach --attach=d",
        "lbcsi attach --jwt-path some.",
        "lbcsi attach --mount some",
        "lbcsi completion ",
      ];
      const [command, options, values, none, joined, file, directory, word] = await offers(shell, lines);

      assert.deepEqual(command, ["attach"]);
      for (const option of ["--uuid", "--all", "--json", "--discovery-dir", "--log-level", "--help"]) {
        assert.ok(options?.includes(option), `${option} in ${options}`);
      }
      assert.ok(!options?.includes("--format"), "that is of attach");
      assert.deepEqual(values, ["btrfs", "ext4", "xfs"]);
      assert.deepEqual(none, [], "node has no such option");
      assert.deepEqual(joined?.map((text) => text.replace(/^--attach=/, "")), ["direct", "discovery-client"]);
      assert.deepEqual(file, ["some.jwt"]);
      assert.deepEqual(directory?.map((text) => text.replace(/\/$/, "")), ["somewhere"]);
      for (const name of ["bash", "fish", "zsh"]) assert.ok(word?.includes(name), `${word}`);
    },
  });
}

Deno.test("completionScript quotes what a shell would run", () => {
  const options = { x: { value: "X", meaning: "it's `id` $(id) [a:b]", schema: z.string() } };

  const command = { name: "a", summary: "it's $(id)", options };

  assert.ok(completionScript("bash", [command]).includes("--x"));
  assert.ok(completionScript("zsh", [command]).includes(`'--x=[it'\\''s \`id\` $(id) \\[a\\:b\\]]:value: '`));
  assert.ok(completionScript("fish", [command]).includes(`-d 'it\\'s \`id\` $(id) [a:b]'`));
});

Deno.test("choicesOf finds the values behind defaults, aliases and transforms, and none where any text will do", () => {
  const choices = (schema: z.ZodType) => choicesOf({ meaning: "", schema });
  const ab = z.enum(["a", "b"]);

  assert.deepEqual(choices(ab), ["a", "b"]);
  assert.deepEqual(choices(ab.optional()), ["a", "b"]);
  assert.deepEqual(choices(ab.default("a").transform((text) => text === "a")), ["a", "b"]);
  assert.deepEqual(choices(z.preprocess((text) => text, ab)), ["a", "b"]);
  assert.deepEqual(choices(z.string()), []);
  assert.deepEqual(choices(z.string().transform((list) => list.split(",")).pipe(z.array(ab))), []);
});

/** `deno task build`, as far as it goes without Deno's base binary; .ci/run compiles and starts what comes out. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("../../../", import.meta.url));

async function inDirectory(body: (directory: string) => Promise<void>): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-build-" });
  try {
    await body(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

async function run(args: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [...args],
    cwd: root,
    env: { NO_COLOR: "1", ...env },
  }).output();
  return { code, out: new TextDecoder().decode(stdout), said: new TextDecoder().decode(stderr) };
}

// An empty DENORT_BIN is none.
const build = (args: readonly string[], env: Readonly<Record<string, string>> = {}) =>
  run(["run", "-A", "k8s/image/build.ts", ...args], { DENORT_BIN: "", ...env });

/** The beginning of an executable for a machine. */
async function elf(path: string, machine: number): Promise<string> {
  const header = new Uint8Array(64);
  header.set([0x7f, 0x45, 0x4c, 0x46]);
  new DataView(header.buffer).setUint16(18, machine, true);
  await Deno.writeFile(path, header);
  return path;
}

Deno.test("the bundle shows the commit that it was given, and a checkout the one that git tells", async () => {
  await inDirectory(async (directory) => {
    const { code, said } = await build(["--js", directory, "--commit", "0123abc-dirty"]);
    assert.equal(code, 0, said);

    const bundle = await run(["run", "-A", join(directory, "main.js"), "version"]);
    const checkout = await run(["run", "-A", "--no-check", "main.ts", "version"]);

    assert.match(bundle.out, /^lbcsi \d+\.\d+\.\d+ \(commit 0123abc-dirty, CSI 1\.12, Deno /);
    const git = await new Deno.Command("git", { args: ["rev-parse", "--short=12", "HEAD"], cwd: root }).output();
    const commit = git.success ? new TextDecoder().decode(git.stdout).trim() : "unknown";
    assert.match(checkout.out, new RegExp(`\\(commit ${commit}(-dirty)?, CSI`));
  });
});

Deno.test("where there is no git the commit is unknown", async () => {
  await inDirectory(async (directory) => {
    const { code, out } = await run(["run", "-A", "--no-check", "main.ts", "version"], { PATH: directory });

    assert.equal(code, 0);
    assert.match(out, /\(commit unknown, CSI/);
  });
});

for (
  const [what, args, machine, message] of [
    ["another machine", ["--target", "riscv64"], undefined, /Cannot build for "riscv64": only x86_64 and aarch64/],
    ["a commit that is none", ["--commit", "a b"], undefined, /Cannot write the commit "a b" down/],
    ["a DENORT_BIN for another machine", ["--target", "x86_64"], 183, /Cannot build for x86_64 .* made for aarch64/],
    ["a DENORT_BIN for an unknown machine", [], 2, /Cannot use DENORT_BIN ".*": it is no ELF file of a known machine/],
  ] as const
) {
  Deno.test(`build refuses ${what}`, async () => {
    await inDirectory(async (directory) => {
      const base = machine === undefined ? "" : await elf(join(directory, "denort"), machine);
      const { code, said } = await build(["--out", directory, ...args], { DENORT_BIN: base });

      assert.equal(code, 1);
      assert.match(said, message);
    });
  });
}

Deno.test("build says what to do where Deno's base binary cannot be downloaded", async () => {
  await inDirectory(async (directory) => {
    await Deno.writeTextFile(join(directory, "main.js"), "");
    // An empty cache, and a proxy where nobody listens.
    const env = { DENO_DIR: join(directory, "cache"), HTTPS_PROXY: "http://127.0.0.1:9" };
    const { code, said } = await build(["--from", directory, "--out", directory, "--target", "aarch64"], env);

    assert.equal(code, 1);
    assert.match(said, /https:\/\/dl\.deno\.land\/release\/v[\d.]+\/denort-aarch64-unknown-linux-gnu\.zip/);
    assert.match(said, /build with DENORT_BIN=…\/denort deno task build --target aarch64$/m);
  });
});

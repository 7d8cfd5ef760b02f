/** `deno task build`, except for what needs Deno's base binary: .ci/run compiles the executables and starts them. */
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
  return { code, out: new TextDecoder().decode(stdout), message: new TextDecoder().decode(stderr) };
}

// An empty DENORT_BIN counts as none.
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

Deno.test("the bundle prints the commit of --commit, and a checkout that of git", async () => {
  await inDirectory(async (directory) => {
    const { code, message } = await build(["--js", directory, "--commit", "0123abc-dirty"]);
    assert.equal(code, 0, message);

    const bundle = await run(["run", "-A", join(directory, "main.js"), "version"]);
    const checkout = await run(["run", "-A", "--no-check", "main.ts", "version"]);

    assert.match(bundle.out, /^lbcsi \d+\.\d+\.\d+ \(commit 0123abc-dirty, CSI 1\.12, Deno /);
    const git = await new Deno.Command("git", { args: ["rev-parse", "--short=12", "HEAD"], cwd: root }).output();
    const commit = git.success ? new TextDecoder().decode(git.stdout).trim() : "unknown";
    assert.match(checkout.out, new RegExp(`\\(commit ${commit}(-dirty)?, CSI`));
  });
});

Deno.test("without git the commit is unknown", async () => {
  await inDirectory(async (directory) => {
    const { code, out } = await run(["run", "-A", "--no-check", "main.ts", "version"], { PATH: directory });

    assert.equal(code, 0);
    assert.match(out, /\(commit unknown, CSI/);
  });
});

for (
  const [problem, args, machine, expected] of [
    ["another machine", ["--target", "riscv64"], undefined, /Cannot build for "riscv64": only x86_64 and aarch64/],
    ["an invalid commit", ["--commit", "a b"], undefined, /Cannot build with commit "a b": it is not 1 to 64/],
    ["a DENORT_BIN for another machine", ["--target", "x86_64"], 183, /Cannot build for x86_64 .* made for aarch64/],
    [
      "a DENORT_BIN for an unknown machine",
      [],
      2,
      /Cannot use DENORT_BIN ".*": it is not an ELF file of a known machine/,
    ],
  ] as const
) {
  Deno.test(`build rejects ${problem}`, async () => {
    await inDirectory(async (directory) => {
      const base = machine === undefined ? "" : await elf(join(directory, "denort"), machine);
      const { code, message } = await build(["--out", directory, ...args], { DENORT_BIN: base });

      assert.equal(code, 1);
      assert.match(message, expected);
    });
  });
}

Deno.test("build says what to do if Deno's base binary cannot be downloaded", async () => {
  await inDirectory(async (directory) => {
    await Deno.writeTextFile(join(directory, "main.js"), "");
    // An empty cache, and a proxy on which nothing listens.
    const env = { DENO_DIR: join(directory, "cache"), HTTPS_PROXY: "http://127.0.0.1:9" };
    const { code, message } = await build(["--from", directory, "--out", directory, "--target", "aarch64"], env);

    assert.equal(code, 1);
    assert.match(message, /https:\/\/dl\.deno\.land\/release\/v[\d.]+\/denort-aarch64-unknown-linux-gnu\.zip/);
    assert.match(message, /build with DENORT_BIN=…\/denort deno task build --target aarch64$/m);
  });
});

/** The demo as a user runs it: a process, its exit status, what it prints, and what it leaves behind. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { needs } from "../support/needs.ts";

const program = ["run", "-A", fileURLToPath(new URL("../../main.ts", import.meta.url))];
const machine = needs("root", "loop", "mkfs.ext4");

interface Ended {
  readonly code: number;
  readonly lines: readonly string[];
  readonly text: string;
  /** The directory that the demo said it works in. */
  readonly home: string;
}

/**
 * Runs the demo to its end.
 *
 * @param tools shell scripts that come before the programs of the same name on PATH
 * @param onLine sees each line when it comes, the process, and the directory of the scripts
 */
async function run(
  args: readonly string[],
  tools: Readonly<Record<string, string>> = {},
  { path = Deno.env.get("PATH") ?? "", onLine }: {
    readonly path?: string;
    readonly onLine?: (line: string, child: Deno.ChildProcess, directory: string) => void;
  } = {},
): Promise<Ended> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-demo-test-" });
  try {
    for (const [name, script] of Object.entries(tools)) {
      await Deno.writeTextFile(join(directory, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    }
    const child = new Deno.Command(Deno.execPath(), {
      args: [...program, "demo", ...args],
      env: { PATH: `${directory}:${path}` },
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    const lines: string[] = [];
    let rest = "";
    for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
      const whole = (rest + text).split("\n");
      rest = whole.pop() ?? "";
      for (const line of whole) {
        lines.push(line);
        onLine?.(line, child, directory);
      }
    }
    const { code } = await child.status;
    const home = /^ +directory +(\/\S+)$/m.exec(lines.join("\n"))?.[1] ?? "";
    assert.match(home, /\/lbcsi-demo-[^/]+$/, lines.join("\n"));
    return { code, lines, text: lines.join("\n"), home };
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** Mounts, loop devices, processes and files of a demo that are still there. */
function leftovers(home: string): readonly string[] {
  const left = Deno.readTextFileSync("/proc/self/mountinfo").split("\n").filter((line) => line.includes(home));
  const read = (path: string) => {
    try {
      return Deno.readTextFileSync(path);
    } catch {
      return ""; // The device or the process went meanwhile, or never had it.
    }
  };
  for (const { name } of Deno.readDirSync("/sys/block")) {
    if (read(`/sys/block/${name}/loop/backing_file`).includes(home)) left.push(name);
  }
  for (const { name } of Deno.readDirSync("/proc")) {
    if (/^\d+$/.test(name) && read(`/proc/${name}/cmdline`).includes(home)) left.push(`process ${name}`);
  }
  try {
    Deno.lstatSync(home);
    left.push(home);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  return left;
}

/** The real program of a name that a script stands before. */
const real = (name: string) => `PATH=\${PATH#*:} ${name}`;

Deno.test({
  name: "demo takes volumes through their whole lives, and says so with status 0",
  ignore: !machine,
  fn: async () => {
    const { code, lines, text, home } = await run([]);

    assert.equal(code, 0, text);
    assert.equal(lines.at(-1), "passed: every check passed, nothing is left over");
    assert.match(text, /NodeStageVolume .* ran blkid, mkfs\.ext4, /);
    assert.match(text, /the files are the same after the crash/);
    assert.match(text, /the files are the same after a new stage/);
    assert.match(text, /the bytes are the same after a new stage/);
    assert.match(text, /FAILED_PRECONDITION: Cannot give demo-2\.node access .*demo-1\.node has it/);
    assert.match(text, /^\d+ steps, 1\d\d checks, 0 failed; /m);
    assert.ok(!text.includes("\x1b["), "colours are for terminals");
    assert.deepEqual(leftovers(home), []);
  },
});

Deno.test({
  name: "demo --backend poseidon takes volumes of PoseidonOS through their whole lives",
  ignore: !machine,
  fn: async () => {
    const { code, text, home } = await run(["--backend", "poseidon", "--fs", "ext4"]);

    assert.equal(code, 0, text);
    assert.match(text, /on a simulated PoseidonOS$/m);
    assert.match(text, /csi\.pos\.io /);
    assert.match(text, /NodeStageVolume .* ran nvme, blkid, mkfs\.ext4, /);
    assert.match(text, /the files are the same after the crash/);
    assert.match(text, /FAILED_PRECONDITION: Cannot give demo-2\.node access .*demo-1\.node has it/);
    assert.deepEqual(leftovers(home), []);
  },
});

for (const fsType of ["xfs", "btrfs"] as const) {
  Deno.test({
    name: `demo --fs ${fsType} plays ${fsType}, the raw block volume, and no other file system`,
    ignore: !machine || !needs(`mkfs.${fsType}`),
    fn: async () => {
      const { code, text, home } = await run(["--fs", fsType]);

      assert.equal(code, 0, text);
      const played = [...text.matchAll(/^(\S.*) volume$/gm)].map((match) => match[1]);
      assert.deepEqual(played, [fsType, "raw block"]);
      assert.deepEqual(leftovers(home), []);
    },
  });
}

Deno.test({
  name: "demo whose mkfs fails says where and why, ends with status 1, and leaves nothing",
  ignore: !machine,
  fn: async () => {
    const { code, lines, text, home } = await run(["--fs", "ext4"], {
      "mkfs.ext4": "echo 'the disk is on fire' >&2; exit 3",
    });

    assert.equal(code, 1, text);
    assert.match(text, /✗ NodeStageVolume/);
    assert.match(text, /answer +[A-Z_]+: .*the disk is on fire/);
    assert.match(text, /last lines of node:/);
    assert.match(lines.at(-1) ?? "", /^FAILED: NodeStageVolume failed: .*; nothing of it is left on this machine$/);
    assert.deepEqual(leftovers(home), []);
  },
});

Deno.test({
  name: "demo whose files change between two stages ends with status 1, and leaves nothing",
  ignore: !machine,
  fn: async () => {
    // After each mount of a file system that holds the demo's files, four bytes of one of them are another.
    const { code, text, home } = await run(["--fs", "ext4"], {
      mount: `${real("mount")} "$@" || exit
for last; do :; done
case $last in */staging/*) file=$last/folder-0/file-0;; *) exit 0;; esac
[ -f "$file" ] && printf XXXX | dd of="$file" conv=notrunc 2>/dev/null
exit 0`,
    });

    assert.equal(code, 1, text);
    assert.match(text, /✗ the files are the same after a new stage: found 24 files, SHA-256 /);
    assert.deepEqual(leftovers(home), []);
  },
});

Deno.test({
  name: "demo that finds a loop device left over ends with status 1, and detaches it",
  ignore: !machine,
  fn: async () => {
    const { code, text, home } = await run(["--fs", "ext4"], {
      umount: `${real("umount")} "$@" || exit
for last; do :; done
case $last in */staging/*) extra=\${last%/staging/*}/extra;; *) exit 0;; esac
[ -e "$extra" ] || { truncate -s 1M "$extra" && losetup -f "$extra"; }
exit 0`,
    });

    assert.equal(code, 1, text);
    assert.match(text, /✗ machine: no loop devices: found loop\d+/);
    assert.match(text, /✓ clean-up: took loop\d+ away/);
    assert.deepEqual(leftovers(home), []);
  },
});

Deno.test({
  name: "demo that is interrupted while a volume is being published ends with status 130, and leaves nothing",
  ignore: !machine,
  fn: async () => {
    // The mount at the target waits until the signal has been sent.
    const { code, lines, text, home } = await run(["--fs", "ext4"], {
      mount: `for last; do :; done
case $last in */pods/*) for i in $(seq 200); do [ -e "\${0%/*}/go" ] && break; sleep 0.05; done;; esac
${real("mount")} "$@"`,
    }, {
      onLine: (line, child, directory) => {
        if (!line.startsWith("✓ NodeStageVolume")) return;
        child.kill("SIGINT");
        Deno.writeTextFileSync(join(directory, "go"), "");
      },
    });

    assert.equal(code, 130, text);
    assert.match(text, /^interrupted by SIGINT, cleaning up$/m);
    assert.match(text, /✓ clean-up: unmounted staging\/demo-ext4/);
    assert.match(lines.at(-1) ?? "", /^interrupted by SIGINT; nothing of it is left on this machine$/);
    assert.deepEqual(leftovers(home), []);
  },
});

Deno.test("demo without mkfs.ext4 names the package, plays the control plane alone, and says so with status 0", async () => {
  const { code, lines, text, home } = await run([], {}, { path: "" });

  assert.equal(code, 0, text);
  assert.match(text, /missing {2}mkfs\.ext4: install the package e2fsprogs/);
  assert.match(text, /✓ CreateVolume .* called /);
  assert.match(text, /✓ DeleteVolume .* called /);
  assert.ok(!text.includes("NodeStageVolume"));
  assert.match(lines.at(-1) ?? "", /^passed in part: the control plane alone; /);
  assert.deepEqual(leftovers(home), []);
});

Deno.test("demo --keep leaves its directory with the logs, and nothing else", async () => {
  const { code, text, home } = await run(["--keep"], {}, { path: "" });
  try {
    assert.equal(code, 0, text);
    assert.match(text, new RegExp(`^kept: ${home}$`, "m"));
    assert.match(Deno.readTextFileSync(join(home, "controller.log")), /"rpc":"CreateVolume"/);
    assert.deepEqual(leftovers(home), [home]);
  } finally {
    await Deno.remove(home, { recursive: true });
  }
});

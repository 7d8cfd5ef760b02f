import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../lib/error.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost, formatDeviceNumber } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";
import { loopMachine } from "../support/loop_machine.ts";
import { needs } from "../support/needs.ts";
import { rejects } from "../support/node_calls.ts";
import { eventually } from "../support/simulator.ts";

const reason = new StatusError("DEADLINE_EXCEEDED", "the caller has left");

function quietHost(): Host {
  return createLinuxHost({ log: createLogger("error") });
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

async function inDirectory(act: (directory: string) => Promise<void>): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-host-" });
  try {
    await act(directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** Waits until `path` exists and answers its text. */
async function written(path: string): Promise<string> {
  for (let n = 0; n < 1000; n++) {
    try {
      const text = await Deno.readTextFile(path);
      if (text !== "") return text;
    } catch {
      // Not yet.
    }
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`${path} did not come`);
}

/** Whether a process that is not a zombie has this number. */
function lives(pid: number): boolean {
  try {
    return !/^\d+ \(.*\) [ZX]/.test(Deno.readTextFileSync(`/proc/${pid}/stat`));
  } catch {
    return false;
  }
}

async function ended(pid: number): Promise<void> {
  for (let n = 0; n < 500 && lives(pid); n++) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.equal(lives(pid), false, `process ${pid} still runs`);
}

Deno.test("Host.run returns exit status, both outputs and the given input, in the C locale", async () => {
  const result = await quietHost().run("sh", ["-c", 'cat; echo "$LC_ALL" >&2; exit 3'], {
    signal: new AbortController().signal,
    onAbort: "kill",
    stdin: "hello",
  });

  assert.deepEqual(result, { code: 3, stdout: "hello", stderr: "C\n" });
});

Deno.test("Host.run of a missing program answers FAILED_PRECONDITION with the package that has it", async () => {
  const run = quietHost().run("/nowhere/mkfs.xfs", [], { signal: new AbortController().signal, onAbort: "finish" });

  await rejects(
    run,
    "FAILED_PRECONDITION",
    /Cannot run .*mkfs.xfs: it is not installed, the package xfsprogs is needed/,
  );
});

Deno.test({
  name: "Host.run of a program that is installed and not in PATH says so",
  ignore: !needs("blkid") ||
    !["/usr/local/sbin", "/usr/sbin", "/sbin"].some((directory) => isFile(`${directory}/blkid`)),
  async fn() {
    const path = Deno.env.get("PATH") ?? "";
    Deno.env.set("PATH", "/nowhere:/usr/games");
    try {
      const run = quietHost().run("blkid", [], { signal: new AbortController().signal, onAbort: "finish" });

      await rejects(
        run,
        "FAILED_PRECONDITION",
        /Cannot run blkid: it is in \/\S*sbin, which is not in PATH \(\/nowhere:\/usr\/games\)/,
      );
    } finally {
      Deno.env.set("PATH", path);
    }
  },
});

Deno.test("Host.run with a signal that has aborted starts nothing", async () => {
  await inDirectory(async (directory) => {
    const run = quietHost().run("touch", [join(directory, "x")], {
      signal: AbortSignal.abort(reason),
      onAbort: "finish",
    });

    await rejects(run, "DEADLINE_EXCEEDED", /the caller has left/);
    assert.deepEqual([...Deno.readDirSync(directory)], []);
  });
});

Deno.test("Host.run kills a probe at the abort and throws the reason", async () => {
  await inDirectory(async (directory) => {
    const caller = new AbortController();
    const run = quietHost().run("sh", ["-c", `echo $$ > ${directory}/pid; exec sleep 60`], {
      signal: caller.signal,
      onAbort: "kill",
    });
    const pid = Number(await written(join(directory, "pid")));
    caller.abort(reason);

    await rejects(run, "DEADLINE_EXCEEDED", /the caller has left/);
    await ended(pid);
  });
});

Deno.test("Host.run kills a probe that ignores SIGTERM, and its children", async () => {
  await inDirectory(async (directory) => {
    const caller = new AbortController();
    const script =
      `trap "" TERM; sleep 60 & echo $! > ${directory}/child; echo $$ > ${directory}/pid; while :; do sleep 1; done`;
    const run = quietHost().run("sh", ["-c", script], { signal: caller.signal, onAbort: "kill" });
    const pid = Number(await written(join(directory, "pid")));
    const child = Number(await written(join(directory, "child")));
    caller.abort(reason);

    await rejects(run, "DEADLINE_EXCEEDED", /the caller has left/);
    await ended(pid);
    await ended(child);
  });
});

Deno.test("Host.run lets a command that changes the machine end before it throws the reason", async () => {
  await inDirectory(async (directory) => {
    const caller = new AbortController();
    const go = join(directory, "go");
    const script =
      `echo begun > ${directory}/begun; while [ ! -e ${go} ]; do sleep 0.02; done; echo done > ${directory}/end`;
    const run = quietHost().run("sh", ["-c", script], { signal: caller.signal, onAbort: "finish" });
    await written(join(directory, "begun"));
    caller.abort(reason);
    await Deno.writeTextFile(go, "");

    await rejects(run, "DEADLINE_EXCEEDED", /the caller has left/);
    assert.equal(await Deno.readTextFile(join(directory, "end")), "done\n");
  });
});

Deno.test("Host.run does not wait for a grandchild that keeps the output open", async () => {
  await inDirectory(async (directory) => {
    const started = performance.now();
    const result = await quietHost().run("sh", ["-c", `sleep 60 & echo $! > ${directory}/child; echo out`], {
      signal: new AbortController().signal,
      onAbort: "finish",
    });
    Deno.kill(Number(await written(join(directory, "child"))), "SIGKILL");

    assert.deepEqual(result, { code: 0, stdout: "out\n", stderr: "" });
    assert(performance.now() - started < 20_000);
  });
});

Deno.test({
  name: "Host.run gives up a probe that even SIGKILL does not end, and names it",
  ignore: !needs("root", "loop", "mkfs.ext4", "fsfreeze"),
  async fn() {
    await using machine = await loopMachine();
    const { path } = await machine.addNamespace("0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10", 32 << 20);
    const mountPoint = join(machine.directory, "mnt");
    await Deno.mkdir(mountPoint);
    await machine.tool("mkfs.ext4", "-q", path);
    await machine.tool("mount", path, mountPoint);
    await machine.tool("fsfreeze", "--freeze", mountPoint);
    try {
      const caller = new AbortController();
      // A write to a frozen file system waits in the kernel, as one to a device without a path does.
      const script = `echo $$ > ${machine.directory}/pid; exec touch ${mountPoint}/x`;
      const run = machine.host.run("sh", ["-c", script], { signal: caller.signal, onAbort: "kill" });
      const pid = (await written(join(machine.directory, "pid"))).trim();
      await eventually(
        "the probe hangs",
        async () => /^\S+ \(touch\) D/.test(await Deno.readTextFile(`/proc/${pid}/stat`)),
      );
      caller.abort(reason);

      await rejects(
        run,
        "DEADLINE_EXCEEDED",
        /Cannot finish "sh -c .*touch .*": it does not end although it was killed/,
      );
      assert(lives(Number(pid)));
    } finally {
      await machine.tool("fsfreeze", "--unfreeze", mountPoint);
      await ended(Number(await written(join(machine.directory, "pid"))));
    }
  },
});

Deno.test("Host.run keeps 1 MiB of an endless output and lets the command end", async () => {
  const result = await quietHost().run("sh", ["-c", "head -c 5000000 /dev/zero; echo end >&2"], {
    signal: new AbortController().signal,
    onAbort: "kill",
  });

  assert.deepEqual([result.code, result.stdout.length, result.stderr], [0, 1 << 20, "end\n"]);
});

Deno.test("Host.run logs a command that changes the machine at info, and a probe at debug", async () => {
  const lines: { level: string; command: string; exit: number }[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(JSON.parse(line)));
  const host = createLinuxHost({ log });
  const signal = new AbortController().signal;

  await host.run("true", ["a"], { signal, onAbort: "finish" });
  await host.run("false", [], { signal, onAbort: "kill", stdin: "not for the log" });

  assert.deepEqual(lines.map(({ level, command, exit }) => [level, command, exit]), [
    ["info", "true a", 0],
    ["debug", "false", 1],
  ]);
  assert(!JSON.stringify(lines).includes("not for the log"));
});

Deno.test("Host.removeEmpty removes what is empty, also a second time, and nothing else", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    const path = (name: string) => join(directory, name);
    await host.makeDirectory(path("directory"));
    await host.makeDirectory(path("directory"));
    await host.makeFile(path("file"));
    await Deno.mkdir(path("full"));
    for (const name of ["a", "b", "c", "d"]) await Deno.writeTextFile(join(path("full"), name), "");
    await Deno.writeTextFile(path("text"), "12345");
    await Deno.symlink("full", path("link"));

    for (const name of ["directory", "directory", "file", "file"]) await host.removeEmpty(path(name));
    await rejects(
      host.removeEmpty(path("full")),
      "FAILED_PRECONDITION",
      /it holds "a", "b", "c", …, which are left alone/,
    );
    await rejects(host.removeEmpty(path("text")), "FAILED_PRECONDITION", /a file with 5 bytes of content/);
    await rejects(host.removeEmpty(path("link")), "FAILED_PRECONDITION", /neither a directory nor a file/);

    assert.deepEqual(await host.list(directory), ["full", "link", "text"]);
  });
});

Deno.test("Host.kindOf returns what is at a path without following a link", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    await Deno.symlink("/", join(directory, "link"));
    await Deno.writeTextFile(join(directory, "file"), "");
    const kinds = ["", "link", "file", "none", "file/below"].map((name) => host.kindOf(join(directory, name)));

    assert.deepEqual(await Promise.all(kinds), ["directory", "symlink", "file", "absent", "absent"]);
    assert.equal(await host.kindOf("/dev/null"), "other");
  });
});

Deno.test("Host.lookUp asks a directory without a trace, and fails where there is none", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    const file = join(directory, "file");
    await Deno.writeTextFile(file, "");

    await host.lookUp(directory);

    assert.deepEqual(await host.list(directory), ["file"]);
    await assert.rejects(host.lookUp(join(directory, "none")), Deno.errors.NotFound);
    await assert.rejects(host.lookUp(file), /is not a directory/);
  });
});

Deno.test("Host.writeDevice writes in place and makes nothing that is not there", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    const path = join(directory, "device");
    await Deno.writeTextFile(path, "0123456789");

    await host.writeDevice(path, 3n, new TextEncoder().encode("abc"));

    assert.equal(await Deno.readTextFile(path), "012abc6789");
    await assert.rejects(host.writeDevice(join(directory, "none"), 0n, new Uint8Array(1)), Deno.errors.NotFound);
  });
});

Deno.test("Host.replaceText leaves one file with the whole text and no temporary one", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    const path = join(directory, "entry");
    const temporary = join(directory, "tmp.dc.entry");
    await Deno.writeTextFile(temporary, "left by a process that was killed before its rename", { mode: 0o644 });
    await host.replaceText(path, "first", temporary);
    assert.equal(((await Deno.stat(path)).mode ?? 0) & 0o777, 0o600);
    await host.replaceText(path, "second", temporary);

    assert.equal(await host.readText(path), "second");
    assert.deepEqual(await host.list(directory), ["entry"]);
  });
});

Deno.test("Host.readBytes returns exactly the requested bytes, or throws", async () => {
  await inDirectory(async (directory) => {
    const path = join(directory, "bytes");
    await Deno.writeFile(path, new Uint8Array([1, 2, 3, 4]));

    assert.deepEqual(await quietHost().readBytes(path, 1n, 2), new Uint8Array([2, 3]));
    await assert.rejects(quietHost().readBytes(path, 2n, 4), /ends at byte 4, 2 more were expected/);
  });
});

Deno.test("Host.watch reports new entries, also right after an earlier watch ended", async () => {
  await inDirectory(async (directory) => {
    const host = quietHost();
    for (const name of ["a", "b"]) {
      const heard = Promise.withResolvers<void>();
      using _watch = host.watch(directory, () => heard.resolve());
      const deadline = setTimeout(() => heard.reject(new Error("heard nothing")), 20_000);
      await Deno.writeTextFile(join(directory, name), "");
      await heard.promise;
      clearTimeout(deadline);
    }
  });
});

Deno.test("Host.watch of a missing directory does no harm", () => {
  using _watch = quietHost().watch("/no/such/directory", () => {});
});

Deno.test("formatDeviceNumber reads glibc's encoding", () => {
  const numbers = [0x700, 66309, 1114924, 17592472537200].map(formatDeviceNumber);

  assert.deepEqual(numbers, ["7:0", "259:5", "259:300", "5000:70000"]);
});

Deno.test("a program that cannot be started for lack of file descriptors is UNAVAILABLE, and runs when there are some again", async () => {
  await inDirectory(async (directory) => {
    const script = join(directory, "short.ts");
    const url = (path: string) => JSON.stringify(new URL(path, import.meta.url).href);
    await Deno.writeTextFile(
      script,
      `import { createLinuxHost } from ${url("../../lib/host/linux_host.ts")};
      import { createLogger } from ${url("../../lib/log.ts")};
      const host = createLinuxHost({ log: createLogger("error") });
      const run = () => host.run("touch", [Deno.args[0] ?? ""], { signal: AbortSignal.timeout(20_000), onAbort: "finish" })
        .then(({ code }) => ["ran", code], (error) => [error.code, error.message]);
      const held: Deno.FsFile[] = [];
      try {
        for (;;) held.push(Deno.openSync("/dev/null"));
      } catch { /* none is left */ }
      const short = await run();
      for (const file of held) file.close();
      const isThere = () => Deno.stat(Deno.args[0] ?? "").then(() => true, () => false);
      const before = await isThere();
      console.log(JSON.stringify({ short, before, again: await run(), after: await isThere() }));`,
    );
    const { stdout, stderr } = await new Deno.Command("/bin/sh", {
      args: [
        "-c",
        'ulimit -n 60; exec "$@"',
        "sh",
        Deno.execPath(),
        ...["run", "-A", "--no-check", "--quiet", script, join(directory, "touched")],
      ],
    }).output();

    assert.deepEqual(JSON.parse(new TextDecoder().decode(stdout) || new TextDecoder().decode(stderr)), {
      short: [
        "UNAVAILABLE",
        "Cannot run touch: the driver has no file descriptor left, raise its limit (ulimit -n) or use fewer volumes at once " +
        "on this node",
      ],
      before: false,
      again: ["ran", 0],
      after: true,
    });
  });
});

Deno.test("Host.exchange writes in one piece and returns what is then read", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-authentication-" });
  try {
    const host = createLinuxHost({ log: createLogger("error") });
    const path = join(directory, "device");
    await Deno.writeTextFile(path, "________instance=3,cntlid=1\n");

    assert.equal(await host.exchange(path, "nqn=nqn."), "instance=3,cntlid=1\n");

    assert.equal(await Deno.readTextFile(path), "nqn=nqn.instance=3,cntlid=1\n");
    await assert.rejects(host.exchange("/dev/full", "x"), /No space left on device \(os error 28\)/);
    await assert.rejects(host.exchange(join(directory, "absent"), "x"), Deno.errors.NotFound);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

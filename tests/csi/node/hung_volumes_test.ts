/** Volumes that do not answer: the driver serves all other volumes, and ends the hung one as well as it can. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { VolumeThreads } from "../../../lib/host/volume_threads.ts";
import { createLogger } from "../../../lib/log.ts";
import { node, uuid } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import { callContext, mountCapability, publishContext, rejects, volumeId } from "../../support/node_calls.ts";

const ignore = !needs("root", "loop", "mkfs.ext4", "fsfreeze");

/** A directory with pipes that have no writer yet: a process that opens one for reading blocks in the kernel. */
async function silentFiles(count: number) {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-silent-" });
  const paths = Array.from({ length: count }, (_, n) => join(directory, `pipe${n}`));
  const { success } = await new Deno.Command("mkfifo", { args: paths }).output();
  assert(success);
  return {
    directory,
    paths,
    /** Lets the readers of all files go on, those that have not begun yet too, until the answer is disposed. */
    async answer(): Promise<Disposable> {
      const files = new DisposableStack();
      for (const path of paths) files.use(await Deno.open(path, { read: true, write: true }));
      return files;
    },
    [Symbol.asyncDispose]: () => Deno.remove(directory, { recursive: true }),
  };
}

Deno.test("promise 26: 100 operations that block leave threads for paths and for other volumes", async () => {
  await using silent = await silentFiles(100);
  const host = createLinuxHost({ log: createLogger("error") });
  const file = join(silent.directory, "healthy");
  await Deno.writeTextFile(file, "healthy");
  const blocked = silent.paths.map((path) => host.readBytes(path, 0n, 1).catch((error: Error) => error.message));

  for (let round = 0; round < 20; round++) {
    assert.equal(new TextDecoder().decode(await host.readBytes(file, 0n, 7)), "healthy");
    assert.equal(await host.realPath(file), file);
  }
  await host.lookUp(silent.directory);
  await host.tryWrite(silent.directory);
  assert((await host.usage(silent.directory)).totalBytes > 0n);
  await assert.rejects(host.readBytes(join(silent.directory, "missing"), 0n, 1), (error: Error & { code?: string }) => {
    assert.equal(error.code, "ENOENT");
    return true;
  });

  using _answer = await silent.answer();
  // A pipe can be read, but has no place to read from.
  for (const message of await Promise.all(blocked)) assert.match(message as string, /seek|Illegal/i);
});

Deno.test("promise 26: a bound holds for operations that block, and the error says what to do", async () => {
  await using silent = await silentFiles(300);
  const threads = new VolumeThreads();
  const ends = silent.paths.map((path) => threads.perform("readBytes", path, 0n, 1).then(() => "ok", (error) => error));

  const first = await Promise.race(ends);

  assert(first instanceof StatusError, String(first));
  assert.equal(first.code, "UNAVAILABLE");
  assert.match(
    first.message,
    /2\d\d operations on volumes have not ended, .* restore the way to their storage, or thaw/,
  );
  using _answer = await silent.answer();
  await Promise.all(ends);
  assert.equal(threads.running, 0);
});

function nodeTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name, ignore, fn });
}

nodeTest(
  "promise 26: a frozen volume is asked once, however often it is published, and others are served",
  async () => {
    await using n = await node();
    const healthy = await anotherVolume(n, "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e");
    await n.stage(n.stageRequest());
    await n.publish(n.publishRequest());
    let asked = 0;
    const { tryWrite } = n.machine.host;
    (n.host as { tryWrite: typeof tryWrite }).tryWrite = (directory) => (asked++, tryWrite(directory));
    await n.machine.tool("fsfreeze", "--freeze", n.staging);
    try {
      const publish = (name: string, signal: AbortSignal) =>
        n.publish(n.publishRequest(mountCapability(), false, join(n.base, name)), callContext(signal));
      const deadline = new AbortController();
      const first = publish("t0", deadline.signal);
      setTimeout(() => deadline.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time")), 500);
      await rejects(first, "UNAVAILABLE", /Cannot .*: the volume has not answered a write at ".*globalmount" for \d s/);

      for (let round = 1; round <= 500; round++) {
        await rejects(
          publish(`t${round}`, new AbortController().signal),
          "UNAVAILABLE",
          /Cannot publish the volume .*: the volume has not answered a write at .* thaw it \(fsfreeze --unfreeze\)/,
        );
      }
      await healthy.publish("healthy");
      assert.equal(asked, 2, "the frozen volume once, the healthy one once");
      const { volumeCondition } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });
      assert.match(volumeCondition?.message ?? "", /has not answered for \d+ s/);
      await rejects(
        n.stage(n.stageRequest()),
        "UNAVAILABLE",
        /Cannot stage the volume .*: the volume has not answered/,
      );
      await rejects(
        n.expand({ volumeId: volumeId(uuid), volumePath: n.target }),
        "UNAVAILABLE",
        /Cannot expand the volume .*: the volume has not answered/,
      );
      assert.deepEqual(n.host.pending.unanswered.volumes, 1);
      // The pod ends all the same: its target is not the last mount.
      await n.unpublish(n.unpublishRequest);
      await rejects(n.unstage(n.unstageRequest), "UNAVAILABLE", /it is frozen .* fsfreeze --unfreeze/);
    } finally {
      await n.machine.tool("fsfreeze", "--unfreeze", n.staging);
    }

    await until(() => n.host.pending.unanswered.volumes === 0);
    await n.publish(n.publishRequest());
  },
);

nodeTest("promise 26: 36 frozen volumes, each asked for its statistics, leave a healthy one served", async () => {
  await using n = await node();
  const volumes = [];
  for (let at = 0; at < 36; at++) {
    volumes.push(await anotherVolume(n, `1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c${String(at).padStart(4, "0")}`));
  }
  await n.stage(n.stageRequest());
  for (const { staging } of volumes) await n.machine.tool("fsfreeze", "--freeze", staging);
  const caller = new AbortController();
  try {
    const asked = volumes.map(({ stats }) => stats(caller.signal).catch((error) => error));
    for (let round = 0; round < 20; round++) {
      await n.publish(n.publishRequest());
      const { volumeCondition } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });
      assert.equal(volumeCondition?.message, "healthy");
      await n.unpublish(n.unpublishRequest);
    }
    caller.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time"));
    await Promise.all(asked);
    assert.equal(n.host.pending.unanswered.volumes, 36);
  } finally {
    for (const { staging } of volumes) await n.machine.tool("fsfreeze", "--unfreeze", staging);
  }
  await until(() => n.host.pending.unanswered.volumes === 0);
});

/** One more volume of a node, staged. */
async function anotherVolume(n: Awaited<ReturnType<typeof node>>, uuid: string) {
  const staging = join(n.base, `staging-${uuid}`);
  await Deno.mkdir(staging);
  await n.machine.addNamespace(uuid, 8 << 20);
  const volume = { volumeId: volumeId(uuid), stagingTargetPath: staging, publishContext: publishContext(uuid) };
  await n.stage({ ...volume, volumeCapability: mountCapability() });
  return {
    staging,
    publish: (name: string) =>
      n.publish({ ...volume, volumeCapability: mountCapability(), targetPath: join(n.base, name) }),
    stats: (signal: AbortSignal) => n.stats({ volumeId: volumeId(uuid), volumePath: staging }, callContext(signal)),
  };
}

async function until(condition: () => boolean): Promise<void> {
  const giveUpAt = Date.now() + 60_000;
  while (!condition()) {
    assert(Date.now() < giveUpAt, "nothing has changed");
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

import assert from "node:assert/strict";
import { join } from "node:path";
import { DiscoveryInput } from "../../lib/discovery/input.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";
import { entry, quietHost } from "../support/discovery.ts";
import type { FakeHost } from "../support/fake_host.ts";

function inputOf(host: FakeHost) {
  const lines: { event: string; path?: string; error?: string; level: string }[] = [];
  let ms = 0;
  const log = createLogger("info", "json", (line) => void lines.push(JSON.parse(line)));
  const input = new DiscoveryInput(host, host.discoveryDirectory, log, () => ms);
  return {
    write: (name: string, text: string) => host.replaceText(`${host.discoveryDirectory}/${name}`, text),
    remove: (name: string) => host.remove(`${host.discoveryDirectory}/${name}`),
    pass: (more: number) => void (ms += more),
    addresses: async () => (await input.read())?.map(({ traddr }) => traddr),
    /** What was logged since the last time. */
    said: () => lines.splice(0).map(({ event, error }) => error === undefined ? event : `${event}: ${error}`),
  };
}

Deno.test("DiscoveryInput follows the directory: new, changed, duplicated and removed files", async () => {
  const { write, remove, addresses, said } = inputOf(quietHost());

  await write("b", entry("192.0.2.2"));
  await write("a", entry("192.0.2.1") + entry("192.0.2.1"));
  await write("tmp.dc.c", entry("192.0.2.3"));
  assert.deepEqual(await addresses(), ["192.0.2.1", "192.0.2.2"]);
  assert.deepEqual(said(), ["took up a file", "took up a file"]);
  await addresses();
  assert.deepEqual(said(), []);
  await write("b", entry("192.0.2.9"));
  assert.deepEqual(await addresses(), ["192.0.2.1", "192.0.2.9"]);
  await remove("b");
  assert.deepEqual(await addresses(), ["192.0.2.1"]);

  assert.deepEqual(said(), ["took up a file", "dropped a file that was removed"]);
});

Deno.test("DiscoveryInput waits for the rest of a file that does not end in a newline", async () => {
  const { write, addresses, pass, said } = inputOf(quietHost());
  const whole = entry("192.0.2.1");

  for (const length of [0, 10, whole.length - 5, whole.length - 1]) {
    await write("a", whole.slice(0, length));
    assert.deepEqual(await addresses(), []);
    pass(1999);
  }
  assert.deepEqual(said(), []);
  await write("a", whole);
  assert.deepEqual(await addresses(), ["192.0.2.1"]);
  await write("a", whole.trimEnd());
  pass(2001);
  await addresses();
  pass(2001);

  assert.deepEqual(await addresses(), ["192.0.2.1"]);
  assert.deepEqual(said(), ["took up a file", "took up a file"]);
});

Deno.test("DiscoveryInput keeps the last good entries of a file that became bad, and logs it once", async () => {
  const { write, remove, addresses, said } = inputOf(quietHost());
  await write("a", entry("192.0.2.1"));
  await addresses();
  said();

  await write("a", "-t rdma\n-x\n");
  assert.deepEqual(await addresses(), ["192.0.2.1"]);
  assert.deepEqual(await addresses(), ["192.0.2.1"]);

  assert.deepEqual(said(), [
    `refused a file and keeps what it said before: Cannot read line 2: "-x" is not an option`,
  ]);
  await remove("a");
  assert.deepEqual(await addresses(), []);
  await write("b", "junk\n");
  assert.deepEqual(await addresses(), []);
  assert.deepEqual(said(), [
    "dropped a file that was removed",
    `refused a file: Cannot read line 1: "junk" is not an option`,
  ]);
});

Deno.test("DiscoveryInput reports no change while the directory is missing", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-input-" });
  const lines: string[] = [];
  const log = createLogger("info", "json", (line) => void lines.push(JSON.parse(line).event));
  const input = new DiscoveryInput(createLinuxHost({ log: createLogger("error") }), join(directory, "in"), log);

  assert.equal(await input.read(), undefined);
  assert.equal(await input.read(), undefined);
  await Deno.mkdir(join(directory, "in"));
  await Deno.mkdir(join(directory, "in", "sub"));
  await Deno.writeTextFile(join(directory, "in", "a"), entry());
  assert.equal((await input.read())?.length, 1);
  await Deno.remove(directory, { recursive: true });
  assert.equal(await input.read(), undefined);

  assert.deepEqual(lines, ["cannot read its directory", "took up a file", "cannot read its directory"]);
});

/** The directory of a ConfigMap, as kubelet shows it, and the changes that it makes. */
async function configMap() {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-input-" }));
  let version = 0;
  return {
    directory,
    /** Shows other files, in kubelet's order: a new directory, one rename of the link, then links that come and go. */
    async show(files: Readonly<Record<string, string>>) {
      const now = `..2026_11_30_${++version}`;
      await Deno.mkdir(join(directory, now));
      for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(directory, now, name), text);
      await Deno.symlink(now, join(directory, "..data_tmp"));
      await Deno.rename(join(directory, "..data_tmp"), join(directory, "..data"));
      for (const name of Object.keys(files)) {
        await Deno.symlink(`..data/${name}`, join(directory, name)).catch(() => {});
      }
      for (const { name } of Deno.readDirSync(directory)) {
        if (!name.startsWith("..") && !(name in files)) await Deno.remove(join(directory, name));
      }
      if (version > 1) await Deno.remove(join(directory, `..2026_11_30_${version - 1}`), { recursive: true });
    },
    [Symbol.asyncDispose]: () => Deno.remove(directory, { recursive: true }),
  };
}

Deno.test("DiscoveryInput reads the files of a ConfigMap through their links, follows its changes, and each file once", async () => {
  await using map = await configMap();
  const lines: string[] = [];
  const log = createLogger("info", "json", (line) => void lines.push(JSON.parse(line).event));
  const input = new DiscoveryInput(createLinuxHost({ log: createLogger("error") }), map.directory, log);
  const addresses = async () => (await input.read())?.map(({ traddr }) => traddr);

  await map.show({ a: entry("192.0.2.1"), b: entry("192.0.2.2") });
  assert.deepEqual(await addresses(), ["192.0.2.1", "192.0.2.2"]);
  await map.show({ a: entry("192.0.2.9"), c: entry("192.0.2.3") });
  assert.deepEqual(await addresses(), ["192.0.2.9", "192.0.2.3"]);
  await map.show({});
  assert.deepEqual(await addresses(), []);

  assert.deepEqual(lines, [
    ...["took up a file", "took up a file"],
    ...["took up a file", "took up a file", "dropped a file that was removed"],
    ...["dropped a file that was removed", "dropped a file that was removed"],
  ]);
});

Deno.test("DiscoveryInput skips links to what is not a file, and keeps the entries of a link that leads nowhere now", async () => {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-input-" }));
  const lines: string[] = [];
  const log = createLogger("warning", "json", (line) => {
    const { event, error, path } = JSON.parse(line);
    lines.push(`${path.slice(directory.length + 1)}: ${event}: ${error}`);
  });
  await Deno.mkdir(join(directory, "real"));
  await Deno.mkdir(join(directory, "elsewhere"));
  await Deno.writeTextFile(join(directory, "elsewhere", "x"), entry("192.0.2.1"));
  await Deno.symlink("real", join(directory, "link"));
  const at = (name: string) => join(directory, "link", name);
  await Deno.symlink("../elsewhere", at("directory"));
  await Deno.symlink("/dev/zero", at("device"));
  await Deno.symlink("loop", at("loop"));
  await Deno.symlink("../elsewhere/x", at("x"));
  const input = new DiscoveryInput(createLinuxHost({ log: createLogger("error") }), join(directory, "link"), log);
  const addresses = async () => (await input.read())?.map(({ traddr }) => traddr);

  assert.deepEqual(await addresses(), ["192.0.2.1"]);
  await Deno.remove(join(directory, "elsewhere", "x"));
  for (let turn = 0; turn < 3; turn++) assert.deepEqual(await addresses(), ["192.0.2.1"]);
  await Deno.remove(at("x"));
  assert.deepEqual(await addresses(), []);

  assert.deepEqual(lines.map((line) => line.replace(/(?<=loop: could not read a file: ).*/, "…")), [
    "link/loop: could not read a file: …",
    "link/x: could not read a file: it is a symbolic link that leads nowhere",
  ]);
  await Deno.remove(directory, { recursive: true });
});

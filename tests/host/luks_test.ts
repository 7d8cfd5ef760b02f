/** Host encryption on a fake machine: what is run, in which order, and what is refused. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { requestContext } from "../../lib/context.ts";
import { StatusError } from "../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import { defaultLuksSettings, hasAes, openMapper } from "../../lib/host/luks.ts";
import { markUsed } from "../../lib/host/luks_label.ts";
import { findMapper } from "../../lib/host/mapper.ts";
import { findDevice } from "../../lib/host/nvme/devices.ts";
import { createLogger } from "../../lib/log.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { FakeHost } from "../support/fake_host.ts";
import { loopMachine, subsystemNqn } from "../support/loop_machine.ts";
import { needs } from "../support/needs.ts";
import {
  blockCapability,
  callContext,
  type Capability,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../support/node_calls.ts";

const gib = 1n << 30n;
const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const mapper = `lb-csi-nvme-uuid.${uuid}`;
const passphrase = "open 'sesame' \\n";

/** A node with one namespace, and its calls for the volume as an encrypted one. */
function node() {
  const host = new FakeHost();
  const namespace = host.addNamespace(uuid, subsystemNqn);
  const lines: string[] = [];
  const attacher = createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: "nqn.host" });
  const calls = nodeCalls({ host, attacher });
  const call = {
    ...requestContext(
      new AbortController().signal,
      new Date(Date.now() + 60_000),
      createLogger("debug", "json", (line) => lines.push(line)),
    ),
    header: () => undefined,
  };
  const id = { volumeId: `${volumeId(uuid)}|hostcrypto:luks2` };
  const staged = { ...id, stagingTargetPath: "/staging" };
  return {
    host,
    namespace,
    lines,
    /** Names of the commands since the last question. */
    ran: () =>
      host.commands.splice(0).map((command) => command.split(" ", command.startsWith("crypt") ? 2 : 1).join(" ")),
    stage: (
      secrets: Record<string, string> = { "host-encryption-passphrase": passphrase },
      volumeCapability: Capability = mountCapability(),
    ) => calls.stage({ ...staged, volumeCapability, secrets, publishContext: publishContext(uuid) }, call),
    publish: (volumeCapability: Capability = mountCapability(), readonly = false) =>
      calls.publish({ ...staged, targetPath: "/pods/a", volumeCapability, readonly }, call),
    unpublish: () => calls.unpublish({ ...id, targetPath: "/pods/a" }, call),
    unstage: () => calls.unstage(staged, call),
    stats: (volumePath: string) => calls.stats({ ...id, volumePath }, call),
    expand: (volumePath: string, requiredBytes: bigint) =>
      calls.expand({ ...id, volumePath, capacityRange: { requiredBytes } }, call),
  };
}

Deno.test("an encrypted volume is formatted once, opened, given a file system, and closed again", async () => {
  const n = node();

  await n.stage();
  assert.deepEqual(n.ran(), [
    ...["blkid", "cryptsetup luksFormat", "cryptsetup open", "wipefs", "mkfs.ext4", "cryptsetup config", "mount"],
  ]);
  await n.publish();
  await n.unpublish();
  await n.unstage();
  assert.deepEqual(n.ran(), ["mount", "umount", "umount", "cryptsetup close"]);
  assert.deepEqual([n.host.leftovers(), n.namespace.content], [[], undefined]);

  await n.stage();
  assert.deepEqual(n.ran(), ["blkid", "cryptsetup open", "blkid", "e2fsck", "mount"]);
  assert.equal(n.namespace.luks?.inner.content?.fsBytes, gib - (16n << 20n));
});

Deno.test("promise 17: the pod gets the mapper of an encrypted block volume, and never the device under it", async () => {
  const n = node();
  const capability = blockCapability();

  await n.stage({ "host-encryption-passphrase": passphrase }, capability);
  await n.publish(capability);

  const [published] = n.host.mounts;
  assert.equal(published?.device, n.host.mappers[0]);
  assert.equal(published?.device.name, "dm-2");
  await n.unpublish();
  await n.unstage();
  assert.deepEqual(n.host.leftovers(), []);
});

Deno.test("promise 10: passphrases go to cryptsetup by standard input, and are in no command and no log line", async () => {
  const n = node();
  await n.stage();
  await n.unstage();
  await n.stage({ "host-encryption-passphrase": "changed", "host-encryption-passphrase-previous": passphrase });

  for (const text of [...n.host.commands, ...n.lines]) {
    for (const secret of ["sesame", 'changed"']) assert(!text.includes(secret), text);
  }
  assert(n.host.commands.some((command) => command.includes("--key-file=-")));
});

Deno.test("the keys of a new volume and of a changed passphrase are made as the settings say", async () => {
  const n = node();
  await n.stage();
  await n.unstage();
  await n.stage({ "host-encryption-passphrase": "changed", "host-encryption-passphrase-previous": passphrase });

  for (const verb of ["luksFormat", "luksChangeKey"]) {
    const command = n.host.commands.find((command) => command.includes(verb)) ?? "";
    assert.match(command, / --pbkdf=argon2id --pbkdf-memory=65535 --iter-time=2000 /);
  }
});

Deno.test("NodeStageVolume changes a passphrase when the previous one still opens the volume", async () => {
  const n = node();
  const first = { "host-encryption-passphrase": "first" };
  const second = { "host-encryption-passphrase": "second", "host-encryption-passphrase-previous": "first" };
  await n.stage(first);
  await n.unstage();
  n.ran();

  await n.stage(second);
  assert.deepEqual(n.ran().slice(1, 4), ["cryptsetup open", "cryptsetup open", "cryptsetup luksChangeKey"]);
  await n.unstage();
  await n.stage({ "host-encryption-passphrase": "second" });
  await n.unstage();

  await rejects(n.stage(first), "INVALID_ARGUMENT", /the passphrase in the secrets .* does not open nvme0n1/);
  await rejects(
    n.stage({ "host-encryption-passphrase": "third", "host-encryption-passphrase-previous": "first" }),
    "INVALID_ARGUMENT",
    /neither the passphrase in the secrets nor the previous one opens nvme0n1/,
  );
  assert.deepEqual(n.host.mappers, []);
});

for (
  const [secrets, problem] of [
    [{}, /host-encryption-passphrase: is missing, the volume is encrypted on the host/],
    [{ "host-encryption-passphrase": "" }, /host-encryption-passphrase: is empty/],
    [{ "host-encryption-passphrase": "ü".repeat(257) }, /host-encryption-passphrase: has more than 512 bytes/],
    [
      { "host-encryption-passphrase": "a", "host-encryption-passphrase-previous": "" },
      /host-encryption-passphrase-previous: is empty/,
    ],
  ] as const
) {
  Deno.test(`NodeStageVolume with secrets ${JSON.stringify(secrets).slice(0, 60)} answers INVALID_ARGUMENT`, async () => {
    const n = node();

    await rejects(n.stage({ ...secrets }), "INVALID_ARGUMENT", problem);

    assert.deepEqual([n.ran(), n.host.leftovers()], [[], []]);
  });
}

Deno.test("promise 1: nothing is encrypted over a file system in the clear", async () => {
  const n = node();
  n.namespace.content = { fsType: "ext4", fsBytes: gib };

  await rejects(n.stage(), "FAILED_PRECONDITION", /nvme0n1 holds a file system in the clear, it is left alone/);

  assert.deepEqual([n.ran(), n.namespace.luks], [["blkid"], undefined]);
});

Deno.test("promise 1: nothing is encrypted for reading only, or with shared access", async () => {
  for (const mode of [Mode.SINGLE_NODE_READER_ONLY, Mode.MULTI_NODE_READER_ONLY]) {
    const n = node();

    await rejects(
      n.stage(undefined, mountCapability("", mode)),
      "FAILED_PRECONDITION",
      /is blank, and with read-only or shared access nothing is made/,
    );

    assert.equal(n.namespace.luks, undefined);
  }
});

Deno.test("promise 1: what a pod wrote to an encrypted block device is never formatted as a file system", async () => {
  const n = node();
  await n.stage(undefined, blockCapability());
  await n.unstage();
  n.ran();

  await rejects(
    n.stage(),
    "FAILED_PRECONDITION",
    /dm-\d+ holds no file system, and may have been used without one; it is left alone/,
  );

  assert(!n.ran().some((command) => command.startsWith("mkfs")));
  await n.unstage();
  assert.deepEqual(n.host.leftovers(), []);
});

Deno.test("promise 16: NodeExpandVolume grows the mapper and then the file system in it", async () => {
  const n = node();
  await n.stage();
  await n.publish();
  n.namespace.sizeBytes = 2n * gib;
  n.ran();

  assert.deepEqual(await n.expand("/pods/a", 2n * gib), { capacityBytes: 2n * gib });

  assert.deepEqual(n.ran(), ["cryptsetup resize", "resize2fs"]);
  assert.equal(n.namespace.luks?.inner.content?.fsBytes, 2n * gib - (16n << 20n));
  const { usage } = await n.stats("/pods/a");
  assert.equal(usage?.[0]?.total, 2n * gib - (16n << 20n));
});

Deno.test("promise 15: an encrypted volume that grew while it was unstaged has that size when it is staged", async () => {
  const n = node();
  await n.stage();
  await n.unstage();
  n.namespace.sizeBytes = 2n * gib;

  await n.stage();

  assert.equal(n.namespace.luks?.inner.content?.fsBytes, 2n * gib - (16n << 20n));
});

for (
  const [files, holder] of [
    [{ "/sys/block/loop7/loop/backing_file": "/dev/dm-2\n" }, /is in use by loop7$/],
    [{ "/sys/class/block/dm-2/holders/dm-5": "" }, /is in use by dm-5$/],
    [{ "/proc/swaps": "Filename Type Size\n/dev/dm-2   partition\t8\n" }, /is in use by the swap on it$/],
    [{ "/proc/71/fd/4": "/dev/dm-2", "/proc/71/comm": "dd\n" }, /is in use by process 71 \(dd\) with "\/dev\/dm-2"$/],
  ] as const
) {
  Deno.test(`NodeUnstageVolume names what keeps an encrypted block volume open: ${Object.keys(files)[0]}`, async () => {
    const n = node();
    const capability = blockCapability();
    await n.stage({ "host-encryption-passphrase": passphrase }, capability);
    const { list, readText, readLink, run } = n.host;
    const procFiles = new Map<string, string>(Object.entries(files));
    n.host.list = (directory) => {
      const below = [...procFiles.keys()].filter((path) => path.startsWith(`${directory}/`));
      if (below.length === 0) return list.call(n.host, directory);
      return Promise.resolve([...new Set(below.map((path) => path.slice(directory.length + 1).split("/")[0] ?? ""))]);
    };
    n.host.readText = (path) =>
      procFiles.has(path) ? Promise.resolve(procFiles.get(path)) : readText.call(n.host, path);
    n.host.readLink = (path: string = "") =>
      procFiles.has(path) ? Promise.resolve(procFiles.get(path)) : readLink.call(n.host);
    n.host.run = (program, args, options) =>
      args[0] === "close"
        ? Promise.resolve({ code: 5, stdout: "", stderr: "Device is still in use." })
        : run.call(n.host, program, args, options);

    await rejects(n.unstage(), "FAILED_PRECONDITION", holder);

    Object.assign(n.host, { list, readText, readLink, run });
    await n.unstage();
    assert.deepEqual([n.host.leftovers(), n.host.mappers], [[], []]);
  });
}

Deno.test("promise 4: NodeUnstageVolume accepts a closed mapper, and one whose device has gone", async () => {
  const n = node();
  await n.stage();
  n.host.mounts.splice(0);
  n.host.mappers.splice(0);
  await n.unstage();

  await n.stage();
  n.host.devices.splice(0);
  await n.unstage();

  assert.deepEqual([n.host.leftovers(), n.host.mappers], [[], []]);
});

Deno.test("promise 2: NodeStageVolume opens again what is left of a device that has come back under another name", async () => {
  const n = node();
  await n.stage();
  const [old] = n.host.devices.splice(0);
  n.host.connect(subsystemNqn);
  assert.notEqual(n.host.devices[0]?.name, old?.name);

  await n.stage();

  assert.equal(n.host.mappers.length, 1);
  assert.equal(n.host.mappers[0]?.beneath, n.host.devices[0]);
  assert.deepEqual(n.host.mounts.map(({ path, device }) => [path, device]), [["/staging", n.host.mappers[0]]]);
});

Deno.test("NodeUnstageVolume leaves an encryption open that is still mounted elsewhere", async () => {
  const n = node();
  await n.stage();
  await n.publish();

  await rejects(n.unstage(), "FAILED_PRECONDITION", /it is still mounted at "\/pods\/a", unpublish it there first/);

  assert.equal(n.host.mappers.length, 1);
});

Deno.test("the mapper has the incumbent driver's name", async () => {
  const n = node();
  await n.stage();

  assert.deepEqual(n.host.mappers.map(({ mapperName }) => mapperName), [mapper]);
});

Deno.test("promise 8: NodeStageVolume begins an encryption again that was killed before it had a key", async () => {
  const n = node();
  await n.stage();
  await n.unstage();
  const { luks } = n.namespace;
  assert(luks);
  luks.passphrases.clear();

  await rejects(n.stage(), "FAILED_PRECONDITION", /cryptsetup open failed .*No usable keyslot is available/);
  luks.label = "lbcsi-new";
  await rejects(
    n.stage(undefined, mountCapability("", Mode.SINGLE_NODE_READER_ONLY)),
    "FAILED_PRECONDITION",
    /nvme0n1 holds an encryption that was never finished, and with read-only or shared access nothing is made/,
  );
  n.ran();
  await n.stage();

  assert.deepEqual(n.ran().slice(0, 4), ["blkid", "cryptsetup luksDump", "cryptsetup luksFormat", "cryptsetup open"]);
  assert.deepEqual(n.host.mounts.map(({ path }) => path), ["/staging"]);
});

Deno.test("promise 1: an encryption that was never used is opened as it is while it has a key", async () => {
  const n = node();
  n.host.answers.set("wipefs", { code: 1, stderr: "cut off here" });
  await rejects(n.stage(), "FAILED_PRECONDITION", /cut off here/);
  await n.unstage();
  assert.equal(n.namespace.luks?.label, "lbcsi-new");
  n.ran();

  await rejects(n.stage({ "host-encryption-passphrase": "wrong" }), "INVALID_ARGUMENT", /does not open nvme0n1/);

  assert.deepEqual(n.ran(), ["blkid", "cryptsetup luksDump", "cryptsetup open"]);
});

Deno.test({
  name: "promise 8: openMapper gives a header without key slots its key, as the real cryptsetup leaves it",
  ignore: !needs("root", "loop", "cryptsetup"),
  async fn() {
    await using machine = await loopMachine();
    const { path } = await machine.addNamespace(uuid, 32 << 20);
    const device = await findDevice(machine.host, uuid);
    assert(device);
    const keyFile = join(machine.directory, "key");
    await Deno.writeTextFile(keyFile, passphrase);
    const open = () =>
      openMapper(machine.host, callContext(), device, {
        passphrases: () => ({ current: passphrase, previous: undefined }),
        mayFormat: true,
        settings: { ...defaultLuksSettings, pbkdf: "pbkdf2" },
        readOnly: false,
        shared: false,
        stagingPath: machine.directory,
        probeContent: () => Promise.resolve("luks"),
      });
    const opens = async () => {
      const args = ["open", "--test-passphrase", "--key-file", keyFile, path];
      return (await new Deno.Command("cryptsetup", { args, stderr: "null" }).output()).success;
    };
    const fast = ["--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file", keyFile];

    // The end of it, the mapper, takes a kernel with dm-crypt.
    for (const [label, formatsAnew] of [["lbcsi", false], ["lbcsi-new", true]] as const) {
      await machine.tool("cryptsetup", "luksFormat", ...fast, `--label=${label}`, path);
      await machine.tool("cryptsetup", "erase", "--batch-mode", path);
      assert.equal(await opens(), false);
      if (formatsAnew) {
        using _outlived = await Deno.open(path, { write: true });
        await rejects(open(), "UNAVAILABLE", new RegExp(`nvme0n1 is in use by process ${Deno.pid} `));
      }
      await open().catch(() => {});
      assert.equal(await opens(), formatsAnew, label);
    }
    const header = await Deno.readFile(path).then((bytes) => bytes.slice(0, 4096));
    await open().catch(() => {});
    assert.deepEqual((await Deno.readFile(path)).slice(0, 4096), header);
    await machine.tool("cryptsetup", "close", `lb-csi-nvme-uuid.${uuid}`).catch(() => {});
  },
});

Deno.test("NodeStageVolume changes no passphrase of a volume that other hosts may have open", async () => {
  const n = node();
  const shared = blockCapability(Mode.MULTI_NODE_MULTI_WRITER);
  await n.stage({ "host-encryption-passphrase": "first" }, blockCapability());
  await n.unstage();
  n.ran();

  await n.stage({ "host-encryption-passphrase": "second", "host-encryption-passphrase-previous": "first" }, shared);

  assert.deepEqual(n.ran(), ["blkid", "cryptsetup open", "cryptsetup open"]);
  assert.deepEqual([...n.namespace.luks?.passphrases ?? []], ["first"]);
});

Deno.test("promise 4: NodeUnstageVolume does not believe cryptsetup while the mapper is still there", async () => {
  const n = node();
  await n.stage();
  n.host.answers.set("cryptsetup close", { code: 4, stderr: "Device is not active." });

  await rejects(n.unstage(), "UNAVAILABLE", /cryptsetup close succeeded, but \/dev\/dm-2 is still there/);

  n.host.answers.clear();
  await n.unstage();
  assert.deepEqual(n.host.leftovers(), []);
});

Deno.test("markUsed gives up a device that does not answer when its caller does", async () => {
  const n = node();
  await n.stage();
  const mapper = await findMapper(n.host, uuid);
  assert(mapper);
  n.host.readBytes = () => new Promise(() => {});
  const caller = new AbortController();
  const marked = markUsed(n.host, callContext(caller.signal), mapper);

  caller.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time"));

  await rejects(marked, "UNAVAILABLE", /the volume has not answered a read of \/dev\/nvme0n1 for 0 s/);
});

for (
  const [text, expected] of [
    ["flags\t\t: fpu vme aes avx\n", true],
    ["Features\t: fp asimd aes pmull\n", true],
    ["flags\t\t: fpu vme avx\n", false],
    ["processor\t: 0\n", undefined],
  ] as const
) {
  Deno.test(`hasAes of ${JSON.stringify(text)} is ${expected}`, async () => {
    const host = new FakeHost();
    host.readText = () => Promise.resolve(text);

    assert.equal(await hasAes(host), expected);
  });
}

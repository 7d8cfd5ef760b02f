/** Host encryption on a make-believe machine: what is run, in which order, and what is refused. */
import assert from "node:assert/strict";
import { createLogger, requestContext } from "../lib/context.ts";
import { discoveryClient } from "../lib/host/attach.ts";
import { hasAes } from "../lib/host/luks.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../proto/gen/csi_pb.ts";
import { FakeHost } from "./support/fake_host.ts";
import { subsystemNqn } from "./support/loop_machine.ts";
import {
  blockCapability,
  type Capability,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "./support/node_calls.ts";

const gib = 1n << 30n;
const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const mapper = `lb-csi-nvme-uuid.${uuid}`;
const passphrase = "open 'sesame' \\n";

/** A node with one namespace, and its calls for the volume as an encrypted one. */
function node() {
  const host = new FakeHost();
  const namespace = host.addNamespace(uuid, subsystemNqn);
  const lines: string[] = [];
  const attacher = discoveryClient({ host, directory: host.discoveryDirectory, hostNqn: "nqn.host" });
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

Deno.test("promise 4: NodeUnstageVolume takes a closed mapper, and one whose device has gone", async () => {
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

Deno.test("promise 2: NodeStageVolume opens anew what is left of a device that has come back under another name", async () => {
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

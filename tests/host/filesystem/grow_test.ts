import assert from "node:assert/strict";
import { ensureGrown } from "../../../lib/host/filesystem/grow.ts";
import { mountVolume } from "../../../lib/host/filesystem/mount.ts";
import { mib, mountOptions, withDisk } from "../../support/disk.ts";
import { fakeDisk } from "../../support/fake_disk.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

const ignore = !needs("root", "loop", "mkfs.ext4");

Deno.test("promise 16: ensureGrown fails when the tool succeeds and the file system has not grown", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });
  namespace.sizeBytes = 4n << 30n;
  host.answers.set("resize2fs", { code: 0, stdout: "Nothing to do!\n" });

  const grown = ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" });

  await rejects(grown, "UNAVAILABLE", /resize2fs succeeded, but it has 1073741824 of the 4294967296 bytes/);
});

Deno.test("promise 16: ensureGrown returns the size that it measures, and runs nothing when nothing is to be done", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, path: "/staging" });
  const before = host.commands.length;

  assert.equal(await ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" }), 1n << 30n);
  assert.equal(host.commands.length, before);
  namespace.sizeBytes = 4n << 30n;
  assert.equal(await ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" }), 4n << 30n);

  assert.deepEqual(host.commands.slice(before), ["resize2fs /dev/nvme0n1"]);
});

Deno.test("promise 16: ensureGrown of a read-only mount answers FAILED_PRECONDITION", async () => {
  const { host, device, namespace } = await fakeDisk();
  await mountVolume(host, callContext(), device, { ...mountOptions, readOnly: true, path: "/staging" });
  namespace.sizeBytes = 4n << 30n;

  const grown = ensureGrown(host, callContext(), device, { path: "/staging", fsType: "ext4" });

  await rejects(grown, "FAILED_PRECONDITION", /it is mounted read-only/);
});

Deno.test({
  name: "promise 3: ensureGrown grows no file system that is mounted on top of the volume's",
  ignore: ignore || !needs("mkfs.xfs"),
  fn: () =>
    withDisk(320, async ({ machine, namespace, mount, path, device }) => {
      await mount({ ...mountOptions, fsType: "xfs" });
      const stranger = await machine.addNamespace(other, 320 * mib);
      await machine.tool("mkfs.xfs", "-q", stranger.path);
      await machine.grow(stranger, 512 * mib);
      await machine.grow(namespace, 512 * mib);
      await machine.tool("mount", stranger.path, path);
      const before = await machine.host.usage(path);

      const grown = ensureGrown(machine.host, callContext(), await device(), { path, fsType: "xfs" });

      await rejects(grown, "FAILED_PRECONDITION", /xfs of .*nvme0n2 .* is mounted there instead of .*nvme0n1$/);
      assert.equal((await machine.host.usage(path)).totalBytes, before.totalBytes);
    }),
});

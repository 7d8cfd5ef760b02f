/** NodePublishVolume on a machine of loop devices; repair_test.ts has volumes whose staging is broken. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { mib, node, nodeTest, other, uuid } from "../../support/loop_node.ts";
import { blockCapability, mountCapability, rejects, volumeId } from "../../support/node_calls.ts";

nodeTest(
  "NodePublishVolume of a block volume read-only makes the kernel refuse writes until NodeUnpublishVolume",
  async () => {
    await using n = await node();
    const capability = blockCapability();
    await n.stage(n.stageRequest(capability));
    const readOnly = async () => (await n.machine.tool("blockdev", "--getro", n.namespace.loop)).trim();

    await n.publish(n.publishRequest(capability, true));
    assert.equal(await readOnly(), "1");
    await rejects(
      n.publish(n.publishRequest(capability, false, join(n.machine.directory, "pod2"))),
      "FAILED_PRECONDITION",
      /published at ".*pod1" read-only, and a block device is either read-only or writable/,
    );
    await n.unpublish(n.unpublishRequest);

    assert.equal(await readOnly(), "0");
  },
);

nodeTest(
  "NodePublishVolume with another capability than the volume is staged with answers FAILED_PRECONDITION",
  async () => {
    await using n = await node();
    await n.stage(n.stageRequest());

    const asXfs = n.publish(n.publishRequest(mountCapability("xfs")));
    await rejects(asXfs, "FAILED_PRECONDITION", /it is staged as ext4, the request wants xfs/);
    const asBlock = n.publish(n.publishRequest(blockCapability()));
    await rejects(asBlock, "FAILED_PRECONDITION", /as a file system, not as a block device/);

    assert.deepEqual(await n.machine.mounts(), [n.staging]);
  },
);

nodeTest("NodePublishVolume without a staging path answers FAILED_PRECONDITION", async () => {
  await using n = await node();

  const published = n.publish({ ...n.publishRequest(), stagingTargetPath: "" });

  await rejects(published, "FAILED_PRECONDITION", /staging_target_path is missing, the volume has to be staged first/);
});

nodeTest("NodePublishVolume read-only shows a pod the volume without letting it write", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  for (let round = 0; round < 2; round++) await n.publish(n.publishRequest(mountCapability(), true));

  await assert.rejects(Deno.writeTextFile(join(n.target, "x"), ""), /Read-only file system/);
  await Deno.writeTextFile(join(n.staging, "x"), "");
  await rejects(
    n.publish(n.publishRequest(mountCapability(), false)),
    "ALREADY_EXISTS",
    /published there already, read-only instead of writable/,
  );
});

for (const [mode, allowed] of [["SINGLE_NODE_SINGLE_WRITER", false], ["SINGLE_NODE_WRITER", true]] as const) {
  nodeTest(`NodePublishVolume at a second target with ${mode} is ${allowed ? "done" : "an error"}`, async () => {
    await using n = await node();
    const capability = mountCapability("", Mode[mode]);
    await n.stage(n.stageRequest(capability));
    await n.publish(n.publishRequest(capability));
    const second = n.publish(n.publishRequest(capability, false, join(n.machine.directory, "pod2")));

    if (allowed) await second;
    else {
      await rejects(
        second,
        "FAILED_PRECONDITION",
        /published at ".*pod1", and access mode \w+ allows one target on a node/,
      );
    }

    assert.equal((await n.machine.mounts()).length, allowed ? 3 : 2);
  });
}

nodeTest("promise 4: a directory of the volume is one, whatever its name, while it is mounted in a pod", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const [directory, subPath] = [join(n.staging, "nvme9n9"), join(n.machine.directory, "subPath")];
  for (const path of [directory, subPath]) await Deno.mkdir(path);
  await n.machine.tool("mount", "--bind", directory, subPath);

  await rejects(
    n.unstage(n.unstageRequest),
    "FAILED_PRECONDITION",
    /it is still mounted at ".*subPath", unpublish it there first/,
  );

  assert.deepEqual([...Deno.readDirSync(n.discovery)].map((entry) => entry.name), [uuid]);
  await n.machine.tool("umount", subPath);
  await n.unstage(n.unstageRequest);
});

nodeTest("promise 17: a volume encrypted on the host is never published without its encryption", async () => {
  await using n = await node();
  const encrypted = `${volumeId(uuid)}|hostcrypto:luks2`;

  for (const capability of [blockCapability(), mountCapability()]) {
    await rejects(
      n.publish({ ...n.publishRequest(capability), volumeId: encrypted }),
      "FAILED_PRECONDITION",
      /its encryption is not open on this node, and the call brings no passphrase; end every pod .* is staged again/,
    );
  }

  assert.deepEqual([n.machine.commands, await n.machine.mounts()], [[], []]);
});

nodeTest("promise 6: NodePublishVolume rejects a staging mount of another device", async () => {
  await using n = await node();
  const stranger = await n.machine.addNamespace(other, 64 * mib);
  await n.machine.tool("mkfs.ext4", "-q", stranger.path);
  await n.machine.tool("mount", stranger.path, n.staging);

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /mounted at the staging path, which is not this volume/,
  );
});

nodeTest("promise 6: NodePublishVolume rejects a target with files of the root disk", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await Deno.mkdir(n.target);
  await Deno.writeTextFile(join(n.target, "precious"), "data");

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /not a mount point but holds files of the node's own disk/,
  );
});

nodeTest("NodePublishVolume and NodeUnpublishVolume follow no symbolic link at the target path", async () => {
  await using n = await node();
  const elsewhere = join(n.machine.directory, "elsewhere");
  await Deno.mkdir(elsewhere);
  await n.stage(n.stageRequest());
  await Deno.symlink(elsewhere, n.target);

  await rejects(
    n.publish(n.publishRequest()),
    "FAILED_PRECONDITION",
    /the target path "\S+pod1" is there already and is not a directory/,
  );
  await rejects(n.unpublish(n.unpublishRequest), "FAILED_PRECONDITION", /pod1/);

  assert.deepEqual(await n.machine.mounts(), [n.staging]);
  assert.deepEqual([(await Deno.lstat(n.target)).isSymlink, [...Deno.readDirSync(elsewhere)]], [true, []]);
});

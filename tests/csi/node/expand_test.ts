/** NodeExpandVolume, and the growth of file systems while they are staged. */
import assert from "node:assert/strict";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../../lib/host/host.ts";
import { canGrowMountedExt4, mib, node, nodeTest, uuid, withoutSysResource } from "../../support/loop_node.ts";
import { needs } from "../../support/needs.ts";
import {
  blockCapability,
  callContext,
  mountCapability,
  nodeCalls,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

for (const fsType of ["ext4", "xfs", "btrfs"]) {
  const [smallMib, largeMib] = fsType === "ext4" ? [64, 128] : [320, 512];
  const fits = (bytes: bigint) => bytes > BigInt(largeMib * mib) * 4n / 5n && bytes <= BigInt(largeMib * mib);

  nodeTest(`promise 15: NodeStageVolume grows ${fsType} to a device that is larger than its origin`, async () => {
    await using n = await node({ sizeMib: smallMib });
    await n.stage(n.stageRequest(mountCapability(fsType)));
    await n.unstage(n.unstageRequest);
    await n.machine.grow(n.namespace, largeMib * mib);

    await n.stage(n.stageRequest(mountCapability(fsType)));

    assert(fits((await n.machine.host.usage(n.staging)).totalBytes));
  }, !needs(`mkfs.${fsType}`));

  nodeTest(`promise 16: NodeExpandVolume grows a published ${fsType} and answers the size measured`, async () => {
    await using n = await node({ sizeMib: smallMib });
    await n.stage(n.stageRequest(mountCapability(fsType)));
    await n.publish(n.publishRequest(mountCapability(fsType)));
    await n.machine.grow(n.namespace, largeMib * mib);

    for (let round = 0; round < 2; round++) {
      const answer = await n.expand({ volumeId: volumeId(uuid), volumePath: n.target });
      assert.deepEqual(answer, { capacityBytes: BigInt(largeMib * mib) });
    }

    assert(fits((await n.machine.host.usage(n.target)).totalBytes));
    assert.equal(n.machine.commands.filter((program) => /resize2fs|xfs_growfs|^btrfs/.test(program)).length, 1);
  }, !needs(`mkfs.${fsType}`) || (fsType === "ext4" && !canGrowMountedExt4()));
}

nodeTest(
  "NodeExpandVolume of a mounted ext4 without CAP_SYS_RESOURCE says what is missing, and staging grows it",
  async () => {
    await using n = await node();
    const host = withoutSysResource(n.machine.host);
    const attacher = createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" });
    const limited = nodeCalls({ host, attacher });
    await limited.stage(n.stageRequest());
    await n.machine.grow(n.namespace, 128 * mib);

    const expanded = limited.expand({ volumeId: volumeId(uuid), volumePath: n.staging });
    await rejects(
      expanded,
      "FAILED_PRECONDITION",
      /lacks the capability CAP_SYS_RESOURCE to grow it while it is mounted/,
    );
    await limited.unstage(n.unstageRequest);
    await limited.stage(n.stageRequest());

    assert((await host.usage(n.staging)).totalBytes > 100n * BigInt(mib));
    assert.deepEqual(n.machine.commands.slice(-4), ["blkid", "e2fsck", "resize2fs", "mount"]);
  },
);

for (const when of ["while it is being staged", "after it was staged"] as const) {
  nodeTest(`promise 15: an ext4 whose device grows ${when} has that size without CAP_SYS_RESOURCE too`, async () => {
    await using n = await node();
    let growsBefore: string | undefined;
    const host: Host = {
      ...withoutSysResource(n.machine.host),
      async run(program, args, options) {
        if (program === growsBefore) {
          growsBefore = undefined;
          await n.machine.grow(n.namespace, 128 * mib);
        }
        return await n.machine.host.run(program, args, options);
      },
    };
    const limited = nodeCalls({
      host,
      attacher: createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
    });
    await limited.stage(n.stageRequest());
    if (when === "after it was staged") {
      await n.machine.grow(n.namespace, 128 * mib);
    } else {
      await limited.unstage(n.unstageRequest);
      growsBefore = "mount";
    }

    await limited.stage(n.stageRequest());

    assert((await host.usage(n.staging)).totalBytes > 100n * BigInt(mib));
    assert.deepEqual(n.machine.commands.slice(-5), ["umount", "blkid", "e2fsck", "resize2fs", "mount"]);
    assert.deepEqual(await n.machine.mounts(), [n.staging]);
  });
}

nodeTest("NodeStageVolume of a grown ext4 in use leaves it to its pods without CAP_SYS_RESOURCE", async () => {
  await using n = await node();
  const host = withoutSysResource(n.machine.host);
  const limited = nodeCalls({
    host,
    attacher: createDiscoveryClientAttacher({ host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
  });
  await limited.stage(n.stageRequest());
  await limited.publish(n.publishRequest());
  await n.machine.grow(n.namespace, 128 * mib);

  await limited.stage(n.stageRequest());

  assert.deepEqual(await n.machine.mounts(), [n.staging, n.target]);
  assert((await host.usage(n.staging)).totalBytes < 65n * BigInt(mib));
});

nodeTest("promise 16: NodeExpandVolume of a block volume answers the size of the device", async () => {
  await using n = await node();
  await n.stage(n.stageRequest(blockCapability()));
  await n.publish(n.publishRequest(blockCapability()));
  await n.machine.grow(n.namespace, 128 * mib);
  const request = {
    volumeId: volumeId(uuid),
    volumePath: n.target,
    capacityRange: { requiredBytes: 128n * BigInt(mib) },
  };

  assert.deepEqual(await n.expand(request), { capacityBytes: 128n * BigInt(mib) });
});

nodeTest("promise 16: NodeExpandVolume does not succeed while the kernel shows the old size", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const caller = new AbortController();
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 100);

  const expanded = n.expand({
    volumeId: volumeId(uuid),
    volumePath: n.staging,
    capacityRange: { requiredBytes: 128n * BigInt(mib) },
  }, callContext(caller.signal));

  await rejects(expanded, "UNAVAILABLE", /still has 67108864 bytes, 134217728 are wanted/);
});

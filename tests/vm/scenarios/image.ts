/**
 * Controller and node in the root file system of their image, over real NVMe/TCP: a tool or a library that is missing
 * there is found here.
 */
import assert from "node:assert/strict";
import { Node } from "../../../proto/gen/csi_pb.ts";
import { type Check, impatient, scenario as of } from "../scenario.ts";
import { controllers, deviceOf, tool } from "../testbed.ts";

const gib = 1n << 30n;

const lives = (["ext4", "xfs", "btrfs"] as const).map((use): Check => ({
  name: `image: a volume with ${use} is connected, made, mounted, grown and taken away by what is in the image`,
  async run(testbed) {
    const volume = await testbed.volume({ use });
    await volume.stage();
    await volume.publish();
    // From outside of the image.
    await Deno.writeTextFile(`${volume.target}/file`, use);
    assert.equal(await volume.expand(2n * gib), 2n * gib);
    const { usage, volumeCondition } = await volume.stats();
    assert.equal(volumeCondition?.message, "healthy");
    assert(Number(usage[0]?.total) > 1.8 * Number(gib), String(usage[0]?.total));
    assert.equal(await Deno.readTextFile(`${volume.target}/file`), use);
    await volume.end();

    await testbed.nothingLeft();
  },
}));

export const scenario = of([
  ...lives,
  {
    name: "image: a raw block volume is published through the image",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();
      await volume.publish();

      assert.equal((await Deno.lstat(volume.target)).isBlockDevice, true);
      await Deno.writeTextFile(volume.target, "block");
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "image: a volume with host encryption is opened by the cryptsetup of the image, with the default argon2id",
    limitSeconds: 300,
    async run(testbed) {
      const volume = await testbed.volume({ parameters: { "host-encryption": "enabled" } });
      const secrets = { "host-encryption-passphrase": "of the image's test" };
      const stage = {
        volumeId: volume.id,
        publishContext: volume.publishContext,
        stagingTargetPath: volume.staging,
        volumeCapability: volume.capability,
        secrets,
      };
      await testbed.nodeCall(Node.method.nodeStageVolume, stage, 120);
      await volume.publish();
      await Deno.writeTextFile(`${volume.target}/file`, "encrypted");

      assert.equal(await tool("blkid", "-p", "-s", "TYPE", "-o", "value", deviceOf(volume.uuid)), "crypto_LUKS");
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name: "image: the node connects with the nvme-cli of an image that has no shell",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" });
      await volume.stage();

      assert.equal(controllers().length, 2);
      await assert.rejects(Deno.stat("/run/image/root/bin/sh"), Deno.errors.NotFound);
      assert.equal((await Deno.stat("/run/image/root/usr/sbin/nvme")).isFile, true);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
], { ...impatient, image: true });

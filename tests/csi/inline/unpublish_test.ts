/** NodeUnpublishVolume of inline volumes on a simulated cluster. */
import assert from "node:assert/strict";
import { join } from "node:path";
import {
  assertNothingLeft,
  exists,
  inlineId,
  inlineNode,
  inlineRequest,
  inlineTest,
} from "../../support/inline_node.ts";
import { rejects } from "../../support/node_calls.ts";
import { eventually } from "../../support/simulator.ts";

inlineTest("promise 5: unpublish of an inline volume leaves files in an unmounted target, and says so", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await Deno.mkdir(targetPath);
  await Deno.writeTextFile(join(targetPath, "precious"), "");

  await rejects(n.publish(inlineRequest(targetPath)), "FAILED_PRECONDITION", /holds files of the node's own disk/);
  await rejects(n.unpublish({ volumeId: inlineId(), targetPath }), "FAILED_PRECONDITION", /precious|not empty/);

  assert(await exists(join(targetPath, "precious")));
  assert.deepEqual(n.sim.control.leftovers().volumes, []);
});

inlineTest("unpublish of an inline volume leaves a foreign mount at its target alone", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await Deno.mkdir(targetPath);
  await new Deno.Command("mount", { args: ["-t", "tmpfs", "none", targetPath] }).output();

  await rejects(
    n.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    /tmpfs .* is not this volume/,
  );

  assert.deepEqual((await n.mounts()).map(({ fsType }) => fsType), ["tmpfs"]);
});

inlineTest("promise 4: an inline volume whose device was lost is removed", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const [volume] = n.sim.control.cluster.volumes;
  assert(volume !== undefined);
  await n.sim.control.cluster.updateVolume({ project: "default", uuid: volume.uuid }, { acl: [] }, undefined);
  await eventually("the device goes", () => n.sim.control.machine().devices.length === 0);

  const { volumeCondition } = await n.stats({ volumeId: inlineId(), volumePath: targetPath });
  await n.unpublish({ volumeId: inlineId(), targetPath });

  assert.equal(volumeCondition?.abnormal, true);
  assert.match(volumeCondition?.message ?? "", /has lost its device/);
  await assertNothingLeft(n);
});

inlineTest("a full file system in an inline volume does not keep it from being removed", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath, { "size": "1Gi", "mkfs-options": "-N 16" }));
  for (let at = 0; at < 16; at++) await Deno.writeTextFile(join(targetPath, `${at}`), "").catch(() => {});

  await n.unpublish({ volumeId: inlineId(), targetPath });

  await assertNothingLeft(n);
});

inlineTest(
  "while the cluster is away, unpublish unmounts an inline volume, fails, and removes it later",
  async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    await n.publish(inlineRequest(targetPath));
    await n.sim.control.stopEndpoints();

    await rejects(
      n.unpublish({ volumeId: inlineId(), targetPath }),
      "UNAVAILABLE",
      /some clusters cannot be asked \(cluster "rack1", project "default": .*no LightOS management endpoint answers/,
    );
    const mounted = await n.mounts();
    const isThere = await exists(targetPath);
    await n.sim.control.startEndpoints();
    await n.unpublish({ volumeId: inlineId(), targetPath });

    assert.deepEqual(mounted, []);
    assert.equal(isThere, true);
    await assertNothingLeft(n);
  },
);

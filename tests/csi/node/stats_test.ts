/** NodeGetVolumeStats; condition_test.ts has the conditions that it reports. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { VolumeUsage_Unit as Unit } from "../../../proto/gen/csi_pb.ts";
import { node, nodeTest, other, uuid } from "../../support/loop_node.ts";
import { callContext, nodeCalls, rejects, volumeId } from "../../support/node_calls.ts";

nodeTest("NodeGetVolumeStats answers the bytes and inodes that statfs reports", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await n.publish(n.publishRequest());

  const { usage } = await n.stats({ volumeId: volumeId(uuid), volumePath: n.target });

  const [bytes, inodes] = usage ?? [];
  const total = Number(await n.machine.tool("stat", "-f", "-c", "%b", n.target)) *
    Number(await n.machine.tool("stat", "-f", "-c", "%S", n.target));
  assert.deepEqual([bytes?.unit, bytes?.total], [Unit.BYTES, BigInt(total)]);
  assert((bytes?.used ?? 0n) + (bytes?.available ?? 0n) <= BigInt(total) && (bytes?.available ?? 0n) > 0n);
  assert.deepEqual(
    [inodes?.unit, inodes?.total],
    [Unit.INODES, BigInt((await n.machine.tool("stat", "-f", "-c", "%c", n.target)).trim())],
  );
});

nodeTest("NodeGetVolumeStats and NodeExpandVolume at a path without the volume answer NOT_FOUND", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  await Deno.mkdir(n.target);

  for (const volumePath of ["some/path", "/no/such/path", n.target, join(n.staging, "lost+found")]) {
    await rejects(n.stats({ volumeId: volumeId(uuid), volumePath }), "NOT_FOUND", /is not there|does not show/);
    await rejects(n.expand({ volumeId: volumeId(uuid), volumePath }), "NOT_FOUND", /is not there|does not show/);
  }
  const absent = n.stats({ volumeId: volumeId(other), volumePath: n.staging });
  await rejects(absent, "NOT_FOUND", /this node has no block device of it/);
});

nodeTest("NodeGetVolumeStats of a file system that hangs ends with its caller's deadline", async () => {
  await using n = await node();
  await n.stage(n.stageRequest());
  const hung = nodeCalls({
    host: { ...n.machine.host, usage: () => new Promise(() => {}) },
    attacher: createDiscoveryClientAttacher({ host: n.machine.host, directory: n.discovery, hostNqn: "nqn.h:n1" }),
  });
  const caller = new AbortController();
  const asked = hung.stats({ volumeId: volumeId(uuid), volumePath: n.staging }, callContext(caller.signal));
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time")), 20);

  await rejects(asked, "DEADLINE_EXCEEDED", /Cannot finish in time/);
});

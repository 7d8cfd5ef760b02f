/** How many volumes a node admits: which ones count, and that nothing is done for one beyond the limit. */
import assert from "node:assert/strict";
import { volumeLimit } from "../../../lib/csi/node/limit.ts";
import { hostIdOf } from "../../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { isSubsystemOf } from "../../../lib/cli/backends.ts";
import { hostNqn, poseidonNqnPrefix } from "../../../lib/namespace.ts";
import { CutOff, FakeHost } from "../../support/fake_host.ts";
import { inlineId, inlineNode, inlineRequest } from "../../support/inline_node.ts";
import { subsystemNqn } from "../../support/loop_machine.ts";
import { needs } from "../../support/needs.ts";
import {
  callContext,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

const ctx = callContext().doing("stage the volume");
const nodeId = "n1.node";
const uuidOf = (n: number) => `0f2c6a5e-54d1-4c39-9a77-${String(n).padStart(12, "0")}`;
const stagingOf = (n: number) => `/staging/${n}`;

/** A node that connects itself, with `count` volumes on a cluster that lets it have all of them. */
async function node(most: number, count: number) {
  const host = new FakeHost();
  for (let n = 1; n <= count; n++) {
    host.addNamespace(uuidOf(n), subsystemNqn);
    await host.makeDirectory(stagingOf(n));
  }
  const locks = new KeyedLock();
  const attacher = createDirectAttacher({ host, hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId), locks });
  const limit = volumeLimit(host, most, isSubsystemOf("lightos"));
  const calls = nodeCalls({ host, attacher, locks, nodeId, maxVolumes: most, limit });
  return {
    ...calls,
    host,
    limit,
    stage: (n: number, more: { readonly encrypted?: boolean } = {}) =>
      calls.stage({
        volumeId: `${volumeId(uuidOf(n))}${more.encrypted ? "|hostcrypto:luks2" : ""}`,
        stagingTargetPath: stagingOf(n),
        publishContext: publishContext(uuidOf(n)),
        volumeCapability: mountCapability(),
        secrets: more.encrypted ? { "host-encryption-passphrase": "open sesame" } : {},
      }),
    unstage: (n: number) => calls.unstage({ volumeId: volumeId(uuidOf(n)), stagingTargetPath: stagingOf(n) }),
  };
}

const limitReached =
  /: this node has 2 volumes in use, 2 are allowed \(--max-volumes\); end a pod here that uses one, or let this one run on/;

Deno.test("promise 22: NodeStageVolume beyond the node's limit names limit and count, and does nothing", async () => {
  const n = await node(2, 3);
  await n.stage(1);
  await n.stage(2);
  const before = [...n.host.commands];

  await rejects(n.stage(3), "RESOURCE_EXHAUSTED", limitReached);

  assert.deepEqual(n.host.commands, before);
  assert.deepEqual(n.host.mounts.map(({ path }) => path), [stagingOf(1), stagingOf(2)]);
  assert.equal((await n.info()).maxVolumesPerNode, 2n);
});

Deno.test("promise 22: a volume that is there may be staged again at the limit, and when one goes another one may come", async () => {
  const n = await node(2, 3);
  await n.stage(1);
  await n.stage(2);

  await n.stage(1);
  await n.unstage(2);
  await n.stage(3);

  await rejects(n.stage(2), "RESOURCE_EXHAUSTED", limitReached);
  assert.deepEqual(n.host.mounts.map(({ path }) => path), [stagingOf(1), stagingOf(3)]);
});

Deno.test("promise 22: volumes that the cluster only shows do not count", async () => {
  const n = await node(2, 5);

  await n.stage(4);
  assert.equal(n.host.devices.length, 5, "the node is shown all five");
  await n.stage(5);

  assert.deepEqual(n.host.mounts.map(({ path }) => path), [stagingOf(4), stagingOf(5)]);
});

Deno.test("promise 22: of volumes that come at once, those that came first get the places that are left", async () => {
  const n = await node(2, 4);

  const outcomes = await Promise.allSettled([1, 2, 3, 4].map((number) => n.stage(number)));

  assert.deepEqual(outcomes.map(({ status }) => status), ["fulfilled", "fulfilled", "rejected", "rejected"]);
  assert.equal(n.host.mounts.length, 2);
});

Deno.test("promise 22: an encrypted volume counts as one", async () => {
  const n = await node(2, 3);

  await n.stage(1, { encrypted: true });
  await n.stage(2, { encrypted: true });

  await rejects(n.stage(3, { encrypted: true }), "RESOURCE_EXHAUSTED", limitReached);
});

Deno.test("promise 22: a stage that failed leaves its place to others", async () => {
  const n = await node(1, 2);
  n.host.answers.set("mkfs.ext4", { code: 1, stderr: "no" });

  await assert.rejects(n.stage(1), /mkfs\.ext4/);
  n.host.answers.clear();
  await n.stage(2);

  await rejects(n.stage(1), "RESOURCE_EXHAUSTED", /this node has 1 volumes in use, 1 are allowed/);
});

Deno.test("promise 22: when the mounts cannot be read, no volume is admitted and no place is kept", async () => {
  const n = await node(1, 1);
  n.host.cut = { at: n.host.calls + 1, when: "before" };

  await assert.rejects(n.limit.admit(ctx, uuidOf(1)), CutOff);
  n.host.cut = undefined;
  using _admitted = await n.limit.admit(ctx, uuidOf(1));

  await rejects(n.limit.admit(ctx, "other"), "RESOURCE_EXHAUSTED", /has 1 volumes in use/);
});

Deno.test("promise 22: volumes of the other driver on the node do not count", async () => {
  const n = await node(1, 1);
  const theirs = `${poseidonNqnPrefix}${uuidOf(9)}:${nodeId}`;
  n.host.addNamespace(uuidOf(9), theirs);
  n.host.connect(theirs, hostNqn(nodeId));
  const [device] = n.host.devices;
  assert(device);
  n.host.mounts.push({
    path: "/pods/theirs",
    device,
    isNode: false,
    fsType: "ext4",
    readOnly: false,
    superReadOnly: false,
  });

  await n.stage(1);

  assert.equal(n.host.mounts.length, 2);
});

Deno.test("without a limit nothing is counted", async () => {
  const n = await node(0, 3);
  for (const number of [1, 2, 3]) await n.stage(number);

  assert.equal(n.host.mounts.length, 3);
  assert.equal((await n.info()).maxVolumesPerNode, 0n);
});

Deno.test({
  name: "promise 22: an inline volume beyond the node's limit fails before anything is made on the cluster",
  ignore: !needs("root", "loop", "mkfs.ext4"),
  fn: async () => {
    await using n = await inlineNode({ maxVolumes: 1 });
    const [first, second] = [await n.target(1), await n.target(2)];
    await n.publish(inlineRequest(first, { size: "1Gi" }, 1));

    await rejects(
      n.publish(inlineRequest(second, { size: "1Gi" }, 2)),
      "RESOURCE_EXHAUSTED",
      /^Cannot publish the inline volume csi-0+2: this node has 1 volumes in use, 1 are allowed/,
    );
    await n.publish(inlineRequest(first, { size: "1Gi" }, 1));

    assert.deepEqual(n.sim.control.cluster.volumes.map(({ name }) => name), [inlineId(1)]);
    await assert.rejects(Deno.stat(second), Deno.errors.NotFound);
    await n.unpublish({ volumeId: inlineId(1), targetPath: first });
    await n.publish(inlineRequest(second, { size: "1Gi" }, 2));
    await n.unpublish({ volumeId: inlineId(2), targetPath: second });
  },
});

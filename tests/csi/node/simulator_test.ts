/** The node service on the machine that the simulator plays: its kernel, its Discovery-Client, its devices. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../../lib/host/host.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { parseMountTable } from "../../../lib/host/mount_table.ts";
import { createLogger } from "../../../lib/log.ts";
import { toPublishContext } from "../../../lib/namespace.ts";
import type { SimVolume } from "../../../lib/simulator/lightos/model.ts";
import { mib, nodeTest } from "../../support/loop_node.ts";
import {
  blockCapability,
  callContext,
  mountCapability,
  nodeCalls,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";
import { eventually, startSimulator } from "../../support/simulator.ts";

const project = "default";
const hostNqn = "nqn.2019-09.com.lightbitslabs:host:n1.node";

/** A simulated machine with a node service, and what a test does with it. */
async function simulated() {
  const sim = await startSimulator({ data: "loop" });
  const { discoveryDir = "", sysfsRoot = "", devRoot = "", subsystemNqn } = sim.addresses;
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-node-" }));
  const host: Host = createLinuxHost({ log: createLogger("error"), sysfsRoot, devRoot });
  const calls = nodeCalls({
    host,
    attacher: createDiscoveryClientAttacher({ host, directory: discoveryDir, hostNqn }),
  });
  const staging = join(directory, "globalmount");
  const target = join(directory, "pod");
  await Deno.mkdir(staging);

  const mounts = async () =>
    parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).filter((mount) =>
      mount.path.startsWith(directory)
    );
  return {
    ...calls,
    sim,
    host,
    staging,
    target,
    mounts,
    async volume(name: string, sizeMib = 64): Promise<SimVolume> {
      const volume = await sim.control.cluster.createVolume({
        project,
        name,
        size: `${sizeMib} mib`,
        replicaCount: 1,
        compression: "",
        acl: undefined,
        ipAcl: undefined,
        sectorSizeBytes: 0,
        sourceSnapshot: { uuid: "", name: "" },
        qosPolicy: { uuid: "", name: "" },
        labels: [],
      });
      await eventually(`volume ${name} is Available`, () => volume.state === "Available");
      return volume;
    },
    async grant({ uuid }: SimVolume, acl: readonly string[] = [hostNqn]): Promise<void> {
      await sim.control.cluster.updateVolume({ project, uuid }, { acl }, undefined);
    },
    async gone({ uuid }: SimVolume): Promise<void> {
      await eventually("the device goes", () => sim.control.machine().devices.every((device) => device.uuid !== uuid));
    },
    stageRequest: ({ uuid }: SimVolume, volumeCapability = mountCapability()) => ({
      volumeId: volumeId(uuid),
      stagingTargetPath: staging,
      volumeCapability,
      publishContext: toPublishContext({
        uuid,
        subsystemNqn,
        addresses: [],
        discovery: [{ traddr: "127.0.0.1", trsvcid: "8009" }],
      }),
    }),
    publishRequest: ({ uuid }: SimVolume, volumeCapability = mountCapability()) => ({
      volumeId: volumeId(uuid),
      stagingTargetPath: staging,
      targetPath: target,
      volumeCapability,
    }),
    async [Symbol.asyncDispose]() {
      for (const { path } of (await mounts()).toReversed()) {
        await new Deno.Command("umount", { args: [path] }).output();
      }
      const left = await mounts();
      await sim.stop();
      assert.deepEqual(left, []);
      await Deno.remove(directory, { recursive: true });
    },
  };
}

nodeTest("promise 14: NodeStageVolume goes on as soon as the cluster lets this host in", async () => {
  await using n = await simulated();
  const volume = await n.volume("v1");
  const staged = n.stage(n.stageRequest(volume));
  await eventually(
    "the Discovery-Client has a file",
    () => [...Deno.readDirSync(n.sim.addresses.discoveryDir ?? "")].length > 0,
  );

  await n.grant(volume);
  await staged;

  assert.deepEqual((await n.mounts()).map((mount) => mount.path), [n.staging]);
});

nodeTest(
  "promise 4: a volume that the cluster took away while a pod used it can be unstaged, and used again",
  async () => {
    await using n = await simulated();
    const volume = await n.volume("v1");
    await n.grant(volume);
    await n.stage(n.stageRequest(volume));
    await n.publish(n.publishRequest(volume));
    await Deno.writeTextFile(join(n.target, "kept"), "data");
    await new Deno.Command("sync", { args: ["-f", n.target] }).output();
    await n.grant(volume, []);
    await n.gone(volume);

    const { volumeCondition } = await n.stats({ volumeId: volumeId(volume.uuid), volumePath: n.target });
    assert.equal(volumeCondition?.abnormal, true);
    assert.match(volumeCondition?.message ?? "", /ext4 of .*nvme\d+n\d+ .* has lost its device/);
    await n.unpublish({ volumeId: volumeId(volume.uuid), targetPath: n.target });
    await n.unstage({ volumeId: volumeId(volume.uuid), stagingTargetPath: n.staging });
    assert.deepEqual(await n.mounts(), []);
    await n.grant(volume);
    await n.stage(n.stageRequest(volume));

    assert.equal(await Deno.readTextFile(join(n.staging, "kept")), "data");
  },
);

nodeTest("promise 2: NodeStageVolume mounts again after the device was lost and came back", async () => {
  await using n = await simulated();
  const volume = await n.volume("v1");
  await n.grant(volume);
  await n.stage(n.stageRequest(volume));
  const [before] = await n.mounts();
  await n.grant(volume, []);
  await n.gone(volume);
  await n.grant(volume);

  await n.stage(n.stageRequest(volume));

  const [after, ...more] = await n.mounts();
  assert.deepEqual([after?.path, more], [n.staging, []]);
  assert.notEqual(after?.number, before?.number);
  await Deno.writeTextFile(join(n.staging, "x"), "writable");
});

nodeTest("promise 1: NodeStageVolume of a new volume whose device cannot be read never formats it", async () => {
  await using n = await simulated();
  const volume = await n.volume("v1");
  await n.grant(volume);
  await n.stage(n.stageRequest(volume, blockCapability()));
  await n.sim.control.machine().damage(volume.uuid, "unreadable");

  await rejects(n.stage(n.stageRequest(volume)), "UNAVAILABLE", /cannot be read at byte/);

  assert.deepEqual(await n.mounts(), []);
});

nodeTest("promise 1: NodeStageVolume of a device without a size waits for it and never formats it", async () => {
  await using n = await simulated();
  const volume = await n.volume("v1");
  await n.grant(volume);
  await n.stage(n.stageRequest(volume, blockCapability()));
  await n.sim.control.machine().damage(volume.uuid, "empty");
  const caller = new AbortController();
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 100);

  const staged = n.stage(n.stageRequest(volume), callContext(caller.signal));

  await rejects(staged, "UNAVAILABLE", /its size is zero; see that the Discovery-Client runs/);
});

nodeTest("promise 3: NodeStageVolume finds each volume after their devices have swapped names", async () => {
  await using n = await simulated();
  const volumes = [await n.volume("v1"), await n.volume("v2")] as const;
  for (const volume of volumes) {
    await n.grant(volume);
    await n.stage(n.stageRequest(volume));
    await Deno.writeTextFile(join(n.staging, volume.name), "");
    await n.unstage({ volumeId: volumeId(volume.uuid), stagingTargetPath: n.staging });
  }
  await n.sim.control.machine().swap(volumes[0].uuid, volumes[1].uuid);

  for (const volume of volumes) {
    await n.stage(n.stageRequest(volume));
    assert.deepEqual([...Deno.readDirSync(n.staging)].map((entry) => entry.name).sort(), ["lost+found", volume.name]);
    await n.unstage({ volumeId: volumeId(volume.uuid), stagingTargetPath: n.staging });
  }
});

nodeTest(
  "promise 16: NodeExpandVolume of a published block volume waits for the size that the cluster gives it",
  async () => {
    await using n = await simulated();
    const volume = await n.volume("v1");
    await n.grant(volume);
    await n.stage(n.stageRequest(volume, blockCapability()));
    await n.publish(n.publishRequest(volume, blockCapability()));
    const requiredBytes = 128n * BigInt(mib);

    const expanded = n.expand({
      volumeId: volumeId(volume.uuid),
      volumePath: n.target,
      capacityRange: { requiredBytes },
    });
    await n.sim.control.cluster.updateVolume({ project, uuid: volume.uuid }, { size: "128 mib" }, undefined);

    assert.deepEqual(await expanded, { capacityBytes: requiredBytes });
  },
);

import assert from "node:assert/strict";
import { join } from "node:path";
import { probeMount } from "../../../lib/csi/node/condition.ts";
import { StatusError } from "../../../lib/error.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../../lib/host/host.ts";
import { mountsAt, mountTable } from "../../../lib/host/mount_table.ts";
import { findDevice } from "../../../lib/host/nvme/devices.ts";
import { VolumeCapability_AccessMode_Mode as Mode, VolumeUsage_Unit as Unit } from "../../../proto/gen/csi_pb.ts";
import { loopMachine, subsystemNqn } from "../../support/loop_machine.ts";
import { mib, nodeTest } from "../../support/loop_node.ts";
import {
  blockCapability,
  callContext,
  type Capability,
  mountCapability,
  nodeCalls,
  publishContext,
  rejects,
  volumeId,
} from "../../support/node_calls.ts";

const uuid = "5d0f1c3e-7a52-4f0e-8c21-9b7d3e6f4a10";

/** A node with one volume, staged and published. */
async function published(capability: Capability, options: { readonly?: boolean; sizeMib?: number } = {}) {
  const stack = new AsyncDisposableStack();
  const machine = stack.use(await loopMachine());
  try {
    const namespace = await machine.addNamespace(uuid, (options.sizeMib ?? 64) * mib);
    const [staging, target, discovery] = ["globalmount", "pod", "discovery.d"].map((name) =>
      join(machine.directory, name)
    ) as [string, string, string];
    await Deno.mkdir(discovery);
    await Deno.mkdir(staging);
    const callsOn = (host: Host) =>
      nodeCalls({ host, attacher: createDiscoveryClientAttacher({ host, directory: discovery, hostNqn: "nqn.h:n1" }) });
    const calls = callsOn(machine.host);
    const request = { volumeId: volumeId(uuid), stagingTargetPath: staging, volumeCapability: capability };
    if (capability.accessMode?.mode === Mode.MULTI_NODE_READER_ONLY) {
      // What is only ever read must have been made before.
      await calls.stage({
        ...request,
        publishContext: publishContext(uuid),
        volumeCapability: mountCapability("ext4"),
      });
      await calls.unstage({ volumeId: volumeId(uuid), stagingTargetPath: staging });
    }
    await calls.stage({ ...request, publishContext: publishContext(uuid) });
    await calls.publish({ ...request, targetPath: target, readonly: options.readonly ?? false });
    return {
      machine,
      namespace,
      staging,
      target,
      calls,
      callsOn,
      stats: (volumePath = target) => calls.stats({ volumeId: volumeId(uuid), volumePath }),
      /** Shows a connection of this machine to the subsystem. */
      async connect(name: string, state: string) {
        const entry = join(machine.directory, "sys/class/nvme", name);
        await Deno.mkdir(entry, { recursive: true });
        const attributes = {
          state,
          subsysnqn: subsystemNqn,
          hostnqn: "nqn.h:n1",
          transport: "tcp",
          address: "traddr=192.0.2.1,trsvcid=4420",
        };
        for (const [key, text] of Object.entries(attributes)) await Deno.writeTextFile(join(entry, key), `${text}\n`);
      },
      [Symbol.asyncDispose]: () => stack.disposeAsync(),
    };
  } catch (error) {
    await stack.disposeAsync();
    throw error;
  }
}

type Stats = Awaited<ReturnType<ReturnType<typeof nodeCalls>["stats"]>>;

function assertHealthy({ usage, volumeCondition }: Stats): void {
  assert.deepEqual([volumeCondition?.abnormal, volumeCondition?.message], [false, "healthy"]);
  assert.ok((usage?.[0]?.total ?? 0n) > 0n);
}

function assertAbnormal({ volumeCondition }: Stats, message: RegExp): void {
  assert.equal(volumeCondition?.abnormal, true, volumeCondition?.message ?? "");
  assert.match(volumeCondition?.message ?? "", message);
}

for (
  const [what, capability, readonly] of [
    ["a mounted volume", mountCapability("ext4"), false],
    ["a mounted volume, published read-only", mountCapability("ext4"), true],
    ["a volume that is meant to be only read", mountCapability("ext4", Mode.MULTI_NODE_READER_ONLY), false],
    ["a raw block volume", blockCapability(), false],
  ] as const
) {
  nodeTest(`NodeGetVolumeStats reports ${what} as healthy`, async () => {
    await using n = await published(capability, { readonly });

    assertHealthy(await n.stats());
  });
}

nodeTest(
  "NodeGetVolumeStats reports a mount whose device has gone, with what the file system still reports",
  async () => {
    await using n = await published(mountCapability("ext4"));
    const before = await n.stats();
    await n.machine.hide(n.namespace);

    const after = await n.stats();

    assertAbnormal(
      after,
      /^ext4 of .*nvme0n1 \(.*\) at ".*\/pod" has lost its device: reads and writes fail, the pod has/,
    );
    assert.deepEqual(after.usage?.map(({ total }) => total), before.usage?.map(({ total }) => total));
  },
);

nodeTest("NodeGetVolumeStats reports a raw block volume whose device has gone", async () => {
  await using n = await published(blockCapability());
  await n.machine.hide(n.namespace);
  // What is behind the bound node keeps its number on this machine; with a real namespace the number goes too.
  await n.machine.tool("umount", n.target);
  await n.machine.tool("mknod", join(n.machine.directory, "dev/nvme9n9"), "b", "259", "65535");
  await n.machine.tool("mount", "--bind", join(n.machine.directory, "dev/nvme9n9"), n.target);

  assertAbnormal(await n.stats(), /^the device node at ".*\/pod" has lost its device: reads and writes fail/);
});

nodeTest("NodeGetVolumeStats reports a file system that the kernel made read-only after an error", async () => {
  await using n = await published(mountCapability("ext4", Mode.SINGLE_NODE_WRITER, ["errors=remount-ro"]));
  assertHealthy(await n.stats());
  const loop = n.namespace.loop.slice("/dev/".length);
  await Deno.writeTextFile(`/sys/fs/ext4/${loop}/trigger_fs_error`, "test\n");

  assertAbnormal(await n.stats(), /is read-only although it should not|takes no writes/);
  assertAbnormal(await n.stats(n.staging), /is read-only although it should not|takes no writes/);
});

nodeTest(
  "NodeGetVolumeStats reports a staging mount that was made read-only below a pod that writes",
  async () => {
    await using n = await published(mountCapability("ext4"));
    await n.machine.tool("mount", "-o", "remount,ro", n.staging);

    assertAbnormal(await n.stats(), /is read-only although it should not/);
  },
);

for (const [what, capability] of [["mounted", mountCapability("ext4")], ["raw block", blockCapability()]] as const) {
  nodeTest(
    `NodeGetVolumeStats reports a ${what} volume without a live path, and one live path is enough`,
    async () => {
      await using n = await published(capability);
      await n.connect("nvme0", "connecting");
      await n.connect("nvme1", "resetting");

      const without = await n.stats();
      await n.connect("nvme1", "live");
      const withOne = await n.stats();

      assertAbnormal(
        without,
        /has no live path to nqn\..* \(nvme0 connecting, nvme1 resetting\): reads and writes wait or/,
      );
      assert.ok((without.usage?.[0]?.total ?? 0n) > 0n);
      assertHealthy(withOne);
    },
  );

  nodeTest(`NodeGetVolumeStats reports a ${what} volume whose device cannot be read`, async () => {
    await using n = await published(capability);
    const readBytes = () => Promise.reject(Object.assign(new Error("EIO: i/o error, read"), { code: "EIO" }));
    const broken = n.callsOn({ ...n.machine.host, readBytes });

    const stats = await broken.stats({ volumeId: volumeId(uuid), volumePath: n.target });

    assertAbnormal(stats, /cannot be read \(EIO: i\/o error, read\)/);
    assert.ok((stats.usage?.[0]?.total ?? 0n) > 0n);
  });
}

nodeTest("NodeGetVolumeStats reports a file system that fails statfs, with the size of the device", async () => {
  await using n = await published(mountCapability("ext4"));
  const broken = n.callsOn({ ...n.machine.host, usage: () => Promise.reject(new Error("EIO: i/o error, statfs")) });

  const stats = await broken.stats({ volumeId: volumeId(uuid), volumePath: n.target });

  assertAbnormal(stats, /^ext4 of .* at ".*\/pod" cannot be looked at \(EIO: i\/o error, statfs\)$/);
  assert.deepEqual(stats.usage?.map(({ unit, total }) => [unit, total]), [[Unit.BYTES, BigInt(64 * mib)]]);
});

/** A device and its mount, for asking the probe itself. */
async function deviceAndMount(n: Awaited<ReturnType<typeof published>>) {
  const device = await findDevice(n.machine.host, uuid);
  const mount = mountsAt(await mountTable(n.machine.host), n.target).at(-1);
  assert.ok(device !== undefined && mount !== undefined);
  return { device, mount };
}

nodeTest("a volume that does not answer is reported in time, and asked nothing more until it does", async () => {
  await using n = await published(mountCapability("ext4"));
  const { device, mount } = await deviceAndMount(n);
  const { host } = n.machine;
  const held = Promise.withResolvers<void>();
  let asked = 0;
  const options = {
    host: {
      ...host,
      usage: async (path: string) => {
        asked++;
        await held.promise;
        return await host.usage(path);
      },
    },
    longestAnswerMs: 100,
  };

  const answers = [];
  for (let round = 0; round < 3; round++) answers.push(await probeMount(options, callContext(), device, mount));

  for (const { usage, condition } of answers) {
    assert.equal(usage, undefined);
    assert.match(condition?.message ?? "", /^ext4 of .*nvme0n1 at ".*\/pod" has not answered for \d s$/);
  }
  assert.equal(asked, 1);
  held.resolve();
  const until = Date.now() + 10_000;
  for (;;) {
    const { condition } = await probeMount(options, callContext(), device, mount);
    if (condition === undefined) break;
    assert.ok(Date.now() < until, condition.message);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
});

nodeTest("a question about a volume that does not answer ends with its caller's deadline", async () => {
  await using n = await published(mountCapability("ext4"));
  const { device, mount } = await deviceAndMount(n);
  const host: Host = { ...n.machine.host, usage: () => new Promise(() => {}) };
  const caller = new AbortController();
  const asked = probeMount({ host }, callContext(caller.signal), device, mount);
  setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "Cannot finish in time")), 20);

  await rejects(asked, "DEADLINE_EXCEEDED", /Cannot finish in time/);
});

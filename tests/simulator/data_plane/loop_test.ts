import assert from "node:assert/strict";
import { join } from "node:path";
import { StatusError } from "../../../lib/error.ts";
import { Channel } from "../../../lib/grpc/client.ts";
import { createLogger } from "../../../lib/log.ts";
import { parseDiscoveryFile } from "../../../lib/simulator/data_plane/discovery_client.ts";
import type { SimVolume } from "../../../lib/simulator/lightos/model.ts";
import {
  defaultSimulateSettings,
  type LightosSimulatorSettings,
  simulate,
} from "../../../lib/simulator/lightos/simulator.ts";
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import { needs } from "../../support/needs.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");
const host = "nqn.2019-09.com.lightbitslabs:host:n1.node";
const mib = 1 << 20;
const project = "default";

Deno.test({
  name: "loop data plane shows a namespace as a device once its host is connected and on the access list",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await available(sim, "v1", 16);
    await connect(sim, volume.uuid);

    await grant(sim, volume, [host]);

    const name = await appeared(sim, volume.uuid);
    assert.equal(name, "nvme0n1");
    const attribute = (path: string) => Deno.readTextFile(join(sysfs(sim), "class/block", name, path));
    assert.equal(await attribute("wwid"), `uuid.${volume.uuid}\n`);
    assert.equal(await attribute("uuid"), `${volume.uuid}\n`);
    assert.equal(await attribute("size"), `${16 * mib / 512}\n`);
    assert.equal(await attribute("nsid"), `${volume.nsid}\n`);
    assert.equal(await attribute("hidden"), "0\n");
    assert.equal(await attribute("queue/logical_block_size"), "4096\n");
    assert.equal(await attribute("device/subsysnqn"), `${sim.addresses.subsystemNqn}\n`);
    for (const controller of ["nvme0", "nvme1", "nvme2"]) {
      assert.equal(await attribute(`device/${controller}/state`), "live\n");
      assert.equal(await attribute(`device/${controller}/hostnqn`), `${host}\n`);
    }
    assert.equal(await attribute("device/nvme1/address"), "traddr=127.0.0.2,trsvcid=4420,src_addr=127.0.0.1\n");
    assert.equal(await Deno.readTextFile(join(sysfs(sim), "class/block/nvme0c1n1/hidden")), "1\n");
    const number = (await attribute("dev")).trim();
    assert.equal(await Deno.realPath(join(sysfs(sim), "dev/block", number)), await realDevice(sim, name));
    const { rdev, isBlockDevice } = await Deno.stat(join(dev(sim), "disk/by-id", `nvme-uuid.${volume.uuid}`));
    assert.equal(isBlockDevice, true);
    assert.equal(`${(rdev ?? 0) >> 8}:${(rdev ?? 0) & 0xff}`, number);
  },
});

Deno.test({
  name: "loop data plane shows nothing to a host that is not on the access list",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await available(sim, "v1", 16);
    await connect(sim, volume.uuid);
    await grant(sim, volume, ["nqn.2019-09.com.lightbitslabs:host:other.node"]);

    await eventually("the host connects", () => sim.control.cluster.dataPlane.connectedHosts().length === 1);
    await sim.control.waitUntilSettled();

    assert.deepEqual(devices(sim), []);
    assert.deepEqual(sim.control.visible(host), []);
  },
});

Deno.test({
  name: "loop data plane takes the device away when access is revoked, and detaches the loop device",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    const [device] = sim.control.machine().devices;
    assert.ok(device);

    await grant(sim, volume, ["ALLOW_NONE"]);

    await sim.control.waitUntilSettled();
    assert.deepEqual(devices(sim), []);
    assert.deepEqual([...Deno.readDirSync(join(dev(sim), "disk/by-id"))], []);
    await assert.rejects(Deno.stat(device.path), Deno.errors.NotFound);
    assert.notEqual(backing(device.loop), join(content(sim), `volumes/${volume.uuid}.img`));
  },
});

Deno.test({
  name: "loop data plane gives a mounted device I/O errors when access is revoked, and keeps what was synced",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 32);
    await using mount = await mkfsAndMount(sim, volume);
    await Deno.writeTextFile(join(mount.path, "kept"), "synced");
    await command("sync", "-f", mount.path);

    await grant(sim, volume, ["ALLOW_NONE"]);
    await sim.control.waitUntilSettled();

    assert.deepEqual(devices(sim), []);
    const write = command("dd", "if=/dev/zero", `of=${mount.path}/lost`, "bs=4096", "count=1", "conv=fsync");
    await assert.rejects(write, /Input\/output error|Read-only file system/);
    await mount.unmount();
    await grant(sim, volume, [host]);
    const name = await appeared(sim, volume.uuid);
    await using again = await mountAt(join(dev(sim), name));
    assert.equal(await Deno.readTextFile(join(again.path, "kept")), "synced");
  },
});

Deno.test({
  name: "loop data plane does not give a new device the name of one that is still mounted",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 32);
    await using _mount = await mkfsAndMount(sim, volume);

    await grant(sim, volume, ["ALLOW_NONE"]);
    await sim.control.waitUntilSettled();
    await grant(sim, volume, [host]);

    assert.equal(await appeared(sim, volume.uuid), "nvme0n2");
  },
});

Deno.test({
  name: "loop data plane shows the new size when a volume grows, and takes writes there while it is mounted",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 32);
    await using _mount = await mkfsAndMount(sim, volume);

    await sim.control.cluster.updateVolume({ project, uuid: volume.uuid }, { size: String(64 * mib) }, undefined);
    await sim.control.waitUntilSettled();

    const size = await Deno.readTextFile(join(sysfs(sim), "class/block/nvme0n1/size"));
    assert.equal(size, `${64 * mib / 512}\n`);
    await poke(sim, volume, 64 * mib - 3, "end");
    assert.equal(await peek(sim, volume, 64 * mib - 3, 3), "end");
  },
});

Deno.test({
  name: "loop data plane gives a volume from a snapshot the content at the time of the snapshot",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const source = await attached(sim, "source", 16);
    await poke(sim, source, 0, "before");
    const { cluster } = sim.control;

    const snapshot = await cluster.createSnapshot({
      project,
      name: "s1",
      description: "",
      source: { uuid: source.uuid, name: "" },
      retentionMs: undefined,
    });
    await poke(sim, source, 0, "after!");
    await eventually("the snapshot is Available", () => snapshot.state === "Available");
    const clone = await available(sim, "clone", 32, snapshot.uuid);
    await grant(sim, clone, [host]);
    await appeared(sim, clone.uuid);

    assert.equal(await peek(sim, clone, 0, 6), "before");
    assert.equal(await peek(sim, source, 0, 6), "after!");
    assert.equal(await peek(sim, clone, 31 * mib, 2), "\0\0");
  },
});

Deno.test({
  name: "loop data plane rolls a volume back to a snapshot's content and size",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    await poke(sim, volume, 4096, "old");
    const { cluster } = sim.control;
    const snapshot = await snapshotOf(sim, volume, "s1");
    await poke(sim, volume, 4096, "new");
    await cluster.updateVolume({ project, uuid: volume.uuid }, { size: String(32 * mib) }, undefined);

    cluster.rollbackVolume({ project, uuid: volume.uuid }, { uuid: snapshot.uuid, name: "" });
    await eventually("the rollback ends", () => volume.state === "Available");
    await sim.control.waitUntilSettled();

    assert.equal(volume.sizeBytes, BigInt(16 * mib));
    assert.equal(await peek(sim, volume, 4096, 3), "old");
  },
});

Deno.test({
  name: "loop data plane finds the blocks that differ between two snapshots",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    await poke(sim, volume, 5 * 4096, "x");
    const base = await snapshotOf(sim, volume, "s1");
    await poke(sim, volume, 3 * mib, "y".repeat(8192));
    const newer = await snapshotOf(sim, volume, "s2");

    const runs = async (from: string | undefined) => {
      const found = [];
      const { dataPlane } = sim.control.cluster;
      for await (const { start, end } of dataPlane.changedRuns(newer.uuid, from, 4096, 0n)) found.push([start, end]);
      return found;
    };

    assert.deepEqual(await runs(base.uuid), [[768n, 770n]]);
    assert.deepEqual(await runs(undefined), [[5n, 6n], [768n, 770n]]);
  },
});

Deno.test({
  name: "management API lists changed blocks in bitmaps of 64, and goes on at an offset",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    const base = await snapshotOf(sim, volume, "s1");
    await poke(sim, volume, 65 * 4096, "x");
    await poke(sim, volume, 74 * 4096, "x");
    await poke(sim, volume, 4095 * 4096, "x");
    const newer = await snapshotOf(sim, volume, "s2");
    using channel = new Channel({ address: sim.addresses.grpc[0] ?? "" });
    const list = (offsetLBA: bigint) =>
      channel.call(
        DurosAPI.method.listChangedBlocks,
        { projectName: project, snapshotUUID: newer.uuid, baseSnapshotName: base.name, offsetLBA },
        { signal: AbortSignal.timeout(10_000), headers: { authorization: `Bearer ${sim.addresses.jwt}` } },
      );

    const all = await list(0n);
    const rest = await list(130n);

    const shape = ({ lbaRanges }: typeof all) =>
      lbaRanges.map(({ lbaStart, lbaEnd, dataBitMap }) => [lbaStart, lbaEnd, [...dataBitMap]]);
    const last = [4032n, 4095n, [0, 0, 0, 0, 0, 0, 0, 128]];
    assert.deepEqual(shape(all), [[64n, 127n, [2, 4, 0, 0, 0, 0, 0, 0]], last]);
    assert.deepEqual(shape(rest), [last]);
    assert.deepEqual([all.nextOffsetLBA, rest.nextOffsetLBA], [0n, 0n]);
  },
});

Deno.test({
  name: "loop data plane takes over its devices and mounts after a crash, and detaches those that no volume needs",
  ignore,
  async fn() {
    const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
    const script = join(import.meta.dirname ?? "", "../../support/crashing_simulator.ts");
    let mount: Mount | undefined;
    try {
      // A process of its own, as only a killed one leaves everything behind.
      const child = new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", script, stateDir, host],
        stdout: "piped",
      }).spawn();
      const { kept, gone, path } = JSON.parse(await firstLine(child.stdout));
      await command("mkfs.ext4", "-q", path);
      mount = await mountAt(path);
      await Deno.writeTextFile(join(mount.path, "hello"), "still here");
      child.kill("SIGKILL");
      await child.status;
      await forgetVolume(stateDir, gone.uuid);
      const settings: LightosSimulatorSettings = { ...defaultSimulateSettings, data: "loop", stateDir };

      const sim = await simulate(settings, createLogger("error"));
      try {
        const [device, ...others] = sim.control.machine().devices;

        assert.deepEqual(others, []);
        assert.deepEqual(device, kept);
        assert.equal(await Deno.readTextFile(join(mount.path, "hello")), "still here");
        assert.equal(backing(gone.loop)?.startsWith(stateDir) ?? false, false);
        await mount.unmount();
      } finally {
        await sim.stop();
      }
      // Detached when its last user has closed it; a tool of another program may have looked at it.
      await eventually("no loop device is left", () => loopsOf(stateDir).length === 0);
      assert.deepEqual([...Deno.readDirSync(join(stateDir, "dev"))], []);
    } finally {
      await mount?.[Symbol.asyncDispose]();
      for (const loop of loopsOf(stateDir)) await command("losetup", "-d", loop);
      await Deno.remove(stateDir, { recursive: true });
    }
  },
});

Deno.test({
  name: "loop data plane keeps contents and connections over a clean restart with a state directory",
  ignore,
  async fn() {
    const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
    try {
      let volume: SimVolume;
      {
        await using sim = await startSimulator({ data: "loop", stateDir });
        volume = await attached(sim, "v1", 16);
        await poke(sim, volume, 0, "kept");
      }
      // Detached when its last user has closed it; a tool of another program may have looked at it.
      await eventually("no loop device is left", () => loopsOf(stateDir).length === 0);

      await using sim = await startSimulator({ data: "loop", stateDir });

      assert.deepEqual(devices(sim), ["nvme0n1"]);
      assert.equal(await peek(sim, volume, 0, 4), "kept");
    } finally {
      await Deno.remove(stateDir, { recursive: true });
    }
  },
});

Deno.test({
  name: "loop data plane lets a volume go that is mounted, with I/O errors and without its file",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 32);
    await using mount = await mkfsAndMount(sim, volume);

    sim.control.cluster.deleteVolume({ project, uuid: volume.uuid }, undefined);
    await eventually("the volume is gone", () => sim.control.cluster.volumes.length === 0);

    assert.deepEqual(devices(sim), []);
    assert.deepEqual([...Deno.readDirSync(join(content(sim), "volumes"))], []);
    const write = command("dd", "if=/dev/zero", `of=${mount.path}/lost`, "bs=4096", "count=1", "conv=fsync");
    await assert.rejects(write, /Input\/output error|Read-only file system/);
  },
});

Deno.test({
  name: "simulate rejects directories that another simulator uses",
  ignore,
  async fn() {
    const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
    try {
      await using sim = await startSimulator({ data: "loop", stateDir });
      const { devRoot } = sim.addresses;

      for (const [what, settings] of [[stateDir, { stateDir }], [devRoot, { data: "loop", devRoot }]] as const) {
        await assert.rejects(startSimulator(settings), {
          name: "StatusError",
          code: "FAILED_PRECONDITION",
          message: `Cannot use ${what}: another simulator does, end it or use another one`,
        });
      }
    } finally {
      await Deno.remove(stateDir, { recursive: true });
    }
  },
});

Deno.test({
  name: "Machine.damage makes reads of the device fail, and heal reports whether it was written to",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    await poke(sim, volume, 0, "data");
    const machine = sim.control.machine();

    await machine.damage(volume.uuid, "unreadable");
    await assert.rejects(peek(sim, volume, 0, 4), /Input\/output error/);
    assert.deepEqual(await machine.heal(volume.uuid), { written: false });
    assert.equal(await peek(sim, volume, 0, 4), "data");

    await machine.damage(volume.uuid, "unreadable");
    const [device] = machine.devices;
    await command("dd", "if=/dev/zero", `of=${device?.path}`, "bs=4096", "count=1", "oflag=direct");
    assert.deepEqual(await machine.heal(volume.uuid), { written: true });
    assert.equal(await peek(sim, volume, 0, 4), "data");
  },
});

Deno.test({
  name: "Machine.damage makes a device of size zero",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);

    await sim.control.machine().damage(volume.uuid, "empty");

    assert.equal(await Deno.readTextFile(join(sysfs(sim), "class/block/nvme0n1/size")), "0\n");
    using file = await Deno.open(join(dev(sim), "nvme0n1"));
    assert.equal(await file.seek(0, Deno.SeekMode.End), 0);
  },
});

Deno.test({
  name: "Machine.remove and restore bring a device back under another name with its content",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const volume = await attached(sim, "v1", 16);
    await poke(sim, volume, 0, "data");

    await sim.control.machine().remove(volume.uuid);
    assert.deepEqual(devices(sim), []);
    const restored = await sim.control.machine().restore(volume.uuid);

    assert.equal(restored.name, "nvme0n2");
    assert.deepEqual(devices(sim), ["nvme0n2"]);
    assert.equal(await peek(sim, volume, 0, 4), "data");
  },
});

Deno.test({
  name: "Machine.swap gives two namespaces the name of each other",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const one = await attached(sim, "one", 16);
    const two = await attached(sim, "two", 16);
    await poke(sim, one, 0, "one");

    await sim.control.machine().swap(one.uuid, two.uuid);

    assert.equal(await Deno.readTextFile(join(sysfs(sim), "class/block/nvme0n1/uuid")), `${two.uuid}\n`);
    assert.equal(await Deno.readTextFile(join(sysfs(sim), "class/block/nvme0n2/uuid")), `${one.uuid}\n`);
    assert.equal(await peek(sim, one, 0, 3), "one");
  },
});

Deno.test({
  name: "loop data plane rejects a directory that holds something else",
  ignore,
  async fn() {
    await assert.rejects(
      startSimulator({ data: "loop", devRoot: "/dev" }),
      (error: unknown) => {
        assert.ok(error instanceof StatusError);
        assert.equal(error.code, "FAILED_PRECONDITION");
        assert.match(error.message, /^Cannot use data plane "loop": directory \/dev holds .*, an empty one/);
        return true;
      },
    );
  },
});

Deno.test({
  name: "Discovery-Client of the simulator ignores temporary names, bad files, changes in place and removals",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const { discoveryDir = "" } = sim.addresses;
    const file = (name: string) => join(discoveryDir, name);
    const line = (name: string) => entry(sim).replace(host, `nqn.x:${name}`);
    const place = async (name: string, text: string) => {
      await Deno.writeTextFile(file(`tmp.dc.${name}`), text);
      await Deno.rename(file(`tmp.dc.${name}`), file(name));
    };

    await Deno.writeTextFile(file("tmp.dc.unfinished"), line("unfinished"));
    await place("bad", `${line("bad")}${line("bad").replace("-n", "--nqn")}`);
    await place("good", line("good"));
    // One rename gives several events. They come in order: when the next file has been acted on, so have those before it.
    await place("next", line("next"));
    await eventually("both files are read", () => hostsOf(sim).includes("nqn.x:next"));
    await Deno.writeTextFile(file("good"), line("late"), { append: true });
    await Deno.remove(file("good"));
    await place("other", line("other"));
    await eventually("the other file is read", () => hostsOf(sim).includes("nqn.x:other"));

    assert.deepEqual(hostsOf(sim), ["nqn.x:good", "nqn.x:next", "nqn.x:other"]);
  },
});

Deno.test({
  name: "Discovery-Client of the simulator reads every file at its start, temporary names too",
  ignore,
  async fn() {
    const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
    try {
      {
        await using sim = await startSimulator({ data: "loop", stateDir });
        await Deno.writeTextFile(join(sim.addresses.discoveryDir ?? "", "tmp.dc.1"), entry(sim));
      }

      await using sim = await startSimulator({ data: "loop", stateDir });

      assert.deepEqual(hostsOf(sim), [host]);
    } finally {
      await Deno.remove(stateDir, { recursive: true });
    }
  },
});

Deno.test({
  name: "Discovery-Client of the simulator finds no subsystem at a wrong address or with a wrong NQN",
  ignore,
  async fn() {
    await using sim = await startSimulator({ data: "loop" });
    const { discoveryDir = "" } = sim.addresses;

    await Deno.writeTextFile(
      join(discoveryDir, "tmp.dc.1"),
      [
        entry(sim).replace("8009", "4420").replace(host, "nqn.x:port"),
        entry(sim).replace("127.0.0.1", "127.0.0.9").replace(host, "nqn.x:address"),
        entry(sim).replace(sim.addresses.subsystemNqn, "nqn.y:other").replace(host, "nqn.x:subsystem"),
        entry(sim).replace(host, "nqn.x:right"),
      ].join(""),
    );
    await Deno.rename(join(discoveryDir, "tmp.dc.1"), join(discoveryDir, "1"));
    await eventually("the file is read", () => hostsOf(sim).length > 0);

    assert.deepEqual(hostsOf(sim), ["nqn.x:right"]);
  },
});

Deno.test("parseDiscoveryFile reads options in every form and skips lines that lack one", () => {
  const { entries, skipped } = parseDiscoveryFile([
    "# all of it a comment",
    "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h -n nqn.s # and behind it",
    "--transport=tcp --traddr=2001:db8::1 --trsvcid=8009 --hostnqn=nqn.h --subsysnqn=nqn.s --hostid=id -p -l -1",
    "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h -n nqn.s",
    "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h",
    "",
  ].join("\n"));

  assert.deepEqual(entries, [
    { traddr: "192.0.2.1", trsvcid: "8009", hostNqn: "nqn.h", subsystemNqn: "nqn.s", hostId: undefined },
    { traddr: "2001:db8::1", trsvcid: "8009", hostNqn: "nqn.h", subsystemNqn: "nqn.s", hostId: "id" },
  ]);
  assert.deepEqual(skipped, ["line 5 has no subsysnqn"]);
});

for (
  const [what, line, problem] of [
    ["an unknown option", "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h --nqn nqn.s", /"--nqn" is not an option/],
    ["another transport", "-t rdma -a 192.0.2.1 -s 8009 -q nqn.h -n nqn.s", /bad transport/],
    ["a bad port", "-t tcp -a 192.0.2.1 -s 70000 -q nqn.h -n nqn.s", /bad trsvcid/],
    ["a bad address", "-t tcp -a 192.0.2.1/24 -s 8009 -q nqn.h -n nqn.s", /bad traddr/],
    ["an option without value", "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h -n", /-n has no value/],
    ["a bad time-out", "-t tcp -a 192.0.2.1 -s 8009 -q nqn.h -n nqn.s -l -2", /bad ctrl-loss-tmo/],
  ] as const
) {
  Deno.test(`parseDiscoveryFile rejects a whole file for ${what}`, () => {
    const good = "-t tcp -a 192.0.2.9 -s 8009 -q nqn.h -n nqn.s\n";

    assert.throws(() => parseDiscoveryFile(good + line), (error: unknown) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      assert.match(error.message, /^Cannot use line 2 /);
      assert.match(error.message, problem);
      return true;
    });
  });
}

// ------------------------------------------------------------------------------------------------------------ helpers

function dev(sim: TestSimulator): string {
  return sim.addresses.devRoot ?? "";
}

function sysfs(sim: TestSimulator): string {
  return sim.addresses.sysfsRoot ?? "";
}

function content(sim: TestSimulator): string {
  return join(dev(sim), "../content");
}

function devices(sim: TestSimulator): string[] {
  return [...Deno.readDirSync(join(sysfs(sim), "class/block"))].map(({ name }) => name)
    .filter((name) => /^nvme\d+n\d+$/.test(name));
}

function realDevice(sim: TestSimulator, name: string): Promise<string> {
  return Deno.realPath(join(sysfs(sim), "devices/virtual/nvme-subsystem/nvme-subsys0", name));
}

async function available(sim: TestSimulator, name: string, sizeMib: number, snapshot = ""): Promise<SimVolume> {
  const volume = await sim.control.cluster.createVolume({
    project,
    name,
    size: `${sizeMib} mib`,
    replicaCount: 1,
    compression: "",
    acl: undefined,
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: snapshot, name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
  });
  await eventually(`volume ${name} is Available`, () => volume.state === "Available");
  return volume;
}

async function snapshotOf(sim: TestSimulator, volume: SimVolume, name: string) {
  const source = { uuid: volume.uuid, name: "" };
  const request = { project, name, description: "", source, retentionMs: undefined };
  const snapshot = await sim.control.cluster.createSnapshot(request);
  await eventually(`snapshot ${name} is Available`, () => snapshot.state === "Available");
  return snapshot;
}

async function grant(sim: TestSimulator, volume: SimVolume, acl: readonly string[]): Promise<void> {
  await sim.control.cluster.updateVolume({ project, uuid: volume.uuid }, { acl }, undefined);
}

function hostsOf(sim: TestSimulator): string[] {
  return sim.control.cluster.dataPlane.connectedHosts().map(({ hostNqn }) => hostNqn);
}

function entry(sim: TestSimulator): string {
  return `-t tcp -a 127.0.0.1 -s 8009 -q ${host} -n ${sim.addresses.subsystemNqn}\n`;
}

async function connect(sim: TestSimulator, name: string): Promise<void> {
  const directory = sim.addresses.discoveryDir ?? "";
  await Deno.writeTextFile(join(directory, `tmp.dc.${name}`), entry(sim));
  await Deno.rename(join(directory, `tmp.dc.${name}`), join(directory, name));
}

function appeared(sim: TestSimulator, uuid: string): Promise<string> {
  return eventually("the device appears", async () => {
    await sim.control.waitUntilSettled();
    const device = sim.control.machine().devices.find((other) => other.uuid === uuid);
    return device?.name;
  });
}

async function attached(sim: TestSimulator, name: string, sizeMib: number): Promise<SimVolume> {
  const volume = await available(sim, name, sizeMib);
  await connect(sim, volume.uuid);
  await grant(sim, volume, [host]);
  await appeared(sim, volume.uuid);
  return volume;
}

function pathOf(sim: TestSimulator, volume: SimVolume): string {
  return sim.control.machine().devices.find(({ uuid }) => uuid === volume.uuid)?.path ?? "";
}

async function poke(sim: TestSimulator, volume: SimVolume, offset: number, text: string): Promise<void> {
  using file = await Deno.open(pathOf(sim, volume), { read: true, write: true });
  await file.seek(offset, Deno.SeekMode.Start);
  await file.write(new TextEncoder().encode(text));
  await file.syncData();
}

async function peek(sim: TestSimulator, volume: SimVolume, offset: number, length: number): Promise<string> {
  using file = await Deno.open(pathOf(sim, volume));
  await file.seek(offset, Deno.SeekMode.Start);
  const bytes = new Uint8Array(length);
  await file.read(bytes);
  return new TextDecoder().decode(bytes);
}

interface Mount extends AsyncDisposable {
  readonly path: string;
  unmount(): Promise<void>;
}

async function mountAt(device: string): Promise<Mount> {
  const path = await Deno.makeTempDir({ prefix: "lbcsi-test-mount-" });
  let mounted = false;
  const unmount = async () => {
    if (mounted) await command("umount", path);
    mounted = false;
  };
  const mount = {
    path,
    unmount,
    async [Symbol.asyncDispose]() {
      await unmount();
      await Deno.remove(path);
    },
  };
  await command("mount", device, path);
  mounted = true;
  return mount;
}

async function mkfsAndMount(sim: TestSimulator, volume: SimVolume): Promise<Mount> {
  await command("mkfs.ext4", "-q", pathOf(sim, volume));
  return await mountAt(pathOf(sim, volume));
}

async function command(program: string, ...args: string[]): Promise<void> {
  const { code, stderr } = await new Deno.Command(program, { args, env: { LC_ALL: "C" } }).output();
  if (code !== 0) throw new Error(`${program} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
}

function backing(loop: string): string | undefined {
  try {
    return Deno.readTextFileSync(`/sys/block/${loop.replace("/dev/", "")}/loop/backing_file`).trim();
  } catch {
    return undefined;
  }
}

function loopsOf(directory: string): string[] {
  return [...Deno.readDirSync("/sys/block")].map(({ name }) => `/dev/${name}`)
    .filter((loop) => backing(loop)?.startsWith(directory) ?? false);
}

async function firstLine(stream: ReadableStream<Uint8Array>): Promise<string> {
  let text = "";
  for await (const chunk of stream.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    if (text.includes("\n")) break;
  }
  return text;
}

/** Takes a volume out of a stopped simulator's memory, as if the deletion had ended just before the crash. */
async function forgetVolume(stateDir: string, uuid: string): Promise<void> {
  const file = join(stateDir, "cluster.json");
  const model = JSON.parse(await Deno.readTextFile(file));
  model.volumes = model.volumes.filter((volume: { uuid: string }) => volume.uuid !== uuid);
  await Deno.writeTextFile(file, JSON.stringify(model));
}

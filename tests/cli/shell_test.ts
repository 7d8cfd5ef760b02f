/** `lbcsi attach`, `detach` and `list`: their steps on a make-believe machine, and the programs on a simulated one. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type AttachRequest, attachVolume, type LocalMachine, type MountRequest } from "../../lib/cli/attach_volume.ts";
import { detachVolume } from "../../lib/cli/detach_volume.ts";
import { listAsJson, listAsText } from "../../lib/cli/list_report.ts";
import { listVolumes } from "../../lib/cli/list_volumes.ts";
import { describeCheck, findMissing } from "../../lib/cli/readiness.ts";
import { parseSecretFile } from "../../lib/cli/secret_file.ts";
import { createLogger, Secrets } from "../../lib/context.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { hostNqn, parseAddress, type TransportAddress } from "../../lib/namespace.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { CutOff, FakeHost } from "../support/fake_host.ts";
import { needs } from "../support/needs.ts";
import { callContext, rejects } from "../support/node_calls.ts";
import { poseidonParameters, startPoseidon } from "../support/poseidon.ts";
import { eventually, startSimulator, type TestSimulator } from "../support/simulator.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const nqn = "nqn.2019-09.com.example:cluster:1";
const us = hostNqn("n1.node");
const path = "/staging";
const mounting: MountRequest = { path, fsType: undefined, readOnly: false, format: true };

function addresses(...texts: readonly string[]): readonly TransportAddress[] {
  return texts.map(parseAddress).filter((address) => address !== undefined);
}

const place: AttachRequest = {
  namespace: {
    uuid,
    subsystemNqn: nqn,
    addresses: addresses("192.0.2.1:4420", "192.0.2.2:4420"),
    discovery: addresses("192.0.2.1:8009"),
  },
};

function machine(kind: "direct" | "discovery-client" = "direct") {
  const host = new FakeHost();
  const namespace = host.addNamespace(uuid, nqn);
  const attacher = kind === "direct"
    ? createDirectAttacher({ host, hostNqn: us, hostId: hostIdOf("n1.node"), locks: new KeyedLock() })
    : createDiscoveryClientAttacher({ host, hostNqn: us, directory: host.discoveryDirectory });
  const tools: LocalMachine = {
    host,
    attacher,
    hostNqn: us,
    discoveryDirectory: kind === "direct" ? host.discoveryDirectory : undefined,
  };
  return {
    host,
    namespace,
    tools,
    attach: (wanted: AttachRequest = place, mount?: MountRequest) => attachVolume(callContext(), tools, wanted, mount),
    detach: (wanted: AttachRequest = place, mountPath?: string) =>
      detachVolume(callContext(), tools, wanted, mountPath),
    list: (options: { uuid?: string; all?: boolean } = {}) =>
      listVolumes(callContext(), {
        host,
        uuid: options.uuid,
        all: options.all ?? false,
        discoveryDirectory: host.discoveryDirectory,
      }),
  };
}

Deno.test("attachVolume connects a known place and answers its device, once and again", async () => {
  const { host, attach } = machine();

  const { device, mount } = await attach();
  const again = await attach();

  assert.equal(device.path, "/dev/nvme0n1");
  assert.equal(device.uuid, uuid);
  assert.equal(mount, undefined);
  assert.deepEqual(again, { device, mount });
  assert.deepEqual(host.controllers.map(({ traddr, hostNqn }) => [traddr, hostNqn]), [
    ["192.0.2.1", us],
    ["192.0.2.2", us],
  ]);
});

Deno.test("attachVolume formats a blank volume only when --format asks for it", async () => {
  const { host, namespace, attach } = machine();

  await rejects(
    attach(place, { ...mounting, format: false }),
    "FAILED_PRECONDITION",
    /^Cannot mount namespace .* at "\/staging": \/dev\/nvme0n1 is blank, and none is made unless it is asked for$/,
  );
  assert.equal(namespace.content, undefined);
  assert.deepEqual(host.mounts, []);
  const { mount } = await attach(place, mounting);

  assert.deepEqual(mount, { path, fsType: "ext4", readOnly: false });
  assert.deepEqual(namespace.content, { fsType: "ext4", fsBytes: namespace.sizeBytes });
});

Deno.test("promise 1: attachVolume with --format mounts a file system that is there and leaves it as it is", async () => {
  const { host, namespace, attach } = machine();
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };

  await attach(place, mounting);

  assert.deepEqual(host.commands.filter((command) => command.startsWith("mkfs")), []);
  assert.equal(host.mounts[0]?.path, path);
});

Deno.test("attachVolume refuses a file system other than --fs says", async () => {
  const { namespace, attach } = machine();
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };

  await rejects(
    attach(place, { ...mounting, fsType: "xfs" }),
    "FAILED_PRECONDITION",
    /\/dev\/nvme0n1 holds ext4, the request wants xfs; it is never formatted again/,
  );
});

Deno.test("attachVolume does nothing when the directory to mount at is missing", async () => {
  const { host, attach } = machine();

  await rejects(
    attach(place, { ...mounting, path: "/staging/none" }),
    "FAILED_PRECONDITION",
    /^Cannot mount at "\/staging\/none": there is no such directory$/,
  );

  assert.deepEqual(host.commands, []);
});

for (const kind of ["direct", "discovery-client"] as const) {
  Deno.test(`detachVolume (${kind}) undoes attachVolume, once and again, also without it`, async () => {
    const { host, attach, detach } = machine(kind);
    await detach(place, path);
    await attach(place, mounting);

    await detach(place, path);
    await detach(place, path);

    assert.deepEqual(host.leftovers(), []);
    if (kind === "direct") assert.deepEqual(host.controllers, []);
  });

  Deno.test(`promise 8: attachVolume and detachVolume (${kind}), cut off at any call, converge when repeated`, async () => {
    let cuts = 0;
    for (const when of ["before", "after"] as const) {
      for (let at = 1;; at++) {
        const { host, namespace, attach, detach } = machine(kind);
        const attached = await survives(host, at, when, () => attach(place, mounting));
        const { device } = await attach(place, mounting);

        assert.equal(device.path, "/dev/nvme0n1");
        assert.deepEqual(host.mounts.map((mount) => mount.path), [path]);
        assert.ok(host.commands.filter((command) => command.startsWith("mkfs")).length <= 1);

        const detached = await survives(host, at, when, () => detach(place, path));
        await detach(place, path);

        assert.deepEqual(host.leftovers(), []);
        assert.ok(namespace.content);
        if (attached && detached) break;
        cuts++;
      }
    }
    assert.ok(cuts > 60, `${cuts}`);
  });
}

/** Whether `act` got through with the machine cut off at its `at`-th call; an error that is not the cut's is thrown. */
async function survives(host: FakeHost, at: number, when: "before" | "after", act: () => Promise<unknown>) {
  const last = host.calls + at;
  host.cut = { at: last, when };
  try {
    await act();
    return true;
  } catch (error) {
    if (!(error instanceof CutOff) && host.calls < last) throw error;
    return false;
  } finally {
    host.cut = undefined;
  }
}

Deno.test("detachVolume refuses while the volume is mounted anywhere else, and names the place", async () => {
  const { host, attach, detach } = machine();
  await attach(place, mounting);
  const [mount] = host.mounts;
  assert.ok(mount);
  host.mounts.push({ ...mount, path: "/pods/one" });

  await rejects(detach(), "FAILED_PRECONDITION", /\/dev\/nvme0n1 is in use by the mount at "\/staging", the mount at/);
  await rejects(
    detach(place, path),
    "FAILED_PRECONDITION",
    /^Cannot detach namespace .*: \/dev\/nvme0n1 is in use by the mount at "\/pods\/one"$/,
  );

  assert.deepEqual(host.mounts.map((mount) => mount.path), ["/pods/one"]);
  assert.equal(host.controllers.length, 2);
});

Deno.test("detachVolume (direct) leaves a connection that another volume needs", async () => {
  const { host, attach, detach } = machine();
  host.addNamespace(other, nqn);
  await attach();

  await detach();

  assert.equal(host.controllers.length, 2);
});

Deno.test("detachVolume (direct) drops a connection that shows no namespace any more", async () => {
  const { host, attach, detach } = machine();
  await attach();
  host.devices.splice(0);

  await detach();

  assert.deepEqual(host.controllers, []);
});

Deno.test("detachVolume (direct) refuses a volume that a Discovery-Client was told of", async () => {
  const { host, attach, detach } = machine();
  await attach();
  await host.replaceText(`${host.discoveryDirectory}/${uuid}`, "");

  await rejects(
    detach(),
    "FAILED_PRECONDITION",
    /asks the Discovery-Client to keep it connected.*--attach=discovery-c/,
  );

  assert.equal(host.devices.length, 1);
});

Deno.test("promise 4: detachVolume does not start an umount that would wait for a path", async () => {
  const { host, attach, detach } = machine();
  await attach(place, mounting);
  for (const controller of host.controllers) controller.state = "connecting";

  await rejects(
    detach(place, path),
    "UNAVAILABLE",
    /^Cannot detach namespace .*: \/dev\/nvme0n1 has no live path \(nvme0 connecting; nvme1 connecting\)/,
  );

  assert.deepEqual(host.commands.filter((command) => command.startsWith("umount")), []);
});

// ------------------------------------------------------------------------------------------------ with a real cluster

async function clusterVolume(simulator: TestSimulator, name = "v1", sizeMib = 64) {
  const volume = await simulator.control.cluster.createVolume({
    project: "default",
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
  return { volume, id: `mgmt:${simulator.addresses.grpc.join(",")}|nguid:${volume.uuid}|proj:default|scheme:grpc` };
}

function backendOf(simulator: TestSimulator) {
  return lightosBackend({
    log: createLogger("error"),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/nowhere",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "test",
    clusters: undefined,
  });
}

Deno.test("attachVolume asks the cluster for access, detachVolume gives it back, cut off anywhere", async () => {
  await using simulator = await startSimulator();
  await using backend = backendOf(simulator);
  const { volume, id } = await clusterVolume(simulator);
  const wanted: AttachRequest = { backend, volumeId: id, volumeContext: {}, secrets: new Secrets() };

  for (let at = 1, whole = false; !whole; at += 3) {
    const { host, attach, detach } = machine();
    host.addNamespace(volume.uuid, simulator.addresses.subsystemNqn);
    const attached = await survives(host, at, "after", () => attach(wanted, mounting));
    await attach(wanted, mounting);
    assert.deepEqual(volume.acl, [us]);

    const detached = await survives(host, at, "before", () => detach(wanted, path));
    await detach(wanted, path);
    assert.deepEqual(volume.acl.filter((nqn) => nqn === us), []);
    assert.deepEqual(host.leftovers(), []);
    whole = attached && detached;
  }
});

Deno.test("promise 7: attachVolume refuses a volume that another host may use, and names that host", async () => {
  await using simulator = await startSimulator();
  await using backend = backendOf(simulator);
  const { volume, id } = await clusterVolume(simulator);
  await simulator.control.cluster.updateVolume(
    { project: "default", uuid: volume.uuid },
    { acl: [hostNqn("n2.node")] },
    undefined,
  );
  const { host, attach } = machine();

  await rejects(
    attach({ backend, volumeId: id, volumeContext: {}, secrets: new Secrets() }),
    "FAILED_PRECONDITION",
    /n2\.node/,
  );

  assert.deepEqual(host.commands, []);
});

Deno.test("attachVolume and detachVolume work with a volume of PoseidonOS, whose place is in its attributes", async () => {
  await using simulator = await startPoseidon();
  await using backend = poseidonBackend({ log: createLogger("error") });
  const none = new Secrets();
  const volumeContext = poseidonParameters(simulator);
  const wish = { name: "pvc-1", requiredBytes: 1n << 30n, limitBytes: 0n, parameters: volumeContext };
  const volume = await backend.createVolume(callContext(), none, wish);
  const { host, tools, attach, detach } = machine();
  const wanted: AttachRequest = { backend, volumeId: volume.id, volumeContext, secrets: none };
  const place = await backend.grantAccess(callContext(), none, volume.id, {
    hostNqn: us,
    shared: false,
    volumeContext,
  });
  host.addNamespace(volume.uuid, place.subsystemNqn);
  await backend.revokeAccess(callContext(), none, volume.id, us);

  const { device } = await attach(wanted, mounting);
  assert.equal(device.uuid, volume.uuid);
  assert.deepEqual((await backend.getVolume(callContext(), none, volume.id)).hosts, [tools.hostNqn]);
  await detach(wanted, path);
  await detach(wanted, path);

  assert.deepEqual((await backend.getVolume(callContext(), none, volume.id)).hosts, []);
  assert.deepEqual(host.leftovers(), []);
});

// --------------------------------------------------------------------------------------------------------------- list

Deno.test("listVolumes shows device, paths, mounts, volumes asked for, and connections without a volume", async () => {
  const { host, attach, list } = machine();
  await attach(place, mounting);
  const [first] = host.controllers;
  assert.ok(first);
  first.state = "connecting";
  host.connect("nqn.2019-09.com.example:empty", us, "192.0.2.9");
  await host.replaceText(`${host.discoveryDirectory}/${other}`, "");

  const text = listAsText(await list());

  assert.equal(
    text,
    `VOLUME                                DEVICE        SIZE   FILE SYSTEM  SUBSYSTEM
${uuid}  /dev/nvme0n1  1 GiB  ext4         ${nqn}
  path   nvme0  192.0.2.1:4420  connecting  optimized
  path   nvme1  192.0.2.2:4420  live        optimized
  mount  /staging  ext4  rw
${other}  none          -      -            -
  asked for by /etc/discovery-client/discovery.d/${other}, but this machine has no device of it

CONNECTIONS WITHOUT A VOLUME
  nvme2  192.0.2.9:4420  live  -  nqn.2019-09.com.example:empty`,
  );
});

Deno.test("listVolumes as JSON has bytes as numbers and one volume when asked for one", async () => {
  const { host, attach, list } = machine();
  host.addNamespace(other, nqn);
  await attach();

  const { volumes, connections } = JSON.parse(listAsJson(await list({ uuid })));

  assert.equal(volumes.length, 1);
  assert.deepEqual(connections, []);
  const [{ paths, ...volume }] = volumes;
  assert.deepEqual(volume, {
    uuid,
    device: "/dev/nvme0n1",
    sizeBytes: 2 ** 30,
    subsystemNqn: nqn,
    holders: [],
    mounts: [],
  });
  assert.deepEqual(paths[0], {
    controller: "nvme0",
    address: "192.0.2.1:4420",
    state: "live",
    anaState: "optimized",
    hostNqn: us,
  });
});

Deno.test("listVolumes does not open a device without a live path", async () => {
  const { host, attach, list } = machine();
  await attach();
  for (const controller of host.controllers) controller.state = "connecting";
  host.commands.splice(0);

  const { volumes } = await list();

  assert.equal(volumes[0]?.fileSystem, undefined);
  assert.deepEqual(host.commands, []);
});

Deno.test("promise 29: listVolumes names the file system of a volume, not the RAID that one of its files looks like", async () => {
  const { host, namespace, attach, list } = machine();
  await attach();
  host.answers.set("blkid -p -n ext4,xfs,btrfs ", { stdout: "btrfs\n" });
  host.answers.set("blkid", { stdout: "nvidia_raid_member\n" });
  assert.equal((await list()).volumes[0]?.fileSystem, "btrfs");

  host.answers.set("blkid -p -n ext4,xfs,btrfs ", { code: 2 });
  host.answers.delete("blkid");
  namespace.content = { fsType: "swap", fsBytes: 0n };
  assert.equal((await list()).volumes[0]?.fileSystem?.includes("swap"), true);
});

Deno.test("listVolumes shows what another program connected only when it is asked for all", async () => {
  const { host, list } = machine();
  host.connect(nqn, "nqn.2014-08.org.nvmexpress:uuid:1");

  assert.deepEqual((await list()).volumes, []);
  assert.equal(listAsText(await list()), "lbcsi has nothing on this machine");
  assert.deepEqual((await list({ all: true })).volumes.map((volume) => volume.uuid), [uuid]);
});

Deno.test("listVolumes with another tree shows the dead mounts of that tree, and none of others", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-list-" });
  const [dev, sys, proc] = ["dev", "sys", "proc"].map((name) => join(directory, name));
  assert.ok(dev !== undefined && sys !== undefined && proc !== undefined);
  await Deno.mkdir(join(proc, "self"), { recursive: true });
  const mounts = [
    `30 22 259:7 / /mine rw shared:2 - ext4 ${dev}/nvme0n1 rw`,
    `31 22 259:8 / /another rw shared:2 - xfs /tmp/another/dev/nvme0n1 rw`,
    `32 22 259:9 / /machine rw shared:2 - ext4 /dev/nvme0n1 rw`,
  ];
  const listed = async (...more: readonly string[]) => {
    await Deno.writeTextFile(join(proc, "self/mountinfo"), [...mounts, ...more, ""].join("\n"));
    const host = createLinuxHost({ log: createLogger("error"), sysfsRoot: sys, devRoot: dev, procRoot: proc });
    const options = { host, uuid: undefined, all: false, discoveryDirectory: join(directory, "discovery.d") };
    return (await listVolumes(callContext(), options)).deadMounts.map(({ path }) => path);
  };

  assert.deepEqual(await listed(), ["/mine"]);
  // The kernel's own sysfs, at another place.
  assert.deepEqual(await listed(`34 22 0:20 / ${sys} rw shared:2 - sysfs sysfs rw`), [
    "/mine",
    "/another",
    "/machine",
  ]);
  await Deno.remove(directory, { recursive: true });
});

Deno.test("listAsText does not let a mount point's name steer the terminal", () => {
  const mount = { path: "/a\u001b[2J\u009b b", type: "filesystem", fileSystem: "ext4", readOnly: false } as const;

  const text = listAsText({ volumes: [], deadMounts: [{ ...mount, source: "/dev/nvme0n1" }], connections: [] });

  assert.match(text, /^ {2}"\/a\\u001b\[2J\\u009b b" {2}ext4 {2}rw {2}was \/dev\/nvme0n1$/m);
});

// ------------------------------------------------------------------------------------------------------- secret files

Deno.test("parseSecretFile reads key=value lines, and leaves the rest of a line as it is", () => {
  const text = "# token\njwt=a.b=c #d\r\n\n mgmt=1".replace(" mgmt", "mgmt");

  assert.deepEqual(parseSecretFile(text), { jwt: "a.b=c #d", mgmt: "1" });
  assert.deepEqual(parseSecretFile(""), {});
});

for (
  const [text, problem] of [
    ["jwt=1\nTOPSECRET", /^Cannot read the secrets: line 2 is not of the form key=value$/],
    ["=TOPSECRET", /line 1 is not of the form/],
    ["jwt: TOPSECRET", /line 1 is not of the form/],
    ["jwt=TOPSECRET\njwt=TOPSECRET", /line 2 gives "jwt" a second time$/],
  ] as const
) {
  Deno.test(`promise 10: parseSecretFile refuses ${JSON.stringify(text)} without showing it`, () => {
    assert.throws(() => parseSecretFile(text), (error) => {
      assert.ok(error instanceof Error);
      assert.match(error.message, problem);
      assert.doesNotMatch(error.message, /TOPSECRET/);
      return true;
    });
  });
}

// ------------------------------------------------------------------------------------------------------- the programs

const mainPath = fileURLToPath(new URL("../../main.ts", import.meta.url));

function lbcsi(args: readonly string[], env: Record<string, string> = {}): Deno.ChildProcess {
  return new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", mainPath, ...args],
    env: { NO_COLOR: "1", ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

async function ended(process: Deno.ChildProcess) {
  const { code, stdout, stderr } = await process.output();
  return { code, out: new TextDecoder().decode(stdout), err: new TextDecoder().decode(stderr) };
}

async function simulatedMachine() {
  const simulator = await startSimulator({ data: "loop" });
  const { discoveryDir = "", sysfsRoot = "", devRoot = "" } = simulator.addresses;
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-shell-" }));
  await Deno.writeTextFile(join(directory, "jwt"), simulator.addresses.jwt);
  await Deno.mkdir(join(directory, "mnt"));
  const roots = ["--discovery-dir", discoveryDir, "--sysfs", sysfsRoot, "--dev", devRoot];
  const us = ["--node-id", "n1.node", "--attach=discovery-client", "--jwt-path", join(directory, "jwt"), ...roots];
  return {
    simulator,
    directory,
    mnt: join(directory, "mnt"),
    roots,
    run: (...args: string[]) => ended(lbcsi([...args, ...us])),
    start: (args: string[], env: Record<string, string>) => lbcsi([...args, ...us], env),
    list: async (...args: string[]) => await ended(lbcsi(["list", ...roots, ...args])),
    async [Symbol.asyncDispose]() {
      const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
      for (const { path } of table.filter(({ path }) => path.startsWith(directory)).toReversed()) {
        await new Deno.Command("umount", { args: [path] }).output();
      }
      await simulator.stop();
      await Deno.remove(directory, { recursive: true });
    },
  };
}

const ignore = !needs("root", "loop", "mkfs.ext4");

Deno.test({
  name: "lbcsi attach, list and detach take a volume through its stay on a machine, and leave nothing",
  ignore,
  async fn() {
    await using m = await simulatedMachine();
    const { volume, id } = await clusterVolume(m.simulator);

    const blank = await m.run("attach", id, "--mount", m.mnt);
    assert.equal(blank.code, 1);
    assert.match(
      blank.err,
      /^lbcsi attach: Cannot mount namespace .* is blank, and none is made unless it is asked for/m,
    );

    const attached = await m.run("attach", id, "--mount", m.mnt, "--format");
    assert.equal(attached.err, "");
    assert.deepEqual([attached.code, attached.out], [0, `${m.simulator.addresses.devRoot}/nvme0n1 ${m.mnt}\n`]);
    await Deno.writeTextFile(join(m.mnt, "file"), "precious");
    const again = await m.run("attach", id, "--mount", m.mnt, "--format", "--json");
    const shown = JSON.parse(again.out);
    assert.deepEqual(shown.mount, { path: m.mnt, fsType: "ext4", readOnly: false });
    assert.equal(shown.uuid, volume.uuid);

    const listed = JSON.parse((await m.list("--json")).out);
    assert.equal(listed.volumes.length, 1);
    assert.equal(listed.volumes[0].fileSystem, "ext4");
    assert.equal(listed.volumes[0].sizeBytes, 64 << 20);
    assert.deepEqual(listed.volumes[0].mounts, [
      { path: m.mnt, type: "filesystem", fileSystem: "ext4", readOnly: false },
    ]);
    assert.ok(listed.volumes[0].paths.every(({ state }: { state: string }) => state === "live"));

    const busy = await m.run("detach", id);
    assert.equal(busy.code, 1);
    assert.match(busy.err, new RegExp(`is in use by the mount at "${m.mnt}"`));

    for (const _turn of ["first", "again"]) {
      assert.deepEqual(await m.run("detach", id, "--mount", m.mnt), { code: 0, out: "", err: "" });
    }
    assert.deepEqual(volume.acl.filter((nqn) => nqn === us), []);
    assert.deepEqual([...Deno.readDirSync(m.simulator.addresses.discoveryDir ?? "")], []);
    await eventually("the device goes", () => m.simulator.control.machine().devices.length === 0);
    assert.equal((await m.list("--uuid", volume.uuid)).code, 1);
  },
});

Deno.test({
  name: "promise 1: Ctrl-C during lbcsi attach lets a running mkfs end, exits with 130, and a repeat goes on",
  ignore,
  async fn() {
    await using m = await simulatedMachine();
    const { id } = await clusterVolume(m.simulator);
    const tools = join(m.directory, "tools");
    await Deno.mkdir(tools);
    // Says that it has begun, and waits in the middle for the test.
    await Deno.writeTextFile(
      join(tools, "mkfs.ext4"),
      `#!/bin/sh\ntouch '${tools}/begun'\nwhile [ ! -e '${tools}/go' ]; do sleep 0.05; done\n` +
        `PATH="\${PATH#*:}" exec mkfs.ext4 "$@"\n`,
      { mode: 0o755 },
    );
    const process = m.start(["attach", id, "--mount", m.mnt, "--format"], {
      PATH: `${tools}:${Deno.env.get("PATH")}`,
    });
    await eventually("mkfs begins", () => exists(join(tools, "begun")), 30_000);

    process.kill("SIGINT");
    await Deno.writeTextFile(join(tools, "go"), "");
    const { code, err } = await ended(process);

    assert.equal(code, 130, err);
    assert.match(err, /^lbcsi: Cannot attach the volume: interrupted, what has been done stays and may be repeated$/m);
    const [volume] = JSON.parse((await m.list("--json")).out).volumes;
    assert.equal(volume.fileSystem, "ext4", "mkfs has ended");
    assert.deepEqual(volume.mounts, []);
    assert.equal((await m.run("attach", id, "--mount", m.mnt)).code, 0);
    assert.equal((await m.run("detach", id, "--mount", m.mnt)).code, 0);
  },
});

// ------------------------------------------------------------------------------------- what a machine has to have

/** This machine without NVMe/TCP, for a process without rights. */
async function freshHost() {
  const proc = await Deno.makeTempDir({ prefix: "lbcsi-proc-" });
  await Deno.mkdir(join(proc, "self"));
  await Deno.writeTextFile(join(proc, "self/status"), "Name:\tlbcsi\nCapEff:\t0000000000000000\n");
  const linux = createLinuxHost({ log: createLogger("error"), procRoot: proc });
  return {
    ...linux,
    kindOf: (path: string) => /nvme/.test(path) ? Promise.resolve("absent" as const) : linux.kindOf(path),
    [Symbol.asyncDispose]: () => Deno.remove(proc, { recursive: true }),
  };
}

const notLoaded =
  "NVMe/TCP: the kernel module nvme_tcp is not loaded, and /dev/nvme-fabrics is missing -> modprobe nvme_tcp " +
  "on the host, and a file in /etc/modules-load.d so that it is loaded at each start";

Deno.test("promise 21: missingFor tells all that a fresh machine lacks, in the words of doctor, and runs nothing", async () => {
  await using host = await freshHost();
  const calm: Host = { ...host, run: () => Promise.reject(new Error("a program was run")) };
  const needs = { rights: true, nvme: true, programs: { "xfs tools": ["sh", "mkfs.nowhere"], "mount tools": ["sh"] } };

  assert.deepEqual((await findMissing(calm, needs)).map(describeCheck), [
    "rights: CAP_SYS_ADMIN, CAP_DAC_OVERRIDE, CAP_SYS_RESOURCE missing -> run it as root; in Kubernetes in a privileged " +
    "container",
    notLoaded,
    "xfs tools: mkfs.nowhere: it is not installed",
  ]);
  assert.deepEqual(await findMissing(host, { rights: false, nvme: false, programs: {} }), []);
});

Deno.test("missingFor asks no simulated machine for kernel modules", async () => {
  await using host = await freshHost();
  const simulated = { ...host, roots: { ...host.roots, sysfs: "/tmp/sys", dev: "/tmp/dev" } };

  assert.deepEqual(await findMissing(simulated, { rights: false, nvme: true, programs: {} }), []);
});

Deno.test("promise 21: lbcsi attach and detach say at once which tools are missing, before they do anything", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-shell-" });
  // A machine that is connected as this node.
  for (
    const [name, text] of Object.entries({
      subsysnqn: nqn,
      state: "live",
      transport: "tcp",
      hostnqn: hostNqn("n1.node"),
      address: "traddr=192.0.2.1,trsvcid=4420",
    })
  ) {
    await Deno.mkdir(join(directory, "sys/class/nvme/nvme0"), { recursive: true });
    await Deno.writeTextFile(join(directory, "sys/class/nvme/nvme0", name), text);
  }
  const roots = ["--sysfs", join(directory, "sys"), "--dev", join(directory, "dev")];
  const volume = ["--uuid", uuid, "--nqn", nqn, "--node-id", "n1.node", "--mount", directory];
  const run = (...args: string[]) => ended(lbcsi([...args, ...volume, ...roots], { PATH: directory }));

  const attached = await run("attach", "--address", "192.0.2.1", "--fs", "btrfs");
  const detached = await run("detach");

  for (const { code, err } of [attached, detached]) {
    assert.equal(code, 1, err);
    assert.match(err, /: this machine is not ready for it, .*nvme-cli: nvme: it is .*the package nvme-cli is needed/);
    assert.match(err, /; mount tools: mount: it is .*; umount: it is /);
  }
  assert.match(attached.err, /^lbcsi attach: Cannot attach the volume: .*btrfs tools: mkfs\.btrfs: it is /);
  assert.match(detached.err, /^lbcsi detach: Cannot detach the volume: /);
  await Deno.remove(directory, { recursive: true });
});

Deno.test("promise 21: lbcsi node and discovery-client log each problem of the machine once, while they serve", async () => {
  for (const command of ["node", "discovery-client"]) {
    const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-shell-" }));
    for (const name of ["bin", "dev", "sys", "discovery.d"]) await Deno.mkdir(join(directory, name));
    const endpoint = ["--node-id", "n1.node", "--endpoint", `unix://${directory}/csi.sock`];
    const process = lbcsi([
      command,
      ...["--sysfs", join(directory, "sys"), "--dev", join(directory, "dev")],
      ...["--discovery-dir", join(directory, "discovery.d")],
      ...command === "node" ? endpoint : [],
    ], { PATH: join(directory, "bin") });
    const lines: { event: string; level: string; name?: string; error?: string }[] = [];
    const reading = (async () => {
      let rest = "";
      for await (const part of process.stderr.pipeThrough(new TextDecoderStream())) {
        const whole = (rest + part).split("\n");
        rest = whole.pop() ?? "";
        for (const line of whole) lines.push(JSON.parse(line));
      }
    })();
    const problems = () => lines.filter(({ event }) => event === "found a problem with this machine");
    const expected = command === "node" ? "mount tools" : "nvme-cli";

    await eventually("it names the tools", () => problems().some(({ name }) => name === expected), 60_000);
    process.kill("SIGTERM");
    await reading;

    assert.equal((await process.status).code, 0);
    const names = problems().map(({ name }) => name);
    assert.equal(new Set(names).size, names.length);
    assert.equal(names.includes("NVMe/TCP"), false);
    const order = lines.map(({ event }) => event);
    assert.ok(
      order.findIndex((event) => /^(serves|watches)$/.test(event)) < order.indexOf("found a problem with this machine"),
    );
    await Deno.remove(directory, { recursive: true });
  }
});

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

for (
  const [args, message] of [
    [["attach"], /--node-id is missing/],
    [["attach", "--node-id", "n1"], /either VOLUME_ID or both --uuid and --nqn are needed/],
    [["attach", "--node-id", "n1", "mgmt:x", "--nqn", nqn], /either VOLUME_ID or both/],
    [
      ["attach", "--node-id", "n1", "--uuid", uuid, "--nqn", nqn],
      /--address is missing: with --nqn and --attach=direct/,
    ],
    [
      ["attach", "--node-id", "n1", "--uuid", uuid, "--nqn", nqn, "--attach", "discovery-client"],
      /--discovery is missing: with --nqn and --attach=discovery-client/,
    ],
    [["attach", "--node-id", "n1", "a", "b"], /Unexpected argument 'b'/],
    [["attach", "--node-id", "n1", "a", "--format"], /--fs, --format and --read-only are for --mount/],
    [["attach", "--node-id", "n1", "a", "--mount", "/m", "--format", "--read-only"], /exclude each other/],
    [
      ["attach", "--node-id", "n1", "--address", "a.example"],
      /--address "a\.example": "a\.example" is not an IP address/,
    ],
    [["attach", "--node-id", "n 1", "a"], /only letters, digits/],
    [["attach", "--node-id", "n1", "a", "--secrets", "/nonexistent"], /--secrets "\/nonexistent": /],
    [["detach", "--node-id", "n1", "--uuid", "x", "--nqn", nqn], /--uuid "x": is not a UUID/],
    [["completion"], /SHELL is missing/],
    [["completion", "csh"], /SHELL "csh": is not bash, zsh or fish/],
  ] as const
) {
  Deno.test(`lbcsi ${args.join(" ")} ends with status 2 and says why`, async () => {
    const { code, out, err } = await ended(lbcsi(args));

    assert.deepEqual([code, out], [2, ""], err);
    assert.match(err, message);
  });
}

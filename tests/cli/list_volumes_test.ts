import assert from "node:assert/strict";
import { join } from "node:path";
import { listAsJson, listAsText } from "../../lib/cli/list_report.ts";
import { listVolumes } from "../../lib/cli/list_volumes.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";
import {
  createFakeMachine,
  knownPlace,
  mountRequest,
  namespaceUuid,
  otherUuid,
  ownHostNqn,
  subsystemNqn,
} from "../support/fake_machine.ts";
import { callContext } from "../support/node_calls.ts";

Deno.test("listVolumes shows device, paths, mounts, volumes asked for, and connections without a volume", async () => {
  const { host, attach, list } = createFakeMachine();
  await attach(knownPlace, mountRequest);
  const [first] = host.controllers;
  assert.ok(first);
  first.state = "connecting";
  host.connect("nqn.2019-09.com.example:empty", ownHostNqn, "192.0.2.9");
  await host.replaceText(`${host.discoveryDirectory}/${otherUuid}`, "");

  const text = listAsText(await list());

  assert.equal(
    text,
    `VOLUME                                DEVICE        SIZE   FILE SYSTEM  SUBSYSTEM
${namespaceUuid}  /dev/nvme0n1  1 GiB  ext4         ${subsystemNqn}
  path   nvme0  192.0.2.1:4420  connecting  optimized
  path   nvme1  192.0.2.2:4420  live        optimized
  mount  /staging  ext4  rw
${otherUuid}  none          -      -            -
  asked for by /etc/discovery-client/discovery.d/${otherUuid}, but this machine has no device of it

CONNECTIONS WITHOUT A VOLUME
  nvme2  192.0.2.9:4420  live  -  nqn.2019-09.com.example:empty`,
  );
});

Deno.test("listVolumes as JSON has bytes as numbers and one volume when asked for one", async () => {
  const { host, attach, list } = createFakeMachine();
  host.addNamespace(otherUuid, subsystemNqn);
  await attach();

  const { volumes, connections } = JSON.parse(listAsJson(await list({ uuid: namespaceUuid })));

  assert.equal(volumes.length, 1);
  assert.deepEqual(connections, []);
  const [{ paths, ...volume }] = volumes;
  assert.deepEqual(volume, {
    uuid: namespaceUuid,
    device: "/dev/nvme0n1",
    sizeBytes: 2 ** 30,
    subsystemNqn,
    holders: [],
    mounts: [],
  });
  assert.deepEqual(paths[0], {
    controller: "nvme0",
    address: "192.0.2.1:4420",
    state: "live",
    anaState: "optimized",
    hostNqn: ownHostNqn,
  });
});

Deno.test("listVolumes does not open a device without a live path", async () => {
  const { host, attach, list } = createFakeMachine();
  await attach();
  for (const controller of host.controllers) controller.state = "connecting";
  host.commands.splice(0);

  const { volumes } = await list();

  assert.equal(volumes[0]?.fileSystem, undefined);
  assert.deepEqual(host.commands, []);
});

Deno.test("promise 29: listVolumes names the file system of a volume, not the RAID that one of its files looks like", async () => {
  const { host, namespace, attach, list } = createFakeMachine();
  await attach();
  host.answers.set("blkid -p -n ext4,xfs,btrfs ", { stdout: "btrfs\n" });
  host.answers.set("blkid", { stdout: "nvidia_raid_member\n" });
  assert.equal((await list()).volumes[0]?.fileSystem, "btrfs");

  host.answers.set("blkid -p -n ext4,xfs,btrfs ", { code: 2 });
  host.answers.delete("blkid");
  namespace.content = { fsType: "swap", fsBytes: 0n };
  assert.equal((await list()).volumes[0]?.fileSystem?.includes("swap"), true);
});

Deno.test("listVolumes shows the connections of other programs only with --all", async () => {
  const { host, list } = createFakeMachine();
  host.connect(subsystemNqn, "nqn.2014-08.org.nvmexpress:uuid:1");

  assert.deepEqual((await list()).volumes, []);
  assert.equal(listAsText(await list()), "lbcsi has nothing on this machine");
  assert.deepEqual((await list({ all: true })).volumes.map((volume) => volume.uuid), [namespaceUuid]);
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

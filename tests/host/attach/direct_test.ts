import assert from "node:assert/strict";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { createLogger } from "../../../lib/log.ts";
import type { RemoteNamespace } from "../../../lib/namespace.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

const nqn = "nqn.2019-09.com.example:cluster:1";

const hostNqn = "nqn.2019-09.com.lightbitslabs:host:n1.node";

const hostId = "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c";

const namespace: RemoteNamespace = {
  uuid,
  subsystemNqn: nqn,
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }],
  discovery: [
    { traddr: "192.0.2.2", trsvcid: "8009" },
    { traddr: "192.0.2.10", trsvcid: "8009" },
    { traddr: "2001:db8::1", trsvcid: "8009" },
    { traddr: "192.0.2.2", trsvcid: "8009" },
  ],
};

function directHost() {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  const attacher = createDirectAttacher({ host, hostNqn, hostId, locks: new KeyedLock() });
  const traddrs = () => host.controllers.map((controller) => controller.traddr);
  return { host, attacher, traddrs };
}

Deno.test("direct attach connects each I/O controller with both host names, and connects none twice", async () => {
  const { host, attacher, traddrs } = directHost();

  await attacher.attach(callContext(), namespace);
  await attacher.attach(callContext(), namespace);

  assert.deepEqual(traddrs(), ["192.0.2.1", "192.0.2.2"]);
  assert.equal(host.commands.length, 2);
  for (const command of host.commands) assert(command.includes(`--hostnqn=${hostNqn} --hostid=${hostId}`), command);
});

Deno.test("direct attach connects only what is missing, whatever the spelling of an address", async () => {
  const { host, attacher, traddrs } = directHost();
  host.connect(nqn, hostNqn, "2001:DB8:0::1");
  const addresses = [{ traddr: "2001:db8::1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }];

  await attacher.attach(callContext(), { ...namespace, addresses });

  assert.deepEqual(traddrs(), ["2001:DB8:0::1", "192.0.2.2"]);
});

Deno.test("direct attach succeeds with one connection and logs the failures of the others", async () => {
  const { host, attacher, traddrs } = directHost();
  const lines: string[] = [];
  const log = createLogger("warning", "json", (line) => lines.push(line));
  host.answers.set("nvme connect --transport=tcp --traddr=192.0.2.1", { code: 1, stderr: "Connection refused" });

  await attacher.attach(callContext(undefined, log), namespace);

  assert.deepEqual(traddrs(), ["192.0.2.2"]);
  assert.match(lines.join(), /could not connect.*192.0.2.1:4420: refused, nothing listens there/);
});

Deno.test("direct attach without any connection answers UNAVAILABLE with each address and reason", async () => {
  const { host, attacher } = directHost();
  host.answers.set("nvme connect --transport=tcp --traddr=192.0.2.1", { code: 1, stderr: "Connection refused" });
  host.answers.set("nvme connect --transport=tcp --traddr=192.0.2.2", { code: 1, stderr: "Input/output error" });

  await rejects(
    attacher.attach(callContext(), namespace),
    "UNAVAILABLE",
    /no I\/O controller of nqn.*\(192.0.2.1:4420: refused, nothing listens there; 192.0.2.2:4420: not allowed: .*n1.node\)/,
  );
});

for (const comparesHosts of [false, true]) {
  Deno.test(`direct attach connects beside another host NQN, with an nvme-cli that ${comparesHosts ? "" : "does not "}compare hosts`, async () => {
    const { host, attacher } = directHost();
    host.nvmeCliComparesHosts = comparesHosts;
    host.connect(nqn, "nqn.other", "192.0.2.1");
    host.connect(nqn, "nqn.other", "192.0.2.2");

    await attacher.attach(callContext(), namespace);
    await attacher.attach(callContext(), namespace);

    assert.deepEqual(host.controllers.map(({ hostNqn, hostId, traddr }) => [hostNqn, hostId, traddr]), [
      ["nqn.other", "", "192.0.2.1"],
      ["nqn.other", "", "192.0.2.2"],
      [hostNqn, hostId, "192.0.2.1"],
      [hostNqn, hostId, "192.0.2.2"],
    ]);
    await attacher.detach(callContext(), uuid);
    assert.deepEqual(host.controllers.map(({ hostNqn }) => hostNqn), ["nqn.other", "nqn.other"]);
  });
}

Deno.test("direct attach names the other host NQN at the address when the kernel refuses a connection beside it", async () => {
  const { host, attacher } = directHost();
  host.connect(nqn, "nqn.other", "192.0.2.1");
  host.connect(nqn, "nqn.other", "192.0.2.2");
  for (const address of ["192.0.2.1", "192.0.2.2"]) {
    host.answers.set(`connect ${address}`, { stderr: "Operation already in progress (os error 114)" });
  }

  const attached = attacher.attach(callContext(), namespace);

  await rejects(
    attached,
    "UNAVAILABLE",
    /nvme0 is connected there as host nqn.other, disconnect it first \(Operation already in progress/,
  );
});

Deno.test("direct attach connects to an address where a connection of ours is dead or being deleted, whatever nvme-cli says", async () => {
  for (const state of ["dead", "deleting", "deleting (no IO)"]) {
    const { host, attacher } = directHost();
    await attacher.attach(callContext(), namespace);
    for (const controller of host.controllers) controller.state = state;

    await attacher.attach(callContext(), namespace);

    const live = host.controllers.filter((controller) => controller.state === "live");
    assert.deepEqual(live.map(({ traddr }) => traddr), ["192.0.2.1", "192.0.2.2"], state);
  }
});

Deno.test("direct attach without an I/O controller answers FAILED_PRECONDITION", async () => {
  const attached = directHost().attacher.attach(callContext(), { ...namespace, addresses: [] });

  await rejects(attached, "FAILED_PRECONDITION", /the publish context names no I\/O controller/);
});

Deno.test("direct detach disconnects the last namespace of a subsystem, also a second time", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);

  await attacher.detach(callContext(), uuid);
  await attacher.detach(callContext(), uuid);

  assert.deepEqual([traddrs(), host.devices], [[], []]);
  assert.deepEqual(host.commands.slice(2), ["nvme disconnect --device=nvme0", "nvme disconnect --device=nvme1"]);
});

Deno.test("direct detach leaves a subsystem connected that shows another namespace here", async () => {
  const { host, attacher, traddrs } = directHost();
  host.addNamespace(other, nqn);
  await attacher.attach(callContext(), namespace);

  await attacher.detach(callContext(), uuid);

  assert.deepEqual([traddrs().length, host.devices.length], [2, 2]);
});

Deno.test("direct detach leaves connections of another host NQN alone", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  host.connect(nqn, "nqn.other", "192.0.2.3");

  await attacher.detach(callContext(), uuid);

  assert.deepEqual(traddrs(), ["192.0.2.3"]);
});

Deno.test("promise 3: direct detach refuses to disconnect a namespace that is mounted", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  const [device] = host.devices;
  assert(device);
  host.mounts.push({ path: "/pods/x", device, isNode: false, fsType: "ext4", readOnly: false, superReadOnly: false });

  await rejects(
    attacher.detach(callContext(), uuid),
    "FAILED_PRECONDITION",
    /nvme0n1 is in use by the mount at "\/pods\/x"/,
  );

  assert.equal(traddrs().length, 2);
});

Deno.test("promise 3: direct detach drops no foreign connection that has taken the name of one of ours meanwhile", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  const run = host.run.bind(host);
  host.run = async (program, args, options) => {
    const result = await run(program, args, options);
    if (args.includes("--device=nvme0")) {
      // The kernel gave up the second one while the first was on its way out, and another subsystem was connected.
      host.controllers.splice(0);
      for (const traddr of ["192.0.2.8", "192.0.2.9"]) host.connect("nqn.neighbour", hostNqn, traddr);
    }
    return result;
  };

  await attacher.detach(callContext(), uuid);

  assert.deepEqual(host.controllers.map(({ name }) => name), ["nvme0", "nvme1"]);
  assert.deepEqual(traddrs(), ["192.0.2.8", "192.0.2.9"]);
});

Deno.test("promise 3: direct detach leaves a connection that shows a namespace without a UUID, too", async () => {
  const { host, attacher, traddrs } = directHost();
  host.addNamespace(other, nqn);
  const readText = host.readText.bind(host);
  host.readText = (path) =>
    path === "/sys/class/block/nvme0n2/wwid" ? Promise.resolve("eui.0025385b71b00fd4\n") : readText(path);
  await attacher.attach(callContext(), namespace);

  await attacher.detach(callContext(), uuid);

  assert.deepEqual([traddrs().length, host.devices.length], [2, 2]);
});

Deno.test("direct attach of two volumes of a subsystem connects once per address", async () => {
  const { host, attacher } = directHost();
  host.addNamespace(other, nqn);

  await Promise.all([
    attacher.attach(callContext(), namespace),
    attacher.attach(callContext(), { ...namespace, uuid: other }),
  ]);

  assert.equal(host.commands.length, 2);
});

Deno.test("direct attach gives the settings of connections to nvme connect, and to sysfs what nvme-cli cannot set", async () => {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  const tuning = {
    controllerLossSeconds: -1,
    reconnectDelaySeconds: 2,
    keepAliveSeconds: 10,
    ioQueues: 4,
    queueSize: 64,
    fastIoFailSeconds: 30,
  };
  const attacher = createDirectAttacher({ host, hostNqn, hostId, locks: new KeyedLock(), tuning });

  await attacher.attach(callContext(), { ...namespace, addresses: namespace.addresses.slice(0, 1) });

  const [connect = "", set] = host.commands;
  assert.match(
    connect,
    / --ctrl-loss-tmo=-1 --reconnect-delay=2 --keep-alive-tmo=10 --nr-io-queues=4 --queue-size=64$/,
  );
  assert.equal(set, "echo 30 > /sys/class/nvme/nvme0/fast_io_fail_tmo");
});

Deno.test("promise 8: direct detach of a namespace whose device is gone drops the connections that show none any more", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  host.connect("nqn.other", "nqn.theirs", "192.0.2.9");
  host.devices.splice(0);

  await attacher.detach(callContext(), uuid);

  assert.deepEqual(traddrs(), ["192.0.2.9"]);
});

Deno.test("direct detach leaves connections alone while a call waits for another namespace over them", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  host.devices.splice(0);
  await attacher.attach(callContext(), { ...namespace, uuid: other });

  await attacher.detach(callContext(), uuid);
  assert.equal(traddrs().length, 2);
  await attacher.detach(callContext(), other);

  assert.deepEqual(traddrs(), []);
});

Deno.test("reconcile makes a connection again that the kernel has given up, and does nothing when none is lost", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  await attacher.reconcile?.(callContext());
  assert.equal(host.commands.length, 2);
  host.controllers.splice(0, 1);

  await attacher.reconcile?.(callContext());

  assert.deepEqual(traddrs(), ["192.0.2.2", "192.0.2.1"]);
});

Deno.test("reconcile of a new process makes again what it has seen connected", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  const next = createDirectAttacher({ host, hostNqn, hostId, locks: new KeyedLock() });
  await next.reconcile?.(callContext());
  host.controllers.splice(1, 1);

  await next.reconcile?.(callContext());

  assert.deepEqual(traddrs(), ["192.0.2.1", "192.0.2.2"]);
});

Deno.test("reconcile leaves alone what was detached, and what has no device any more", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  host.controllers.splice(0);
  host.devices.splice(0);
  await attacher.reconcile?.(callContext());
  assert.deepEqual(traddrs(), []);
  await attacher.attach(callContext(), namespace);
  await attacher.detach(callContext(), uuid);

  await attacher.reconcile?.(callContext());

  assert.deepEqual(traddrs(), []);
});

Deno.test("promise 8: reconcile drops connections that have shown no namespace twice, and no others", async () => {
  const { host, attacher, traddrs } = directHost();
  await attacher.attach(callContext(), namespace);
  host.connect("nqn.other", "nqn.theirs", "192.0.2.9");
  await attacher.reconcile?.(callContext());
  await attacher.detach(callContext(), other);
  host.devices.splice(0);

  await attacher.reconcile?.(callContext());
  assert.equal(traddrs().length, 3);
  await attacher.reconcile?.(callContext());

  assert.deepEqual(traddrs(), ["192.0.2.9"]);
});

/** Connections that do not heal by themselves: what the direct attacher and the discovery client do about them. */
import assert from "node:assert/strict";
import { createDiscoveryDaemon } from "../../../lib/discovery/daemon.ts";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { discoveryNqn } from "../../../lib/host/nvme/controllers.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { createLogger } from "../../../lib/log.ts";
import { hostNqn, type RemoteNamespace } from "../../../lib/namespace.ts";
import { type Controller, FakeHost } from "../../support/fake_host.ts";
import { callContext } from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const nqn = "nqn.2019-09.com.example:cluster:1";
const us = hostNqn("n1.node");
const hostId = "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c";
const namespace: RemoteNamespace = {
  uuid,
  subsystemNqn: nqn,
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }],
  discovery: [],
};

interface Line {
  readonly level: string;
  readonly event: string;
  readonly name?: string;
  readonly error?: string;
}

/** A machine whose connections are looked after, a look every ten seconds of its own clock. */
interface Looked {
  readonly host: FakeHost;
  readonly lines: Line[];
  /** What was done to connections during so many looks: nvme commands and connections by the kernel, shortened. */
  look(times: number): Promise<readonly string[]>;
  controller(name: string): Controller;
}

function lookedAfter(host: FakeHost, lines: Line[], lookOnce: () => Promise<void>): Looked {
  return {
    host,
    lines,
    async look(times) {
      host.commands.splice(0);
      for (let turn = 0; turn < times; turn++) await lookOnce();
      return host.commands.splice(0).flatMap((command) => {
        if (/^nvme (ns-rescan|reset|disconnect) /.test(command)) return [command.replace(/ \/dev\/| --device=/, " ")];
        const traddr = /traddr=([^, ]+)/.exec(command)?.[1];
        if (command.startsWith("nvme connect")) return [`connect ${traddr}`];
        if (!command.startsWith("/dev/nvme-fabrics")) return [];
        return [`connect ${traddr}${command.includes("duplicate_connect") ? " beside" : ""}`];
      });
    },
    controller(name) {
      const found = host.controllers.find((controller) => controller.name === name);
      assert.ok(found, name);
      return found;
    },
  };
}

async function directAttacher(uuids: readonly string[] = [uuid]) {
  const host = new FakeHost();
  for (const uuid of uuids) host.addNamespace(uuid, nqn);
  const lines: Line[] = [];
  const log = createLogger("info", "json", (line) => void lines.push(JSON.parse(line)));
  const locks = new KeyedLock();
  const attacher = createDirectAttacher({ host, hostNqn: us, hostId, locks });
  for (const uuid of uuids) await attacher.attach(callContext(), { ...namespace, uuid });
  return {
    ...lookedAfter(host, lines, async () => await attacher.reconcile?.(callContext(undefined, log))),
    attacher,
    locks,
  };
}

async function daemon(uuids: readonly string[] = [uuid]) {
  const host = new FakeHost();
  host.playsDiscoveryClient = false;
  for (const uuid of uuids) host.addNamespace(uuid, nqn);
  const records = namespace.addresses.map(({ traddr }) => ({ address: `${traddr}:4420`, subsystemNqn: nqn }));
  host.logPages.set("192.0.2.1:8009", { generation: 1, records });
  const lines: Line[] = [];
  let ms = 0;
  const client = createDiscoveryDaemon({
    host,
    directory: host.discoveryDirectory,
    log: createLogger("info", "json", (line) => void lines.push(JSON.parse(line))),
    pollMs: 10_000,
    controllerLossSeconds: 600,
    keepAliveSeconds: 10,
    ioQueues: undefined,
    now: () => ms,
  });
  for (const uuid of uuids) {
    await host.replaceText(
      `${host.discoveryDirectory}/${uuid}`,
      `-t tcp -a 192.0.2.1 -s 8009 -q ${us} -n ${nqn}\n`,
    );
  }
  const lookOnce = async () => {
    ms += 10_000;
    await client.look();
    await client.idle();
  };
  for (let turn = 0; turn < 3; turn++) await lookOnce();
  return lookedAfter(host, lines, lookOnce);
}

/** Names of the connections to I/O controllers, by the order of `namespace.addresses`. */
function namesOf({ host }: Looked): readonly [string, string] {
  const [first, second] = namespace.addresses.map(({ traddr }) =>
    host.controllers.find((controller) => controller.traddr === traddr && controller.subsystemNqn === nqn)?.name
  );
  assert.ok(first !== undefined && second !== undefined);
  return [first, second];
}

const events = (lines: readonly Line[]) =>
  lines.map(({ event, name }) => name === undefined ? event : `${name} ${event}`);

for (const [who, machine] of [["reconcile", directAttacher], ["the daemon", daemon]] as const) {
  Deno.test(`${who} does nothing about connections on which all is well, whatever ANA says of some`, async () => {
    const looked = await machine([uuid, other]);
    const [first] = namesOf(looked);
    // A server that has no replica of these volumes.
    looked.host.anaStates.set(first, "inaccessible");

    assert.deepEqual(await looked.look(200), []);
  });

  Deno.test(`${who} rescans the connection whose announcement of a path was lost, and no other`, async () => {
    const looked = await machine();
    const [first, second] = namesOf(looked);
    await looked.look(1);
    looked.host.hidden.set(`${second} ${uuid}`, "lost");

    assert.deepEqual(await looked.look(2), []);
    assert.deepEqual(await looked.look(200), [`nvme ns-rescan ${second}`]);
    assert.notEqual(first, second);
    assert.ok(events(looked.lines).includes(`${second} asks for the namespaces of a connection again`));
  });

  Deno.test(`${who} rescans live connections for a namespace that went, and it comes back`, async () => {
    const looked = await machine([uuid, other]);
    const { host } = looked;
    const [first, second] = namesOf(looked);
    await looked.look(1);
    for (const name of [first, second]) host.hidden.set(`${name} ${other}`, "lost");
    host.devices.splice(host.devices.findIndex((device) => device.namespace.uuid === other), 1);

    const done = await looked.look(30);

    assert.deepEqual(done, [`nvme ns-rescan ${first}`, `nvme ns-rescan ${second}`]);
    assert.equal(host.devices.length, 2);
  });

  Deno.test(`promise 2: ${who} resets nothing for a namespace that was withdrawn while others are in use, and stops rescanning`, async () => {
    const looked = await machine([uuid, other]);
    const { host } = looked;
    const names = namesOf(looked);
    await looked.look(1);
    for (const name of names) host.hidden.set(`${name} ${other}`, "withdrawn");
    host.devices.splice(host.devices.findIndex((device) => device.namespace.uuid === other), 1);

    const done = await looked.look(900);

    assert.deepEqual(new Set(done), new Set(names.map((name) => `nvme ns-rescan ${name}`)));
    assert.equal(done.length, 16);
    assert.deepEqual(await looked.look(200), []);
    const last = "does no more about this connection unless something else goes wrong with it";
    assert.deepEqual(
      events(looked.lines).filter((event) => event.endsWith(last)).sort(),
      names.map((name) => `${name} ${last}`),
    );
  });

  Deno.test(`${who} resets one connection after the other when a volume has no usable path for long, and stops when it has`, async () => {
    const looked = await machine();
    const { host } = looked;
    const [first, second] = namesOf(looked);
    for (const name of [first, second]) host.anaStates.set(name, "inaccessible");
    host.onReset = ({ name }) => name === second && host.anaStates.set(name, "optimized");

    assert.deepEqual(await looked.look(6), []);
    assert.deepEqual(await looked.look(1), [`nvme reset ${first}`]);
    assert.deepEqual(await looked.look(100), [`nvme reset ${second}`]);
    const [line] = looked.lines.filter(({ event }) => event === "resets a connection that gives no usable path");
    assert.match(line?.error ?? "", new RegExp(`^namespace ${uuid} has had no usable path for \\d+ s, and this`));
    assert.equal(line?.level, "warning");
  });

  Deno.test(`${who} resets with longer and longer pauses, a limited number of times`, async () => {
    const looked = await machine();
    const { host } = looked;
    const [first, second] = namesOf(looked);
    for (const name of [first, second]) host.anaStates.set(name, "inaccessible");
    const at: number[] = [];
    for (let turn = 0; turn < 900; turn++) {
      const done = await looked.look(1);
      assert.ok(done.length <= 1, `at once: ${done.join(", ")}`);
      if (done.includes(`nvme reset ${first}`)) at.push(turn);
    }

    const pauses = at.slice(1).map((turn, index) => turn - (at[index] ?? 0));
    assert.deepEqual(pauses, [...pauses].sort((a, b) => a - b));
    assert.equal(at.length, 8);
    assert.ok((pauses.at(-1) ?? 0) >= 180, pauses.join());
  });

  Deno.test(`promise 2: ${who} never resets a connection that carries another namespace, nor one of another host`, async () => {
    const looked = await machine([uuid, other]);
    const { host } = looked;
    const [first, second] = namesOf(looked);
    const { subsystemNqn, trsvcid } = looked.controller(first);
    const theirs = { hostNqn: "nqn.2014-08.org.nvmexpress:uuid:1", hostId: "", traddr: "192.0.2.7" };
    host.addController({ ...theirs, subsystemNqn, trsvcid, state: "live" });
    const foreign = host.controllers.at(-1)?.name ?? "";
    host.anaStates.set(first, "inaccessible");
    host.anaStates.set(foreign, "inaccessible");
    // The second one carries the other namespace only.
    host.hidden.set(`${second} ${uuid}`, "withdrawn");

    const done = await looked.look(100);

    assert.deepEqual(done.filter((command) => command.endsWith(foreign)), []);
    assert.deepEqual(new Set(done.filter((command) => /reset/.test(command))), new Set([`nvme reset ${first}`]));
  });

  Deno.test(`${who} goes on after a reset that fails or hangs`, async () => {
    const looked = await machine();
    const { host } = looked;
    for (const name of namesOf(looked)) host.anaStates.set(name, "inaccessible");
    host.answers.set("nvme reset", { code: 1, stderr: "Reset: Network dropped connection on reset\n" });

    assert.equal((await looked.look(30)).length > 2, true);
    assert.ok(looked.lines.some(({ error }) => error === "exit 1 Reset: Network dropped connection on reset"));
  });

  Deno.test(`${who} connects beside a connection that does not come back, and drops it when it is replaced`, async () => {
    for (const state of ["connecting", "resetting"]) {
      const looked = await machine();
      const { host } = looked;
      const [, second] = namesOf(looked);
      looked.controller(second).state = state;

      assert.deepEqual(await looked.look(12), []);
      const done = await looked.look(100);

      // What is resetting is in the hands of the kernel, which may not release it.
      const dropped = state === "connecting" ? [`nvme disconnect ${second}`] : [];
      assert.deepEqual(done, ["connect 192.0.2.2 beside", ...dropped]);
      const live = host.controllers.filter((controller) =>
        controller.traddr === "192.0.2.2" && controller.state === "live"
      );
      assert.equal(live.length, 1);
      assert.equal(live[0]?.hostNqn, us);
    }
  });

  Deno.test(`promise 2: ${who} leaves connections alone whose addresses accept no other, and stops trying`, async () => {
    const looked = await machine();
    const { host } = looked;
    for (const name of namesOf(looked)) looked.controller(name).state = "connecting";
    for (const { traddr } of namespace.addresses) {
      host.answers.set(`connect ${traddr}`, { stderr: "Connection refused (os error 111)" });
    }

    const done = await looked.look(1000);

    assert.deepEqual(done.filter((command) => command.includes("disconnect")), []);
    assert.equal(done.length, 16);
    assert.ok(looked.lines.some(({ error }) => error === "refused, nothing listens there"));
    assert.deepEqual(await looked.look(200), []);
  });

  Deno.test(`${who} makes a connection again that is dead or stays in deletion`, async () => {
    for (const state of ["dead", "deleting", "deleting (no IO)"]) {
      const looked = await machine();
      const [, second] = namesOf(looked);
      looked.controller(second).state = state;

      // nvme-cli takes the dead one for a connection, the kernel does not.
      assert.deepEqual(await looked.look(20), ["connect 192.0.2.2", "connect 192.0.2.2"], state);
      assert.deepEqual(
        looked.host.controllers.filter(({ traddr }) => traddr === "192.0.2.2").map(({ state }) => state),
        [state, "live"],
      );
    }
  });

  Deno.test(`${who} makes no second connection without native multipath, because it would be a second device`, async () => {
    const looked = await machine();
    const { host } = looked;
    host.multipath = false;
    const [first, second] = namesOf(looked);
    looked.controller(second).state = "connecting";

    assert.deepEqual(await looked.look(100), []);
    assert.notEqual(first, second);
  });
}

Deno.test("reconcile does nothing about a namespace that was detached, when the cluster takes it away", async () => {
  const { attacher, look, host } = await directAttacher([uuid, other]);
  await look(3);
  await attacher.detach(callContext(), other);
  await look(3);
  host.remote.splice(host.remote.findIndex((namespace) => namespace.uuid === other), 1);
  host.devices.splice(host.devices.findIndex((device) => device.namespace.uuid === other), 1);

  assert.deepEqual(await look(100), []);
});

Deno.test("the daemon does nothing about a namespace whose file was removed, when the cluster takes it away", async () => {
  const { look, host } = await daemon([uuid, other]);
  await look(3);
  await host.remove(`${host.discoveryDirectory}/${other}`);
  await look(3);
  host.remote.splice(host.remote.findIndex((namespace) => namespace.uuid === other), 1);
  host.devices.splice(host.devices.findIndex((device) => device.namespace.uuid === other), 1);

  assert.deepEqual(await look(100), []);
});

Deno.test("reconcile rescans and resets live connections that do not show what a volume waits for, and then stops", async () => {
  const { host, look, attacher } = await directAttacher([]);
  host.addNamespace(uuid, nqn);
  for (const name of ["nvme0", "nvme1"]) host.hidden.set(`${name} ${uuid}`, "withdrawn");
  await attacher.attach(callContext(), namespace);

  const done = await look(1000);

  for (const what of ["ns-rescan nvme0", "ns-rescan nvme1", "reset nvme0", "reset nvme1"]) {
    assert.equal(done.filter((command) => command === `nvme ${what}`).length, 8, what);
  }
  assert.equal(done.length, 32);
  assert.equal(host.controllers.length, 2);
  await attacher.detach(callContext(), uuid);
  assert.deepEqual(host.controllers, []);
});

Deno.test("reconcile of a new process heals what it finds connected", async () => {
  const { host } = await directAttacher();
  const attacher = createDirectAttacher({ host, hostNqn: us, hostId, locks: new KeyedLock() });
  for (const { name } of host.controllers) host.anaStates.set(name, "inaccessible");
  host.onReset = ({ name }) => host.anaStates.set(name, "optimized");
  host.commands.splice(0);

  for (let turn = 0; turn < 10; turn++) await attacher.reconcile?.(callContext());

  assert.deepEqual(host.commands, ["nvme reset /dev/nvme0"]);
});

Deno.test("promise 2: reconcile drops no connection whose namespace the one beside it does not lead to", async () => {
  const { host, look, controller } = await directAttacher();
  controller("nvme0").state = "connecting";
  controller("nvme1").state = "connecting";
  host.anaStates.set("nvme2", "inaccessible");
  host.anaStates.set("nvme3", "inaccessible");

  const done = await look(13);

  assert.deepEqual(done, ["connect 192.0.2.1 beside"]);
  assert.deepEqual(host.controllers.map(({ name, state }) => `${name} ${state}`), [
    "nvme0 connecting",
    "nvme1 connecting",
    "nvme2 live",
  ]);
});

Deno.test("reconcile does not connect beside what is being detached", async () => {
  const { host, attacher, look, controller, locks } = await directAttacher();
  controller("nvme1").state = "connecting";
  await look(12);
  const held = await locks.wait(`subsystem ${nqn}`, "test", new AbortController().signal);
  const detached = attacher.detach(callContext(), uuid);
  const looked = look(1);
  held[Symbol.dispose]();
  await detached;

  assert.deepEqual((await looked).filter((command) => command.startsWith("connect")), []);
  assert.deepEqual(host.controllers, []);
});

Deno.test("the daemon replaces a discovery connection that does not come back", async () => {
  const { host, look } = await daemon();
  const old = host.controllers.find(({ subsystemNqn }) => subsystemNqn === discoveryNqn);
  assert.ok(old);
  old.state = "connecting";

  assert.deepEqual(await look(12), []);
  const done = await look(10);

  assert.deepEqual(done, ["connect 192.0.2.1 beside", `nvme disconnect ${old.name}`]);
  const left = host.controllers.filter(({ subsystemNqn }) => subsystemNqn === discoveryNqn);
  assert.deepEqual(left.map(({ state, name }) => [state, name === old.name]), [["live", false]]);
});

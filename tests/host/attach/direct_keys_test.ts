/**
 * The direct attacher with keys (in-band authentication), on a fake machine: what the kernel gets, which connections are
 * replaced, and what fails. What a real kernel does with it: tests/vm/scenarios/authentication.ts.
 */
import assert from "node:assert/strict";
import { DhchapKey } from "../../../lib/auth_key.ts";
import { hostIdOf } from "../../../lib/host/attach/attacher.ts";
import { CutOff } from "../../support/fake_host.ts";
import { keyMachine, newKeys, nodeId, nodeNqn, other, place, revealKeys } from "../../support/key_machine.ts";
import { subsystemNqn as nqn } from "../../support/loop_machine.ts";
import { rejects } from "../../support/node_calls.ts";

// ----------------------------------------------------------------------------------------------------------- connecting

for (const kind of ["unidirectional", "bidirectional"] as const) {
  Deno.test(`direct attach with keys (${kind}) connects each address in one write, with no command, once`, async () => {
    const keys = newKeys(kind);
    const { host, attacher, connected, call } = keyMachine(keys);

    await attacher.attach(call(), place, keys);
    await attacher.attach(call(), place, keys);

    assert.deepEqual(connected(), [["192.0.2.1", revealKeys(keys)], ["192.0.2.2", revealKeys(keys)]]);
    const ctrl = kind === "bidirectional" ? ",dhchap_ctrl_secret=KEY" : "";
    assert.deepEqual(
      host.commands,
      ["192.0.2.1", "192.0.2.2"].map((traddr) =>
        `/dev/nvme-fabrics: nqn=${nqn},transport=tcp,traddr=${traddr},trsvcid=4420,hostnqn=${nodeNqn},hostid=${
          hostIdOf(nodeId)
        },dhchap_secret=KEY${ctrl}`
      ),
    );
  });
}

Deno.test("direct attach gives the kernel all settings of a connection with keys too", async () => {
  const keys = newKeys();
  const tuning = {
    controllerLossSeconds: -1,
    reconnectDelaySeconds: 2,
    keepAliveSeconds: 10,
    ioQueues: 4,
    queueSize: 64,
    fastIoFailSeconds: 30,
  };
  const { host, attacher, call } = keyMachine(keys, { tuning });

  await attacher.attach(call(), place, keys);

  assert.match(
    host.commands[0] ?? "",
    /,ctrl_loss_tmo=-1,reconnect_delay=2,keep_alive_tmo=10,fast_io_fail_tmo=30,nr_io_queues=4,queue_size=64,dhchap_secret=KEY$/,
  );
});

Deno.test("promise 10: a key that connects is in no line of the log and in no error", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, lines, call } = keyMachine(newKeys());
  host.answers.set("connect 192.0.2.2", { stderr: "Connection refused (os error 111)" });

  const error = await attacher.attach(call(), place, keys).then(() => undefined, (error) => error);

  const all = [...lines, Deno.inspect(error), String(error?.stack)].join("\n");
  assert.match(all, /could not connect with a key/);
  for (const key of [keys.host, keys.controller]) assert(!all.includes(key?.reveal().slice(10, 30) ?? "?"), all);
});

Deno.test("direct attach with a wrong key says so, with each address, and connects nothing", async () => {
  const { attacher, connected, call } = keyMachine(newKeys());

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    new RegExp(
      `no I/O controller of ${nqn} took the connection \\(192.0.2.1:4420: the key was refused; see that host NQN ${nodeNqn} has ` +
        `the same key on the cluster as here; 192.0.2.2:4420: the key was refused`,
    ),
  );

  assert.deepEqual(connected(), []);
});

Deno.test("direct attach with a wrong key of the controller says which key may be wrong", async () => {
  const keys = newKeys("bidirectional");
  const { attacher, call } = keyMachine(keys);

  await rejects(
    attacher.attach(call(), place, { ...keys, controller: DhchapKey.generate() }),
    "FAILED_PRECONDITION",
    /the key was refused, or the controller's own is another one than here; see that .* has the same keys on the cluster/,
  );
});

for (
  const [answer, code, message] of [
    ["Key was rejected by service (os error 129)", "FAILED_PRECONDITION", /the key was refused; see that host NQN/],
    ["Required key not available (os error 126)", "FAILED_PRECONDITION", /the kernel has no use for the key .*126/],
    [
      "Input/output error (os error 5)",
      "UNAVAILABLE",
      /not allowed: the subsystem is unknown.* or a key is wrong; see .*dmesg/,
    ],
    ["Connection refused (os error 111)", "UNAVAILABLE", /: refused, nothing listens there;/],
    ["No route to host (os error 113)", "UNAVAILABLE", /no way there \(No route to host/],
    ["Operation already in progress (os error 114)", "UNAVAILABLE", /another connection was made there in between/],
    ["Invalid argument (os error 22)", "UNAVAILABLE", /does not take these settings of a connection/],
    ["Cannot allocate memory (os error 12)", "UNAVAILABLE", /: Cannot allocate memory \(os error 12\)/],
  ] as const
) {
  Deno.test(`direct attach with keys explains the kernel's error "${answer}"`, async () => {
    const keys = newKeys();
    const { host, attacher, call } = keyMachine(keys);
    for (const traddr of ["192.0.2.1", "192.0.2.2"]) host.answers.set(`connect ${traddr}`, { stderr: answer });

    await rejects(attacher.attach(call(), place, keys), code, message);
  });
}

Deno.test("direct attach without a key to a subsystem that demands one says so", async () => {
  const { attacher, call } = keyMachine(newKeys());

  await rejects(
    attacher.attach(call(), place),
    "UNAVAILABLE",
    /192.0.2.1:4420: in-band authentication \(DH-HMAC-CHAP\) is demanded there, and no key is given \(in-band-auth\)/,
  );
});

Deno.test("direct attach with keys rejects an NQN that would be another option, and asks the kernel nothing", async () => {
  const { host, attacher, call } = keyMachine(undefined);
  const keys = newKeys();

  await rejects(
    attacher.attach(call(), { ...place, subsystemNqn: "nqn.x,duplicate_connect" }, keys),
    "UNAVAILABLE",
    /"nqn.x,duplicate_connect" holds a comma or a blank/,
  );

  assert.deepEqual(host.commands, []);
});

// -------------------------------------------------------------------------------------------------------- no such kernel

Deno.test("direct attach with keys on a kernel without them fails before it writes any, because the kernel would log it", async () => {
  const { host, attacher, call } = keyMachine(undefined);
  host.authenticates = false;

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /Cannot attach namespace 0f2c.*: the kernel cannot authenticate NVMe connections \(no dhchap_secret among .*\/dev\/nvme-fabrics\), Linux 6\.0 or later with CONFIG_NVME_AUTH .* is needed/,
  );

  assert.deepEqual([host.commands, host.controllers], [[], []]);
});

Deno.test("direct attach with keys fails before it connects on a kernel that accepts keys and was built without authentication", async () => {
  const { host, attacher, call } = keyMachine(undefined);
  host.authenticates = "takes keys";

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /the kernel was built without the authentication of NVMe connections \(it has no nvme_auth_negotiate\), Linux 6\.0/,
  );

  assert.deepEqual([host.commands, host.controllers], [[], []]);
});

Deno.test("direct attach with keys drops what such a kernel has connected, when it does not show what it supports", async () => {
  const { host, attacher, call } = keyMachine(undefined);
  host.authenticates = "takes keys";
  host.showsSymbols = false;

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /192.0.2.1:4420: the kernel has taken the key and does not use it, the connection was dropped again; Linux 6\.0/,
  );

  assert.deepEqual(host.controllers, []);
});

// ------------------------------------------------------------------------------------------------------------- rotation

Deno.test("direct attach with new keys makes another connection beside each one, and drops the old one after that", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const { host, attacher, demand, connected, call } = keyMachine(first);
  await attacher.attach(call(), place, first);
  demand(second);
  host.commands.splice(0);

  await attacher.attach(call(), place, second);

  assert.deepEqual(connected(), [["192.0.2.1", revealKeys(second)], ["192.0.2.2", revealKeys(second)]]);
  assert.deepEqual(host.commands.map((command) => command.replace(/: nqn.*?,dhchap/, ": dhchap")), [
    "/dev/nvme-fabrics: dhchap_secret=KEY,dhchap_ctrl_secret=KEY,duplicate_connect",
    "/dev/nvme-fabrics: dhchap_secret=KEY,dhchap_ctrl_secret=KEY,duplicate_connect",
    "nvme disconnect --device=nvme0",
    "nvme disconnect --device=nvme1",
  ]);
  assert.equal(host.devices.length, 1);
});

Deno.test("direct attach with a new key that is wrong leaves every connection as it is", async () => {
  const keys = newKeys();
  const { host, attacher, connected, call } = keyMachine(keys);
  await attacher.attach(call(), place, keys);
  host.commands.splice(0);

  await rejects(attacher.attach(call(), place, newKeys()), "FAILED_PRECONDITION", /the key was refused/);

  assert.deepEqual(connected(), [["192.0.2.1", revealKeys(keys)], ["192.0.2.2", revealKeys(keys)]]);
  assert(host.commands.every((command) => !command.includes("disconnect")), host.commands.join("\n"));
});

Deno.test("direct attach with keys replaces connections that were made without", async () => {
  const keys = newKeys();
  const { host, attacher, demand, connected, call } = keyMachine(undefined);
  await attacher.attach(call(), place);
  assert.deepEqual(connected(), [["192.0.2.1", undefined], ["192.0.2.2", undefined]]);
  demand(keys);

  await attacher.attach(call(), place, keys);

  assert.deepEqual(connected(), [["192.0.2.1", revealKeys(keys)], ["192.0.2.2", revealKeys(keys)]]);
  assert.equal(host.devices.length, 1);
});

Deno.test("direct attach keeps a connection with other keys that is the only way to a namespace, and says so", async () => {
  const [first, second] = [newKeys(), newKeys()];
  const { host, attacher, demand, connected, lines, call } = keyMachine(first);
  await attacher.attach(call(), place, first);
  demand(second);
  // The new connections are there, and do not work yet.
  const exchange = host.exchange.bind(host);
  host.exchange = async (path, text) => {
    const answer = await exchange(path, text);
    for (const controller of host.controllers) {
      if (controller.keys?.host === revealKeys(second).host) controller.state = "new";
    }
    return answer;
  };

  await attacher.attach(call(), place, second);

  assert.deepEqual(connected().map(([, keys]) => keys), [first, first, second, second].map(revealKeys));
  assert.match(lines.join(""), /left connections that have other keys, because nothing else leads to their namespaces/);
  for (const controller of host.controllers) controller.state = "live";
  await attacher.attach(call(), place, second);
  assert.deepEqual(connected().map(([, keys]) => keys), [revealKeys(second), revealKeys(second)]);
});

Deno.test("direct attach with new keys touches nothing where a second connection would show a second device", async () => {
  const [first, second] = [newKeys(), newKeys()];
  const { host, attacher, demand, connected, call } = keyMachine(first);
  host.multipath = false;
  await attacher.attach(call(), place, first);
  demand(second);

  await rejects(
    attacher.attach(call(), place, second),
    "UNAVAILABLE",
    /nvme0 is connected there with other keys, and without native NVMe multipath in the kernel it cannot be replaced/,
  );

  assert.deepEqual(connected().map(([, keys]) => keys), [revealKeys(first), revealKeys(first)]);
});

Deno.test("direct attach of a namespace that asks for less leaves its neighbour's connections alone", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, connected, call } = keyMachine(keys);
  host.addNamespace(other, nqn);
  await attacher.attach(call(), place, keys);
  host.commands.splice(0);

  await attacher.attach(call(), { ...place, uuid: other }, { ...keys, controller: undefined });
  await attacher.attach(call(), { ...place, uuid: other });

  assert.deepEqual(host.commands, []);
  assert.deepEqual(connected().map(([, keys]) => keys), [revealKeys(keys), revealKeys(keys)]);
});

Deno.test("direct attach of a namespace that asks for less does not give up the controller's proof with a new key", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, demand, connected, call } = keyMachine(keys);
  host.addNamespace(other, nqn);
  await attacher.attach(call(), place, keys);
  const changed = { ...keys, host: DhchapKey.generate() };
  demand(changed);

  await attacher.attach(call(), { ...place, uuid: other }, { ...changed, controller: undefined });

  assert.deepEqual(connected().map(([, used]) => used), [revealKeys(changed), revealKeys(changed)]);
});

Deno.test("promise 8: a change of keys that is cut off anywhere is finished by the next attach", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const model = keyMachine(first);
  await model.attacher.attach(model.call(), place, first);
  const from = model.host.calls + 1;
  model.demand(second);
  await model.attacher.attach(model.call(), place, second);
  let tried = 0;

  for (let at = from; at <= model.host.calls; at++) {
    for (const when of ["before", "after"] as const) {
      const { host, attacher, process, demand, connected, call } = keyMachine(first);
      await attacher.attach(call(), place, first);
      demand(second);
      host.cut = { at, when };
      await attacher.attach(call(), place, second).then(() => {}, (error) => {
        // Whether a failed write has connected is not known either.
        assert(error instanceof CutOff || host.calls >= at, error);
        tried++;
      });
      host.cut = undefined;
      assert.equal(host.devices.length, 1, `the device was lost ${when} call ${at}`);

      await process().attach(call(), place, second);

      assert.deepEqual(
        connected().sort(),
        [["192.0.2.1", revealKeys(second)], ["192.0.2.2", revealKeys(second)]],
        `after a kill ${when} call ${at}`,
      );
      assert.equal(host.devices.length, 1);
    }
  }

  assert(tried >= model.host.calls - from, `${tried} kills`);
});

Deno.test("reconcile makes a lost connection again with the keys it had, also in a new process", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, process, connected, call } = keyMachine(keys);
  await attacher.attach(call(), place, keys);
  host.controllers.splice(0, 1);

  await attacher.reconcile?.(call());
  assert.deepEqual(connected(), [["192.0.2.2", revealKeys(keys)], ["192.0.2.1", revealKeys(keys)]]);
  const next = process();
  await next.reconcile?.(call());
  host.controllers.splice(0, 1);
  await next.reconcile?.(call());

  assert.deepEqual(connected(), [["192.0.2.1", revealKeys(keys)], ["192.0.2.2", revealKeys(keys)]]);
});

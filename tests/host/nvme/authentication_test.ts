/**
 * In-band authentication: on a make-believe machine (what the kernel is told, what is replaced, what is refused), and with
 * LightOS' trusted hosts on a simulated cluster. What a real kernel does with it: tests/vm/scenarios/authentication.ts.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { type AuthKind, DhchapKey, type DhchapKeys } from "../../../lib/auth_key.ts";
import { attachVolume, type LocalMachine } from "../../../lib/cli/attach_volume.ts";
import { createLogger, Secrets } from "../../../lib/context.ts";
import { createDiscoveryDaemon } from "../../../lib/discovery/daemon.ts";
import { hostIdOf } from "../../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../../../lib/host/attach/discovery_client.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { authenticationObstacle } from "../../../lib/host/nvme/authentication.ts";
import { KeyedLock } from "../../../lib/lock.ts";
import { fromPublishContext, hostNqn, type RemoteNamespace, toPublishContext } from "../../../lib/namespace.ts";
import type { Authentication } from "../../../lib/storage/backend.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { CutOff, FakeHost } from "../../support/fake_host.ts";
import { subsystemNqn as nqn } from "../../support/loop_machine.ts";
import { callContext, mountCapability, nodeCalls, rejects, volumeId } from "../../support/node_calls.ts";
import { startSimulator, type TestSimulator } from "../../support/simulator.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const nodeId = "n1.node";
const us = hostNqn(nodeId);

const place: RemoteNamespace = {
  uuid,
  subsystemNqn: nqn,
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }],
  discovery: [{ traddr: "192.0.2.1", trsvcid: "8009" }],
};

function newKeys(kind: AuthKind = "unidirectional"): DhchapKeys {
  return { host: DhchapKey.generate(), controller: kind === "bidirectional" ? DhchapKey.generate() : undefined };
}

const texts = ({ host, controller }: DhchapKeys) => ({ host: host.reveal(), controller: controller?.reveal() });

/** A machine whose subsystem demands these keys, and a way to connect to it. */
function machine(keys: DhchapKeys | undefined, options: Partial<Parameters<typeof createDirectAttacher>[0]> = {}) {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  const demand = (wanted: DhchapKeys) => host.demands.set(nqn, texts(wanted));
  if (keys !== undefined) demand(keys);
  const process = () =>
    createDirectAttacher({ host, hostNqn: us, hostId: hostIdOf(nodeId), locks: new KeyedLock(), ...options });
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  return {
    host,
    demand,
    process,
    attacher: process(),
    lines,
    call: () => callContext(undefined, log),
    /** Where it is connected, and with which keys. */
    connected: () => host.controllers.map(({ traddr, keys }) => [traddr, keys]),
  };
}

// ----------------------------------------------------------------------------------------------------------- connecting

for (const kind of ["unidirectional", "bidirectional"] as const) {
  Deno.test(`direct.attach with keys (${kind}) connects each address in one write, with no command, once`, async () => {
    const keys = newKeys(kind);
    const { host, attacher, connected, call } = machine(keys);

    await attacher.attach(call(), place, keys);
    await attacher.attach(call(), place, keys);

    assert.deepEqual(connected(), [["192.0.2.1", texts(keys)], ["192.0.2.2", texts(keys)]]);
    const ctrl = kind === "bidirectional" ? ",dhchap_ctrl_secret=KEY" : "";
    assert.deepEqual(
      host.commands,
      ["192.0.2.1", "192.0.2.2"].map((traddr) =>
        `/dev/nvme-fabrics: nqn=${nqn},transport=tcp,traddr=${traddr},trsvcid=4420,hostnqn=${us},hostid=${
          hostIdOf(nodeId)
        },dhchap_secret=KEY${ctrl}`
      ),
    );
  });
}

Deno.test("direct.attach gives the kernel all settings of a connection with keys too", async () => {
  const keys = newKeys();
  const tuning = {
    controllerLossSeconds: -1,
    reconnectDelaySeconds: 2,
    keepAliveSeconds: 10,
    ioQueues: 4,
    queueSize: 64,
    fastIoFailSeconds: 30,
  };
  const { host, attacher, call } = machine(keys, { tuning });

  await attacher.attach(call(), place, keys);

  assert.match(
    host.commands[0] ?? "",
    /,ctrl_loss_tmo=-1,reconnect_delay=2,keep_alive_tmo=10,fast_io_fail_tmo=30,nr_io_queues=4,queue_size=64,dhchap_secret=KEY$/,
  );
});

Deno.test("promise 10: a key that connects is in no line of the log and in no error", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, lines, call } = machine(newKeys());
  host.answers.set("connect 192.0.2.2", { stderr: "Connection refused (os error 111)" });

  const error = await attacher.attach(call(), place, keys).then(() => undefined, (error) => error);

  const all = [...lines, Deno.inspect(error), String(error?.stack)].join("\n");
  assert.match(all, /could not connect with a key/);
  for (const key of [keys.host, keys.controller]) assert(!all.includes(key?.reveal().slice(10, 30) ?? "?"), all);
});

Deno.test("direct.attach with a wrong key says so, with each address, and connects nothing", async () => {
  const { attacher, connected, call } = machine(newKeys());

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    new RegExp(
      `no I/O controller of ${nqn} took the connection \\(192.0.2.1:4420: the key was refused; see that host NQN ${us} has ` +
        `the same key on the cluster as here; 192.0.2.2:4420: the key was refused`,
    ),
  );

  assert.deepEqual(connected(), []);
});

Deno.test("direct.attach with another key of the controller than its own says which may be wrong", async () => {
  const keys = newKeys("bidirectional");
  const { attacher, call } = machine(keys);

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
  Deno.test(`direct.attach with keys tells what the kernel means by "${answer}"`, async () => {
    const keys = newKeys();
    const { host, attacher, call } = machine(keys);
    for (const traddr of ["192.0.2.1", "192.0.2.2"]) host.answers.set(`connect ${traddr}`, { stderr: answer });

    await rejects(attacher.attach(call(), place, keys), code, message);
  });
}

Deno.test("direct.attach without a key to a subsystem that demands one says so", async () => {
  const { attacher, call } = machine(newKeys());

  await rejects(
    attacher.attach(call(), place),
    "UNAVAILABLE",
    /192.0.2.1:4420: in-band authentication \(DH-HMAC-CHAP\) is demanded there, and no key is given \(in-band-auth\)/,
  );
});

Deno.test("direct.attach with keys refuses an NQN that would be another option, and asks the kernel nothing", async () => {
  const { host, attacher, call } = machine(undefined);
  const keys = newKeys();

  await rejects(
    attacher.attach(call(), { ...place, subsystemNqn: "nqn.x,duplicate_connect" }, keys),
    "UNAVAILABLE",
    /"nqn.x,duplicate_connect" holds a comma or a blank/,
  );

  assert.deepEqual(host.commands, []);
});

// -------------------------------------------------------------------------------------------------------- no such kernel

Deno.test("direct.attach with keys on a kernel without them refuses before it writes any, for the kernel would log it", async () => {
  const { host, attacher, call } = machine(undefined);
  host.authenticates = false;

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /Cannot attach namespace 0f2c.*: the kernel cannot authenticate NVMe connections \(no dhchap_secret among .*\/dev\/nvme-fabrics\), Linux 6\.0 or later with CONFIG_NVME_AUTH .* is needed/,
  );

  assert.deepEqual([host.commands, host.controllers], [[], []]);
});

Deno.test("direct.attach with keys on a kernel that takes them and was built without refuses before it connects", async () => {
  const { host, attacher, call } = machine(undefined);
  host.authenticates = "takes keys";

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /the kernel was built without the authentication of NVMe connections \(it has no nvme_auth_negotiate\), Linux 6\.0/,
  );

  assert.deepEqual([host.commands, host.controllers], [[], []]);
});

Deno.test("direct.attach with keys drops what such a kernel has connected, when it did not show what it can", async () => {
  const { host, attacher, call } = machine(undefined);
  host.authenticates = "takes keys";
  host.showsSymbols = false;

  await rejects(
    attacher.attach(call(), place, newKeys()),
    "FAILED_PRECONDITION",
    /192.0.2.1:4420: the kernel has taken the key and does not use it, the connection was dropped again; Linux 6\.0/,
  );

  assert.deepEqual(host.controllers, []);
});

Deno.test("authenticationObstacle tells what the kernel lacks, from the list of its options", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-authentication-" });
  try {
    const host = createLinuxHost({ log: createLogger("error"), devRoot: directory, procRoot: directory });
    const obstacle = (kind: AuthKind) => authenticationObstacle(host, kind);

    assert.match(
      await obstacle("unidirectional") ?? "",
      /nvme-fabrics is missing, the kernel module nvme_tcp is needed/,
    );
    const fabrics = join(directory, "nvme-fabrics");
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s,dhchap_secret=%s,duplicate_connect\n");
    assert.equal(await obstacle("unidirectional"), undefined);
    assert.match(await obstacle("bidirectional") ?? "", /\(no dhchap_ctrl_secret among the options of/);
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s,dhchap_secret=%s,dhchap_ctrl_secret=%s\n");
    assert.equal(await obstacle("bidirectional"), undefined);
    const symbols = join(directory, "kallsyms");
    await Deno.writeTextFile(symbols, "0 T nvmf_connect_admin_queue\t[nvme_fabrics]\n0 T nvme_auth_negotiated\t[x]\n");
    assert.match(await obstacle("bidirectional") ?? "", /was built without the authentication of NVMe connections/);
    await Deno.writeTextFile(
      symbols,
      "0 T nvmf_connect_admin_queue\t[nvme_fabrics]\n0 T nvme_auth_negotiate\t[nvme_core]\n",
    );
    assert.equal(await obstacle("bidirectional"), undefined);
    await Deno.writeTextFile(symbols, "");
    assert.equal(await obstacle("bidirectional"), undefined);
    await Deno.writeTextFile(fabrics, "transport=%s,nqn=%s\n");
    assert.match(await obstacle("bidirectional") ?? "", /\(no dhchap_secret, dhchap_ctrl_secret among the options of/);
    await Deno.remove(fabrics);
    await Deno.mkdir(fabrics);
    assert.match(await obstacle("unidirectional") ?? "", /does not tell which options of connections it knows/);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("Host.exchange writes in one piece and answers what is then read", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-authentication-" });
  try {
    const host = createLinuxHost({ log: createLogger("error") });
    const path = join(directory, "device");
    await Deno.writeTextFile(path, "________instance=3,cntlid=1\n");

    assert.equal(await host.exchange(path, "nqn=nqn."), "instance=3,cntlid=1\n");

    assert.equal(await Deno.readTextFile(path), "nqn=nqn.instance=3,cntlid=1\n");
    await assert.rejects(host.exchange("/dev/full", "x"), /No space left on device \(os error 28\)/);
    await assert.rejects(host.exchange(join(directory, "absent"), "x"), Deno.errors.NotFound);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

// ------------------------------------------------------------------------------------------------------------- rotation

Deno.test("direct.attach with new keys connects anew beside each connection, and drops the old one after that", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const { host, attacher, demand, connected, call } = machine(first);
  await attacher.attach(call(), place, first);
  demand(second);
  host.commands.splice(0);

  await attacher.attach(call(), place, second);

  assert.deepEqual(connected(), [["192.0.2.1", texts(second)], ["192.0.2.2", texts(second)]]);
  assert.deepEqual(host.commands.map((command) => command.replace(/: nqn.*?,dhchap/, ": dhchap")), [
    "/dev/nvme-fabrics: dhchap_secret=KEY,dhchap_ctrl_secret=KEY,duplicate_connect",
    "/dev/nvme-fabrics: dhchap_secret=KEY,dhchap_ctrl_secret=KEY,duplicate_connect",
    "nvme disconnect --device=nvme0",
    "nvme disconnect --device=nvme1",
  ]);
  assert.equal(host.devices.length, 1);
});

Deno.test("direct.attach with a new key that is wrong leaves every connection as it is", async () => {
  const keys = newKeys();
  const { host, attacher, connected, call } = machine(keys);
  await attacher.attach(call(), place, keys);
  host.commands.splice(0);

  await rejects(attacher.attach(call(), place, newKeys()), "FAILED_PRECONDITION", /the key was refused/);

  assert.deepEqual(connected(), [["192.0.2.1", texts(keys)], ["192.0.2.2", texts(keys)]]);
  assert(host.commands.every((command) => !command.includes("disconnect")), host.commands.join("\n"));
});

Deno.test("direct.attach with keys replaces connections that were made without", async () => {
  const keys = newKeys();
  const { host, attacher, demand, connected, call } = machine(undefined);
  await attacher.attach(call(), place);
  assert.deepEqual(connected(), [["192.0.2.1", undefined], ["192.0.2.2", undefined]]);
  demand(keys);

  await attacher.attach(call(), place, keys);

  assert.deepEqual(connected(), [["192.0.2.1", texts(keys)], ["192.0.2.2", texts(keys)]]);
  assert.equal(host.devices.length, 1);
});

Deno.test("direct.attach keeps a connection with other keys that is the only way to a namespace, and says so", async () => {
  const [first, second] = [newKeys(), newKeys()];
  const { host, attacher, demand, connected, lines, call } = machine(first);
  await attacher.attach(call(), place, first);
  demand(second);
  // The new connections are there, and do not work yet.
  const exchange = host.exchange.bind(host);
  host.exchange = async (path, text) => {
    const answer = await exchange(path, text);
    for (const controller of host.controllers) {
      if (controller.keys?.host === texts(second).host) controller.state = "new";
    }
    return answer;
  };

  await attacher.attach(call(), place, second);

  assert.deepEqual(connected().map(([, keys]) => keys), [first, first, second, second].map(texts));
  assert.match(lines.join(""), /left connections that have other keys, because nothing else leads to their namespaces/);
  for (const controller of host.controllers) controller.state = "live";
  await attacher.attach(call(), place, second);
  assert.deepEqual(connected().map(([, keys]) => keys), [texts(second), texts(second)]);
});

Deno.test("direct.attach with new keys touches nothing where a second connection would show a second device", async () => {
  const [first, second] = [newKeys(), newKeys()];
  const { host, attacher, demand, connected, call } = machine(first);
  host.multipath = false;
  await attacher.attach(call(), place, first);
  demand(second);

  await rejects(
    attacher.attach(call(), place, second),
    "UNAVAILABLE",
    /nvme0 is connected there with other keys, and without native NVMe multipath in the kernel it cannot be replaced/,
  );

  assert.deepEqual(connected().map(([, keys]) => keys), [texts(first), texts(first)]);
});

Deno.test("direct.attach of a namespace that asks for less leaves its neighbour's connections alone", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, connected, call } = machine(keys);
  host.addNamespace(other, nqn);
  await attacher.attach(call(), place, keys);
  host.commands.splice(0);

  await attacher.attach(call(), { ...place, uuid: other }, { ...keys, controller: undefined });
  await attacher.attach(call(), { ...place, uuid: other });

  assert.deepEqual(host.commands, []);
  assert.deepEqual(connected().map(([, keys]) => keys), [texts(keys), texts(keys)]);
});

Deno.test("direct.attach of a namespace that asks for less does not give up the controller's proof with a new key", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, demand, connected, call } = machine(keys);
  host.addNamespace(other, nqn);
  await attacher.attach(call(), place, keys);
  const changed = { ...keys, host: DhchapKey.generate() };
  demand(changed);

  await attacher.attach(call(), { ...place, uuid: other }, { ...changed, controller: undefined });

  assert.deepEqual(connected().map(([, used]) => used), [texts(changed), texts(changed)]);
});

Deno.test("promise 8: a change of keys that is cut off anywhere is finished by the next attach", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const model = machine(first);
  await model.attacher.attach(model.call(), place, first);
  const from = model.host.calls + 1;
  model.demand(second);
  await model.attacher.attach(model.call(), place, second);
  let tried = 0;

  for (let at = from; at <= model.host.calls; at++) {
    for (const when of ["before", "after"] as const) {
      const { host, attacher, process, demand, connected, call } = machine(first);
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
        [["192.0.2.1", texts(second)], ["192.0.2.2", texts(second)]],
        `after a kill ${when} call ${at}`,
      );
      assert.equal(host.devices.length, 1);
    }
  }

  assert(tried >= model.host.calls - from, `${tried} kills`);
});

Deno.test("direct.tend makes a lost connection again with the keys it had, also in a new process", async () => {
  const keys = newKeys("bidirectional");
  const { host, attacher, process, connected, call } = machine(keys);
  await attacher.attach(call(), place, keys);
  host.controllers.splice(0, 1);

  await attacher.reconcile?.(call());
  assert.deepEqual(connected(), [["192.0.2.2", texts(keys)], ["192.0.2.1", texts(keys)]]);
  const next = process();
  await next.reconcile?.(call());
  host.controllers.splice(0, 1);
  await next.reconcile?.(call());

  assert.deepEqual(connected(), [["192.0.2.1", texts(keys)], ["192.0.2.2", texts(keys)]]);
});

// ------------------------------------------------------------------------------------------------------- the node's side

/** A node service, and its stage of one volume that asks for authentication. */
function node(
  kind: AuthKind | undefined,
  demanded: DhchapKeys | undefined,
  authentication?: Authentication,
  strategy: "direct" | "discovery-client" = "direct",
) {
  const { host, attacher, demand, connected } = machine(demanded);
  const calls = nodeCalls({
    host,
    attacher: strategy === "direct"
      ? attacher
      : createDiscoveryClientAttacher({ host, directory: host.discoveryDirectory, hostNqn: us }),
    nodeId,
    ...(authentication === undefined ? {} : { authentication }),
  });
  const namespace = kind === undefined ? place : { ...place, inBandAuth: kind };
  return {
    host,
    demand,
    connected,
    stage: (secrets: Record<string, string> = {}) =>
      calls.stage({
        volumeId: volumeId(uuid),
        stagingTargetPath: "/staging",
        volumeCapability: mountCapability(),
        publishContext: toPublishContext(namespace),
        secrets,
      }),
  };
}

Deno.test("the publish context carries the kind of authentication, and old ones carry none", () => {
  assert.deepEqual(fromPublishContext(toPublishContext({ ...place, inBandAuth: "bidirectional" })), {
    ...place,
    inBandAuth: "bidirectional",
  });
  assert.equal("in-band-auth" in toPublishContext(place), false);
  assert.throws(() => fromPublishContext({ ...toPublishContext(place), "in-band-auth": "half" }), {
    code: "INVALID_ARGUMENT",
    message: "Cannot read the publish context: in-band-auth: is not one of unidirectional, bidirectional",
  });
});

Deno.test("NodeStageVolume connects with the keys of its secret, and asks nobody", async () => {
  const keys = newKeys("bidirectional");
  const { stage, connected } = node("bidirectional", keys, {
    keysOf: () => Promise.reject(new Error("the cluster was asked")),
  });

  await stage({ "dhchap-key": keys.host.reveal(), "dhchap-ctrl-key": keys.controller?.reveal() ?? "" });

  assert.deepEqual(connected(), [["192.0.2.1", texts(keys)], ["192.0.2.2", texts(keys)]]);
});

Deno.test("NodeStageVolume asks the cluster for the keys that its secret lacks, with that secret", async () => {
  const keys = newKeys();
  const asked: unknown[] = [];
  const { stage, connected } = node("unidirectional", keys, {
    keysOf: (_ctx, secrets, ...rest) => {
      asked.push([secrets.constructor, ...rest]);
      return Promise.resolve(keys);
    },
  });

  await stage({ jwt: "token" });

  assert.deepEqual(asked, [[Secrets, volumeId(uuid), { hostNqn: us, kind: "unidirectional" }]]);
  assert.deepEqual(connected().map(([, used]) => used), [texts(keys), texts(keys)]);
});

Deno.test("NodeStageVolume without authentication asks for no key", async () => {
  const { stage, connected } = node(undefined, undefined, {
    keysOf: () => Promise.reject(new Error("the cluster was asked")),
  });

  await stage({ "dhchap-key": "not even a key" });

  assert.deepEqual(connected().map(([, used]) => used), [undefined, undefined]);
});

for (
  const [what, secrets, code, message] of [
    [
      "no key and nobody to ask",
      {},
      "FAILED_PRECONDITION",
      /stage the volume 0f2c.*: the node-stage secret of the call brings no key/,
    ],
    [
      "a damaged key",
      { "dhchap-key": "DHHC-1:00:AAAA:" },
      "INVALID_ARGUMENT",
      /stage the volume 0f2c.*dhchap-key: is not a key/,
    ],
  ] as const
) {
  Deno.test(`NodeStageVolume with ${what} answers ${code} and connects nothing`, async () => {
    const { stage, connected } = node("unidirectional", newKeys());

    await rejects(stage(secrets), code, message);

    assert.deepEqual(connected(), []);
  });
}

Deno.test("NodeStageVolume refuses a connection without keys that another program made to the subsystem", async () => {
  const keys = newKeys();
  const { host, stage } = node("unidirectional", keys);
  host.connect(nqn, "nqn.theirs", "192.0.2.9");

  await rejects(
    stage({ "dhchap-key": keys.host.reveal() }),
    "FAILED_PRECONDITION",
    /in-band-auth is "unidirectional", and the connection nvme0 of host nqn.theirs to nqn.* has no key; the program/,
  );
  assert.deepEqual(host.mounts, []);
});

Deno.test("NodeStageVolume with a Discovery-Client that has no keys refuses what it has connected", async () => {
  const { host, stage } = node("bidirectional", undefined, undefined, "discovery-client");

  await rejects(
    stage(),
    "FAILED_PRECONDITION",
    /nvme0 .* has no key; the program that makes the connections needs the keys \(with a/,
  );
  assert.deepEqual(host.mounts, []);
  const [controller] = host.controllers.splice(0);
  assert(controller);
  host.controllers.push({ ...controller, keys: texts(newKeys()) });
  await rejects(stage(), "FAILED_PRECONDITION", /has no key to authenticate the controller with; the program/);
  host.controllers.splice(0);
  host.controllers.push({ ...controller, keys: texts(newKeys("bidirectional")) });
  await stage();
  assert.equal(host.mounts.length, 1);
});

Deno.test("NodeStageVolume with a Discovery-Client on a kernel without keys says what the kernel lacks", async () => {
  const { host, stage } = node("unidirectional", undefined, undefined, "discovery-client");
  host.authenticates = false;

  await rejects(
    stage(),
    "FAILED_PRECONDITION",
    /stage the volume 0f2c.*: the kernel cannot authenticate NVMe connections/,
  );
});

// ---------------------------------------------------------------------------------------------------- discovery client

Deno.test("the daemon connects I/O controllers with its keys, discovery controllers without, and changes keys", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const { host, demand } = machine(first);
  host.playsDiscoveryClient = false;
  host.logPages.set("192.0.2.1:8009", { generation: 1, records: [{ address: "192.0.2.1:4420", subsystemNqn: nqn }] });
  await host.replaceText(
    `${host.discoveryDirectory}/${uuid}`,
    `-t tcp -a 192.0.2.1 -s 8009 -q ${us} -n ${nqn}\n`,
  );
  const settle = async (keys: DhchapKeys) => {
    const daemon = createDiscoveryDaemon({
      host,
      directory: host.discoveryDirectory,
      log: createLogger("error"),
      pollMs: 10_000,
      controllerLossSeconds: 600,
      keepAliveSeconds: 10,
      ioQueues: undefined,
      keys,
    });
    for (let turn = 0; turn < 6; turn++) {
      await daemon.look();
      await daemon.idle();
    }
  };
  const io = () => host.controllers.filter(({ trsvcid }) => trsvcid === "4420").map(({ keys }) => keys);

  await settle(first);
  assert.deepEqual(io(), [texts(first)]);
  assert(host.commands.some((command) => command.startsWith("nvme connect") && command.includes("--trsvcid=8009")));
  demand(second);
  await settle(second);
  assert.deepEqual(io(), [texts(second)]);
  assert.equal(host.devices.length, 1);
  host.commands.splice(0);
  await settle(newKeys());

  assert.deepEqual(io(), [texts(second)], "a wrong key does not cost the connection");
});

// --------------------------------------------------------------------------------------------- a cluster's trusted hosts

const quiet = createLogger("error", "json", () => {});

function openBackend(simulator: TestSimulator, lines: string[] = []) {
  return lightosBackend({
    log: createLogger("debug", "json", (line) => lines.push(line)),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  });
}

/** A cluster that demands authentication, and a volume of it. */
async function cluster(inBandAuth: string | undefined, enabled = true) {
  const simulator = await startSimulator({ inBandAuth: enabled });
  const backend = openBackend(simulator);
  const none = new Secrets();
  const make = (name: string) =>
    backend.createVolume(callContext(undefined, quiet), none, {
      name,
      requiredBytes: 1n << 30n,
      limitBytes: 0n,
      parameters: {
        "mgmt-endpoint": simulator.addresses.grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
        ...(inBandAuth === undefined ? {} : { "in-band-auth": inBandAuth }),
      },
    });
  const volume = await make("pvc-1");
  return {
    simulator,
    backend,
    volume,
    make,
    hosts: () => simulator.control.cluster.trustedHosts,
    grant: (secrets: Record<string, string> = {}, given = volume, by = backend) =>
      by.grantAccess(callContext(), new Secrets(secrets), given.id, {
        hostNqn: us,
        shared: false,
        volumeContext: given.context ?? {},
      }),
    keysOf: (kind: AuthKind, by = backend) =>
      by.authentication.keysOf(callContext(), none, volume.id, { hostNqn: us, kind }),
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await simulator[Symbol.asyncDispose]();
    },
  };
}

for (
  const [kind, context] of [[undefined, undefined], ["none", undefined], ["bidirectional", "bidirectional"]] as const
) {
  Deno.test(`CreateVolume keeps in-band-auth ${kind} in the volume context`, async () => {
    await using c = await cluster(kind);

    assert.deepEqual(c.volume.context, context === undefined ? undefined : { "in-band-auth": context });
    assert.deepEqual((await c.make("pvc-1")).context, c.volume.context);
  });
}

Deno.test("CreateVolume refuses another kind of authentication, and names those that there are", async () => {
  await rejects(
    cluster("sometimes"),
    "INVALID_ARGUMENT",
    /StorageClass parameter "in-band-auth" "sometimes" is not one of none, unidirectional, bidirectional/,
  );
});

Deno.test("grantAccess makes a trusted host with keys before it lets the host in, once, and answers the kind alone", async () => {
  await using c = await cluster("bidirectional");

  const namespace = await c.grant();
  const [made] = c.hosts();
  await c.grant();

  assert.equal(namespace.inBandAuth, "bidirectional");
  assert(made);
  assert.deepEqual([made.name, made.hostNqn, made.project], [nodeId, us, "default"]);
  assert.deepEqual(c.hosts(), [made]);
  const keys = await c.keysOf("bidirectional");
  assert.deepEqual(texts(keys), { host: made.hostSecret, controller: made.targetSecret });
  assert.deepEqual(texts(await c.keysOf("unidirectional")), texts(keys));
  const context = JSON.stringify(toPublishContext(namespace));
  for (const secret of [made.hostSecret, made.targetSecret]) assert(!context.includes(secret.slice(10)), context);
  const { SetTrustedHostSecret, UpdateVolume } = c.simulator.control.calls();
  assert.deepEqual([SetTrustedHostSecret?.total, UpdateVolume?.total], [1, 1]);
});

Deno.test("grantAccess without authentication makes no trusted host", async () => {
  await using c = await cluster(undefined);

  const namespace = await c.grant({ "dhchap-key": "not even a key" });

  assert.equal(namespace.inBandAuth, undefined);
  assert.deepEqual(c.hosts(), []);
});

Deno.test("grantAccess adds the target's key for a class that wants it, and takes none away for one that does not", async () => {
  await using c = await cluster("unidirectional");
  await c.grant();
  const [first] = c.hosts();
  const both = { ...await c.make("pvc-2"), context: { "in-band-auth": "bidirectional" } };

  await c.grant({}, both);
  const [second] = c.hosts();
  await c.grant();

  assert.equal(first?.targetSecret, "");
  assert.equal(second?.hostSecret, first?.hostSecret);
  assert.match(second?.targetSecret ?? "", /^DHHC-1:01:/);
  assert.deepEqual(c.hosts(), [second]);
});

Deno.test("grantAccess gives LightOS the keys of its secrets, and changes them when these do", async () => {
  await using c = await cluster("bidirectional");
  const [first, second] = [newKeys("bidirectional"), newKeys("bidirectional")];
  const secrets = ({ host, controller }: DhchapKeys) => ({
    "dhchap-key": host.reveal(),
    "dhchap-ctrl-key": controller?.reveal() ?? "",
  });

  await c.grant(secrets(first));
  assert.deepEqual(texts(await c.keysOf("bidirectional")), texts(first));
  await c.grant(secrets(first));
  await c.grant(secrets(second));
  assert.deepEqual(texts(await c.keysOf("bidirectional")), texts(second));
  await c.grant();

  assert.deepEqual(texts(await c.keysOf("bidirectional")), texts(second));
  assert.equal(c.simulator.control.calls()["SetTrustedHostSecret"]?.total, 2);
});

Deno.test("grantAccess with a damaged key answers INVALID_ARGUMENT and changes nothing on the cluster", async () => {
  await using c = await cluster("unidirectional");

  await rejects(c.grant({ "dhchap-key": "DHHC-1:01:AAAA:" }), "INVALID_ARGUMENT", /dhchap-key: is not a key/);

  assert.deepEqual([c.hosts(), c.simulator.control.leftovers().access], [[], []]);
});

Deno.test("grantAccess uses the trusted host that somebody made for this host under another name", async () => {
  await using c = await cluster("unidirectional");
  const key = DhchapKey.generate().reveal();
  c.simulator.control.cluster.putTrustedHost({
    uuid: other,
    name: "made-by-hand",
    project: "default",
    hostNqn: us,
    labels: [],
    authRequired: "",
    hostSecret: key,
    targetSecret: "",
  });

  await c.grant();

  assert.deepEqual(c.hosts().map(({ name, hostSecret }) => [name, hostSecret]), [["made-by-hand", key]]);
  assert.equal((await c.keysOf("unidirectional")).host.reveal(), key);
});

Deno.test("grantAccess refuses when the node's name is that of another host on the cluster", async () => {
  await using c = await cluster("unidirectional");
  c.simulator.control.cluster.putTrustedHost({
    uuid: other,
    name: nodeId,
    project: "default",
    hostNqn: "nqn.theirs",
    labels: [],
    authRequired: "",
    hostSecret: "",
    targetSecret: "",
  });

  await rejects(
    c.grant(),
    "FAILED_PRECONDITION",
    /trusted host "n1.node" of project "default" is for host NQN nqn.theirs, not for nqn.*:n1.node, rename or correct it/,
  );
  assert.deepEqual(c.simulator.control.leftovers().access, []);
});

Deno.test("grantAccess with authentication refuses a cluster on which it is disabled", async () => {
  await using c = await cluster("bidirectional", false);

  await rejects(
    c.grant(),
    "FAILED_PRECONDITION",
    /give n1.node access to volume .*: in-band-auth is "bidirectional", and in-band authentication is disabled on the LightOS cluster at 127.*, it has to be enabled there first/,
  );
  assert.deepEqual([c.hosts(), c.simulator.control.leftovers().access], [[], []]);
});

Deno.test("grantAccess refuses a volume attribute in-band-auth that is none", async () => {
  await using c = await cluster(undefined);

  await rejects(
    c.grant({}, { ...c.volume, context: { "in-band-auth": "yes" } }),
    "INVALID_ARGUMENT",
    /volume attribute "in-band-auth" "yes" is not one of none, unidirectional, bidirectional/,
  );
});

Deno.test("racing grants of two volumes to a host agree on its keys, also of two processes", async () => {
  for (const processes of [1, 2]) {
    await using c = await cluster("bidirectional");
    await using second = processes === 1 ? undefined : openBackend(c.simulator);
    const volumes = await Promise.all([1, 2, 3, 4].map((n) => c.make(`pvc-r${n}`)));

    await Promise.all(volumes.map((volume, n) => c.grant({}, volume, n % 2 === 0 ? c.backend : second ?? c.backend)));

    assert.equal(c.hosts().length, 1);
    const [keys, again] = [await c.keysOf("bidirectional"), await c.keysOf("bidirectional", second ?? c.backend)];
    assert.deepEqual(texts(keys), texts(again));
    const sets = c.simulator.control.calls()["SetTrustedHostSecret"]?.total ?? 0;
    assert(processes === 1 ? sets === 1 : sets <= 2, `${sets} times`);
  }
});

for (const rpc of ["CreateTrustedHost", "SetTrustedHostSecret", "GetTrustedHostSecret", "ListTrustedHosts"]) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: grantAccess whose ${rpc} is lost ${when} its effect is finished by the repeat`, async () => {
      await using c = await cluster("unidirectional");
      c.simulator.control.fail({ rpc, when, code: "UNAVAILABLE", count: 1 });

      await c.grant().catch(() => {});
      c.simulator.control.clearFaults();
      const namespace = await c.grant();

      assert.equal(namespace.inBandAuth, "unidirectional");
      assert.equal(c.hosts().length, 1);
      assert.equal((await c.keysOf("unidirectional")).host.reveal(), c.hosts()[0]?.hostSecret);
    });
  }
}

for (
  const [what, spoil, message] of [
    ["no trusted host", undefined, /has no trusted host for n1.node, delete the VolumeAttachment/],
    ["no secret", { hostSecret: "" }, /has no host secret of trusted host "n1.node", delete the VolumeAttachment/],
    ["no target secret", { targetSecret: "" }, /has no target secret of trusted host "n1.node"/],
    [
      "something else",
      { hostSecret: "open sesame" },
      /the host secret that LightOS at .* has of .* is not a key of the form/,
    ],
  ] as const
) {
  Deno.test(`keysOf answers FAILED_PRECONDITION when LightOS has ${what}`, async () => {
    await using c = await cluster("bidirectional");
    await c.grant();
    const [made] = c.hosts();
    assert(made);
    if (spoil === undefined) c.simulator.control.cluster.removeTrustedHost("default", nodeId);
    else c.simulator.control.cluster.putTrustedHost({ ...made, ...spoil });

    await rejects(c.keysOf("bidirectional"), "FAILED_PRECONDITION", message);
  });
}

// ------------------------------------------------------------------------------------------------------------ the shell

Deno.test("attachVolume of a volume ID takes the keys from the cluster, and with new ones changes them there and here", async () => {
  await using c = await cluster("bidirectional");
  const { host, attacher, demand } = machine(undefined);
  host.addNamespace(c.volume.uuid, c.simulator.addresses.subsystemNqn);
  const tools: LocalMachine = { host, attacher, hostNqn: us, discoveryDirectory: undefined };
  const attach = async (secrets: Record<string, string>) =>
    await attachVolume(callContext(), tools, {
      backend: c.backend,
      volumeId: c.volume.id,
      volumeContext: { "in-band-auth": "bidirectional" },
      secrets: new Secrets(secrets),
    }, undefined);

  await attach({});
  const [made] = c.hosts();
  assert(host.controllers.length > 0);
  assert(
    host.controllers.every(({ keys }) => keys?.host === made?.hostSecret && keys?.controller === made?.targetSecret),
  );
  const keys = newKeys("bidirectional");
  demand(keys);
  await attach({ "dhchap-key": keys.host.reveal(), "dhchap-ctrl-key": keys.controller?.reveal() ?? "" });

  assert.deepEqual(texts(await c.keysOf("bidirectional")), texts(keys));
  assert(host.controllers.every(({ keys: used }) => used?.host === keys.host.reveal()));
});

Deno.test("attachVolume of a known place connects with the keys it is given", async () => {
  const keys = newKeys();
  const { host, attacher, connected } = machine(keys);
  const tools: LocalMachine = { host, attacher, hostNqn: us, discoveryDirectory: undefined };
  const wanted = { namespace: { ...place, inBandAuth: "unidirectional" } as const, keys };

  await attachVolume(callContext(), tools, wanted, undefined);

  assert.deepEqual(connected().map(([, used]) => used), [texts(keys), texts(keys)]);
});

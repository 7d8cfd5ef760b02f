import assert from "node:assert/strict";
import { join } from "node:path";
import { createLogger } from "../../../lib/context.ts";
import { StatusError } from "../../../lib/error.ts";
import type { Host } from "../../../lib/host/host.ts";
import { createLinuxHost } from "../../../lib/host/linux_host.ts";
import { nameUuid } from "../../../lib/uuid.ts";
import { connectController } from "../../../lib/host/nvme/connect.ts";
import { addressOf, controllersOf } from "../../../lib/host/nvme/controllers.ts";
import { devicesOf, findDevice } from "../../../lib/host/nvme/devices.ts";
import { disconnectController } from "../../../lib/host/nvme/disconnect.ts";
import { recheckDevice } from "../../../lib/host/nvme/recheck.ts";
import { rescanNamespaces } from "../../../lib/host/nvme/rescan.ts";
import { waitForDevice } from "../../../lib/host/nvme/wait.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { needs } from "../../support/needs.ts";
import { callContext, rejects } from "../../support/node_calls.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
const nqn = "nqn.2019-09.com.example:cluster:1";
const hint = "see that the daemon runs";

/** A sysfs-shaped directory, as the kernel 6.1 writes it. */
async function sysfs(
  files: Record<string, string>,
  act: (host: Host, directory: string) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-nvme-" });
  try {
    await Deno.mkdir(join(directory, "sys/class/block"), { recursive: true });
    await Deno.mkdir(join(directory, "dev"));
    for (const [path, text] of Object.entries(files)) await put(directory, path, text);
    const log = createLogger("error");
    await act(createLinuxHost({ log, sysfsRoot: join(directory, "sys"), devRoot: join(directory, "dev") }), directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

async function put(directory: string, path: string, text: string): Promise<void> {
  const full = join(directory, "sys", path);
  await Deno.mkdir(join(full, ".."), { recursive: true });
  await Deno.writeTextFile(full, `${text}\n`);
}

function block(name: string, attributes: Partial<Record<string, string>> = {}): Record<string, string> {
  const all = {
    wwid: `uuid.${uuid}`,
    uuid,
    dev: "259:1",
    size: "2048",
    hidden: "0",
    ro: "0",
    "device/subsysnqn": nqn,
    ...attributes,
  };
  return Object.fromEntries(
    Object.entries(all).flatMap(([key, text]) => text === undefined ? [] : [[`class/block/${name}/${key}`, text]]),
  );
}

Deno.test("findDevice tells all about the namespace with this UUID", async () => {
  await sysfs({ ...block("nvme3n7"), ...block("nvme3n8", { wwid: `uuid.${other}`, dev: "259:2" }) }, async (host) => {
    assert.deepEqual(await findDevice(host, uuid.toUpperCase(), nqn), {
      name: "nvme3n7",
      path: `${host.roots.dev}/nvme3n7`,
      number: "259:1",
      uuid,
      subsystemNqn: nqn,
      sizeBytes: 1048576n,
      readOnly: false,
    });
    assert.deepEqual((await devicesOf(host, nqn)).map(({ name }) => name), ["nvme3n7", "nvme3n8"]);
  });
});

const notIt: readonly [string, Record<string, string>][] = [
  ["a path of it", block("nvme0c0n1", { hidden: "1" })],
  ["a partition of it", block("nvme0n1p1")],
  ["a hidden device", block("nvme0n1", { hidden: "1" })],
  ["a device whose UUID file shows its NGUID", block("nvme0n1", { wwid: `eui.${uuid.replaceAll("-", "")}` })],
  ["a device with another UUID", block("nvme0n1", { wwid: `uuid.${other}` })],
  ["a device of another subsystem", block("nvme0n1", { "device/subsysnqn": "nqn.other" })],
  ["a device that is half removed", block("nvme0n1", { size: undefined })],
  ["a disk that is not NVMe", block("sda")],
];
for (const [what, files] of notIt) {
  Deno.test(`promise 3: findDevice does not take ${what} for the namespace`, async () => {
    await sysfs(files, async (host) => assert.equal(await findDevice(host, uuid, nqn), undefined));
  });
}

Deno.test("promise 3: findDevice refuses to choose between two devices with one UUID", async () => {
  const twin = block("nvme1n1", { dev: "259:9", "device/subsysnqn": "nqn.2019-09.com.example:cluster:2" });
  await sysfs({ ...block("nvme0n1"), ...twin }, async (host) => {
    await rejects(
      findDevice(host, uuid),
      "FAILED_PRECONDITION",
      /nvme0n1 \(.*cluster:1\) and nvme1n1 \(.*cluster:2\) both claim/,
    );
    assert.equal((await findDevice(host, uuid, nqn))?.name, "nvme0n1");
  });
});

Deno.test({
  name: "promise 14: waitForDevice notices the device within milliseconds of its arrival, not at its next look",
  ignore: !needs("root"),
  fn: () =>
    sysfs({}, async (host, directory) => {
      // A look every 10 minutes: only the watch can tell in time.
      const waiting = waitForDevice(host, callContext(), uuid, { subsystemNqn: nqn, hint, pollMs: 600_000 });
      await new Promise((resolve) => setTimeout(resolve, 50));
      for (const [path, text] of Object.entries(block("nvme0n1", { dev: "7:200" }))) await put(directory, path, text);
      const arrived = performance.now();
      await new Deno.Command("mknod", { args: [join(host.roots.dev, "nvme0n1"), "b", "7", "200"] }).output();

      const device = await waiting;

      assert.equal(device.name, "nvme0n1");
      const ms = performance.now() - arrived;
      assert(ms < 1000, `noticed after ${ms} ms`);
    }),
});

Deno.test({
  name: "waitForDevice looks again by itself where nothing can be watched",
  ignore: !needs("root"),
  fn: () =>
    sysfs({}, async (host, directory) => {
      const deaf = { ...host, watch: () => ({ [Symbol.dispose]: () => {} }) };
      const waiting = waitForDevice(deaf, callContext(), uuid, { subsystemNqn: nqn, hint, pollMs: 10 });
      for (const [path, text] of Object.entries(block("nvme0n1", { dev: "7:200" }))) await put(directory, path, text);
      await new Deno.Command("mknod", { args: [join(host.roots.dev, "nvme0n1"), "b", "7", "200"] }).output();

      assert.equal((await waiting).name, "nvme0n1");
    }),
});

const controller = (name: string, state: string) => ({
  [`class/nvme/${name}/subsysnqn`]: nqn,
  [`class/nvme/${name}/state`]: state,
  [`class/nvme/${name}/hostnqn`]: "nqn.host",
  [`class/nvme/${name}/transport`]: "tcp",
  [`class/nvme/${name}/address`]: `traddr=192.0.2.${name.slice(4)},trsvcid=4420,src_addr=192.0.2.200`,
});
const absences: readonly [string, Record<string, string>, RegExp][] = [
  [
    "NVMe is not there at all",
    {},
    /has no NVMe controllers at all, the kernel module nvme_tcp is needed; see that the daemon/,
  ],
  [
    "nothing is connected",
    { "class/nvme/nvme9/state": "live" },
    /no connection to nqn.*cluster:1; see that the daemon runs/,
  ],
  [
    "the connections show no such namespace",
    { ...controller("nvme1", "live"), ...controller("nvme2", "connecting") },
    /nvme1 to 192.0.2.1:4420 is live, nvme2 to 192.0.2.2:4420 is connecting, but it shows no such namespace to this host/,
  ],
  ["its node is missing", block("nvme0n1"), /sysfs has nvme0n1 as device 259:1, but the node .*nvme0n1 is missing/],
  ["its size is zero", block("nvme0n1", { size: "0" }), /sysfs has nvme0n1, but its size is zero/],
  [
    "it is in another subsystem",
    block("nvme0n1", { "device/subsysnqn": "nqn.x" }),
    /belongs to another subsystem than nqn.*:1/,
  ],
];
for (const [what, files, message] of absences) {
  Deno.test(`promise 20: waitForDevice says at the deadline that ${what}`, async () => {
    await sysfs(files, async (host) => {
      const caller = new AbortController();
      const waiting = waitForDevice(host, callContext(caller.signal), uuid, { subsystemNqn: nqn, hint });
      setTimeout(() => caller.abort(new StatusError("DEADLINE_EXCEEDED", "too late")), 20);

      await rejects(waiting, "UNAVAILABLE", message);
    });
  });
}

Deno.test("waitForDevice throws the reason when the caller has given up", async () => {
  await sysfs({}, async (host) => {
    const gone = AbortSignal.abort(new StatusError("CANCELLED", "given up by its caller"));

    await rejects(waitForDevice(host, callContext(gone), uuid, { hint }), "CANCELLED", /given up by its caller/);
  });
});

Deno.test("promise 3: recheckDevice names both identities when the name has changed hands", async () => {
  const host = fakeHost();
  const device = await findDevice(host, uuid);
  assert(device);
  assert.deepEqual(await recheckDevice(host, callContext().doing("grow it"), device), device);

  await rejects(
    recheckDevice(host, callContext().doing("grow it"), { ...device, uuid: other }),
    "UNAVAILABLE",
    /Cannot grow it: \/dev\/nvme0n1 is nvme0n1 \(namespace 0f2c6a5e.*\) now, namespace 1b7e2c44.* has to be found again/,
  );
  await rejects(
    recheckDevice(host, callContext().doing("grow it"), { ...device, number: "259:7" }),
    "UNAVAILABLE",
    /has become device 259:1/,
  );
  host.devices.length = 0;
  await rejects(recheckDevice(host, callContext().doing("grow it"), device), "UNAVAILABLE", /\/dev\/nvme0n1 is gone/);
});

Deno.test("controllersOf reads state and address", async () => {
  await sysfs({ ...controller("nvme1", "live"), "class/nvme/nvme7/subsysnqn": "nqn.other" }, async (host) => {
    const [only, ...rest] = await controllersOf(host, nqn);
    assert.deepEqual([only?.state, only?.hostNqn, rest.length], ["live", "nqn.host", 0]);
    assert.deepEqual(only === undefined ? undefined : addressOf(only), { traddr: "192.0.2.1", trsvcid: "4420" });
  });
});

const wish = {
  address: { traddr: "192.0.2.1", trsvcid: "4420" },
  subsystemNqn: nqn,
  hostNqn: "nqn.host",
  hostId: "f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c",
};
const notAllowed = "not allowed: the subsystem is unknown there or has no access for host NQN nqn.host";
const mayNot =
  "; this process may not use nvme-fabrics: root is needed, in a container a privileged one, and a security " +
  "module such as SELinux can forbid it too";
const isNotLoaded = "; the kernel module nvme_tcp is not loaded";

// What nvme-cli 2.3 and 2.13 say, exit 1 each time: 2.3 writes the kernel's word and its own, 2.13 most often its own alone.
const failures: readonly [string, string | undefined][] = [
  ["already connected\n", undefined],
  ["Failed to write to /dev/nvme-fabrics: Operation already in progress\n", undefined],
  ["Failed to write to /dev/nvme-fabrics: Connection refused\n", "refused, nothing listens there"],
  ["could not add new controller: connection refused\n", "refused, nothing listens there"],
  ["Failed to write to /dev/nvme-fabrics: Input/output error\n", notAllowed],
  [
    "Failed to write to /dev/nvme-fabrics: Input/output error\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    notAllowed,
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Connection timed out\n",
    "no way there (Failed to write to /dev/nvme-fabrics: Connection timed out)",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: No route to host\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    "no way there (Failed to write to /dev/nvme-fabrics: No route to host; " +
    "could not add new controller: failed to write to nvme-fabrics device)",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Connection reset by peer\n" +
    "could not add new controller: failed to write to nvme-fabrics device\n",
    "Failed to write to /dev/nvme-fabrics: Connection reset by peer; " +
    "could not add new controller: failed to write to nvme-fabrics device",
  ],
  [
    "Failed to open /dev/nvme-fabrics: No such file or directory\n",
    `Failed to open /dev/nvme-fabrics: No such file or directory${isNotLoaded}`,
  ],
  [
    "Failed to scan topology: No such file or directory\n",
    `Failed to scan topology: No such file or directory${isNotLoaded}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: No such device\ncould not add new controller: failed to open nvme-fabrics device\n",
    "Failed to open /dev/nvme-fabrics: No such device; could not add new controller: failed to open nvme-fabrics device" +
    isNotLoaded,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Permission denied\n",
    `Failed to open /dev/nvme-fabrics: Permission denied${mayNot}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Operation not permitted\n" +
    "could not add new controller: failed to open nvme-fabrics device\n",
    "Failed to open /dev/nvme-fabrics: Operation not permitted; " +
    `could not add new controller: failed to open nvme-fabrics device${mayNot}`,
  ],
  [
    "Failed to open /dev/nvme-fabrics: Too many open files\n",
    "Failed to open /dev/nvme-fabrics: Too many open files",
  ],
  [
    "Failed to write to /dev/nvme-fabrics: Invalid argument\n",
    "Failed to write to /dev/nvme-fabrics: Invalid argument",
  ],
  [
    "could not add new controller: invalid arguments/configuration\n",
    "could not add new controller: invalid arguments/configuration",
  ],
  [
    "could not add new controller: pre-shared TLS key is missing\n",
    "in-band authentication (DH-HMAC-CHAP) is demanded there, and no key is given (in-band-auth)",
  ],
  ["", "nvme connect exits 1"],
];
for (const [stderr, reason] of failures) {
  Deno.test(`connectController tells "${stderr.trim()}" apart`, async () => {
    const host = fakeHost();
    host.answers.set("nvme connect", { code: 1, stderr });

    assert.equal(await connectController(host, callContext(), wish), reason);
    assert.deepEqual(host.commands, [
      `nvme connect --transport=tcp --traddr=192.0.2.1 --trsvcid=4420 --nqn=${nqn} --hostnqn=nqn.host ` +
      `--hostid=f4c1fb1c-0d56-4d0a-9d5d-9c36ed1ffa0c`,
    ]);
  });
}

Deno.test("connectController keeps what nvme-cli says on its standard output", async () => {
  const host = fakeHost();
  host.answers.set("nvme connect", { code: 1, stdout: "Failed to create topology root: Cannot allocate memory\n" });

  assert.equal(
    await connectController(host, callContext(), wish),
    "Failed to create topology root: Cannot allocate memory",
  );
});

// nvme-cli 2.11 to 2.16 keep the kernel's reason to themselves.
for (
  const [answer, reason] of [
    ["Connection timed out (os error 110)", "no way there (Connection timed out (os error 110))"],
    ["No route to host (os error 113)", "no way there (No route to host (os error 113))"],
    ["Input/output error (os error 5)", notAllowed],
    [
      "Permission denied (os error 13): open '/dev/nvme-fabrics'",
      `Permission denied (os error 13): open '/dev/nvme-fabrics'${mayNot}`,
    ],
    ["Broken pipe (os error 32)", "Broken pipe (os error 32)"],
    [
      "No such file or directory (os error 2): open '/dev/nvme-fabrics'",
      "could not add new controller: failed to write to nvme-fabrics device; the kernel log (dmesg) tells why",
    ],
    [undefined, undefined],
  ] as const
) {
  Deno.test(`connectController asks the kernel where nvme-cli gives no reason: ${answer ?? "connected"}`, async () => {
    const host = fakeHost();
    host.controllers.splice(0);
    host.answers.set("nvme connect", {
      code: 1,
      stderr: "could not add new controller: failed to write to nvme-fabrics device\n",
    });
    if (answer !== undefined) host.answers.set("connect 192.0.2.1", { stderr: answer });

    assert.equal(await connectController(host, callContext(), { ...wish, keepAliveSeconds: 10 }), reason);

    assert.deepEqual(host.commands.slice(1), [
      `/dev/nvme-fabrics: nqn=${nqn},transport=tcp,traddr=192.0.2.1,trsvcid=4420,hostnqn=nqn.host,` +
      `hostid=${wish.hostId},keep_alive_tmo=10`,
    ]);
    assert.equal(host.controllers.length, answer === undefined ? 1 : 0);
  });
}

Deno.test("disconnectController does not believe an exit status of 0 when nvme-cli says that it failed", async () => {
  const host = fakeHost();
  host.answers.set("nvme disconnect", { code: 0, stderr: "Failed to disconnect nvme0: Permission denied\n" });
  const [controller] = await controllersOf(host, nqn);
  assert(controller);

  await rejects(
    disconnectController(host, callContext(), controller),
    "UNAVAILABLE",
    /Cannot disconnect nvme0 from nqn.*: Failed to disconnect nvme0: Permission denied$/,
  );
});

Deno.test("disconnectController is done when the connection went before nvme-cli came to it", async () => {
  const host = fakeHost();
  const [controller] = await controllersOf(host, nqn);
  assert(controller);
  host.run = () => {
    host.controllers.splice(0);
    return Promise.resolve({ code: 1, stdout: "", stderr: "Did not find device nvme0\n" });
  };

  await disconnectController(host, callContext(), controller);
});

for (
  const [parameter, reason] of [
    [
      "N",
      /native NVMe multipath is off \(nvme_core.multipath=N\), nvme_core.multipath=Y on the kernel's command line is needed$/,
    ],
    [undefined, /built without native NVMe multipath \(CONFIG_NVME_MULTIPATH\), a kernel with it is needed$/],
    ["Y", /both claim it, one subsystem has to be disconnected$/],
  ] as const
) {
  Deno.test(`findDevice says why two devices of one subsystem claim a UUID: multipath is ${parameter ?? "not built"}`, async () => {
    const module = "module/nvme_core";
    const files = parameter === undefined
      ? { [`${module}/version`]: "1.0" }
      : { [`${module}/parameters/multipath`]: parameter };
    await sysfs({ ...block("nvme0n1"), ...block("nvme1n1", { dev: "259:9" }), ...files }, async (host) => {
      await rejects(findDevice(host, uuid), "FAILED_PRECONDITION", reason);
    });
  });
}

Deno.test("rescanNamespaces asks one live controller, and failing does no harm", async () => {
  const host = fakeHost();
  host.connect(nqn, "nqn.host", "192.0.2.2");
  host.connect(nqn, "nqn.host", "192.0.2.3");
  const [first] = host.controllers;
  assert(first);
  first.state = "connecting";

  await rescanNamespaces(host, callContext(), nqn);
  assert.deepEqual(host.commands, ["nvme ns-rescan /dev/nvme1"]);
  host.answers.set("nvme ns-rescan", { code: 1, stderr: "No such device" });
  await rescanNamespaces(host, callContext(), nqn);

  assert.equal(host.commands.length, 3);
});

Deno.test("promise 14: waitForDevice has every live controller asked, for one alone may show the namespace", async () => {
  const host = new FakeHost();
  host.connect(nqn, "nqn.host", "192.0.2.1");
  host.connect(nqn, "nqn.host", "192.0.2.2");
  host.addNamespace(uuid, nqn);
  host.hidden.set(`nvme0 ${uuid}`, "withdrawn");
  host.hidden.set(`nvme1 ${uuid}`, "lost");

  const device = await waitForDevice(host, callContext(), uuid, { subsystemNqn: nqn, hint });

  assert.equal(device.uuid, uuid);
  assert.deepEqual(host.commands, ["nvme ns-rescan /dev/nvme0", "nvme ns-rescan /dev/nvme1"]);
});

Deno.test("nameUuid is a UUID that depends on the name alone", () => {
  assert.match(nameUuid("a"), /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.equal(nameUuid("a"), nameUuid("a"));
  assert.notEqual(nameUuid("a"), nameUuid("b"));
});

function fakeHost(): FakeHost {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  host.connect(nqn);
  return host;
}

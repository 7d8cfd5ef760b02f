/** `lbcsi discovery-client`: what it does on a simulated machine, and the program itself. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createDiscoveryDaemon } from "../../lib/discovery/daemon.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import { discoveryNqn } from "../../lib/host/nvme/controllers.ts";
import { createLogger } from "../../lib/log.ts";
import { entry, hostId, nqn, other, otherNqn, quietHost, us, uuid } from "../support/discovery.ts";
import { eventually } from "../support/simulator.ts";

function machine(host = quietHost()) {
  host.addNamespace(uuid, nqn);
  host.logPages.set("192.0.2.1:8009", {
    generation: 1,
    records: [
      { address: "192.0.2.1:4420", subsystemNqn: nqn },
      { address: "192.0.2.2:4420", subsystemNqn: nqn },
      { address: "192.0.2.9:4420", subsystemNqn: otherNqn },
    ],
  });
  const clock = { ms: 0 };
  const lines: { event: string; error?: string; level: string; address?: string }[] = [];
  const make = () => {
    const daemon = createDiscoveryDaemon({
      host,
      directory: host.discoveryDirectory,
      log: createLogger("info", "json", (line) => void lines.push(JSON.parse(line))),
      pollMs: 10_000,
      controllerLossSeconds: 600,
      keepAliveSeconds: 10,
      ioQueues: undefined,
      now: () => clock.ms,
    });
    return {
      daemon,
      /** Looks until there is nothing left to do; `ms` pass before. */
      async settle(ms = 0): Promise<void> {
        clock.ms += ms;
        for (let turn = 0; turn < 8; turn++) {
          await daemon.look().catch(() => {});
          await daemon.idle();
        }
      },
    };
  };
  return {
    host,
    lines,
    make,
    /** nvme commands since the last time. */
    nvmeCommands: () =>
      host.commands.splice(0).filter((command) => /^nvme (connect|disconnect)/.test(command)).map((command) =>
        command.replace(/ --(transport|hostnqn|hostid|keep-alive-tmo|ctrl-loss-tmo)=\S+/g, "")
      ),
    writeEntry: (name: string, text: string) => host.replaceText(`${host.discoveryDirectory}/${name}`, text),
    removeEntry: (name: string) => host.remove(`${host.discoveryDirectory}/${name}`),
    connected: () => host.controllers.map(({ traddr, trsvcid }) => `${traddr}:${trsvcid}`).sort(),
  };
}

const connect = (address: string, subsystem = nqn) =>
  `nvme connect --traddr=${address.split(":")[0]} --trsvcid=${address.split(":")[1]} --nqn=${subsystem}`;

Deno.test("the daemon connects what the log pages list for the subsystems of the files, once", async () => {
  const { make, writeEntry, nvmeCommands, connected, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());

  await settle();

  assert.deepEqual(nvmeCommands(), [
    connect("192.0.2.1:8009", discoveryNqn),
    connect("192.0.2.1:4420"),
    connect("192.0.2.2:4420"),
  ]);
  assert.deepEqual(connected(), ["192.0.2.1:4420", "192.0.2.1:8009", "192.0.2.2:4420"]);
  assert.ok(host.controllers.every((controller) => controller.hostId === hostIdOf("n1.node")));
  await writeEntry(other, entry());
  await settle(1000);
  assert.deepEqual(nvmeCommands(), []);
});

Deno.test("the daemon passes host ID and timeouts to nvme-cli", async () => {
  const { make, writeEntry, host } = machine();
  await writeEntry(uuid, entry("192.0.2.1", nqn, ` -I ${hostId} -l 30`));

  await make().settle();

  const names = `--hostnqn=${us} --hostid=${hostId}`;
  assert.deepEqual(host.commands.filter((command) => command.startsWith("nvme connect")).slice(0, 2), [
    `nvme connect --transport=tcp --traddr=192.0.2.1 --trsvcid=8009 --nqn=${discoveryNqn} ${names} --keep-alive-tmo=30`,
    `nvme connect --transport=tcp --traddr=192.0.2.1 --trsvcid=4420 --nqn=${nqn} ${names} --ctrl-loss-tmo=30 --keep-alive-tmo=10`,
  ]);
});

Deno.test("the daemon uses the host ID that the host NQN already has", async () => {
  const { make, writeEntry, host } = machine();
  host.connect(nqn, us, "192.0.2.2", "4420", "aaaaaaaa-0000-4000-8000-000000000000");
  await writeEntry(uuid, entry("192.0.2.1", nqn, ` -I ${hostId}`));

  await make().settle();

  assert.deepEqual(new Set(host.controllers.map((c) => c.hostId)), new Set(["aaaaaaaa-0000-4000-8000-000000000000"]));
});

Deno.test("promise 23: a daemon that starts again takes over every connection and makes none", async () => {
  const { make, writeEntry, nvmeCommands, connected } = machine();
  await writeEntry(uuid, entry());
  await make().settle();
  const before = connected();
  nvmeCommands();

  await make().settle();

  assert.deepEqual(nvmeCommands(), []);
  assert.deepEqual(connected(), before);
});

Deno.test("the daemon follows a log page as it changes, within its poll interval", async () => {
  const { make, writeEntry, nvmeCommands, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  nvmeCommands();

  host.logPages.set("192.0.2.1:8009", { generation: 2, records: [{ address: "192.0.2.3:4420", subsystemNqn: nqn }] });
  await settle(9_999);
  assert.deepEqual(nvmeCommands(), []);
  await settle(1);

  assert.deepEqual(nvmeCommands(), [connect("192.0.2.3:4420")]);
});

Deno.test("the daemon drops an unlisted connection only when it has not worked for a while and another one does", async () => {
  const { make, writeEntry, nvmeCommands, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  host.logPages.set("192.0.2.1:8009", { generation: 2, records: [{ address: "192.0.2.1:4420", subsystemNqn: nqn }] });
  const second = host.controllers.find(({ traddr }) => traddr === "192.0.2.2");
  const first = host.controllers.find(({ traddr, trsvcid }) => traddr === "192.0.2.1" && trsvcid === "4420");
  assert.ok(first && second);
  nvmeCommands();

  await settle(10_000);
  await settle(100_000);
  assert.deepEqual(nvmeCommands(), [], "it works");
  second.state = "connecting";
  first.state = "connecting";
  await settle(100_000);
  await settle(100_000);
  assert.deepEqual(nvmeCommands(), [], "no other one works");
  first.state = "live";
  await settle();
  await settle(29_000);
  assert.deepEqual(nvmeCommands(), [], "not for long");
  await settle(2_000);

  assert.deepEqual(nvmeCommands(), [`nvme disconnect --device=${second.name}`]);
});

Deno.test("promise 2: the daemon drops no connection that is the last path to a namespace, although others work", async () => {
  const { make, writeEntry, nvmeCommands, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  const [, first, second] = host.controllers;
  assert.ok(first !== undefined && second !== undefined);
  // The kernel's multipath: both lead to the subsystem, and the second alone to where the namespace is.
  const states = new Map([[first, "inaccessible"], [second, "optimized"]]);
  const paths = new Map([...states].map(([{ name }, state]) => [name.replace(/^nvme/, "nvme0c") + "n1", state]));
  const [list, readText] = [host.list.bind(host), host.readText.bind(host)];
  host.list = async (path) =>
    path === "/sys/class/block" ? [...await list(path) ?? [], ...paths.keys()] : await list(path);
  host.readText = async (path) => paths.get(/block\/(\w+)\/ana_state$/.exec(path)?.[1] ?? "") ?? await readText(path);
  host.logPages.set("192.0.2.1:8009", {
    generation: 2,
    records: [{ address: `${first.traddr}:4420`, subsystemNqn: nqn }],
  });
  second.state = "connecting";
  nvmeCommands();

  for (let turn = 0; turn < 4; turn++) await settle(31_000);
  assert.deepEqual(nvmeCommands(), []);
  for (const path of paths.keys()) paths.set(path, "optimized");
  for (let turn = 0; turn < 2; turn++) await settle(31_000);

  assert.deepEqual(nvmeCommands(), [`nvme disconnect --device=${second.name}`]);
});

Deno.test("the daemon follows referrals, also in a circle, and drops a discovery connection that nothing names any more", async () => {
  const { make, writeEntry, nvmeCommands, host, connected } = machine();
  const { settle } = make();
  host.logPages.set("192.0.2.1:8009", { generation: 1, records: [{ address: "192.0.2.2:8009" }] });
  host.logPages.set("192.0.2.2:8009", {
    generation: 1,
    records: [{ address: "192.0.2.1:8009" }, { address: "192.0.2.2:4420", subsystemNqn: nqn }],
  });
  await writeEntry(uuid, entry());

  await settle();
  assert.deepEqual(connected(), ["192.0.2.1:8009", "192.0.2.2:4420", "192.0.2.2:8009"]);
  // Not before the log pages that may refer to it are read.
  nvmeCommands();
  await make().daemon.look();
  assert.deepEqual(nvmeCommands(), []);
  host.logPages.set("192.0.2.1:8009", { generation: 2, records: [] });
  await settle(10_000);

  assert.deepEqual(nvmeCommands(), ["nvme disconnect --device=nvme1"]);
});

Deno.test("the daemon follows at most 64 referrals", async () => {
  const { make, writeEntry, host } = machine();
  const addresses = Array.from({ length: 70 }, (_, n) => `192.0.2.${n + 2}:8009`);
  host.logPages.set("192.0.2.1:8009", { generation: 1, records: addresses.map((address) => ({ address })) });
  for (const address of addresses) host.logPages.set(address, { generation: 1, records: [] });
  await writeEntry(uuid, entry());
  const { daemon } = make();

  // To connect, to read, to connect those that it refers to, and once more.
  for (let turn = 0; turn < 4; turn++) {
    await daemon.look();
    await daemon.idle();
  }

  assert.equal(host.controllers.length, 65);
});

Deno.test("the daemon disconnects a subsystem when its last file is removed, and its discovery connection", async () => {
  const { make, writeEntry, removeEntry, nvmeCommands, connected, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await writeEntry(other, entry());
  await settle();
  nvmeCommands();

  await removeEntry(uuid);
  await settle();
  assert.deepEqual(nvmeCommands(), []);
  await removeEntry(other);
  await settle();

  assert.deepEqual(connected(), []);
  assert.equal((await host.readText(`${host.discoveryDirectory}/tmp.dc.lbcsi`))?.includes(nqn), false);
});

Deno.test("promise 3: the daemon keeps a subsystem that is in use, logs it once, and disconnects it later", async () => {
  const { make, writeEntry, removeEntry, nvmeCommands, host, lines, connected } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  const [device] = host.devices;
  assert.ok(device);
  const mount = { path: "/pods/x", device, isNode: false, fsType: "ext4", readOnly: false, superReadOnly: false };
  host.mounts.push(mount);
  nvmeCommands();

  await removeEntry(uuid);
  await settle();
  await settle(60_000);
  assert.deepEqual(nvmeCommands().filter((command) => !command.endsWith("=nvme0")), []);
  const said = lines.filter(({ event }) =>
    event === "could not disconnect a subsystem that no file names, tries again"
  );
  assert.deepEqual(said.map(({ error }) => error), [
    `/dev/nvme0n1 is in use by the mount at "/pods/x", it stays connected`,
  ]);
  host.mounts.splice(0);
  await settle(60_000);

  assert.deepEqual(connected(), []);
});

Deno.test("promise 3: the daemon keeps a subsystem that shows a namespace without a UUID, whose users are not known", async () => {
  const { make, writeEntry, removeEntry, nvmeCommands, host, lines } = machine();
  const readText = host.readText.bind(host);
  host.readText = async (path) => path.endsWith("/wwid") ? "eui.0025385b71b00fd4\n" : await readText(path);
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  nvmeCommands();

  await removeEntry(uuid);
  await settle();

  assert.deepEqual(nvmeCommands().filter((command) => !command.endsWith("=nvme0")), []);
  assert.match(
    lines.at(-1)?.error ?? "",
    /a namespace without a UUID, whose users are not known, it stays connected/,
  );
});

Deno.test("promise 8: the next daemon disconnects the subsystem of a file that was removed while no daemon ran", async () => {
  const { make, writeEntry, removeEntry, connected } = machine();
  await writeEntry(uuid, entry());
  await make().settle();

  await removeEntry(uuid);
  await make().settle();

  assert.deepEqual(connected(), []);
});

Deno.test("the daemon keeps everything when another directory takes the place of its own", async () => {
  const { make, writeEntry, removeEntry, nvmeCommands, connected } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  nvmeCommands();

  await removeEntry(uuid);
  await removeEntry("tmp.dc.lbcsi");
  await settle();

  assert.deepEqual(nvmeCommands(), []);
  assert.equal(connected().length, 3);
});

Deno.test("the daemon works in a read-only directory, and disconnects the subsystems that it remembers", async () => {
  const { make, writeEntry, removeEntry, connected, host, lines } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  host.replaceText = () => Promise.reject(new Error("Read-only file system (os error 30)"));

  await settle();
  assert.equal(connected().length, 3);
  await removeEntry(uuid);
  await settle();

  assert.deepEqual(connected(), []);
  assert.deepEqual(lines.filter(({ level }) => level === "warning").map(({ event, error }) => `${event}: ${error}`), [
    "cannot store which subsystems it manages, and forgets them when it ends: Read-only file system (os error 30)",
  ]);
});

Deno.test("the daemon never touches what no file has named", async () => {
  const { make, writeEntry, removeEntry, nvmeCommands, host } = machine();
  host.connect(otherNqn, us, "192.0.2.9");
  host.connect(nqn, "nqn.2014-08.org.nvmexpress:uuid:1", "192.0.2.8");
  host.addController({
    subsystemNqn: discoveryNqn,
    hostNqn: "nqn.2014-08.org.nvmexpress:uuid:1",
    hostId: "",
    traddr: "192.0.2.8",
    trsvcid: "8009",
    state: "live",
  });
  const { settle } = make();
  await settle();
  await writeEntry(uuid, entry());
  await settle();

  await removeEntry(uuid);
  await settle(60_000);

  assert.deepEqual(nvmeCommands().filter((command) => command.startsWith("nvme disconnect")).sort(), [
    "nvme disconnect --device=nvme3",
    "nvme disconnect --device=nvme4",
    "nvme disconnect --device=nvme5",
  ]);
  assert.deepEqual(host.controllers.map(({ traddr }) => traddr), ["192.0.2.9", "192.0.2.8", "192.0.2.8"]);
});

Deno.test("the daemon repeats a rejected connection after 1, 2, 4 … 60 seconds, and logs it once", async () => {
  const { make, writeEntry, nvmeCommands, host, lines } = machine();
  const { settle } = make();
  host.logPages.clear();
  await writeEntry(uuid, entry());
  const attempts: number[] = [];
  for (let second = 0; second < 200; second++) {
    await settle(1000);
    if (nvmeCommands().length > 0) attempts.push(second);
  }

  assert.deepEqual(attempts, [0, 1, 3, 7, 15, 31, 63, 123, 183]);
  assert.deepEqual(lines.filter(({ level }) => level === "warning").map(({ event, error }) => `${event}: ${error}`), [
    "could not connect to a discovery controller, tries again: refused, nothing listens there",
  ]);
});

Deno.test("the daemon repeats a rejected connection at once when a log page has changed", async () => {
  const { make, writeEntry, nvmeCommands, host } = machine();
  const { settle } = make();
  host.answers.set(`nvme connect --transport=tcp --traddr=192.0.2.2`, { code: 1, stderr: "Input/output error" });
  await writeEntry(uuid, entry());
  for (let turn = 0; turn < 7; turn++) await settle(10_000);
  nvmeCommands();
  host.answers.clear();
  const page = host.logPages.get("192.0.2.1:8009");
  assert.ok(page);
  page.generation++;

  await settle(10_000);

  assert.deepEqual(nvmeCommands(), [connect("192.0.2.2:4420")]);
});

Deno.test("the daemon makes a lost discovery connection again and reads its log page at once", async () => {
  const { make, writeEntry, nvmeCommands, host } = machine();
  const { settle } = make();
  await writeEntry(uuid, entry());
  await settle();
  host.controllers.splice(0, 1);
  host.logPages.set("192.0.2.1:8009", { generation: 2, records: [{ address: "192.0.2.3:4420", subsystemNqn: nqn }] });
  nvmeCommands();

  await settle();

  assert.deepEqual(nvmeCommands(), [connect("192.0.2.1:8009", discoveryNqn), connect("192.0.2.3:4420")]);
});

Deno.test("the daemon connects beside another host NQN, and names it when the kernel rejects that", async () => {
  const theirs = "nqn.2014-08.org.nvmexpress:uuid:1";
  for (const isRejected of [false, true]) {
    const { make, writeEntry, host, lines, connected } = machine();
    host.connect(nqn, theirs, "192.0.2.2");
    host.addController({
      subsystemNqn: discoveryNqn,
      hostNqn: theirs,
      hostId: "",
      traddr: "192.0.2.1",
      trsvcid: "8009",
      state: "live",
    });
    if (isRejected) host.answers.set("connect 192.0.2.2", { stderr: "Operation already in progress (os error 114)" });
    await writeEntry(uuid, entry());

    await make().settle();

    const ours = host.controllers.filter(({ hostNqn }) => hostNqn === us).map(({ traddr, trsvcid }) =>
      `${traddr}:${trsvcid}`
    );
    assert.deepEqual(ours.sort(), ["192.0.2.1:4420", "192.0.2.1:8009", ...(isRejected ? [] : ["192.0.2.2:4420"])]);
    assert.equal(connected().length, ours.length + 2);
    assert.deepEqual(
      lines.filter(({ level }) => level === "warning").map(({ address, error }) => `${address}: ${error}`),
      isRejected
        ? [
          `192.0.2.2:4420: nvme0 is connected there as host ${theirs}, disconnect it first ` +
          "(Operation already in progress (os error 114))",
        ]
        : [],
    );
  }
});

Deno.test("the daemon keeps one of several equal discovery connections", async () => {
  const { make, writeEntry, host } = machine();
  const equal = { subsystemNqn: discoveryNqn, hostNqn: us, hostId: "", traddr: "192.0.2.1", trsvcid: "8009" };
  for (let n = 0; n < 3; n++) host.addController({ ...equal, state: "live" });
  await writeEntry(uuid, entry());

  await make().settle();

  assert.deepEqual(host.controllers.filter((c) => c.subsystemNqn === discoveryNqn).map(({ name }) => name), ["nvme0"]);
});

Deno.test("the daemon resolves host names, and drops nothing while a name has no address", async () => {
  const { make, writeEntry, host, lines, connected } = machine();
  host.answers.set("getent ahosts c1.example", {
    stdout: "192.0.2.1       STREAM c1.example\n192.0.2.1       DGRAM\n",
  });
  await writeEntry(uuid, entry("c1.example"));
  await make().settle();
  assert.deepEqual(connected(), ["192.0.2.1:4420", "192.0.2.1:8009", "192.0.2.2:4420"]);
  host.answers.set("getent ahosts c1.example", { code: 2 });

  await make().settle();

  assert.deepEqual(connected(), ["192.0.2.1:4420", "192.0.2.1:8009", "192.0.2.2:4420"]);
  assert.deepEqual(lines.filter(({ event }) => event === "cannot resolve a host name").map(({ error }) => error), [
    "it has no address",
  ]);
});

Deno.test("promise 8: the daemon, killed at any call, leaves a machine that the next one brings to the same state", async () => {
  const steps = async (m: ReturnType<typeof machine>, cut: { at: number; when: "before" | "after" } | undefined) => {
    await m.writeEntry(uuid, entry());
    const begin = m.host.calls;
    m.host.cut = cut === undefined ? undefined : { at: begin + cut.at, when: cut.when };
    await m.make().settle();
    m.host.cut = undefined;
    const whole = cut === undefined || m.host.calls - begin < cut.at;
    await m.make().settle(60_000);
    assert.deepEqual(m.connected(), ["192.0.2.1:4420", "192.0.2.1:8009", "192.0.2.2:4420"]);
    await m.removeEntry(uuid);
    const next = m.host.calls;
    m.host.cut = cut === undefined ? undefined : { at: next + cut.at, when: cut.when };
    await m.make().settle();
    m.host.cut = undefined;
    const wholeToo = cut === undefined || m.host.calls - next < cut.at;
    await m.make().settle(60_000);
    assert.deepEqual(m.connected(), []);
    return whole && wholeToo;
  };
  let cuts = 0;
  for (const when of ["before", "after"] as const) {
    for (let at = 1; !await steps(machine(), { at, when }); at += 1) cuts++;
  }

  assert.ok(cuts > 100, `${cuts}`);
});

Deno.test("run ends on its signal, waits for a command that changes something, and leaves connections up", async () => {
  const { make, writeEntry, host, connected } = machine();
  await writeEntry(uuid, entry());
  const { daemon } = make();
  const stop = new AbortController();
  const running = daemon.run(stop.signal, 5000);
  await eventually("all is connected", () => host.controllers.length === 3);

  stop.abort();
  await running;

  assert.deepEqual(connected(), ["192.0.2.1:4420", "192.0.2.1:8009", "192.0.2.2:4420"]);
});

// --------------------------------------------------------------------------------------------------------- the program

const main = fileURLToPath(new URL("../../main.ts", import.meta.url));

for (const command of ["discovery-client", "node", "attach", "detach", "list"]) {
  Deno.test(`lbcsi ${command} with a mistyped --discovery-dir ends with 2, says what to do, and makes nothing`, async () => {
    const directory = await Deno.makeTempDir({ prefix: "lbcsi-discovery-" });
    const path = join(directory, "discovery.b");
    await Deno.writeTextFile(join(directory, "file"), "");
    const words: Record<string, readonly string[]> = {
      node: ["--node-id", "n1.node", "--endpoint", `unix://${directory}/csi.sock`],
      attach: ["--node-id", "n1.node", "--uuid", uuid, "--nqn", nqn, "--address", "192.0.2.1"],
      detach: ["--node-id", "n1.node", "--uuid", uuid, "--nqn", nqn],
    };
    const run = async (given: string) => {
      const { code, stderr } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", main, command, "--discovery-dir", given, ...words[command] ?? []],
        stdin: "null",
        env: { NO_COLOR: "1" },
      }).output();
      return { code, err: new TextDecoder().decode(stderr) };
    };

    for (
      const [given, problem] of [[path, "there is no such directory"], [
        join(directory, "file"),
        "it is not a directory",
      ]]
    ) {
      const { code, err } = await run(given ?? "");

      assert.equal(code, 2, err);
      const advice = command === "discovery-client" ? "create it (mkdir -p), or give" : "give";
      assert.ok(
        err.startsWith(`lbcsi ${command}: --discovery-dir "${given}": ${problem}, ${advice} the one that the `),
        err,
      );
    }
    assert.deepEqual([...Deno.readDirSync(directory)].map(({ name }) => name), ["file"]);
    await Deno.remove(directory, { recursive: true });
  });
}

Deno.test("lbcsi discovery-client follows a linked directory, says what is missing, and ends with 0 on SIGTERM", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-discovery-" });
  await Deno.mkdir(join(directory, "real"));
  await Deno.symlink("real", join(directory, "in"));
  const roots = [
    "--discovery-dir",
    join(directory, "in"),
    "--dev",
    join(directory, "dev"),
    "--sysfs",
    join(directory, "s"),
  ];
  const process = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", main, "discovery-client", ...roots],
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  let err = "";
  const reading = (async () => {
    for await (const text of process.stderr.pipeThrough(new TextDecoderStream())) err += text;
  })();
  try {
    await eventually("it has looked", () => err.includes("nvme_tcp is needed"), 30_000);
    await Deno.writeTextFile(join(directory, "in", uuid), entry());
    await eventually("it has read the file", () => err.includes("took up a file"));
  } finally {
    process.kill("SIGTERM");
  }
  const { code } = await process.status;
  await reading;
  await Deno.remove(directory, { recursive: true });

  assert.equal(code, 0);
  const events = err.trim().split("\n").map((line) => JSON.parse(line)).map(({ role, event }) => `${role} ${event}`);
  assert.deepEqual(events.at(0), "discovery-client watches");
  assert.deepEqual(events.at(-1), "discovery-client stopped");
});

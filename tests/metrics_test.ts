/** The metrics of processes, read over HTTP as a collector reads them. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { join } from "node:path";
import { permissionsWith } from "../k8s/image/permissions.ts";
import { Testbed } from "../lib/demo/testbed.ts";
import { type CallError, Channel } from "../lib/grpc/client.ts";
import { callObserver, countManagementCall, families, Metrics, metricsResponse } from "../lib/metrics.ts";
import { hostNqn } from "../lib/namespace.ts";
import { Controller, Identity, Node, VolumeCapability_AccessMode_Mode as Mode } from "../proto/gen/csi_pb.ts";
import { mainPath } from "./support/lbcsi.ts";
import { needs } from "./support/needs.ts";
import { eventually } from "./support/simulator.ts";

const program = [Deno.execPath(), "run", "-A", "--no-check", mainPath];
const gib = 1n << 30n;
const toAnyPort = ["--metrics-address", "127.0.0.1:0"];

/** The values by name and labels: `name{label="value"}`. */
function parse(text: string): ReadonlyMap<string, number> {
  return new Map(
    text.split("\n").filter((line) => line !== "" && !line.startsWith("#")).map((line) => {
      const blank = line.lastIndexOf(" ");
      const value = Number(line.slice(blank + 1));
      ok(Number.isFinite(value), line);
      return [line.slice(0, blank), value];
    }),
  );
}

Deno.test("Metrics writes counters, cumulative buckets and gauges with their help and type", async () => {
  const metrics = new Metrics();
  metrics.count("lbcsi_csi_calls_total", ["Probe", "OK"]);
  metrics.count("lbcsi_csi_calls_total", ["Probe", "OK"]);
  metrics.observe("lbcsi_command_duration_seconds", ["mkfs.ext4"], 0.3);
  metrics.observe("lbcsi_command_duration_seconds", ["mkfs.ext4"], 400);
  metrics.gather(() => [["lbcsi_volumes_attached", [], 2]]);
  using _more = metrics.gather(() => Promise.resolve([["lbcsi_volumes_attached", [], 3]]));

  const text = await metrics.text();

  strictEqual(
    text,
    `# HELP lbcsi_csi_calls_total CSI calls that were answered
# TYPE lbcsi_csi_calls_total counter
lbcsi_csi_calls_total{method="Probe",code="OK"} 2
# HELP lbcsi_command_duration_seconds Time that these programs took
# TYPE lbcsi_command_duration_seconds histogram
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="0.005"} 0
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="0.02"} 0
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="0.1"} 0
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="0.5"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="1"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="5"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="15"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="60"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="300"} 1
lbcsi_command_duration_seconds_bucket{program="mkfs.ext4",le="+Inf"} 2
lbcsi_command_duration_seconds_sum{program="mkfs.ext4"} 400.3
lbcsi_command_duration_seconds_count{program="mkfs.ext4"} 2
# HELP lbcsi_volumes_attached Volumes that the node is connected to
# TYPE lbcsi_volumes_attached gauge
lbcsi_volumes_attached 5
`,
  );
});

Deno.test("Metrics gathers gauges at each reading, from the sources that it has then", async () => {
  const metrics = new Metrics();
  let value = 1;
  const source = metrics.gather(() => [["lbcsi_volumes_attached", [], value]]);

  const first = parse(await metrics.text());
  value = 7;
  const second = parse(await metrics.text());
  source[Symbol.dispose]();
  const third = parse(await metrics.text());

  deepStrictEqual([first, second, third].map((read) => read.get("lbcsi_volumes_attached")), [1, 7, undefined]);
});

Deno.test("Metrics leaves out a source that fails, and says why in a comment of one line", async () => {
  const metrics = new Metrics();
  metrics.gather(() => Promise.reject(new Error("no\nsysfs")));
  metrics.gather(() => [["lbcsi_volumes_attached", [], 2]]);

  const text = await metrics.text();

  match(text, /^lbcsi_volumes_attached 2$/m);
  match(text, /^# could not be read: no sysfs$/m);
});

Deno.test("Metrics bounds the values of a label: names from callers cannot fill the memory", async () => {
  const metrics = new Metrics();
  for (let n = 0; n < 1000; n++) {
    countManagementCall(metrics, { endpoint: `192.0.2.1:${n}`, method: "GetVolume", code: "OK", ms: 1 });
  }

  const read = parse(await metrics.text());

  const counts = [...read].filter(([name]) => name.startsWith("lbcsi_mgmt_calls_total"));
  strictEqual(counts.length, 101);
  strictEqual(read.get('lbcsi_mgmt_calls_total{endpoint="other",method="GetVolume",code="OK"}'), 900);
});

Deno.test("Metrics escapes the values of labels", async () => {
  const metrics = new Metrics();
  countManagementCall(metrics, { endpoint: 'a"b\\c\nd', method: "GetVolume", code: "OK", ms: 1 });

  match(await metrics.text(), /^lbcsi_mgmt_calls_total\{endpoint="a\\"b\\\\c\\nd",method="GetVolume",code="OK"\} 1$/m);
});

Deno.test("callObserver shows running calls, the age of the oldest, and how each one ended", async () => {
  const metrics = new Metrics();
  const observe = callObserver(metrics);

  const first = observe("NodeStageVolume");
  const second = observe("NodeStageVolume");
  const running = parse(await metrics.text());
  first("OK");
  second("ABORTED");
  const ended = parse(await metrics.text());

  strictEqual(running.get('lbcsi_csi_calls_running{method="NodeStageVolume"}'), 2);
  ok((running.get('lbcsi_csi_oldest_call_seconds{method="NodeStageVolume"}') ?? 0) > 0);
  strictEqual(ended.get('lbcsi_csi_calls_running{method="NodeStageVolume"}'), undefined);
  strictEqual(ended.get('lbcsi_csi_calls_total{method="NodeStageVolume",code="OK"}'), 1);
  strictEqual(ended.get('lbcsi_csi_calls_total{method="NodeStageVolume",code="ABORTED"}'), 1);
  strictEqual(ended.get('lbcsi_csi_call_duration_seconds_count{method="NodeStageVolume"}'), 2);
});

Deno.test("metricsResponse serves GET /metrics, and nothing else", async () => {
  const metrics = new Metrics();
  const ask = async (path: string, method = "GET") => {
    const response = await metricsResponse(metrics, new Request(`http://127.0.0.1${path}`, { method }));
    return [response.status, response.headers.get("content-type")?.split(";")[0]];
  };

  deepStrictEqual(await ask("/metrics"), [200, "text/plain"]);
  deepStrictEqual((await ask("/metrics", "POST"))[0], 405);
  deepStrictEqual((await ask("/"))[0], 404);
  deepStrictEqual((await ask("/healthz"))[0], 404);
});

Deno.test("docs/metrics.md has each metric with its type and labels, and no other", async () => {
  const document = await Deno.readTextFile(new URL("../docs/metrics.md", import.meta.url));

  const documented = [...document.matchAll(/^\| `(\w+)` \| (\w+) \| (.*?) ?\| .+ \| .+ \|$/gm)].map((
    [, name, type, labels = ""],
  ) => [name, type, [...labels.matchAll(/`(\w+)`/g)].map(([, label]) => label)]);

  deepStrictEqual(documented, Object.entries(families).map(([name, { type, labels }]) => [name, type, [...labels]]));
});

/** A cluster and processes of the driver, in a directory of their own. */
async function withTestbed(
  backend: "lightos" | "poseidon",
  body: (testbed: Testbed, signal: AbortSignal) => Promise<void>,
) {
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-metrics-" }));
  const testbed = new Testbed(home, program, { backend });
  try {
    await body(testbed, AbortSignal.timeout(120_000));
  } finally {
    await testbed.cleanUp(false);
  }
}

/** Reads the metrics of a service of the testbed, at the address that it wrote to its log. */
async function readMetrics(
  testbed: Testbed,
  role: string,
): Promise<{ text: string; values: ReadonlyMap<string, number> }> {
  const log = await Deno.readTextFile(join(testbed.home, `${role}.log`));
  const address = /"event":"serves metrics".*?"address":"([^"]+)"/.exec(log)?.[1];
  ok(address, log);
  const response = await fetch(`http://${address}/metrics`);
  const text = await response.text();
  strictEqual(response.status, 200, text);
  return { text, values: parse(text) };
}

const block = {
  accessType: { case: "block" as const, value: {} },
  accessMode: { mode: Mode.SINGLE_NODE_WRITER },
};

Deno.test("the controller's metrics move with CSI calls, management calls and connections", async () => {
  await withTestbed("lightos", async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    const ca = join(testbed.home, "ca.pem");
    await Deno.writeTextFile(ca, testbed.addresses.ca ?? "");
    await testbed.startService("controller", ["--mgmt-ca", ca, "--log-level", "info", ...toAnyPort], signal);
    const before = await readMetrics(testbed, "controller");

    const { volume } = await testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-1",
      capacityRange: { requiredBytes: gib },
      volumeCapabilities: [block],
      parameters: testbed.parameters,
      secrets: testbed.secrets,
    }, { signal });
    const failure = await testbed.controller.call(Controller.method.createVolume, { name: "" }, { signal })
      .catch((error: CallError) => error.code);
    const { text, values } = await readMetrics(testbed, "controller");

    strictEqual(failure, "INVALID_ARGUMENT");
    strictEqual(before.values.get('lbcsi_csi_calls_total{method="CreateVolume",code="OK"}'), undefined);
    strictEqual(values.get('lbcsi_csi_calls_total{method="CreateVolume",code="OK"}'), 1);
    strictEqual(values.get('lbcsi_csi_calls_total{method="CreateVolume",code="INVALID_ARGUMENT"}'), 1);
    strictEqual(values.get('lbcsi_csi_call_duration_seconds_count{method="CreateVolume"}'), 2);
    const [endpoint = ""] = [...values.keys()].flatMap((name) =>
      /^lbcsi_mgmt_calls_total\{endpoint="([^"]+)",method="CreateVolume",code="OK"\}$/.exec(name)?.[1] ?? []
    );
    ok(testbed.addresses.grpcs.includes(endpoint), text);
    strictEqual(values.get(`lbcsi_mgmt_connections{endpoint="${endpoint}",security="verified"}`), 1);
    strictEqual(values.get(`lbcsi_mgmt_endpoint_resting{endpoint="${endpoint}"}`), 0);
    ok((values.get(`lbcsi_mgmt_call_duration_seconds_count{endpoint="${endpoint}",method="GetVolume"}`) ?? 0) > 0);
    ok((values.get("process_resident_memory_bytes") ?? 0) > 10 << 20);
    const age = Date.now() / 1000 - (values.get("process_start_time_seconds") ?? 0);
    ok(age > 0 && age < 600, `${age}`);
    match(text, /^lbcsi_build_info\{version="[^"]+",role="controller",backend="lightos"\} 1$/m);
    const secretsAndNames = [
      testbed.secrets["jwt"] ?? "",
      volume?.volumeId ?? "",
      "pvc-1",
      testbed.addresses.jwt.slice(-20),
    ];
    deepStrictEqual(secretsAndNames.filter((each) => text.includes(each)), []);
  });
});

Deno.test("promise 11: metrics show connections whose certificate was not verified", async () => {
  await withTestbed("lightos", async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    const options = ["--mgmt-tls-verify", "false", "--log-level", "info", ...toAnyPort];
    await testbed.startService("controller", options, signal);

    await testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-1",
      volumeCapabilities: [block],
      parameters: testbed.parameters,
      secrets: testbed.secrets,
    }, { signal });

    const { values, text } = await readMetrics(testbed, "controller");
    const unverified = testbed.addresses.grpcs.map((endpoint) =>
      values.get(`lbcsi_mgmt_connections{endpoint="${endpoint}",security="unverified"}`) ?? 0
    );
    strictEqual(unverified.reduce((sum, each) => sum + each, 0), 1, text);
    ok(!text.includes('security="verified"'), text);
  });
});

Deno.test("promise 12: metrics show an endpoint that failed and is left alone", async () => {
  await withTestbed("lightos", async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    await testbed.startService(
      "controller",
      ["--mgmt-tls-verify", "false", "--log-level", "info", ...toAnyPort],
      signal,
    );
    const dead = "127.0.0.1:1";

    await testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-1",
      volumeCapabilities: [block],
      parameters: { ...testbed.parameters, "mgmt-endpoint": [dead, ...testbed.addresses.grpcs].join(",") },
      secrets: testbed.secrets,
    }, { signal });

    const { values, text } = await readMetrics(testbed, "controller");
    strictEqual(values.get(`lbcsi_mgmt_endpoint_failures{endpoint="${dead}"}`), 1, text);
    strictEqual(values.get(`lbcsi_mgmt_connections{endpoint="${dead}",security="unverified"}`), 0);
    strictEqual(
      values.get(`lbcsi_mgmt_calls_total{endpoint="${dead}",method="CreateVolume",code="UNAVAILABLE"}`),
      1,
    );
  });
});

Deno.test("promise 9: metrics show a call that hangs, and for how long", async () => {
  await withTestbed("lightos", async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    await testbed.startService(
      "controller",
      ["--mgmt-tls-verify", "false", "--log-level", "info", ...toAnyPort],
      signal,
    );
    await testbed.ask("POST", "/faults", { rpc: "CreateVolume", delayMs: 60_000 });

    const given = new AbortController();
    const call = testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-1",
      volumeCapabilities: [block],
      parameters: testbed.parameters,
      secrets: testbed.secrets,
    }, { signal: given.signal });
    const values = await eventually("the call is seen running", async () => {
      const { values } = await readMetrics(testbed, "controller");
      return (values.get('lbcsi_csi_oldest_call_seconds{method="CreateVolume"}') ?? 0) > 0.2 ? values : undefined;
    });
    given.abort(new Error("enough"));
    await call.catch(() => {});

    strictEqual(values.get('lbcsi_csi_calls_running{method="CreateVolume"}'), 1);
    await eventually("it is gone when the caller has left", async () => {
      const { values } = await readMetrics(testbed, "controller");
      return values.get('lbcsi_csi_calls_total{method="CreateVolume",code="CANCELLED"}') === 1 &&
        values.get('lbcsi_csi_calls_running{method="CreateVolume"}') === undefined;
    });
  });
});

Deno.test({
  name: "the node's metrics move with commands, volumes and connections, and name none of them",
  ignore: !needs("root", "loop", "mkfs.ext4"),
  fn: async () => {
    await withTestbed("lightos", async (testbed, signal) => {
      await testbed.startSimulator("loop", signal);
      await testbed.startController(signal);
      await testbed.startNode("n1.node", signal, {}, ["--max-volumes", "9", "--log-level", "info", ...toAnyPort]);
      const capability = {
        accessType: { case: "mount" as const, value: { fsType: "ext4" } },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      };
      const { volume } = await testbed.controller.call(Controller.method.createVolume, {
        name: "pvc-1",
        capacityRange: { requiredBytes: gib },
        volumeCapabilities: [capability],
        parameters: testbed.parameters,
        secrets: testbed.secrets,
      }, { signal });
      const volumeId = volume?.volumeId ?? "";
      const { publishContext } = await testbed.controller.call(Controller.method.controllerPublishVolume, {
        volumeId,
        nodeId: "n1.node",
        volumeCapability: capability,
        secrets: testbed.secrets,
      }, { signal });
      const stagingTargetPath = join(testbed.home, "staging");
      await Deno.mkdir(stagingTargetPath);
      const before = await readMetrics(testbed, "node");

      await testbed.node.call(Node.method.nodeStageVolume, {
        volumeId,
        stagingTargetPath,
        publishContext,
        volumeCapability: capability,
      }, { signal });
      const { values, text } = await readMetrics(testbed, "node");
      await testbed.node.call(Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath }, { signal });

      strictEqual(before.values.get("lbcsi_volumes_attached"), 0);
      strictEqual(values.get("lbcsi_volumes_attached"), 1, text);
      deepStrictEqual([before, { values }].map(({ values }) => values.get("lbcsi_volumes_in_use")), [0, 1]);
      strictEqual(values.get("lbcsi_volumes_without_path"), 0);
      strictEqual(values.get("lbcsi_volumes_limit"), 9);
      ok((values.get('lbcsi_nvme_connections{kind="io",state="live"}') ?? 0) > 0, text);
      strictEqual(values.get('lbcsi_commands_total{program="mkfs.ext4",exit="0"}'), 1, text);
      strictEqual(values.get('lbcsi_command_duration_seconds_count{program="mount"}'), 1);
      strictEqual(values.get('lbcsi_csi_calls_total{method="NodeStageVolume",code="OK"}'), 1);
      const uuid = /nguid:([0-9a-f-]+)/.exec(volumeId)?.[1] ?? "";
      deepStrictEqual([uuid, testbed.home, "pvc-1", hostNqn("n1")].filter((each) => text.includes(each)), []);
    });
  },
});

Deno.test("the controller's metrics for PoseidonOS name routes, and neither arrays nor volumes", async () => {
  await withTestbed("poseidon", async (testbed, signal) => {
    await testbed.startSimulator("none", signal);
    await testbed.startService("controller", ["--log-level", "info", ...toAnyPort], signal);

    const { volume } = await testbed.controller.call(Controller.method.createVolume, {
      name: "pvc-secretive",
      volumeCapabilities: [block],
      parameters: testbed.parameters,
    }, { signal });
    await testbed.controller.call(Controller.method.deleteVolume, { volumeId: volume?.volumeId ?? "" }, { signal });

    const { values, text } = await readMetrics(testbed, "controller");
    const endpoint = testbed.addresses.dagent;
    const count = (method: string) =>
      values.get(`lbcsi_mgmt_calls_total{endpoint="${endpoint}",method="${method}",code="0"}`);
    strictEqual(count("POST /volumes"), 1, text);
    strictEqual(count("DELETE /volumes/{}"), 1, text);
    ok((count("GET /volumelist/{}") ?? 0) > 0);
    ok((count("GET /array/{}") ?? 0) > 0);
    deepStrictEqual([testbed.addresses.arrays[0] ?? "", "pvc-secretive"].filter((each) => text.includes(each)), []);
  });
});

Deno.test("lbcsi-controller has the right to serve metrics", async () => {
  const sockets = await Deno.makeTempDir({ prefix: "lbcsi-metrics-" });
  const restricted = [Deno.execPath(), "run", "--no-check", ...permissionsWith([sockets], [sockets]), mainPath];
  const testbed = new Testbed(sockets, restricted, { simulator: program });
  try {
    const options = ["--jwt-path", join(sockets, "jwt"), "--log-level", "info", ...toAnyPort];
    // The place of this machine's certificates is none of the directories that it may read.
    await testbed.startService("controller", options, AbortSignal.timeout(60_000), { SSL_CERT_FILE: "" });

    const { values } = await readMetrics(testbed, "controller");

    strictEqual(values.get('lbcsi_csi_calls_total{method="Probe",code="OK"}'), 1);
    ok((values.get("process_resident_memory_bytes") ?? 0) > 0);
  } finally {
    await testbed.cleanUp(false);
  }
});

Deno.test("lbcsi discovery-client serves metrics of its own", async () => {
  const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-metrics-" }));
  const places = ["--discovery-dir", `${home}/discovery.d`, "--sysfs", `${home}/sys`, "--dev", `${home}/dev`];
  await Deno.mkdir(`${home}/discovery.d`);
  const [deno = "", ...words] = program;
  const child = new Deno.Command(deno, {
    args: [...words, "discovery-client", ...places],
    env: { LB_CSI_DISCOVERY_METRICS_ADDRESS: "127.0.0.1:0" },
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const reader = child.stderr.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let log = "";
    let address: string | undefined;
    while (address === undefined) {
      const { value, done } = await reader.read();
      ok(!done, log);
      log += value;
      address = /"event":"serves metrics".*?"address":"([^"]+)"/.exec(log)?.[1];
    }

    const response = await fetch(`http://${address}/metrics`);
    const text = await response.text();

    match(response.headers.get("content-type") ?? "", /^text\/plain; version=0\.0\.4/);
    match(text, /^lbcsi_build_info\{version="[^"]+",role="discovery-client",backend="lightos"\} 1$/m);
    match(text, /^lbcsi_volumes_attached 0$/m);
  } finally {
    child.kill("SIGTERM");
    while (!(await reader.read()).done);
    await child.status;
    await Deno.remove(home, { recursive: true });
  }
});

Deno.test("lbcsi identity does not start when its metrics cannot be served, and says why", async () => {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-metrics-" });
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const [deno = "", ...words] = program;
  const run = async (address: string) => {
    const { code, stderr } = await new Deno.Command(deno, {
      args: [...words, "identity", "--endpoint", `unix://${home}/csi.sock`, "--metrics-address", address],
      env: { NO_COLOR: "1" },
    }).output();
    return { code, err: new TextDecoder().decode(stderr) };
  };
  try {
    const inUse = await run(`127.0.0.1:${taken.addr.port}`);
    const bad = await run("everywhere");

    strictEqual(inUse.code, 1, inUse.err);
    match(
      inUse.err,
      new RegExp(`^lbcsi identity: Cannot serve metrics on 127\\.0\\.0\\.1:${taken.addr.port}: .*in use`),
    );
    strictEqual(bad.code, 2);
    match(bad.err, /--metrics-address "everywhere": is not HOST:PORT/);
  } finally {
    await Deno.remove(home, { recursive: true });
  }
});

Deno.test("without --metrics-address nothing listens on TCP", async () => {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-metrics-" });
  const testbed = new Testbed(home, program);
  try {
    const running = await testbed.startService("identity", ["--log-level", "info"], AbortSignal.timeout(60_000));
    using channel = new Channel({ address: `unix://${home}/identity.sock` });
    await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(10_000) });

    const sockets = await Array.fromAsync(
      Deno.readDir(`/proc/${running.pid}/fd`),
      async ({ name }) => await Deno.readLink(`/proc/${running.pid}/fd/${name}`).catch(() => ""),
    );
    const inodes = sockets.flatMap((link) => /^socket:\[(\d+)\]$/.exec(link)?.[1] ?? []);
    const tcp = (await Deno.readTextFile("/proc/net/tcp")) + await Deno.readTextFile("/proc/net/tcp6").catch(() => "");
    const listening = tcp.split("\n").map((line) => line.trim().split(/\s+/)).filter((cells) => cells[3] === "0A");

    ok(inodes.length > 0);
    deepStrictEqual(listening.filter((cells) => inodes.includes(cells[9] ?? "")), []);
  } finally {
    await testbed.cleanUp(false);
  }
});

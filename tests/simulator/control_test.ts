import assert from "node:assert/strict";
import { StatusError } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { createLogger } from "../../lib/log.ts";
import { type EndpointState, serveControl } from "../../lib/simulator/control.ts";
import type { Behaviour } from "../../lib/simulator/lightos/behaviour.ts";
import type { SimulatorAddresses } from "../../lib/simulator/lightos/simulator.ts";
import { DurosAPI } from "../../proto/gen/lightos_pb.ts";
import { eventually, startSimulator, type TestSimulator } from "../support/simulator.ts";

const api = DurosAPI.method;
const projectName = "default";

Deno.test("control counts calls by RPC and endpoint, rejected ones too, until it is reset", async () => {
  await using sim = await startSimulator();
  using first = clientOf(sim, 0);
  using second = clientOf(sim, 1);

  await first.version();
  await second.version();
  await assert.rejects(first.version({ authorization: "Bearer x" }));

  const [one = "", two = ""] = sim.addresses.grpc;
  assert.deepEqual(await get(sim, "/calls"), { GetVersion: { total: 3, endpoints: { [one]: 2, [two]: 1 } } });
  assert.equal(sim.control.callsInAll(), 3);
  await request(sim, "DELETE", "/calls");
  assert.deepEqual(sim.control.calls(), {});
});

Deno.test("a fault before the effect fails so many calls with its code and leaves nothing", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  await post(sim, "/faults", { rpc: "CreateVolume", count: 2, code: "INTERNAL", message: "broken" });

  await fails(client.create("v1"), "INTERNAL", "broken");
  await fails(client.create("v1"), "INTERNAL", "broken");
  assert.deepEqual(sim.control.leftovers().volumes, []);
  await client.create("v1");
  await client.version();
});

Deno.test("a fault after the effect loses the answer only", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  sim.control.fail({ rpc: "CreateVolume", code: "UNAVAILABLE", when: "after" });

  await fails(client.create("v1"), "UNAVAILABLE", "Cannot answer CreateVolume: the simulator was told to fail");
  assert.match(sim.control.leftovers().volumes[0] ?? "", /^v1 /);
});

Deno.test("a fault that drops the connection after the effect loses the answer as a crash does", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after" });

  await assert.rejects(client.create("v1"), (error: unknown) => {
    assert.ok(error instanceof CallError);
    assert.deepEqual([error.code, error.origin], ["UNAVAILABLE", "no answer"]);
    return true;
  });
  assert.equal(sim.control.leftovers().volumes.length, 1);
});

Deno.test("a fault for one endpoint spares the others, and ends when it is cleared", async () => {
  await using sim = await startSimulator();
  using first = clientOf(sim, 0);
  using second = clientOf(sim, 1);
  const [endpoint] = sim.addresses.grpc;

  await post(sim, "/faults", { rpc: "*", count: 0, code: "UNAVAILABLE", endpoint });

  await fails(first.version(), "UNAVAILABLE", "Cannot answer GetVersion: the simulator was told to fail");
  await fails(first.version(), "UNAVAILABLE", "Cannot answer GetVersion: the simulator was told to fail");
  await second.version();
  await request(sim, "DELETE", "/faults");
  await first.version();
});

Deno.test("a delay holds an answer back", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);
  await client.version();

  sim.control.fail({ rpc: "GetVersion", delayMs: 300 });
  const started = performance.now();
  await client.version();

  assert.ok(performance.now() - started >= 295);
});

Deno.test("a held call waits before or after its effect, as its rule says, and continues when it is released", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const [endpoint] = sim.addresses.grpc;

  for (const [when, effect] of [["before", 0], ["after", 1]] as const) {
    const name = `held-${when}`;
    await post(sim, "/faults", { rpc: "CreateVolume", hold: true, when });
    const created = client.create(name);
    await eventually("the call is held", () => sim.control.held().length === 1);
    const volumes = sim.control.cluster.volumes.filter((volume) => volume.name === name).length;
    const held = await get(sim, "/held");
    await request(sim, "DELETE", "/held");
    await created;

    assert.deepEqual(held, [{ rpc: "CreateVolume", endpoint, when }]);
    assert.equal(volumes, effect);
    assert.deepEqual(sim.control.held(), []);
  }
});

Deno.test("a held call whose caller is gone ends without its effect", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  sim.control.fail({ rpc: "CreateVolume", hold: true });
  const created = client.create("v1").then(() => undefined, (error) => error);
  await eventually("the call is held", () => sim.control.held().length === 1);
  sim.control.dropConnections();

  assert.ok(await created instanceof CallError);
  await eventually("the call ends", () => sim.control.held().length === 0);
  assert.deepEqual(sim.control.leftovers().volumes, []);
});

Deno.test("a fault that skips calls takes the one after them", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  await post(sim, "/faults", { rpc: "*", skip: 2, code: "INTERNAL" });

  await client.version();
  await client.create("v1");
  await fails(client.create("v2"), "INTERNAL", "Cannot answer CreateVolume: the simulator was told to fail");
  await client.create("v2");
});

Deno.test("watchCalls reports when each call begins and ends, and its volume", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);
  const seen: string[] = [];

  {
    using _watch = sim.control.watchCalls(({ phase, rpc, subject }) => seen.push(`${phase} ${rpc} ${subject}`));
    sim.control.fail({ rpc: "CreateVolume", code: "INTERNAL" });
    await assert.rejects(client.create("v1"));
    await client.create("v1");
  }
  await client.version();

  assert.deepEqual(seen, Array(2).fill(["begin CreateVolume v1", "end CreateVolume v1"]).flat());
});

Deno.test("control changes the cluster's behaviour and lets held creations go", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  const behaviour = await request<Behaviour>(sim, "PATCH", "/behaviour", { holdCreations: true, creationMs: 0 });
  await client.create("v1");
  const state = () => sim.control.cluster.volumes[0]?.state;
  assert.equal(state(), "Creating");
  await post(sim, "/creations/release");

  await eventually("the volume is Available", () => state() === "Available");
  assert.deepEqual([behaviour.holdCreations, behaviour.creationMs, behaviour.deletionMs], [true, 0, 5]);
});

Deno.test("control sets a volume's state and protection", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const { UUID } = await client.create("v1");

  await request(sim, "PATCH", `/volumes/${UUID}`, { state: "Migrating", protection: "Degraded" });

  const [volume] = sim.control.cluster.volumes;
  assert.deepEqual([volume?.state, volume?.protection], ["Migrating", "Degraded"]);
  const missing = await answer(sim, "PATCH", "/volumes/nothing", { state: "Failed" });
  assert.deepEqual(missing, [400, { error: "Cannot set volume nothing: it does not exist" }]);
});

Deno.test("control returns what a host may access, the model and the leftovers", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const { UUID } = await client.create("v1", ["nqn.a"]);

  assert.deepEqual(await get(sim, "/visible?host=nqn.a"), [UUID]);
  assert.deepEqual(await get(sim, "/visible?host=nqn.b"), []);
  assert.deepEqual(await get(sim, "/leftovers"), {
    volumes: [`v1 ${UUID} Available`],
    snapshots: [],
    access: [`${UUID} nqn.a`],
    devices: [],
  });
  const model = await get<{ volumes: { uuid: string; sizeBytes: string }[] }>(sim, "/model");
  assert.deepEqual(model.volumes.map(({ uuid, sizeBytes }) => [uuid, sizeBytes]), [[UUID, "1073741824"]]);
});

Deno.test("control restarts the cluster with everything it remembers, or with nothing", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  await client.create("v1");
  const addresses = [...sim.addresses.grpc];

  await post(sim, "/restart");
  assert.equal(sim.control.cluster.volumes.length, 1);
  await post(sim, "/restart", { memory: false });

  assert.equal(sim.control.cluster.volumes.length, 0);
  assert.deepEqual(sim.control.endpoints().map(({ state }) => state), Array(6).fill("running"));
  assert.deepEqual(sim.addresses.grpc, addresses);
  using again = clientOf(sim);
  await again.create("v1");
});

Deno.test("control stops and starts the endpoints that match", async () => {
  await using sim = await startSimulator();

  const stopped = await post<EndpointState[]>(sim, "/endpoints/stop", { server: 1, scheme: "grpc" });
  const started = await post<EndpointState[]>(sim, "/endpoints/start", {});

  const states = (endpoints: EndpointState[]) => endpoints.map(({ state }) => state);
  assert.deepEqual(states(stopped), ["running", "stopped", "running", "running", "running", "running"]);
  assert.deepEqual(states(started), Array(6).fill("running"));
  const missing = await answer(sim, "POST", "/endpoints/stop", { server: 9 });
  assert.deepEqual(missing, [400, { error: `Cannot find an endpoint with {"server":9}` }]);
});

Deno.test("control issues tokens, adds projects, policies and features", async () => {
  await using sim = await startSimulator();

  await post(sim, "/projects", { name: "team-a" });
  const policy = await post<{ uuid: string }>(sim, "/policies", { name: "gold", kind: "iops", read: 256, write: 0 });
  await request(sim, "PATCH", "/features/event-log", { enabled: true });
  const { token } = await post<{ token: string }>(sim, "/tokens", { projects: ["team-a"] });

  using client = clientOf(sim);
  const { projects } = await client.channel.call(api.listProjects, {}, {
    signal: AbortSignal.timeout(10_000),
    headers: { authorization: `Bearer ${token}` },
  });
  assert.deepEqual(projects.map(({ name }) => name), ["team-a"]);
  assert.deepEqual(sim.control.cluster.listPolicies("team-a").map(({ uuid }) => uuid), [policy.uuid]);
  assert.equal(sim.control.cluster.features["event-log"], true);
});

Deno.test("control answers GET / with the simulator's addresses", async () => {
  await using sim = await startSimulator();

  const about = await get<SimulatorAddresses>(sim, "/");

  assert.deepEqual([about.grpc, about.jwt, about.ca], [sim.addresses.grpc, sim.addresses.jwt, sim.addresses.ca]);
});

for (
  const [what, method, path, body, status, error] of [
    ["a path that does not exist", "GET", "/nothing", undefined, 404, /^Cannot find GET \/nothing$/],
    ["no JSON", "POST", "/faults", "{", 400, /^Cannot read the body: /],
    ["a fault without RPC", "POST", "/faults", `{"code":"INTERNAL"}`, 400, /^Cannot read the body: rpc: /],
    [
      "a fault without effect",
      "POST",
      "/faults",
      `{"rpc":"*"}`,
      400,
      /: body: one of code, event, delayMs, drop and hold is needed$/,
    ],
    ["an unknown code", "POST", "/faults", `{"rpc":"*","code":"OK"}`, 400, /^Cannot read the body: code: /],
    ["an unknown key", "PATCH", "/behaviour", `{"creationSeconds":1}`, 400, /creationSeconds/],
    ["a bad state", "PATCH", "/volumes/x", `{"state":"Gone"}`, 400, /^Cannot read the body: state: /],
    ["a negative delay", "PATCH", "/behaviour", `{"creationMs":-1}`, 400, /^Cannot read the body: creationMs: /],
    ["a bad project name", "POST", "/projects", `{"name":"A b"}`, 400, /^Cannot create project "A b": /],
    [
      "a device without a machine",
      "GET",
      "/devices",
      undefined,
      400,
      /^Cannot change a device: data plane "none" has none/,
    ],
    [
      "a path that hosts cannot connect to",
      "POST",
      "/paths/down",
      `{"server":0}`,
      400,
      /^Cannot change a path: no host connects to data plane "none", use "nvmet"/,
    ],
    [
      "a path in a state that NVMe has not",
      "POST",
      "/paths/ana",
      `{"server":0,"state":"up"}`,
      400,
      /state: Invalid option/,
    ],
  ] as const
) {
  Deno.test(`control answers ${status} to ${what}`, async () => {
    await using sim = await startSimulator({ servers: 1, schemes: ["grpc"] });

    const response = await fetch(sim.addresses.control + path, { method, ...(body === undefined ? {} : { body }) });

    assert.equal(response.status, status);
    assert.match((await response.json()).error, error);
  });
}

Deno.test("serveControl rejects an address that other machines can connect to", async () => {
  await using sim = await startSimulator({ servers: 1, schemes: ["grpc"] });
  const options = { host: "0.0.0.0", port: 0, log: createLogger("error") };

  await assert.rejects(serveControl(sim.control, () => ({}), options), (error: unknown) => {
    assert.ok(error instanceof StatusError);
    assert.equal(error.code, "INVALID_ARGUMENT");
    assert.equal(error.message, "Cannot serve the control port on 0.0.0.0: only loopback is safe");
    return true;
  });
});

// ------------------------------------------------------------------------------------------------------------ helpers

async function answer(sim: TestSimulator, method: string, path: string, body?: unknown): Promise<[number, unknown]> {
  const init = body === undefined ? { method } : { method, body: JSON.stringify(body) };
  const response = await fetch(sim.addresses.control + path, init);
  return [response.status, await response.json()];
}

async function request<T>(sim: TestSimulator, method: string, path: string, body?: unknown): Promise<T> {
  const [status, json] = await answer(sim, method, path, body);
  assert.equal(status, 200, JSON.stringify(json));
  return json as T;
}

function get<T>(sim: TestSimulator, path: string): Promise<T> {
  return request<T>(sim, "GET", path);
}

function post<T>(sim: TestSimulator, path: string, body?: unknown): Promise<T> {
  return request<T>(sim, "POST", path, body);
}

function clientOf(sim: TestSimulator, server = 0) {
  const channel = new Channel({ address: sim.addresses.grpc[server] ?? "" });
  const options = (headers: Record<string, string> = {}) => ({
    signal: AbortSignal.timeout(10_000),
    headers: { authorization: `Bearer ${sim.addresses.jwt}`, ...headers },
  });
  return {
    channel,
    version: (headers: Record<string, string> = {}) => channel.call(api.getVersion, {}, options(headers)),
    create: (name: string, acl: string[] = ["ALLOW_NONE"]) => {
      const request = { projectName, name, size: "1 gib", replicaCount: 1, acl: { values: acl } };
      return channel.call(api.createVolume, request, options());
    },
    [Symbol.dispose]: () => channel[Symbol.dispose](),
  };
}

async function fails(call: Promise<unknown>, code: string, message: string): Promise<void> {
  await assert.rejects(call, (error: unknown) => {
    assert.ok(error instanceof CallError, String(error));
    assert.deepEqual([error.code, error.message], [code, message]);
    return true;
  });
}

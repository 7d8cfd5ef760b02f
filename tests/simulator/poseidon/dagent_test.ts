/** The simulated DAgent over plain HTTP: its behaviour, above all its faults (docs/reference/poseidonos-api.md section 5). */
import { deepStrictEqual, match, rejects, strictEqual } from "node:assert/strict";
import { startPoseidon, type TestPoseidon } from "../../support/poseidon.ts";
import { eventually } from "../../support/simulator.ts";

const mib = 1048576;

async function ask(
  sim: TestPoseidon,
  method: string,
  path: string,
  body?: unknown,
  signal = AbortSignal.timeout(5000),
) {
  const response = await fetch(`http://${sim.addresses.dagent}/api/ibofos/v1${path}`, {
    method,
    headers: { "X-request-Id": "1c9e1f3c-0f0e-4d5a-9a52-2d9a3f5a9f01" },
    ...(body === undefined ? {} : { body: typeof body === "string" ? body : JSON.stringify(body) }),
    signal,
  });
  const text = await response.text();
  const parsed = text.startsWith("{") ? JSON.parse(text) : undefined;
  return { http: response.status, text, status: parsed?.result.status, data: parsed?.result.data };
}

const volume = (changes: Record<string, unknown> = {}) => ({
  param: { array: "POSArray", name: "v1", size: mib, maxiops: 0, maxbw: 0, ...changes },
});

Deno.test("DAgent answers success with code 0 and its event, and leaves data out when a list is empty", async () => {
  await using sim = await startPoseidon();

  const { http, status, data } = await ask(sim, "GET", "/volumelist/POSArray");

  deepStrictEqual([http, status.code, status.eventName, data], [200, 0, "SUCCESS", undefined]);
});

for (
  const [what, method, path, body] of [
    ["a body that is not JSON", "POST", "/volumes", "{"],
    ["a size that is a text", "POST", "/volumes", volume({ size: "1048576" })],
    ["a flag that is a text", "POST", "/volumes", volume({ iswalvol: "no" })],
  ] as const
) {
  Deno.test(`DAgent rejects ${what} with HTTP status 400 and code 0`, async () => {
    await using sim = await startPoseidon();

    const { http, status } = await ask(sim, method, path, body);

    deepStrictEqual([http, status.code], [400, 0]);
    strictEqual(sim.control.model.arrays[0]?.volumes.length, 0);
  });
}

Deno.test("DAgent rejects a call without a UUID in X-request-Id, and knows no other routes", async () => {
  await using sim = await startPoseidon();
  const url = `http://${sim.addresses.dagent}/api/ibofos/v1`;

  const anonymous = await fetch(`${url}/arrays`);
  const unknown = await fetch(`${url}/nothing`);

  deepStrictEqual([anonymous.status, unknown.status], [400, 404]);
  strictEqual((await anonymous.json()).result.status.code, 0);
  match(await unknown.text(), /404 page not found/);
});

for (
  const [generation, wide, event, taken] of [
    ["1.0", "1048576", "CREATE_VOL_SAME_VOL_NAME_EXISTS", 1810],
    ["0.11", 1048576, undefined, 2022],
  ] as const
) {
  Deno.test(`PoseidonOS ${generation} has its own codes and forms of numbers`, async () => {
    await using sim = await startPoseidon({ behaviour: { generation } });
    await ask(sim, "POST", "/volumes", volume());

    const again = await ask(sim, "POST", "/volumes", volume());
    const { data } = await ask(sim, "GET", "/array/POSArray/volume/v1");

    deepStrictEqual([again.http, again.status.code, again.status.eventName], [400, taken, event]);
    deepStrictEqual([data.total, data.index, data.status], [wide, 0, "Unmounted"]);
  });
}

for (
  const [what, body, code] of [
    ["a size of half a MiB", volume({ size: mib / 2 }), 1813],
    ["no size", volume({ size: 0 }), 1813],
    ["more than the array has", volume({ size: 2 ** 50 }), 1814],
    ["a name with a dot", volume({ name: "a.b" }), 1811],
    ["a name of one letter", volume({ name: "a" }), 1808],
    ["an unknown array", volume({ array: "Other" }), 1819],
    ["a limit of 5", volume({ maxiops: 5 }), 1858],
    ["a UUID of another form", volume({ uuid: "abc" }), 1860],
  ] as const
) {
  Deno.test(`PoseidonOS rejects a volume with ${what} by code ${code}`, async () => {
    await using sim = await startPoseidon();

    strictEqual((await ask(sim, "POST", "/volumes", body)).status.code, code);
  });
}

Deno.test("an array that is not mounted looks empty, and rejects changes", async () => {
  await using sim = await startPoseidon();
  await ask(sim, "POST", "/volumes", volume());
  sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });

  const { http, data } = await ask(sim, "GET", "/volumelist/POSArray");
  const { status } = await ask(sim, "DELETE", "/volumes/v1", { param: { array: "POSArray" } });
  const info = await ask(sim, "GET", "/array/POSArray/volume/v1");

  deepStrictEqual([http, data, status.code, info.status.code], [200, undefined, 1823, 1807]);
});

Deno.test("a restart forgets subsystems, listeners and exports, unless PoseidonOS saves them", async () => {
  await using sim = await startPoseidon();
  const nqn = "nqn.2019-04.pos:s1";
  const exported = async () => {
    await ask(sim, "POST", "/subsystem", { param: { nqn, serialNumber: "1", modelNumber: "m", allowAnyHost: true } });
    await ask(sim, "POST", "/volumes/v1/mount", { param: { array: "POSArray", subnqn: nqn } });
    return (await ask(sim, "GET", "/array/POSArray/volume/v1")).data.status;
  };
  await ask(sim, "POST", "/volumes", volume());
  strictEqual(await exported(), "Mounted");

  await sim.control.restart();
  const { data } = await ask(sim, "GET", "/subsystem");
  const after = await ask(sim, "GET", "/array/POSArray/volume/v1");

  deepStrictEqual([data.subsystemlist.length, after.data.status], [1, "Unmounted"]);
  sim.control.behave({ saveRestore: true });
  strictEqual(await exported(), "Mounted");
  await sim.control.restart();
  strictEqual((await ask(sim, "GET", "/array/POSArray/volume/v1")).data.status, "Mounted");
});

Deno.test("deleting a subsystem un-exports what is in it", async () => {
  await using sim = await startPoseidon();
  const nqn = "nqn.2019-04.pos:s1";
  await ask(sim, "POST", "/volumes", volume());
  await ask(sim, "POST", "/subsystem", { param: { nqn, allowAnyHost: true } });
  await ask(sim, "POST", "/volumes/v1/mount", { param: { array: "POSArray", subnqn: nqn } });

  await ask(sim, "DELETE", "/subsystem", { param: { subnqn: nqn } });

  strictEqual((await ask(sim, "GET", "/array/POSArray/volume/v1")).data.status, "Unmounted");
});

Deno.test("the name in a body wins over the one in the path", async () => {
  await using sim = await startPoseidon();
  await ask(sim, "POST", "/volumes", volume());
  await ask(sim, "POST", "/volumes", volume({ name: "v2" }));

  await ask(sim, "DELETE", "/volumes/v1", { param: { array: "POSArray", name: "v2" } });

  deepStrictEqual(sim.control.model.arrays[0]?.volumes.map(({ name }) => name), ["v1"]);
});

Deno.test("one slow call holds up every other one, reads too", async () => {
  await using sim = await startPoseidon();
  sim.control.fail({ rpc: "ListSubsystems", hold: true });
  const slow = ask(sim, "GET", "/subsystem");
  await eventually("the call waits", () => sim.control.held().length === 1);

  await rejects(ask(sim, "GET", "/arrays", undefined, AbortSignal.timeout(200)));
  sim.control.releaseHeld();

  strictEqual((await slow).http, 200);
  strictEqual((await ask(sim, "GET", "/arrays")).data.arrayList[0].status, "Mounted");
});

Deno.test("a call that is held before its effect has none when its caller goes", async () => {
  await using sim = await startPoseidon();
  sim.control.fail({ rpc: "CreateVolume", hold: true, when: "before" });
  const caller = new AbortController();
  const called = ask(sim, "POST", "/volumes", volume(), caller.signal);
  await eventually("the call waits", () => sim.control.held().length === 1);

  caller.abort();
  await rejects(called);
  await eventually("DAgent has noticed", () => sim.control.held().length === 0);

  strictEqual((await ask(sim, "GET", "/volumelist/POSArray")).data, undefined);
});

Deno.test("a request for a transport without param locks DAgent up, and is counted as harmful", async () => {
  await using sim = await startPoseidon();
  ask(sim, "POST", "/transport", "{}").catch(() => {});
  await eventually("DAgent has panicked", () => sim.control.api.harmful.length === 1);

  await rejects(ask(sim, "GET", "/arrays", undefined, AbortSignal.timeout(200)));
  await sim.control.restart();

  strictEqual((await ask(sim, "GET", "/arrays")).http, 200);
});

for (const [method, path] of [["GET", "/arrays/reset"], ["DELETE", "/system"]] as const) {
  Deno.test(`${method} ${path} is harmful`, async () => {
    await using sim = await startPoseidon();

    strictEqual((await ask(sim, method, path)).http, 500);

    deepStrictEqual(sim.control.api.harmful, [`${method} /api/ibofos/v1${path}`]);
  });
}

Deno.test("the control port of PoseidonOS steers it over HTTP", async () => {
  await using sim = await startPoseidon();
  const control = async (method: string, path: string, body?: unknown) => {
    const response = await fetch(`${sim.addresses.control}${path}`, {
      method,
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    });
    return { status: response.status, body: await response.json() };
  };
  await ask(sim, "POST", "/volumes", volume());

  await control("POST", "/faults", { rpc: "ListArrays", event: "CLI_SERVER_BUSY" });
  strictEqual((await ask(sim, "GET", "/arrays")).status.code, 1224);
  strictEqual((await control("GET", "/calls")).body.ListArrays.total, 1);
  await control("PATCH", "/arrays/POSArray", { situation: "DEGRADED" });
  strictEqual((await ask(sim, "GET", "/array/POSArray")).data.situation, "DEGRADED");
  strictEqual((await control("PATCH", "/behaviour", { callMs: 1 })).body.callMs, 1);
  match((await control("PATCH", "/behaviour", { speed: 1 })).body.error, /Cannot read the body/);
  match((await control("GET", "/leftovers")).body.volumes[0], /^v1 [0-9a-f-]{36} Unmounted$/);
  await control("POST", "/restart", { memory: false });
  deepStrictEqual((await control("GET", "/model")).body.arrays[0].volumes, []);
  strictEqual((await control("GET", "/")).body.dagent, sim.addresses.dagent);
  await control("POST", "/dagent/stop");
  await rejects(ask(sim, "GET", "/arrays"));
  await control("POST", "/dagent/start");
  strictEqual((await ask(sim, "GET", "/arrays")).http, 200);
});

Deno.test("a simulated PoseidonOS with a state directory keeps its volumes and forgets its exports", async () => {
  const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-poseidon-" });
  try {
    {
      await using sim = await startPoseidon({ stateDir });
      await ask(sim, "POST", "/volumes", volume());
      await ask(sim, "POST", "/subsystem", { param: { nqn: "nqn.2019-04.pos:s1", allowAnyHost: true } });
    }
    await using sim = await startPoseidon({ stateDir });

    strictEqual((await ask(sim, "GET", "/array/POSArray/volume/v1")).data.total, "1048576");
    strictEqual((await ask(sim, "GET", "/subsystem")).data.subsystemlist.length, 1);
  } finally {
    await Deno.remove(stateDir, { recursive: true });
  }
});

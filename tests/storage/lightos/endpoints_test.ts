/** Management endpoints of LightOS: connections, fail-over, and endpoints that fail or say nothing. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import net from "node:net";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { DurosAPI, VersionSchema, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import { requestContext } from "../../../lib/context.ts";
import { StatusError } from "../../../lib/error.ts";
import type { VolumeRequest } from "../../../lib/storage/backend.ts";
import { answerHttp2, grpcAnswer, type Http2Answer, page } from "../../support/http2_answers.ts";
import { startSimulator } from "../../support/simulator.ts";
import {
  asFirst,
  collectingLogger,
  failsWith,
  gib,
  hostA,
  lightosOptions,
  lightosRequest,
  none,
  openLightos,
  quiet,
  startCluster,
  startLightos,
  within,
} from "../../support/backends.ts";

Deno.test("the API version is asked once per connection, not once per call", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());

  for (let i = 0; i < 20; i++) await env.backend.getVolume(within(5000), none, id);

  strictEqual(env.simulator.control.calls()["GetVersion"]?.total, 1);
});

Deno.test("promise 12: with one endpoint alive every call succeeds, and the dead ones are tried once per period", async () => {
  await using env = await startLightos();
  let connects = 0;
  const dead = net.createServer((socket) => {
    connects++;
    socket.destroy();
  });
  await new Promise<void>((resolve) => dead.listen(0, "0.0.0.0", resolve));
  try {
    const { port } = dead.address() as net.AddressInfo;
    // In an ID the endpoints are sorted by text: this way the dead one is tried first.
    const [alive = ""] = env.simulator.addresses.grpc;
    const request = env.request({}, { "mgmt-endpoint": `0.0.0.0:${port},${alive}` });
    const { id } = await env.backend.createVolume(within(5000), none, request);
    const started = performance.now();
    for (let i = 0; i < 50; i++) await env.backend.getVolume(within(5000), none, id);

    const periods = Math.ceil((performance.now() - started) / 1000) + 1;
    ok(connects >= 1 && connects <= periods, `${connects} connects in ${periods} back-off periods`);
  } finally {
    await new Promise((resolve) => dead.close(resolve));
  }
});

Deno.test("promise 12: calls go on when the endpoint in use dies, and when it comes back", async () => {
  await using env = await startLightos({ servers: 3 });
  const { id } = await env.backend.createVolume(within(5000), none, env.request());

  for (const address of env.simulator.addresses.grpc) {
    await env.simulator.control.stopEndpoints({ address });
    for (let i = 0; i < 5; i++) await env.backend.getVolume(within(5000), none, id);
    await env.simulator.control.startEndpoints({ address });
  }
});

Deno.test("promise 12: an endpoint that accepts connections and never answers does not block the others", async () => {
  await using env = await startLightos({ servers: 2 });
  const { id } = await env.backend.createVolume(within(5000), none, env.request());

  for (const address of env.simulator.addresses.grpc) {
    await env.simulator.control.hangEndpoints({ address });

    await env.backend.getVolume(within(6000), none, id);

    await env.simulator.control.stopEndpoints({ address });
    await env.simulator.control.startEndpoints({ address });
  }
});

Deno.test("with every endpoint dead the error lists them, says a common reason once, and what to do", async () => {
  await using env = await startLightos({ servers: 2 });
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  await env.simulator.control.stopEndpoints();

  await rejects(
    env.backend.getVolume(within(3000), none, id),
    failsWith(
      "UNAVAILABLE",
      /no LightOS management endpoint answers \(127\.0\.0\.1:\d+, 127\.0\.0\.1:\d+: connect ECONNREFUSED\); check network, firewall, port and mgmt-scheme$/,
    ),
  );
});

Deno.test("an endpoint that the cluster names twice is tried once", async () => {
  const [nqn, spare] = ["nqn.2016-01.com.lightbitslabs:uuid:x", "127.0.0.1:9"];
  const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
  const volume = { UUID: uuid, name: "pvc-1", state: State.Available, acl: { values: [hostA] }, size: gib };
  const api = service(DurosAPI, {
    getVersion: () => Promise.resolve({ apiVersion: "v2.0" }),
    getVolume: () => Promise.resolve(volume),
    getClusterInfo: () =>
      Promise.resolve({ subsystemNQN: nqn, nvmeEndpoints: ["127.0.0.1:4420"], apiEndpoints: [spare, spare] }),
  });
  const server = await serve({ listen: { host: "127.0.0.1", port: 0 }, services: [api], log: quiet });
  await using backend = lightosBackend({ ...lightosOptions, globalJwt: () => "x" });
  const id = `mgmt:127.0.0.1:${server.port}|nguid:${uuid}|proj:default|scheme:grpc`;
  await backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });
  await server.stop(100);

  await rejects(backend.getVolume(within(4000), none, id), (error: Error) => {
    strictEqual(error.message.split(spare).length - 1, 1, error.message);
    return true;
  });
});

Deno.test("a request that changes something is not sent to a second endpoint when the first may have done it", async () => {
  await using env = await startLightos({ servers: 2 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.resetCalls();
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when: "after" });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });

  strictEqual(env.simulator.control.calls()["UpdateVolume"]?.total, 1);
  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, [hostA]);
});

for (const status of [200, 401, 404, 429, 502, 503, 504]) {
  Deno.test(`promise 12: an endpoint that answers each call with a page of HTTP status ${status} is passed over`, async () => {
    await using bad = await answerHttp2(() => page(status));
    await using env = await startCluster(1, [asFirst(bad.address)]);

    const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

    deepStrictEqual(env.volumes(), [uuid]);
    strictEqual(bad.paths.length, 1, "it is left alone afterwards");
  });
}

const version = grpcAnswer(VersionSchema, { apiVersion: "v2.0" });

const ownAnswers: readonly (readonly [string, Http2Answer])[] = [
  ["a page of HTTP status 504", page(504)],
  ["a page of HTTP status 403", page(403)],
  ["nothing but headers", { headers: { ":status": 200, "content-type": "application/grpc" } }],
  ["a lost connection", { headers: { ":status": 200, "content-type": "application/grpc" }, end: "lost connection" }],
];

for (const [what, answer] of ownAnswers) {
  Deno.test(`promise 30: a volume that was made is found although ${what} came as the answer`, async () => {
    await using env = await startCluster(1);
    const behind = env.open(env.endpoints);
    // A balancer that hands the request on, and then loses the answer.
    await using balancer = await answerHttp2(async (path) => {
      if (path.endsWith("/GetVersion")) return version;
      if (path.endsWith("/CreateVolume")) {
        await behind.backend.createVolume(within(5000), none, behind.request("pvc-1"));
      }
      return answer;
    });
    const { backend, request } = env.open([asFirst(balancer.address), ...env.endpoints]);

    const { uuid } = await backend.createVolume(within(8000), none, request("pvc-1"));

    deepStrictEqual(env.volumes(), [uuid]);
  });

  Deno.test(`promise 30: with no other endpoint, ${what} as the answer is UNAVAILABLE and not final`, async () => {
    await using balancer = await answerHttp2((path) => path.endsWith("/GetVersion") ? version : answer);
    await using env = await startCluster(1);
    const { backend, request } = env.open([balancer.address]);

    await rejects(backend.createVolume(within(3000), none, request("pvc-1")), (error: unknown) => {
      ok(error instanceof StatusError);
      ok(["UNAVAILABLE", "DEADLINE_EXCEEDED"].includes(error.code), `${error.code}: ${error.message}`);
      return true;
    });
  });
}

for (const code of ["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED"] as const) {
  for (const rpc of ["*", "CreateVolume", "ListVolumes", "GetVolume", "UpdateVolume"]) {
    Deno.test(`promise 12: one of three endpoints that answers ${rpc} with ${code} is left alone, and calls succeed`, async () => {
      await using env = await startCluster(3);
      const [ill = ""] = env.endpoints;
      env.simulator.control.fail({ rpc, count: 0, code, message: "this server has no quorum", endpoint: ill });

      const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
      strictEqual((await env.backend.createVolume(within(5000), none, env.request("pvc-1"))).id, id);
      await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });
      await env.backend.getVolume(within(5000), none, id);

      deepStrictEqual(env.volumes(), [uuid]);
    });
  }
}

for (const code of ["UNAVAILABLE", "INTERNAL"] as const) {
  for (
    const rpc of [
      "CreateVolume",
      "ListVolumes",
      "GetVolume",
      "UpdateVolume",
      "DeleteVolume",
      "CreateSnapshot",
      "ListSnapshots",
      "GetSnapshot",
      "DeleteSnapshot",
      "GetClusterInfo",
      "CreateTrustedHost",
      "SetTrustedHostSecret",
      "GetTrustedHostSecret",
      "ListTrustedHosts",
    ]
  ) {
    Deno.test(`promise 12: whole lives of volumes succeed while one endpoint answers ${rpc} with ${code}`, async () => {
      await using env = await startCluster(3, [], { inBandAuth: true });
      const [ill = ""] = env.endpoints;
      const { backend, request } = env;
      const { snapshots, expansion, modification } = backend;
      ok(snapshots && expansion && modification);
      const kind = { "in-band-auth": "unidirectional" };
      const plain = request("pvc-1");
      const create = (name: string, changes: Partial<VolumeRequest> = {}) =>
        backend.createVolume(within(10_000), none, { ...request(name), ...changes });
      // The endpoint is in use when it falls ill.
      const { id } = await create("pvc-1", { parameters: { ...plain.parameters, ...kind } });
      env.simulator.control.fail({ rpc, count: 0, code, message: "this server has no quorum", endpoint: ill });

      const grant = { hostNqn: hostA, shared: false, volumeContext: kind };
      await backend.grantAccess(within(10_000), none, id, grant);
      await backend.authentication?.keysOf(within(10_000), none, id, { hostNqn: hostA, kind: "unidirectional" });
      const snapshot = await snapshots.createSnapshot(within(10_000), none, { name: "s", sourceVolumeId: id });
      const restored = await create("pvc-2", { source: { type: "snapshot", id: snapshot.id } });
      const clone = await create("pvc-3", { source: { type: "volume", id } });
      await expansion.expandVolume(within(10_000), none, id, { requiredBytes: 2n * gib, limitBytes: 0n });
      await modification.modifyVolume(within(10_000), none, id, { compression: "enabled" });
      await backend.revokeAccess(within(10_000), none, id, hostA);
      for (const volume of [clone, restored, { id }]) await backend.deleteVolume(within(10_000), none, volume.id);
      await snapshots.deleteSnapshot(within(10_000), none, snapshot.id);

      const states = [...env.simulator.control.cluster.volumes, ...env.simulator.control.cluster.snapshots]
        .map(({ state }) => state).filter((state) => state !== "Deleting");
      deepStrictEqual(states, []);
    });
  }
}

Deno.test("promise 12: a failing endpoint costs one attempt, is named once in the log, and shows in the metrics", async () => {
  await using env = await startCluster(3);
  const [ill = ""] = env.endpoints;
  env.simulator.control.fail({ rpc: "*", count: 0, code: "UNAVAILABLE", message: "no quorum", endpoint: ill });

  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  for (let i = 0; i < 10; i++) await env.backend.getVolume(within(5000), none, id);

  const asked = Object.values(env.simulator.control.calls()).map(({ endpoints }) => endpoints[ill] ?? 0);
  strictEqual(asked.reduce((sum, calls) => sum + calls, 0), 1);
  const named = env.lines.map((line) => JSON.parse(line)).filter(({ address, level }) =>
    address === ill && level !== "debug"
  );
  deepStrictEqual(named.map(({ event, error }) => [event, error]), [
    ["leaves an ill management endpoint alone", "UNAVAILABLE: no quorum"],
  ]);
  match(await env.metrics.text(), new RegExp(`lbcsi_mgmt_endpoint_failures\\{endpoint="${ill}"\\} 1\\n`));
});

Deno.test("an error that every endpoint answers is returned, and none of them is left alone", async () => {
  await using env = await startCluster(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "INTERNAL", message: "cannot read it" });

  await rejects(
    env.backend.getVolume(within(5000), none, id),
    failsWith("INTERNAL", /^Cannot read volume .* answered GetVolume with INTERNAL: cannot read it$/),
  );

  match(await env.metrics.text(), /lbcsi_mgmt_endpoint_resting/);
  ok(!/lbcsi_mgmt_endpoint_resting\{.*\} 1/.test(await env.metrics.text()));
});

Deno.test("a request that one endpoint rejects is not sent to another one", async () => {
  await using env = await startCluster(3);
  env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code: "RESOURCE_EXHAUSTED", message: "full" });

  await rejects(
    env.backend.createVolume(within(5000), none, env.request("pvc-1")),
    failsWith("RESOURCE_EXHAUSTED", /: full$/),
  );

  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("one UNAVAILABLE of the only endpoint to a read passes unnoticed", async () => {
  await using env = await startCluster(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 1, code: "UNAVAILABLE", message: "just a moment" });

  strictEqual((await env.backend.getVolume(within(5000), none, id)).id, id);

  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "UNAVAILABLE", message: "no quorum" });
  await rejects(env.backend.getVolume(within(5000), none, id), failsWith("UNAVAILABLE", /no quorum/));
});

for (
  const [what, call] of [
    [
      "a read",
      (env: Awaited<ReturnType<typeof startCluster>>, id: string) => env.backend.getVolume(within(30_000), none, id),
    ],
    [
      "a change",
      (env: Awaited<ReturnType<typeof startCluster>>) =>
        env.backend.createVolume(within(30_000), none, env.request("pvc-2")),
    ],
  ] as const
) {
  Deno.test(`promise 12: an endpoint that goes silent while it is in use costs ${what} about 3 seconds, not half of its time`, async () => {
    await using env = await startCluster(3);
    const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
    const [address = ""] = env.endpoints;
    await env.simulator.control.hangEndpoints({ address });
    const begun = performance.now();

    await call(env, id);

    const ms = performance.now() - begun;
    // Half of the caller's time would be 15 s.
    ok(ms < 8000, `${ms} ms`);
    await env.simulator.control.stopEndpoints({ address });
  });
}

Deno.test("a change that takes longer than an endpoint may be silent is waited for, and sent once", async () => {
  await using env = await startCluster(2);
  env.simulator.control.fail({ rpc: "CreateVolume", count: 1, delayMs: 4000 });

  const { uuid } = await env.backend.createVolume(within(20_000), none, env.request("pvc-1"));

  deepStrictEqual(env.volumes(), [uuid]);
  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("promise 12: a read that takes longer than an endpoint may be silent succeeds when the other endpoints are down", async () => {
  await using env = await startCluster(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  for (const address of env.endpoints.slice(1)) await env.simulator.control.stopEndpoints({ address });
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, delayMs: 4000 });

  strictEqual((await env.backend.getVolume(within(20_000), none, id)).id, id);
});

Deno.test("promise 12: a read that every endpoint is slow to answer has the answer of the first one", async () => {
  await using env = await startCluster(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  env.simulator.control.resetCalls();
  // Beginning with the last endpoint none of them would be done in time.
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, delayMs: 5000 });

  strictEqual((await env.backend.getVolume(within(8000), none, id)).id, id);

  // The next call finds an endpoint that is in use.
  env.simulator.control.clearFaults();
  strictEqual((await env.backend.getVolume(within(1000), none, id)).id, id);
  const [used = ""] = env.endpoints;
  strictEqual(env.simulator.control.calls()["GetVolume"]?.endpoints[used], 2);
});

Deno.test("promise 12: a change that takes most of its time is waited for, and sent once, when the other endpoints are down", async () => {
  await using env = await startCluster(3);
  await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  for (const address of env.endpoints.slice(1)) await env.simulator.control.stopEndpoints({ address });
  env.simulator.control.resetCalls();
  env.simulator.control.fail({ rpc: "CreateVolume", count: 0, delayMs: 6000 });

  const { uuid } = await env.backend.createVolume(within(10_000), none, env.request("pvc-2"));

  ok(env.volumes().includes(uuid));
  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("promise 12: a change that hangs at an endpoint which is alive is made at another one", async () => {
  await using env = await startCluster(3);
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  const [address = ""] = env.endpoints;
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 0, hold: true, when: "before", endpoint: address });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });

  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, [hostA]);
  env.simulator.control.clearFaults();
});

Deno.test("promise 12: a connection that a call gave up while it was made again is not kept for the next call", async () => {
  await using simulator = await startSimulator({ servers: 1 });
  const [server = ""] = simulator.addresses.grpc;
  const [hostname = "", port = ""] = server.split(":");
  // The first connection leads to the cluster, the second one to nothing that answers, the third one to the cluster.
  const accepted: net.Socket[] = [];
  const isSecond = Promise.withResolvers<void>();
  const relay = net.createServer((socket) => {
    socket.on("error", () => {});
    accepted.push(socket);
    if (accepted.length === 2) return isSecond.resolve();
    const behind = net.connect(Number(port), hostname).on("error", () => socket.destroy());
    socket.pipe(behind).pipe(socket);
  });
  await new Promise<void>((resolve) => relay.listen(0, "127.0.0.1", resolve));
  const lines: string[] = [];
  await using backend = openLightos(simulator, { log: collectingLogger(lines) });
  try {
    const { port } = relay.address() as net.AddressInfo;
    const request = lightosRequest([`127.0.0.1:${port}`]);
    const { id } = await backend.createVolume(within(20_000), none, request);
    const isClosed = new Promise((resolve) => accepted[0]?.once("close", resolve));
    // It closes when the other side has noticed and has closed as well.
    accepted[0]?.end();
    await isClosed;
    // The call ends when its connection is being made, whatever the speed of this machine.
    const caller = new AbortController();
    isSecond.promise.then(() => caller.abort(new StatusError("CANCELLED", "Cannot wait: the caller has left")));
    const deadline = new Date(Date.now() + 20_000);
    await rejects(
      backend.getVolume(requestContext(caller.signal, deadline, quiet), none, id),
      failsWith("CANCELLED", /LightOS at 127\.0\.0\.1:\d+ has not answered GetVolume/),
    );
    const lostBefore = lines.filter((line) => line.includes("lost a management endpoint")).length;

    await backend.getVolume(within(20_000), none, id);

    strictEqual(accepted.length, 3);
    strictEqual(lines.filter((line) => line.includes("lost a management endpoint")).length, lostBefore);
  } finally {
    for (const socket of accepted) socket.destroy();
    relay.close();
  }
});

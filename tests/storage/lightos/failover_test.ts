/** What the controller does when a management endpoint of LightOS is ill, silent, or not LightOS at all. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import net from "node:net";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../../lib/context.ts";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { DhchapKey } from "../../../lib/auth_key.ts";
import { Metrics } from "../../../lib/metrics.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import type { VolumeRequest } from "../../../lib/storage/backend.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { VersionSchema } from "../../../proto/gen/lightos_pb.ts";
import { answerHttp2, grpcAnswer, type Http2Answer, page } from "../../support/http2_answers.ts";
import { startSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
const none = new Secrets();
const host = hostNqn("a.node");

function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), createLogger("error", "json", () => {}));
}

function refuses(code: StatusCode, ...messages: RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

/** A cluster of some servers, and a backend that has seen none of them. */
async function start(
  servers: number,
  more: readonly string[] = [],
  overrides: Parameters<typeof startSimulator>[0] = {},
) {
  const simulator = await startSimulator({ servers, ...overrides });
  const parts = new AsyncDisposableStack();
  parts.use(simulator);
  const metrics = new Metrics();
  const lines: string[] = [];
  const open = (endpoints: readonly string[]) => {
    const backend = parts.use(lightosBackend({
      log: createLogger("debug", "json", (line) => lines.push(line)),
      globalJwt: () => simulator.addresses.jwt,
      globalJwtPath: "/etc/lb-csi/jwt",
      globalJwtFor: "any endpoint",
      ca: undefined,
      verifyTls: true,
      userAgent: "lbcsi/test",
      metrics,
    }));
    const wanted = (name: string, changes: Partial<VolumeRequest> = {}): VolumeRequest => ({
      name,
      requiredBytes: gib,
      limitBytes: 0n,
      parameters: {
        "mgmt-endpoint": endpoints.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
      },
      ...changes,
    });
    return { backend, wanted };
  };
  const endpoints = [...simulator.addresses.grpc].sort();
  return {
    simulator,
    metrics,
    lines,
    endpoints,
    open,
    ...open([...more, ...endpoints]),
    volumes: () => simulator.control.cluster.listVolumes({ project: "default", showAll: true }).map(({ uuid }) => uuid),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** An address that sorts before all others, so that it is asked first. */
const first = (address: string) => address.replace("127.0.0.1", "0.0.0.0");

// -------------------------------------------------------------------------------------------------- not LightOS at all

for (const status of [200, 401, 404, 429, 502, 503, 504]) {
  Deno.test(`promise 12: an endpoint that answers each call with a page of HTTP status ${status} is passed over`, async () => {
    await using bad = await answerHttp2(() => page(status));
    await using env = await start(1, [first(bad.address)]);

    const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: host, shared: false });

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
    await using env = await start(1);
    const behind = env.open(env.endpoints);
    // A balancer that hands the request on, and then loses the answer.
    await using balancer = await answerHttp2(async (path) => {
      if (path.endsWith("/GetVersion")) return version;
      if (path.endsWith("/CreateVolume")) {
        await behind.backend.createVolume(within(5000), none, behind.wanted("pvc-1"));
      }
      return answer;
    });
    const { backend, wanted } = env.open([first(balancer.address), ...env.endpoints]);

    const { uuid } = await backend.createVolume(within(8000), none, wanted("pvc-1"));

    deepStrictEqual(env.volumes(), [uuid]);
  });

  Deno.test(`promise 30: with no other endpoint, ${what} as the answer is UNAVAILABLE and not final`, async () => {
    await using balancer = await answerHttp2((path) => path.endsWith("/GetVersion") ? version : answer);
    await using env = await start(1);
    const { backend, wanted } = env.open([balancer.address]);

    await rejects(backend.createVolume(within(3000), none, wanted("pvc-1")), (error: unknown) => {
      ok(error instanceof StatusError);
      ok(["UNAVAILABLE", "DEADLINE_EXCEEDED"].includes(error.code), `${error.code}: ${error.message}`);
      return true;
    });
  });
}

// ----------------------------------------------------------------------------------------------------- ill and silent

for (const code of ["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED"] as const) {
  for (const rpc of ["*", "CreateVolume", "ListVolumes", "GetVolume", "UpdateVolume"]) {
    Deno.test(`promise 12: one of three endpoints that answers ${rpc} with ${code} is left alone, and calls succeed`, async () => {
      await using env = await start(3);
      const [ill = ""] = env.endpoints;
      env.simulator.control.fail({ rpc, count: 0, code, message: "this server has no quorum", endpoint: ill });

      const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
      strictEqual((await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"))).id, id);
      await env.backend.grantAccess(within(5000), none, id, { hostNqn: host, shared: false });
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
      await using env = await start(3, [], { inBandAuth: true });
      const [ill = ""] = env.endpoints;
      const { backend, wanted } = env;
      const { snapshots, expansion, modification } = backend;
      ok(snapshots && expansion && modification);
      const kind = { "in-band-auth": "unidirectional" };
      const plain = wanted("pvc-1");
      const create = (name: string, changes: Partial<VolumeRequest> = {}) =>
        backend.createVolume(within(10_000), none, { ...wanted(name), ...changes });
      // The endpoint is in use when it falls ill.
      const { id } = await create("pvc-1", { parameters: { ...plain.parameters, ...kind } });
      env.simulator.control.fail({ rpc, count: 0, code, message: "this server has no quorum", endpoint: ill });

      const grant = { hostNqn: host, shared: false, volumeContext: kind };
      await backend.grantAccess(within(10_000), none, id, grant);
      await backend.authentication?.keysOf(within(10_000), none, id, { hostNqn: host, kind: "unidirectional" });
      const snapshot = await snapshots.createSnapshot(within(10_000), none, { name: "s", sourceVolumeId: id });
      const restored = await create("pvc-2", { source: { type: "snapshot", id: snapshot.id } });
      const clone = await create("pvc-3", { source: { type: "volume", id } });
      await expansion.expandVolume(within(10_000), none, id, { requiredBytes: 2n * gib, limitBytes: 0n });
      await modification.modifyVolume(within(10_000), none, id, { compression: "enabled" });
      await backend.revokeAccess(within(10_000), none, id, host);
      for (const volume of [clone, restored, { id }]) await backend.deleteVolume(within(10_000), none, volume.id);
      await snapshots.deleteSnapshot(within(10_000), none, snapshot.id);

      const states = [...env.simulator.control.cluster.volumes, ...env.simulator.control.cluster.snapshots]
        .map(({ state }) => state).filter((state) => state !== "Deleting");
      deepStrictEqual(states, []);
    });
  }
}

Deno.test("promise 10: a token or key that a server repeats is in no error and no log line", async () => {
  await using env = await start(1, [], { inBandAuth: true });
  const { jwt } = env.simulator.addresses;
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "UNAUTHENTICATED", message: `who is Bearer ${jwt}?` });
  const key = DhchapKey.generate().reveal();
  env.simulator.control.fail({ rpc: "SetTrustedHostSecret", count: 0, code: "INTERNAL", message: `bad key ${key}` });

  await rejects(env.backend.getVolume(within(5000), none, id), (error: unknown) => {
    refuses("UNAUTHENTICATED", /who is Bearer \[token\]\?; JWT: /)(error);
    ok(!String(error).includes(jwt));
    return true;
  });
  const grant = { hostNqn: host, shared: false, volumeContext: { "in-band-auth": "unidirectional" } };
  await rejects(
    env.backend.grantAccess(within(5000), new Secrets({ "dhchap-key": key }), id, grant),
    (error: unknown) => {
      refuses("INTERNAL", /bad key \[key\]$/)(error);
      return true;
    },
  );
  ok(env.lines.every((line) => !line.includes(jwt) && !line.includes(key)));
});

for (
  const [form, write] of [
    ["percent-encoded", (token: string) => encodeURIComponent(token)],
    ["in base64", (token: string) => btoa(token)],
    ["in base64 without padding", (token: string) => btoa(token).replace(/=+$/, "")],
    ["without padding", (token: string) => token.replace(/=+$/, "")],
    ["by its last part, percent-encoded", (token: string) => encodeURIComponent(token.split(".")[2] ?? "")],
    ["by its last part", (token: string) => token.split(".")[2] ?? ""],
  ] as const
) {
  Deno.test(`promise 10: a token that a server repeats ${form} is in no error and no log line`, async () => {
    const token = "first+part/of=a.second+part/of=a.third+part/of+the+token==";
    await using server = await answerHttp2(() => ({
      headers: { ":status": 200, "content-type": "application/grpc" },
      body: "",
      trailers: { "grpc-status": "16", "grpc-message": encodeURI(`who is ${write(token)}?`) },
    }));
    await using env = await start(1);
    const { backend, wanted } = env.open([server.address]);

    await rejects(
      backend.createVolume(within(5000), new Secrets({ jwt: token }), wanted("pvc-1")),
      refuses("UNAUTHENTICATED", /who is \[token\]=*\?; JWT: /),
    );
    ok(env.lines.every((line) => !line.includes(write(token))));
  });
}

Deno.test("promise 10: a token that a server repeats in its API version is in no error and no log line", async () => {
  const token = "a-token-of-some-length";
  await using server = await answerHttp2(() => grpcAnswer(VersionSchema, { apiVersion: `v1 for Bearer ${token}` }));
  await using env = await start(1);
  const { backend, wanted } = env.open([server.address]);

  await rejects(
    backend.createVolume(within(5000), new Secrets({ jwt: token }), wanted("pvc-1")),
    refuses("FAILED_PRECONDITION", /speaks management API "v1 for Bearer \[token\]", this driver speaks/),
  );
  ok(env.lines.every((line) => !line.includes(token)));
});

Deno.test("what a server says without end is cut short in the error", async () => {
  await using env = await start(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  const message = "no ".repeat(3000);
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "PERMISSION_DENIED", message });

  await rejects(env.backend.getVolume(within(5000), none, id), (error: unknown) => {
    refuses("PERMISSION_DENIED", /answered GetVolume with PERMISSION_DENIED: no no .* …; JWT: /)(error);
    ok((error as Error).message.length < 2500);
    return true;
  });
});

Deno.test("a volume that many hosts have is refused to another one with some of their names and their number", async () => {
  await using env = await start(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  for (let at = 10; at < 25; at++) {
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostNqn(`node-${at}`), shared: true });
  }

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: host, shared: false }),
    refuses("FAILED_PRECONDITION", /: node-10, node-11, .*node-19 and 5 others has it, and its access mode/),
  );
  await rejects(
    env.backend.deleteVolume(within(5000), none, id),
    refuses("FAILED_PRECONDITION", /: node-10, .*node-19 and 5 others may still connect to it/),
  );
});

Deno.test("promise 12: an ill endpoint costs one attempt, is named once in the log, and shows in the metrics", async () => {
  await using env = await start(3);
  const [ill = ""] = env.endpoints;
  env.simulator.control.fail({ rpc: "*", count: 0, code: "UNAVAILABLE", message: "no quorum", endpoint: ill });

  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
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

Deno.test("what every endpoint answers is the answer, and puts none of them to rest", async () => {
  await using env = await start(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "INTERNAL", message: "cannot read it" });

  await rejects(
    env.backend.getVolume(within(5000), none, id),
    refuses("INTERNAL", /^Cannot read volume .* answered GetVolume with INTERNAL: cannot read it$/),
  );

  match(await env.metrics.text(), /lbcsi_mgmt_endpoint_resting/);
  ok(!/lbcsi_mgmt_endpoint_resting\{.*\} 1/.test(await env.metrics.text()));
});

Deno.test("a refusal that is about the request is not carried to another endpoint", async () => {
  await using env = await start(3);
  env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code: "RESOURCE_EXHAUSTED", message: "full" });

  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted("pvc-1")),
    refuses("RESOURCE_EXHAUSTED", /: full$/),
  );

  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("one UNAVAILABLE of the only endpoint to a read passes unnoticed", async () => {
  await using env = await start(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  env.simulator.control.fail({ rpc: "GetVolume", count: 1, code: "UNAVAILABLE", message: "just a moment" });

  strictEqual((await env.backend.getVolume(within(5000), none, id)).id, id);

  env.simulator.control.fail({ rpc: "GetVolume", count: 0, code: "UNAVAILABLE", message: "no quorum" });
  await rejects(env.backend.getVolume(within(5000), none, id), refuses("UNAVAILABLE", /no quorum/));
});

for (
  const [what, call] of [
    ["a read", (env: Awaited<ReturnType<typeof start>>, id: string) => env.backend.getVolume(within(30_000), none, id)],
    [
      "a change",
      (env: Awaited<ReturnType<typeof start>>) => env.backend.createVolume(within(30_000), none, env.wanted("pvc-2")),
    ],
  ] as const
) {
  Deno.test(`promise 12: an endpoint that goes silent while it is in use costs ${what} about 3 seconds, not half of its time`, async () => {
    await using env = await start(3);
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
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
  await using env = await start(2);
  env.simulator.control.fail({ rpc: "CreateVolume", count: 1, delayMs: 4000 });

  const { uuid } = await env.backend.createVolume(within(20_000), none, env.wanted("pvc-1"));

  deepStrictEqual(env.volumes(), [uuid]);
  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("promise 12: a read that takes longer than an endpoint may be silent succeeds when the other endpoints are down", async () => {
  await using env = await start(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  for (const address of env.endpoints.slice(1)) await env.simulator.control.stopEndpoints({ address });
  env.simulator.control.fail({ rpc: "GetVolume", count: 0, delayMs: 4000 });

  strictEqual((await env.backend.getVolume(within(20_000), none, id)).id, id);
});

Deno.test("promise 12: a read that every endpoint is slow to answer has the answer of the first one", async () => {
  await using env = await start(3);
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
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
  await using env = await start(3);
  await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  for (const address of env.endpoints.slice(1)) await env.simulator.control.stopEndpoints({ address });
  env.simulator.control.resetCalls();
  env.simulator.control.fail({ rpc: "CreateVolume", count: 0, delayMs: 6000 });

  const { uuid } = await env.backend.createVolume(within(10_000), none, env.wanted("pvc-2"));

  ok(env.volumes().includes(uuid));
  strictEqual(env.simulator.control.calls()["CreateVolume"]?.total, 1);
});

Deno.test("promise 12: a change that hangs at an endpoint which is alive is made at another one", async () => {
  await using env = await start(3);
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
  const [address = ""] = env.endpoints;
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 0, hold: true, when: "before", endpoint: address });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: host, shared: false });

  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, [host]);
  env.simulator.control.clearFaults();
});

// --------------------------------------------------------------------------------------------- repeats find their volume

for (
  const code of ["RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION", "NOT_FOUND"] as const
) {
  Deno.test(`promise 18: CreateVolume whose repeat the cluster refuses with ${code} answers the volume that is there`, async () => {
    await using env = await start(1);
    const made = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "refused" });

    const again = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));

    deepStrictEqual(again, made);
    await rejects(env.backend.createVolume(within(5000), none, env.wanted("pvc-2")), refuses(code, /refused/));
  });

  Deno.test(`promise 18: CreateVolume that the cluster refuses with ${code} is not final while nobody can look`, async () => {
    await using env = await start(1);
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "refused" });
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code: "UNAVAILABLE", message: "no quorum" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.wanted("pvc-1")),
      refuses("UNAVAILABLE", /: refused; and whether it is there already cannot be seen: .*no quorum$/),
    );
  });

  Deno.test(`promise 18: CreateSnapshot whose repeat the cluster refuses with ${code} answers the snapshot that is there`, async () => {
    await using env = await start(1);
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
    const { snapshots } = env.backend;
    ok(snapshots);
    // The first request reaches the cluster after it was looked for; the answer is lost.
    env.simulator.control.fail({ rpc: "CreateSnapshot", count: 1, code, message: "refused", when: "after" });

    const taken = await snapshots.createSnapshot(within(5000), none, { name: "s", sourceVolumeId: id });

    strictEqual(env.simulator.control.cluster.snapshots.filter(({ name }) => name === "s").length, 1);
    strictEqual((await snapshots.getSnapshot(within(5000), none, taken.id)).id, taken.id);
  });
}

for (const code of ["INTERNAL", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateVolume is not final when the cluster made it, answered ${code}, and answers the look with that too`, async () => {
    await using env = await start(1);
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "rpc fault", when: "after" });
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code, message: "rpc fault" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.wanted("pvc-1")),
      refuses("UNAVAILABLE", /answered CreateVolume with .*whether it is there already cannot be seen: .*ListVolumes/),
    );
    strictEqual(env.volumes().length, 1);
  });
}

for (const code of ["INTERNAL", "UNAUTHENTICATED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateVolume is not final when the volume is being made and the look at it is answered with ${code}`, async () => {
    await using env = await start(1);
    env.simulator.control.behave({ holdCreations: true });
    env.simulator.control.fail({ rpc: "GetVolume", count: 0, code, message: "rpc fault" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.wanted("pvc-1")),
      refuses("UNAVAILABLE", new RegExp(`answered GetVolume with ${code}: rpc fault.*; repeat the call$`)),
    );
    strictEqual(env.volumes().length, 1);

    env.simulator.control.clearFaults();
    env.simulator.control.releaseCreations();
    strictEqual((await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"))).uuid, env.volumes()[0]);
  });
}

for (const code of ["INTERNAL", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateSnapshot and clones are not final while the look for what was made before is answered with ${code}`, async () => {
    const unseen = new RegExp(`answered List(Snapshots|Volumes) with ${code}: rpc fault; repeat the call$`);
    await using env = await start(1);
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted("pvc-1"));
    const { snapshots } = env.backend;
    ok(snapshots);
    env.simulator.control.fail({ rpc: "ListSnapshots", count: 0, code, message: "rpc fault" });

    const snapshot = () => snapshots.createSnapshot(within(5000), none, { name: "s", sourceVolumeId: id });
    await rejects(snapshot, refuses("UNAVAILABLE", unseen));
    const clone = () =>
      env.backend.createVolume(within(5000), none, env.wanted("pvc-2", { source: { type: "volume", id } }));
    await rejects(clone, refuses("UNAVAILABLE", unseen));

    env.simulator.control.clearFaults();
    await clone();
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code, message: "rpc fault" });
    await rejects(clone, refuses("UNAVAILABLE", unseen));
    const states = env.simulator.control.cluster.snapshots.map(({ state }) => state).filter((state) =>
      state !== "Deleting"
    );
    deepStrictEqual(states, [], "no helper is left");
  });
}

Deno.test("promise 18: CreateVolume repeated on a full cluster that looks for space first answers the volume that is there", async () => {
  await using env = await start(1);
  env.simulator.control.behave({ nameCheckedLast: true });
  const { capacityBytes } = env.simulator.control.cluster;
  const most = env.wanted("pvc-1", { requiredBytes: capacityBytes / gib * gib });
  const made = await env.backend.createVolume(within(5000), none, most);

  deepStrictEqual(await env.backend.createVolume(within(5000), none, most), made);
  await rejects(
    env.backend.createVolume(within(5000), none, { ...most, name: "pvc-2" }),
    refuses("RESOURCE_EXHAUSTED"),
  );
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
  await using backend = lightosBackend({
    log: createLogger("debug", "json", (line) => lines.push(line)),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  });
  try {
    const { port } = relay.address() as net.AddressInfo;
    const parameters = {
      "mgmt-endpoint": `127.0.0.1:${port}`,
      "mgmt-scheme": "grpc",
      "replica-count": "1",
      "project-name": "default",
    };
    const wanted = { name: "pvc-1", requiredBytes: gib, limitBytes: 0n, parameters };
    const { id } = await backend.createVolume(within(20_000), none, wanted);
    const isClosed = new Promise((resolve) => accepted[0]?.once("close", resolve));
    // It closes when the other side has noticed and has closed as well.
    accepted[0]?.end();
    await isClosed;
    // The call ends when its connection is being made, whatever the speed of this machine.
    const caller = new AbortController();
    isSecond.promise.then(() => caller.abort(new StatusError("CANCELLED", "Cannot wait: the caller has left")));
    const deadline = new Date(Date.now() + 20_000);
    await rejects(
      backend.getVolume(requestContext(caller.signal, deadline, createLogger("error", "json", () => {})), none, id),
      refuses("CANCELLED", /LightOS at 127\.0\.0\.1:\d+ has not answered GetVolume/),
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

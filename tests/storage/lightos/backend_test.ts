import { deepStrictEqual, match, ok, rejects, strictEqual, throws } from "node:assert/strict";
import net from "node:net";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../../lib/context.ts";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import type { StorageBackend, VolumeRequest } from "../../../lib/storage/backend.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { volumeSize } from "../../../lib/storage/lightos/parameters.ts";
import type { LightosOptions } from "../../../lib/storage/lightos/cluster.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { DurosAPI, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import { startSimulator, type TestSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
const hostA = hostNqn("a.node");
const hostB = hostNqn("b.node");

/** A backend against a simulator, with what a test needs at hand. */
async function start(
  overrides: Parameters<typeof startSimulator>[0] = {},
  backendOptions: Partial<LightosOptions> = {},
) {
  const simulator = await startSimulator(overrides);
  const lines: string[] = [];
  const backend = openBackend(simulator, lines, backendOptions);
  return {
    simulator,
    backend,
    lines,
    wanted: (changes: Partial<VolumeRequest> = {}, parameters: Record<string, string> = {}): VolumeRequest => ({
      name: "pvc-1",
      requiredBytes: gib,
      limitBytes: 0n,
      ...changes,
      parameters: {
        "mgmt-endpoint": simulator.addresses.grpc.join(","),
        "mgmt-scheme": "grpc",
        "replica-count": "1",
        "project-name": "default",
        ...parameters,
      },
    }),
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await simulator[Symbol.asyncDispose]();
    },
  };
}

function openBackend(
  simulator: TestSimulator,
  lines: string[] = [],
  changes: Partial<LightosOptions> = {},
): StorageBackend {
  return lightosBackend({
    log: createLogger("debug", "json", (line) => lines.push(line)),
    globalJwt: () => simulator.addresses.jwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
    ...changes,
  });
}

const quiet = createLogger("error", "json", () => {});

/** The context of a call whose caller waits for `ms`. */
function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), quiet);
}

function refuses(code: StatusCode, ...messages: RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

const none = new Secrets();

// ------------------------------------------------------------------------------------------------------------- sizes

for (
  const [what, requiredBytes, limitBytes, expected] of [
    ["no size", 0n, 0n, gib],
    ["one byte", 1n, 0n, gib],
    ["exactly 1 GiB", gib, gib, gib],
    ["a byte more than 1 GiB", gib + 1n, 0n, 2n * gib],
    ["a limit alone", 0n, 5n * gib, gib],
    ["the largest that CSI can say, in whole GiB", (1n << 63n) - gib, 0n, (1n << 63n) - gib],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is ${expected} bytes`, () => {
    strictEqual(volumeSize(within(1000), { requiredBytes, limitBytes }), expected);
  });
}

for (
  const [what, requiredBytes, limitBytes, code, message] of [
    ["a negative size", -1n, 0n, "INVALID_ARGUMENT", /negative/],
    ["a negative limit", 0n, -1n, "INVALID_ARGUMENT", /negative/],
    ["a limit below the size", 2n * gib, gib, "INVALID_ARGUMENT", /limit_bytes 1073741824 is below required_bytes/],
    ["a limit below 1 GiB", 0n, gib - 1n, "OUT_OF_RANGE", /whole GiB/],
    ["a limit that rounding passes", gib + 1n, gib + 2n, "OUT_OF_RANGE", /2147483648 bytes are above limit_bytes/],
    ["a size that overflows when rounded", (1n << 63n) - 1n, 0n, "OUT_OF_RANGE", /too many/],
  ] as const
) {
  Deno.test(`volumeSize refuses ${what} with ${code}`, () => {
    throws(() => volumeSize(within(1000), { requiredBytes, limitBytes }), refuses(code, message));
  });
}

// -------------------------------------------------------------------------------------------------------- parameters

for (
  const [changes, message] of [
    [{ "mgmt-endpoint": undefined }, /"mgmt-endpoint" is missing, give host:port/],
    [{ "mgmt-endpoint": "10.0.0.1" }, /"mgmt-endpoint" "10\.0\.0\.1" is not host:port/],
    [{ "mgmt-endpoint": "10.0.0.1:443, 10.0.0.2:443" }, /10\.0\.0\.2:443": " 10\.0\.0\.2:443" is not host:port/],
    [{ "mgmt-endpoint": "10.0.0.1:70000" }, /"mgmt-endpoint" port 70000 of "10\.0\.0\.1:70000" is above/],
    [{ "mgmt-scheme": "https" }, /"mgmt-scheme" "https" is not one of grpc, grpcs/],
    [{ "replica-count": undefined }, /"replica-count" is missing, give 1, 2 or 3/],
    [{ "replica-count": "two" }, /"replica-count" "two" is not a number from 1 to 128/],
    [{ "replica-count": "0" }, /"replica-count" "0" is not a number/],
    [{ "replica-count": "129" }, /"replica-count" "129" is not a number/],
    [{ compression: "on" }, /"compression" "on" is not "enabled" or "disabled"/],
    [{ "project-name": "" }, /"project-name" "" is not a project name/],
    [{ "project-name": "Team_A" }, /"project-name" "Team_A" is not a project name/],
    [{ "host-encryption": "yes" }, /"host-encryption" "yes" is not "enabled" or "disabled"/],
    [
      { "replica-cout": "3" },
      /"replica-cout" \(did you mean "replica-count"\?\) unknown \(known: mgmt-endpoint, .*, mkfs-options\)/,
    ],
  ] as const
) {
  const what = Object.entries(changes).map(([key, value]) =>
    value === undefined ? `without ${key}` : `${key}=${value}`
  );
  Deno.test(`createVolume refuses parameters ${what.join()} with INVALID_ARGUMENT`, async () => {
    await using backend = lightosBackend({
      log: quiet,
      globalJwt: () => undefined,
      globalJwtPath: "/etc/lb-csi/jwt",
      globalJwtFor: "any endpoint",
      ca: undefined,
      verifyTls: true,
      userAgent: "lbcsi/test",
    });
    const all: Record<string, string | undefined> = {
      "mgmt-endpoint": "192.0.2.1:443",
      "replica-count": "3",
      ...changes,
    };
    const parameters = Object.fromEntries(
      Object.entries(all).filter((entry): entry is [string, string] => entry[1] !== undefined),
    );
    const wanted = { name: "pvc-1", requiredBytes: gib, limitBytes: 0n, parameters };

    await rejects(
      backend.createVolume(within(1000), none, wanted),
      refuses("INVALID_ARGUMENT", /^Cannot create volume "pvc-1": StorageClass parameter /, message),
    );
  });
}

// ------------------------------------------------------------------------------------------------------------ create

Deno.test("createVolume makes a volume that nobody may reach, and names it by the incumbent's ID", async () => {
  await using env = await start();

  const volume = await env.backend.createVolume(within(5000), none, env.wanted({ requiredBytes: 3n * gib - 5n }));

  strictEqual(volume.capacityBytes, 3n * gib);
  strictEqual(volume.name, "pvc-1");
  deepStrictEqual(volume.hosts, []);
  strictEqual(volume.condition, undefined);
  const id = parseVolumeId(volume.id);
  strictEqual(id.uuid, volume.uuid);
  strictEqual(id.project, "default");
  strictEqual(id.scheme, "grpc");
  strictEqual(
    env.simulator.control.cluster.getVolume({ project: "default", uuid: volume.uuid }).acl.join(),
    "ALLOW_NONE",
  );
});

Deno.test("createVolume refuses endpoints whose volume ID no other call would take, before anything is made", async () => {
  await using env = await start();
  const names = Array.from({ length: 41 }, (_, at) => `management-${at}.storage.example.internal:443`);
  const endpoints = [...env.simulator.addresses.grpc, ...names];

  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted({}, { "mgmt-endpoint": endpoints.join(",") })),
    refuses(
      "INVALID_ARGUMENT",
      /^Cannot create volume "pvc-1": StorageClass parameter "mgmt-endpoint" has 44 endpoints, with which a volume ID has up to \d+ bytes and 1024 are allowed; name fewer/,
    ),
  );

  deepStrictEqual(env.simulator.control.calls(), {});
});

Deno.test("the longest volume ID that is made is one that every call takes", async () => {
  await using env = await start();
  const [address = ""] = env.simulator.addresses.grpc;
  const fixed = `mgmt:${address},|nguid:0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10|proj:default|scheme:grpc`.length;
  const pad = (bytes: number) => `z${"z".repeat(bytes - 3)}:1`;

  const { id } = await env.backend.createVolume(
    within(5000),
    none,
    env.wanted({}, { "mgmt-endpoint": `${address},${pad(1024 - fixed)}` }),
  );
  strictEqual(id.length, 1024);
  await env.backend.deleteVolume(within(5000), none, id);

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.wanted({}, { "mgmt-endpoint": `${address},${pad(1024 - fixed + 1)}` }),
    ),
    refuses("INVALID_ARGUMENT", /up to 1025 bytes/),
  );
});

Deno.test("growing a volume costs two management calls, and none more when it is large enough", async () => {
  await using env = await start({ servers: 1 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  const grow = (bytes: bigint) =>
    env.backend.expansion?.expandVolume(within(5000), none, id, { requiredBytes: bytes, limitBytes: 0n });
  env.simulator.control.resetCalls();

  strictEqual((await grow(gib + 1n))?.capacityBytes, 2n * gib);

  const counts = Object.entries(env.simulator.control.calls()).map(([rpc, { total }]) => [rpc, total]);
  deepStrictEqual(Object.fromEntries(counts), { GetVolume: 1, UpdateVolume: 1 });
  strictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).sizeBytes, 2n * gib);
  env.simulator.control.resetCalls();
  strictEqual((await grow(gib))?.capacityBytes, 2n * gib);
  strictEqual(env.simulator.control.calls()["GetVolume"]?.total, 1);
  strictEqual(env.simulator.control.calls()["UpdateVolume"], undefined);
});

for (const when of ["before", "after"] as const) {
  Deno.test(`growing a volume whose answer is lost ${when} the effect answers the size that it has`, async () => {
    await using env = await start();
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
    env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when });

    const grown = await env.backend.expansion?.expandVolume(within(8000), none, id, {
      requiredBytes: 3n * gib,
      limitBytes: 0n,
    });

    strictEqual(grown?.capacityBytes, 3n * gib);
  });
}

Deno.test("createVolume repeated answers the same volume", async () => {
  await using env = await start();
  const first = await env.backend.createVolume(within(5000), none, env.wanted());

  const second = await env.backend.createVolume(within(5000), none, env.wanted());

  deepStrictEqual(second, first);
  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 1);
});

Deno.test("createVolume under a taken name answers ALREADY_EXISTS with every difference", async () => {
  await using env = await start();
  await env.backend.createVolume(within(5000), none, env.wanted());

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.wanted({ requiredBytes: 2n * gib }, { "replica-count": "2", compression: "enabled" }),
    ),
    refuses(
      "ALREADY_EXISTS",
      /size is 1073741824 bytes, asked is 2147483648 bytes/,
      /replica-count is 1, asked is 2/,
      /compression is false, asked is true/,
    ),
  );
});

Deno.test("createVolume under a taken name refuses a volume above the limit", async () => {
  await using env = await start();
  await env.backend.createVolume(within(5000), none, env.wanted({ requiredBytes: 3n * gib }));

  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted({ requiredBytes: gib, limitBytes: 2n * gib })),
    refuses("ALREADY_EXISTS", /size is 3221225472 bytes, asked is at most 2147483648 bytes/),
  );
});

Deno.test("createVolume at its deadline tells the state, and the repeat goes on with the same volume", async () => {
  await using env = await start();
  env.simulator.control.behave({ holdCreations: true });

  await rejects(
    env.backend.createVolume(within(1900), none, env.wanted()),
    refuses("DEADLINE_EXCEEDED", /^Cannot create volume "pvc-1" in time: LightOS shows volume .* as Creating; repeat/),
  );
  env.simulator.control.releaseCreations();
  const volume = await env.backend.createVolume(within(5000), none, env.wanted());

  const all = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(all.map(({ uuid }) => uuid), [volume.uuid]);
});

Deno.test("promise 18: createVolume looks through the husk of a failed creation", async () => {
  await using env = await start();
  env.simulator.control.behave({ failCreations: 1 });

  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted()),
    refuses("UNAVAILABLE", /could not make it \(volume .* is Failed\), the next attempt makes another/),
  );
  const volume = await env.backend.createVolume(within(5000), none, env.wanted());

  const states = env.simulator.control.cluster.listVolumes({ project: "default" }).map(({ uuid, state }) => ({
    uuid,
    state,
  }));
  deepStrictEqual(states.filter(({ state }) => state !== "Failed"), [{ uuid: volume.uuid, state: "Available" }]);
});

Deno.test("createVolume makes a new volume while its namesake is being deleted", async () => {
  await using env = await start();
  const old = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.behave({ deletionMs: 60_000 });
  await env.backend.deleteVolume(within(5000), none, old.id);

  const volume = await env.backend.createVolume(within(5000), none, env.wanted());

  ok(volume.uuid !== old.uuid);
});

Deno.test("promise 8: createVolume whose answer is lost makes one volume", async () => {
  await using env = await start();
  env.simulator.control.fail({ rpc: "CreateVolume", count: 1, drop: true, when: "after" });

  const volume = await env.backend.createVolume(within(8000), none, env.wanted());

  const all = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(all.map(({ uuid }) => uuid), [volume.uuid]);
});

Deno.test("createVolume after INTERNAL from the cluster looks whether the volume is there", async () => {
  await using env = await start();
  env.simulator.control.fail({
    rpc: "CreateVolume",
    count: 1,
    code: "INTERNAL",
    message: "etcd hiccup",
    when: "after",
  });

  const volume = await env.backend.createVolume(within(8000), none, env.wanted());

  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 1);
  strictEqual(volume.capacityBytes, gib);
});

Deno.test("promise 22: createVolume passes on that the cluster is full, with its words and the endpoint", async () => {
  await using env = await start();
  const tooMany = 1n << 50n;

  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted({ requiredBytes: tooMany })),
    refuses(
      "RESOURCE_EXHAUSTED",
      /^Cannot create volume "pvc-1": LightOS at 127\.0\.0\.1:\d+ answered CreateVolume with RESOURCE_EXHAUSTED: /,
    ),
  );
  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 0);
});

Deno.test("getVolume tells what is wrong with a volume", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.setVolume(uuid, { protection: "ReadOnly" });

  const volume = await env.backend.getVolume(within(5000), none, id);

  match(volume.condition?.message ?? "", /writes fail \(LightOS: ReadOnly/);
});

// ------------------------------------------------------------------------------------------------------------ delete

Deno.test("promise 19: deleteVolume by a process that never saw the volume deletes it", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  await using restarted = openBackend(env.simulator);

  await restarted.deleteVolume(within(5000), none, id);

  const left = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(left.filter(({ state }) => state !== "Deleting"), []);
});

Deno.test("deleteVolume of an absent volume, and twice in a row, is done", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());

  await env.backend.deleteVolume(within(5000), none, id);
  await env.backend.deleteVolume(within(5000), none, id);
  await env.backend.deleteVolume(within(5000), none, id.replace(uuid, crypto.randomUUID()));
});

Deno.test("createVolume with host encryption says so in the ID and in a label, and is not the volume without it", async () => {
  await using env = await start();
  const encrypted = env.wanted({}, { "host-encryption": "enabled" });

  const { id } = await env.backend.createVolume(within(5000), none, encrypted);
  const again = await env.backend.createVolume(within(5000), none, encrypted);

  strictEqual(parseVolumeId(id).hostEncryption, "luks2");
  strictEqual(again.id, id);
  await rejects(
    env.backend.createVolume(within(5000), none, env.wanted()),
    refuses("ALREADY_EXISTS", /differs: host-encryption is luks2, asked is disabled/),
  );
});

Deno.test("createVolume with host encryption and compression answers FAILED_PRECONDITION", async () => {
  await using env = await start();

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.wanted({}, { "host-encryption": "enabled", compression: "enabled" }),
    ),
    refuses("FAILED_PRECONDITION", /"host-encryption" and "compression" are both enabled/),
  );
});

Deno.test("deleteVolume refuses with FAILED_PRECONDITION while a host may connect, and names it", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await rejects(
    env.backend.deleteVolume(within(5000), none, id),
    refuses("FAILED_PRECONDITION", /a\.node may still connect to it, detach it there first/),
  );
  strictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).state, "Available");
});

for (const when of ["before", "after"] as const) {
  Deno.test(`promise 8: deleteVolume whose connection is lost ${when} the effect is done at the end`, async () => {
    await using env = await start();
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
    env.simulator.control.fail({ rpc: "DeleteVolume", count: 1, drop: true, when });

    await env.backend.deleteVolume(within(8000), none, id);

    const left = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
    deepStrictEqual(left.filter(({ state }) => state !== "Deleting"), []);
  });
}

Deno.test("deleteVolume waits while the volume is Updating, and says so at its deadline", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.setVolume(uuid, { state: "Updating" });

  await rejects(
    // It looks again 1.3 and 2.1 s after its beginning: on a busy machine too, this deadline comes between two looks.
    env.backend.deleteVolume(within(1900), none, id),
    refuses("DEADLINE_EXCEEDED", /LightOS shows it as Updating/),
  );
  env.simulator.control.setVolume(uuid, { state: "Available" });
  await env.backend.deleteVolume(within(5000), none, id);
});

Deno.test("deleteVolume takes the husk of a failed creation for deleted", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.setVolume(uuid, { state: "Failed" });

  await env.backend.deleteVolume(within(5000), none, id);
});

// ------------------------------------------------------------------------------------------------------------ access

Deno.test("grantAccess answers where the namespace is, and repeated the same", async () => {
  await using env = await start({ servers: 2 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());

  const first = await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });
  const second = await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  deepStrictEqual(second, first);
  strictEqual(first.uuid, uuid);
  strictEqual(first.subsystemNqn, env.simulator.control.cluster.identity.subsystemNqn);
  strictEqual(first.addresses.length, 2);
  strictEqual(first.discovery.length, 2);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("promise 7: exclusive access for a second host is refused by the first one's name", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: false }),
    refuses("FAILED_PRECONDITION", /^Cannot give b\.node access to volume .*: a\.node has it/),
  );
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("promise 7: of two racing exclusive grants one wins", async () => {
  await using env = await start();
  await using otherController = openBackend(env.simulator);
  for (let round = 0; round < 10; round++) {
    const { id } = await env.backend.createVolume(within(5000), none, env.wanted({ name: `pvc-race-${round}` }));

    const results = await Promise.allSettled([
      env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false }),
      otherController.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: false }),
    ]);

    deepStrictEqual(results.map(({ status }) => status).sort(), ["fulfilled", "rejected"]);
    const winner = results[0].status === "fulfilled" ? hostA : hostB;
    deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [winner]);
  }
});

Deno.test("grantAccess that is shared lets a second host in", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());

  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: true });
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: true });

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA, hostB]);
});

Deno.test("racing shared grants lose none", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  const hosts = [..."abcdef"].map((letter) => hostNqn(`${letter}.node`));

  await Promise.all(
    hosts.map((host) => env.backend.grantAccess(within(20_000), none, id, { hostNqn: host, shared: true })),
  );

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, hosts);
});

Deno.test("grantAccess refuses a list that is open to any host", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  await env.simulator.control.cluster.updateVolume({ project: "default", uuid }, { acl: ["ALLOW_ANY"] }, undefined);

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: true }),
    refuses("FAILED_PRECONDITION", /open to any host \(ALLOW_ANY\), set it to ALLOW_NONE/),
  );
});

Deno.test("grantAccess to an absent volume answers NOT_FOUND", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());

  await rejects(
    env.backend.grantAccess(within(5000), none, id.replace(uuid, crypto.randomUUID()), {
      hostNqn: hostA,
      shared: false,
    }),
    refuses("NOT_FOUND", /^Cannot give a\.node access to volume /),
  );
});

Deno.test("promise 8: grantAccess whose answer is lost is granted once", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when: "after" });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("grantAccess waits while the volume is Updating", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.setVolume(uuid, { state: "Updating" });

  const granted = env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });
  await rejects(
    env.backend.grantAccess(within(1500), none, id, { hostNqn: hostB, shared: true }),
    refuses("DEADLINE_EXCEEDED", /LightOS shows the volume as Updating/),
  );
  env.simulator.control.setVolume(uuid, { state: "Available" });

  strictEqual((await granted).uuid, uuid);
});

Deno.test("promise 24: revokeAccess takes the host from the access list, twice in a row", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await env.backend.revokeAccess(within(5000), none, id, hostA);
  await env.backend.revokeAccess(within(5000), none, id, hostA);

  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, ["ALLOW_NONE"]);
});

Deno.test("revokeAccess of one host leaves the others, of every host leaves none", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  for (const host of [hostA, hostB]) {
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: host, shared: true });
  }

  await env.backend.revokeAccess(within(5000), none, id, hostA);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostB]);
  await env.backend.revokeAccess(within(5000), none, id, undefined);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, []);
});

Deno.test("revokeAccess of an absent volume is done", async () => {
  await using env = await start();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());

  await env.backend.revokeAccess(within(5000), none, id.replace(uuid, crypto.randomUUID()), hostA);
});

// ------------------------------------------------------------------------------------------------------- connections

Deno.test("the API version is asked once per connection, not once per call", async () => {
  await using env = await start();
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());

  for (let i = 0; i < 20; i++) await env.backend.getVolume(within(5000), none, id);

  strictEqual(env.simulator.control.calls()["GetVersion"]?.total, 1);
});

Deno.test("promise 12: with one endpoint alive every call succeeds, and the dead ones are tried once per period", async () => {
  await using env = await start();
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
    const wanted = env.wanted({}, { "mgmt-endpoint": `0.0.0.0:${port},${alive}` });
    const { id } = await env.backend.createVolume(within(5000), none, wanted);
    const started = performance.now();
    for (let i = 0; i < 50; i++) await env.backend.getVolume(within(5000), none, id);

    const periods = Math.ceil((performance.now() - started) / 1000) + 1;
    ok(connects >= 1 && connects <= periods, `${connects} connects in ${periods} back-off periods`);
  } finally {
    await new Promise((resolve) => dead.close(resolve));
  }
});

Deno.test("promise 12: calls go on when the endpoint in use dies, and when it comes back", async () => {
  await using env = await start({ servers: 3 });
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());

  for (const address of env.simulator.addresses.grpc) {
    await env.simulator.control.stopEndpoints({ address });
    for (let i = 0; i < 5; i++) await env.backend.getVolume(within(5000), none, id);
    await env.simulator.control.startEndpoints({ address });
  }
});

Deno.test("promise 12: an endpoint that accepts connections and never answers does not block the others", async () => {
  await using env = await start({ servers: 2 });
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());

  for (const address of env.simulator.addresses.grpc) {
    await env.simulator.control.hangEndpoints({ address });

    await env.backend.getVolume(within(6000), none, id);

    await env.simulator.control.stopEndpoints({ address });
    await env.simulator.control.startEndpoints({ address });
  }
});

Deno.test("with every endpoint dead the error lists them, says a common reason once, and what to do", async () => {
  await using env = await start({ servers: 2 });
  const { id } = await env.backend.createVolume(within(5000), none, env.wanted());
  await env.simulator.control.stopEndpoints();

  await rejects(
    env.backend.getVolume(within(3000), none, id),
    refuses(
      "UNAVAILABLE",
      /no LightOS management endpoint answers \(127\.0\.0\.1:\d+, 127\.0\.0\.1:\d+: connect ECONNREFUSED\); check network, firewall, port and mgmt-scheme$/,
    ),
  );
});

Deno.test("an endpoint that the cluster names twice is fallen back on once", async () => {
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
  await using backend = lightosBackend({
    log: quiet,
    globalJwt: () => "x",
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
  });
  const id = `mgmt:127.0.0.1:${server.port}|nguid:${uuid}|proj:default|scheme:grpc`;
  await backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });
  await server.stop(100);

  await rejects(backend.getVolume(within(4000), none, id), (error: Error) => {
    strictEqual(error.message.split(spare).length - 1, 1, error.message);
    return true;
  });
});

Deno.test("a request that changes something is not sent to a second endpoint when the first may have done it", async () => {
  await using env = await start({ servers: 2 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.wanted());
  env.simulator.control.resetCalls();
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when: "after" });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });

  strictEqual(env.simulator.control.calls()["UpdateVolume"]?.total, 1);
  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, [hostA]);
});

// --------------------------------------------------------------------------------------------------- TLS and tokens

const overTls = (simulator: TestSimulator) => ({
  "mgmt-endpoint": simulator.addresses.grpcs.join(","),
  "mgmt-scheme": "grpcs",
});

Deno.test("promise 11: a management certificate of an unknown CA is refused, with the reason", async () => {
  await using env = await start();

  await rejects(
    env.backend.createVolume(within(4000), none, env.wanted({}, overTls(env.simulator))),
    refuses(
      "UNAVAILABLE",
      /no LightOS management endpoint answers \((127\.0\.0\.1:\d+(, |: )){3}self-signed certificate in certificate chain\); give the cluster's CA: mgmt-ca\.crt in the Secret, ca in the cluster file, or --mgmt-ca$/,
    ),
  );
});

for (
  const [what, scheme, endpoints, message] of [
    [
      "grpc is said of ports that speak TLS",
      "grpc",
      "grpcs",
      /\((127\.0\.0\.1:\d+(, |: )){3}the connection was closed before HTTP\/2 began\); check the port; if the cluster speaks TLS, mgmt-scheme has to be grpcs$/,
    ],
    [
      "grpcs is said of ports in clear text",
      "grpcs",
      "grpc",
      /\((127\.0\.0\.1:\d+(, |: )){3}what answers does not speak TLS\); check the port; if the cluster is to be reached in clear text, mgmt-scheme has to be grpc$/,
    ],
  ] as const
) {
  Deno.test(`promise 20: when ${what}, the error says so and what to do, and the repeat says the same`, async () => {
    await using env = await start();
    const wanted = env.wanted({}, {
      "mgmt-scheme": scheme,
      "mgmt-endpoint": env.simulator.addresses[endpoints].join(","),
    });
    const said: string[] = [];
    for (let i = 0; i < 2; i++) {
      await rejects(env.backend.createVolume(within(8000), none, wanted), (error: unknown) => {
        said.push((error as Error).message);
        return refuses("UNAVAILABLE", message)(error);
      });
    }
    strictEqual(said[0], said[1]);
  });
}

Deno.test("promise 11: a CA in the call's secrets makes its certificate trusted", async () => {
  await using env = await start();
  const secrets = new Secrets({ jwt: env.simulator.addresses.jwt, "mgmt-ca.crt": env.simulator.addresses.ca ?? "" });

  const volume = await env.backend.createVolume(within(5000), secrets, env.wanted({}, overTls(env.simulator)));

  strictEqual(parseVolumeId(volume.id).scheme, "grpcs");
});

Deno.test("promise 11: verification is off only when the process says so", async () => {
  await using env = await start({}, { verifyTls: false });

  const volume = await env.backend.createVolume(within(5000), none, env.wanted({}, overTls(env.simulator)));

  strictEqual(parseVolumeId(volume.id).scheme, "grpcs");
});

Deno.test("promise 10: a refused token is named by where it came from, never by its text", async () => {
  await using env = await start();
  const expired = env.simulator.control.token(undefined, -1000);

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: expired }), env.wanted()),
    (error: Error) => {
      refuses("UNAUTHENTICATED", /; JWT: key "jwt" of the call's secrets, which expired \d{4}-\d\d-\d\dT[\d:.]+Z$/)(
        error,
      );
      strictEqual(error.message.includes(expired), false);
      return true;
    },
  );
  strictEqual(env.lines.join("").includes(expired), false);
});

Deno.test("a token that ends in a newline is used without it", async () => {
  await using env = await start();

  await env.backend.createVolume(within(5000), new Secrets({ jwt: `${env.simulator.addresses.jwt}\n` }), env.wanted());
});

Deno.test("no token at all is said in words", async () => {
  await using env = await start({}, { globalJwt: () => undefined });

  await rejects(
    env.backend.createVolume(within(4000), none, env.wanted()),
    refuses(
      "UNAUTHENTICATED",
      /JWT: none was given: no key "jwt" in the secrets, and none that can be read in \/etc\/lb-csi\/jwt/,
    ),
  );
});

Deno.test("a token with control characters is refused before it is sent", async () => {
  await using env = await start();

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: "a\nb" }), env.wanted()),
    refuses("INVALID_ARGUMENT", /key "jwt" of the call's secrets: it holds blanks or control characters/),
  );
});

Deno.test("a token for another project is answered PERMISSION_DENIED", async () => {
  await using env = await start({ projects: ["default", "other"] });
  const other = env.simulator.control.token(["other"]);

  await rejects(
    env.backend.createVolume(within(4000), new Secrets({ jwt: other }), env.wanted()),
    refuses("PERMISSION_DENIED", /answered CreateVolume with PERMISSION_DENIED/),
  );
});

/** PoseidonOS behind the StorageBackend contract: real requests to a simulated DAgent. */
import { deepStrictEqual, match, ok, rejects, strictEqual, throws } from "node:assert/strict";
import { createLogger, type RequestContext, requestContext, Secrets } from "../../../lib/context.ts";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { parsePoseidonId } from "../../../lib/volume_id.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Page, StorageBackend, Volume, VolumeRequest } from "../../../lib/storage/backend.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { meaningOf } from "../../../lib/storage/poseidon/codes.ts";
import { knownSystems, parseSystems } from "../../../lib/storage/poseidon/cluster_file.ts";
import { volumeSize } from "../../../lib/storage/poseidon/parameters.ts";
import { poseidonParameters, startPoseidon, type TestPoseidon } from "../../support/poseidon.ts";
import { eventually } from "../../support/simulator.ts";

const mib = 1n << 20n;
const gib = 1n << 30n;
const hostA = hostNqn("a.node");
const hostB = hostNqn("b.node");
const none = new Secrets();
const quiet = createLogger("error", "json", () => {});

/** The context of a call whose caller waits for `ms`. */
function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), quiet);
}

function refuses(code: StatusCode, ...messages: readonly RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

/** A backend against a simulator, with what a test needs at hand. */
async function start(overrides: Parameters<typeof startPoseidon>[0] = {}, withFile = false) {
  const sim = await startPoseidon(overrides);
  const file = `systems: [{ name: rack1, endpoint: "${sim.addresses.dagent}", arrays: [${sim.addresses.arrays}] }]`;
  const files = { stamp: () => "unchanged", read: () => file };
  const backend = poseidonBackend({
    log: quiet,
    systems: withFile ? knownSystems("/clusters.yaml", files, quiet) : undefined,
  });
  const { model } = sim.control;
  const self = {
    sim,
    backend,
    model,
    wanted: (changes: Partial<VolumeRequest> = {}, parameters: Record<string, string> = {}): VolumeRequest => ({
      name: "pvc-1",
      requiredBytes: gib,
      limitBytes: 0n,
      ...changes,
      parameters: { ...poseidonParameters(sim), ...parameters },
    }),
    create: (name = "pvc-1", parameters: Record<string, string> = {}) =>
      backend.createVolume(within(10_000), none, self.wanted({ name }, parameters)),
    grant: (id: string, host = hostA, ctx = within(10_000)) =>
      backend.grantAccess(ctx, none, id, { hostNqn: host, shared: false, volumeContext: poseidonParameters(sim) }),
    revoke: (id: string, host: string | undefined = hostA, ctx = within(10_000)) =>
      backend.revokeAccess(ctx, none, id, host),
    remove: (id: string, ctx = within(10_000)) => backend.deleteVolume(ctx, none, id),
    get: (id: string) => backend.getVolume(within(10_000), none, id),
    /** Volumes of the first array, whatever it shows. */
    volumes: () => model.arrays[0]?.volumes ?? [],
    calls: (rpc: string) => sim.control.calls()[rpc]?.total ?? 0,
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await sim[Symbol.asyncDispose]();
      deepStrictEqual(sim.control.api.harmful, []);
    },
  };
  return self;
}

// -------------------------------------------------------------------------------------------------- sizes, parameters

for (
  const [what, requiredBytes, limitBytes, expected] of [
    ["no size", 0n, 0n, mib],
    ["one byte", 1n, 0n, mib],
    ["exactly 1 MiB", mib, mib, mib],
    ["a byte more than 1 MiB", mib + 1n, 0n, 2n * mib],
    ["a limit alone", 0n, 5n * mib, mib],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is ${expected} bytes on PoseidonOS`, () => {
    strictEqual(volumeSize(within(1000), { requiredBytes, limitBytes }), expected);
  });
}

for (
  const [what, requiredBytes, limitBytes, code, message] of [
    ["a negative size", -1n, 0n, "INVALID_ARGUMENT", /negative/],
    ["a limit below the size", 2n * mib, mib, "INVALID_ARGUMENT", /limit_bytes 1048576 is below required_bytes/],
    ["a limit that rounding passes", mib + 1n, mib + 2n, "OUT_OF_RANGE", /2097152 bytes are above limit_bytes/],
    ["more than a JSON number can say", 1n << 54n, 0n, "OUT_OF_RANGE", /more than PoseidonOS can be told/],
  ] as const
) {
  Deno.test(`volumeSize of ${what} is refused on PoseidonOS`, () => {
    throws(() => volumeSize(within(1000), { requiredBytes, limitBytes }), refuses(code, message));
  });
}

for (
  const [change, message] of [
    [{ targetAddress: undefined }, /"targetAddress" is missing/],
    [{ targetAddress: "fd00::1" }, /"targetAddress" "fd00::1" is an IPv6 address: PoseidonOS listens on IPv4/],
    [{ targetAddress: "pos1" }, /"targetAddress" "pos1" is not an IPv4 address/],
    [{ targetAddress: "" }, /"targetAddress" "" is not an IPv4 address/],
    [{ transportType: "rdma" }, /"transportType" "rdma" is not tcp/],
    [{ transportServiceId: "0" }, /"transportServiceId" "0" is not a port/],
    [{ provisionerIP: undefined }, /"provisionerIP" is missing/],
    [{ provisionerIP: "http:\/\/x" }, /"provisionerIP" "http:\/\/x" is not an address/],
    [{ provisionerPort: "70000" }, /"provisionerPort" "70000" is not a port/],
    [{ arrayName: undefined }, /"arrayName" is missing/],
    [{ arrayName: "a" }, /"arrayName" "a" is not the name of an array/],
    [{ fsType: "ext3" }, /"fsType" "ext3" is not ext4, xfs or btrfs/],
    [{ maxiops: "5" }, /"maxiops" "5" is not 0 or a number of thousands of I\/O per second from 10/],
    [{ maxbw: "fast" }, /"maxbw" "fast" is not 0 or a number of MiB per second from 10/],
    [{ nqnName: "x" }, /"nqnName" unknown \(known: provisionerIP, /],
  ] as const
) {
  Deno.test(`CreateVolume on PoseidonOS refuses the StorageClass parameters ${JSON.stringify(change)}`, async () => {
    await using t = await start();
    const parameters = Object.fromEntries(
      Object.entries({ ...poseidonParameters(t.sim), ...change }).filter(([, value]) => value !== undefined),
    ) as Record<string, string>;

    const created = t.backend.createVolume(within(5000), none, { ...t.wanted(), parameters });

    await rejects(
      created,
      refuses("INVALID_ARGUMENT", /^Cannot create volume "pvc-1": StorageClass parameter /, message),
    );
    strictEqual(t.sim.control.callsInAll(), 0);
  });
}

for (
  const [number, event, meaning] of [
    [1807, "VOL_NOT_FOUND", "no such volume"],
    [2010, "", "no such volume"],
    [9999, "VOL_NOT_FOUND", "no such volume"],
    [1224, "", "busy"],
    [1030, "", "busy"],
    [1859, "", "unknown"],
    [1859, "VOL_REQ_REJECTED_IN_BROKEN_ARRAY", "storage fault"],
    [1855, "UNMOUNT_VOL_CAN_ONLY_BE_WHILE_ONLINE", "array not mounted"],
    [2028, "", "array not mounted"],
    [11020, "", "no answer from PoseidonOS"],
    [-32603, "", "unknown"],
  ] as const
) {
  Deno.test(`meaningOf ${number} ${event} is "${meaning}"`, () => {
    strictEqual(meaningOf(number, event), meaning);
  });
}

// ------------------------------------------------------------------------------------------------------------- create

Deno.test("CreateVolume on PoseidonOS makes a volume of whole MiB and answers the UUID that PoseidonOS has", async () => {
  await using t = await start();

  const volume = await t.backend.createVolume(within(5000), none, t.wanted({ requiredBytes: gib + 1n }));

  const [made] = t.volumes();
  deepStrictEqual([made?.name, made?.sizeBytes, made?.isMounted], ["pvc-1", gib + mib, false]);
  deepStrictEqual([volume.uuid, volume.capacityBytes], [made?.uuid, gib + mib]);
  strictEqual(volume.id, `pos:${t.sim.addresses.dagent}|array:POSArray|vol:pvc-1|uuid:${made?.uuid}`);
  deepStrictEqual(volume.context, { transportType: "tcp", targetAddress: "127.0.0.1", transportServiceId: "1158" });
});

Deno.test("CreateVolume on PoseidonOS answers the same volume again, also from another process", async () => {
  await using t = await start();
  const first = await t.create();

  await using other = poseidonBackend({ log: quiet });
  const again = await other.createVolume(within(5000), none, t.wanted());

  deepStrictEqual(again, first);
  strictEqual(t.volumes().length, 1);
  strictEqual(t.calls("CreateVolume"), 1);
});

for (
  const [what, changes, parameters, message] of [
    ["a larger size", { requiredBytes: 2n * gib }, {}, /size is 1073741824 bytes, asked are 2147483648 bytes/],
    ["a smaller limit", { requiredBytes: mib, limitBytes: gib - mib }, {}, /asked are at most 1072693248 bytes/],
    ["other limits", {}, { maxiops: "100" }, /maxiops is 0, asked is 100/],
  ] as const
) {
  Deno.test(`CreateVolume on PoseidonOS of a known name with ${what} is ALREADY_EXISTS`, async () => {
    await using t = await start();
    await t.create();

    const created = t.backend.createVolume(within(5000), none, t.wanted(changes, parameters));

    await rejects(created, refuses("ALREADY_EXISTS", /has that name and differs: /, message));
  });
}

Deno.test("CreateVolume on PoseidonOS does not take a namesake for its own that somebody else made", async () => {
  await using t = await start();
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-1", sizeBytes: gib, maxiops: 0n, maxbw: 0n, uuid });

  await rejects(t.create(), refuses("ALREADY_EXISTS", new RegExp(`its UUID is ${uuid} instead of`)));
});

Deno.test("CreateVolume on PoseidonOS gives a name that it does not allow another one", async () => {
  await using t = await start();
  const volume = await t.create("a.b/c");

  strictEqual(t.volumes()[0]?.name, `csi-${volume.uuid}`);
  deepStrictEqual(await t.create("a.b/c"), volume);
});

Deno.test("promise 8: CreateVolume on PoseidonOS whose answer is lost finds the volume that it made", async () => {
  await using t = await start();
  t.sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after" });

  const volume = await t.create();

  strictEqual(t.volumes()[0]?.uuid, volume.uuid);
  strictEqual(t.calls("CreateVolume"), 1);
});

for (const isLost of [true, false]) {
  Deno.test(`promise 30: CreateVolume on PoseidonOS is not final when the look after ${isLost ? "a lost" : "its"} answer is not understood`, async () => {
    await using t = await start();
    if (isLost) t.sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after" });
    t.sim.control.fail({ rpc: "ListVolumes", event: "CREATE_VOL_SIZE_NOT_ALIGNED", skip: 1, count: 1 });

    await rejects(
      t.create(),
      refuses(
        "UNAVAILABLE",
        /^Cannot create volume "pvc-1": .* answered GET .*CREATE_VOL_SIZE_NOT_ALIGNED.*; repeat the call$/,
      ),
    );

    strictEqual((await t.create()).uuid, t.volumes()[0]?.uuid);
    strictEqual(t.calls("CreateVolume"), 1);
  });
}

for (const event of ["VOL_REQ_PROCESSED_BUT_ERROR_OCCURED", "POS_UNREACHABLE", "VOL_MGR_BUSY"] as const) {
  Deno.test(`CreateVolume on PoseidonOS believes the volume and not the answer ${event}`, async () => {
    await using t = await start();
    t.sim.control.fail({ rpc: "CreateVolume", event, when: "after" });

    const volume = await t.create();

    strictEqual(t.volumes()[0]?.uuid, volume.uuid);
    strictEqual(t.calls("CreateVolume"), 1);
  });
}

for (const generation of ["1.0", "0.11"] as const) {
  Deno.test(`CreateVolume on PoseidonOS ${generation} repeats what was refused for being busy`, async () => {
    await using t = await start({ behaviour: { generation } });
    t.sim.control.fail({ rpc: "CreateVolume", event: "VOL_MGR_BUSY", count: 2 });
    t.sim.control.fail({ rpc: "ListVolumes", event: "CLI_SERVER_BUSY" });

    const volume = await t.create();

    deepStrictEqual(await t.create(), volume);
    strictEqual(t.calls("CreateVolume"), 3);
  });

  Deno.test(`a volume lives and ends on PoseidonOS ${generation}, with its status codes`, async () => {
    await using t = await start({ behaviour: { generation } });
    const { id, uuid } = await t.create();
    const namespace = await t.grant(id);
    deepStrictEqual(await t.grant(id), namespace);
    deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
    await rejects(t.remove(id), refuses("FAILED_PRECONDITION", /exported, a\.node may still use it/));
    await t.revoke(id);
    await t.revoke(id);
    await t.remove(id);
    await t.remove(id);

    await rejects(t.get(id), refuses("NOT_FOUND", new RegExp(uuid)));
    deepStrictEqual(t.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
  });
}

Deno.test("CreateVolume on PoseidonOS tells a caller who runs out of time that PoseidonOS is busy", async () => {
  await using t = await start();
  t.sim.control.fail({ rpc: "CreateVolume", event: "VOL_MGR_BUSY", count: 0 });

  const created = t.backend.createVolume(within(500), none, t.wanted());

  await rejects(
    created,
    refuses(
      "UNAVAILABLE",
      /in time: PoseidonOS at \S+ answered POST \/volumes with 1806 VOL_MGR_BUSY: .*; repeat the call$/,
    ),
  );
});

Deno.test("promise 22: CreateVolume on a full array is RESOURCE_EXHAUSTED before the array says so", async () => {
  await using t = await start();
  for (let number = 0; number < 256; number++) {
    const wish = { array: "POSArray", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid: "" };
    await t.model.createVolume({ ...wish, name: `v${number}x` });
  }

  await rejects(t.create(), refuses("RESOURCE_EXHAUSTED", /has 256 volumes, 256 are allowed; delete one/));

  strictEqual(t.calls("CreateVolume"), 0);
});

Deno.test("promise 22: CreateVolume of more than what is left is RESOURCE_EXHAUSTED and tells what is left", async () => {
  await using t = await start({ capacityBytes: 3n * gib });
  await t.create();

  const created = t.backend.createVolume(within(5000), none, t.wanted({ name: "pvc-2", requiredBytes: 3n * gib }));

  await rejects(created, refuses("RESOURCE_EXHAUSTED", /has 2147483648 bytes left, 3221225472 are needed/));
});

for (
  const [what, prepare, code, message] of [
    ["an unknown array", { arrayName: "Other" }, "FAILED_PRECONDITION", /has no array "Other"/],
    ["a source of nothing", { provisionerPort: "1" }, "UNAVAILABLE", /the DAgent at 127\.0\.0\.1:1 cannot be reached/],
  ] as const
) {
  Deno.test(`CreateVolume on ${what} is ${code}`, async () => {
    await using t = await start();

    await rejects(t.create("pvc-1", prepare), refuses(code, message));
  });
}

Deno.test("CreateVolume on an array that is not mounted is UNAVAILABLE, and on one that mounts again it works", async () => {
  await using t = await start();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });
  await rejects(
    t.create(),
    refuses("UNAVAILABLE", /array "POSArray" .* is not mounted \(OFFLINE, DEFAULT\), it has to be/),
  );

  t.sim.control.setArray("POSArray", { state: "NORMAL", situation: "NORMAL" });

  strictEqual((await t.create()).capacityBytes, gib);
});

Deno.test("CreateVolume with limits sets them, and leaves nothing where PoseidonOS drops them", async () => {
  await using t = await start();
  await t.create("pvc-1", { maxiops: "100", maxbw: "20" });
  deepStrictEqual([t.volumes()[0]?.maxiops, t.volumes()[0]?.maxbw], [100n, 20n]);
  t.sim.control.behave({ qos: false });

  const created = t.create("pvc-2", { maxiops: "100" });

  await rejects(
    created,
    refuses("FAILED_PRECONDITION", /did not take its limits \(maxiops is 0, asked is 100\).*fe_qos/),
  );
  deepStrictEqual(t.volumes().map(({ name }) => name), ["pvc-1"]);
});

Deno.test("what answers and is no DAgent is told as such", async () => {
  await using t = await start();
  const { hostname, port } = new URL(t.sim.addresses.control);

  const created = t.create("pvc-1", { provisionerIP: hostname, provisionerPort: port });

  await rejects(
    created,
    refuses("UNAVAILABLE", /HTTP status 404 and no envelope of DAgent: a proxy in between, or there is no DAgent/),
  );
});

/** A proxy in front of DAgent that hands requests on, and answers some of them by itself afterwards. */
async function proxyOf(dagent: string, answer: (method: string, path: string) => Response | undefined) {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, async (request) => {
    const { pathname } = new URL(request.url);
    const body = request.method === "GET" ? {} : { body: await request.text() };
    const passed = await fetch(`http://${dagent}${pathname}`, {
      method: request.method,
      headers: request.headers,
      ...body,
    });
    const text = await passed.text();
    return answer(request.method, pathname) ?? new Response(text, { status: passed.status, headers: passed.headers });
  });
  await Promise.resolve();
  return {
    parameters: { provisionerIP: server.addr.hostname, provisionerPort: String(server.addr.port) },
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}

const html = "<!DOCTYPE html><html><h1>Bad Gateway</h1></html>";
const half = '{"rid":"x","result":{"status":{"code":0,"descr';

for (
  const [what, answer] of [
    ...[200, 401, 403, 404, 429, 500, 502, 503, 504].map((status) =>
      [`a page of HTTP status ${status}`, () => new Response(html, { status })] as const
    ),
    ["a cut answer", () => new Response(half)],
    ["an empty answer", () => new Response("")],
    ["a redirect", () => new Response("", { status: 302, headers: { location: "http://127.0.0.1:9/" } })],
    ["JSON of something else", () => Response.json({ error: "not found" }, { status: 404 })],
    ["9 MiB of blanks", () => new Response(" ".repeat(9 << 20))],
  ] as [string, () => Response][]
) {
  Deno.test(`promise 30: CreateVolume on PoseidonOS finds what it made although ${what} came as the answer`, async () => {
    await using t = await start();
    let answered = 0;
    await using proxy = await proxyOf(
      t.sim.addresses.dagent,
      (method, path) => method === "POST" && path.endsWith("/volumes") && answered++ === 0 ? answer() : undefined,
    );

    await t.create("pvc-1", proxy.parameters);

    deepStrictEqual([answered, t.volumes().length], [1, 1]);
  });

  Deno.test(`promise 30: ${what} in place of PoseidonOS' answers is UNAVAILABLE, which is not final`, async () => {
    await using t = await start();
    await using proxy = await proxyOf(t.sim.addresses.dagent, answer);

    await rejects(t.create("pvc-1", proxy.parameters), refuses("UNAVAILABLE"));
  });
}

for (
  const [what, change, message] of [
    [
      "a UUID that is a path",
      { uuid: "../../../etc" },
      /volume "pvc-1" with "\.\.\/\.\.\/\.\.\/etc", which is not a UUID/,
    ],
    ["the nil UUID", { uuid: "00000000-0000-0000-0000-000000000000" }, /which is not a UUID/],
    ["a name with a separator of IDs", { name: "a|uuid:b" }, /volume "a\|uuid:b", which is not the name of a volume/],
  ] as const
) {
  Deno.test(`promise 28: PoseidonOS that lists a volume with ${what} is not believed`, async () => {
    await using t = await start();
    const { id } = await t.create();
    const [volume] = t.volumes();
    ok(volume);
    Object.assign(volume, change);

    await rejects(t.get(id), refuses("INTERNAL", message));
    await rejects(t.create(), refuses("INTERNAL", message));
    strictEqual(t.volumes().length, 1);
  });
}

Deno.test("promise 28: PoseidonOS that lists two volumes with one UUID is not believed", async () => {
  await using t = await start();
  const { id, uuid } = await t.create();
  await t.create("pvc-2");
  for (const volume of t.volumes()) volume.uuid = uuid;

  await rejects(t.get(id), refuses("INTERNAL", /volumes "pvc-1" and "pvc-2" with the same UUID/));
});

// -------------------------------------------------------------------------------------------------- grant and revoke

Deno.test("granting access exports the volume in a subsystem of volume and node, with room for nothing else", async () => {
  await using t = await start();
  const { id, uuid } = await t.create();

  const namespace = await t.grant(id);

  const nqn = `nqn.2019-04.pos:lbcsi:${uuid}:a.node`;
  deepStrictEqual(namespace, {
    uuid,
    subsystemNqn: nqn,
    addresses: [{ traddr: "127.0.0.1", trsvcid: "1158" }],
    discovery: [],
  });
  const [subsystem, ...others] = t.model.subsystems;
  strictEqual(others.length, 0);
  strictEqual(subsystem?.nqn, nqn);
  deepStrictEqual([subsystem?.maxNamespaces, subsystem?.allowAnyHost], [1, true]);
  deepStrictEqual(subsystem?.listeners, [{ targetAddress: "127.0.0.1", transportServiceId: "1158" }]);
  deepStrictEqual(subsystem?.namespaces, [{ nsid: 1, array: "POSArray", volumeUuid: uuid }]);
});

Deno.test("promise 7: a second node is refused by the name of the first, until the first has let go", async () => {
  await using t = await start();
  const { id } = await t.create();
  await t.grant(id);

  await rejects(
    t.grant(id, hostB),
    refuses("FAILED_PRECONDITION", /give b\.node access .* a\.node has it, .*detached there/),
  );
  await t.revoke(id, hostB);
  deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
  await t.revoke(id, hostA);
  await t.grant(id, hostB);

  deepStrictEqual([...(await t.get(id)).hosts], [hostB]);
});

Deno.test("promise 7: of two nodes that ask at once, one gets the volume", async () => {
  await using t = await start();
  await using other = poseidonBackend({ log: quiet });
  const { id } = await t.create();
  const grant = (backend: StorageBackend, host: string) =>
    backend.grantAccess(within(10_000), none, id, {
      hostNqn: host,
      shared: false,
      volumeContext: poseidonParameters(t.sim),
    });

  const outcomes = await Promise.allSettled([grant(t.backend, hostA), grant(other, hostB)]);

  strictEqual(outcomes.filter(({ status }) => status === "fulfilled").length, 1, JSON.stringify(outcomes));
  strictEqual(t.model.subsystems.filter(({ namespaces }) => namespaces.length > 0).length, 1);
});

Deno.test("a volume that another program exports is refused and left as it is", async () => {
  await using t = await start();
  const { id, uuid } = await t.create();
  const nqn = "nqn.2019-04.pos:pvc-1";
  t.model.createSubsystem({ nqn, serialNumber: "1", modelNumber: "m", maxNamespaces: 256, allowAnyHost: true });
  await t.model.mountVolume("POSArray", "pvc-1", nqn);

  await rejects(
    t.grant(id),
    refuses("FAILED_PRECONDITION", /whoever connects to nqn\.2019-04\.pos:pvc-1 has it, .*volume unmount/),
  );
  await rejects(
    t.remove(id),
    refuses("FAILED_PRECONDITION", /whoever connects to nqn\.2019-04\.pos:pvc-1 may still use it/),
  );
  await t.revoke(id, hostA);

  strictEqual(t.model.subsystems[0]?.namespaces[0]?.volumeUuid, uuid);
});

Deno.test("revoking access from every host un-exports also what another program exports", async () => {
  await using t = await start();
  const { id } = await t.create();
  const nqn = "nqn.2019-04.pos:pvc-1";
  t.model.createSubsystem({ nqn, serialNumber: "1", modelNumber: "m", maxNamespaces: 256, allowAnyHost: true });
  await t.model.mountVolume("POSArray", "pvc-1", nqn);

  await t.backend.revokeAccess(within(5000), none, id, undefined);

  deepStrictEqual(t.model.subsystems.map(({ nqn, namespaces }) => [nqn, namespaces]), [[nqn, []]]);
});

Deno.test("promise 8: after a restart of PoseidonOS, granting the same node exports it under the same name", async () => {
  await using t = await start({}, true);
  const { id } = await t.create();
  const before = await t.grant(id);
  await t.sim.control.restart();
  strictEqual(t.model.subsystems.length, 0);
  // The attacher of Kubernetes finds out by this list, and asks again.
  const listed = await t.backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });
  deepStrictEqual(listed?.entries.map(({ id, hosts }) => [id, [...hosts]]), [[id, []]]);

  deepStrictEqual(await t.grant(id), before);

  strictEqual(t.model.subsystems[0]?.listeners.length, 1);
});

Deno.test("granting access adds a listener that is missing", async () => {
  await using t = await start();
  const { id } = await t.create();
  await t.grant(id);
  t.model.subsystems[0]?.listeners.splice(0);

  await t.grant(id);

  strictEqual(t.model.subsystems[0]?.listeners.length, 1);
});

Deno.test("a volume of the vendor's driver is adopted by an ID and attributes that somebody wrote", async () => {
  await using t = await start();
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-old", sizeBytes: gib, maxiops: 0n, maxbw: 0n, uuid });
  const id = `pos:${t.sim.addresses.dagent}|array:POSArray|vol:pvc-old|uuid:${uuid}`;
  // What that driver left in the PersistentVolume, as far as this one reads it, and more.
  const volumeContext = { ...poseidonParameters(t.sim), targetAddr: "127.0.0.1", nqn: "nqn.2019-04.pos:pvc-old" };

  const granted = t.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false, volumeContext });

  strictEqual((await granted).subsystemNqn, `nqn.2019-04.pos:lbcsi:${uuid}:a.node`);
  await t.revoke(id);
  strictEqual(t.volumes().length, 1);
});

for (
  const [what, prepare, context, message] of [
    [
      "no TCP transport",
      (t: TestPoseidon) => t.control.behave({ tcpTransport: false }),
      {},
      /answered POST \/listener with 2208 .*; it has no TCP transport/,
    ],
    [
      "an address of somebody else",
      () => {},
      { targetAddress: "192.0.2.7" },
      /; targetAddress 192\.0\.2\.7 is not one of its addresses, or port 1158 is taken/,
    ],
    [
      "a PersistentVolume without attributes",
      () => {},
      { targetAddress: undefined },
      /volume attribute "targetAddress" is missing.*the PersistentVolume needs the attributes targetAddress/,
    ],
  ] as const
) {
  Deno.test(`granting access with ${what} is FAILED_PRECONDITION and says so`, async () => {
    await using t = await start();
    const { id } = await t.create();
    prepare(t.sim);
    const volumeContext = Object.fromEntries(
      Object.entries({ ...poseidonParameters(t.sim), ...context }).filter(([, value]) => value !== undefined),
    ) as Record<string, string>;

    const granted = t.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false, volumeContext });

    await rejects(granted, refuses("FAILED_PRECONDITION", message));
  });
}

for (const rpc of ["CreateSubsystem", "AddListener", "MountVolume"] as const) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: granting access goes on when the connection is lost ${when} ${rpc}`, async () => {
      await using t = await start();
      const { id } = await t.create();
      t.sim.control.fail({ rpc, drop: true, when });

      await t.grant(id);

      deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
      strictEqual(t.calls(rpc), when === "before" ? 2 : 1);
    });
  }
}

for (const rpc of ["UnmountVolume", "DeleteSubsystem"] as const) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: revoking access goes on when the connection is lost ${when} ${rpc}`, async () => {
      await using t = await start();
      const { id } = await t.create();
      await t.grant(id);
      t.sim.control.fail({ rpc, drop: true, when });

      await t.revoke(id);

      deepStrictEqual(t.sim.control.leftovers().access, []);
      strictEqual(t.calls(rpc), when === "before" ? 2 : 1);
    });
  }
}

Deno.test("promise 24: revoking access succeeds only when the namespace is gone, though PoseidonOS has failed halfway", async () => {
  await using t = await start();
  const { id } = await t.create();
  await t.grant(id);
  t.sim.control.behave({ halfUnmounts: 1 });

  await t.revoke(id);

  deepStrictEqual(t.sim.control.leftovers().access, []);
  await t.remove(id);
  strictEqual(t.volumes().length, 0);
});

Deno.test("a subsystem of ours that somebody has put another volume into is not deleted", async () => {
  await using t = await start();
  const [one, two] = [await t.create("pvc-1"), await t.create("pvc-2")];
  const { subsystemNqn } = await t.grant(one.id);
  const subsystem = t.model.subsystems[0];
  if (subsystem !== undefined) subsystem.maxNamespaces = 2;
  await t.model.mountVolume("POSArray", "pvc-2", subsystemNqn);

  await rejects(
    t.revoke(one.id),
    refuses("FAILED_PRECONDITION", new RegExp(`namespace ${two.uuid} into ${subsystemNqn}`)),
  );

  deepStrictEqual(subsystem?.namespaces.map(({ volumeUuid }) => volumeUuid), [two.uuid]);
});

Deno.test("a node ID that does not fit into an NQN is refused with the length that fits", async () => {
  await using t = await start();
  const { id } = await t.create();

  const granted = t.grant(id, hostNqn(`${"n".repeat(170)}.node`));

  await rejects(granted, refuses("FAILED_PRECONDITION", /a node ID has 164 characters at most, .* has 175/));
});

// ------------------------------------------------------------------------------------------------------------- delete

Deno.test("promise 19: DeleteVolume never says done while the array is not mounted, and deletes afterwards", async () => {
  await using t = await start();
  const { id } = await t.create();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });
  await rejects(t.remove(id), refuses("UNAVAILABLE", /is not mounted/));
  await rejects(t.get(id), refuses("UNAVAILABLE", /is not mounted/));
  strictEqual(t.volumes().length, 1);

  t.sim.control.setArray("POSArray", { state: "NORMAL", situation: "NORMAL" });
  await t.remove(id);

  strictEqual(t.volumes().length, 0);
});

Deno.test("promise 3: DeleteVolume does not touch a namesake with another UUID", async () => {
  await using t = await start();
  const { id } = await t.create();
  const first = t.volumes()[0];
  await t.model.deleteVolume("POSArray", "pvc-1");
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-1", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid });

  await t.remove(id);

  deepStrictEqual(t.volumes().map((volume) => volume.uuid), [uuid]);
  await rejects(t.get(id), refuses("NOT_FOUND", new RegExp(`no volume of that UUID, "pvc-1" is ${uuid}`)));
  strictEqual(parsePoseidonId(id).uuid, first?.uuid);
});

Deno.test("a volume that was renamed is found by its UUID, and its ID says the new name", async () => {
  await using t = await start();
  const { id } = await t.create();
  const made = t.volumes()[0];
  if (made !== undefined) made.name = "renamed";

  match((await t.get(id)).id, /\|vol:renamed\|/);
  await t.grant(id);
  await t.revoke(id);
  await t.remove(id);

  strictEqual(t.volumes().length, 0);
});

for (const when of ["before", "after"] as const) {
  Deno.test(`promise 8: DeleteVolume goes on when the connection is lost ${when} it`, async () => {
    await using t = await start();
    const { id } = await t.create();
    t.sim.control.fail({ rpc: "DeleteVolume", drop: true, when });

    await t.remove(id);

    strictEqual(t.volumes().length, 0);
    strictEqual(t.calls("DeleteVolume"), when === "before" ? 2 : 1);
  });
}

Deno.test("DeleteVolume un-exports a volume that says it is exported and is nowhere", async () => {
  await using t = await start();
  const { id } = await t.create();
  const made = t.volumes()[0];
  if (made !== undefined) made.isMounted = true;

  await t.remove(id);

  strictEqual(t.volumes().length, 0);
});

Deno.test("DeleteVolume on an array that is not there is FAILED_PRECONDITION", async () => {
  await using t = await start();
  const { id } = await t.create();

  await rejects(t.remove(id.replace("POSArray", "Other")), refuses("FAILED_PRECONDITION", /has no array "Other"/));
});

Deno.test("an ID that is not one of this driver is NOT_FOUND", async () => {
  await using t = await start();

  await rejects(t.get("mgmt:h:1|nguid:…"), refuses("NOT_FOUND", /not of the form pos:/));
});

// ------------------------------------------------------------------------------------------------- turns and deadlines

Deno.test("promise 9: who waits too long for its turn is told what is running, and the work goes on", async () => {
  await using t = await start();
  t.sim.control.fail({ rpc: "CreateVolume", hold: true });
  const first = t.create("pvc-1");
  await eventually("the first creation waits", () => t.sim.control.held().length === 1);

  const second = t.backend.createVolume(within(200), none, t.wanted({ name: "pvc-2" }));

  await rejects(
    second,
    refuses(
      "ABORTED",
      /Cannot create volume "pvc-2" in time: .*, and creating volume "pvc-1" has been running for \d+ s/,
    ),
  );
  t.sim.control.releaseHeld();
  await first;
  deepStrictEqual(t.volumes().map(({ name }) => name), ["pvc-1"]);
});

Deno.test("promise 9: a change whose caller gave up keeps the next one waiting until it has ended", async () => {
  await using t = await start();
  t.sim.control.fail({ rpc: "CreateVolume", hold: true });
  const first = t.backend.createVolume(within(300), none, t.wanted());
  await rejects(
    first,
    refuses("DEADLINE_EXCEEDED", /has not answered POST \/volumes after [\d.]+ s; it goes on there/),
  );

  const second = t.create("pvc-2");
  const third = t.backend.createVolume(within(200), none, t.wanted({ name: "pvc-3" }));
  await rejects(third, refuses("ABORTED", /creating volume "pvc-1" has been running/));
  t.sim.control.releaseHeld();

  await second;
  deepStrictEqual(t.volumes().map(({ name }) => name).sort(), ["pvc-1", "pvc-2"]);
  strictEqual((await t.create()).uuid, t.volumes()[0]?.uuid);
});

Deno.test("changes of one DAgent never overlap, however many are asked for at once", async () => {
  await using t = await start({ behaviour: { callMs: 1 } });
  let [now, most] = [0, 0];
  using _watch = t.sim.control.watchCalls(({ phase, rpc }) => {
    if (!/^(Create|Delete|Mount|Unmount|Add)/.test(rpc)) return;
    now += phase === "begin" ? 1 : -1;
    most = Math.max(most, now);
  });

  const volumes = await Promise.all(Array.from({ length: 8 }, (_, number) => t.create(`pvc-${number}`)));
  await Promise.all(volumes.map(({ id }) => t.grant(id)));
  await Promise.all(volumes.map(({ id }) => t.revoke(id)));
  await Promise.all(volumes.map(({ id }) => t.remove(id)));

  strictEqual(most, 1);
  deepStrictEqual(t.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
});

Deno.test("a DAgent that has lost PoseidonOS, says nothing, or is gone is UNAVAILABLE within the caller's time", async () => {
  await using t = await start();
  const { id } = await t.create();
  t.sim.control.behave({ dead: true });
  await rejects(t.get(id), refuses("UNAVAILABLE", /answered GET \/array\/POSArray with 11020: cannot dial/));
  t.sim.control.behave({ dead: false });
  await t.sim.control.api.hang();
  await rejects(
    t.backend.getVolume(within(200), none, id),
    refuses("DEADLINE_EXCEEDED", /has not answered GET \/array\/POSArray after [\d.]+ s; repeat the call/),
  );
  await t.sim.control.api.stop();
  await rejects(t.get(id), refuses("UNAVAILABLE", /the DAgent at \S+ cannot be reached, or broke off GET .*refused/i));
  await t.sim.control.api.start();

  strictEqual((await t.get(id)).id, id);
});

Deno.test("a DAgent that panics (500 without a word) is looked at again", async () => {
  await using t = await start();
  t.sim.control.fail({ rpc: "CreateVolume", event: "panic" });

  await t.create();

  strictEqual(t.volumes().length, 1);
  strictEqual(t.calls("CreateVolume"), 2);
});

// -------------------------------------------------------------------------------- lists, capacity, limits, other places

Deno.test("lists of PoseidonOS come in pages, with the nodes that have a volume", async () => {
  await using t = await start({ arrays: ["POSArray", "Second"] }, true);
  const volumes = await Promise.all([1, 2, 3].map((number) => t.create(`pvc-${number}`)));
  volumes.push(await t.create("pvc-4", { arrayName: "Second" }));
  await t.grant(volumes[3]?.id ?? "");
  const listing = t.backend.listing;
  ok(listing !== undefined);

  const seen: string[] = [];
  const hosts: string[] = [];
  for (let token = "", pages = 0; pages === 0 || token !== ""; pages++) {
    const page: Page<Volume> = await listing.listVolumes(within(5000), {
      maxEntries: 3,
      startingToken: token,
    });
    seen.push(...page.entries.map(({ id }) => id));
    hosts.push(...page.entries.flatMap(({ hosts }) => hosts));
    token = page.nextToken;
    strictEqual(page.entries.length, pages === 0 ? 3 : 1);
  }

  deepStrictEqual(seen.sort(), volumes.map(({ id }) => id).sort());
  deepStrictEqual(hosts, [hostA]);
  await rejects(
    listing.listVolumes(within(5000), { maxEntries: 0, startingToken: "nonsense" }),
    refuses("ABORTED", /starting_token "nonsense"/),
  );
});

Deno.test("lists of PoseidonOS fail while an array is not mounted, for its volumes would seem to be gone", async () => {
  await using t = await start({}, true);
  await t.create();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });

  const listed = t.backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });

  await rejects(listed ?? Promise.resolve(), refuses("UNAVAILABLE", /is not mounted/));
});

Deno.test("a volume on a degraded array is in trouble, and can be used", async () => {
  await using t = await start({}, true);
  const { id } = await t.create();
  strictEqual((await t.get(id)).condition, undefined);
  t.sim.control.setArray("POSArray", { situation: "DEGRADED" });

  const { condition } = await t.get(id);

  deepStrictEqual([condition?.usable, condition?.reason], [true, "ArrayDegraded"]);
  const troubled = await t.backend.listing?.listAbnormal(within(5000), none, { maxEntries: 0, startingToken: "" });
  deepStrictEqual(troubled?.entries.map((volume) => volume.id), [id]);
});

Deno.test("the capacity of PoseidonOS is what is left, and nothing where no volume can be added", async () => {
  await using t = await start({ capacityBytes: 16n * gib }, true);
  await t.create();
  const measure = (parameters: Record<string, string>) => t.backend.capacity?.getCapacity(within(5000), parameters);

  deepStrictEqual(await measure({}), { availableBytes: 15n * gib, minimumVolumeBytes: mib });
  deepStrictEqual(await measure(poseidonParameters(t.sim)), { availableBytes: 15n * gib, minimumVolumeBytes: mib });
  for (let number = 0; number < 255; number++) {
    const wish = { array: "POSArray", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid: "" };
    await t.model.createVolume({ ...wish, name: `v${number}x` });
  }
  deepStrictEqual(await measure({}), { availableBytes: 0n, minimumVolumeBytes: mib });
});

Deno.test("without a cluster file, neither lists nor capacity are there, and snapshots and growth never are", async () => {
  await using t = await start();

  const { listing, capacity, expansion, snapshots, changedBlocks } = t.backend;
  deepStrictEqual([listing, capacity, expansion, snapshots, changedBlocks], Array(5).fill(undefined));
});

Deno.test("limits of a volume in use change, others than those given stay", async () => {
  await using t = await start();
  const { id } = await t.create("pvc-1", { maxiops: "100", maxbw: "20" });
  const modify = (mutable: Record<string, string>) =>
    t.backend.modification?.modifyVolume(within(5000), none, id, mutable);

  await modify({ maxbw: "50" });
  deepStrictEqual([t.volumes()[0]?.maxiops, t.volumes()[0]?.maxbw], [100n, 50n]);
  await modify({ maxbw: "50" });
  strictEqual(t.calls("SetQos"), 1);
  await rejects(
    modify({ arrayName: "x" }) ?? Promise.resolve(),
    refuses("INVALID_ARGUMENT", /mutable parameter "arrayName" unknown/),
  );
  t.sim.control.behave({ qos: false });
  await rejects(modify({ maxbw: "60" }) ?? Promise.resolve(), refuses("FAILED_PRECONDITION", /4601 .*fe_qos\.enable/));
});

Deno.test("promise 13: lists of PoseidonOS show a volume under each ID that it may have, page by page", async () => {
  await using sim = await startPoseidon();
  const former = ["192.0.2.1:3000", "192.0.2.2:3000"];
  const system = { name: "a", endpoint: sim.addresses.dagent, formerEndpoints: former, arrays: ["POSArray"] };
  const files = { stamp: () => "1", read: () => JSON.stringify({ systems: [system] }) };
  await using backend = poseidonBackend({ log: quiet, systems: knownSystems("/c.yaml", files, quiet) });
  const made: string[] = [];
  for (const [at, endpoint] of [sim.addresses.dagent, ...former].entries()) {
    const [provisionerIP = "", provisionerPort = ""] = endpoint.split(":");
    const parameters = { ...poseidonParameters(sim), provisionerIP, provisionerPort };
    const wanted = { name: `pvc-${at}`, requiredBytes: gib, limitBytes: 0n, parameters };
    made.push((await backend.createVolume(within(5000), none, wanted)).id);
  }

  for (const maxEntries of [0, 1, 2, 4, 9]) {
    const seen: string[] = [];
    for (let token = "", pages = 0; pages === 0 || token !== ""; pages++) {
      const page = await backend.listing?.listVolumes(within(5000), { maxEntries, startingToken: token });
      ok(page !== undefined && (maxEntries === 0 || page.entries.length <= maxEntries));
      seen.push(...page.entries.map(({ id }) => id));
      token = page.nextToken;
    }
    deepStrictEqual([seen.length, new Set(seen).size], [9, 9], `${maxEntries} each`);
    deepStrictEqual(made.filter((id) => !seen.includes(id)), []);
  }
});

Deno.test("promise 13: IDs of before a DAgent moved lead to where it is now", async () => {
  await using sim = await startPoseidon();
  const text =
    `systems: [{ name: a, endpoint: "${sim.addresses.dagent}", idEndpoint: "192.0.2.1:3000", arrays: POSArray }]`;
  const files = { stamp: () => "1", read: () => text };
  await using backend = poseidonBackend({ log: quiet, systems: knownSystems("/c.yaml", files, quiet) });
  const parameters = { ...poseidonParameters(sim), provisionerIP: "192.0.2.1", provisionerPort: "3000" };
  const wanted = { name: "pvc-1", requiredBytes: gib, limitBytes: 0n, parameters };

  const { id } = await backend.createVolume(within(5000), none, wanted);

  match(id, /^pos:192\.0\.2\.1:3000\|/);
  const listed = await backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });
  deepStrictEqual(listed?.entries.map((volume) => volume.id), [id]);
  await backend.deleteVolume(within(5000), none, id);
  strictEqual(sim.control.model.arrays[0]?.volumes.length, 0);
});

for (
  const [text, message] of [
    ["", /is not a map with the key systems/],
    ["systems: []", /systems is empty/],
    ["systems: [{ name: a, endpoint: x, arrays: a1 }]", /systems\[0\]\.endpoint "x" is not host:port/],
    ["systems: [{ name: a, endpoint: 'h:1,i:2', arrays: a1 }]", /is more than one host:port/],
    ["systems: [{ name: a, endpoint: 'h:1' }]", /systems\[0\]\.arrays/],
    ["systems: [{ name: a, endpoint: 'h:1', arrays: ['x'] }]", /is not the name of an array/],
    ["systems: [{ name: a, endpoint: 'h:1', arrays: a1, jwt: x }]", /"jwt" unknown \(known: name, endpoint, /],
    [
      "systems: [{ name: a, endpoint: 'h:1', arrays: a1 }, { name: a, endpoint: 'h:1', arrays: a1 }]",
      /two systems have the name "a"; endpoint h:1 belongs to both "a" and "a"/,
    ],
  ] as const
) {
  Deno.test(`parseSystems refuses ${text || "an empty file"}`, () => {
    throws(
      () => parseSystems("/c.yaml", text),
      refuses("INVALID_ARGUMENT", /^Cannot use cluster file \/c\.yaml: /, message),
    );
  });
}

/** An answer of LightOS is used only if it fits the request. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { StatusError } from "../../../lib/error.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { knownClusters } from "../../../lib/storage/lightos/cluster_file.ts";
import { startLiar } from "../../support/liar.ts";
import { startSimulator } from "../../support/simulator.ts";
import { gib, lightosRequest, none, openLightos, quiet, within } from "../../support/backends.ts";

const foreign = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

/** Two volumes and a snapshot that are what they seem, and a backend that a liar stands in front of. */
async function start(lies: Parameters<typeof startLiar>[1]) {
  const parts = new AsyncDisposableStack();
  const simulator = parts.use(await startSimulator({ servers: 1 }));
  const [behind = ""] = simulator.addresses.grpc;
  // Lies begin when the objects are there.
  let isLying = false;
  const liar = parts.use(
    await startLiar(
      behind,
      Object.fromEntries(
        Object.entries(lies).map(([rpc, lie]) => [rpc, (answer) => isLying ? lie(answer) : answer]),
      ),
    ),
  );
  const cluster = { name: "a", endpoints: liar.address, scheme: "grpc", jwt: "/jwt", projects: ["default"] };
  const file = JSON.stringify({ clusters: [cluster] });
  const files = { stamp: () => "unchanged", read: (path: string) => path === "/c" ? file : simulator.addresses.jwt };
  const backend = parts.use(
    openLightos(simulator, { globalJwtPath: "/jwt", clusters: knownClusters("/c", files, quiet) }),
  );
  const request = (name: string) => lightosRequest([liar.address], { name, limitBytes: 2n * gib });
  const create = (name: string) => backend.createVolume(within(3000), none, request(name));
  const { snapshots } = backend;
  ok(snapshots);
  const { id } = await create("pvc-1");
  const other = await create("pvc-2");
  const snapshot = await snapshots.createSnapshot(within(3000), none, { name: "s", sourceVolumeId: id });
  isLying = true;
  return {
    id,
    other,
    snapshot,
    cluster: simulator.control.cluster,
    jwt: simulator.addresses.jwt,
    liar,
    calls: {
      "CreateVolume": () => create("pvc-3"),
      "CreateVolume, repeated": () => create("pvc-1"),
      "ControllerGetVolume": () => backend.getVolume(within(3000), none, id),
      "ControllerPublishVolume": () =>
        backend.grantAccess(within(3000), none, id, { hostNqn: hostNqn("a"), shared: false }),
      "ControllerExpandVolume": () =>
        backend.expansion?.expandVolume(within(3000), none, id, { requiredBytes: 2n * gib, limitBytes: 0n }),
      "DeleteVolume": () => backend.deleteVolume(within(3000), none, id),
      "ListVolumes": () => backend.listing?.listVolumes(within(3000), { maxEntries: 0, startingToken: "" }),
      "CreateSnapshot": () => snapshots.createSnapshot(within(3000), none, { name: "t", sourceVolumeId: id }),
      "CreateSnapshot, repeated": () => snapshots.createSnapshot(within(3000), none, { name: "s", sourceVolumeId: id }),
      "GetSnapshot": () => snapshots.getSnapshot(within(3000), none, snapshot.id),
      "DeleteSnapshot": () => snapshots.deleteSnapshot(within(3000), none, snapshot.id),
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

type Env = Awaited<ReturnType<typeof start>>;
type Call = keyof Env["calls"];
// deno-lint-ignore no-explicit-any -- answers of several methods
type Change = (object: any) => void;

const uuidLies: readonly (readonly [string, Change])[] = [
  ["a path as UUID", (object) => object.UUID = "../../../etc|proj:x"],
  ["no UUID", (object) => object.UUID = ""],
  ["the nil UUID", (object) => object.UUID = "00000000-0000-0000-0000-000000000000"],
  ["a project that is none", (object) => object.projectName = "a|scheme:grpc"],
  ["another project", (object) => object.projectName = "other"],
];
const change = (change: Change) => (answer: unknown) => void change(answer);
const changeAll = (key: string, change: Change) => (answer: Record<string, unknown[]>) =>
  void answer[key]?.forEach(change);

const lies: readonly (readonly [Call, string, string, (answer: never) => unknown])[] = [
  ...uuidLies.flatMap(([what, lie]) =>
    [
      ["CreateVolume", what, "CreateVolume", change(lie)],
      ["CreateVolume, repeated", what, "ListVolumes", changeAll("volumes", lie)],
      ["ControllerGetVolume", what, "GetVolume", change(lie)],
      ["ControllerPublishVolume", what, "GetVolume", change(lie)],
      ["ControllerExpandVolume", what, "GetVolume", change(lie)],
      ["DeleteVolume", what, "GetVolume", change(lie)],
      ["CreateSnapshot", what, "CreateSnapshot", change(lie)],
      ["CreateSnapshot, repeated", what, "ListSnapshots", changeAll("snapshots", lie)],
      ["GetSnapshot", what, "GetSnapshot", change(lie)],
      ["DeleteSnapshot", what, "GetSnapshot", change(lie)],
    ] as const
  ),
  ...uuidLies.map(([what, lie]) => ["ListVolumes", what, "ListVolumes", changeAll("volumes", lie)] as const),
  ...(["ControllerGetVolume", "ControllerPublishVolume", "ControllerExpandVolume", "DeleteVolume"] as const).map((
    call,
  ) => [call, "another volume's UUID", "GetVolume", change((volume) => volume.UUID = foreign)] as const),
  ["GetSnapshot", "another snapshot's UUID", "GetSnapshot", change((snapshot) => snapshot.UUID = foreign)],
  ["DeleteSnapshot", "another snapshot's UUID", "GetSnapshot", change((snapshot) => snapshot.UUID = foreign)],
  ["CreateVolume", "another volume's name", "CreateVolume", change((volume) => volume.name = "pvc-2")],
  ["CreateVolume", "too small a size", "CreateVolume", change((volume) => volume.size = gib / 2n)],
  ["CreateVolume", "too large a size", "CreateVolume", change((volume) => volume.size = 4n * gib)],
  ["CreateSnapshot", "another snapshot's name", "CreateSnapshot", change((snapshot) => snapshot.name = "s")],
  ["CreateSnapshot", "another source", "CreateSnapshot", change((snapshot) => snapshot.sourceVolumeUUID = foreign)],
  ["GetSnapshot", "a source that is no UUID", "GetSnapshot", change((snapshot) => snapshot.sourceVolumeUUID = "../x")],
  [
    "ListVolumes",
    "one UUID for two volumes",
    "ListVolumes",
    changeAll("volumes", (volume) => volume.UUID = foreign),
  ],
  [
    "ControllerPublishVolume",
    "an NQN with options of the kernel",
    "GetClusterInfo",
    change((info) => info.subsystemNQN = "nqn.2016-01.com.x:uuid:y,traddr=198.51.100.9"),
  ],
  ["ControllerPublishVolume", "an NQN that is none", "GetClusterInfo", change((info) => info.subsystemNQN = "--help")],
  [
    "ControllerPublishVolume",
    "an endless NQN",
    "GetClusterInfo",
    change((info) => info.subsystemNQN = `nqn.2016-01.com.x:${"y".repeat(300)}`),
  ],
];

for (const [call, what, rpc, lie] of lies) {
  Deno.test(`promise 28: ${call} is INTERNAL when LightOS answers ${rpc} with ${what}`, async () => {
    await using env = await start({ [rpc]: lie as never });
    const before = env.cluster.volumes.map(({ uuid, state, sizeBytes }) => [uuid, state, sizeBytes]);

    await rejects(Promise.resolve(env.calls[call]()), (error: unknown) => {
      ok(error instanceof StatusError, String(error));
      strictEqual(error.code, "INTERNAL", error.message);
      match(error.message, /^Cannot .*: LightOS at 127\.0\.0\.1:\d+ (answered|shows) /);
      return true;
    });

    const after = env.cluster.volumes.filter(({ name }) => name !== "pvc-3");
    deepStrictEqual(
      after.map(({ uuid, state, sizeBytes }) => [uuid, state, sizeBytes]),
      before,
      "nothing else changed",
    );
  });
}

Deno.test("promise 28: CreateVolume is INTERNAL when LightOS shows the new volume under another UUID later", async () => {
  await using env = await start({
    CreateVolume: (volume) => void (volume.state = 1),
    GetVolume: (volume) => void (volume.UUID = env.other.uuid),
  });

  await rejects(env.calls.CreateVolume(), (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, "INTERNAL", error.message);
    match(error.message, new RegExp(`answered GetVolume with volume ${env.other.uuid}, asked was volume `));
    return true;
  });
});

for (
  const [what, call, rpc, lie] of [
    ["a name", "CreateVolume", "CreateVolume", (volume, token) => void (volume.name = `x ${token}`)],
    ["a name later", "CreateVolume", "GetVolume", (volume, token) => void (volume.name = `x ${token}`)],
    ["an endless name later", "CreateVolume", "GetVolume", (volume, token) => void (volume.name = token.repeat(20))],
    ["a project", "ControllerGetVolume", "GetVolume", (volume, token) => void (volume.projectName = token)],
    ["the start of it as a project", "ControllerGetVolume", "GetVolume", (volume, token) => {
      volume.projectName = token.slice(0, 60);
    }],
    ["a UUID in a list", "ListVolumes", "ListVolumes", ({ volumes: [volume] }, token) => void (volume.UUID = token)],
    ["the version of the API", "ControllerGetVolume", "GetVersion", (version, token) => {
      version.apiVersion = `no version for ${token}`;
    }],
    // deno-lint-ignore no-explicit-any -- answers of several methods
  ] as readonly (readonly [string, Call, string, (answer: any, token: string) => void])[]
) {
  Deno.test(`promise 10: a token that LightOS repeats as ${what} is in no error of ${call}`, async () => {
    let token = "";
    const creating = rpc === "GetVolume" && call === "CreateVolume"
      ? { CreateVolume: (volume: { state: number }) => void (volume.state = 1) }
      : {};
    await using env = await start({ ...creating, [rpc]: (answer) => lie(answer, token) });
    token = env.jwt;
    if (rpc === "GetVersion") {
      env.liar.dropConnections();
      // The call that notices it.
      await Promise.allSettled([env.calls[call]()]);
    }

    await rejects(async () => void await env.calls[call](), (error: unknown) => {
      ok(error instanceof StatusError, String(error));
      for (let at = 0; at + 24 <= token.length; at++) {
        ok(!error.message.includes(token.slice(at, at + 24)), error.message);
      }
      match(error.message, /\[token\]/);
      ok(error.message.length < 2500, `${error.message.length}`);
      return true;
    });
  });
}

Deno.test("promise 10: a token that LightOS repeats as the progress of a rebuild is not in the condition of the volume", async () => {
  let token = "";
  await using env = await start({
    GetVolume: (volume) => {
      volume.protectionState = 2;
      volume.rebuildProgress = token;
    },
  });
  token = env.jwt;

  const { condition } = await env.calls.ControllerGetVolume();

  ok(condition !== undefined);
  match(condition.message, /\[token\]/);
});

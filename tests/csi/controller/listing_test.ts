import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { Channel } from "../../../lib/grpc/client.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { mostEntries } from "../../../lib/storage/listing_page.ts";
import { formatEndpoints, parseEndpoints, parseVolumeId } from "../../../lib/volume_id.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as Rpc,
  type CreateVolumeRequestSchema,
  type GetCapacityRequestSchema,
  ListVolumesResponseSchema,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
} from "../../../proto/gen/csi_pb.ts";
import { answers, startController } from "../../support/controller_service.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
type Creation = Extract<MessageInitShape<typeof CreateVolumeRequestSchema>, { readonly $typeName?: never }>;
const writer: MessageInitShape<typeof VolumeCapabilitySchema> = {
  accessType: { case: "block", value: {} },
  accessMode: { mode: Mode.SINGLE_NODE_WRITER },
};
const method = Controller.method;

/** A cluster of the file, as YAML flow. */
function entry(name: string, simulator: TestSimulator, more = `projects: default, jwt: /jwt-${name}`): string {
  return `{name: ${name}, endpoints: "${simulator.addresses.grpc.join(",")}", scheme: grpc, ${more}}`;
}

function creation(simulator: TestSimulator, name: string, project = "default"): Creation {
  return {
    name,
    capacityRange: { requiredBytes: gib },
    volumeCapabilities: [writer],
    parameters: {
      "mgmt-endpoint": simulator.addresses.grpc.join(","),
      "mgmt-scheme": "grpc",
      "replica-count": "1",
      "project-name": project,
    },
    secrets: { jwt: simulator.addresses.jwt },
  };
}

/** A controller with one cluster of its own. */
async function start(overrides: Parameters<typeof startSimulator>[0] = {}, more?: string) {
  await using stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator(overrides));
  const controller = stack.use(
    await startController({
      clusterFile: `clusters: [${entry("a", simulator, more)}]`,
      files: { "/jwt-a": simulator.addresses.jwt, "/admin": simulator.addresses.adminJwt },
    }),
  );
  const parts = stack.move();
  const { call } = controller;
  return {
    simulator,
    call,
    secrets: { jwt: simulator.addresses.jwt },
    async create(name: string, project?: string): Promise<string> {
      return (await call(method.createVolume, creation(simulator, name, project))).volume?.volumeId ?? "";
    },
    async snapshot(name: string, sourceVolumeId: string): Promise<string> {
      const secrets = { jwt: simulator.addresses.jwt };
      return (await call(method.createSnapshot, { name, sourceVolumeId, secrets })).snapshot?.snapshotId ?? "";
    },
    async listed(request: { maxEntries?: number; startingToken?: string } = {}) {
      const { entries, nextToken } = await call(method.listVolumes, request);
      return { ids: entries.map(({ volume }) => volume?.volumeId ?? ""), entries, nextToken };
    },
    async snapshots(
      request: {
        maxEntries?: number;
        startingToken?: string;
        snapshotId?: string;
        sourceVolumeId?: string;
        secrets?: Record<string, string>;
      } = {},
    ) {
      const { entries, nextToken } = await call(method.listSnapshots, request);
      return { ids: entries.map(({ snapshot }) => snapshot?.snapshotId ?? ""), entries, nextToken };
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

Deno.test("ControllerGetCapabilities with a cluster file announces lists, condition and capacity", async () => {
  await using env = await start();

  const { capabilities } = await env.call(method.controllerGetCapabilities, {});

  const names = capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "");
  const wanted = [
    "LIST_VOLUMES",
    "LIST_VOLUMES_PUBLISHED_NODES",
    "GET_VOLUME",
    "VOLUME_CONDITION",
    "LIST_SNAPSHOTS",
    "GET_CAPACITY",
  ];
  deepStrictEqual(wanted.filter((name) => !names.includes(name)), []);
});

// ------------------------------------------------------------------------------------------------------------- volumes

Deno.test("ListVolumes answers the IDs that CreateVolume gave, with sizes, nodes and condition", async () => {
  await using env = await start();
  const ids = [await env.create("one"), await env.create("two")];
  const [first = ""] = ids;
  await env.call(method.controllerPublishVolume, {
    volumeId: first,
    nodeId: "a.node",
    volumeCapability: writer,
    secrets: env.secrets,
  });

  const { ids: listed, entries, nextToken } = await env.listed();

  deepStrictEqual(listed.toSorted(), ids.toSorted());
  strictEqual(nextToken, "");
  for (const { volume, status } of entries) {
    strictEqual(volume?.capacityBytes, gib);
    deepStrictEqual(status?.publishedNodeIds, volume.volumeId === first ? ["a.node"] : []);
    strictEqual(status?.volumeCondition?.abnormal, false);
    strictEqual(status.volumeCondition.message, "healthy");
  }
});

Deno.test("ListVolumes leaves out hosts that are no nodes, husks, and volumes that are being made or deleted", async () => {
  await using env = await start();
  const kept = await env.create("kept");
  const going = await env.create("going");
  const { control } = env.simulator;
  control.behave({ failCreations: 1 });
  await rejects(env.create("husk"), answers("UNAVAILABLE", /is Failed/));
  const husk = control.cluster.volumes.find(({ name }) => name === "husk");
  control.behave({ deletionMs: 60_000 });
  await env.call(method.deleteVolume, { volumeId: going, secrets: env.secrets });
  await control.cluster.updateVolume(
    { project: "default", uuid: parseVolumeId(kept).uuid },
    { acl: ["nqn.2014-08.org.nvmexpress:uuid:7", hostNqn("b.node")] },
    undefined,
  );
  control.behave({ holdCreations: true });
  await control.cluster.createVolume({
    project: "default",
    name: "coming",
    size: "1 gib",
    replicaCount: 1,
    compression: "false",
    acl: undefined,
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
  });

  const { ids, entries } = await env.listed();

  strictEqual(husk?.state, "Failed");
  deepStrictEqual(ids, [kept]);
  deepStrictEqual(entries[0]?.status?.publishedNodeIds, ["b.node"]);
});

Deno.test("ListVolumes goes through clusters and projects page by page, each volume once", async () => {
  await using first = await startSimulator({ projects: ["default", "team-a"] });
  await using second = await startSimulator();
  await using controller = await startController({
    clusterFile: `clusters: [${entry("a", first, "projects: [default, team-a], jwt: /jwt-a")}, ${entry("b", second)}]`,
    files: { "/jwt-a": first.addresses.jwt, "/jwt-b": second.addresses.jwt },
  });
  const made: string[] = [];
  for (
    const [simulator, name, project] of [
      [first, "v1", "default"],
      [first, "v2", "default"],
      [first, "v3", "team-a"],
      [second, "v4", "default"],
      [second, "v5", "default"],
    ] as const
  ) {
    made.push((await controller.call(method.createVolume, creation(simulator, name, project))).volume?.volumeId ?? "");
  }

  for (const maxEntries of [1, 2, 3, 4, 5, 6]) {
    const pages: number[] = [];
    const listed: string[] = [];
    let startingToken = "";
    do {
      const page = await controller.call(method.listVolumes, { maxEntries, startingToken });
      pages.push(page.entries.length);
      listed.push(...page.entries.map(({ volume }) => volume?.volumeId ?? ""));
      startingToken = page.nextToken;
      ok(startingToken.length <= 128, startingToken);
    } while (startingToken !== "");
    deepStrictEqual(listed.toSorted(), made.toSorted());
    strictEqual(pages.length, Math.ceil(made.length / maxEntries), `${maxEntries} each: ${pages}`);
  }
});

Deno.test("ListVolumes without projects in the file lists what the token may see, each under its project", async () => {
  await using env = await start({ projects: ["default", "team-a"] }, "jwt: /admin");
  const ids = [await env.create("one"), await env.create("two", "team-a")];

  const { ids: listed } = await env.listed();

  deepStrictEqual(listed.toSorted(), ids.toSorted());
});

Deno.test("ListVolumes of more volumes than fit into one answer of LightOS' or of ours leaves none out", async () => {
  await using env = await start({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  const count = mostEntries + 5;
  await makeMany(env.simulator, count);

  const first = await env.listed();
  const rest = await env.listed({ startingToken: first.nextToken });

  strictEqual(first.ids.length, mostEntries);
  strictEqual(rest.ids.length, 5);
  strictEqual(new Set([...first.ids, ...rest.ids]).size, count);
  strictEqual(rest.nextToken, "");
});

/** Makes volumes in the simulator itself, which is quick. */
async function makeMany(simulator: TestSimulator, count: number, acl?: string[]): Promise<void> {
  for (let number = 0; number < count; number++) {
    await simulator.control.cluster.createVolume({
      project: "default",
      name: `volume-${number}`,
      size: "1 gib",
      replicaCount: 1,
      compression: "false",
      acl,
      ipAcl: undefined,
      sectorSizeBytes: 0,
      sourceSnapshot: { uuid: "", name: "" },
      qosPolicy: { uuid: "", name: "" },
      labels: [],
    });
  }
}

const manyHosts = (count: number) =>
  Array.from({ length: count }, (_, at) => hostNqn(`worker-${at}.compute.rack-12.example.internal.node`));

for (const [hosts, count] of [[70, 1100], [300, 300]] as const) {
  Deno.test(`ListVolumes of ${count} volumes with ${hosts} nodes each keeps every answer below 4 MiB`, async () => {
    await using env = await start({ capacityBytes: 1n << 60n, behaviour: behaviour() });
    await makeMany(env.simulator, count, manyHosts(hosts));
    const ids: string[] = [];
    let startingToken = "";
    do {
      const page = await env.call(method.listVolumes, { startingToken });
      const bytes = toBinary(ListVolumesResponseSchema, page).length;
      ok(bytes < 4 << 20, `${bytes} bytes`);
      for (const { volume, status } of page.entries) {
        ids.push(volume?.volumeId ?? "");
        strictEqual(status?.publishedNodeIds.length, hosts);
      }
      startingToken = page.nextToken;
    } while (startingToken !== "");

    deepStrictEqual([ids.length, new Set(ids).size], [count, count]);
  });
}

Deno.test("ListVolumes asks LightOS for less when an answer would be larger than is taken", async () => {
  await using env = await start({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  // 10 MB in all.
  await makeMany(env.simulator, 140, manyHosts(900));
  env.simulator.control.resetCalls();

  const page = await env.call(method.listVolumes, {});

  ok(page.entries.length > 10 && page.nextToken !== "", `${page.entries.length}`);
});

Deno.test("a page of ListVolumes costs one management call", async () => {
  await using env = await start({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  await makeMany(env.simulator, mostEntries + 5);
  for (const maxEntries of [0, 10, 1000]) {
    env.simulator.control.resetCalls();

    const { nextToken } = await env.call(method.listVolumes, { maxEntries });

    ok(nextToken !== "");
    strictEqual(env.simulator.control.calls()["ListVolumes"]?.total, 1, `${maxEntries}`);
  }
});

Deno.test("ListVolumes of as many volumes as fit into one answer ends, maybe with an empty page", async () => {
  await using env = await start({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  await makeMany(env.simulator, mostEntries);

  const first = await env.listed({ maxEntries: mostEntries });
  const rest = await env.listed({ maxEntries: mostEntries, startingToken: first.nextToken });

  strictEqual(new Set(first.ids).size, mostEntries);
  deepStrictEqual([rest.ids, rest.nextToken], [[], ""]);
});

Deno.test("promise 13: ListVolumes shows a volume under each ID that it may have, page by page", async () => {
  await using simulator = await startSimulator();
  const former = ["198.51.100.1:443,198.51.100.2:443", "198.51.100.7:443"];
  await using controller = await startController({
    clusterFile: `clusters: [${
      entry("a", simulator, `projects: default, jwt: /jwt-a, formerEndpoints: ${JSON.stringify(former)}`)
    }]`,
    files: { "/jwt-a": simulator.addresses.jwt },
  });
  const known: string[] = [];
  for (const [at, endpoints] of [simulator.addresses.grpc.join(","), ...former].entries()) {
    const wish = creation(simulator, `volume-${at}`);
    const parameters = { ...wish.parameters, "mgmt-endpoint": endpoints };
    const { volume } = await controller.call(method.createVolume, { ...wish, parameters });
    known.push(volume?.volumeId ?? "");
  }

  for (const maxEntries of [0, 1, 2, 3, 4, 7, 9]) {
    const listed: string[] = [];
    let startingToken = "";
    do {
      const page = await controller.call(method.listVolumes, { maxEntries, startingToken });
      ok(maxEntries === 0 || page.entries.length <= maxEntries);
      listed.push(...page.entries.map(({ volume }) => volume?.volumeId ?? ""));
      startingToken = page.nextToken;
      ok(startingToken.length <= 128, startingToken);
    } while (startingToken !== "");
    deepStrictEqual([listed.length, new Set(listed).size], [9, 9], `${maxEntries} each`);
    deepStrictEqual(known.filter((id) => !listed.includes(id)), []);
  }
  for (const damaged of ["..x.1", ".x.y.1", ".x.1", "..0.0"]) {
    const [place = ""] = (await controller.call(method.listVolumes, { maxEntries: 1 })).nextToken.split(".");
    await rejects(
      controller.call(method.listVolumes, { startingToken: `${place}${damaged}` }),
      answers("ABORTED", /starting_token/),
    );
  }
});

Deno.test("ListVolumes writes idEndpoints of the file into volume IDs", async () => {
  await using simulator = await startSimulator();
  const idEndpoints = "198.51.100.7:443,198.51.100.10:443";
  await using controller = await startController({
    clusterFile: `clusters: [${
      entry("a", simulator, `projects: default, jwt: /jwt-a, idEndpoints: "${idEndpoints}"`)
    }]`,
    files: { "/jwt-a": simulator.addresses.jwt },
  });
  const parsed = parseEndpoints(idEndpoints);
  ok(typeof parsed !== "string");
  const wish = creation(simulator, "one");

  const { volume } = await controller.call(method.createVolume, {
    ...wish,
    parameters: { ...wish.parameters, "mgmt-endpoint": idEndpoints },
  });
  const { entries } = await controller.call(method.listVolumes, {});

  deepStrictEqual(entries.map(({ volume }) => volume?.volumeId), [volume?.volumeId]);
  ok(volume?.volumeId.startsWith(`mgmt:${formatEndpoints(parsed)}|`));
});

for (
  const [what, token] of [
    ["is no token", "invalid-token"],
    ["has the UUID of no place", "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10"],
    ["names a place that is not in the file", `${"0".repeat(32)}.0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10`],
  ] as const
) {
  Deno.test(`ListVolumes and ListSnapshots answer ABORTED for a starting_token that ${what}`, async () => {
    await using env = await start();

    await rejects(
      env.listed({ startingToken: token }),
      answers("ABORTED", /^Cannot list volumes: starting_token ".*" is not one that leads on now, begin again/),
    );
    await rejects(
      env.snapshots({ startingToken: token }),
      answers("ABORTED", /^Cannot list snapshots: starting_token/),
    );
  });
}

Deno.test("ListVolumes answers ABORTED for a token of its own whose UUID was damaged", async () => {
  await using env = await start();
  await env.create("one");
  await env.create("two");
  const { nextToken } = await env.listed({ maxEntries: 1 });

  await rejects(env.listed({ startingToken: nextToken.slice(0, -1) }), answers("ABORTED", /begin again without one/));
});

Deno.test("ListVolumes and ListSnapshots refuse a negative max_entries with INVALID_ARGUMENT", async () => {
  await using env = await start();

  await rejects(
    env.listed({ maxEntries: -1 }),
    answers("INVALID_ARGUMENT", /list volumes: max_entries -1 is negative/),
  );
  await rejects(
    env.snapshots({ maxEntries: -1 }),
    answers("INVALID_ARGUMENT", /list snapshots: max_entries -1 is negative/),
  );
});

Deno.test("ListVolumes fails with UNAVAILABLE when one of several clusters is down, rather than hide its volumes", async () => {
  await using first = await startSimulator();
  await using second = await startSimulator();
  await using controller = await startController({
    clusterFile: `clusters: [${entry("a", first)}, ${entry("b", second)}]`,
    files: { "/jwt-a": first.addresses.jwt, "/jwt-b": second.addresses.jwt },
  });
  await second.control.stopEndpoints();

  await rejects(
    controller.call(method.listVolumes, {}),
    answers("UNAVAILABLE", /^Cannot list volumes: no LightOS management endpoint answers/),
  );
});

Deno.test("ListVolumes goes on with another page after LightOS lost the answer to one", async () => {
  await using env = await start();
  await env.create("one");
  env.simulator.control.fail({ rpc: "ListVolumes", when: "after", drop: true });

  const { ids } = await env.listed();

  strictEqual(ids.length, 1);
});

for (
  const [to, message] of [
    [{ protection: "Degraded" }, /a replica is missing: reads and writes go on \(LightOS: Degraded\)/],
    [{ protection: "ReadOnly" }, /too few replicas are left: writes fail/],
    [{ protection: "NotAvailable" }, /no replica can be reached: reads and writes fail/],
    [{ state: "Rollback" }, /its content is being set back to a snapshot/],
  ] as const
) {
  Deno.test(`ListVolumes and ControllerGetVolume report ${Object.values(to)} as abnormal, and say what it means`, async () => {
    await using env = await start();
    const volumeId = await env.create("one");
    env.simulator.control.setVolume(parseVolumeId(volumeId).uuid, to);

    const { entries } = await env.listed();
    const got = await env.call(method.controllerGetVolume, { volumeId });

    for (const status of [entries[0]?.status, got.status]) {
      strictEqual(status?.volumeCondition?.abnormal, true);
      match(status.volumeCondition.message, message);
    }
  });
}

Deno.test("ControllerGetVolume answers the request's ID, size, nodes and condition without secrets", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const publish = { volumeId, nodeId: "a.node", volumeCapability: writer, secrets: env.secrets };
  await env.call(method.controllerPublishVolume, publish);
  // The same volume in another spelling: endpoints in another order.
  const { endpoints } = parseVolumeId(volumeId);
  const spelt = volumeId.replace(formatEndpoints(endpoints), formatEndpoints(endpoints.toReversed()));

  const { volume, status } = await env.call(method.controllerGetVolume, { volumeId: spelt });

  ok(spelt !== volumeId);
  strictEqual(volume?.volumeId, spelt);
  strictEqual(volume.capacityBytes, gib);
  deepStrictEqual(status?.publishedNodeIds, ["a.node"]);
  deepStrictEqual([status.volumeCondition?.abnormal, status.volumeCondition?.message], [false, "healthy"]);
});

Deno.test("ControllerGetVolume of nothing, of a foreign ID and of an absent volume says which", async () => {
  await using env = await start();
  const present = await env.create("one");
  const absent = present.replace(parseVolumeId(present).uuid, "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10");

  await rejects(
    env.call(method.controllerGetVolume, {}),
    answers("INVALID_ARGUMENT", /Cannot describe a volume: volume_id is missing/),
  );
  await rejects(
    env.call(method.controllerGetVolume, { volumeId: "x" }),
    answers("NOT_FOUND", /not one of this driver/),
  );
  await rejects(
    env.call(method.controllerGetVolume, { volumeId: absent }),
    answers("NOT_FOUND", /Cannot read volume 0f2c6a5e/),
  );
});

// ----------------------------------------------------------------------------------------------------------- snapshots

Deno.test("ListSnapshots answers what CreateSnapshot answered", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const { snapshot } = await env.call(method.createSnapshot, {
    name: "s1",
    sourceVolumeId: volumeId,
    secrets: env.secrets,
  });

  const { entries, nextToken } = await env.snapshots();

  deepStrictEqual(entries.map(({ snapshot }) => snapshot), [snapshot]);
  strictEqual(nextToken, "");
});

Deno.test("ListSnapshots pages exactly: two of five with a token, then all the rest in one answer", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const ids: string[] = [];
  for (let number = 0; number < 5; number++) ids.push(await env.snapshot(`s${number}`, volumeId));

  const first = await env.snapshots({ maxEntries: 2 });
  const rest = await env.snapshots({ startingToken: first.nextToken });

  strictEqual(first.ids.length, 2);
  ok(first.nextToken !== "");
  strictEqual(rest.ids.length, 3);
  strictEqual(rest.nextToken, "");
  deepStrictEqual([...first.ids, ...rest.ids].toSorted(), ids.toSorted());
});

Deno.test("ListSnapshots filters by snapshot, by source, and by both", async () => {
  await using env = await start();
  const volumes = [await env.create("one"), await env.create("two")];
  const [one = "", two = ""] = volumes;
  const s1 = await env.snapshot("s1", one);
  const s2 = await env.snapshot("s2", one);
  const s3 = await env.snapshot("s3", two);
  const sorted = async (request: Parameters<typeof env.snapshots>[0]) => (await env.snapshots(request)).ids.toSorted();

  deepStrictEqual(await sorted({ snapshotId: s2 }), [s2]);
  deepStrictEqual(await sorted({ sourceVolumeId: one }), [s1, s2].toSorted());
  deepStrictEqual(await sorted({ sourceVolumeId: two, snapshotId: s3 }), [s3]);
  deepStrictEqual(await sorted({ sourceVolumeId: two, snapshotId: s1 }), []);
});

Deno.test("ListSnapshots by source pages too, and the sources of its entries are the request's text", async () => {
  await using env = await start();
  const [one, two] = [await env.create("one"), await env.create("two")];
  const ids: string[] = [];
  for (const name of ["s1", "s2", "s3"]) ids.push(await env.snapshot(name, one));
  for (const name of ["other1", "other2"]) await env.snapshot(name, two);

  const first = await env.snapshots({ sourceVolumeId: one, maxEntries: 2 });
  const rest = await env.snapshots({ sourceVolumeId: one, startingToken: first.nextToken });

  deepStrictEqual([first.ids.length, rest.ids.length, rest.nextToken], [2, 1, ""]);
  deepStrictEqual([...first.ids, ...rest.ids].toSorted(), ids.toSorted());
  for (const { snapshot } of [...first.entries, ...rest.entries]) strictEqual(snapshot?.sourceVolumeId, one);
});

Deno.test("a small page of ListSnapshots by source costs few management calls, however many other snapshots there are", async () => {
  await using env = await start();
  const { cluster } = env.simulator.control;
  const [own, other] = [await env.create("one"), await env.create("two")];
  const ours = await env.snapshot("ours", own);
  const source = { uuid: parseVolumeId(other).uuid, name: "" };
  for (let at = 0; at < 500; at++) {
    const name = `s-${at}`;
    await cluster.createSnapshot({ name, project: "default", source, description: "", retentionMs: undefined });
  }
  env.simulator.control.resetCalls();

  const page = await env.snapshots({ sourceVolumeId: own, maxEntries: 1 });

  deepStrictEqual([page.ids, page.nextToken], [[ours], ""]);
  const calls = env.simulator.control.calls()["ListSnapshots"]?.total ?? 0;
  ok(calls <= 12, `${calls} calls`);
});

Deno.test("ListSnapshots answers an empty list for unknown, foreign and deleted objects", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const snapshotId = await env.snapshot("s1", volumeId);
  const absent = volumeId.replace(parseVolumeId(volumeId).uuid, "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10");
  env.simulator.control.behave({ deletionMs: 60_000 });
  await env.call(method.deleteSnapshot, { snapshotId, secrets: env.secrets });

  for (
    const filter of [
      { snapshotId: "none-exist-id" },
      { snapshotId: absent },
      { snapshotId },
      { sourceVolumeId: "none-exist-id" },
      { sourceVolumeId: absent },
      { sourceVolumeId: volumeId },
      { sourceVolumeId: "none-exist-id", snapshotId },
      {},
    ]
  ) {
    const { ids, nextToken } = await env.snapshots(filter);
    deepStrictEqual([ids, nextToken], [[], ""], JSON.stringify(filter));
  }
});

Deno.test("ListSnapshots by ID reaches a cluster that the file does not name, with the call's own token", async () => {
  await using env = await start();
  await using other = await startSimulator();
  const secrets = { jwt: other.addresses.jwt };
  const { volume } = await env.call(method.createVolume, creation(other, "elsewhere"));
  const sourceVolumeId = volume?.volumeId ?? "";
  const { snapshot } = await env.call(method.createSnapshot, { name: "s1", sourceVolumeId, secrets });
  const snapshotId = snapshot?.snapshotId ?? "";

  deepStrictEqual((await env.snapshots({ snapshotId, secrets })).ids, [snapshotId]);
  deepStrictEqual((await env.snapshots({ sourceVolumeId, secrets })).ids, [snapshotId]);
  deepStrictEqual((await env.snapshots({})).ids, []);
  await rejects(env.snapshots({ snapshotId }), answers("UNAUTHENTICATED", /JWT: none was given/));
});

Deno.test("ListSnapshots without a cluster file finds imported snapshots by their IDs, and takes no garbage for one", async () => {
  await using simulator = await startSimulator();
  await using controller = await startController({});
  const secrets = { jwt: simulator.addresses.jwt };
  const { volume } = await controller.call(method.createVolume, creation(simulator, "one"));
  const sourceVolumeId = volume?.volumeId ?? "";
  const { snapshot } = await controller.call(method.createSnapshot, { name: "s1", sourceVolumeId, secrets });
  const snapshotId = snapshot?.snapshotId ?? "";
  const idsOf = async (request: { snapshotId?: string; sourceVolumeId?: string }) =>
    (await controller.call(method.listSnapshots, { ...request, secrets })).entries.map(({ snapshot }) =>
      snapshot?.snapshotId
    );
  const absent = snapshotId.replace(parseVolumeId(snapshotId).uuid, crypto.randomUUID());

  const { capabilities } = await controller.call(method.controllerGetCapabilities, {});

  ok(capabilities.some(({ type }) => type.case === "rpc" && type.value.type === Rpc.LIST_SNAPSHOTS));
  deepStrictEqual(await idsOf({ snapshotId }), [snapshotId]);
  deepStrictEqual(await idsOf({ sourceVolumeId }), [snapshotId]);
  deepStrictEqual(await idsOf({ snapshotId: absent }), []);
  deepStrictEqual(await idsOf({ snapshotId: "garbage" }), []);
  await rejects(
    controller.call(method.listSnapshots, { secrets }),
    answers("FAILED_PRECONDITION", /^Cannot list snapshots: without a cluster file .* give snapshot_id or /),
  );
});

Deno.test("ListSnapshots shows no snapshot before it is cut for good", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const { control } = env.simulator;
  control.behave({ holdCreations: true });
  const creating = env.snapshot("s1", volumeId);
  await eventually("the snapshot", () => control.cluster.snapshots.length === 1);

  const { ids } = await env.snapshots();
  control.releaseCreations();

  deepStrictEqual(ids, []);
  deepStrictEqual((await env.snapshots({ snapshotId: await creating })).ids.length, 1);
});

Deno.test("ListSnapshots leaves out the helper of a clone that is being made", async () => {
  await using env = await start();
  const volumeId = await env.create("one");
  const { control } = env.simulator;
  control.fail({ rpc: "CreateVolume", hold: true });
  const wish = creation(env.simulator, "clone");
  const volumeContentSource = { type: { case: "volume" as const, value: { volumeId } } };
  const cloning = env.call(method.createVolume, { ...wish, volumeContentSource });
  await eventually("the volume is asked for, the helper being there", () => control.held().length === 1);

  const all = await env.snapshots();
  const ofSource = await env.snapshots({ sourceVolumeId: volumeId });
  const helpers = control.cluster.snapshots.length;
  control.releaseHeld();
  await cloning;

  deepStrictEqual([all.ids, ofSource.ids, helpers], [[], [], 1]);
});

// ------------------------------------------------------------------------------------------------------------ capacity

const free = 90n * gib;

async function startCapacity(more = "jwt: /admin") {
  return await start({ capacityBytes: free }, more);
}

Deno.test("GetCapacity without parameters adds up the clusters of the file, least volume 1 GiB", async () => {
  await using first = await startSimulator({ capacityBytes: free });
  await using second = await startSimulator({ capacityBytes: 10n * gib });
  await using controller = await startController({
    clusterFile: `clusters: [${entry("a", first, "jwt: /jwt-a")}, ${entry("b", second, "jwt: /jwt-b")}]`,
    files: { "/jwt-a": first.addresses.adminJwt, "/jwt-b": second.addresses.adminJwt },
  });

  const answer = await controller.call(method.getCapacity, {});

  strictEqual(answer.availableCapacity, 100n * gib);
  strictEqual(answer.minimumVolumeSize, gib);
  strictEqual(answer.maximumVolumeSize, undefined);
});

for (const [replicas, expected] of [["1", 90n], ["2", 45n], ["3", 30n], ["4", 0n]] as const) {
  Deno.test(`GetCapacity for ${replicas} replicas on three servers is ${expected} of 90 GiB`, async () => {
    await using env = await startCapacity();
    const { parameters = {} } = creation(env.simulator, "x");

    const { availableCapacity } = await env.call(method.getCapacity, {
      parameters: { ...parameters, "replica-count": replicas },
    });

    strictEqual(availableCapacity, expected * gib);
  });
}

Deno.test("GetCapacity shrinks by what volumes and their replicas take", async () => {
  await using env = await startCapacity();
  const wish = creation(env.simulator, "one");
  const parameters = { ...wish.parameters, "replica-count": "3" };
  await env.call(method.createVolume, { ...wish, parameters });

  const { availableCapacity } = await env.call(method.getCapacity, { parameters });

  strictEqual(availableCapacity, 29n * gib);
});

Deno.test("GetCapacity passes over keys that are for the orchestrator or the node", async () => {
  await using env = await startCapacity();
  const { parameters } = creation(env.simulator, "x");
  const sidecar = {
    "csi.storage.k8s.io/fstype": "ext4",
    "csi.storage.k8s.io/provisioner-secret-name": "s",
    "mkfs-options": "-m 0",
  };

  const { availableCapacity } = await env.call(method.getCapacity, {
    parameters: { ...parameters, ...sidecar },
    volumeCapabilities: [writer],
  });
  const withoutOthers = await env.call(method.getCapacity, { parameters: sidecar });

  strictEqual(availableCapacity, free);
  strictEqual(withoutOthers.availableCapacity, free);
});

type CapacityWish = Extract<MessageInitShape<typeof GetCapacityRequestSchema>, { readonly $typeName?: never }>;
const badCapacityWishes: readonly (readonly [what: string, request: CapacityWish, message: RegExp])[] = [
  [
    "an unknown parameter",
    { parameters: { "replica-cout": "3" } },
    /"replica-cout" \(did you mean "replica-count"\?\) unknown/,
  ],
  ["parameters without endpoints", { parameters: { "replica-count": "3" } }, /"mgmt-endpoint" is missing/],
  [
    "topology",
    { accessibleTopology: { segments: { zone: "a" } } },
    /accessible_topology asks for "zone" "a", but every node reaches every volume/,
  ],
];

for (const [what, request, message] of badCapacityWishes) {
  Deno.test(`GetCapacity refuses ${what} with INVALID_ARGUMENT`, async () => {
    await using env = await startCapacity();

    await rejects(
      env.call(method.getCapacity, request),
      answers("INVALID_ARGUMENT", /^Cannot measure the capacity: /, message),
    );
  });
}

const mount = { case: "mount" as const, value: {} };
const emptyTopology = { segments: {} };
const adviceOfCapacity: readonly (readonly [what: string, request: CapacityWish, expected: bigint])[] = [
  ["a topology without segments, as csi-provisioner 5 sends it", { accessibleTopology: emptyTopology }, free],
  [
    "access mode UNKNOWN, as csi-provisioner 3.6 sends it",
    {
      volumeCapabilities: [{ accessType: mount, accessMode: { mode: Mode.UNKNOWN } }],
      accessibleTopology: emptyTopology,
    },
    free,
  ],
  ["a capability with nothing in it", { volumeCapabilities: [{}] }, free],
  ["a capability without access type", { volumeCapabilities: [{ accessMode: writer.accessMode }] }, free],
  [
    "a file system that no node has",
    {
      volumeCapabilities: [{
        accessType: { case: "mount", value: { fsType: "zfs" } },
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
      }],
    },
    0n,
  ],
  [
    "a file system that two nodes write to",
    { volumeCapabilities: [writer, { accessType: mount, accessMode: { mode: Mode.MULTI_NODE_MULTI_WRITER } }] },
    0n,
  ],
];

for (const [what, request, expected] of adviceOfCapacity) {
  Deno.test(`GetCapacity with ${what} answers ${expected === 0n ? "that there is none" : "what is free"}`, async () => {
    await using env = await startCapacity();
    const { parameters = {} } = creation(env.simulator, "x");

    const { availableCapacity } = await env.call(method.getCapacity, { parameters, ...request });

    strictEqual(availableCapacity, expected);
  });
}

Deno.test("GetCapacity with a project's token answers UNAUTHENTICATED and says which token is needed", async () => {
  await using env = await startCapacity("jwt: /jwt-a");

  await rejects(
    env.call(method.getCapacity, {}),
    answers("UNAUTHENTICATED", /need a token with a right to the cluster$/, /\/jwt-a of cluster "a"/),
  );
});

Deno.test("GetCapacity with a token of the process' own and no cluster file measures the StorageClass' cluster", async () => {
  await using simulator = await startSimulator({ capacityBytes: free });
  await using controller = await startController({ globalJwt: () => simulator.addresses.adminJwt });
  const { parameters = {} } = creation(simulator, "x");

  const { capabilities } = await controller.call(method.controllerGetCapabilities, {});
  const { availableCapacity } = await controller.call(method.getCapacity, { parameters });

  const names = capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "");
  deepStrictEqual(names.filter((name) => /GET_CAPACITY|LIST_VOLUMES|GET_VOLUME/.test(name)), ["GET_CAPACITY"]);
  strictEqual(availableCapacity, free);
  await rejects(controller.call(method.getCapacity, {}), answers("INVALID_ARGUMENT", /"mgmt-endpoint" is missing/));
});

Deno.test("GET_CAPACITY is announced once a token of the process' own has appeared, and while it is there", async () => {
  await using simulator = await startSimulator({ capacityBytes: free });
  let token: string | undefined;
  await using controller = await startController({ globalJwt: () => token });
  const { parameters = {} } = creation(simulator, "x");
  const announced = async () => {
    const { capabilities } = await controller.call(method.controllerGetCapabilities, {});
    return capabilities.some(({ type }) => type.case === "rpc" && type.value.type === Rpc.GET_CAPACITY);
  };
  const seen = [await announced()];
  await rejects(
    controller.call(method.getCapacity, { parameters }),
    answers("UNIMPLEMENTED", /no credentials of its own/),
  );

  token = `${simulator.addresses.adminJwt}\n`;
  seen.push(await announced());
  strictEqual((await controller.call(method.getCapacity, { parameters })).availableCapacity, free);
  token = "\n";
  seen.push(await announced());

  deepStrictEqual(seen, [false, true, false]);
});

// ------------------------------------------------------------------------------------------------------------- process

Deno.test("lbcsi controller --config follows a cluster file that Kubernetes swaps by its symbolic links", async () => {
  await using first = await startSimulator();
  await using second = await startSimulator();
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-config-" });
  const put = async (version: string, simulator: TestSimulator) => {
    await Deno.mkdir(`${directory}/..${version}`);
    await Deno.writeTextFile(`${directory}/..${version}/jwt`, simulator.addresses.jwt);
    const text = `clusters: [${entry("a", simulator, `projects: default, jwt: ${directory}/jwt`)}]`;
    await Deno.writeTextFile(`${directory}/..${version}/config.yaml`, text);
    await Deno.symlink(`..${version}`, `${directory}/..new`);
    await Deno.rename(`${directory}/..new`, `${directory}/..data`);
  };
  await put("1", first);
  for (const name of ["jwt", "config.yaml"]) await Deno.symlink(`..data/${name}`, `${directory}/${name}`);
  const process = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", fileURLToPath(new URL("../../../main.ts", import.meta.url)), "controller"],
    env: {
      NO_COLOR: "1",
      CSI_ENDPOINT: `unix://${directory}/csi.sock`,
      LB_CSI_CONFIG: `${directory}/config.yaml`,
      LB_CSI_LOG_LEVEL: "error",
    },
    stdin: "null",
    stdout: "null",
    stderr: "inherit",
  }).spawn();
  try {
    using channel = new Channel({ address: `unix://${directory}/csi.sock` });
    const options = { signal: AbortSignal.timeout(30_000) };
    await eventually("the socket", () => Deno.stat(`${directory}/csi.sock`).then(() => true, () => false), 20_000);
    const made: string[] = [];
    for (const simulator of [first, second]) {
      const { volume } = await channel.call(method.createVolume, creation(simulator, "one"), options);
      made.push(volume?.volumeId ?? "");
    }
    const listed = async () =>
      (await channel.call(method.listVolumes, {}, options)).entries.map(({ volume }) => volume?.volumeId);

    const before = await listed();
    await put("2", second);
    const after = await listed();

    deepStrictEqual([before, after], [[made[0]], [made[1]]]);
  } finally {
    process.kill("SIGTERM");
    await process.status;
    await Deno.remove(directory, { recursive: true });
  }
});

function behaviour() {
  return {
    creationMs: 0,
    deletionMs: 0,
    updateMs: 0,
    rollbackMs: 0,
    holdCreations: false,
    failCreations: 0,
    nameShowsDead: false,
    snapshotWaitsForClones: false,
    nameCheckedLast: false,
    asDocumented: false,
  };
}

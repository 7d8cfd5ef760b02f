/** ListVolumes and ControllerGetVolume, over real sockets, against simulated clusters. */
import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { toBinary } from "@bufbuild/protobuf";
import { Channel } from "../../../lib/grpc/client.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { mostEntries } from "../../../lib/storage/listing_page.ts";
import { formatEndpoints, parseEndpoints, parseVolumeId } from "../../../lib/volume_id.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as Rpc,
  ListVolumesResponseSchema,
} from "../../../proto/gen/csi_pb.ts";
import { answers, startController, writer } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";
import { creation, entry, startListing } from "../../support/listing.ts";

const method = Controller.method;

Deno.test("ControllerGetCapabilities with a cluster file announces lists, condition and capacity", async () => {
  await using env = await startListing();

  const { capabilities } = await env.call(method.controllerGetCapabilities, {});

  const names = capabilities.map(({ type }) => type.case === "rpc" ? Rpc[type.value.type] : "");
  const expected = [
    "LIST_VOLUMES",
    "LIST_VOLUMES_PUBLISHED_NODES",
    "GET_VOLUME",
    "VOLUME_CONDITION",
    "LIST_SNAPSHOTS",
    "GET_CAPACITY",
  ];
  deepStrictEqual(expected.filter((name) => !names.includes(name)), []);
});

Deno.test("ListVolumes answers the IDs that CreateVolume gave, with sizes, nodes and condition", async () => {
  await using env = await startListing();
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

Deno.test("ListVolumes leaves out hosts that are not nodes, husks, and volumes that are being made or deleted", async () => {
  await using env = await startListing();
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
  await using env = await startListing({ projects: ["default", "team-a"] }, "jwt: /admin");
  const ids = [await env.create("one"), await env.create("two", "team-a")];

  const { ids: listed } = await env.listed();

  deepStrictEqual(listed.toSorted(), ids.toSorted());
});

Deno.test("ListVolumes of more volumes than fit into one answer of LightOS or of the driver omits none", async () => {
  await using env = await startListing({ capacityBytes: 1n << 60n, behaviour: behaviour() });
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
    await using env = await startListing({ capacityBytes: 1n << 60n, behaviour: behaviour() });
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

Deno.test("ListVolumes asks LightOS for less when an answer would be larger than it accepts", async () => {
  await using env = await startListing({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  // 10 MB in all.
  await makeMany(env.simulator, 140, manyHosts(900));
  env.simulator.control.resetCalls();

  const page = await env.call(method.listVolumes, {});

  ok(page.entries.length > 10 && page.nextToken !== "", `${page.entries.length}`);
});

Deno.test("a page of ListVolumes costs one management call", async () => {
  await using env = await startListing({ capacityBytes: 1n << 60n, behaviour: behaviour() });
  await makeMany(env.simulator, mostEntries + 5);
  for (const maxEntries of [0, 10, 1000]) {
    env.simulator.control.resetCalls();

    const { nextToken } = await env.call(method.listVolumes, { maxEntries });

    ok(nextToken !== "");
    strictEqual(env.simulator.control.calls()["ListVolumes"]?.total, 1, `${maxEntries}`);
  }
});

Deno.test("ListVolumes of as many volumes as fit into one answer ends, maybe with an empty page", async () => {
  await using env = await startListing({ capacityBytes: 1n << 60n, behaviour: behaviour() });
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
    const creationRequest = creation(simulator, `volume-${at}`);
    const parameters = { ...creationRequest.parameters, "mgmt-endpoint": endpoints };
    const { volume } = await controller.call(method.createVolume, { ...creationRequest, parameters });
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
  const creationRequest = creation(simulator, "one");

  const { volume } = await controller.call(method.createVolume, {
    ...creationRequest,
    parameters: { ...creationRequest.parameters, "mgmt-endpoint": idEndpoints },
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
    await using env = await startListing();

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
  await using env = await startListing();
  await env.create("one");
  await env.create("two");
  const { nextToken } = await env.listed({ maxEntries: 1 });

  await rejects(env.listed({ startingToken: nextToken.slice(0, -1) }), answers("ABORTED", /begin again without one/));
});

Deno.test("ListVolumes and ListSnapshots reject a negative max_entries with INVALID_ARGUMENT", async () => {
  await using env = await startListing();

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
  await using env = await startListing();
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
    await using env = await startListing();
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
  await using env = await startListing();
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

Deno.test("ControllerGetVolume of nothing, of a foreign ID and of an absent volume distinguishes them", async () => {
  await using env = await startListing();
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

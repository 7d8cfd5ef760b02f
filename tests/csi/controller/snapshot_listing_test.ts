/** ListSnapshots, over real sockets, against simulated clusters. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { Controller, ControllerServiceCapability_RPC_Type as Rpc } from "../../../proto/gen/csi_pb.ts";
import { answers, startController } from "../../support/controller_service.ts";
import { eventually, startSimulator } from "../../support/simulator.ts";
import { creation, startListing } from "../../support/listing.ts";

const method = Controller.method;

Deno.test("ListSnapshots answers what CreateSnapshot answered", async () => {
  await using env = await startListing();
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
  await using env = await startListing();
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
  await using env = await startListing();
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
  await using env = await startListing();
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
  await using env = await startListing();
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
  await using env = await startListing();
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
  await using env = await startListing();
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

Deno.test("ListSnapshots without a cluster file finds imported snapshots by their IDs, and does not mistake garbage for one", async () => {
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

Deno.test("ListSnapshots shows no snapshot before it is complete", async () => {
  await using env = await startListing();
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
  await using env = await startListing();
  const volumeId = await env.create("one");
  const { control } = env.simulator;
  control.fail({ rpc: "CreateVolume", hold: true });
  const creationRequest = creation(env.simulator, "clone");
  const volumeContentSource = { type: { case: "volume" as const, value: { volumeId } } };
  const cloning = env.call(method.createVolume, { ...creationRequest, volumeContentSource });
  await eventually("the volume is asked for, the helper being there", () => control.held().length === 1);

  const all = await env.snapshots();
  const ofSource = await env.snapshots({ sourceVolumeId: volumeId });
  const helpers = control.cluster.snapshots.length;
  control.releaseHeld();
  await cloning;

  deepStrictEqual([all.ids, ofSource.ids, helpers], [[], [], 1]);
});

/** The labels of new volumes: which driver made them, and for which claim. */
import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { fromSnapshot, fromVolume, makeSources, startSnapshots, uuidOf } from "../../support/snapshots.ts";

Deno.test("CreateVolume finds a clone by its helper's name, or its helper, when its labels were changed", async () => {
  await using env = await startSnapshots({ snapshotWaitsForClones: true });
  const { volumeId } = await makeSources(env);
  const request = { volumeContentSource: fromVolume(volumeId), capacityRange: {} };
  const made = await env.create("copy", request);
  const clone = env.found(made.volumeId);

  clone.labels = [];
  deepStrictEqual(await env.create("copy", request), made);
  clone.sourceSnapshotName = "";
  deepStrictEqual(await env.create("copy", request), made);
});

Deno.test("CreateVolume takes a clone that the vendor's driver had made and could not report", async () => {
  await using env = await startSnapshots();
  const { volumeId } = await makeSources(env);
  const helper = await env.snapshot("snapshot-copy", volumeId);
  const made = await env.create("copy", { volumeContentSource: fromSnapshot(helper.snapshotId), capacityRange: {} });
  env.found(made.volumeId).labels = [];

  const found = await env.create("copy", { volumeContentSource: fromVolume(volumeId), capacityRange: {} });

  strictEqual(found.volumeId, made.volumeId);
});

Deno.test("new volumes carry labels that say who made them and for which claim", async () => {
  await using env = await startSnapshots();
  const prefix = "csi.storage.k8s.io/";
  const parameters = env.parameters({
    [`${prefix}pvc/name`]: "data-db-0",
    [`${prefix}pvc/namespace`]: "shop",
    [`${prefix}pv/name`]: "pvc-1",
  });

  const volumeId = await env.volume("v", { parameters });
  const clone = await env.volume("c", { parameters, volumeContentSource: fromVolume(volumeId) });

  const labels = (id: string) => Object.fromEntries(env.found(id).labels.map(({ key, value }) => [key, value]));
  const common = { madeby: "lbcsi", pvc: "data-db-0", namespace: "shop", pv: "pvc-1" };
  deepStrictEqual(labels(volumeId), common);
  deepStrictEqual(labels(clone), { ...common, clonedfrom: uuidOf(volumeId) });
});

Deno.test("labels take what LightOS takes: other characters are replaced, long values cut, empty ones left out", async () => {
  await using env = await startSnapshots();
  const prefix = "csi.storage.k8s.io/";
  const parameters = env.parameters({
    [`${prefix}pvc/name`]: "näme with blanks/and more",
    [`${prefix}pvc/namespace`]: "",
    [`${prefix}pv/name`]: "p".repeat(300),
  });

  const volume = env.found(await env.volume("v", { parameters }));

  deepStrictEqual(volume.labels, [
    { key: "madeby", value: "lbcsi" },
    { key: "pvc", value: "n_me_with_blanks_and_more" },
    { key: "pv", value: "p".repeat(253) },
  ]);
});

Deno.test("CreateVolume repeated with other metadata of the sidecars answers the same volume", async () => {
  await using env = await startSnapshots();
  const first = await env.create("v");

  const again = await env.create("v", { parameters: env.parameters({ "csi.storage.k8s.io/pvc/name": "new" }) });

  deepStrictEqual(again, first);
});

/** The PoseidonOS backend: IDs, optional parts, limits of volumes in use, and DAgents that moved. */
import { deepStrictEqual, match, rejects, strictEqual } from "node:assert/strict";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { knownSystems } from "../../../lib/storage/poseidon/cluster_file.ts";
import { poseidonParameters, startPoseidon } from "../../support/poseidon.ts";
import { failsWith, gib, none, quiet, startPoseidonBackend, within } from "../../support/backends.ts";

Deno.test("an ID that is not one of this driver is NOT_FOUND", async () => {
  await using t = await startPoseidonBackend();

  await rejects(t.get("mgmt:h:1|nguid:…"), failsWith("NOT_FOUND", /not of the form pos:/));
});

Deno.test("without a cluster file there are neither lists nor capacity, and never snapshots or growth", async () => {
  await using t = await startPoseidonBackend();

  const { listing, capacity, expansion, snapshots, changedBlocks } = t.backend;
  deepStrictEqual([listing, capacity, expansion, snapshots, changedBlocks], Array(5).fill(undefined));
});

Deno.test("limits of a volume in use change, others than those given stay", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create("pvc-1", { maxiops: "100", maxbw: "20" });
  const modify = (mutable: Record<string, string>) =>
    t.backend.modification?.modifyVolume(within(5000), none, id, mutable);

  await modify({ maxbw: "50" });
  deepStrictEqual([t.volumes()[0]?.maxiops, t.volumes()[0]?.maxbw], [100n, 50n]);
  await modify({ maxbw: "50" });
  strictEqual(t.calls("SetQos"), 1);
  await rejects(
    modify({ arrayName: "x" }) ?? Promise.resolve(),
    failsWith("INVALID_ARGUMENT", /mutable parameter "arrayName" unknown/),
  );
  t.sim.control.behave({ qos: false });
  await rejects(
    modify({ maxbw: "60" }) ?? Promise.resolve(),
    failsWith("FAILED_PRECONDITION", /4601 .*fe_qos\.enable/),
  );
});

Deno.test("promise 13: IDs from before a DAgent moved lead to where it is now", async () => {
  await using sim = await startPoseidon();
  const text =
    `systems: [{ name: a, endpoint: "${sim.addresses.dagent}", idEndpoint: "192.0.2.1:3000", arrays: POSArray }]`;
  const files = { stamp: () => "1", read: () => text };
  await using backend = poseidonBackend({ log: quiet, systems: knownSystems("/c.yaml", files, quiet) });
  const parameters = { ...poseidonParameters(sim), provisionerIP: "192.0.2.1", provisionerPort: "3000" };
  const request = { name: "pvc-1", requiredBytes: gib, limitBytes: 0n, parameters };

  const { id } = await backend.createVolume(within(5000), none, request);

  match(id, /^pos:192\.0\.2\.1:3000\|/);
  const listed = await backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });
  deepStrictEqual(listed?.entries.map((volume) => volume.id), [id]);
  await backend.deleteVolume(within(5000), none, id);
  strictEqual(sim.control.model.arrays[0]?.volumes.length, 0);
});

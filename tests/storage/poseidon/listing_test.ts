/** Lists and capacity of PoseidonOS. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import type { Page, Volume } from "../../../lib/storage/backend.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { knownSystems } from "../../../lib/storage/poseidon/cluster_file.ts";
import { poseidonParameters, startPoseidon } from "../../support/poseidon.ts";
import { failsWith, gib, hostA, mib, none, quiet, startPoseidonBackend, within } from "../../support/backends.ts";

Deno.test("lists of PoseidonOS come in pages, with the nodes that have a volume", async () => {
  await using t = await startPoseidonBackend({ arrays: ["POSArray", "Second"] }, true);
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
    failsWith("ABORTED", /starting_token "nonsense"/),
  );
});

Deno.test("lists of PoseidonOS fail while an array is not mounted, because its volumes would seem to be gone", async () => {
  await using t = await startPoseidonBackend({}, true);
  await t.create();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });

  const listed = t.backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });

  await rejects(listed ?? Promise.resolve(), failsWith("UNAVAILABLE", /is not mounted/));
});

Deno.test("a volume on a degraded array is abnormal, and can be used", async () => {
  await using t = await startPoseidonBackend({}, true);
  const { id } = await t.create();
  strictEqual((await t.get(id)).condition, undefined);
  t.sim.control.setArray("POSArray", { situation: "DEGRADED" });

  const { condition } = await t.get(id);

  deepStrictEqual([condition?.usable, condition?.reason], [true, "ArrayDegraded"]);
  const abnormal = await t.backend.listing?.listAbnormal(within(5000), none, { maxEntries: 0, startingToken: "" });
  deepStrictEqual(abnormal?.entries.map((volume) => volume.id), [id]);
});

Deno.test("the capacity of PoseidonOS is what is left, and nothing where no volume can be added", async () => {
  await using t = await startPoseidonBackend({ capacityBytes: 16n * gib }, true);
  await t.create();
  const capacity = (parameters: Record<string, string>) => t.backend.capacity?.getCapacity(within(5000), parameters);

  deepStrictEqual(await capacity({}), { availableBytes: 15n * gib, minimumVolumeBytes: mib });
  deepStrictEqual(await capacity(poseidonParameters(t.sim)), { availableBytes: 15n * gib, minimumVolumeBytes: mib });
  for (let number = 0; number < 255; number++) {
    const settings = { array: "POSArray", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid: "" };
    await t.model.createVolume({ ...settings, name: `v${number}x` });
  }
  deepStrictEqual(await capacity({}), { availableBytes: 0n, minimumVolumeBytes: mib });
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
    const request = { name: `pvc-${at}`, requiredBytes: gib, limitBytes: 0n, parameters };
    made.push((await backend.createVolume(within(5000), none, request)).id);
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

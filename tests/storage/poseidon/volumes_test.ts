/** Volumes of PoseidonOS: created, found, and deleted, whatever happens to answers. */
import { deepStrictEqual, match, rejects, strictEqual } from "node:assert/strict";
import { parsePoseidonId } from "../../../lib/volume_id.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { failsWith, gib, hostA, mib, none, quiet, startPoseidonBackend, within } from "../../support/backends.ts";

Deno.test("CreateVolume on PoseidonOS makes a volume of whole MiB and answers the UUID that PoseidonOS has", async () => {
  await using t = await startPoseidonBackend();

  const volume = await t.backend.createVolume(within(5000), none, t.request({ requiredBytes: gib + 1n }));

  const [made] = t.volumes();
  deepStrictEqual([made?.name, made?.sizeBytes, made?.isMounted], ["pvc-1", gib + mib, false]);
  deepStrictEqual([volume.uuid, volume.capacityBytes], [made?.uuid, gib + mib]);
  strictEqual(volume.id, `pos:${t.sim.addresses.dagent}|array:POSArray|vol:pvc-1|uuid:${made?.uuid}`);
  deepStrictEqual(volume.context, { transportType: "tcp", targetAddress: "127.0.0.1", transportServiceId: "1158" });
});

Deno.test("CreateVolume on PoseidonOS answers the same volume again, also from another process", async () => {
  await using t = await startPoseidonBackend();
  const first = await t.create();

  await using other = poseidonBackend({ log: quiet });
  const again = await other.createVolume(within(5000), none, t.request());

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
    await using t = await startPoseidonBackend();
    await t.create();

    const created = t.backend.createVolume(within(5000), none, t.request(changes, parameters));

    await rejects(created, failsWith("ALREADY_EXISTS", /has that name and differs: /, message));
  });
}

Deno.test("CreateVolume on PoseidonOS does not use a namesake that another program made", async () => {
  await using t = await startPoseidonBackend();
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-1", sizeBytes: gib, maxiops: 0n, maxbw: 0n, uuid });

  await rejects(t.create(), failsWith("ALREADY_EXISTS", new RegExp(`its UUID is ${uuid} instead of`)));
});

Deno.test("CreateVolume on PoseidonOS replaces a name that PoseidonOS does not allow", async () => {
  await using t = await startPoseidonBackend();
  const volume = await t.create("a.b/c");

  strictEqual(t.volumes()[0]?.name, `csi-${volume.uuid}`);
  deepStrictEqual(await t.create("a.b/c"), volume);
});

Deno.test("promise 8: CreateVolume on PoseidonOS whose answer is lost finds the volume that it made", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after" });

  const volume = await t.create();

  strictEqual(t.volumes()[0]?.uuid, volume.uuid);
  strictEqual(t.calls("CreateVolume"), 1);
});

for (const isLost of [true, false]) {
  Deno.test(`promise 30: CreateVolume on PoseidonOS is not final when the look after ${isLost ? "a lost" : "its"} answer is not understood`, async () => {
    await using t = await startPoseidonBackend();
    if (isLost) t.sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after" });
    t.sim.control.fail({ rpc: "ListVolumes", event: "CREATE_VOL_SIZE_NOT_ALIGNED", skip: 1, count: 1 });

    await rejects(
      t.create(),
      failsWith(
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
    await using t = await startPoseidonBackend();
    t.sim.control.fail({ rpc: "CreateVolume", event, when: "after" });

    const volume = await t.create();

    strictEqual(t.volumes()[0]?.uuid, volume.uuid);
    strictEqual(t.calls("CreateVolume"), 1);
  });
}

for (const generation of ["1.0", "0.11"] as const) {
  Deno.test(`CreateVolume on PoseidonOS ${generation} repeats what was refused for being busy`, async () => {
    await using t = await startPoseidonBackend({ behaviour: { generation } });
    t.sim.control.fail({ rpc: "CreateVolume", event: "VOL_MGR_BUSY", count: 2 });
    t.sim.control.fail({ rpc: "ListVolumes", event: "CLI_SERVER_BUSY" });

    const volume = await t.create();

    deepStrictEqual(await t.create(), volume);
    strictEqual(t.calls("CreateVolume"), 3);
  });

  Deno.test(`a volume lives and ends on PoseidonOS ${generation}, with its status codes`, async () => {
    await using t = await startPoseidonBackend({ behaviour: { generation } });
    const { id, uuid } = await t.create();
    const namespace = await t.grant(id);
    deepStrictEqual(await t.grant(id), namespace);
    deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
    await rejects(t.remove(id), failsWith("FAILED_PRECONDITION", /exported, a\.node may still use it/));
    await t.revoke(id);
    await t.revoke(id);
    await t.remove(id);
    await t.remove(id);

    await rejects(t.get(id), failsWith("NOT_FOUND", new RegExp(uuid)));
    deepStrictEqual(t.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
  });
}

Deno.test("CreateVolume on PoseidonOS that runs out of time says that PoseidonOS is busy", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.fail({ rpc: "CreateVolume", event: "VOL_MGR_BUSY", count: 0 });

  const created = t.backend.createVolume(within(500), none, t.request());

  await rejects(
    created,
    failsWith(
      "UNAVAILABLE",
      /in time: PoseidonOS at \S+ answered POST \/volumes with 1806 VOL_MGR_BUSY: .*; repeat the call$/,
    ),
  );
});

Deno.test("promise 22: CreateVolume on a full array is RESOURCE_EXHAUSTED before the array says so", async () => {
  await using t = await startPoseidonBackend();
  for (let number = 0; number < 256; number++) {
    const settings = { array: "POSArray", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid: "" };
    await t.model.createVolume({ ...settings, name: `v${number}x` });
  }

  await rejects(t.create(), failsWith("RESOURCE_EXHAUSTED", /has 256 volumes, 256 are allowed; delete one/));

  strictEqual(t.calls("CreateVolume"), 0);
});

Deno.test("promise 22: CreateVolume of more than what is left is RESOURCE_EXHAUSTED and says what is left", async () => {
  await using t = await startPoseidonBackend({ capacityBytes: 3n * gib });
  await t.create();

  const created = t.backend.createVolume(within(5000), none, t.request({ name: "pvc-2", requiredBytes: 3n * gib }));

  await rejects(created, failsWith("RESOURCE_EXHAUSTED", /has 2147483648 bytes left, 3221225472 are needed/));
});

for (
  const [what, prepare, code, message] of [
    ["an unknown array", { arrayName: "Other" }, "FAILED_PRECONDITION", /has no array "Other"/],
    ["a source of nothing", { provisionerPort: "1" }, "UNAVAILABLE", /the DAgent at 127\.0\.0\.1:1 cannot be reached/],
  ] as const
) {
  Deno.test(`CreateVolume on ${what} is ${code}`, async () => {
    await using t = await startPoseidonBackend();

    await rejects(t.create("pvc-1", prepare), failsWith(code, message));
  });
}

Deno.test("CreateVolume on an array that is not mounted is UNAVAILABLE, and on one that mounts again it works", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });
  await rejects(
    t.create(),
    failsWith("UNAVAILABLE", /array "POSArray" .* is not mounted \(OFFLINE, DEFAULT\), it has to be/),
  );

  t.sim.control.setArray("POSArray", { state: "NORMAL", situation: "NORMAL" });

  strictEqual((await t.create()).capacityBytes, gib);
});

Deno.test("CreateVolume with limits sets them, and leaves nothing where PoseidonOS drops them", async () => {
  await using t = await startPoseidonBackend();
  await t.create("pvc-1", { maxiops: "100", maxbw: "20" });
  deepStrictEqual([t.volumes()[0]?.maxiops, t.volumes()[0]?.maxbw], [100n, 20n]);
  t.sim.control.behave({ qos: false });

  const created = t.create("pvc-2", { maxiops: "100" });

  await rejects(
    created,
    failsWith("FAILED_PRECONDITION", /did not take its limits \(maxiops is 0, asked is 100\).*fe_qos/),
  );
  deepStrictEqual(t.volumes().map(({ name }) => name), ["pvc-1"]);
});

Deno.test("promise 19: DeleteVolume never says done while the array is not mounted, and deletes afterwards", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  t.sim.control.setArray("POSArray", { state: "OFFLINE", situation: "DEFAULT" });
  await rejects(t.remove(id), failsWith("UNAVAILABLE", /is not mounted/));
  await rejects(t.get(id), failsWith("UNAVAILABLE", /is not mounted/));
  strictEqual(t.volumes().length, 1);

  t.sim.control.setArray("POSArray", { state: "NORMAL", situation: "NORMAL" });
  await t.remove(id);

  strictEqual(t.volumes().length, 0);
});

Deno.test("promise 3: DeleteVolume does not touch a namesake with another UUID", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  const first = t.volumes()[0];
  await t.model.deleteVolume("POSArray", "pvc-1");
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-1", sizeBytes: mib, maxiops: 0n, maxbw: 0n, uuid });

  await t.remove(id);

  deepStrictEqual(t.volumes().map((volume) => volume.uuid), [uuid]);
  await rejects(t.get(id), failsWith("NOT_FOUND", new RegExp(`no volume of that UUID, "pvc-1" is ${uuid}`)));
  strictEqual(parsePoseidonId(id).uuid, first?.uuid);
});

Deno.test("a volume that was renamed is found by its UUID, and its ID says the new name", async () => {
  await using t = await startPoseidonBackend();
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
    await using t = await startPoseidonBackend();
    const { id } = await t.create();
    t.sim.control.fail({ rpc: "DeleteVolume", drop: true, when });

    await t.remove(id);

    strictEqual(t.volumes().length, 0);
    strictEqual(t.calls("DeleteVolume"), when === "before" ? 2 : 1);
  });
}

Deno.test("DeleteVolume un-exports a volume that says it is exported and is nowhere", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  const made = t.volumes()[0];
  if (made !== undefined) made.isMounted = true;

  await t.remove(id);

  strictEqual(t.volumes().length, 0);
});

Deno.test("DeleteVolume on an array that is not there is FAILED_PRECONDITION", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();

  await rejects(t.remove(id.replace("POSArray", "Other")), failsWith("FAILED_PRECONDITION", /has no array "Other"/));
});

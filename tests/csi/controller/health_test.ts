/** The health calls of CSI 1.13 on the controller, over real sockets. */
import assert from "node:assert/strict";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { Controller, ControllerServiceCapability_RPC_Type as ControllerRpc } from "../../../proto/gen/csi_pb.ts";
import { answers } from "../../support/controller_service.ts";
import { reportedHealth, startHealth } from "../../support/health.ts";

const controller = Controller.method;

for (
  const [circumstance, settings, announced] of [
    ["without the switch", { volumeHealth: false }, []],
    ["with the switch", {}, ["GET_VOLUME_HEALTH", "LIST_VOLUME_HEALTH"]],
    ["with the switch and no cluster file", { clusterFile: false }, ["GET_VOLUME_HEALTH"]],
  ] as const
) {
  Deno.test(`the controller ${circumstance} announces ${announced.join(" and ") || "no health"}`, async () => {
    await using env = await startHealth(settings);

    const { capabilities } = await env.call(controller.controllerGetCapabilities, {});

    const names = capabilities.map(({ type }) => type.case === "rpc" ? ControllerRpc[type.value.type] : "");
    assert.deepEqual(names.filter((name) => name?.endsWith("_HEALTH")), announced);
    // Unknown to 1.13, used by orchestrators of 1.12: the switch does not take it away.
    assert.equal(names.includes("VOLUME_CONDITION"), !("clusterFile" in settings));
  });
}

Deno.test("the health calls of the controller answer UNIMPLEMENTED without the switch", async () => {
  await using env = await startHealth({ volumeHealth: false });
  const volumeId = await env.create("v1");

  await assert.rejects(
    env.call(controller.controllerGetVolumeHealth, { volumeId }),
    answers("UNIMPLEMENTED", /ControllerGetVolumeHealth/),
  );
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNIMPLEMENTED", /ControllerListVolumeHealth/),
  );
});

Deno.test("ControllerListVolumeHealth answers UNIMPLEMENTED without a cluster file", async () => {
  await using env = await startHealth({ clusterFile: false });

  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNIMPLEMENTED", /ControllerListVolumeHealth/),
  );
});

for (
  const [protection, what, message] of [
    ["FullyProtected", [], /^$/],
    ["Degraded", ["DEGRADED ReplicaMissing"], /^a replica is missing: reads and writes go on \(LightOS: Degraded/],
    ["ReadOnly", ["INACCESSIBLE ReadOnly"], /^too few replicas are left: writes fail \(LightOS: ReadOnly/],
    ["NotAvailable", ["INACCESSIBLE NotAvailable"], /^no replica can be reached: .* \(LightOS: NotAvailable/],
  ] as const
) {
  Deno.test(
    `ControllerGetVolumeHealth of a volume that LightOS shows as ${protection} reports ${what[0] ?? "nothing"}`,
    async () => {
      await using env = await startHealth({ clusterFile: false });
      const volumeId = await env.create("v1");
      env.protect(volumeId, protection);

      const { volumeHealth } = await env.call(controller.controllerGetVolumeHealth, { volumeId, secrets: env.secrets });

      assert.equal(volumeHealth?.volumeId, volumeId);
      const { what: found, messages } = reportedHealth(volumeHealth);
      assert.deepEqual(found, what);
      assert.match(messages, message);
    },
  );
}

Deno.test("ControllerGetVolumeHealth of a volume that is being set back to a snapshot reports INACCESSIBLE", async () => {
  await using env = await startHealth();
  const volumeId = await env.create("v1");
  env.simulator.control.setVolume(parseVolumeId(volumeId).uuid, { state: "Rollback" });

  const { volumeHealth } = await env.call(controller.controllerGetVolumeHealth, { volumeId });
  const { entries } = await env.call(controller.controllerListVolumeHealth, {});

  assert.deepEqual(reportedHealth(volumeHealth).what, ["INACCESSIBLE Rollback"]);
  assert.match(reportedHealth(volumeHealth).messages, /^its content is being set back to a snapshot/);
  assert.deepEqual(entries.map((entry) => reportedHealth(entry).what), [["INACCESSIBLE Rollback"]]);
});

Deno.test("ControllerGetVolumeHealth answers NOT_FOUND for an unknown volume, INVALID_ARGUMENT for none", async () => {
  await using env = await startHealth();
  const other = (await env.create("v1")).replace(/nguid:[^|]+/, "nguid:6bb32fb5-99aa-4a4c-a4e7-30b7787bbd66");
  const health = (volumeId: string) =>
    env.call(controller.controllerGetVolumeHealth, { volumeId, secrets: env.secrets });

  await assert.rejects(health(other), answers("NOT_FOUND", /read volume 6bb32fb5/));
  await assert.rejects(health("none-exist-id"), answers("NOT_FOUND", /none-exist-id/));
  await assert.rejects(health(""), answers("INVALID_ARGUMENT", /^Cannot report the health of a volume: volume_id is/));
});

Deno.test("ControllerGetVolumeHealth without a token fails, and does not report the volume as healthy", async () => {
  await using env = await startHealth({ clusterFile: false });
  const volumeId = await env.create("v1");

  await assert.rejects(
    env.call(controller.controllerGetVolumeHealth, { volumeId }),
    answers("UNAUTHENTICATED", /GetVolume with UNAUTHENTICATED/),
  );
});

Deno.test("ControllerListVolumeHealth leaves healthy volumes out, and forgets those that have recovered", async () => {
  await using env = await startHealth();
  const ids = [await env.create("v1"), await env.create("v2"), await env.create("v3")] as const;
  env.protect(ids[0], "Degraded");
  env.protect(ids[2], "NotAvailable");
  const list = async () =>
    (await env.call(controller.controllerListVolumeHealth, {})).entries
      .map((health) => `${health.volumeId} ${reportedHealth(health).what.join()}`).sort();

  const before = await list();
  env.protect(ids[0], "FullyProtected");
  const after = await list();

  const gone = `${ids[2]} INACCESSIBLE NotAvailable`;
  assert.deepEqual(before, [`${ids[0]} DEGRADED ReplicaMissing`, gone].sort());
  assert.deepEqual(after, [gone]);
});

Deno.test("ControllerListVolumeHealth in pages of one reports each volume once, with few calls to the cluster", async () => {
  await using env = await startHealth();
  const ids: string[] = [];
  for (let i = 0; i < 12; i++) ids.push(await env.create(`v${i}`));
  const troubled = ids.filter((_, i) => i % 4 === 1);
  for (const id of troubled) env.protect(id, "ReadOnly");
  env.simulator.control.resetCalls();

  const found: string[] = [];
  let startingToken = "";
  do {
    const page = await env.call(controller.controllerListVolumeHealth, { maxEntries: 1, startingToken });
    assert.equal(page.entries.length, 1);
    found.push(...page.entries.map(({ volumeId }) => volumeId));
    startingToken = page.nextToken;
  } while (startingToken !== "");

  assert.deepEqual(found.sort(), troubled.sort());
  // Two for each page: what there is, and that it was all.
  assert.ok((env.simulator.control.calls()["ListVolumes"]?.total ?? 0) <= 2 * troubled.length);
});

Deno.test("ControllerListVolumeHealth of a healthy cluster is empty", async () => {
  await using env = await startHealth();
  await env.create("v1");

  const { entries, nextToken } = await env.call(controller.controllerListVolumeHealth, {});

  assert.deepEqual([entries, nextToken], [[], ""]);
});

Deno.test("ControllerListVolumeHealth takes its token from the secrets of the call where the file has none", async () => {
  await using env = await startHealth({ jwt: false });
  env.protect(await env.create("v1"), "Degraded");

  const { entries } = await env.call(controller.controllerListVolumeHealth, { secrets: env.secrets });

  assert.equal(entries.length, 1);
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, {}),
    answers("UNAUTHENTICATED", /^Cannot list abnormal volumes: /),
  );
});

Deno.test("ControllerListVolumeHealth rejects bad pages", async () => {
  await using env = await startHealth();

  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, { maxEntries: -1 }),
    answers("INVALID_ARGUMENT", /^Cannot list the health of volumes: max_entries -1 is negative$/),
  );
  await assert.rejects(
    env.call(controller.controllerListVolumeHealth, { startingToken: "x" }),
    answers("ABORTED", /starting_token "x" is not one that leads on/),
  );
});

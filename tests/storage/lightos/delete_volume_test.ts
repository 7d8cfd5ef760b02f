/** DeleteVolume on LightOS. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { failsWith, hostA, none, openLightos, startLightos, within } from "../../support/backends.ts";

Deno.test("promise 19: deleteVolume by a process that never saw the volume deletes it", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  await using restarted = openLightos(env.simulator);

  await restarted.deleteVolume(within(5000), none, id);

  const left = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(left.filter(({ state }) => state !== "Deleting"), []);
});

Deno.test("deleteVolume of an absent volume, and twice in a row, is done", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());

  await env.backend.deleteVolume(within(5000), none, id);
  await env.backend.deleteVolume(within(5000), none, id);
  await env.backend.deleteVolume(within(5000), none, id.replace(uuid, crypto.randomUUID()));
});

Deno.test("deleteVolume refuses with FAILED_PRECONDITION while a host may connect, and names it", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await rejects(
    env.backend.deleteVolume(within(5000), none, id),
    failsWith("FAILED_PRECONDITION", /a\.node may still connect to it, detach it there first/),
  );
  strictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).state, "Available");
});

for (const when of ["before", "after"] as const) {
  Deno.test(`promise 8: deleteVolume whose connection is lost ${when} the effect deletes the volume`, async () => {
    await using env = await startLightos();
    const { id } = await env.backend.createVolume(within(5000), none, env.request());
    env.simulator.control.fail({ rpc: "DeleteVolume", count: 1, drop: true, when });

    await env.backend.deleteVolume(within(8000), none, id);

    const left = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
    deepStrictEqual(left.filter(({ state }) => state !== "Deleting"), []);
  });
}

Deno.test("deleteVolume waits while the volume is Updating, and says so at its deadline", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.setVolume(uuid, { state: "Updating" });

  await rejects(
    // It looks again 1.3 and 2.1 s after its beginning: on a busy machine too, this deadline comes between two looks.
    env.backend.deleteVolume(within(1900), none, id),
    failsWith("DEADLINE_EXCEEDED", /LightOS shows it as Updating/),
  );
  env.simulator.control.setVolume(uuid, { state: "Available" });
  await env.backend.deleteVolume(within(5000), none, id);
});

Deno.test("deleteVolume of what a failed creation left is done", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.setVolume(uuid, { state: "Failed" });

  await env.backend.deleteVolume(within(5000), none, id);
});

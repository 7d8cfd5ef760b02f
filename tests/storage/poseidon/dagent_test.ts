/** Calls to DAgent: one change after the other, and what callers learn whose time is over. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { eventually } from "../../support/simulator.ts";
import { failsWith, none, startPoseidonBackend, within } from "../../support/backends.ts";

Deno.test("promise 9: the error of a call that waits too long for its turn says what is running, and that work continues", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.fail({ rpc: "CreateVolume", hold: true });
  const first = t.create("pvc-1");
  await eventually("the first creation waits", () => t.sim.control.held().length === 1);

  const second = t.backend.createVolume(within(200), none, t.request({ name: "pvc-2" }));

  await rejects(
    second,
    failsWith(
      "ABORTED",
      /Cannot create volume "pvc-2" in time: .*, and creating volume "pvc-1" has been running for \d+ s/,
    ),
  );
  t.sim.control.releaseHeld();
  await first;
  deepStrictEqual(t.volumes().map(({ name }) => name), ["pvc-1"]);
});

Deno.test("promise 9: a change whose caller gave up keeps the next one waiting until it has ended", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.fail({ rpc: "CreateVolume", hold: true });
  const first = t.backend.createVolume(within(300), none, t.request());
  await rejects(
    first,
    failsWith("DEADLINE_EXCEEDED", /has not answered POST \/volumes after [\d.]+ s; it goes on there/),
  );

  const second = t.create("pvc-2");
  const third = t.backend.createVolume(within(200), none, t.request({ name: "pvc-3" }));
  await rejects(third, failsWith("ABORTED", /creating volume "pvc-1" has been running/));
  t.sim.control.releaseHeld();

  await second;
  deepStrictEqual(t.volumes().map(({ name }) => name).sort(), ["pvc-1", "pvc-2"]);
  strictEqual((await t.create()).uuid, t.volumes()[0]?.uuid);
});

Deno.test("changes of one DAgent never overlap, however many are asked for at once", async () => {
  await using t = await startPoseidonBackend({ behaviour: { callMs: 1 } });
  let [now, most] = [0, 0];
  using _watch = t.sim.control.watchCalls(({ phase, rpc }) => {
    if (!/^(Create|Delete|Mount|Unmount|Add)/.test(rpc)) return;
    now += phase === "begin" ? 1 : -1;
    most = Math.max(most, now);
  });

  const volumes = await Promise.all(Array.from({ length: 8 }, (_, number) => t.create(`pvc-${number}`)));
  await Promise.all(volumes.map(({ id }) => t.grant(id)));
  await Promise.all(volumes.map(({ id }) => t.revoke(id)));
  await Promise.all(volumes.map(({ id }) => t.remove(id)));

  strictEqual(most, 1);
  deepStrictEqual(t.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
});

Deno.test("a DAgent that has lost PoseidonOS, says nothing, or is gone is UNAVAILABLE within the caller's time", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  t.sim.control.behave({ dead: true });
  await rejects(t.get(id), failsWith("UNAVAILABLE", /answered GET \/array\/POSArray with 11020: cannot dial/));
  t.sim.control.behave({ dead: false });
  await t.sim.control.api.hang();
  await rejects(
    t.backend.getVolume(within(200), none, id),
    failsWith("DEADLINE_EXCEEDED", /has not answered GET \/array\/POSArray after [\d.]+ s; repeat the call/),
  );
  await t.sim.control.api.stop();
  await rejects(
    t.get(id),
    failsWith("UNAVAILABLE", /the DAgent at \S+ cannot be reached, or broke off GET .*refused/i),
  );
  await t.sim.control.api.start();

  strictEqual((await t.get(id)).id, id);
});

Deno.test("a DAgent that panics (500 without a word) is looked at again", async () => {
  await using t = await startPoseidonBackend();
  t.sim.control.fail({ rpc: "CreateVolume", event: "panic" });

  await t.create();

  strictEqual(t.volumes().length, 1);
  strictEqual(t.calls("CreateVolume"), 2);
});

/** Repeated calls to LightOS find what an earlier one has made, whatever the cluster answered. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { failsWith, gib, none, startCluster, within } from "../../support/backends.ts";

for (
  const code of ["RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION", "NOT_FOUND"] as const
) {
  Deno.test(`promise 18: CreateVolume whose repeat the cluster refuses with ${code} answers the volume that is there`, async () => {
    await using env = await startCluster(1);
    const made = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "refused" });

    const again = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));

    deepStrictEqual(again, made);
    await rejects(env.backend.createVolume(within(5000), none, env.request("pvc-2")), failsWith(code, /refused/));
  });

  Deno.test(`promise 18: CreateVolume that the cluster refuses with ${code} is not final while the volume cannot be looked for`, async () => {
    await using env = await startCluster(1);
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "refused" });
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code: "UNAVAILABLE", message: "no quorum" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.request("pvc-1")),
      failsWith("UNAVAILABLE", /: refused; and whether it is there already cannot be seen: .*no quorum$/),
    );
  });

  Deno.test(`promise 18: CreateSnapshot whose repeat the cluster refuses with ${code} answers the snapshot that is there`, async () => {
    await using env = await startCluster(1);
    const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
    const { snapshots } = env.backend;
    ok(snapshots);
    // The first request reaches the cluster after it was looked for; the answer is lost.
    env.simulator.control.fail({ rpc: "CreateSnapshot", count: 1, code, message: "refused", when: "after" });

    const taken = await snapshots.createSnapshot(within(5000), none, { name: "s", sourceVolumeId: id });

    strictEqual(env.simulator.control.cluster.snapshots.filter(({ name }) => name === "s").length, 1);
    strictEqual((await snapshots.getSnapshot(within(5000), none, taken.id)).id, taken.id);
  });
}

for (const code of ["INTERNAL", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateVolume is not final when the cluster made it, answered ${code}, and answers the look with that too`, async () => {
    await using env = await startCluster(1);
    env.simulator.control.fail({ rpc: "CreateVolume", count: 0, code, message: "rpc fault", when: "after" });
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code, message: "rpc fault" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.request("pvc-1")),
      failsWith(
        "UNAVAILABLE",
        /answered CreateVolume with .*whether it is there already cannot be seen: .*ListVolumes/,
      ),
    );
    strictEqual(env.volumes().length, 1);
  });
}

for (const code of ["INTERNAL", "UNAUTHENTICATED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateVolume is not final when the volume is being made and the look at it is answered with ${code}`, async () => {
    await using env = await startCluster(1);
    env.simulator.control.behave({ holdCreations: true });
    env.simulator.control.fail({ rpc: "GetVolume", count: 0, code, message: "rpc fault" });

    await rejects(
      env.backend.createVolume(within(5000), none, env.request("pvc-1")),
      failsWith("UNAVAILABLE", new RegExp(`answered GetVolume with ${code}: rpc fault.*; repeat the call$`)),
    );
    strictEqual(env.volumes().length, 1);

    env.simulator.control.clearFaults();
    env.simulator.control.releaseCreations();
    strictEqual((await env.backend.createVolume(within(5000), none, env.request("pvc-1"))).uuid, env.volumes()[0]);
  });
}

for (const code of ["INTERNAL", "RESOURCE_EXHAUSTED"] as const) {
  Deno.test(`promise 30: CreateSnapshot and clones are not final while the look for what was made before is answered with ${code}`, async () => {
    const unseen = new RegExp(`answered List(Snapshots|Volumes) with ${code}: rpc fault; repeat the call$`);
    await using env = await startCluster(1);
    const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
    const { snapshots } = env.backend;
    ok(snapshots);
    env.simulator.control.fail({ rpc: "ListSnapshots", count: 0, code, message: "rpc fault" });

    const snapshot = () => snapshots.createSnapshot(within(5000), none, { name: "s", sourceVolumeId: id });
    await rejects(snapshot, failsWith("UNAVAILABLE", unseen));
    const clone = () =>
      env.backend.createVolume(within(5000), none, env.request("pvc-2", { source: { type: "volume", id } }));
    await rejects(clone, failsWith("UNAVAILABLE", unseen));

    env.simulator.control.clearFaults();
    await clone();
    env.simulator.control.fail({ rpc: "ListVolumes", count: 0, code, message: "rpc fault" });
    await rejects(clone, failsWith("UNAVAILABLE", unseen));
    const states = env.simulator.control.cluster.snapshots.map(({ state }) => state).filter((state) =>
      state !== "Deleting"
    );
    deepStrictEqual(states, [], "no helper is left");
  });
}

Deno.test("promise 18: CreateVolume repeated on a full cluster that looks for space first answers the volume that is there", async () => {
  await using env = await startCluster(1);
  env.simulator.control.behave({ nameCheckedLast: true });
  const { capacityBytes } = env.simulator.control.cluster;
  const most = env.request("pvc-1", { requiredBytes: capacityBytes / gib * gib });
  const made = await env.backend.createVolume(within(5000), none, most);

  deepStrictEqual(await env.backend.createVolume(within(5000), none, most), made);
  await rejects(
    env.backend.createVolume(within(5000), none, { ...most, name: "pvc-2" }),
    failsWith("RESOURCE_EXHAUSTED"),
  );
});

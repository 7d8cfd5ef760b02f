/** CreateVolume on LightOS: one volume for each request, whatever happens to answers. */
import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { parseVolumeId } from "../../../lib/volume_id.ts";
import { failsWith, gib, none, startLightos, within } from "../../support/backends.ts";

Deno.test("createVolume makes a volume that no host may connect to, with an ID in the incumbent's form", async () => {
  await using env = await startLightos();

  const volume = await env.backend.createVolume(within(5000), none, env.request({ requiredBytes: 3n * gib - 5n }));

  strictEqual(volume.capacityBytes, 3n * gib);
  strictEqual(volume.name, "pvc-1");
  deepStrictEqual(volume.hosts, []);
  strictEqual(volume.condition, undefined);
  const id = parseVolumeId(volume.id);
  strictEqual(id.uuid, volume.uuid);
  strictEqual(id.project, "default");
  strictEqual(id.scheme, "grpc");
  strictEqual(
    env.simulator.control.cluster.getVolume({ project: "default", uuid: volume.uuid }).acl.join(),
    "ALLOW_NONE",
  );
});

Deno.test("createVolume repeated answers the same volume", async () => {
  await using env = await startLightos();
  const first = await env.backend.createVolume(within(5000), none, env.request());

  const second = await env.backend.createVolume(within(5000), none, env.request());

  deepStrictEqual(second, first);
  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 1);
});

Deno.test("createVolume under a taken name answers ALREADY_EXISTS with every difference", async () => {
  await using env = await startLightos();
  await env.backend.createVolume(within(5000), none, env.request());

  await rejects(
    env.backend.createVolume(
      within(5000),
      none,
      env.request({ requiredBytes: 2n * gib }, { "replica-count": "2", compression: "enabled" }),
    ),
    failsWith(
      "ALREADY_EXISTS",
      /size is 1073741824 bytes, asked is 2147483648 bytes/,
      /replica-count is 1, asked is 2/,
      /compression is false, asked is true/,
    ),
  );
});

Deno.test("createVolume under a taken name refuses a volume above the limit", async () => {
  await using env = await startLightos();
  await env.backend.createVolume(within(5000), none, env.request({ requiredBytes: 3n * gib }));

  await rejects(
    env.backend.createVolume(within(5000), none, env.request({ requiredBytes: gib, limitBytes: 2n * gib })),
    failsWith("ALREADY_EXISTS", /size is 3221225472 bytes, asked is at most 2147483648 bytes/),
  );
});

Deno.test("createVolume at its deadline reports the state, and the repeat continues with the same volume", async () => {
  await using env = await startLightos();
  env.simulator.control.behave({ holdCreations: true });

  await rejects(
    env.backend.createVolume(within(1900), none, env.request()),
    failsWith(
      "DEADLINE_EXCEEDED",
      /^Cannot create volume "pvc-1" in time: LightOS shows volume .* as Creating; repeat/,
    ),
  );
  env.simulator.control.releaseCreations();
  const volume = await env.backend.createVolume(within(5000), none, env.request());

  const all = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(all.map(({ uuid }) => uuid), [volume.uuid]);
});

Deno.test("promise 18: createVolume ignores what a failed creation left", async () => {
  await using env = await startLightos();
  env.simulator.control.behave({ failCreations: 1 });

  await rejects(
    env.backend.createVolume(within(5000), none, env.request()),
    failsWith("UNAVAILABLE", /could not make it \(volume .* is Failed\), the next attempt makes another/),
  );
  const volume = await env.backend.createVolume(within(5000), none, env.request());

  const states = env.simulator.control.cluster.listVolumes({ project: "default" }).map(({ uuid, state }) => ({
    uuid,
    state,
  }));
  deepStrictEqual(states.filter(({ state }) => state !== "Failed"), [{ uuid: volume.uuid, state: "Available" }]);
});

Deno.test("createVolume makes a new volume while its namesake is being deleted", async () => {
  await using env = await startLightos();
  const old = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.behave({ deletionMs: 60_000 });
  await env.backend.deleteVolume(within(5000), none, old.id);

  const volume = await env.backend.createVolume(within(5000), none, env.request());

  ok(volume.uuid !== old.uuid);
});

Deno.test("promise 8: createVolume whose answer is lost makes one volume", async () => {
  await using env = await startLightos();
  env.simulator.control.fail({ rpc: "CreateVolume", count: 1, drop: true, when: "after" });

  const volume = await env.backend.createVolume(within(8000), none, env.request());

  const all = env.simulator.control.cluster.listVolumes({ project: "default", showAll: true });
  deepStrictEqual(all.map(({ uuid }) => uuid), [volume.uuid]);
});

Deno.test("createVolume after INTERNAL from the cluster looks whether the volume is there", async () => {
  await using env = await startLightos();
  env.simulator.control.fail({
    rpc: "CreateVolume",
    count: 1,
    code: "INTERNAL",
    message: "etcd hiccup",
    when: "after",
  });

  const volume = await env.backend.createVolume(within(8000), none, env.request());

  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 1);
  strictEqual(volume.capacityBytes, gib);
});

Deno.test("promise 22: createVolume on a full cluster is RESOURCE_EXHAUSTED, with the cluster's words and the endpoint", async () => {
  await using env = await startLightos();
  const tooMany = 1n << 50n;

  await rejects(
    env.backend.createVolume(within(5000), none, env.request({ requiredBytes: tooMany })),
    failsWith(
      "RESOURCE_EXHAUSTED",
      /^Cannot create volume "pvc-1": LightOS at 127\.0\.0\.1:\d+ answered CreateVolume with RESOURCE_EXHAUSTED: /,
    ),
  );
  strictEqual(env.simulator.control.cluster.listVolumes({ project: "default", showAll: true }).length, 0);
});

Deno.test("createVolume with host encryption says so in the ID and in a label, and is not the volume without it", async () => {
  await using env = await startLightos();
  const encrypted = env.request({}, { "host-encryption": "enabled" });

  const { id } = await env.backend.createVolume(within(5000), none, encrypted);
  const again = await env.backend.createVolume(within(5000), none, encrypted);

  strictEqual(parseVolumeId(id).hostEncryption, "luks2");
  strictEqual(again.id, id);
  await rejects(
    env.backend.createVolume(within(5000), none, env.request()),
    failsWith("ALREADY_EXISTS", /differs: host-encryption is luks2, asked is disabled/),
  );
});

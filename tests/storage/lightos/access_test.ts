/** Access lists of LightOS volumes: who may connect, and where. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import { failsWith, hostA, hostB, none, openLightos, startLightos, within } from "../../support/backends.ts";

Deno.test("grantAccess returns where the namespace is, and the same when it is repeated", async () => {
  await using env = await startLightos({ servers: 2 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());

  const first = await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });
  const second = await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  deepStrictEqual(second, first);
  strictEqual(first.uuid, uuid);
  strictEqual(first.subsystemNqn, env.simulator.control.cluster.identity.subsystemNqn);
  strictEqual(first.addresses.length, 2);
  strictEqual(first.discovery.length, 2);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("promise 7: exclusive access for a second host is refused by the first one's name", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: false }),
    failsWith("FAILED_PRECONDITION", /^Cannot give b\.node access to volume .*: a\.node has it/),
  );
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("promise 7: of two racing exclusive grants one wins", async () => {
  await using env = await startLightos();
  await using otherController = openLightos(env.simulator);
  for (let round = 0; round < 10; round++) {
    const { id } = await env.backend.createVolume(within(5000), none, env.request({ name: `pvc-race-${round}` }));

    const results = await Promise.allSettled([
      env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false }),
      otherController.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: false }),
    ]);

    deepStrictEqual(results.map(({ status }) => status).sort(), ["fulfilled", "rejected"]);
    const winner = results[0].status === "fulfilled" ? hostA : hostB;
    deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [winner]);
  }
});

Deno.test("grantAccess that is shared lets a second host in", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());

  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostB, shared: true });
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: true });

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA, hostB]);
});

Deno.test("racing shared grants lose none", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  const hosts = [..."abcdef"].map((letter) => hostNqn(`${letter}.node`));

  await Promise.all(
    hosts.map((host) => env.backend.grantAccess(within(20_000), none, id, { hostNqn: host, shared: true })),
  );

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, hosts);
});

Deno.test("grantAccess refuses a list that is open to any host", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  await env.simulator.control.cluster.updateVolume({ project: "default", uuid }, { acl: ["ALLOW_ANY"] }, undefined);

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: true }),
    failsWith("FAILED_PRECONDITION", /open to any host \(ALLOW_ANY\), set it to ALLOW_NONE/),
  );
});

Deno.test("grantAccess to an absent volume answers NOT_FOUND", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());

  await rejects(
    env.backend.grantAccess(within(5000), none, id.replace(uuid, crypto.randomUUID()), {
      hostNqn: hostA,
      shared: false,
    }),
    failsWith("NOT_FOUND", /^Cannot give a\.node access to volume /),
  );
});

Deno.test("promise 8: grantAccess whose answer is lost is granted once", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when: "after" });

  await env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });

  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostA]);
});

Deno.test("grantAccess waits while the volume is Updating", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.setVolume(uuid, { state: "Updating" });

  const granted = env.backend.grantAccess(within(8000), none, id, { hostNqn: hostA, shared: false });
  await rejects(
    env.backend.grantAccess(within(1500), none, id, { hostNqn: hostB, shared: true }),
    failsWith("DEADLINE_EXCEEDED", /LightOS shows the volume as Updating/),
  );
  env.simulator.control.setVolume(uuid, { state: "Available" });

  strictEqual((await granted).uuid, uuid);
});

Deno.test("promise 24: revokeAccess takes the host from the access list, twice in a row", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false });

  await env.backend.revokeAccess(within(5000), none, id, hostA);
  await env.backend.revokeAccess(within(5000), none, id, hostA);

  deepStrictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).acl, ["ALLOW_NONE"]);
});

Deno.test("revokeAccess of one host leaves the others, of every host leaves none", async () => {
  await using env = await startLightos();
  const { id } = await env.backend.createVolume(within(5000), none, env.request());
  for (const host of [hostA, hostB]) {
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: host, shared: true });
  }

  await env.backend.revokeAccess(within(5000), none, id, hostA);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, [hostB]);
  await env.backend.revokeAccess(within(5000), none, id, undefined);
  deepStrictEqual((await env.backend.getVolume(within(5000), none, id)).hosts, []);
});

Deno.test("revokeAccess of an absent volume is done", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());

  await env.backend.revokeAccess(within(5000), none, id.replace(uuid, crypto.randomUUID()), hostA);
});

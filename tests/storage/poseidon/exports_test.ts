/** Exports of PoseidonOS volumes: one node at a time. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import type { StorageBackend } from "../../../lib/storage/backend.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { poseidonParameters, type TestPoseidon } from "../../support/poseidon.ts";
import { failsWith, gib, hostA, hostB, none, quiet, startPoseidonBackend, within } from "../../support/backends.ts";

Deno.test("granting access exports the volume in a subsystem of volume and node, with room for nothing else", async () => {
  await using t = await startPoseidonBackend();
  const { id, uuid } = await t.create();

  const namespace = await t.grant(id);

  const nqn = `nqn.2019-04.pos:lbcsi:${uuid}:a.node`;
  deepStrictEqual(namespace, {
    uuid,
    subsystemNqn: nqn,
    addresses: [{ traddr: "127.0.0.1", trsvcid: "1158" }],
    discovery: [],
  });
  const [subsystem, ...others] = t.model.subsystems;
  strictEqual(others.length, 0);
  strictEqual(subsystem?.nqn, nqn);
  deepStrictEqual([subsystem?.maxNamespaces, subsystem?.allowAnyHost], [1, true]);
  deepStrictEqual(subsystem?.listeners, [{ targetAddress: "127.0.0.1", transportServiceId: "1158" }]);
  deepStrictEqual(subsystem?.namespaces, [{ nsid: 1, array: "POSArray", volumeUuid: uuid }]);
});

Deno.test("promise 7: the error for a second node names the first, until the first has released the volume", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  await t.grant(id);

  await rejects(
    t.grant(id, hostB),
    failsWith("FAILED_PRECONDITION", /give b\.node access .* a\.node has it, .*detached there/),
  );
  await t.revoke(id, hostB);
  deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
  await t.revoke(id, hostA);
  await t.grant(id, hostB);

  deepStrictEqual([...(await t.get(id)).hosts], [hostB]);
});

Deno.test("promise 7: of two nodes that ask at once, one gets the volume", async () => {
  await using t = await startPoseidonBackend();
  await using other = poseidonBackend({ log: quiet });
  const { id } = await t.create();
  const grant = (backend: StorageBackend, host: string) =>
    backend.grantAccess(within(10_000), none, id, {
      hostNqn: host,
      shared: false,
      volumeContext: poseidonParameters(t.sim),
    });

  const outcomes = await Promise.allSettled([grant(t.backend, hostA), grant(other, hostB)]);

  strictEqual(outcomes.filter(({ status }) => status === "fulfilled").length, 1, JSON.stringify(outcomes));
  strictEqual(t.model.subsystems.filter(({ namespaces }) => namespaces.length > 0).length, 1);
});

Deno.test("a volume that another program exports is refused and left as it is", async () => {
  await using t = await startPoseidonBackend();
  const { id, uuid } = await t.create();
  const nqn = "nqn.2019-04.pos:pvc-1";
  t.model.createSubsystem({ nqn, serialNumber: "1", modelNumber: "m", maxNamespaces: 256, allowAnyHost: true });
  await t.model.mountVolume("POSArray", "pvc-1", nqn);

  await rejects(
    t.grant(id),
    failsWith("FAILED_PRECONDITION", /any host that connects to nqn\.2019-04\.pos:pvc-1 has it, .*volume unmount/),
  );
  await rejects(
    t.remove(id),
    failsWith("FAILED_PRECONDITION", /any host that connects to nqn\.2019-04\.pos:pvc-1 may still use it/),
  );
  await t.revoke(id, hostA);

  strictEqual(t.model.subsystems[0]?.namespaces[0]?.volumeUuid, uuid);
});

Deno.test("revoking access from every host un-exports also what another program exports", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  const nqn = "nqn.2019-04.pos:pvc-1";
  t.model.createSubsystem({ nqn, serialNumber: "1", modelNumber: "m", maxNamespaces: 256, allowAnyHost: true });
  await t.model.mountVolume("POSArray", "pvc-1", nqn);

  await t.backend.revokeAccess(within(5000), none, id, undefined);

  deepStrictEqual(t.model.subsystems.map(({ nqn, namespaces }) => [nqn, namespaces]), [[nqn, []]]);
});

Deno.test("promise 8: after a restart of PoseidonOS, granting the same node exports it under the same name", async () => {
  await using t = await startPoseidonBackend({}, true);
  const { id } = await t.create();
  const before = await t.grant(id);
  await t.sim.control.restart();
  strictEqual(t.model.subsystems.length, 0);
  // The attacher of Kubernetes finds out by this list, and asks again.
  const listed = await t.backend.listing?.listVolumes(within(5000), { maxEntries: 0, startingToken: "" });
  deepStrictEqual(listed?.entries.map(({ id, hosts }) => [id, [...hosts]]), [[id, []]]);

  deepStrictEqual(await t.grant(id), before);

  strictEqual(t.model.subsystems[0]?.listeners.length, 1);
});

Deno.test("granting access adds a listener that is missing", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  await t.grant(id);
  t.model.subsystems[0]?.listeners.splice(0);

  await t.grant(id);

  strictEqual(t.model.subsystems[0]?.listeners.length, 1);
});

Deno.test("a volume of the vendor's driver is used with an ID and attributes that were written by hand", async () => {
  await using t = await startPoseidonBackend();
  const uuid = crypto.randomUUID();
  await t.model.createVolume({ array: "POSArray", name: "pvc-old", sizeBytes: gib, maxiops: 0n, maxbw: 0n, uuid });
  const id = `pos:${t.sim.addresses.dagent}|array:POSArray|vol:pvc-old|uuid:${uuid}`;
  // What that driver left in the PersistentVolume, as far as this one reads it, and more.
  const volumeContext = { ...poseidonParameters(t.sim), targetAddr: "127.0.0.1", nqn: "nqn.2019-04.pos:pvc-old" };

  const granted = t.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false, volumeContext });

  strictEqual((await granted).subsystemNqn, `nqn.2019-04.pos:lbcsi:${uuid}:a.node`);
  await t.revoke(id);
  strictEqual(t.volumes().length, 1);
});

for (
  const [what, prepare, context, message] of [
    [
      "no TCP transport",
      (t: TestPoseidon) => t.control.behave({ tcpTransport: false }),
      {},
      /answered POST \/listener with 2208 .*; it has no TCP transport/,
    ],
    [
      "an address of somebody else",
      () => {},
      { targetAddress: "192.0.2.7" },
      /; targetAddress 192\.0\.2\.7 is not one of its addresses, or port 1158 is taken/,
    ],
    [
      "a PersistentVolume without attributes",
      () => {},
      { targetAddress: undefined },
      /volume attribute "targetAddress" is missing.*the PersistentVolume needs the attributes targetAddress/,
    ],
  ] as const
) {
  Deno.test(`granting access with ${what} is FAILED_PRECONDITION and says so`, async () => {
    await using t = await startPoseidonBackend();
    const { id } = await t.create();
    prepare(t.sim);
    const volumeContext = Object.fromEntries(
      Object.entries({ ...poseidonParameters(t.sim), ...context }).filter(([, value]) => value !== undefined),
    ) as Record<string, string>;

    const granted = t.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false, volumeContext });

    await rejects(granted, failsWith("FAILED_PRECONDITION", message));
  });
}

for (const rpc of ["CreateSubsystem", "AddListener", "MountVolume"] as const) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: granting access goes on when the connection is lost ${when} ${rpc}`, async () => {
      await using t = await startPoseidonBackend();
      const { id } = await t.create();
      t.sim.control.fail({ rpc, drop: true, when });

      await t.grant(id);

      deepStrictEqual([...(await t.get(id)).hosts], [hostA]);
      strictEqual(t.calls(rpc), when === "before" ? 2 : 1);
    });
  }
}

for (const rpc of ["UnmountVolume", "DeleteSubsystem"] as const) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: revoking access goes on when the connection is lost ${when} ${rpc}`, async () => {
      await using t = await startPoseidonBackend();
      const { id } = await t.create();
      await t.grant(id);
      t.sim.control.fail({ rpc, drop: true, when });

      await t.revoke(id);

      deepStrictEqual(t.sim.control.leftovers().access, []);
      strictEqual(t.calls(rpc), when === "before" ? 2 : 1);
    });
  }
}

Deno.test("promise 24: revoking access succeeds only when the namespace is gone, though PoseidonOS has failed halfway", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();
  await t.grant(id);
  t.sim.control.behave({ halfUnmounts: 1 });

  await t.revoke(id);

  deepStrictEqual(t.sim.control.leftovers().access, []);
  await t.remove(id);
  strictEqual(t.volumes().length, 0);
});

Deno.test("a subsystem of ours with another volume in it is not deleted", async () => {
  await using t = await startPoseidonBackend();
  const [one, two] = [await t.create("pvc-1"), await t.create("pvc-2")];
  const { subsystemNqn } = await t.grant(one.id);
  const subsystem = t.model.subsystems[0];
  if (subsystem !== undefined) subsystem.maxNamespaces = 2;
  await t.model.mountVolume("POSArray", "pvc-2", subsystemNqn);

  await rejects(
    t.revoke(one.id),
    failsWith("FAILED_PRECONDITION", new RegExp(`namespace ${two.uuid} into ${subsystemNqn}`)),
  );

  deepStrictEqual(subsystem?.namespaces.map(({ volumeUuid }) => volumeUuid), [two.uuid]);
});

Deno.test("a node ID that does not fit into an NQN is refused with the length that fits", async () => {
  await using t = await startPoseidonBackend();
  const { id } = await t.create();

  const granted = t.grant(id, hostNqn(`${"n".repeat(170)}.node`));

  await rejects(granted, failsWith("FAILED_PRECONDITION", /a node ID has 164 characters at most, .* has 175/));
});

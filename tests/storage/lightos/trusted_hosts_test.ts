/** The keys of nodes as trusted hosts of a simulated LightOS cluster. */
import assert from "node:assert/strict";
import { DhchapKey, type DhchapKeys } from "../../../lib/auth_key.ts";
import { toPublishContext } from "../../../lib/namespace.ts";
import { authenticatedCluster, openBackend } from "../../support/authenticated_cluster.ts";
import { newKeys, nodeId, nodeNqn, other, revealKeys } from "../../support/key_machine.ts";
import { rejects } from "../../support/node_calls.ts";

for (
  const [kind, context] of [[undefined, undefined], ["none", undefined], ["bidirectional", "bidirectional"]] as const
) {
  Deno.test(`CreateVolume keeps in-band-auth ${kind} in the volume context`, async () => {
    await using c = await authenticatedCluster(kind);

    assert.deepEqual(c.volume.context, context === undefined ? undefined : { "in-band-auth": context });
    assert.deepEqual((await c.make("pvc-1")).context, c.volume.context);
  });
}

Deno.test("CreateVolume refuses another kind of authentication, and names those that there are", async () => {
  await rejects(
    authenticatedCluster("sometimes"),
    "INVALID_ARGUMENT",
    /StorageClass parameter "in-band-auth" "sometimes" is not one of none, unidirectional, bidirectional/,
  );
});

Deno.test("grantAccess makes a trusted host with keys before it lets the host in, once, and answers the kind alone", async () => {
  await using c = await authenticatedCluster("bidirectional");

  const namespace = await c.grant();
  const [made] = c.hosts();
  await c.grant();

  assert.equal(namespace.inBandAuth, "bidirectional");
  assert(made);
  assert.deepEqual([made.name, made.hostNqn, made.project], [nodeId, nodeNqn, "default"]);
  assert.deepEqual(c.hosts(), [made]);
  const keys = await c.keysOf("bidirectional");
  assert.deepEqual(revealKeys(keys), { host: made.hostSecret, controller: made.targetSecret });
  assert.deepEqual(revealKeys(await c.keysOf("unidirectional")), revealKeys(keys));
  const context = JSON.stringify(toPublishContext(namespace));
  for (const secret of [made.hostSecret, made.targetSecret]) assert(!context.includes(secret.slice(10)), context);
  const { SetTrustedHostSecret, UpdateVolume } = c.simulator.control.calls();
  assert.deepEqual([SetTrustedHostSecret?.total, UpdateVolume?.total], [1, 1]);
});

Deno.test("grantAccess without authentication makes no trusted host", async () => {
  await using c = await authenticatedCluster(undefined);

  const namespace = await c.grant({ "dhchap-key": "not even a key" });

  assert.equal(namespace.inBandAuth, undefined);
  assert.deepEqual(c.hosts(), []);
});

Deno.test("grantAccess adds the target's key for a class that wants it, and takes none away for one that does not", async () => {
  await using c = await authenticatedCluster("unidirectional");
  await c.grant();
  const [first] = c.hosts();
  const both = { ...await c.make("pvc-2"), context: { "in-band-auth": "bidirectional" } };

  await c.grant({}, both);
  const [second] = c.hosts();
  await c.grant();

  assert.equal(first?.targetSecret, "");
  assert.equal(second?.hostSecret, first?.hostSecret);
  assert.match(second?.targetSecret ?? "", /^DHHC-1:01:/);
  assert.deepEqual(c.hosts(), [second]);
});

Deno.test("grantAccess gives LightOS the keys of its secrets, and changes them when these do", async () => {
  await using c = await authenticatedCluster("bidirectional");
  const [first, second] = [newKeys("bidirectional"), newKeys("bidirectional")];
  const secrets = ({ host, controller }: DhchapKeys) => ({
    "dhchap-key": host.reveal(),
    "dhchap-ctrl-key": controller?.reveal() ?? "",
  });

  await c.grant(secrets(first));
  assert.deepEqual(revealKeys(await c.keysOf("bidirectional")), revealKeys(first));
  await c.grant(secrets(first));
  await c.grant(secrets(second));
  assert.deepEqual(revealKeys(await c.keysOf("bidirectional")), revealKeys(second));
  await c.grant();

  assert.deepEqual(revealKeys(await c.keysOf("bidirectional")), revealKeys(second));
  assert.equal(c.simulator.control.calls()["SetTrustedHostSecret"]?.total, 2);
});

Deno.test("grantAccess with a damaged key answers INVALID_ARGUMENT and changes nothing on the cluster", async () => {
  await using c = await authenticatedCluster("unidirectional");

  await rejects(c.grant({ "dhchap-key": "DHHC-1:01:AAAA:" }), "INVALID_ARGUMENT", /dhchap-key: is not a key/);

  assert.deepEqual([c.hosts(), c.simulator.control.leftovers().access], [[], []]);
});

Deno.test("grantAccess uses the trusted host that was made for this host under another name", async () => {
  await using c = await authenticatedCluster("unidirectional");
  const key = DhchapKey.generate().reveal();
  c.simulator.control.cluster.putTrustedHost({
    uuid: other,
    name: "made-by-hand",
    project: "default",
    hostNqn: nodeNqn,
    labels: [],
    authRequired: "",
    hostSecret: key,
    targetSecret: "",
  });

  await c.grant();

  assert.deepEqual(c.hosts().map(({ name, hostSecret }) => [name, hostSecret]), [["made-by-hand", key]]);
  assert.equal((await c.keysOf("unidirectional")).host.reveal(), key);
});

Deno.test("grantAccess refuses when the node's name is that of another host on the cluster", async () => {
  await using c = await authenticatedCluster("unidirectional");
  c.simulator.control.cluster.putTrustedHost({
    uuid: other,
    name: nodeId,
    project: "default",
    hostNqn: "nqn.theirs",
    labels: [],
    authRequired: "",
    hostSecret: "",
    targetSecret: "",
  });

  await rejects(
    c.grant(),
    "FAILED_PRECONDITION",
    /trusted host "n1.node" of project "default" is for host NQN nqn.theirs, not for nqn.*:n1.node, rename or correct it/,
  );
  assert.deepEqual(c.simulator.control.leftovers().access, []);
});

Deno.test("grantAccess with authentication refuses a cluster on which it is disabled", async () => {
  await using c = await authenticatedCluster("bidirectional", false);

  await rejects(
    c.grant(),
    "FAILED_PRECONDITION",
    /give n1.node access to volume .*: in-band-auth is "bidirectional", and in-band authentication is disabled on the LightOS cluster at 127.*, it has to be enabled there first/,
  );
  assert.deepEqual([c.hosts(), c.simulator.control.leftovers().access], [[], []]);
});

Deno.test("grantAccess refuses a volume attribute in-band-auth that is none", async () => {
  await using c = await authenticatedCluster(undefined);

  await rejects(
    c.grant({}, { ...c.volume, context: { "in-band-auth": "yes" } }),
    "INVALID_ARGUMENT",
    /volume attribute "in-band-auth" "yes" is not one of none, unidirectional, bidirectional/,
  );
});

Deno.test("racing grants of two volumes to a host agree on its keys, also of two processes", async () => {
  for (const processes of [1, 2]) {
    await using c = await authenticatedCluster("bidirectional");
    await using second = processes === 1 ? undefined : openBackend(c.simulator);
    const volumes = await Promise.all([1, 2, 3, 4].map((n) => c.make(`pvc-r${n}`)));

    await Promise.all(volumes.map((volume, n) => c.grant({}, volume, n % 2 === 0 ? c.backend : second ?? c.backend)));

    assert.equal(c.hosts().length, 1);
    const [keys, again] = [await c.keysOf("bidirectional"), await c.keysOf("bidirectional", second ?? c.backend)];
    assert.deepEqual(revealKeys(keys), revealKeys(again));
    const sets = c.simulator.control.calls()["SetTrustedHostSecret"]?.total ?? 0;
    assert(processes === 1 ? sets === 1 : sets <= 2, `${sets} times`);
  }
});

for (const rpc of ["CreateTrustedHost", "SetTrustedHostSecret", "GetTrustedHostSecret", "ListTrustedHosts"]) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: grantAccess whose ${rpc} is lost ${when} its effect is finished by the repeat`, async () => {
      await using c = await authenticatedCluster("unidirectional");
      c.simulator.control.fail({ rpc, when, code: "UNAVAILABLE", count: 1 });

      await c.grant().catch(() => {});
      c.simulator.control.clearFaults();
      const namespace = await c.grant();

      assert.equal(namespace.inBandAuth, "unidirectional");
      assert.equal(c.hosts().length, 1);
      assert.equal((await c.keysOf("unidirectional")).host.reveal(), c.hosts()[0]?.hostSecret);
    });
  }
}

for (
  const [what, spoil, message] of [
    ["no trusted host", undefined, /has no trusted host for n1.node, delete the VolumeAttachment/],
    ["no secret", { hostSecret: "" }, /has no host secret of trusted host "n1.node", delete the VolumeAttachment/],
    ["no target secret", { targetSecret: "" }, /has no target secret of trusted host "n1.node"/],
    [
      "something else",
      { hostSecret: "open sesame" },
      /the host secret that LightOS at .* has of .* is not a key of the form/,
    ],
  ] as const
) {
  Deno.test(`keysOf answers FAILED_PRECONDITION when LightOS has ${what}`, async () => {
    await using c = await authenticatedCluster("bidirectional");
    await c.grant();
    const [made] = c.hosts();
    assert(made);
    if (spoil === undefined) c.simulator.control.cluster.removeTrustedHost("default", nodeId);
    else c.simulator.control.cluster.putTrustedHost({ ...made, ...spoil });

    await rejects(c.keysOf("bidirectional"), "FAILED_PRECONDITION", message);
  });
}

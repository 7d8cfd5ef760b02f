/** Clusters that have moved: old volume IDs lead to where the cluster answers today. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import { Secrets } from "../../../lib/secrets.ts";
import { lightosBackend } from "../../../lib/storage/lightos/backend.ts";
import { knownClusters } from "../../../lib/storage/lightos/cluster_file.ts";
import { failsWith, lightosOptions, lightosRequest, memoryFiles, none, quiet, within } from "../../support/backends.ts";
import { startSimulator } from "../../support/simulator.ts";

/** A cluster that was moved: what it was made with, and a simulator that serves it on other ports. */
async function movedCluster(scheme: "grpc" | "grpcs") {
  const stack = new AsyncDisposableStack();
  const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-moved-" });
  stack.defer(() => Deno.remove(stateDir, { recursive: true }));
  const before = await startSimulator({ stateDir });
  const { jwt, ca = "" } = before.addresses;
  const secrets = new Secrets({ jwt, "mgmt-ca.crt": ca });
  await using backend = lightosBackend(lightosOptions);
  const volume = await backend.createVolume(
    within(10_000),
    secrets,
    lightosRequest(before.addresses[scheme], {}, { "mgmt-scheme": scheme }),
  );
  const endpoints = before.addresses[scheme].join(",");
  await before.stop();
  // Without its ports remembered, the same cluster comes up on free ones; the old ones are held so that they stay dead.
  const identity = JSON.parse(await Deno.readTextFile(`${stateDir}/identity.json`));
  await Deno.writeTextFile(`${stateDir}/identity.json`, JSON.stringify({ ...identity, ports: {} }));
  for (const address of endpoints.split(",")) {
    const port = Number(address.slice(address.lastIndexOf(":") + 1));
    const listener = Deno.listen({ hostname: "127.0.0.1", port });
    stack.defer(() => listener.close());
    void (async () => {
      for await (const connection of listener) connection.close();
    })();
  }
  const after = stack.use(await startSimulator({ stateDir }));
  return {
    volume,
    formerEndpoints: endpoints,
    endpoints: after.addresses[scheme].join(","),
    simulator: after,
    secrets,
    jwt,
    ca,
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

for (const scheme of ["grpc", "grpcs"] as const) {
  Deno.test(`promise 13: a volume ID (${scheme}) from before the cluster moved works through the cluster file`, async () => {
    await using moved = await movedCluster(scheme);
    const files = memoryFiles({
      "/c": JSON.stringify({
        clusters: [{
          name: "moved",
          endpoints: moved.endpoints,
          formerEndpoints: moved.formerEndpoints,
          scheme,
          ...(scheme === "grpcs" ? { ca: "/ca" } : {}),
          jwt: "/jwt",
        }],
      }),
      "/ca": moved.ca,
      "/jwt": `${moved.jwt}\n`,
    });
    await using backend = lightosBackend({ ...lightosOptions, clusters: knownClusters("/c", files, quiet) });
    const { id } = moved.volume;

    const found = await backend.getVolume(within(10_000), none, id);
    const namespace = await backend.grantAccess(within(10_000), none, id, {
      hostNqn: hostNqn("a.node"),
      shared: false,
    });
    await backend.revokeAccess(within(10_000), none, id, undefined);
    await backend.deleteVolume(within(10_000), none, id);

    strictEqual(found.id, id);
    strictEqual(namespace.uuid, moved.volume.uuid);
    const { volumes } = moved.simulator.control.leftovers();
    deepStrictEqual(volumes.filter((volume) => !volume.endsWith("Deleting")), []);
  });
}

Deno.test("promise 13: a StorageClass with former endpoints still makes and finds volumes under the same ID", async () => {
  await using moved = await movedCluster("grpc");
  const text = JSON.stringify({
    clusters: [{
      name: "moved",
      endpoints: moved.endpoints,
      formerEndpoints: moved.formerEndpoints,
      scheme: "grpc",
      jwt: "/jwt",
    }],
  });
  await using backend = lightosBackend({
    ...lightosOptions,
    clusters: knownClusters("/c", memoryFiles({ "/c": text, "/jwt": moved.jwt }), quiet),
  });
  const again = { ...lightosRequest(moved.simulator.addresses.grpc), parameters: {} as Record<string, string> };
  Object.assign(again.parameters, lightosRequest(moved.simulator.addresses.grpc).parameters, {
    "mgmt-endpoint": moved.formerEndpoints,
  });

  const volume = await backend.createVolume(within(10_000), none, again);

  strictEqual(volume.id, moved.volume.id);
});

Deno.test("promise 13: a volume from before the cluster changed its scheme can be cloned, and taken a snapshot of", async () => {
  await using simulator = await startSimulator();
  const { grpc, grpcs, jwt, ca = "" } = simulator.addresses;
  const secrets = new Secrets({ jwt });
  await using before = lightosBackend(lightosOptions);
  const source = await before.createVolume(within(10_000), secrets, lightosRequest(simulator.addresses.grpc));
  const snapshot = await before.snapshots?.createSnapshot(within(10_000), secrets, {
    name: "snapshot-1",
    sourceVolumeId: source.id,
  });
  const text = JSON.stringify({
    clusters: [{ name: "moved", endpoints: grpcs, formerEndpoints: grpc, scheme: "grpcs", ca: "/ca", jwt: "/jwt" }],
  });
  const files = memoryFiles({ "/c": text, "/ca": ca, "/jwt": jwt });
  await using backend = lightosBackend({ ...lightosOptions, clusters: knownClusters("/c", files, quiet) });
  const today = lightosRequest(simulator.addresses.grpcs, {}, { "mgmt-scheme": "grpcs" });

  for (const [type, id] of [["volume", source.id], ["snapshot", snapshot?.id ?? ""]] as const) {
    const copy = await backend.createVolume(within(10_000), none, {
      ...today,
      name: `copy-${type}`,
      source: { type, id },
    });

    strictEqual(copy.id.includes("scheme:grpcs"), true);
  }
});

Deno.test("a moved cluster that no file names answers UNAVAILABLE with each endpoint's reason", async () => {
  await using moved = await movedCluster("grpc");
  await using backend = lightosBackend(lightosOptions);

  await rejects(
    backend.getVolume(within(5000), moved.secrets, moved.volume.id),
    failsWith("UNAVAILABLE", /no LightOS management endpoint answers \((127\.0\.0\.1:\d+(, |: )){3}/),
  );
});

Deno.test("promise 13: without a cluster file a volume ID works as long as one of its endpoints lives", async () => {
  await using simulator = await startSimulator();
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  await using backend = lightosBackend(lightosOptions);
  const volume = await backend.createVolume(within(10_000), secrets, lightosRequest(simulator.addresses.grpc));
  await using newDriver = lightosBackend(lightosOptions);
  await simulator.control.stopEndpoints({ scheme: "grpc", server: 0 });
  await simulator.control.stopEndpoints({ scheme: "grpc", server: 1 });

  await newDriver.grantAccess(within(10_000), secrets, volume.id, { hostNqn: hostNqn("a.node"), shared: false });
  await newDriver.revokeAccess(within(10_000), secrets, volume.id, undefined);
  await newDriver.deleteVolume(within(10_000), secrets, volume.id);

  deepStrictEqual(simulator.control.visible(hostNqn("a.node")), []);
});

Deno.test("promise 13: endpoints that the cluster named itself serve when those of the volume ID are gone", async () => {
  await using simulator = await startSimulator();
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  const [first = ""] = simulator.addresses.grpc;
  await using backend = lightosBackend(lightosOptions);
  const one = {
    ...lightosRequest(simulator.addresses.grpc),
    parameters: { ...lightosRequest(simulator.addresses.grpc).parameters, "mgmt-endpoint": first },
  };
  const volume = await backend.createVolume(within(10_000), secrets, one);
  await backend.grantAccess(within(10_000), secrets, volume.id, { hostNqn: hostNqn("a.node"), shared: false });
  await simulator.control.stopEndpoints({ address: first });

  const found = await backend.getVolume(within(10_000), secrets, volume.id);

  deepStrictEqual(found.hosts, [hostNqn("a.node")]);
});

Deno.test("a token in the secrets takes precedence over the cluster's, and the error about a bad one names its file", async () => {
  await using simulator = await startSimulator();
  const text = JSON.stringify({
    clusters: [{ name: "a", endpoints: simulator.addresses.grpc, scheme: "grpc", jwt: "/jwt" }],
  });
  const files = memoryFiles({ "/c": text, "/jwt": "stale" });
  await using backend = lightosBackend({ ...lightosOptions, clusters: knownClusters("/c", files, quiet) });
  const secrets = new Secrets({ jwt: simulator.addresses.jwt });
  const volume = await backend.createVolume(within(10_000), secrets, lightosRequest(simulator.addresses.grpc));

  await rejects(
    backend.getVolume(within(5000), none, volume.id),
    failsWith("UNAUTHENTICATED", /JWT: \/jwt of cluster "a", which is not a JSON Web Token$/),
  );
  files.remove("/jwt");
  await rejects(
    backend.getVolume(within(5000), none, volume.id),
    failsWith(
      "UNAUTHENTICATED",
      /JWT: none was given: no key "jwt" in the secrets, and none that can be read in \/jwt of cluster "a"$/,
    ),
  );
});

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { CallError, Channel } from "../../../lib/grpc/client.ts";
import { createLogger } from "../../../lib/log.ts";
import { selfSigned } from "../../../lib/simulator/certificate.ts";
import { defaultSimulateSettings, simulate } from "../../../lib/simulator/lightos/simulator.ts";
import { DurosAPI, Snapshot_StateEnum, Volume_StateEnum } from "../../../proto/gen/lightos_pb.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";

const api = DurosAPI.method;
const gib = 1n << 30n;
const projectName = "default";

for (const scheme of ["grpc", "grpcs"] as const) {
  Deno.test(`management API over ${scheme} takes a volume from creation to deletion`, async () => {
    await using sim = await startSimulator({ behaviour: { creationMs: 5 } });
    using client = clientOf(sim, scheme);

    const created = await client.call(api.createVolume, {
      ...volumeRequest("v1"),
      compression: "true",
      labels: [{ key: "a", value: "b" }],
    });
    const volume = await eventually("the volume is Available", async () => {
      const found = await client.call(api.getVolume, { projectName, name: "v1" });
      return found.state === Volume_StateEnum.Available ? found : undefined;
    });
    await client.call(
      api.updateVolume,
      { projectName, UUID: volume.UUID, acl: { values: ["nqn.a"] }, size: String(2n * gib) },
      { "if-match": volume.ETag },
    );
    const updated = await client.call(api.getVolume, { projectName, UUID: volume.UUID });
    const listed = await client.call(api.listVolumes, { projectName });
    await client.call(api.deleteVolume, { projectName, UUID: volume.UUID });
    await eventually("the volume is gone", async () => {
      const { volumes } = await client.call(api.listVolumes, { projectName, showAll: true });
      return volumes.length === 0;
    });

    assert.equal(created.state, Volume_StateEnum.Creating);
    assert.deepEqual([created.UUID, created.size, created.compression], [volume.UUID, gib, "true"]);
    assert.deepEqual(volume.acl?.values, ["ALLOW_NONE"]);
    assert.deepEqual([updated.acl?.values, updated.size], [["nqn.a"], 2n * gib]);
    assert.notEqual(updated.ETag, volume.ETag);
    assert.deepEqual(listed.volumes.map(({ UUID }) => UUID), [volume.UUID]);
  });

  Deno.test(`management API over ${scheme} names the endpoints of that scheme in the cluster's facts`, async () => {
    await using sim = await startSimulator();
    using client = clientOf(sim, scheme);

    const info = await client.call(api.getClusterInfo, {});
    const cluster = await client.call(api.getCluster, {}, { authorization: `Bearer ${sim.addresses.adminJwt}` });

    assert.deepEqual(info.apiEndpoints, sim.addresses[scheme]);
    assert.equal(info.apiEndpoints.length, 3);
    assert.equal(info.subsystemNQN, sim.addresses.subsystemNqn);
    assert.deepEqual(info.discoveryEndpoints, ["127.0.0.1:8009", "127.0.0.2:8009", "127.0.0.3:8009"]);
    assert.deepEqual(info.nvmeEndpoints, ["127.0.0.1:4420", "127.0.0.2:4420", "127.0.0.3:4420"]);
    assert.equal(info.currentMaxReplicas, 3);
    assert.equal(cluster.UUID, info.UUID);
    assert.equal(cluster.statistics?.estimatedFreeLogicalStorage, 16n << 40n);
  });
}

Deno.test("management API answers with the model's code and words", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  await assertFails(
    client.call(api.createVolume, { ...volumeRequest("v1"), size: "much" }),
    "INVALID_ARGUMENT",
    /^Cannot create volume "v1": size "much" is not a number of bytes$/,
  );
  await assertFails(
    client.call(api.getVolume, { projectName, name: "v1" }),
    "NOT_FOUND",
    /^Cannot get volume "v1": there is no such volume in project "default"$/,
  );
});

Deno.test("management API says UNIMPLEMENTED to what it does not simulate", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);

  await assertFails(client.call(api.listEvents, {}), "UNIMPLEMENTED", /ListEvents/);
});

Deno.test("management API rejects an ETag that is not the volume's", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const { UUID } = await client.call(api.createVolume, volumeRequest("v1"));
  const request = { projectName, UUID, acl: { values: ["nqn.a"] } };

  await assertFails(client.call(api.updateVolume, request, { "if-match": "0" }), "FAILED_PRECONDITION", /ETag/);
});

Deno.test("management API takes snapshots, clones them, and forgets them", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);
  sim.control.behave({ creationMs: 0 });
  const { UUID } = await client.call(api.createVolume, volumeRequest("v1"));

  const snapshot = await client.call(api.createSnapshot, { projectName, name: "s1", sourceVolumeUUID: UUID });
  const clone = await client.call(api.createVolume, { ...volumeRequest("c1"), sourceSnapshotUUID: snapshot.UUID });
  const found = await client.call(api.getSnapshot, { projectName, Name: "s1" });
  const clones = await client.call(api.listVolumes, { projectName, snapshotUUID: snapshot.UUID });
  await client.call(api.deleteSnapshot, { projectName, UUID: snapshot.UUID });
  const left = async () => (await client.call(api.listSnapshots, { projectName, showAll: true })).snapshots;
  await eventually("the deletion waits for the clone", () => sim.control.cluster.snapshots[0]?.dueAtMs === undefined);
  const waiting = (await left()).map(({ state }) => Snapshot_StateEnum[state]);
  await client.call(api.deleteVolume, { projectName, UUID: clone.UUID });
  await eventually("the snapshot is gone", async () => (await left()).length === 0);

  assert.deepEqual(waiting, ["Deleting"]);
  assert.equal(found.ETag, "");
  assert.equal(found.state, Snapshot_StateEnum.Available);
  assert.deepEqual([found.UUID, found.sourceVolumeUUID, found.size], [snapshot.UUID, UUID, gib]);
  assert.equal(clone.sourceSnapshotUUID, snapshot.UUID);
  assert.deepEqual(clones.volumes.map(({ name }) => name), ["c1"]);
});

Deno.test("management API applies a QoS policy by name", async () => {
  await using sim = await startSimulator({ behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const limit = { kind: "iops", read: 512, write: 256 } as const;
  const { uuid } = sim.control.addPolicy({ name: "gold", description: "", limit });

  const policy = { case: "qosPolicyName", value: "gold" } as const;
  const volume = await client.call(api.createVolume, { ...volumeRequest("v1"), qosPolicyID: policy });
  const { policies } = await client.call(api.listPolicies, { projectName });

  assert.deepEqual([volume.qosPolicyName, volume.qosPolicyUUID], ["gold", uuid]);
  assert.deepEqual(policies.map(({ UUID, name }) => [UUID, name]), [[uuid, "gold"]]);
});

Deno.test("management API keeps a trusted host's secrets to itself until they are asked for", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim);
  const name = "n1";

  await client.call(api.createTrustedHost, { projectName, name, hostNqn: "nqn.a" });
  await client.call(api.setTrustedHostSecret, { projectName, name, hostSecret: "s1", targetSecretType: 2 });
  const { hosts } = await client.call(api.listTrustedHosts, { projectName });
  const secrets = await client.call(api.getTrustedHostSecret, { projectName, name });
  await client.call(api.deleteTrustedHost, { projectName, name });

  assert.deepEqual(hosts.map(({ hostNqn }) => hostNqn), ["nqn.a"]);
  assert.equal(secrets.hostSecret, "s1");
  assert.match(secrets.targetSecret, /^DHHC-1:00:.+:$/);
  await assertFails(
    client.call(api.getTrustedHost, { projectName, name }),
    "NOT_FOUND",
    /Cannot find trusted host "n1"/,
  );
});

// ------------------------------------------------------------------------------------------------------------- tokens

for (
  const [what, authorization, problem] of [
    ["no token", undefined, /there is no authorization header$/],
    ["no Bearer", () => "Basic abc", /the authorization header is not "Bearer <token>"$/],
    ["no JSON Web Token", () => "Bearer abc", /it is not a JSON Web Token$/],
    [
      "a forged signature",
      (sim: TestSimulator) => `Bearer ${sim.addresses.jwt.slice(0, -3)}AAA`,
      /its signature is wrong$/,
    ],
    ["an expired token", (sim: TestSimulator) => `Bearer ${sim.control.token(["default"], -1000)}`, /it has expired$/],
  ] as const
) {
  Deno.test(`management API answers UNAUTHENTICATED to ${what}`, async () => {
    await using sim = await startSimulator();
    using client = clientOf(sim);
    const headers: Record<string, string> = authorization === undefined ? {} : { authorization: authorization(sim) };

    const call = client.channel.call(api.getVersion, {}, { signal: AbortSignal.timeout(10_000), headers });

    await assertFails(call, "UNAUTHENTICATED", problem);
  });
}

Deno.test("management API keeps a token to its projects", async () => {
  await using sim = await startSimulator({ projects: ["default", "other"], behaviour: { creationMs: 0 } });
  using client = clientOf(sim);
  const tenant = { authorization: `Bearer ${sim.control.token(["other"])}` };
  await client.call(api.createVolume, volumeRequest("v1"));

  await assertFails(
    client.call(api.getVolume, { projectName, name: "v1" }, tenant),
    "PERMISSION_DENIED",
    /^Cannot use project "default": the token is not for it$/,
  );
  await assertFails(
    client.call(api.getCluster, {}, tenant),
    "UNAUTHENTICATED",
    /the token has no right to the cluster$/,
  );
  const { projects } = await client.call(api.listProjects, {}, tenant);
  assert.deepEqual(projects.map(({ name }) => name), ["other"]);
});

Deno.test("management API of a cluster without authentication needs no token", async () => {
  await using sim = await startSimulator({ authentication: false });
  using client = clientOf(sim);

  const { apiVersion } = await client.channel.call(api.getVersion, {}, { signal: AbortSignal.timeout(10_000) });

  assert.equal(apiVersion, "v2.0");
});

// ---------------------------------------------------------------------------------------------------------- endpoints

Deno.test("a stopped endpoint rejects connections while the others serve, and comes back on its port", async () => {
  await using sim = await startSimulator();
  using first = clientOf(sim, "grpc", 0);
  using second = clientOf(sim, "grpc", 1);
  await first.call(api.getVersion, {});

  await sim.control.stopEndpoints({ server: 0 });
  await assertFails(first.call(api.getVersion, {}), "UNAVAILABLE", /./);
  const { apiVersion } = await second.call(api.getVersion, {});
  await sim.control.startEndpoints({ server: 0 });
  using again = clientOf(sim, "grpc", 0);
  await again.call(api.getVersion, {});

  assert.equal(apiVersion, "v2.0");
  assert.deepEqual(sim.control.endpoints().map(({ state }) => state), Array(6).fill("running"));
});

Deno.test("a hanging endpoint accepts connections and says nothing", async () => {
  await using sim = await startSimulator();
  using client = clientOf(sim, "grpc", 0);

  await sim.control.hangEndpoints({ server: 0, scheme: "grpc" });

  const headers = { authorization: `Bearer ${sim.addresses.jwt}` };
  const options = { signal: AbortSignal.timeout(10_000), headers, connectTimeoutMs: 300 };
  await assertFails(
    client.channel.call(api.getVersion, {}, options),
    "UNAVAILABLE",
    /^no connection within 0\.3 s$/,
  );
  assert.deepEqual(sim.control.endpoints().map(({ state }) => state).filter((state) => state !== "running"), [
    "hanging",
  ]);
});

Deno.test("simulate with a state directory is the same cluster after a restart: ports, certificate, tokens, volumes", async () => {
  const stateDir = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
  try {
    const settings = { ...defaultSimulateSettings, stateDir };
    const first = await simulate(settings, createLogger("error"));
    let UUID: string;
    {
      using client = clientOf(first, "grpcs");
      UUID = (await client.call(api.createVolume, volumeRequest("v1"))).UUID;
    }
    await first.stop();

    const second = await simulate(settings, createLogger("error"));
    try {
      // With the first one's addresses, CA and token.
      using client = clientOf(first, "grpcs");
      const volume = await eventually("the creation ends", async () => {
        const found = await client.call(api.getVolume, { projectName, name: "v1" });
        return found.state === Volume_StateEnum.Available ? found : undefined;
      });
      assert.equal(volume.UUID, UUID);
      assert.deepEqual(second.addresses.grpcs, first.addresses.grpcs);
      assert.equal(second.addresses.control, first.addresses.control);
      assert.equal(second.addresses.clusterUuid, first.addresses.clusterUuid);
    } finally {
      await second.stop();
    }
    assert.equal(((await Deno.stat(`${stateDir}/identity.json`)).mode ?? 0) & 0o777, 0o600);
  } finally {
    await Deno.remove(stateDir, { recursive: true });
  }
});

Deno.test("simulate rejects a port that is taken", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  try {
    const { port } = listener.addr;
    await assert.rejects(startSimulator({ servers: 1, grpcPort: port }), {
      name: "StatusError",
      code: "FAILED_PRECONDITION",
      message: `Cannot listen on 127.0.0.1:${port}: listen EADDRINUSE: address already in use 127.0.0.1:${port}`,
    });
  } finally {
    listener.close();
  }
});

Deno.test("selfSigned makes a certificate for loopback and the given hosts that its CA vouches for", async () => {
  const { cert, ca } = await selfSigned(["192.0.2.7", "storage.example"]);

  const leaf = new X509Certificate(cert);
  assert.equal(leaf.checkIssued(new X509Certificate(ca)), true);
  assert.equal(leaf.verify(new X509Certificate(ca).publicKey), true);
  for (const host of ["localhost", "storage.example"]) assert.ok(leaf.subjectAltName?.includes(`DNS:${host}`), host);
  for (const address of ["127.0.0.1", "192.0.2.7"]) {
    assert.ok(leaf.subjectAltName?.includes(`IP Address:${address}`), address);
  }
});

// ------------------------------------------------------------------------------------------------------------ helpers

interface Client extends Disposable {
  readonly channel: Channel;
  call<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    headers?: Record<string, string>,
  ): Promise<MessageShape<O>>;
}

function clientOf(sim: Pick<TestSimulator, "addresses">, scheme: "grpc" | "grpcs" = "grpc", server = 0): Client {
  const { ca, jwt } = sim.addresses;
  const channel = new Channel({
    address: sim.addresses[scheme][server] ?? "",
    ...(scheme === "grpcs" && ca !== undefined ? { tls: { ca, verify: true } } : {}),
  });
  return {
    channel,
    call: (method, request, headers = {}) =>
      channel.call(method, request, {
        signal: AbortSignal.timeout(10_000),
        headers: { authorization: `Bearer ${jwt}`, ...headers },
      }),
    [Symbol.dispose]: () => channel[Symbol.dispose](),
  };
}

function volumeRequest(name: string) {
  return { projectName, name, size: `${gib}b`, replicaCount: 2, acl: { values: ["ALLOW_NONE"] } };
}

async function assertFails(call: Promise<unknown>, code: string, message: RegExp): Promise<void> {
  await assert.rejects(call, (error: unknown) => {
    assert.ok(error instanceof CallError, String(error));
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  });
}

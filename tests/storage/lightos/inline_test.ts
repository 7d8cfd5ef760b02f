/** Inline volumes on LightOS: what pods may ask for, which token is used for what, and how volumes are found again. */
import assert from "node:assert/strict";
import { requestContext } from "../../../lib/context.ts";
import { isFinal, StatusError } from "../../../lib/error.ts";
import { createLogger } from "../../../lib/log.ts";
import { Secrets } from "../../../lib/secrets.ts";
import type { InlineVolumeRequest, InlineVolumeStore } from "../../../lib/storage/backend.ts";
import {
  clusterEntry,
  filesOf,
  inlineHost,
  inlineId,
  inlineNodeId,
  openInline,
  podUid,
} from "../../support/inline_node.ts";
import { rejects } from "../../support/node_calls.ts";
import { eventually, startSimulator, type TestSimulator } from "../../support/simulator.ts";

const gib = 1n << 30n;
const none = new Secrets();
const targetPath = `/var/lib/kubelet/pods/${podUid()}/volumes/kubernetes.io~csi/scratch/mount`;

function within(ms: number) {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(controller.signal, new Date(Date.now() + ms), createLogger("error", "json", () => {}));
}

function request(attributes: Readonly<Record<string, string>> = { size: "1Gi" }, n = 1): InlineVolumeRequest {
  return {
    volumeId: inlineId(n),
    attributes,
    nodeId: inlineNodeId,
    targetPath,
    pod: { namespace: "team-a", name: `pod${n}`, uid: podUid(n) },
    isRepeat: false,
  };
}

async function started(...entries: readonly Readonly<Record<string, unknown>>[]) {
  await using stack = new AsyncDisposableStack();
  const sim = stack.use(await startSimulator({ projects: ["default", "scratch", "closed"] }));
  const lines: string[] = [];
  const clusters = (entries.length === 0 ? [{}] : entries).map((entry) => clusterEntry(sim, entry));
  // The token of the operator, who has inline volumes in two projects.
  const { contents, files } = filesOf(clusters, sim.control.token(["default", "scratch"]));
  const { backend, volumes } = openInline(files, (line) => lines.push(line));
  stack.use(backend);
  const parts = stack.move();
  return { sim, volumes, contents, lines, backend, [Symbol.asyncDispose]: () => parts.disposeAsync() };
}

function living(sim: TestSimulator) {
  return sim.control.cluster.volumes.filter(({ state }) => !["Deleting", "Failed"].includes(state));
}

/** A volume that is not of this driver. */
async function foreignVolume(sim: TestSimulator, name: string, labels: { key: string; value: string }[] = []) {
  const volume = await sim.control.cluster.createVolume({
    project: "default",
    name,
    size: "1 gib",
    replicaCount: 1,
    compression: "",
    acl: undefined,
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels,
  });
  await eventually("it is Available", () => volume.state === "Available");
  return volume;
}

// --------------------------------------------------------------------------------------------------------- attributes

const policy = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
for (
  const [what, attributes, message] of [
    ["nothing", {}, /volume attribute "size" is missing, give a size such as 10Gi$/],
    ["a size in words", { size: "big" }, /"size" "big" is not a size such as 10Gi/],
    ["no bytes", { size: "0" }, /"size" "0" is not a size/],
    ["a negative size", { size: "-1Gi" }, /"size" "-1Gi" is not a size/],
    [
      "an endpoint",
      { "size": "1Gi", "mgmt-endpoint": "evil:443" },
      /"mgmt-endpoint" is not for pods: the cluster file/,
    ],
    ["a scheme", { "size": "1Gi", "mgmt-scheme": "grpc" }, /"mgmt-scheme" is not for pods/],
    ["certificates", { "size": "1Gi", "mgmt-ca.crt": "x" }, /"mgmt-ca\.crt" is not for pods/],
    ["a server name", { "size": "1Gi", "mgmt-server-name": "evil" }, /"mgmt-server-name" is not for pods/],
    ["a token", { "size": "1Gi", "jwt": "secret" }, /"jwt" is not for pods/],
    [
      "an unknown key",
      { size: "1Gi", sise: "2Gi" },
      /"sise" \(did you mean "size"\?\) unknown \(known: cluster, size, project-name, replica-count,/,
    ],
    ["the key of an object", { size: "1Gi", constructor: "x" }, /"constructor" unknown/],
    [
      "an unknown cluster",
      { size: "1Gi", cluster: "rack9" },
      /"cluster" "rack9" is not one that allows inline volumes/,
    ],
    ["an empty cluster", { size: "1Gi", cluster: "" }, /"cluster" "" is not one that allows inline volumes \(rack1\)/],
    [
      "a closed project",
      { "size": "1Gi", "project-name": "closed" },
      /"closed" is not one that cluster "rack1" allows/,
    ],
    ["a project in capitals", { "size": "1Gi", "project-name": "Default" }, /"Default" is not a project name/],
    ["no replicas", { "size": "1Gi", "replica-count": "0" }, /"replica-count" "0" is not a number/],
    ["compression by halves", { size: "1Gi", compression: "maybe" }, /"compression" "maybe" is not "enabled" or "disa/],
    ["host encryption", { "size": "1Gi", "host-encryption": "enabled" }, /inline volumes have no secret of their own/],
    ["a bad policy", { "size": "1Gi", "qos-policy-uuid": "x" }, /"qos-policy-uuid" "x" is not a UUID/],
    ["two policies", { "size": "1Gi", "qos-policy-uuid": policy, "qos-policy-name": "a" }, /are both given/],
  ] as const
) {
  Deno.test(`an inline volume with ${what} is refused before the cluster is asked`, async () => {
    await using s = await started();

    await rejects(s.volumes.makeVolume(within(5000), none, request(attributes)), "INVALID_ARGUMENT", message);

    assert.equal(s.sim.control.callsInAll(), 0);
  });
}

Deno.test("an inline volume may have the largest size in whole GiB, and not a byte more", async () => {
  await using s = await started();

  await s.volumes.makeVolume(within(10_000), none, request({ size: "2Gi" }));
  await rejects(
    s.volumes.makeVolume(within(10_000), none, request({ size: "2147483649" }, 2)),
    "OUT_OF_RANGE",
    /"size" "2147483649" is 3221225472 bytes in whole GiB, cluster "rack1" allows 2147483648$/,
  );

  assert.deepEqual(living(s.sim).map(({ sizeBytes }) => sizeBytes), [2n * gib]);
});

Deno.test("the attributes of an inline volume reach the cluster", async () => {
  await using s = await started({ ephemeral: { projects: ["default", "scratch"], maxSize: "2Gi" } });
  s.sim.control.addPolicy({ name: "slow", description: "", limit: { kind: "iops", read: 256, write: 256 } });

  const namespace = await s.volumes.makeVolume(
    within(10_000),
    none,
    request({
      "cluster": "rack1",
      "size": "1.2G",
      "project-name": "scratch",
      "replica-count": "2",
      "compression": "enabled",
      "qos-policy-name": "slow",
      "mkfs-options": "-m 1",
    }),
  );

  const [volume] = living(s.sim);
  assert(volume !== undefined);
  assert.deepEqual(
    [volume.uuid, volume.project, volume.sizeBytes, volume.replicaCount, volume.compression, volume.acl],
    [namespace.uuid, "scratch", 2n * gib, 2, true, [inlineHost]],
  );
  assert.equal(s.sim.control.cluster.policyName(volume), "slow");
});

Deno.test("a pod has to name its cluster or project where several allow inline volumes", async () => {
  await using other = await startSimulator();
  await using s = await started(
    {},
    { name: "rack2", endpoints: other.addresses.grpc, ephemeral: { projects: "default,scratch", maxSize: "1Gi" } },
    { name: "rack3", endpoints: "192.0.2.1:80", ephemeral: undefined },
  );
  const make = (attributes: Record<string, string>) => s.volumes.makeVolume(within(10_000), none, request(attributes));

  await rejects(make({ size: "1Gi" }), "INVALID_ARGUMENT", /"cluster" is missing, give one of rack1, rack2$/);
  await rejects(make({ size: "1Gi", cluster: "rack3" }), "INVALID_ARGUMENT", /"rack3" is not one that allows inline/);
  await rejects(
    make({ size: "1Gi", cluster: "rack2" }),
    "INVALID_ARGUMENT",
    /"project-name" is missing, give one of default, scratch$/,
  );
  await make({ size: "1Gi", cluster: "rack1" });

  assert.equal(living(s.sim).length, 1);
});

Deno.test("a cluster file whose clusters allow no inline volumes is an obstacle, until it is changed", async () => {
  await using s = await started({ ephemeral: undefined });
  const before = s.volumes.obstacle();
  s.contents["/clusters.yaml"] = JSON.stringify({ clusters: [clusterEntry(s.sim)] });

  assert.equal(before, "no cluster of the cluster file allows them, the key ephemeral is needed");
  assert.equal(s.volumes.obstacle(), undefined);
});

Deno.test("the path of a pod is returned whatever is in it, and left out when it does not fit", async () => {
  await using s = await started();
  const paths = ["/a b/é~$`/pods/x", `/${"a".repeat(180)}/${"ü".repeat(300)}`, `/${"a".repeat(1200)}`];

  for (const [at, targetPath] of paths.entries()) {
    await s.volumes.makeVolume(within(10_000), none, { ...request({ size: "1Gi" }, at + 1), targetPath });
  }
  const { volumes, problems } = await s.volumes.listVolumes(within(10_000), inlineNodeId);

  const told = new Map(volumes.map((volume) => [volume.volumeId, volume.targetPath]));
  assert.deepEqual(paths.map((_path, at) => told.get(inlineId(at + 1))), [paths[0], paths[1], undefined]);
  assert.deepEqual(problems, []);
});

// ------------------------------------------------------------------------------------------------- whose volume it is

Deno.test("promise 1: a volume that has the name of an inline one is neither used nor removed", async () => {
  await using s = await started();
  const label = { key: "ephemeral", value: inlineId(2) };
  const plain = await foreignVolume(s.sim, inlineId());
  const copy = await foreignVolume(s.sim, "copy-of-an-inline-volume", [label]);

  await rejects(
    s.volumes.makeVolume(within(10_000), none, request()),
    "FAILED_PRECONDITION",
    new RegExp(`volume ${plain.uuid} has that name and not the label ephemeral with it, so it is not ours`),
  );
  const found = [];
  for (const n of [1, 2]) found.push(await s.volumes.findVolume(within(10_000), inlineId(n)));
  const { volumes } = await s.volumes.listVolumes(within(10_000), inlineNodeId);

  assert.deepEqual(found, [undefined, undefined]);
  assert.deepEqual(volumes, []);
  assert.deepEqual(living(s.sim).map(({ uuid }) => uuid).sort(), [plain.uuid, copy.uuid].sort());
});

Deno.test("promise 7: an inline volume that another host may reach is not given to this one, nor removed", async () => {
  await using s = await started();
  await s.volumes.makeVolume(within(10_000), none, request());
  const [volume] = living(s.sim);
  assert(volume !== undefined);
  const acl = ["nqn.2019-09.com.lightbitslabs:host:n2.node"];
  await s.sim.control.cluster.updateVolume({ project: "default", uuid: volume.uuid }, { acl }, undefined);
  const found = await s.volumes.findVolume(within(10_000), inlineId());
  assert(found !== undefined);

  await rejects(
    s.volumes.makeVolume(within(10_000), none, { ...request(), isRepeat: true }),
    "UNAVAILABLE",
    /n2\.node has it, and its access mode is for one node.*; volume .* is there and is removed with the pod$/,
  );
  await rejects(s.volumes.removeVolume(within(10_000), found), "FAILED_PRECONDITION", /n2\.node may still connect/);

  assert.deepEqual(living(s.sim).map(({ acl }) => acl), [acl]);
});

Deno.test("an inline volume is found beside a cluster that does not answer, and missed for certain only without one", async () => {
  await using s = await started({}, { name: "rack2", endpoints: "127.0.0.1:1" });
  await s.volumes.makeVolume(within(10_000), none, request({ size: "1Gi", cluster: "rack1" }));

  const found = await s.volumes.findVolume(within(10_000), inlineId());
  await rejects(
    s.volumes.findVolume(within(10_000), inlineId(2)),
    "UNAVAILABLE",
    /some clusters cannot be asked \(cluster "rack2", project "default": .*127\.0\.0\.1:1/,
  );
  const { volumes, problems } = await s.volumes.listVolumes(within(10_000), inlineNodeId);

  assert.equal(found?.place, 'cluster "rack1", project "default"');
  assert.deepEqual(volumes.map(({ volumeId }) => volumeId), [inlineId()]);
  assert.equal(problems.length, 1);
});

// -------------------------------------------------------------------------------------------------------------- tokens

Deno.test("an inline volume is made with the pod's token, and granted and removed with the operator's", async () => {
  await using s = await started();
  const jwt = s.sim.control.token(["default"]);
  s.contents["/jwt"] = "operator.has.expired";

  await rejects(
    s.volumes.makeVolume(within(5000), new Secrets({ jwt }), request()),
    "UNAUTHENTICATED",
    /JWT: \/jwt of cluster "rack1"/,
  );
  await rejects(
    s.volumes.makeVolume(within(5000), new Secrets({ jwt }), { ...request(), isRepeat: true }),
    "UNAVAILABLE",
    /JWT: \/jwt of cluster "rack1".*; whether something of it is left is unknown/,
  );
  assert.deepEqual(living(s.sim), []);
  s.contents["/jwt"] = s.sim.control.token(["default"]);
  await rejects(
    s.volumes.makeVolume(within(5000), new Secrets({ jwt: "pod.has.none" }), request()),
    "UNAUTHENTICATED",
    /answered CreateVolume with UNAUTHENTICATED.*JWT: key "jwt" of the call's secrets/,
  );
  assert.deepEqual(living(s.sim), []);
  await s.volumes.makeVolume(within(10_000), new Secrets({ jwt }), request());
  const found = await s.volumes.findVolume(within(10_000), inlineId());
  assert(found !== undefined);
  await s.volumes.removeVolume(within(10_000), found);

  assert.deepEqual(living(s.sim), []);
});

Deno.test("a pod's secrets other than its token say nothing of with whom to talk", async () => {
  await using s = await started();
  const ca = "-----BEGIN CERTIFICATE-----\nnot one\n-----END CERTIFICATE-----";

  await s.volumes.makeVolume(within(10_000), new Secrets({ "mgmt-ca.crt": ca, "other": "x" }), request());

  assert.equal(living(s.sim).length, 1);
});

Deno.test("what a pod's token made and the operator's does not see is removed again, with the reason", async () => {
  await using s = await started();
  const jwt = s.sim.control.token(["default"]);
  // The operator's token loses its right to the project while the pod's call makes the volume.
  using _watch = s.sim.control.watchCalls(({ phase, rpc }) => {
    if (phase === "end" && rpc === "CreateVolume") s.contents["/jwt"] = s.sim.control.token(["scratch"]);
  });

  await rejects(
    s.volumes.makeVolume(within(10_000), new Secrets({ jwt }), request()),
    // Whether anything is left cannot be asked with that token.
    "UNAVAILABLE",
    /answered ListVolumes with PERMISSION_DENIED.*JWT: \/jwt of cluster "rack1"/,
  );

  assert.deepEqual(living(s.sim), []);
});

Deno.test("a repeat removes what an earlier call made, once the operator's token has lost its right", async () => {
  await using s = await started();
  const jwt = s.sim.control.token(["default"]);
  s.sim.control.fail({ rpc: "CreateVolume", drop: true, when: "after", count: 1 });
  s.sim.control.fail({ rpc: "ListVolumes", skip: 1, code: "UNAVAILABLE", count: 50 });
  await assert.rejects(s.volumes.makeVolume(within(1500), new Secrets({ jwt }), request()), (error) => !isFinal(error));
  assert.equal(living(s.sim).length, 1);
  s.sim.control.clearFaults();
  s.contents["/jwt"] = s.sim.control.token(["scratch"]);

  await assert.rejects(s.volumes.makeVolume(within(10_000), new Secrets({ jwt }), request()), /PERMISSION_DENIED/);

  assert.deepEqual(living(s.sim), []);
});

// ------------------------------------------------------------------------------------------------------------ promises

/** The life of an inline volume, each call repeated until it succeeds. */
async function life(volumes: InlineVolumeStore, secrets: Secrets): Promise<void> {
  const insist = async <T>(call: () => Promise<T>): Promise<T> => {
    for (let attempt = 1;; attempt++) {
      try {
        return await call();
      } catch (error) {
        assert(attempt < 4 && !isFinal(error), String(error));
      }
    }
  };
  await insist(() => volumes.makeVolume(within(10_000), secrets, request()));
  await insist(async () => {
    const found = await volumes.findVolume(within(10_000), inlineId());
    if (found !== undefined) await volumes.removeVolume(within(10_000), found);
  });
}

for (const payer of ["operator", "pod"] as const) {
  for (const when of ["before", "after"] as const) {
    Deno.test(`promise 8: an inline volume paid by the ${payer} leaves nothing when any call is lost ${when} its effect`, async () => {
      await using s = await started();
      const secrets = payer === "pod" ? new Secrets({ jwt: s.sim.control.token(["default"]) }) : none;
      await life(s.volumes, secrets);
      s.sim.control.resetCalls();
      await life(s.volumes, secrets);
      const count = s.sim.control.callsInAll();
      let lost = 0;

      for (let skip = 0; skip < count; skip++) {
        s.sim.control.clearFaults();
        s.sim.control.resetCalls();
        s.sim.control.fail({ rpc: "*", skip, drop: true, when });
        await life(s.volumes, secrets);
        if (s.sim.control.callsInAll() > count) lost++;
        assert.deepEqual(living(s.sim), [], `call ${skip + 1}`);
      }

      assert(lost >= count / 2, `${lost} of ${count} calls were repeated`);
    });
  }
}

Deno.test("promise 10: no token is in the log of an inline volume or in an error", async () => {
  await using s = await started();
  const jwt = s.sim.control.token(["default"]);
  const secrets = new Secrets({ jwt });
  await life(s.volumes, secrets);
  s.sim.control.fail({ rpc: "*", code: "PERMISSION_DENIED", count: 0 });
  const errors = await Promise.allSettled([
    s.volumes.makeVolume(within(5000), secrets, request()),
    s.volumes.findVolume(within(5000), inlineId()),
  ]);

  const messages = [
    ...s.lines,
    ...errors.map((outcome) => outcome.status === "rejected" ? String(outcome.reason) : ""),
  ];
  assert(messages.some((text) => text.includes("PERMISSION_DENIED")));
  for (const secret of [jwt, s.contents["/jwt"] ?? ""]) {
    assert.deepEqual(messages.filter((text) => text.includes(secret)), []);
  }
});

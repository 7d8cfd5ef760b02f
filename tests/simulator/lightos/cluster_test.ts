import assert from "node:assert/strict";
import { join } from "node:path";
import { type StatusCode, StatusError } from "../../../lib/error.ts";
import { createLogger } from "../../../lib/log.ts";
import { noDataPlane } from "../../../lib/simulator/data_plane/data_plane.ts";
import { Action } from "../../../lib/simulator/lightos/action.ts";
import { parseSize } from "../../../lib/simulator/lightos/arguments.ts";
import { type Behaviour, defaultBehaviour } from "../../../lib/simulator/lightos/behaviour.ts";
import { Cluster, type ClusterOptions } from "../../../lib/simulator/lightos/cluster.ts";
import { type SimVolume, type VolumeState, volumeStates } from "../../../lib/simulator/lightos/model.ts";
import type { SimulatedVolumeRequest } from "../../../lib/simulator/lightos/volumes.ts";
import { eventually } from "../../support/simulator.ts";

const gib = 1n << 30n;
const project = "default";

Deno.test("createVolume answers Creating, and the volume becomes Available with another ETag", async () => {
  await using cluster = await open({ creationMs: 5 });

  const volume = await cluster.createVolume(volumeRequest());
  const { state, protection, etag } = volume;
  await eventually("the volume is Available", () => volume.state === "Available");

  assert.deepEqual([state, protection], ["Creating", "Unknown"]);
  assert.equal(volume.protection, "FullyProtected");
  assert.notEqual(volume.etag, etag);
});

Deno.test("createVolume without a delay answers Available", async () => {
  await using cluster = await open({ creationMs: 0 });

  const { state } = await cluster.createVolume(volumeRequest());

  assert.equal(state, "Available");
});

Deno.test("createVolume rejects the name of a live volume", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest());

  await assertFails(
    cluster.createVolume(volumeRequest()),
    "ALREADY_EXISTS",
    `Cannot create volume "v1": volume ${uuid} has this name`,
  );
});

Deno.test("createVolume accepts the name of a volume in another project", async () => {
  await using cluster = await open();
  await cluster.createVolume(volumeRequest());

  const volume = await cluster.createVolume(volumeRequest({ project: "other" }));

  assert.equal(volume.project, "other");
});

Deno.test("createVolume accepts the name of a Deleting volume, and getVolume by name shows the live one", async () => {
  await using cluster = await open({ deletionMs: 60_000 });
  const old = await cluster.createVolume(volumeRequest());
  cluster.deleteVolume({ project, uuid: old.uuid }, undefined);
  assert.equal(cluster.getVolume({ project, name: "v1" }).uuid, old.uuid);

  const { uuid } = await cluster.createVolume(volumeRequest());

  assert.equal(cluster.getVolume({ project, name: "v1" }).uuid, uuid);
  cluster.behaviour.nameShowsDead = true;
  assert.equal(cluster.getVolume({ project, name: "v1" }).uuid, old.uuid);
});

Deno.test("createVolume that is doomed leaves a Failed husk that blocks neither name nor space, for ever", async () => {
  await using cluster = await open({ failCreations: 1 });
  const husk = await cluster.createVolume(volumeRequest());

  const retry = await cluster.createVolume(volumeRequest());

  assert.deepEqual([husk.state, retry.state], ["Failed", "Available"]);
  assert.equal(cluster.reservedBytes, gib);
  await assertFails(
    () => cluster.deleteVolume({ project, uuid: husk.uuid }, undefined),
    "INVALID_ARGUMENT",
    `Cannot delete volume ${husk.uuid}: the volume is Failed`,
  );
});

for (
  const [what, change, code, problem] of [
    ["no project", { project: "" }, "INVALID_ARGUMENT", "no project is given"],
    ["an unknown project", { project: "x" }, "PERMISSION_DENIED", `there is no project "x" for this token`],
    [
      "a bad name",
      { name: "a b" },
      "INVALID_ARGUMENT",
      `"a b" is not a name of 1 to 253 letters, digits, "-", "_" and "."`,
    ],
    ["no replica", { replicaCount: 0 }, "INVALID_ARGUMENT", "replica count 0 is not between 1 and 3"],
    ["four replicas", { replicaCount: 4 }, "INVALID_ARGUMENT", "replica count 4 is not between 1 and 3"],
    ["no size", { size: "" }, "INVALID_ARGUMENT", `size "" is not a number of bytes`],
    ["odd compression", { compression: "on" }, "INVALID_ARGUMENT", `compression "on" is neither "true" nor "false"`],
    ["an empty ACL entry", { acl: [""] }, "INVALID_ARGUMENT", `"" is not a host NQN`],
    [
      "ALLOW_NONE with a host",
      { acl: ["ALLOW_NONE", "nqn.a"] },
      "INVALID_ARGUMENT",
      "ALLOW_NONE is not alone in the ACL",
    ],
    ["a host twice", { acl: ["nqn.a", "nqn.a"] }, "INVALID_ARGUMENT", "the ACL holds an entry twice"],
    ["a bad IP address", { ipAcl: ["host!"] }, "INVALID_ARGUMENT", `"host!" is not an IP address`],
    ["a sector size of 1024", { sectorSizeBytes: 1024 }, "INVALID_ARGUMENT", "sector size 1024 is not 512 or 4096"],
    ["17 labels", { labels: labels(17) }, "INVALID_ARGUMENT", "17 labels are given, 16 are allowed"],
    ["a bad label", { labels: [{ key: "a b", value: "c" }] }, "INVALID_ARGUMENT", `"a b" is not part of a label`],
    [
      "an unknown policy",
      { qosPolicy: { uuid: "", name: "gold" } },
      "INVALID_ARGUMENT",
      `there is no QoS policy "gold" for project "default"`,
    ],
    [
      "an unknown snapshot",
      { sourceSnapshot: { uuid: "u", name: "" } },
      "INVALID_ARGUMENT",
      `there is no snapshot "u"`,
    ],
    [
      "more than there is",
      { size: "11 gib", replicaCount: 3 },
      "RESOURCE_EXHAUSTED",
      `it needs ${33n * gib} bytes with its replicas, ${32n * gib} are free`,
    ],
  ] as const satisfies readonly (readonly [string, Partial<SimulatedVolumeRequest>, StatusCode, string])[]
) {
  Deno.test(`createVolume with ${what} is rejected and leaves nothing`, async () => {
    await using cluster = await open();
    const { name = "v1" }: Partial<SimulatedVolumeRequest> = change;

    await assertFails(cluster.createVolume(volumeRequest(change)), code, `Cannot create volume "${name}": ${problem}`);

    assert.deepEqual(cluster.volumes, []);
  });
}

Deno.test("space is taken with all replicas until the volume is gone", async () => {
  await using cluster = await open({ deletionMs: 5 });
  const volume = await cluster.createVolume(volumeRequest({ size: "10 gib", replicaCount: 3 }));
  assert.equal(cluster.freeBytes, 2n * gib);
  await assertFails(
    cluster.updateVolume({ project, uuid: volume.uuid }, { size: "11 gib" }, undefined),
    "RESOURCE_EXHAUSTED",
    `Cannot update volume ${volume.uuid}: it needs ${3n * gib} bytes with its replicas, ${2n * gib} are free`,
  );

  cluster.deleteVolume({ project, uuid: volume.uuid }, undefined);

  assert.equal(cluster.freeBytes, 2n * gib);
  await eventually("the space is free", () => cluster.freeBytes === 32n * gib);
});

for (
  const [text, bytes] of [
    ["10737418240b", 10n * gib],
    ["10737418240", 10n * gib],
    ["5 gib", 5n * gib],
    ["5GiB", 5n * gib],
    ["4096", 4096n],
    ["1 tib", 1024n * gib],
  ] as const
) {
  Deno.test(`parseSize reads "${text}"`, () => {
    assert.equal(parseSize(new Action("try"), text), bytes);
  });
}

for (const text of ["", "b", "0", "-4096", "1.5 gib", "4096 x", "4096b b", "0x1000", "99999999999999999999"]) {
  Deno.test(`parseSize rejects "${text}"`, () => {
    assert.throws(() => parseSize(new Action("try"), text), (error: unknown) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      assert.ok(error.message.startsWith(`Cannot try: size "${text}" is `), error.message);
      return true;
    });
  });
}

for (const size of ["511", "512", "4095", "4096"]) {
  Deno.test(`createVolume rounds ${size} bytes up to 4 KiB, and rejects other sizes when it behaves as documented`, async () => {
    await using cluster = await open();

    const { sizeBytes } = await cluster.createVolume(volumeRequest({ size }));
    cluster.behaviour.asDocumented = true;
    const documented = cluster.createVolume(volumeRequest({ name: "v2", size }));

    assert.equal(sizeBytes, 4096n);
    if (size === "4096") assert.equal((await documented).sizeBytes, 4096n);
    else {
      const problem = `size "${size}" is not a multiple of 4096 bytes`;
      await assertFails(documented, "INVALID_ARGUMENT", `Cannot create volume "v2": ${problem}`);
    }
  });
}

Deno.test("updateVolume rounds a size up to 4 KiB", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest({ size: "1 gib" }));

  await cluster.updateVolume({ project, uuid }, { size: String(gib + 1n) }, undefined);

  assert.equal(cluster.getVolume({ project, uuid }).sizeBytes, gib + 4096n);
});

Deno.test("an access list holds any text, and host NQNs only as documented", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest({ acl: ["ace-1", "ace-2"] }));
  const update = () => cluster.updateVolume({ project, uuid }, { acl: ["ace-3"] }, undefined);

  await update();
  const { acl } = cluster.getVolume({ project, uuid });
  cluster.behaviour.asDocumented = true;

  assert.deepEqual(acl, ["ace-3"]);
  await assertFails(update(), "INVALID_ARGUMENT", `Cannot update volume ${uuid}: "ace-3" is not a host NQN`);
});

Deno.test("a clone has its source's first ETag, and snapshots and clones change the source's", async () => {
  await using cluster = await open({ creationMs: 0 });
  const source = await cluster.createVolume(volumeRequest());
  const seen = [source.etag];
  const snapshot = await snapshotOf(cluster, source.uuid, "s1");
  seen.push(source.etag);
  const clone = await cluster.createVolume(
    volumeRequest({ name: "c1", sourceSnapshot: { uuid: snapshot.uuid, name: "" } }),
  );
  seen.push(source.etag);

  assert.equal(clone.etag, seen[0]);
  assert.equal(new Set(seen).size, 3);
});

Deno.test("as documented, ETags are unique in the cluster, and a snapshot leaves its source's alone", async () => {
  await using cluster = await open({ creationMs: 0, asDocumented: true });
  const source = await cluster.createVolume(volumeRequest());
  const { etag } = source;
  const snapshot = await snapshotOf(cluster, source.uuid, "s1");
  const clone = await cluster.createVolume(
    volumeRequest({ name: "c1", sourceSnapshot: { uuid: snapshot.uuid, name: "" } }),
  );

  assert.equal(source.etag, etag);
  assert.equal(new Set([etag, snapshot.etag, clone.etag]).size, 3);
});

Deno.test("names and space follow renaming, growth, failure and deletion of volumes", async () => {
  await using cluster = await open({ creationMs: 0, deletionMs: 1 });
  const one = await cluster.createVolume(volumeRequest({ name: "one", size: "2 gib", replicaCount: 2 }));
  const two = await cluster.createVolume(volumeRequest({ name: "two", size: "1 gib", replicaCount: 1 }));
  const reserved = [cluster.reservedBytes];
  await cluster.updateVolume({ project, uuid: one.uuid }, { newName: "three", size: "3 gib" }, undefined);
  reserved.push(cluster.reservedBytes);
  cluster.setVolume(two.uuid, { state: "Failed" });
  reserved.push(cluster.reservedBytes);
  const named = (name: string) => cluster.listVolumes({ project, name }).map(({ uuid }) => uuid);

  assert.deepEqual([named("one"), named("three"), named("two")], [[], [one.uuid], [two.uuid]]);
  cluster.deleteVolume({ project, name: "three" }, undefined);
  await eventually("the volume is gone", () => cluster.volumes.length === 1);

  assert.deepEqual([named("three"), cluster.listVolumes({ project, uuid: one.uuid })], [[], []]);
  assert.deepEqual([...reserved, cluster.reservedBytes], [5n * gib, 7n * gib, 6n * gib, 0n]);
});

Deno.test("updateVolume rejects another ETag and changes nothing", async () => {
  await using cluster = await open();
  const volume = await cluster.createVolume(volumeRequest());

  await assertFails(
    cluster.updateVolume({ project, uuid: volume.uuid }, { acl: ["nqn.a"] }, "0"),
    "FAILED_PRECONDITION",
    `Cannot update volume ${volume.uuid}: its ETag is ${volume.etag}, not 0`,
  );

  assert.deepEqual(volume.acl, ["ALLOW_NONE"]);
});

Deno.test("updateVolume of two callers with one ETag lets one of them win", async () => {
  await using cluster = await open();
  const volume = await cluster.createVolume(volumeRequest());
  const { etag } = volume;

  const results = await Promise.allSettled(
    ["nqn.a", "nqn.b"].map((host) => cluster.updateVolume({ project, uuid: volume.uuid }, { acl: [host] }, etag)),
  );

  assert.deepEqual(results.map(({ status }) => status), ["fulfilled", "rejected"]);
  assert.deepEqual(volume.acl, ["nqn.a"]);
});

Deno.test("updateVolume shrinks with force only", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest({ size: "2 gib" }));

  await assertFails(
    cluster.updateVolume({ project, uuid }, { size: "1 gib" }, undefined),
    "INVALID_ARGUMENT",
    `Cannot update volume ${uuid}: size ${gib} is below the current ${2n * gib} bytes`,
  );
  await cluster.updateVolume({ project, uuid }, { size: "1 gib", force: true }, undefined);

  assert.equal(cluster.getVolume({ project, uuid }).sizeBytes, gib);
});

Deno.test("updateVolume renames to a free name only", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest());
  const other = await cluster.createVolume(volumeRequest({ name: "v2" }));

  await assertFails(
    cluster.updateVolume({ project, uuid }, { newName: "v2" }, undefined),
    "ALREADY_EXISTS",
    `Cannot update volume ${uuid}: "v2" is volume ${other.uuid}`,
  );
  await cluster.updateVolume({ project, uuid }, { newName: "v3" }, undefined);

  assert.equal(cluster.getVolume({ project, name: "v3" }).uuid, uuid);
});

Deno.test("updateVolume with a delay shows Updating first", async () => {
  await using cluster = await open({ updateMs: 5 });
  const volume = await cluster.createVolume(volumeRequest());

  await cluster.updateVolume({ project, uuid: volume.uuid }, { acl: ["nqn.a"] }, undefined);

  assert.equal(volume.state, "Updating");
  await eventually("the update ends", () => volume.state === "Available");
});

const refusedIn: Readonly<Record<VolumeState, StatusCode | undefined>> = {
  Creating: "UNAVAILABLE",
  Available: undefined,
  Deleting: "FAILED_PRECONDITION",
  Failed: "FAILED_PRECONDITION",
  Updating: "UNAVAILABLE",
  Rollback: "UNAVAILABLE",
  Migrating: undefined,
};
for (const state of volumeStates) {
  const code = refusedIn[state];
  Deno.test(
    `updateVolume and deleteVolume of a volume that is ${state} ${
      code ? `answer ${code}${code === "FAILED_PRECONDITION" ? " and INVALID_ARGUMENT" : ""}` : "work"
    }`,
    async () => {
      await using cluster = await open();
      const { uuid } = await cluster.createVolume(volumeRequest());
      cluster.setVolume(uuid, { state });

      const update = () => cluster.updateVolume({ project, uuid }, { acl: ["nqn.a"] }, undefined);
      const remove = () => Promise.resolve().then(() => cluster.deleteVolume({ project, uuid }, undefined));

      if (code === undefined) {
        await update();
        await remove();
        assert.equal(cluster.getVolume({ project, uuid }).state, "Deleting");
      } else {
        await assertFails(update(), code, `Cannot update volume ${uuid}: the volume is ${state}`);
        // Of a deletion nothing else is known than what is documented.
        const codeOfDeletion = code === "FAILED_PRECONDITION" ? "INVALID_ARGUMENT" : code;
        await assertFails(remove(), codeOfDeletion, `Cannot delete volume ${uuid}: the volume is ${state}`);
        if (code !== "FAILED_PRECONDITION") return;
        cluster.behaviour.asDocumented = true;
        await assertFails(update(), "INVALID_ARGUMENT", `Cannot update volume ${uuid}: the volume is ${state}`);
      }
    },
  );
}

Deno.test("deleteVolume leaves snapshots alone, and the volume is NOT_FOUND in the end", async () => {
  await using cluster = await open({ deletionMs: 5 });
  const { uuid } = await cluster.createVolume(volumeRequest());
  const snapshot = await snapshotOf(cluster, uuid, "s1");

  cluster.deleteVolume({ project, uuid }, undefined);
  await eventually("the volume is gone", () => cluster.volumes.length === 0);

  await assertFails(
    () => cluster.getVolume({ project, uuid }),
    "NOT_FOUND",
    `Cannot get volume ${uuid}: there is no such volume in project "default"`,
  );
  assert.equal(cluster.getSnapshot({ project, uuid: snapshot.uuid }).state, "Available");
});

Deno.test("a volume of another project is NOT_FOUND", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest());

  await assertFails(
    () => cluster.getVolume({ project: "other", uuid }),
    "NOT_FOUND",
    `Cannot get volume ${uuid}: there is no such volume in project "other"`,
  );
});

Deno.test("held creations stay Creating until they are released", async () => {
  await using cluster = await open({ holdCreations: true });
  const volume = await cluster.createVolume(volumeRequest());
  assert.equal(volume.state, "Creating");

  cluster.releaseCreations();

  await eventually("the volume is Available", () => volume.state === "Available");
});

Deno.test("a clone has its snapshot's size and labels unless it asks for more", async () => {
  await using cluster = await open();
  const source = await cluster.createVolume(volumeRequest({ size: "2 gib", labels: labels(1) }));
  const snapshot = await snapshotOf(cluster, source.uuid, "s1");
  const sourceSnapshot = { uuid: snapshot.uuid, name: "" };

  const same = await cluster.createVolume(volumeRequest({ name: "c1", size: "", sourceSnapshot }));
  const larger = await cluster.createVolume(volumeRequest({ name: "c2", size: "3 gib", sourceSnapshot }));

  assert.deepEqual([same.sizeBytes, larger.sizeBytes], [2n * gib, 3n * gib]);
  assert.deepEqual(same.labels, labels(1));
  assert.equal(same.sourceSnapshotUuid, snapshot.uuid);
  await assertFails(
    cluster.createVolume(volumeRequest({ name: "c3", size: "1 gib", sourceSnapshot })),
    "INVALID_ARGUMENT",
    `Cannot create volume "c3": size ${gib} is below the ${2n * gib} bytes of snapshot ${snapshot.uuid}`,
  );
});

Deno.test("createSnapshot is rejected while its source is Updating", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest());
  cluster.setVolume(uuid, { state: "Updating" });

  await assertFails(
    snapshotOf(cluster, uuid, "s1"),
    "FAILED_PRECONDITION",
    `Cannot create snapshot "s1": volume ${uuid} is Updating`,
  );
});

Deno.test("createSnapshot with the name of a Deleting snapshot succeeds and ends as Failed", async () => {
  await using cluster = await open({ deletionMs: 60_000 });
  const { uuid } = await cluster.createVolume(volumeRequest());
  const first = await snapshotOf(cluster, uuid, "s1");
  await assertFails(
    snapshotOf(cluster, uuid, "s1"),
    "ALREADY_EXISTS",
    `Cannot create snapshot "s1": snapshot ${first.uuid} has this name`,
  );
  cluster.deleteSnapshot({ project, uuid: first.uuid });

  const second = await snapshotOf(cluster, uuid, "s1");

  assert.equal(second.state, "Failed");
});

Deno.test("a snapshot deletes itself when its retention time is over", async () => {
  await using cluster = await open({ deletionMs: 5 });
  const { uuid } = await cluster.createVolume(volumeRequest());

  await snapshotOf(cluster, uuid, "s1", 20);

  await eventually("the snapshot is gone", () => cluster.snapshots.length === 0);
});

Deno.test("deleteSnapshot waits for clones", async () => {
  await using cluster = await open({ deletionMs: 5 });
  const { uuid } = await cluster.createVolume(volumeRequest());
  const snapshot = await snapshotOf(cluster, uuid, "s1");
  const clone = await cluster.createVolume(
    volumeRequest({ name: "c1", sourceSnapshot: { uuid: snapshot.uuid, name: "" } }),
  );

  cluster.deleteSnapshot({ project, uuid: snapshot.uuid });
  await eventually("the time for the deletion is over", () => snapshot.dueAtMs === undefined);
  assert.equal(snapshot.state, "Deleting");
  assert.equal(cluster.snapshots.length, 1);
  cluster.deleteVolume({ project, uuid: clone.uuid }, undefined);

  await eventually("the snapshot is gone", () => cluster.snapshots.length === 0);
});

Deno.test("rollbackVolume restores the snapshot's size", async () => {
  await using cluster = await open({ rollbackMs: 5 });
  const volume = await cluster.createVolume(volumeRequest());
  const snapshot = await snapshotOf(cluster, volume.uuid, "s1");
  await cluster.updateVolume({ project, uuid: volume.uuid }, { size: "2 gib" }, undefined);

  cluster.rollbackVolume({ project, uuid: volume.uuid }, { uuid: snapshot.uuid, name: "" });

  assert.equal(volume.state, "Rollback");
  await eventually("the rollback ends", () => volume.state === "Available");
  assert.equal(volume.sizeBytes, gib);
});

Deno.test("rollbackVolume rejects the snapshot of another volume, and a Deleting volume for now", async () => {
  await using cluster = await open({ deletionMs: 60_000 });
  const { uuid } = await cluster.createVolume(volumeRequest());
  const other = await cluster.createVolume(volumeRequest({ name: "v2" }));
  const snapshot = await snapshotOf(cluster, other.uuid, "s1");
  const rollback = () => cluster.rollbackVolume({ project, uuid }, { uuid: snapshot.uuid, name: "" });

  await assertFails(
    rollback,
    "INVALID_ARGUMENT",
    `Cannot roll back volume ${uuid}: snapshot ${snapshot.uuid} is of volume ${other.uuid}`,
  );
  cluster.deleteVolume({ project, uuid }, undefined);
  await assertFails(rollback, "UNAVAILABLE", `Cannot roll back volume ${uuid}: it is Deleting`);
});

Deno.test("listVolumes pages through everything once, in the order of UUIDs", async () => {
  await using cluster = await open();
  for (let number = 0; number < 7; number++) await cluster.createVolume(volumeRequest({ name: `v${number}` }));
  const seen: string[] = [];

  for (let offsetUuid = "";;) {
    const page = cluster.listVolumes({ project, limit: 3, offsetUuid });
    if (page.length === 0) break;
    assert.ok(page.length <= 3);
    seen.push(...page.map(({ uuid }) => uuid));
    offsetUuid = seen.at(-1) ?? "";
  }

  assert.deepEqual(seen, cluster.volumes.map(({ uuid }) => uuid).sort());
});

Deno.test("listVolumes shows Deleting volumes on demand only", async () => {
  await using cluster = await open({ deletionMs: 60_000 });
  const { uuid } = await cluster.createVolume(volumeRequest());
  cluster.deleteVolume({ project, uuid }, undefined);

  assert.deepEqual(cluster.listVolumes({ project }), []);
  assert.deepEqual(cluster.listVolumes({ project, showAll: true }).map((volume) => volume.uuid), [uuid]);
});

Deno.test("visibleTo returns what a host may access in the volume's present state", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest({ acl: ["nqn.a"] }));
  const open_ = await cluster.createVolume(volumeRequest({ name: "v2", acl: ["ALLOW_ANY"] }));
  await cluster.createVolume(volumeRequest({ name: "v3" }));
  assert.deepEqual(cluster.visibleTo("nqn.a").sort(), [uuid, open_.uuid].sort());
  assert.deepEqual(cluster.visibleTo("nqn.b"), [open_.uuid]);

  cluster.setVolume(uuid, { protection: "NotAvailable" });

  assert.deepEqual(cluster.visibleTo("nqn.a"), [open_.uuid]);
});

Deno.test("a cluster with a file goes on with creations and deletions that were half done", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-test-" });
  try {
    const file = join(directory, "cluster.json");
    let etag: string;
    {
      await using cluster = await open({ creationMs: 0, deletionMs: 60_000 }, { file });
      const { uuid } = await cluster.createVolume(volumeRequest({ name: "deleting", labels: labels(2) }));
      cluster.deleteVolume({ project, uuid }, undefined);
      cluster.behaviour.creationMs = 200;
      etag = (await cluster.createVolume(volumeRequest({ name: "creating", acl: ["nqn.a"] }))).etag;
      cluster.behaviour.holdCreations = true;
      await cluster.createVolume(volumeRequest({ name: "held" }));
    }
    const dying = JSON.parse(await Deno.readTextFile(file));
    for (const volume of dying.volumes) if (volume.name === "deleting") volume.dueAtMs = Date.now();
    await Deno.writeTextFile(file, JSON.stringify(dying));

    await using again = await open({}, { file });
    await eventually("the deletion ends", () => again.volumes.length === 2);
    const created = again.getVolume({ project, name: "creating" });
    await eventually("the creation ends", () => created.state === "Available");

    assert.equal(created.sizeBytes, gib);
    assert.deepEqual(created.acl, ["nqn.a"]);
    assert.notEqual(created.etag, etag);
    assert.equal(again.getVolume({ project, name: "held" }).state, "Creating");
    again.releaseCreations();
    await eventually("the release", () => again.getVolume({ project, name: "held" }).state === "Available");
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("a snapshot whose copy was cut off by a crash is Failed afterwards", async () => {
  const file = await Deno.makeTempFile({ prefix: "lbcsi-test-" });
  try {
    await Deno.remove(file);
    {
      await using cluster = await open({}, { file });
      const { uuid } = await cluster.createVolume(volumeRequest());
      cluster.behaviour.holdCreations = true;
      await snapshotOf(cluster, uuid, "s1");
    }
    const dataPlane = { ...noDataPlane(), hasSnapshot: () => Promise.resolve(false) };

    await using again = await open({}, { file, dataPlane });

    await eventually("the snapshot is Failed", () => again.snapshots[0]?.state === "Failed");
  } finally {
    await Deno.remove(file);
  }
});

Deno.test("visibleTo names nothing to hosts whose addresses are not admitted", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest({ acl: ["ALLOW_ANY"] }));

  await cluster.updateVolume({ project, uuid }, { ipAcl: ["192.0.2.1"] }, undefined);
  assert.deepEqual(cluster.visibleTo("nqn.a"), []);
  await cluster.updateVolume({ project, uuid }, { ipAcl: ["192.0.2.1", "127.0.0.1"] }, undefined);

  assert.deepEqual(cluster.visibleTo("nqn.a"), [uuid]);
});

Deno.test("Cluster.open rejects a damaged file and leaves it as it is", async () => {
  const file = await Deno.makeTempFile({ prefix: "lbcsi-test-" });
  try {
    await Deno.writeTextFile(file, `{"format": 2}`);

    await assert.rejects(open({}, { file }), (error: unknown) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "FAILED_PRECONDITION");
      assert.ok(error.message.startsWith(`Cannot read the cluster in ${file}: format: `), error.message);
      return true;
    });
    assert.equal(await Deno.readTextFile(file), `{"format": 2}`);
  } finally {
    await Deno.remove(file);
  }
});

Deno.test("forget leaves a cluster as new", async () => {
  await using cluster = await open();
  const { uuid } = await cluster.createVolume(volumeRequest());
  await snapshotOf(cluster, uuid, "s1");

  await cluster.forget();

  assert.deepEqual([cluster.volumes, cluster.snapshots, cluster.freeBytes], [[], [], 32n * gib]);
  assert.deepEqual(cluster.listProjects().map(({ name }) => name), ["default", "other"]);
});

// ------------------------------------------------------------------------------------------------------------ helpers

function open(behaviour: Partial<Behaviour> = {}, change: Partial<ClusterOptions> = {}): Promise<Cluster> {
  return Cluster.open({
    identity: {
      uuid: "2f0b4a34-9a0e-4e5c-8f4a-0c8c9f1b7d11",
      name: "test",
      subsystemNqn: "nqn.2016-01.com.lightbitslabs:uuid:2f0b4a34-9a0e-4e5c-8f4a-0c8c9f1b7d11",
      servers: [1, 2, 3].map((number) => ({
        uuid: `server-${number}`,
        nodeUuid: `node-${number}`,
        name: `server${number}`,
        nvmeEndpoint: `127.0.0.${number}:4420`,
        discoveryEndpoint: `127.0.0.${number}:8009`,
      })),
    },
    projects: ["default", "other"],
    capacityBytes: 32n * gib,
    behaviour: { ...defaultBehaviour, creationMs: 0, ...behaviour },
    dataPlane: noDataPlane(),
    log: createLogger("error"),
    file: undefined,
    ...change,
  });
}

function volumeRequest(change: Partial<SimulatedVolumeRequest> = {}): SimulatedVolumeRequest {
  return {
    project,
    name: "v1",
    size: `${gib}b`,
    replicaCount: 1,
    compression: "false",
    acl: ["ALLOW_NONE"],
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
    ...change,
  };
}

function labels(count: number): { key: string; value: string }[] {
  return Array.from({ length: count }, (_, number) => ({ key: `key${number}`, value: "value" }));
}

function snapshotOf(cluster: Cluster, volumeUuid: SimVolume["uuid"], name: string, retentionMs?: number) {
  const source = { uuid: volumeUuid, name: "" };
  return cluster.createSnapshot({ project, name, description: "", source, retentionMs });
}

async function assertFails(
  attempt: Promise<unknown> | (() => unknown),
  code: StatusCode,
  message: string,
): Promise<void> {
  const run = async () => await (typeof attempt === "function" ? attempt() : attempt);
  await assert.rejects(run(), (error: unknown) => {
    assert.ok(error instanceof StatusError, String(error));
    assert.deepEqual([error.code, error.message], [code, message]);
    return true;
  });
}

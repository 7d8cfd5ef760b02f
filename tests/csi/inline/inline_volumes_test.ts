/** Inline volumes of pods: their whole life on a simulated cluster and machine. */
import { create } from "@bufbuild/protobuf";
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Secrets } from "../../../lib/context.ts";
import { Testbed } from "../../../lib/demo/testbed.ts";
import {
  Node,
  NodeGetVolumeHealthRequestSchema,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../../proto/gen/csi_pb.ts";
import { FakeHost } from "../../support/fake_host.ts";
import { inlineHost, inlineId, inlineNode, inlineRequest, podUid } from "../../support/inline_node.ts";
import { needs } from "../../support/needs.ts";
import { mountCapability, nodeCalls, rejects } from "../../support/node_calls.ts";
import { eventually } from "../../support/simulator.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");
const gib = 1n << 30n;
const lbcsi = [Deno.execPath(), "run", "-A", fileURLToPath(new URL("../../../main.ts", import.meta.url))] as const;

type InlineNode = Awaited<ReturnType<typeof inlineNode>>;

function inlineTest(name: string, fn: () => Promise<void>, ...more: string[]): void {
  Deno.test({ name, ignore: ignore || !needs(...more), fn });
}

/** Asserts that nothing is left of any volume, on the cluster or on the machine. */
async function nothingLeft(n: InlineNode): Promise<void> {
  await eventually("the volumes go", () => n.sim.control.leftovers().volumes.length === 0);
  await n.sim.control.waitUntilSettled();
  assert.deepEqual(n.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
  assert.deepEqual(await n.mounts(), []);
  assert.deepEqual([...Deno.readDirSync(n.sim.addresses.discoveryDir ?? "")], []);
}

async function exists(path: string): Promise<boolean> {
  try {
    await Deno.lstat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

for (const fsType of ["ext4", "xfs", "btrfs"] as const) {
  inlineTest(`an inline volume (${fsType}) is made, written, measured and removed, each call twice`, async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    const request = { ...inlineRequest(targetPath), volumeCapability: mountCapability(fsType) };

    await n.publish(request);
    await Deno.writeTextFile(join(targetPath, "kept"), "data");
    await n.publish(request);
    const [mount, ...more] = await n.mounts();
    const { usage, volumeCondition } = await n.stats({ volumeId: inlineId(), volumePath: targetPath });
    const [volume] = n.sim.control.cluster.volumes;
    const text = await Deno.readTextFile(join(targetPath, "kept"));
    await n.unpublish({ volumeId: inlineId(), targetPath });
    const isThere = await exists(targetPath);
    await n.unpublish({ volumeId: inlineId(), targetPath });

    assert.equal(text, "data");
    assert.deepEqual([mount?.path, mount?.fsType, more], [targetPath, fsType, []]);
    assert(mount?.options.includes("rw"));
    assert(Number(usage?.[0]?.total) > Number(gib) / 2);
    assert.equal(volumeCondition?.abnormal, false);
    assert.equal(volume?.name, inlineId());
    assert.equal(volume.sizeBytes, gib);
    const labels = Object.fromEntries(volume.labels.map(({ key, value }) => [key, value]));
    const { target = "", ...rest } = labels;
    assert.deepEqual(rest, {
      madeby: "lbcsi",
      ephemeral: inlineId(),
      node: "n1.node",
      pod: "pod1",
      namespace: "team-a",
      poduid: podUid(),
    });
    assert.equal(Buffer.from(target, "base64url").toString(), targetPath);
    assert.equal(isThere, false);
    await nothingLeft(n);
  }, `mkfs.${fsType}`);
}

inlineTest("a read-only inline volume has a file system and takes no writes, also when published again", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  const request = { ...inlineRequest(targetPath), readonly: true };

  await n.publish(request);
  await n.publish(request);

  const [mount] = await n.mounts();
  assert(mount?.options.includes("ro"));
  assert.deepEqual([...Deno.readDirSync(targetPath)].map(({ name }) => name), ["lost+found"]);
  await assert.rejects(Deno.writeTextFile(join(targetPath, "x"), ""), /Read-only file system/);
  await rejects(n.publish({ ...request, readonly: false }), "ALREADY_EXISTS", /read-only instead of writable/);
  await n.unpublish({ volumeId: inlineId(), targetPath });
  await nothingLeft(n);
});

inlineTest("an inline volume that is refused for good leaves no directory, and one that may come does", async () => {
  await using n = await inlineNode({ data: "none" });
  const targetPath = await n.target();

  await rejects(n.publish(inlineRequest(targetPath, { size: "3Gi" })), "OUT_OF_RANGE", /allows 2147483648$/);
  const afterRefusal = await exists(targetPath);
  n.sim.control.fail({ rpc: "CreateVolume", code: "RESOURCE_EXHAUSTED" });
  await rejects(n.publish(inlineRequest(targetPath)), "RESOURCE_EXHAUSTED", /told to fail/);

  assert.equal(afterRefusal, false);
  assert.equal(await exists(targetPath), true);
});

inlineTest("two inline volumes of one node are made and removed at once without mixing them up", async () => {
  await using n = await inlineNode();
  const targets = await Promise.all([1, 2].map((number) => n.target(number)));
  const numbered = targets.map((target, at) => [target, at + 1] as const);

  await Promise.all(numbered.map(([target, number]) => n.publish(inlineRequest(target, { size: "1Gi" }, number))));
  for (const [target, number] of numbered) await Deno.writeTextFile(join(target, `file${number}`), "");
  const [first = "", second = ""] = targets;
  await n.unpublish({ volumeId: inlineId(1), targetPath: first });
  const left = [...Deno.readDirSync(second)].map(({ name }) => name).sort();
  await n.unpublish({ volumeId: inlineId(2), targetPath: second });

  assert.deepEqual(left, ["file2", "lost+found"]);
  await nothingLeft(n);
});

inlineTest(
  "promise 9: a second call for an inline volume is told which one runs, and the repeat succeeds",
  async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    n.sim.control.fail({ rpc: "CreateVolume", hold: true, when: "after" });

    const published = n.publish(inlineRequest(targetPath));
    await eventually("the creation waits", () => n.sim.control.held().length > 0);
    await rejects(n.publish(inlineRequest(targetPath)), "ABORTED", /NodePublishVolume has been running/);
    await rejects(n.unpublish({ volumeId: inlineId(), targetPath }), "ABORTED", /NodePublishVolume has been running/);
    n.sim.control.releaseHeld();
    await published;
    await n.unpublish({ volumeId: inlineId(), targetPath });

    await nothingLeft(n);
  },
);

inlineTest("an inline volume is published at one target only", async () => {
  await using n = await inlineNode();
  await n.publish(inlineRequest(await n.target()));

  await rejects(n.publish(inlineRequest(await n.target(2))), "UNAVAILABLE", /it is published at ".*", and an inline/);

  assert.equal((await n.mounts()).length, 1);
});

inlineTest("promise 5: unpublish of an inline volume leaves files in an unmounted target, and says so", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await Deno.mkdir(targetPath);
  await Deno.writeTextFile(join(targetPath, "precious"), "");

  await rejects(n.publish(inlineRequest(targetPath)), "FAILED_PRECONDITION", /holds files of the node's own disk/);
  await rejects(n.unpublish({ volumeId: inlineId(), targetPath }), "FAILED_PRECONDITION", /precious|not empty/);

  assert(await exists(join(targetPath, "precious")));
  assert.deepEqual(n.sim.control.leftovers().volumes, []);
});

inlineTest("unpublish of an inline volume leaves a foreign mount at its target alone", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await Deno.mkdir(targetPath);
  await new Deno.Command("mount", { args: ["-t", "tmpfs", "none", targetPath] }).output();

  await rejects(
    n.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    /tmpfs .* is not this volume/,
  );

  assert.deepEqual((await n.mounts()).map(({ fsType }) => fsType), ["tmpfs"]);
});

inlineTest("promise 4: an inline volume whose device was lost is let go of", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const [volume] = n.sim.control.cluster.volumes;
  assert(volume !== undefined);
  await n.sim.control.cluster.updateVolume({ project: "default", uuid: volume.uuid }, { acl: [] }, undefined);
  await eventually("the device goes", () => n.sim.control.machine().devices.length === 0);

  const { volumeCondition } = await n.stats({ volumeId: inlineId(), volumePath: targetPath });
  await n.unpublish({ volumeId: inlineId(), targetPath });

  assert.equal(volumeCondition?.abnormal, true);
  assert.match(volumeCondition?.message ?? "", /has lost its device/);
  await nothingLeft(n);
});

inlineTest("a full file system in an inline volume does not keep it from being removed", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath, { "size": "1Gi", "mkfs-options": "-N 16" }));
  for (let at = 0; at < 16; at++) await Deno.writeTextFile(join(targetPath, `${at}`), "").catch(() => {});

  await n.unpublish({ volumeId: inlineId(), targetPath });

  await nothingLeft(n);
});

inlineTest("the health of an inline volume is told by its path", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const { handlers } = nodeCalls({ host: n.host, attacher: n.attacher, volumeHealth: true });
  const health = async () =>
    await handlers.nodeGetVolumeHealth?.(
      create(NodeGetVolumeHealthRequestSchema, { volumeId: inlineId(), volumePublishPath: targetPath }),
      n.call(),
    );

  const well = await health();
  const [volume] = n.sim.control.cluster.volumes;
  const ref = { project: "default", uuid: volume?.uuid ?? "" };
  await n.sim.control.cluster.updateVolume(ref, { acl: [] }, undefined);
  await eventually("the device goes", () => n.sim.control.machine().devices.length === 0);
  const ill = await health();

  assert.doesNotMatch(JSON.stringify(well), /INACCESSIBLE|DeviceGone/);
  assert.match(JSON.stringify(ill), /DeviceGone/);
});

inlineTest(
  "while the cluster is away, unpublish unmounts an inline volume, is refused, and ends it later",
  async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    await n.publish(inlineRequest(targetPath));
    await n.sim.control.stopEndpoints();

    await rejects(
      n.unpublish({ volumeId: inlineId(), targetPath }),
      "UNAVAILABLE",
      /some clusters cannot be asked \(cluster "rack1", project "default": .*no LightOS management endpoint answers/,
    );
    const mounted = await n.mounts();
    const isThere = await exists(targetPath);
    await n.sim.control.startEndpoints();
    await n.unpublish({ volumeId: inlineId(), targetPath });

    assert.deepEqual(mounted, []);
    assert.equal(isThere, true);
    await nothingLeft(n);
  },
);

inlineTest("a node without a cluster file refuses inline volumes, and says what it leaves of one", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const [volume] = n.sim.control.cluster.volumes;
  // The same node, started without --config.
  const without = nodeCalls({ host: n.host, attacher: n.attacher });
  const other = await n.target(2);

  await rejects(
    without.publish(inlineRequest(other, {}, 2)),
    "FAILED_PRECONDITION",
    /knows no cluster for them, start it with --config and a cluster file that has the key ephemeral/,
  );
  await without.unpublish({ volumeId: inlineId(2), targetPath: other });
  await rejects(
    without.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    new RegExp(
      `namespace ${volume?.uuid} of nqn\\S+ is unmounted, and left on the cluster and attached; this node knows`,
    ),
  );
  const mounted = await n.mounts();
  await rejects(
    without.unpublish({ volumeId: inlineId(), targetPath }),
    "FAILED_PRECONDITION",
    /a volume may be left on the cluster; this node knows no cluster/,
  );
  await n.unpublish({ volumeId: inlineId(), targetPath });

  assert.deepEqual(mounted, []);
  await nothingLeft(n);
});

inlineTest("stage, unstage and expand of an inline volume are refused", async () => {
  await using n = await inlineNode({ data: "none" });
  const volumeId = inlineId();
  const volumeCapability = mountCapability();
  const message = /it is an inline volume of a pod, which is published and unpublished and nothing else/;

  await rejects(n.stage({ volumeId, stagingTargetPath: "/staging", volumeCapability }), "INVALID_ARGUMENT", message);
  await rejects(n.unstage({ volumeId, stagingTargetPath: "/staging" }), "INVALID_ARGUMENT", message);
  await rejects(n.expand({ volumeId, volumePath: "/target" }), "INVALID_ARGUMENT", message);
  await rejects(n.stats({ volumeId, volumePath: n.directory }), "NOT_FOUND", /this node has no block device of it/);
});

inlineTest("publish of an inline volume is refused for a request that cannot be one", async () => {
  await using n = await inlineNode({ data: "none" });
  const targetPath = await n.target();
  const request = inlineRequest(targetPath);
  const { "csi.storage.k8s.io/ephemeral": _, ...unsaid } = request.volumeContext;

  await rejects(n.publish({ ...request, targetPath: "" }), "INVALID_ARGUMENT", /target_path is missing/);
  await rejects(n.publish({ ...request, targetPath: "pods/x" }), "INVALID_ARGUMENT", /not a plain absolute path/);
  await rejects(
    n.publish({ volumeId: request.volumeId, targetPath }),
    "INVALID_ARGUMENT",
    /volume_capability is missing/,
  );
  await rejects(
    n.publish({ ...request, volumeCapability: mountCapability("ext4", Mode.MULTI_NODE_READER_ONLY) }),
    "INVALID_ARGUMENT",
    /its access mode is for several nodes, an inline volume is a file system for one pod/,
  );
  await rejects(
    n.publish({
      ...request,
      volumeCapability: {
        accessMode: { mode: Mode.SINGLE_NODE_WRITER },
        accessType: { case: "block" as const, value: {} },
      },
    }),
    "INVALID_ARGUMENT",
    /volume_capability is block/,
  );
  await rejects(n.publish({ ...request, volumeContext: unsaid }), "FAILED_PRECONDITION", /podInfoOnMount: true/);
  await rejects(n.publish({ ...request, targetPath: "/nowhere/mount" }), "FAILED_PRECONDITION", /is missing/);
  await rejects(
    n.publish(inlineRequest(targetPath, { "size": "1Gi", "mkfs-options": "-F" })),
    "INVALID_ARGUMENT",
    /-F/,
  );
  assert.equal(n.sim.control.callsInAll(), 0);
  assert.deepEqual([...Deno.readDirSync(dirname(targetPath))], []);
});

// -------------------------------------------------------------------------------------------------------------- sweep

inlineTest("a node that starts again removes what its pods have left, and nothing that is in use", async () => {
  await using n = await inlineNode();
  const [gone, living, started] = await Promise.all([1, 2, 3].map((number) => n.target(number)));
  assert(gone !== undefined && living !== undefined && started !== undefined);
  for (const [at, target] of [gone, living, started].entries()) {
    await n.publish(inlineRequest(target, { size: "1Gi" }, at + 1));
  }
  // As after a crash: nothing is mounted. The pods of 2 and 3 are still kubelet's, that of 1 is not.
  await new Deno.Command("umount", { args: [gone] }).output();
  await new Deno.Command("umount", { args: [started] }).output();
  await n.forget(1);

  const isSettled = await n.inline.sweep(n.call());

  assert.equal(isSettled, true);
  await eventually("one volume goes", () => n.sim.control.leftovers().volumes.length === 2);
  const names = n.sim.control.cluster.volumes.filter(({ state }) => state === "Available").map(({ name }) => name);
  assert.deepEqual(names.sort(), [inlineId(2), inlineId(3)]);
  assert.deepEqual((await n.mounts()).map(({ path }) => path), [living]);
  assert(n.lines.some((line) => line.includes("removed a leftover inline volume") && line.includes(inlineId(1))));
  for (const [number, targetPath] of [[2, living], [3, started]] as const) {
    await n.unpublish({ volumeId: inlineId(number), targetPath });
  }
  await nothingLeft(n);
});

inlineTest("promise 1: a sweep keeps a volume that is mounted, though the directory of its pod is gone", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const elsewhere = join(n.directory, "elsewhere");
  await Deno.mkdir(elsewhere);
  await new Deno.Command("mount", { args: ["--bind", targetPath, elsewhere] }).output();
  await new Deno.Command("umount", { args: [targetPath] }).output();
  await n.forget();

  await n.inline.sweep(n.call());

  assert.equal(n.sim.control.leftovers().volumes.length, 1);
  assert(n.lines.some((line) => line.includes("kept an inline volume") && line.includes(`it is mounted at`)));
});

for (const [fsType, place] of [["ext4", "ext4"], ["xfs", "xfs"], ["btrfs", `btrfs/${podUid()}/devices`]] as const) {
  inlineTest(`a sweep keeps a volume that another container has mounted (${fsType})`, async () => {
    await using n = await inlineNode();
    const targetPath = await n.target();
    await n.publish(inlineRequest(targetPath));
    await new Deno.Command("umount", { args: [targetPath] }).output();
    await n.forget();
    const [device] = n.sim.control.machine().devices;
    // The simulated sysfs does not follow the kernel here.
    await Deno.mkdir(`${n.sim.addresses.sysfsRoot}/fs/${place}/${device?.name}`, { recursive: true });

    const isSettled = await n.inline.sweep(n.call());

    assert.equal(isSettled, false);
    assert.equal(n.sim.control.leftovers().volumes.length, 1);
    assert(n.lines.some((line) => line.includes(`${fsType} of `) && line.includes("where this process cannot see it")));
  });
}

inlineTest("a sweep keeps every volume while kubelet's directory is not there to be looked at", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  await new Deno.Command("umount", { args: [targetPath] }).output();
  await Deno.rename(join(n.directory, "pods"), join(n.directory, "unmounted"));

  const isSettled = await n.inline.sweep(n.call());

  assert.equal(isSettled, false);
  assert.equal(n.sim.control.leftovers().volumes.length, 1);
  assert(n.lines.some((line) => line.includes("where its pod was, is not here")));
});

inlineTest(
  "promise 21: a machine with the name of another one does not sweep what that one is connected to",
  async () => {
    await using n = await inlineNode();
    const namespace = await n.volumes.makeVolume(n.call(), new Secrets(), {
      volumeId: inlineId(),
      attributes: { size: "1Gi" },
      nodeId: "n1.node",
      targetPath: `/pods/${podUid()}/volumes/kubernetes.io~csi/scratch/mount`,
      pod: { namespace: "team-a", name: "pod", uid: podUid() },
      isRepeat: false,
    });
    await n.attacher.attach(n.call(), namespace);
    await eventually("the first machine is connected", () => n.sim.control.machine().devices.length === 1);
    // It has kubelet's directory, and neither the pod nor a connection.
    const twin = nodeCalls({ host: new FakeHost(), attacher: n.attacher, volumes: n.volumes });

    const isSettled = await twin.inline.sweep(n.call());

    assert.equal(isSettled, false);
    assert.equal(n.sim.control.leftovers().volumes.length, 1);
    assert(
      n.lines.some((line) => line.includes("a host of this node's name is connected to it, and this machine is not")),
    );
  },
);

inlineTest("promise 9: a sweep waits with a leftover that a call works on", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  n.sim.control.fail({ rpc: "DeleteVolume", hold: true });
  const unpublished = n.unpublish({ volumeId: inlineId(), targetPath });
  await eventually("the deletion waits", () => n.sim.control.held().length > 0);
  await n.forget();

  const during = await n.inline.sweep(n.call());
  n.sim.control.releaseHeld();
  await unpublished;
  const after = await n.inline.sweep(n.call());

  assert.deepEqual([during, after], [false, true]);
  await nothingLeft(n);
});

inlineTest("promise 9: calls for an inline volume in use go on while a sweep looks at it", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  await n.publish(inlineRequest(targetPath));
  const answers: Promise<unknown>[] = [];
  // As soon as the sweep has read its list.
  using _watch = n.sim.control.watchCalls(({ phase, rpc }) => {
    if (phase === "end" && rpc === "ListVolumes" && answers.length === 0) {
      answers.push(n.publish(inlineRequest(targetPath)));
    }
  });

  const isSettled = await n.inline.sweep(n.call());
  await Promise.all(answers);

  assert.deepEqual([isSettled, answers.length], [true, 1]);
  await n.unpublish({ volumeId: inlineId(), targetPath });
  await nothingLeft(n);
});

inlineTest("a sweep leaves the volumes of other nodes, and ordinary ones, alone", async () => {
  await using n = await inlineNode({ data: "none" });
  const { volumes } = n;
  const wanted = (nodeId: string, number: number) => ({
    volumeId: inlineId(number),
    attributes: { size: "1Gi" },
    nodeId,
    targetPath: join(n.directory, "pods", podUid(number), "volumes/kubernetes.io~csi/scratch/mount"),
    pod: { namespace: "team-a", name: "pod", uid: podUid(number) },
    isRepeat: false,
  });
  await Deno.mkdir(join(n.directory, "pods"));
  await volumes.makeVolume(n.call(), new Secrets(), wanted("n2.node", 1));
  await volumes.makeVolume(n.call(), new Secrets(), wanted("n1.node", 2));

  const isSettled = await n.inline.sweep(n.call());

  assert.equal(isSettled, true);
  const left = () => n.sim.control.leftovers().volumes.filter((text) => !text.endsWith("Deleting"));
  assert.equal(left().length, 1);
  assert.match(left()[0] ?? "", new RegExp(inlineId(1)));
  assert.deepEqual(n.sim.control.visible(inlineHost), []);
});

// ---------------------------------------------------------------------------------------------------------- processes

inlineTest("publish and unpublish of one inline volume that race leave nothing after the last unpublish", async () => {
  await using n = await inlineNode();
  const targetPath = await n.target();
  const unpublish = () => n.unpublish({ volumeId: inlineId(), targetPath });
  const codes = new Set<string>();

  for (let round = 0; round < 5; round++) {
    const racing = await Promise.allSettled([
      n.publish(inlineRequest(targetPath)),
      unpublish(),
      n.publish(inlineRequest(targetPath)),
      unpublish(),
    ]);
    for (const outcome of racing) {
      codes.add(outcome.status === "rejected" ? String(outcome.reason.code) : "OK");
    }
    await unpublish();
    await nothingLeft(n);
  }

  assert.deepEqual([...codes].sort(), ["ABORTED", "OK"]);
});

inlineTest(
  "a killed node process sweeps when it starts again, lbcsi sweep does for one that never does, and no log holds a token",
  async () => {
    const signal = AbortSignal.timeout(60_000);
    const home = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-inline-" }));
    const testbed = new Testbed(home, lbcsi);
    try {
      await testbed.startSimulator("loop", signal);
      const { adminJwt, jwt, ca = "", grpcs, discoveryDir = "", devRoot = "", sysfsRoot = "" } = testbed.addresses;
      const config = join(home, "clusters.yaml");
      await Deno.writeTextFile(join(home, "jwt"), `${adminJwt}\n`);
      await Deno.writeTextFile(join(home, "ca.pem"), ca);
      await Deno.writeTextFile(
        config,
        JSON.stringify({
          clusters: [{
            name: "rack1",
            endpoints: grpcs,
            ca: join(home, "ca.pem"),
            jwt: join(home, "jwt"),
            ephemeral: { projects: ["default"], maxSize: "1Gi" },
          }],
        }),
      );
      const places = ["--discovery-dir", discoveryDir, "--dev", devRoot, "--sysfs", sysfsRoot];
      const words = ["--node-id", "n1.node", "--config", config, ...places, "--log-level", "debug"];
      const start = () => testbed.startService("node", words, signal);
      const targets = [1, 2].map((number) => join(home, "pods", podUid(number), "volumes/x/scratch/mount"));
      const node = await start();
      for (const [at, targetPath] of targets.entries()) {
        await Deno.mkdir(dirname(targetPath), { recursive: true });
        const request = { ...inlineRequest(targetPath, { size: "1Gi" }, at + 1), secrets: { jwt } };
        await testbed.node.call(Node.method.nodePublishVolume, request, { signal });
      }
      const sweep = async (...more: string[]) => {
        const [program, ...args] = lbcsi;
        const words = ["sweep", "--config", config, "--node-id", "n1.node", ...more];
        const { code, stdout } = await new Deno.Command(program, { args: [...args, ...words] }).output();
        return { code, text: new TextDecoder().decode(stdout) };
      };
      const volumes = async () => (await testbed.observe()).volumes.filter(({ state }) => state === "Available").length;

      // The node dies, and with it pod 1 while kubelet is not looking; pod 2 goes on after the restart.
      await node.end("SIGKILL", 1000);
      await new Deno.Command("umount", { args: [targets[0] ?? ""] }).output();
      await Deno.remove(join(home, "pods", podUid(1)), { recursive: true });
      await start();
      await eventually("the leftover goes", async () => await volumes() === 1);
      await testbed.node.call(Node.method.nodePublishVolume, inlineRequest(targets[1] ?? "", { size: "1Gi" }, 2), {
        signal,
      });
      const listed = await sweep();
      const refused = await sweep("--delete");
      const kept = await volumes();
      await testbed.running("node")?.end("SIGKILL", 1000);
      await new Deno.Command("umount", { args: [targets[1] ?? ""] }).output();
      const removed = await sweep("--delete", "--even-if-connected");
      const again = await sweep("--delete");

      assert.equal(listed.code, 0);
      assert.match(
        listed.text,
        /^\S{36} {2}1073741824 bytes {2}cluster "rack1", project "default" {2}pod team-a\/pod2: connected to the node, left alone\n1 inline volumes of n1\.node, nothing was changed \(--delete\)\n$/,
      );
      assert.equal(refused.code, 1);
      assert.match(refused.text, /refused: the node is connected to it \(--even-if-connected\)/);
      assert.equal(kept, 1);
      assert.equal(removed.code, 0);
      assert.match(removed.text, /: connected to the node, removed\n/);
      assert.equal(again.text, "0 inline volumes of n1.node\n");
      const left = await testbed.clusterWhenIdle(signal);
      assert.deepEqual([left["volumes"], left["access"]], [[], []]);
      assert.deepEqual(await testbed.logsContaining([adminJwt, jwt]), []);
    } finally {
      const failed = (await testbed.cleanUp(false)).filter(({ done }) => !done);
      assert.deepEqual(failed, []);
    }
  },
);

for (
  const [args, message] of [
    [[], /--config is missing.*\n.*--node-id is missing/],
    [["--config", "/nonexistent", "--node-id", "a.node"], /Cannot use cluster file \/nonexistent: /],
    [["--config", "c.yaml", "--node-id", "a.node"], /"c\.yaml": is not an absolute path/],
    [["--config", "/dev/null", "--node-id", "a b"], /--node-id "a b": only letters, digits/],
  ] as const
) {
  Deno.test(`lbcsi sweep ${args.join(" ")} ends with status 2 and says why`, async () => {
    const [program, ...own] = lbcsi;
    const { code, stderr } = await new Deno.Command(program, { args: [...own, "sweep", ...args] }).output();

    assert.equal(code, 2);
    assert.match(new TextDecoder().decode(stderr), message);
  });
}

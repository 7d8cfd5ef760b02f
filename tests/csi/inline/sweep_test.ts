/** The removal of leftover inline volumes, by the node service and by `lbcsi sweep`. */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Testbed } from "../../../lib/demo/testbed.ts";
import { Secrets } from "../../../lib/secrets.ts";
import { Node } from "../../../proto/gen/csi_pb.ts";
import { FakeHost } from "../../support/fake_host.ts";
import {
  assertNothingLeft,
  inlineHost,
  inlineId,
  inlineNode,
  inlineRequest,
  inlineTest,
  podUid,
} from "../../support/inline_node.ts";
import { nodeCalls } from "../../support/node_calls.ts";
import { eventually } from "../../support/simulator.ts";

const lbcsi = [Deno.execPath(), "run", "-A", fileURLToPath(new URL("../../../main.ts", import.meta.url))] as const;

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
  await assertNothingLeft(n);
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

inlineTest("a sweep keeps every volume while kubelet's directory is missing", async () => {
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

inlineTest("promise 9: a sweep postpones a leftover while a call for it runs", async () => {
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
  await assertNothingLeft(n);
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
  await assertNothingLeft(n);
});

inlineTest("a sweep leaves the volumes of other nodes, and ordinary ones, alone", async () => {
  await using n = await inlineNode({ data: "none" });
  const { volumes } = n;
  const volumeRequest = (nodeId: string, number: number) => ({
    volumeId: inlineId(number),
    attributes: { size: "1Gi" },
    nodeId,
    targetPath: join(n.directory, "pods", podUid(number), "volumes/kubernetes.io~csi/scratch/mount"),
    pod: { namespace: "team-a", name: "pod", uid: podUid(number) },
    isRepeat: false,
  });
  await Deno.mkdir(join(n.directory, "pods"));
  await volumes.makeVolume(n.call(), new Secrets(), volumeRequest("n2.node", 1));
  await volumes.makeVolume(n.call(), new Secrets(), volumeRequest("n1.node", 2));

  const isSettled = await n.inline.sweep(n.call());

  assert.equal(isSettled, true);
  const left = () => n.sim.control.leftovers().volumes.filter((text) => !text.endsWith("Deleting"));
  assert.equal(left().length, 1);
  assert.match(left()[0] ?? "", new RegExp(inlineId(1)));
  assert.deepEqual(n.sim.control.visible(inlineHost), []);
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
      const failedSweep = await sweep("--delete");
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
      assert.equal(failedSweep.code, 1);
      assert.match(failedSweep.text, /not removed: the node is connected to it \(--even-if-connected\)/);
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

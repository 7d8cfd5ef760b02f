/** `lbcsi attach`, `list` and `detach` on real NVMe/TCP: a known place, a cluster, and what they say while things are broken. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Check, Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import { controllers, deviceOf, devicesWith, mountsBelow, program, run, tool, until } from "../testbed.ts";

const nodeId = "shell.node";
const us = hostNqn(nodeId);

async function lbcsi(...args: readonly string[]) {
  const [deno = "", ...words] = program;
  // Its own deadline is not what is tried here.
  const patient = args[0] === "list" ? args : [...args, "--timeout", "300"];
  return await run(deno, ...words, ...patient);
}

const checks: readonly Check[] = [
  {
    name: "attach, list and detach of a known place: a device, a file system when asked for, and nothing at the end",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      target.offer(1);
      target.offer(2);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", nodeId];
      const address = ["--address", "127.0.0.1:4421,127.0.0.1:4422"];
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });

      const begin = performance.now();
      const attached = await lbcsi("attach", ...place, ...address);
      testbed.measured("lbcsi attach", `${Math.round(performance.now() - begin)} ms`);
      assert.deepEqual(attached, { code: 0, stdout: deviceOf(target.uuid), stderr: "" });
      const mounted = await lbcsi("attach", ...place, ...address, "--mount", mnt, "--format");
      assert.deepEqual(mounted, { code: 0, stdout: `${deviceOf(target.uuid)} ${mnt}`, stderr: "" });
      await Deno.writeTextFile(join(mnt, "file"), "precious");
      const listed = JSON.parse((await lbcsi("list", "--json")).stdout);
      assert.equal(listed.volumes.length, 1);
      assert.deepEqual(
        listed.volumes[0].paths.map((
          { address, state, anaState }: Record<string, string>,
        ) => [address, state, anaState]),
        [["127.0.0.1:4421", "live", "optimized"], ["127.0.0.1:4422", "live", "optimized"]],
      );
      assert.equal(listed.volumes[0].fileSystem, "ext4");
      const busy = await lbcsi("detach", ...place);
      assert.equal(busy.code, 1);
      assert.match(busy.stderr, new RegExp(`is in use by the mount at "${mnt}"`));

      assert.deepEqual(await lbcsi("detach", ...place, "--mount", mnt), { code: 0, stdout: "", stderr: "" });
      assert.deepEqual([devicesWith(target.uuid), controllers(), mountsBelow(testbed.home)], [[], [], []]);
    },
  },
  {
    name: "list answers and detach refuses while all paths are down, and both do their work when one is back",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      target.offer(1);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", nodeId];
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });
      const attached = await lbcsi("attach", ...place, "--address", "127.0.0.1:4421", "--mount", mnt, "--format");
      assert.equal(attached.code, 0, attached.stderr);
      await Deno.writeTextFile(join(mnt, "file"), "not yet written to the device");
      target.withdraw(1);
      await until("the path is down", () => controllers().every(({ state }) => state !== "live"), 90);

      const begin = performance.now();
      const { stdout } = await lbcsi("list");
      testbed.measured("lbcsi list without a path", `${Math.round(performance.now() - begin)} ms`);
      assert.match(stdout, /^ {2}path {3}nvme\d+ {2}127\.0\.0\.1:4421 {2}connecting {2}\S+$/m);
      assert.match(stdout, new RegExp(`^ {2}mount {2}${mnt} {2}ext4 {2}rw$`, "m"));
      const refused = await lbcsi("detach", ...place, "--mount", mnt);
      assert.equal(refused.code, 1);
      assert.match(refused.stderr, /has no live path \(nvme\d+ connecting/);
      assert.deepEqual(mountsBelow(mnt), [mnt]);
      target.offer(1);
      await until("the path is back", () => controllers().every(({ state }) => state === "live"), 90);

      assert.deepEqual(await lbcsi("detach", ...place, "--mount", mnt), { code: 0, stdout: "", stderr: "" });
      assert.deepEqual(controllers(), []);
    },
  },
  {
    name: "detach takes away what a connection that was lost for good has left",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      target.offer(1);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", nodeId];
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });
      const attached = await lbcsi("attach", ...place, "--address", "127.0.0.1:4421", "--mount", mnt, "--format");
      assert.equal(attached.code, 0, attached.stderr);
      await tool("nvme", "disconnect", `--nqn=${target.nqn}`);
      const { stdout } = await lbcsi("list");
      assert.match(stdout, new RegExp(`^ {2}${mnt} {2}ext4 {2}rw {2}was /dev/nvme\\d+n\\d+$`, "m"));

      assert.deepEqual(await lbcsi("detach", ...place, "--mount", mnt), { code: 0, stdout: "", stderr: "" });

      assert.deepEqual([mountsBelow(mnt), controllers()], [[], []]);
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

/** `lbcsi attach`, `list` and `detach` on real NVMe/TCP. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Check, Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import { controllers, deviceOf, devicesWith, mountsBelow, program, run } from "../world.ts";

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
    async run(world) {
      await using target = new Target(world.home, [us]);
      target.offer(1);
      target.offer(2);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", nodeId];
      const address = ["--address", "127.0.0.1:4421,127.0.0.1:4422"];
      const mnt = join(world.home, "mnt");
      await Deno.mkdir(mnt);

      const begin = performance.now();
      const attached = await lbcsi("attach", ...place, ...address);
      world.measured("lbcsi attach", `${Math.round(performance.now() - begin)} ms`);
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
      assert.deepEqual([devicesWith(target.uuid), controllers(), mountsBelow(world.home)], [[], [], []]);
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

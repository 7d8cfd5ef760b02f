/**
 * The whole way from the management API to a device by each of its entrances: `lbcsi attach` with a volume ID, and a node
 * that leaves connecting to a daemon.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hostNqn } from "../../../lib/namespace.ts";
import { scenario as of } from "../scenario.ts";
import {
  controllers,
  deviceOf,
  devicesWith,
  mountsBelow,
  names,
  nodeId,
  program,
  read,
  run,
  until,
} from "../testbed.ts";

async function lbcsi(...args: readonly string[]) {
  const [deno = "", ...words] = program;
  return await run(deno, ...words, ...args, "--timeout", "300");
}

/** `127.0.0.1:8009 discovery live` and the like. */
function connections(): readonly string[] {
  return controllers().map(({ name, address, state }) => {
    const [, ip, port] = /traddr=([^,]+),trsvcid=(\d+)/.exec(address) ?? [];
    return `${ip}:${port} ${read(`/sys/class/nvme/${name}/cntrltype`)} ${state}`;
  }).sort();
}

export const scenario = of([
  {
    name: "lbcsi attach takes a volume ID and a token, grants, connects and mounts; detach undoes exactly that",
    async run(testbed) {
      const volume = await testbed.volume({}, false);
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });
      const token = join(testbed.home, "token");
      await Deno.writeTextFile(token, `${testbed.secrets["jwt"]}\n`, { mode: 0o600 });
      const args = [volume.id, "--node-id", "rescue.node", "--jwt-path", token];
      const owner = async () =>
        (await testbed.processes.observe()).volumes.find(({ uuid }) => uuid === volume.uuid)?.acl;

      const attached = await lbcsi("attach", ...args, "--mount", mnt, "--format");

      assert.deepEqual(attached, { code: 0, stdout: `${deviceOf(volume.uuid)} ${mnt}`, stderr: "" });
      assert.deepEqual(await owner(), [hostNqn("rescue.node")]);
      assert.equal(controllers().length, 2);
      await Deno.writeTextFile(join(mnt, "file"), "precious");
      const detached = await lbcsi("detach", ...args, "--mount", mnt);
      assert.deepEqual(detached, { code: 0, stdout: "", stderr: "" });
      assert.deepEqual([controllers(), mountsBelow(mnt), devicesWith(volume.uuid)], [[], [], []]);
      assert.notDeepEqual(await owner(), [hostNqn("rescue.node")]);

      await volume.grant();
      await volume.stage();
      assert.equal(await Deno.readTextFile(join(volume.staging, "file")), "precious");
      const taken = await lbcsi("attach", ...args);
      assert.equal(taken.code, 1);
      assert.match(taken.stderr, /guest\.node/);
      await volume.end();
      await testbed.nothingLeft();
    },
  },
  {
    name:
      "a node that leaves connecting to lbcsi discovery-client: the cluster's discovery service leads to the device",
    async run(testbed) {
      const directory = join(testbed.home, "discovery.d");
      await Deno.mkdir(directory, { recursive: true });
      const [deno = "", ...words] = program;
      const daemon = new Deno.Command("sh", {
        args: [
          ...["-c", 'exec "$0" "$@" 2>>"$LOG"', deno, ...words, "discovery-client", "--discovery-dir", directory],
          ...["--poll", "1"],
        ],
        env: { LOG: join(testbed.home, "discovery-client.log") },
        stdin: "null",
        stdout: "null",
      }).spawn();
      await testbed.processes.running("node")?.end("SIGTERM", 30_000);
      await testbed.startNode(["--attach", "discovery-client", "--discovery-dir", directory]);
      try {
        const volume = await testbed.volume();
        const began = performance.now();
        await volume.stage(120);
        testbed.measured("stage through the daemon, first volume", `${Math.round(performance.now() - began)} ms`);
        await volume.publish();
        await Deno.writeTextFile(`${volume.target}/file`, "written");
        await until(
          "both paths are there",
          () => connections().filter((one) => one.includes(" io live")).length === 2,
          60,
        );
        assert.deepEqual(
          connections().filter((one) => one.startsWith("127.0.0.1:")),
          ["127.0.0.1:4420 discovery live", "127.0.0.1:4420 io live", "127.0.0.1:8009 discovery live"],
        );
        assert.deepEqual(names(directory).filter((name) => !name.startsWith("tmp.")), [volume.uuid]);
        assert.equal(controllers().every((one) => one.hostNqn === hostNqn(nodeId)), true);

        await volume.end();
        await until("the daemon disconnects", () => controllers().length === 0, 120);
        await testbed.nothingLeft();
      } finally {
        daemon.kill("SIGTERM");
        await daemon.status;
        await testbed.processes.running("node")?.end("SIGTERM", 30_000);
        await testbed.startNode();
      }
    },
  },
]);

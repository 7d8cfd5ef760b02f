import assert from "node:assert/strict";
import type { DhchapKeys } from "../../lib/auth_key.ts";
import { createDiscoveryDaemon } from "../../lib/discovery/daemon.ts";
import { createLogger } from "../../lib/log.ts";
import { keyMachine, newKeys, nodeNqn, revealKeys, uuid } from "../support/key_machine.ts";
import { subsystemNqn as nqn } from "../support/loop_machine.ts";

Deno.test("the daemon connects I/O controllers with its keys, discovery controllers without, and changes keys", async () => {
  const [first, second] = [newKeys(), newKeys("bidirectional")];
  const { host, demand } = keyMachine(first);
  host.playsDiscoveryClient = false;
  host.logPages.set("192.0.2.1:8009", { generation: 1, records: [{ address: "192.0.2.1:4420", subsystemNqn: nqn }] });
  await host.replaceText(
    `${host.discoveryDirectory}/${uuid}`,
    `-t tcp -a 192.0.2.1 -s 8009 -q ${nodeNqn} -n ${nqn}\n`,
  );
  const settle = async (keys: DhchapKeys) => {
    const daemon = createDiscoveryDaemon({
      host,
      directory: host.discoveryDirectory,
      log: createLogger("error"),
      pollMs: 10_000,
      controllerLossSeconds: 600,
      keepAliveSeconds: 10,
      ioQueues: undefined,
      keys,
    });
    for (let turn = 0; turn < 6; turn++) {
      await daemon.look();
      await daemon.idle();
    }
  };
  const io = () => host.controllers.filter(({ trsvcid }) => trsvcid === "4420").map(({ keys }) => keys);

  await settle(first);
  assert.deepEqual(io(), [revealKeys(first)]);
  assert(host.commands.some((command) => command.startsWith("nvme connect") && command.includes("--trsvcid=8009")));
  demand(second);
  await settle(second);
  assert.deepEqual(io(), [revealKeys(second)]);
  assert.equal(host.devices.length, 1);
  host.commands.splice(0);
  await settle(newKeys());

  assert.deepEqual(io(), [revealKeys(second)], "a wrong key does not cost the connection");
});

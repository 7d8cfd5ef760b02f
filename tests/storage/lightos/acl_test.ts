/** Errors about access lists with many hosts. */
import { rejects } from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import { failsWith, hostA, none, startCluster, within } from "../../support/backends.ts";

Deno.test("the error about a volume that many hosts have names some of them and their number", async () => {
  await using env = await startCluster(1);
  const { id } = await env.backend.createVolume(within(5000), none, env.request("pvc-1"));
  for (let at = 10; at < 25; at++) {
    await env.backend.grantAccess(within(5000), none, id, { hostNqn: hostNqn(`node-${at}`), shared: true });
  }

  await rejects(
    env.backend.grantAccess(within(5000), none, id, { hostNqn: hostA, shared: false }),
    failsWith("FAILED_PRECONDITION", /: node-10, node-11, .*node-19 and 5 others has it, and its access mode/),
  );
  await rejects(
    env.backend.deleteVolume(within(5000), none, id),
    failsWith("FAILED_PRECONDITION", /: node-10, .*node-19 and 5 others may still connect to it/),
  );
});

/** What is shown of LightOS volumes. */
import { match } from "node:assert/strict";
import { none, startLightos, within } from "../../support/backends.ts";

Deno.test("getVolume returns the condition of a volume", async () => {
  await using env = await startLightos();
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  env.simulator.control.setVolume(uuid, { protection: "ReadOnly" });

  const volume = await env.backend.getVolume(within(5000), none, id);

  match(volume.condition?.message ?? "", /writes fail \(LightOS: ReadOnly/);
});

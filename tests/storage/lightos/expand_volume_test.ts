/** Growing LightOS volumes. */
import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { gib, none, startLightos, within } from "../../support/backends.ts";

Deno.test("growing a volume costs two management calls, and none more when it is large enough", async () => {
  await using env = await startLightos({ servers: 1 });
  const { id, uuid } = await env.backend.createVolume(within(5000), none, env.request());
  const grow = (bytes: bigint) =>
    env.backend.expansion?.expandVolume(within(5000), none, id, { requiredBytes: bytes, limitBytes: 0n });
  env.simulator.control.resetCalls();

  strictEqual((await grow(gib + 1n))?.capacityBytes, 2n * gib);

  const counts = Object.entries(env.simulator.control.calls()).map(([rpc, { total }]) => [rpc, total]);
  deepStrictEqual(Object.fromEntries(counts), { GetVolume: 1, UpdateVolume: 1 });
  strictEqual(env.simulator.control.cluster.getVolume({ project: "default", uuid }).sizeBytes, 2n * gib);
  env.simulator.control.resetCalls();
  strictEqual((await grow(gib))?.capacityBytes, 2n * gib);
  strictEqual(env.simulator.control.calls()["GetVolume"]?.total, 1);
  strictEqual(env.simulator.control.calls()["UpdateVolume"], undefined);
});

for (const when of ["before", "after"] as const) {
  Deno.test(`growing a volume whose answer is lost ${when} the effect answers the size that it has`, async () => {
    await using env = await startLightos();
    const { id } = await env.backend.createVolume(within(5000), none, env.request());
    env.simulator.control.fail({ rpc: "UpdateVolume", count: 1, drop: true, when });

    const grown = await env.backend.expansion?.expandVolume(within(8000), none, id, {
      requiredBytes: 3n * gib,
      limitBytes: 0n,
    });

    strictEqual(grown?.capacityBytes, 3n * gib);
  });
}

/** ControllerExpandVolume, over real sockets, against a simulated cluster. */
import { deepStrictEqual, rejects, strictEqual } from "node:assert/strict";
import { Controller } from "../../../proto/gen/csi_pb.ts";
import { answers, startControlledCluster, writer } from "../../support/controller_service.ts";
import { gib } from "../../support/backends.ts";

Deno.test("ControllerExpandVolume grows a volume, twice in a row, and asks for the node's step", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const request = { volumeId, secrets, capacityRange: { requiredBytes: 2n * gib + 1n }, volumeCapability: writer };

  const first = await env.call(Controller.method.controllerExpandVolume, request);
  const second = await env.call(Controller.method.controllerExpandVolume, request);

  deepStrictEqual([first.capacityBytes, first.nodeExpansionRequired], [3n * gib, true]);
  deepStrictEqual(second, first);
  strictEqual(env.simulator.control.cluster.volumes[0]?.sizeBytes, 3n * gib);
});

for (
  const [what, capacityRange, code, message] of [
    ["no capacity range", undefined, "INVALID_ARGUMENT", /capacity_range is missing/],
    ["a limit below whole GiB", { requiredBytes: gib + 1n, limitBytes: gib + 2n }, "OUT_OF_RANGE", /whole GiB/],
  ] as const
) {
  Deno.test(`ControllerExpandVolume with ${what} answers ${code}`, async () => {
    await using env = await startControlledCluster();
    const volumeId = await env.create("pvc-1");
    const request = { volumeId, secrets: env.secrets, ...(capacityRange === undefined ? {} : { capacityRange }) };

    await rejects(env.call(Controller.method.controllerExpandVolume, request), answers(code, message));
    strictEqual(env.simulator.control.cluster.volumes[0]?.sizeBytes, gib);
  });
}

Deno.test("ControllerExpandVolume never shrinks: a smaller size is done, a limit below the size is OUT_OF_RANGE", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const grow = (requiredBytes: bigint, limitBytes = 0n) =>
    env.call(Controller.method.controllerExpandVolume, {
      volumeId,
      secrets,
      capacityRange: { requiredBytes, limitBytes },
    });
  await grow(3n * gib);

  strictEqual((await grow(2n * gib)).capacityBytes, 3n * gib);
  await rejects(grow(gib, 2n * gib), answers("OUT_OF_RANGE", /has 3221225472 bytes, above limit_bytes 2147483648/));
});

Deno.test("promise 30: ControllerExpandVolume on a full cluster answers OUT_OF_RANGE, after which Kubernetes takes a smaller size", async () => {
  await using env = await startControlledCluster();
  const { secrets } = env;
  const volumeId = await env.create("pvc-1");
  const grow = (requiredBytes: bigint) =>
    env.call(Controller.method.controllerExpandVolume, { volumeId, secrets, capacityRange: { requiredBytes } });

  await rejects(
    grow(1n << 50n),
    answers(
      "OUT_OF_RANGE",
      /^Cannot expand volume .* are free.*; ask for less, .* claim, or make room on the cluster$/,
    ),
  );

  strictEqual((await grow(2n * gib)).capacityBytes, 2n * gib);
});

Deno.test("ControllerExpandVolume of an absent volume answers NOT_FOUND", async () => {
  await using env = await startControlledCluster();
  const volumeId = (await env.create("pvc-1")).replace(/nguid:[^|]+/, `nguid:${crypto.randomUUID()}`);

  await rejects(
    env.call(Controller.method.controllerExpandVolume, {
      volumeId,
      secrets: env.secrets,
      capacityRange: { requiredBytes: gib },
    }),
    answers("NOT_FOUND", /^Cannot expand volume /),
  );
});

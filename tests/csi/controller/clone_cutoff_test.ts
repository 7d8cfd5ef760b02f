/** Clones whose driver is killed, or whose connection is lost, at each management call: the repeat converges. */
import { deepStrictEqual, ok, strictEqual } from "node:assert/strict";
import { type RequestContext, requestContext } from "../../../lib/context.ts";
import { StatusError } from "../../../lib/error.ts";
import type { StorageBackend, VolumeRequest } from "../../../lib/storage/backend.ts";
import { answers } from "../../support/controller_service.ts";
import { gib, none, openLightos, quiet } from "../../support/backends.ts";
import { eventually } from "../../support/simulator.ts";
import { makeSources, startSnapshots, uuidOf } from "../../support/snapshots.ts";

/** The context of a caller that can go away at once. */
function leavable(): { readonly ctx: RequestContext; readonly leave: () => void } {
  const caller = new AbortController();
  return {
    ctx: requestContext(caller.signal, new Date(Date.now() + 60_000), quiet),
    leave: () => caller.abort(new StatusError("CANCELLED", "the caller has gone")),
  };
}

/** A source, a request to copy it, and drivers that start and end. */
async function cloning(type: "volume" | "snapshot" = "volume") {
  const env = await startSnapshots();
  const { volumeId, snapshotId } = await makeSources(env);
  const request: VolumeRequest = {
    name: "copy",
    requiredBytes: 3n * gib,
    limitBytes: 0n,
    parameters: env.parameters(),
    source: { type, id: type === "volume" ? volumeId : snapshotId },
  };
  return {
    ...env,
    sourceId: volumeId,
    request,
    /** What a new driver does, without the memory of earlier ones. */
    async fresh<T>(work: (backend: StorageBackend, ctx: RequestContext) => Promise<T>): Promise<T> {
      await using backend = openLightos(env.simulator);
      return await work(backend, leavable().ctx);
    },
    /**
     * Runs `work` in a driver that is gone for good at its `skip`th management call; false: it was done before that.
     */
    async cutOff(
      skip: number,
      when: "before" | "after",
      work: (backend: StorageBackend, ctx: RequestContext) => Promise<unknown>,
    ): Promise<boolean> {
      await using backend = openLightos(env.simulator);
      const { ctx, leave } = leavable();
      // So that looks at the state are among the calls.
      env.control.behave({ creationMs: 5 });
      env.control.fail({ rpc: "*", hold: true, when, skip });
      const working = work(backend, ctx).then(() => "done", () => "failed");
      const end = await Promise.race([working, eventually("a call is held", () => env.control.held().length > 0)]);
      leave();
      await working;
      env.control.behave({ creationMs: 0 });
      env.control.clearFaults();
      env.control.releaseHeld();
      return end !== "done";
    },
    async noTraffic() {
      await eventually("no call is held", () => env.control.held().length === 0);
    },
  };
}

for (const when of ["before", "after"] as const) {
  for (const kind of ["volume", "snapshot"] as const) {
    Deno.test(`promise 8: CreateVolume from a ${kind}, killed ${when} any management call, converges to one volume and no helper`, async () => {
      await using env = await cloning(kind);
      let cuts = 0;

      for (;; cuts++) {
        const wasCut = await env.cutOff(cuts, when, (backend, ctx) => backend.createVolume(ctx, none, env.request));
        await env.noTraffic();
        const volume = await env.fresh((backend, ctx) => backend.createVolume(ctx, none, env.request));

        const copies = env.cluster.volumes.filter(({ name, state }) => name === "copy" && state === "Available");
        deepStrictEqual(
          copies.map(({ uuid, sizeBytes }) => [uuid, sizeBytes]),
          [[volume.uuid, 3n * gib]],
          `cut ${cuts}`,
        );
        deepStrictEqual(env.kept(), ["origin-snapshot"], `cut ${cuts}`);
        // Nor does anything come back once the clone is deleted.
        await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, volume.id));
        await eventually("all is gone", () => env.cluster.volumes.length === 1 && env.cluster.snapshots.length === 1);
        if (!wasCut) break;
      }

      // Version, look, source, volume and its state; for a clone also snapshot and its state, helpers, deletion.
      ok(cuts >= (kind === "volume" ? 9 : 5), `${cuts} cuts`);
    });
  }

  Deno.test(`promise 8: DeleteVolume of a clone with helpers left, killed ${when} any management call, leaves nothing`, async () => {
    await using env = await cloning();

    for (let cut = 0;; cut++) {
      const { id } = await env.fresh((backend, ctx) => backend.createVolume(ctx, none, env.request));
      const helper = env.cluster.volumes.find(({ name }) => name === "copy")?.sourceSnapshotName ?? "";
      await env.cluster.createSnapshot({
        project: "default",
        name: helper.replace(/[0-9a-f]{12}$/, cut.toString(16).padStart(12, "0")),
        description: "",
        source: { uuid: uuidOf(env.sourceId), name: "" },
        retentionMs: undefined,
      });
      const wasCut = await env.cutOff(cut, when, (backend, ctx) => backend.deleteVolume(ctx, none, id));
      await env.noTraffic();

      await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, id));

      await eventually("all is gone", () => env.cluster.volumes.length === 1 && env.cluster.snapshots.length === 1);
      if (!wasCut) break;
    }
  });

  Deno.test(`promise 8: CreateVolume of a clone whose connection is lost ${when} any management call goes on by itself or on repeat`, async () => {
    await using env = await cloning();

    for (let cut = 0; cut < 9; cut++) {
      env.control.fail({ rpc: "*", drop: true, when, skip: cut });
      const work = (backend: StorageBackend, ctx: RequestContext) => backend.createVolume(ctx, none, env.request);
      const volume = await env.fresh(async (backend, ctx) => {
        try {
          return await work(backend, ctx);
        } catch (error) {
          answers("UNAVAILABLE", /./)(error);
          return await work(backend, ctx);
        }
      });
      env.control.clearFaults();

      strictEqual(env.cluster.volumes.filter(({ name }) => name === "copy").length, 1, `cut ${cut}`);
      deepStrictEqual(env.kept(), ["origin-snapshot"], `cut ${cut}`);
      await env.fresh((backend, ctx) => backend.deleteVolume(ctx, none, volume.id));
      await eventually("the copy has gone", () => env.cluster.volumes.length === 1);
    }
  });
}

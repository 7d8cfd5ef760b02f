import assert from "node:assert/strict";
import { sleep, unlessAborted } from "../lib/timing.ts";

Deno.test("sleep resolves in time, rejects with the signal's reason, and leaves no listener behind", async () => {
  const controller = new AbortController();
  await sleep(1, controller.signal);
  const pending = sleep(60_000, controller.signal);
  const reason = new Error("enough");

  controller.abort(reason);

  await assert.rejects(pending, reason);
  await assert.rejects(sleep(1, controller.signal), reason);
});

Deno.test("unlessAborted answers as the promise does, or rejects first with the signal's reason", async () => {
  const controller = new AbortController();
  assert.equal(await unlessAborted(Promise.resolve(5), controller.signal), 5);
  await assert.rejects(unlessAborted(Promise.reject(new Error("own")), controller.signal), { message: "own" });
  const work = Promise.withResolvers<void>();
  const pending = unlessAborted(work.promise, controller.signal);

  controller.abort(new Error("enough"));

  await assert.rejects(pending, { message: "enough" });
  // The work's own late failure is nobody's unhandled rejection.
  const late = unlessAborted(Promise.reject(new Error("late")), controller.signal);
  await assert.rejects(late, { message: "enough" });
  work.reject(new Error("much later"));
});

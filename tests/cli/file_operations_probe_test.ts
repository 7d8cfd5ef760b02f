import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { createFileOperationsProbe } from "../../lib/cli/file_operations_probe.ts";

Deno.test("promise 26: the probe fails while file operations do not end, starts one at a time, and passes when they do", async () => {
  const started: PromiseWithResolvers<void>[] = [];
  const probe = createFileOperationsProbe(() => {
    const operation = Promise.withResolvers<void>();
    started.push(operation);
    return operation.promise;
  }, 20);

  deepStrictEqual([await probe(), await probe(), started.length], [false, false, 1]);
  started[0]?.resolve();
  const next = probe();
  await Promise.resolve();
  started[1]?.resolve();

  strictEqual(await next, true);
});

Deno.test("the probe passes when the operation fails: it has ended", async () => {
  const probe = createFileOperationsProbe(() => Promise.reject(new Error("missing")));

  strictEqual(await probe(), true);
});

import { deepStrictEqual, strictEqual } from "node:assert/strict";
import { servingCheck } from "../../lib/cli/serving.ts";

Deno.test("promise 26: the check fails while file operations do not end, begins one at a time, and passes when they do", async () => {
  const begun: PromiseWithResolvers<void>[] = [];
  const isServing = servingCheck(() => {
    const operation = Promise.withResolvers<void>();
    begun.push(operation);
    return operation.promise;
  }, 20);

  deepStrictEqual([await isServing(), await isServing(), begun.length], [false, false, 1]);
  begun[0]?.resolve();
  const next = isServing();
  await Promise.resolve();
  begun[1]?.resolve();

  strictEqual(await next, true);
});

Deno.test("the check passes when the operation fails: it has ended", async () => {
  const isServing = servingCheck(() => Promise.reject(new Error("missing")));

  strictEqual(await isServing(), true);
});

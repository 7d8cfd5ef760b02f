import assert from "node:assert/strict";
import { backgroundContext, requestContext } from "../lib/context.ts";
import { StatusError } from "../lib/error.ts";
import { sleep } from "../lib/timing.ts";
import { captureLog } from "./support/log.ts";

Deno.test("requestContext.with adds to the log lines and keeps signal and deadline", () => {
  const { log, lines } = captureLog("info");
  const context = requestContext(new AbortController().signal, new Date(5), log);

  const narrower = context.with({ volume: "v" }).with({ device: "/dev/x" });
  narrower.log.info("mounted");

  assert.equal(narrower.signal, context.signal);
  assert.equal(narrower.deadline, context.deadline);
  assert.match(lines[0] ?? "", /"volume":"v","device":"\/dev\/x"/);
});

Deno.test("a context's errors begin with its action, and a part of the work has its own", () => {
  const { log, lines } = captureLog("info");
  const cause = new Error("why");
  const context = requestContext(new AbortController().signal, new Date(5), log, "stage the volume v")
    .with({ volume: "v" });

  const error = context.error("UNAVAILABLE", "the device has no size", { cause });
  const part = context.doing("read /dev/x");
  part.log.info("read");

  assert.equal(error.code, "UNAVAILABLE");
  assert.equal(error.message, "Cannot stage the volume v: the device has no size");
  assert.equal(error.cause, cause);
  assert.equal(part.with({}).error("INTERNAL", "it is gone").message, "Cannot read /dev/x: it is gone");
  assert.equal(part.signal, context.signal);
  assert.match(lines[0] ?? "", /"volume":"v"/);
});

Deno.test("backgroundContext ends with DEADLINE_EXCEEDED after its time, or with its parent", async () => {
  const { log } = captureLog("error");
  const short = backgroundContext("look around", log, 10);
  // The timer of a background context keeps no process alive; this one keeps the test alive.
  await assert.rejects(sleep(10_000, short.signal), {
    code: "DEADLINE_EXCEEDED",
    message: "Cannot look around: not done within 10 ms",
  });

  const parent = new AbortController();
  const long = backgroundContext("look around", log, 60_000, parent.signal);
  parent.abort(new StatusError("CANCELLED", "shutting down"));
  assert.equal(long.signal.aborted, true);
  assert.equal(long.signal.reason.code, "CANCELLED");
});

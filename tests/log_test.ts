import assert from "node:assert/strict";
import type { LogLevel } from "../lib/log.ts";
import { captureLog } from "./support/log.ts";

Deno.test("createLogger writes one JSON line per event, with the fields of with() and of the call", () => {
  const { log, lines } = captureLog("info");

  log.with({ rpc: "Probe", call: 7 }).with({ volume: "v" }).info("answered", { code: "OK", ms: 1.5 });

  assert.equal(lines.length, 1);
  assert.match(lines[0] ?? "", /^\{.*\}\n$/);
  const { ts, ...rest } = JSON.parse(lines[0] ?? "");
  assert.match(ts, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
  assert.deepEqual(rest, { level: "info", event: "answered", rpc: "Probe", call: 7, volume: "v", code: "OK", ms: 1.5 });
});

Deno.test("createLogger writes its level and above, and says whether debug lines are written", () => {
  const all: readonly LogLevel[] = ["debug", "info", "warning", "error"];
  for (const [index, level] of all.entries()) {
    const { log, lines } = captureLog(level);

    for (const each of all) log[each]("event");

    assert.deepEqual(lines.map((line) => JSON.parse(line).level), all.slice(index));
    assert.equal(log.verbose, level === "debug");
    assert.equal(log.with({}).verbose, level === "debug");
  }
});

Deno.test("createLogger keeps one event on one line whatever is in it, bigints too", () => {
  const { log, lines } = captureLog("info");

  log.error("failed", { error: "first\nsecond\u2028third", request: { bytes: 2n ** 60n } });

  assert.equal(lines.join("").split("\n").length, 2);
  const line = JSON.parse(lines[0] ?? "");
  assert.equal(line.error, "first\nsecond\u2028third");
  assert.equal(line.request.bytes, "1152921504606846976");
});

Deno.test("createLogger writes text lines for people, quoting what would be unclear", () => {
  const { log, lines } = captureLog("info", "text");

  log.warning("slow", { path: "/a b", error: 'say "x"\nnow', ms: 3, request: { bytes: 5n } });

  assert.match(
    lines[0] ?? "",
    /^\S+ warning slow path="\/a b" error="say \\"x\\"\\nnow" ms=3 request="\{\\"bytes\\":\\"5\\"\}"\n$/,
  );
});

Deno.test("createLogger writes to stderr, and a reader that has gone does not end the process", async () => {
  const code = `import { createLogger } from ${JSON.stringify(new URL("../lib/log.ts", import.meta.url).href)};
    const log = createLogger("info");
    await Deno.stdin.readable.getReader().read();
    for (let i = 0; i < 1000; i++) log.info("event", { error: "x".repeat(1000) });
    console.log("alive");`;
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", "--quiet", `data:text/typescript,${encodeURIComponent(code)}`],
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  await child.stderr.cancel();
  await child.stdin.close();

  assert.equal(await new Response(child.stdout).text(), "alive\n");
  assert.equal((await child.status).code, 0);
});

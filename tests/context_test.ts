import assert from "node:assert/strict";
import { inspect } from "node:util";
import { secretKeys } from "../lib/secret_keys.ts";
import * as z from "zod";
import {
  backgroundContext,
  createLogger,
  type Logger,
  type LogLevel,
  requestContext,
  Secrets,
  sleep,
  unlessAborted,
} from "../lib/context.ts";
import { StatusError } from "../lib/error.ts";

/** A logger and the lines it wrote. */
function capture(level: LogLevel, format?: "json" | "text"): { log: Logger; lines: string[] } {
  const lines: string[] = [];
  return { log: createLogger(level, format, (line) => lines.push(line)), lines };
}

const secrets = new Secrets({ jwt: "s3cr3t-token", passphrase: "open sesame" });

const ways: readonly (readonly [what: string, print: () => string])[] = [
  ["JSON", () => JSON.stringify({ secrets })],
  ["a template string", () => `${secrets}`],
  ["String()", () => String(secrets)],
  ["concatenation", () => "" + secrets],
  ["Deno.inspect, as console.log does", () => Deno.inspect(secrets)],
  ["Deno.inspect of an object around it", () => Deno.inspect({ a: [secrets] }, { depth: 10, showHidden: true })],
  ["node's inspect", () => inspect({ secrets }, { depth: 10, showHidden: true, getters: true })],
  [
    "an inspected error that carries it",
    () => Deno.inspect(Object.assign(new Error("x"), { secrets, cause: secrets })),
  ],
  ["the stack of an error made of it", () => new Error(`${secrets}`).stack ?? ""],
  ["a JSON log line", () => {
    const { log, lines } = capture("debug");
    log.info("received", { request: { secrets } });
    return lines.join();
  }],
  ["a text log line", () => {
    const { log, lines } = capture("debug", "text");
    log.info("received", { request: { secrets } });
    return lines.join();
  }],
];

for (const [what, print] of ways) {
  Deno.test(`promise 10: Secrets print as [secrets] in ${what}`, () => {
    const text = print();

    assert.match(text, /\[secrets\]/);
    assert.doesNotMatch(text, /s3cr3t|sesame|jwt|passphrase/);
  });
}

Deno.test("promise 10: Secrets show nothing to code that walks their properties", () => {
  const copy: unknown = structuredClone(secrets);

  assert.deepEqual(Object.keys(secrets), []);
  assert.deepEqual(Reflect.ownKeys(secrets), []);
  assert.deepEqual(copy, {});
});

Deno.test("Secrets.parse answers what the schema picks", () => {
  assert.deepEqual(secrets.parse(z.object({ jwt: z.string() })), { jwt: "s3cr3t-token" });
  assert.deepEqual(new Secrets().parse(z.object({ jwt: z.string().optional() })), {});
});

for (
  const [key, words] of [
    ["JWT", 'did you mean "jwt"?'],
    ["Jwt", 'did you mean "jwt"?'],
    ["mgmt-tls-pins", 'did you mean "mgmt-tls-pin"?'],
    ["mgmt_tls_pin", 'did you mean "mgmt-tls-pin"?'],
    ["mgmt-ca", 'did you mean "mgmt-ca.crt"?'],
    ["mgmt-ca.pem", 'did you mean "mgmt-ca.crt"?'],
    ["MGMT-SERVER-NAME", 'did you mean "mgmt-server-name"?'],
    ["mgmt-endpoint", "(known: jwt, mgmt-ca.crt, "],
    ["dhchap-host-key", "(known: jwt, "],
    ["dhchap_key", 'did you mean "dhchap-key"?'],
    ["host-encryption-passphrases", 'did you mean "host-encryption-passphrase"?'],
    ["host-encryption-password", "(known: jwt, "],
  ] as const
) {
  Deno.test(`Secrets.parse refuses the key "${key}", which looks like one of this driver`, () => {
    const secrets = new Secrets({ jwt: "s3cr3t-token", [key]: "open sesame" });

    assert.throws(() => secrets.parse(z.object({})), (error) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      assert.ok(error.message.startsWith(`Cannot use the secrets of this call: ${key}: is not a key of this driver`));
      assert.ok(error.message.includes(words), error.message);
      assert.doesNotMatch(error.message, /s3cr3t|sesame/);
      return true;
    });
  });
}

Deno.test("Secrets.parse passes over keys of others", () => {
  const others = { username: "a", password: "b", "tls.crt": "c", "jwt-of-others": "d", mgmt: "e", token: "f" };

  assert.deepEqual(new Secrets(others).parse(z.object({})), {});
});

Deno.test("a value that ends in a newline is used without it, but for passphrases", () => {
  const keys = secretKeys.map((key) => [key, "value\r\n\n"]);

  const read = new Secrets(Object.fromEntries(keys)).parse(z.record(z.string(), z.string()));

  for (const [key, value] of Object.entries(read)) {
    assert.equal(value, /passphrase/.test(key) ? "value\r\n\n" : "value", key);
  }
});

Deno.test("promise 10: Secrets.parse names the bad keys and never a value", () => {
  assert.throws(
    () => secrets.parse(z.object({ jwt: z.string().max(3), passphrase: z.literal("x"), ca: z.string() })),
    (error) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      assert.match(error.message, /^Cannot use the secrets of this call: /);
      for (const key of ["jwt", "passphrase", "ca"]) assert.match(error.message, new RegExp(`\\b${key}: `));
      assert.doesNotMatch(Deno.inspect(error), /s3cr3t|sesame/);
      return true;
    },
  );
});

Deno.test("createLogger writes one JSON line per event, with the fields of with() and of the call", () => {
  const { log, lines } = capture("info");

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
    const { log, lines } = capture(level);

    for (const each of all) log[each]("event");

    assert.deepEqual(lines.map((line) => JSON.parse(line).level), all.slice(index));
    assert.equal(log.verbose, level === "debug");
    assert.equal(log.with({}).verbose, level === "debug");
  }
});

Deno.test("createLogger keeps one event on one line whatever is in it, bigints too", () => {
  const { log, lines } = capture("info");

  log.error("failed", { error: "first\nsecond\u2028third", request: { bytes: 2n ** 60n } });

  assert.equal(lines.join("").split("\n").length, 2);
  const line = JSON.parse(lines[0] ?? "");
  assert.equal(line.error, "first\nsecond\u2028third");
  assert.equal(line.request.bytes, "1152921504606846976");
});

Deno.test("createLogger writes text lines for people, quoting what would be unclear", () => {
  const { log, lines } = capture("info", "text");

  log.warning("slow", { path: "/a b", error: 'say "x"\nnow', ms: 3, request: { bytes: 5n } });

  assert.match(
    lines[0] ?? "",
    /^\S+ warning slow path="\/a b" error="say \\"x\\"\\nnow" ms=3 request="\{\\"bytes\\":\\"5\\"\}"\n$/,
  );
});

Deno.test("createLogger writes to stderr, and a reader that has gone does not end the process", async () => {
  const code = `import { createLogger } from ${JSON.stringify(new URL("../lib/context.ts", import.meta.url).href)};
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

Deno.test("requestContext.with adds to the log lines and keeps signal and deadline", () => {
  const { log, lines } = capture("info");
  const context = requestContext(new AbortController().signal, new Date(5), log);

  const narrower = context.with({ volume: "v" }).with({ device: "/dev/x" });
  narrower.log.info("mounted");

  assert.equal(narrower.signal, context.signal);
  assert.equal(narrower.deadline, context.deadline);
  assert.match(lines[0] ?? "", /"volume":"v","device":"\/dev\/x"/);
});

Deno.test("a context's errors begin with its action, and a part of the work has its own", () => {
  const { log, lines } = capture("info");
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
  const { log } = capture("error");
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
  // The work's own late failure is not an unhandled rejection.
  const late = unlessAborted(Promise.reject(new Error("late")), controller.signal);
  await assert.rejects(late, { message: "enough" });
  work.reject(new Error("much later"));
});

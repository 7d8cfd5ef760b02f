import assert from "node:assert/strict";
import { inspect } from "node:util";
import * as z from "zod";
import { StatusError } from "../lib/error.ts";
import { secretKeys } from "../lib/secret_keys.ts";
import { Secrets } from "../lib/secrets.ts";
import { captureLog } from "./support/log.ts";

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
    const { log, lines } = captureLog("debug");
    log.info("received", { request: { secrets } });
    return lines.join();
  }],
  ["a text log line", () => {
    const { log, lines } = captureLog("debug", "text");
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

Deno.test("promise 10: Secrets show nothing to a walk over their properties", () => {
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

/** Keys of DH-HMAC-CHAP: their text form, what is refused, and that they print nowhere. */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { inspect } from "node:util";
import { crc32 } from "node:zlib";
import { DhchapKey, givenKeys, keysFor } from "../lib/auth_key.ts";
import { Secrets } from "../lib/secrets.ts";

/** The text form, made without the code under test. */
function text(hash: string, bytes: number, spoil = 0): string {
  const key = Buffer.alloc(bytes, 7);
  const checksum = Buffer.alloc(4);
  checksum.writeUInt32LE((crc32(key) ^ spoil) >>> 0);
  return `DHHC-1:${hash}:${Buffer.concat([key, checksum]).toString("base64")}:`;
}

// Printed by `nvme gen-dhchap-key` of nvme-cli, in the text of its wiki on in-band authentication.
const printed = "DHHC-1:00:2wKd3YDIcRMN/rCJa/k60E8xBQMw+2D9UnigSQ6YFkEHV3Yy:";

for (
  const good of [
    printed,
    text("00", 32),
    text("00", 48),
    text("00", 64),
    text("01", 32),
    text("02", 48),
    text("03", 64),
  ]
) {
  Deno.test(`DhchapKey takes ${good.slice(0, 10)} with ${good.length} characters, and ignores blanks around it`, () => {
    assert.equal(DhchapKey.parse(`\n${good} \n`).reveal(), good);
  });
}

for (
  const [what, bad, message] of [
    ["an empty text", "", /^is not a key of the form "DHHC-1:01:<base64>:"/],
    ["a passphrase", "open sesame", /^is not a key of the form/],
    ["another version", text("00", 32).replace("DHHC-1", "DHHC-2"), /^is not a key of the form/],
    ["an unknown hash", text("04", 32), /^is not a key of the form/],
    ["no colon at the end", text("00", 32).slice(0, -1), /^is not a key of the form/],
    ["something behind it", `${text("00", 32)},nqn=nqn.other`, /^is not a key of the form/],
    ["a key of 16 bytes", text("00", 16), /^is not a key: after "DHHC-1:00:" the base64 of 32, 48, 64 bytes/],
    ["32 bytes for SHA-384", text("02", 32), /^is not a key: after "DHHC-1:02:" the base64 of 48 bytes/],
    ["no checksum", `DHHC-1:00:${Buffer.alloc(32).toString("base64")}:`, /^is not a key: after/],
    ["base64 that is cut", text("01", 32).replace(/..:$/, ":"), /^is not a key: after/],
    ["a wrong checksum", text("01", 32, 1), /^is damaged: its CRC-32 does not fit$/],
  ] as const
) {
  Deno.test(`DhchapKey refuses ${what} and does not show it`, () => {
    assert.throws(() => DhchapKey.parse(bad), (error) => {
      assert(error instanceof TypeError);
      assert.match(error.message, message);
      const body = bad.split(":")[2] ?? bad;
      assert(body === "" || !error.message.includes(body), error.message);
      return true;
    });
  });
}

Deno.test("DhchapKey.generate makes a valid key, of 256 bits for SHA-256, and another one each time", () => {
  const keys = Array.from({ length: 20 }, () => DhchapKey.generate());

  for (const key of keys) assert(DhchapKey.parse(key.reveal()).equals(key));
  assert.equal(new Set(keys.map((key) => key.reveal())).size, 20);
  assert.match(keys[0]?.reveal() ?? "", /^DHHC-1:01:[0-9A-Za-z+/]{48}:$/);
});

for (
  const [place, print] of [
    ["JSON", (key: unknown) => JSON.stringify({ key })],
    ["a template string", (key: unknown) => `${key}`],
    ["Deno.inspect", (key: unknown) => Deno.inspect({ key }, { depth: 10, showHidden: true })],
    ["node's inspect", (key: unknown) => inspect({ key }, { depth: 10, showHidden: true, getters: true })],
    ["an inspected error", (key: unknown) => Deno.inspect(Object.assign(new Error("x"), { key, cause: { key } }))],
  ] as const
) {
  Deno.test(`promise 10: a DhchapKey shows nothing of itself in ${place}`, () => {
    const key = DhchapKey.generate();

    const printedKey = print(key);

    assert(printedKey.includes("[key]"), printedKey);
    assert(!printedKey.includes(key.reveal().split(":")[2] ?? ""), printedKey);
  });
}

Deno.test("givenKeys names the bad key of a Secret and shows nothing of it", () => {
  const bad = `${text("01", 32, 1)}`;

  assert.throws(() => givenKeys(new Secrets({ "dhchap-key": bad })), {
    name: "StatusError",
    code: "INVALID_ARGUMENT",
    message: "Cannot use the secrets of this call: dhchap-key: is damaged: its CRC-32 does not fit",
  });
});

Deno.test("givenKeys refuses a key of the controller without one of the host", () => {
  assert.throws(() => givenKeys(new Secrets({ "dhchap-ctrl-key": text("01", 32) })), {
    code: "INVALID_ARGUMENT",
    message: "Cannot use the secrets of this call: dhchap-ctrl-key: is given without dhchap-key, which proves the host",
  });
});

Deno.test("keysFor asks its source only when a key is missing, and takes each missing key that the source has", async () => {
  const [host, controller, otherHost, otherController] = Array.from({ length: 4 }, () => DhchapKey.generate());
  assert(host && controller && otherHost && otherController);
  let asked = 0;
  const source = () => {
    asked++;
    return Promise.resolve({ host: otherHost, controller: otherController });
  };

  const given = { host, controller };
  assert.deepEqual(await keysFor("unidirectional", given, source), { host, controller: undefined });
  assert.deepEqual(await keysFor("bidirectional", given, source), { host, controller });
  assert.equal(asked, 0);
  const half = await keysFor("bidirectional", { host, controller: undefined }, source);
  assert(half.host.equals(host) && half.controller?.equals(otherController));
  const none = await keysFor("unidirectional", { host: undefined, controller: undefined }, source);
  assert(none.host.equals(otherHost) && none.controller?.equals(otherController));
  const failing = () => Promise.reject(new TypeError("no source"));
  await assert.rejects(keysFor("bidirectional", { host, controller: undefined }, failing), /no source/);
});

import assert from "node:assert/strict";
import fc from "fast-check";
import { StatusError } from "../lib/error.ts";
import { isUuid } from "../lib/uuid.ts";
import { formatVolumeId, parseVolumeId, type VolumeId } from "../lib/volume_id.ts";

const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

const good: readonly (readonly [text: string, canonical: string])[] = [
  [`mgmt:192.0.2.11:443|nguid:${uuid}`, `mgmt:192.0.2.11:443|nguid:${uuid}|scheme:grpcs`],
  [
    `mgmt:192.0.2.11:443,192.0.2.12:443|nguid:${uuid.toUpperCase()}|proj:team-a.dev`,
    `mgmt:192.0.2.11:443,192.0.2.12:443|nguid:${uuid}|proj:team-a.dev|scheme:grpcs`,
  ],
  [
    `mgmt:los-a.example:443,[2001:db8::7]:443|nguid:${uuid}|proj:default|scheme:grpcs`,
    `mgmt:[2001:db8::7]:443,los-a.example:443|nguid:${uuid}|proj:default|scheme:grpcs`,
  ],
  [`mgmt:192.0.2.11:80|nguid:${uuid}|scheme:grpc`, `mgmt:192.0.2.11:80|nguid:${uuid}|scheme:grpc`],
  [
    `mgmt:192.0.2.11:443|nguid:${uuid}|proj:p1|scheme:grpcs|hostcrypto:luks2`,
    `mgmt:192.0.2.11:443|nguid:${uuid}|proj:p1|scheme:grpcs|hostcrypto:luks2`,
  ],
  [
    `mgmt:192.0.2.11:443|nguid:${uuid}|hostcrypto:luks2`,
    `mgmt:192.0.2.11:443|nguid:${uuid}|scheme:grpcs|hostcrypto:luks2`,
  ],
  // Byte order, not numeric order.
  [`mgmt:10.0.0.2:443,10.0.0.10:443|nguid:${uuid}`, `mgmt:10.0.0.10:443,10.0.0.2:443|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:1,b:2,a:1|nguid:${uuid}`, `mgmt:a:1,b:2|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:0443,a:443|nguid:${uuid}`, `mgmt:a:443|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:443,A:443|nguid:${uuid}`, `mgmt:A:443,a:443|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:[foo]:80|nguid:${uuid}`, `mgmt:foo:80|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:[fe80::1%eth0]:443|nguid:${uuid}`, `mgmt:[fe80::1%eth0]:443|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:0|nguid:${uuid}`, `mgmt:a:0|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:65535|nguid:${uuid}`, `mgmt:a:65535|nguid:${uuid}|scheme:grpcs`],
  [`mgmt:a:1|nguid:${uuid}|proj:a`, `mgmt:a:1|nguid:${uuid}|proj:a|scheme:grpcs`],
  [`mgmt:a:1|nguid:${uuid}|proj:${"a".repeat(63)}`, `mgmt:a:1|nguid:${uuid}|proj:${"a".repeat(63)}|scheme:grpcs`],
  [`mgmt:a:1|nguid:${uuid}|proj:0.-.9`, `mgmt:a:1|nguid:${uuid}|proj:0.-.9|scheme:grpcs`],
  [
    `mgmt:a:1|nguid:ffffffff-ffff-ffff-ffff-ffffffffffff`,
    `mgmt:a:1|nguid:ffffffff-ffff-ffff-ffff-ffffffffffff|scheme:grpcs`,
  ],
];

for (const [text, canonical] of good) {
  Deno.test(`parseVolumeId takes ${text}`, () => {
    const id = parseVolumeId(text);

    assert.equal(formatVolumeId(id), canonical);
    assert.deepEqual(parseVolumeId(canonical), id);
  });
}

Deno.test("parseVolumeId answers each part of an ID", () => {
  assert.deepEqual(parseVolumeId(`mgmt:[2001:db8::7]:0443,a:80|nguid:${uuid}|proj:p|scheme:grpc|hostcrypto:luks2`), {
    endpoints: [{ host: "2001:db8::7", port: 443 }, { host: "a", port: 80 }],
    uuid,
    project: "p",
    scheme: "grpc",
    hostEncryption: "luks2",
  });
  assert.deepEqual(parseVolumeId(`mgmt:a:80|nguid:${uuid}`), {
    endpoints: [{ host: "a", port: 80 }],
    uuid,
    project: undefined,
    scheme: "grpcs",
    hostEncryption: undefined,
  });
});

const unknown = "is not one of mgmt:…, nguid:…, proj:…, scheme:…, hostcrypto:…";
const noEndpoint = "is not host:port";
const noUuid = "is not a UUID";
const noProject = "is not a project name";
const noScheme = "is not one of grpc, grpcs";
const base = `mgmt:a:1|nguid:${uuid}`;

const bad: readonly (readonly [text: string, word: string])[] = [
  // The whole.
  ...["", " ", "x", "|", "||", "pvc-1234", uuid, `nguid${uuid}`, "\0", "{}"].map((text) => [text, unknown] as const),
  ...["mgmt", "MGMT:a:1", "Mgmt:a:1", " mgmt:a:1", "\tmgmt:a:1", "\nmgmt:a:1", "mgmt a:1", "mgmt=a:1", "mgmts:a:1"]
    .map((start) => [`${start}|nguid:${uuid}`, unknown] as const),
  ...[
    "|",
    "||",
    "|x",
    "|owner:x",
    "|:",
    "|:x",
    "| proj:p",
    "|Proj:p",
    "|PROJ:p",
    "|proj",
    "|scheme",
    "|hostcrypto",
    "|project:p",
  ]
    .map((end) => [base + end, unknown] as const),
  [`|${base}`, unknown],
  [`mgmt:a:1||nguid:${uuid}`, unknown],
  [`mgmt:a:1|NGUID:${uuid}`, unknown],
  [`mgmt:a:1|uuid:${uuid}`, unknown],
  [`mgmt:a:1 |nguid:${uuid}|x`, unknown],
  ["pos:http://a:1|array:p|vol:v|uuid:u", unknown],
  // Missing, repeated, out of order.
  [`nguid:${uuid}`, "mgmt is missing"],
  ["scheme:grpc", "mgmt is missing"],
  ["proj:p|scheme:grpc", "mgmt is missing"],
  ["mgmt:a:1", "nguid is missing"],
  ["mgmt:a:1|proj:p", "nguid is missing"],
  ["mgmt:a:1|scheme:grpc|hostcrypto:luks2", "nguid is missing"],
  [`mgmt:a:1|mgmt:a:1|nguid:${uuid}`, "mgmt is given twice"],
  [`${base}|nguid:${uuid}`, "nguid is given twice"],
  [`${base}|proj:p|proj:p`, "proj is given twice"],
  [`${base}|scheme:grpc|scheme:grpcs`, "scheme is given twice"],
  [`${base}|hostcrypto:luks2|hostcrypto:luks2`, "hostcrypto is given twice"],
  [`nguid:${uuid}|mgmt:a:1`, "mgmt is out of order"],
  [`proj:p|${base}`, "mgmt is out of order"],
  [`mgmt:a:1|proj:p|nguid:${uuid}`, "nguid is out of order"],
  [`mgmt:a:1|scheme:grpc|nguid:${uuid}`, "nguid is out of order"],
  [`${base}|scheme:grpcs|proj:a`, "proj is out of order"],
  [`${base}|hostcrypto:luks2|proj:a`, "proj is out of order"],
  [`${base}|hostcrypto:luks2|scheme:grpc`, "scheme is out of order"],
  // Endpoints.
  ...[
    "",
    " ",
    ",",
    "a",
    "192.0.2.11",
    "a:",
    ":443",
    ":",
    "a:https",
    "a:-1",
    "a:+1",
    "a:4 3",
    "a: 443",
    "a:443 ",
    " a:443",
    "a:0x1bb",
    "a:443.0",
    "a:４４３",
    "my_host:443",
    "2001:db8::7:443",
    "2001:db8::7",
    "[2001:db8::7]",
    "[2001:db8::7]443",
    "[2001:db8::7]:",
    "[]:443",
    "[a:443",
    "a]:443",
    "[[a]]:443",
    "[a]b:443",
    "https://192.0.2.11:443",
    "a:443/",
    "a/b:443",
    "a@b:443",
    "a:443,",
    ",a:443",
    "a:443,,b:443",
    "a:443, b:443",
    "a:443;b:443",
    "a:443\n",
    "a\n:443",
    "höst:443",
    "a:1:2",
    "a?b:443",
    "a#b:443",
    "*:443",
    "[fe80::1 ]:443",
  ].map((endpoints) => [`mgmt:${endpoints}|nguid:${uuid}`, noEndpoint] as const),
  ...["65536", "70000", "99999999999999999999", "0065536"]
    .map((port) => [`mgmt:a:${port}|nguid:${uuid}`, "is above 65535"] as const),
  // UUID.
  ...[
    "",
    " ",
    "x",
    uuid.replaceAll("-", ""),
    uuid.slice(1),
    `${uuid}0`,
    ` ${uuid}`,
    `${uuid} `,
    `${uuid}\n`,
    `{${uuid}}`,
    `urn:uuid:${uuid}`,
    uuid.replace("0f", "0g"),
    uuid.replace("-", ":"),
    uuid.replace("-", "_"),
    uuid.replace("f2c6", "f2-c6"),
    `uuid.${uuid}`,
    uuid.replace("0", "０"),
  ].map((text) => [`mgmt:a:1|nguid:${text}`, noUuid] as const),
  ["mgmt:a:1|nguid:00000000-0000-0000-0000-000000000000", "is the nil UUID"],
  // Project.
  ...[
    "",
    " ",
    "Team_A",
    "A",
    "-a",
    "a-",
    ".a",
    "a.",
    "a_b",
    "a b",
    "a/b",
    "a:b",
    "a,b",
    "a\n",
    "\ta",
    "ä",
    "a".repeat(64),
    "-",
    ".",
    "a\0",
  ].map((project) => [`${base}|proj:${project}`, noProject] as const),
  // Scheme and encryption.
  ...["", " ", "https", "http", "GRPC", "grpcss", "grpc ", " grpc", "grpc\n", "grpc:"]
    .map((scheme) => [`${base}|scheme:${scheme}`, noScheme] as const),
  ...["", " ", "luks1", "luks", "LUKS2", "luks2 ", "luks2:", "none", "luks2\n"]
    .map((crypto) => [`${base}|hostcrypto:${crypto}`, "is not luks2"] as const),
];

Deno.test("the table of bad IDs has more than 100 different ones", () => {
  assert.ok(new Set(bad.map(([text]) => text)).size === bad.length && bad.length > 100, `${bad.length}`);
});

for (const [text, word] of bad) {
  Deno.test(`parseVolumeId answers NOT_FOUND to ${JSON.stringify(text)}: ${word}`, () => {
    assert.throws(() => parseVolumeId(text), (error) => {
      assert.ok(error instanceof StatusError);
      assert.equal(error.code, "NOT_FOUND");
      assert.ok(
        error.message.startsWith(`Cannot find volume "${text}": its ID is not one of this driver, `),
        error.message,
      );
      assert.ok(error.message.includes(word), error.message);
      return true;
    });
  });
}

Deno.test("parseVolumeId names what the ID is for", () => {
  assert.throws(() => parseVolumeId("x", "snapshot"), { code: "NOT_FOUND", message: /^Cannot find snapshot "x": / });
});

const letters = (from: string, length: { minLength: number; maxLength: number }) =>
  fc.string({ unit: fc.constantFrom(...from), ...length });
const lowerAndDigits = "abcdefghijklmnopqrstuvwxyz0123456789";
const host = fc.oneof(
  letters(`${lowerAndDigits}ABCXYZ.-%`, { minLength: 1, maxLength: 20 }),
  fc.ipV4(),
  fc.ipV6(),
);
const project = fc.tuple(
  letters(lowerAndDigits, { minLength: 1, maxLength: 1 }),
  letters(`${lowerAndDigits}.-`, { minLength: 0, maxLength: 61 }),
  letters(lowerAndDigits, { minLength: 1, maxLength: 1 }),
).map((parts) => parts.join(""));
const volumeId: fc.Arbitrary<VolumeId> = fc.record({
  endpoints: fc.array(fc.record({ host, port: fc.nat(65535) }), { minLength: 1, maxLength: 5 }),
  uuid: fc.uuid().filter(isUuid),
  project: fc.option(project, { nil: undefined }),
  scheme: fc.constantFrom("grpc", "grpcs"),
  hostEncryption: fc.constantFrom("luks2" as const, undefined),
});

Deno.test("parseVolumeId reads what formatVolumeId wrote, and formatting that again changes nothing", () => {
  fc.assert(fc.property(volumeId, (id) => {
    const parsed = parseVolumeId(formatVolumeId(id));

    const { endpoints: _, ...rest } = id;
    const { endpoints, ...parsedRest } = parsed;
    assert.deepEqual(parsedRest, rest);
    // The endpoints of a parsed ID are sorted and free of duplicates, those of a record need not be.
    const text = ({ host, port }: { host: string; port: number }) => `${host} ${port}`;
    assert.deepEqual(new Set(endpoints.map(text)), new Set(id.endpoints.map(text)));
    assert.equal(new Set(endpoints.map(text)).size, endpoints.length);
    assert.deepEqual(parseVolumeId(formatVolumeId(parsed)), parsed);
    assert.equal(formatVolumeId(parseVolumeId(formatVolumeId(parsed))), formatVolumeId(parsed));
  }));
});

Deno.test("parseVolumeId throws NOT_FOUND and nothing else for any text", () => {
  const pieces = fc.constantFrom(
    "mgmt:",
    "nguid:",
    "proj:",
    "scheme:",
    "hostcrypto:",
    "|",
    ",",
    ":",
    "a:1",
    uuid,
    "grpc",
    "[",
    "]",
  );
  const text = fc.oneof(
    fc.string({ unit: "binary" }),
    fc.array(fc.oneof(pieces, fc.string()), { maxLength: 12 }).map((p) => p.join("")),
  );
  fc.assert(fc.property(text, (text) => {
    try {
      parseVolumeId(text);
    } catch (error) {
      assert.ok(error instanceof StatusError && error.code === "NOT_FOUND");
    }
  }));
});

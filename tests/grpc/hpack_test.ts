import assert from "node:assert/strict";
import { decodeHuffman, encodeHeaders, encodeHuffman, HpackDecoder } from "../../lib/grpc/hpack.ts";

const recorded = Deno.readTextFileSync(new URL("../fixtures/hpack.txt", import.meta.url)).split("\n");

const bytes = (hex: string) => Buffer.from(hex.replaceAll(" ", ""), "hex");
const latin1 = (hex: string) => bytes(hex).toString("latin1");
const enough = 1 << 20;

function pairs(decoder: HpackDecoder, block: string): string[] {
  return decoder.decode(bytes(block), enough).map(({ name, value }) => `${name}: ${value}`);
}

Deno.test("decodeHuffman and encodeHuffman agree with another implementation for every byte and random strings", () => {
  const lines = recorded.filter((line) => line.startsWith("huffman "));
  assert.ok(lines.length >= 350);

  for (const line of lines) {
    const [, plain = "", coded = ""] = line.split(" ");
    assert.equal(encodeHuffman(latin1(plain)).toString("hex"), coded);
    assert.equal(decodeHuffman(bytes(coded)), latin1(plain));
  }
});

Deno.test("HpackDecoder follows another implementation through one long connection with table resizes", () => {
  const decoder = new HpackDecoder();
  const lines = recorded.filter((line) => line.startsWith("block "));
  assert.ok(lines.length >= 100);

  for (const line of lines) {
    const [, block = "", ...fields] = line.split(" ");
    const expected = fields.map((field) => {
      const [name = "", value = "", never] = field.split(":");
      return { name: latin1(name), value: latin1(value), neverIndexed: never === "never" };
    });
    assert.deepEqual(decoder.decode(bytes(block), enough), expected);
    // What we write again reads the same with an empty table.
    assert.deepEqual(new HpackDecoder().decode(encodeHeaders(expected), enough), expected);
  }
});

Deno.test("HpackDecoder reads the requests of RFC 7541, appendix C.3", () => {
  const decoder = new HpackDecoder();
  const common = [":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"];

  assert.deepEqual(pairs(decoder, "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d"), common);
  assert.deepEqual(pairs(decoder, "8286 84be 5808 6e6f 2d63 6163 6865"), [...common, "cache-control: no-cache"]);
  assert.deepEqual(
    pairs(decoder, "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65"),
    [":method: GET", ":scheme: https", ":path: /index.html", ":authority: www.example.com", "custom-key: custom-value"],
  );
});

Deno.test("HpackDecoder reads the Huffman-coded requests of RFC 7541, appendix C.4", () => {
  const decoder = new HpackDecoder();
  const common = [":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"];

  assert.deepEqual(pairs(decoder, "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff"), common);
  assert.deepEqual(pairs(decoder, "8286 84be 5886 a8eb 1064 9cbf"), [...common, "cache-control: no-cache"]);
  assert.deepEqual(
    pairs(decoder, "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf"),
    [":method: GET", ":scheme: https", ":path: /index.html", ":authority: www.example.com", "custom-key: custom-value"],
  );
});

Deno.test("HpackDecoder evicts the oldest entries, and all of them for one that is larger than the table", () => {
  const decoder = new HpackDecoder();
  // A table of 70 bytes holds two entries of 34 ("a: 1", "b: 2"), not three.
  assert.deepEqual(pairs(decoder, "3f27 40 0161 0131 40 0162 0132 40 0163 0133"), ["a: 1", "b: 2", "c: 3"]);
  assert.deepEqual(pairs(decoder, "be bf"), ["c: 3", "b: 2"]);
  assert.throws(() => pairs(decoder, "c0"), { message: "there is no table entry 64" });

  const fresh = new HpackDecoder();
  const large = `40 0161 28 ${"31".repeat(40)}`;
  assert.deepEqual(pairs(fresh, `3f27 40 0162 0132 ${large}`), ["b: 2", `a: ${"1".repeat(40)}`]);
  assert.throws(() => pairs(fresh, "be"), { message: "there is no table entry 62" });
});

const malformed: readonly (readonly [what: string, block: string, message: string])[] = [
  ["index 0", "80", "there is no table entry 0"],
  ["an index beyond the table", "be", "there is no table entry 62"],
  ["the name of an entry beyond the table", "7f00 0131", "there is no table entry 63"],
  ["a literal without its name", "40", "the header block ends too early"],
  ["a name without its value", "40 0161", "the header block ends too early"],
  ["a string longer than the block", "40 0161 0531", "the header block ends too early"],
  ["an integer without an end", "ff ff", "the header block ends too early"],
  ["an integer above 24 bits", "ff ffffff7f", "an integer in the header block is too large"],
  [
    "an integer of zero bytes without an end",
    "ff 808080808080808080808080",
    "an integer in the header block is too large",
  ],
  ["a table update after a field", "82 20", "a table size update follows a header field"],
  ["a table update above 4096 bytes", "3f e2 1f", "a table of 4097 bytes is more than 4096"],
  ["Huffman padding of a whole byte", "40 0161 82 1fff", "a Huffman-coded string has wrong padding"],
  ["Huffman padding with zeros", "40 0161 81 18", "a Huffman-coded string has wrong padding"],
  ["the end-of-string symbol", "40 0161 84 ffffffff", "a Huffman-coded string holds the end-of-string symbol"],
];

for (const [what, block, message] of malformed) {
  Deno.test(`HpackDecoder rejects ${what}`, () => {
    assert.throws(() => pairs(new HpackDecoder(), block), { message });
  });
}

Deno.test("HpackDecoder rejects more than the given bytes of fields", () => {
  assert.throws(() => new HpackDecoder().decode(bytes("82 82 82"), 100), {
    message: "the header fields have more than 100 bytes",
  });
});

Deno.test("encodeHeaders writes RFC 7541's static indexes and keeps the never-indexed mark", () => {
  const field = (name: string, value: string, neverIndexed = false) => ({ name, value, neverIndexed });

  assert.equal(encodeHeaders([field(":method", "POST"), field(":scheme", "http")]).toString("hex"), "8386");
  assert.equal(encodeHeaders([field(":path", "/x")]).toString("hex"), "04022f78");
  assert.equal(encodeHeaders([field("a", "b")]).toString("hex"), "0001610162");
  assert.equal(encodeHeaders([field("authorization", "t", true)]).toString("hex"), "1f080174");
  assert.equal(encodeHeaders([field("a", "v".repeat(300))]).subarray(0, 6).toString("hex"), "0001617fad01");
});

/**
 * HPACK, the header compression of HTTP/2 (RFC 7541): a complete decoder, and an encoder that keeps no state.
 *
 * Our own because npm has no maintained library: `hpack.js` is from 2016, the others are part of HTTP/2 stacks. It runs for
 * old clients only (see authority.ts), so it is readable rather than fast. tests/grpc/hpack_test.ts compares it with the
 * examples of RFC 7541 and with the results of another implementation for random input.
 */

/** One header. Name and value hold one character per byte (Latin-1), so that all bytes are preserved. */
export interface HeaderField {
  readonly name: string;
  readonly value: string;
  /** The sender forbids any intermediary to put it into a compression table: RFC 7541, section 7.1.3. */
  readonly neverIndexed: boolean;
}

/** Default size of a decoder's table (SETTINGS_HEADER_TABLE_SIZE), in bytes as RFC 7541, 4.1 counts them. */
const defaultTableBytes = 4096;

/** Decodes the header blocks of one direction of one connection, in their order. */
export class HpackDecoder {
  readonly #table: HeaderField[] = [];
  #tableBytes = 0;
  #maxTableBytes = defaultTableBytes;

  /**
   * The fields of one complete header block. Throws an Error when the block is malformed, or when its fields have more than
   * `maxBytes` together. The connection cannot continue after that, because the table no longer matches the sender's.
   */
  decode(block: Uint8Array, maxBytes: number): HeaderField[] {
    const reader = new Reader(block);
    const fields: HeaderField[] = [];
    let bytes = 0;
    while (!reader.atEnd) {
      const first = reader.peek();
      if ((first & 0xe0) === 0x20) {
        if (fields.length > 0) throw new Error("a table size update follows a header field");
        this.#resize(reader.integer(5));
        continue;
      }
      const field = this.#field(reader, first);
      bytes += sizeOf(field);
      if (bytes > maxBytes) throw new Error(`the header fields have more than ${maxBytes} bytes`);
      fields.push(field);
    }
    return fields;
  }

  #field(reader: Reader, first: number): HeaderField {
    if ((first & 0x80) !== 0) return this.#entry(reader.integer(7));
    const indexed = (first & 0x40) !== 0;
    const nameIndex = reader.integer(indexed ? 6 : 4);
    const name = nameIndex === 0 ? reader.text() : this.#entry(nameIndex).name;
    const field = { name, value: reader.text(), neverIndexed: (first & 0xf0) === 0x10 };
    if (indexed) this.#add(field);
    return field;
  }

  #entry(index: number): HeaderField {
    const field = index <= staticTable.length ? staticTable[index - 1] : this.#table[index - staticTable.length - 1];
    if (field === undefined) throw new Error(`there is no table entry ${index}`);
    return field;
  }

  #add(field: HeaderField): void {
    this.#table.unshift(field);
    this.#tableBytes += sizeOf(field);
    this.#evict();
  }

  #resize(bytes: number): void {
    if (bytes > defaultTableBytes) throw new Error(`a table of ${bytes} bytes is more than ${defaultTableBytes}`);
    this.#maxTableBytes = bytes;
    this.#evict();
  }

  #evict(): void {
    while (this.#tableBytes > this.#maxTableBytes) {
      const oldest = this.#table.pop();
      if (oldest === undefined) return;
      this.#tableBytes -= sizeOf(oldest);
    }
  }
}

/**
 * A header block that any decoder understands whatever it decoded before: static indexes and literals that are not put
 * into the table. Without Huffman coding; `neverIndexed` is kept.
 */
export function encodeHeaders(fields: readonly HeaderField[]): Buffer {
  const parts: Buffer[] = [];
  for (const { name, value, neverIndexed } of fields) {
    const whole = staticIndexes.get(`${name}\0${value}`);
    if (whole !== undefined && !neverIndexed) {
      parts.push(integer(0x80, 7, whole));
      continue;
    }
    const nameIndex = staticIndexes.get(name) ?? 0;
    parts.push(integer(neverIndexed ? 0x10 : 0, 4, nameIndex));
    if (nameIndex === 0) parts.push(...literal(name));
    parts.push(...literal(value));
  }
  return Buffer.concat(parts);
}

function literal(text: string): [Buffer, Buffer] {
  const bytes = Buffer.from(text, "latin1");
  return [integer(0, 7, bytes.length), bytes];
}

/** RFC 7541, section 5.1; `pattern` holds the bits above the prefix. */
function integer(pattern: number, prefixBits: number, value: number): Buffer {
  const max = (1 << prefixBits) - 1;
  if (value < max) return Buffer.of(pattern | value);
  const bytes = [pattern | max];
  let rest = value - max;
  for (; rest >= 0x80; rest >>>= 7) bytes.push(rest & 0x7f | 0x80);
  bytes.push(rest);
  return Buffer.from(bytes);
}

/** RFC 7541, section 4.1: the 32 stand for what an entry costs besides its bytes. */
function sizeOf({ name, value }: HeaderField): number {
  return name.length + value.length + 32;
}

// Nothing here can be larger than a header block, and a block has less than 16 MiB.
const largestInteger = 0xff_ffff;

class Reader {
  readonly #bytes: Uint8Array;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
  }

  get atEnd(): boolean {
    return this.#at >= this.#bytes.length;
  }

  peek(): number {
    const byte = this.#bytes[this.#at];
    if (byte === undefined) throw new Error("the header block ends too early");
    return byte;
  }

  integer(prefixBits: number): number {
    const max = (1 << prefixBits) - 1;
    let value = this.#next() & max;
    if (value < max) return value;
    for (let shift = 0;; shift += 7) {
      const byte = this.#next();
      value += (byte & 0x7f) * 2 ** shift;
      // Zero bytes at the end of an integer could make it arbitrarily long.
      if (value > largestInteger || shift > 28) throw new Error("an integer in the header block is too large");
      if ((byte & 0x80) === 0) return value;
    }
  }

  text(): string {
    const huffman = (this.peek() & 0x80) !== 0;
    const length = this.integer(7);
    const end = this.#at + length;
    if (end > this.#bytes.length) throw new Error("the header block ends too early");
    const bytes = this.#bytes.subarray(this.#at, end);
    this.#at = end;
    return huffman ? decodeHuffman(bytes) : Buffer.from(bytes).toString("latin1");
  }

  #next(): number {
    const byte = this.peek();
    this.#at++;
    return byte;
  }
}

/** A Huffman-coded string (RFC 7541, section 5.2) as Latin-1 text; throws an Error when the code or its padding is wrong. */
export function decodeHuffman(bytes: Uint8Array): string {
  const symbols: number[] = [];
  let code = 0;
  let bits = 0;
  let onlyOnes = true;
  for (const byte of bytes) {
    for (let bit = 7; bit >= 0; bit--) {
      const one = byte >> bit & 1;
      code = code * 2 + one;
      bits++;
      onlyOnes &&= one === 1;
      // Codes of one length are consecutive numbers, and all longer ones are above them.
      const { first, symbols: known } = huffmanCodes[bits] ?? noCodes;
      const symbol = known[code - first];
      if (symbol === undefined) {
        if (bits >= longestCode) throw new Error("a Huffman code is not in the table");
        continue;
      }
      if (symbol === endOfString) throw new Error("a Huffman-coded string holds the end-of-string symbol");
      symbols.push(symbol);
      code = 0;
      bits = 0;
      onlyOnes = true;
    }
  }
  if (bits > 7 || !onlyOnes) throw new Error("a Huffman-coded string has wrong padding");
  return Buffer.from(symbols).toString("latin1");
}

/** The Huffman code of Latin-1 text, padded to whole bytes. Our encoder does without it; for clients in tests. */
export function encodeHuffman(text: string): Buffer {
  const bits = [...Buffer.from(text, "latin1")].map((symbol) => {
    const length = codeLengths[symbol] ?? 0;
    const { first, symbols } = huffmanCodes[length] ?? noCodes;
    return (first + symbols.indexOf(symbol)).toString(2).padStart(length, "0");
  }).join("");
  const padded = bits.padEnd(Math.ceil(bits.length / 8) * 8, "1");
  return Buffer.from(padded.match(/.{8}/g)?.map((byte) => parseInt(byte, 2)) ?? []);
}

const endOfString = 256;
const longestCode = 30;

// RFC 7541, appendix B: bits per symbol, 0 to 255 and end of string. The code is canonical, so they are all of it.
// deno-fmt-ignore
const codeLengths = [
  13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
  28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
  6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
  5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
  13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
  7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
  15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
  6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
  20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
  24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
  22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
  21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
  26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
  19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
  20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
  26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
  30,
];

interface CodesOfLength {
  /** The smallest code of this length. */
  readonly first: number;
  /** The symbols of this length in the order of their codes. */
  readonly symbols: readonly number[];
}

const noCodes: CodesOfLength = { first: 0, symbols: [] };
const huffmanCodes = canonicalCodes();

function canonicalCodes(): readonly CodesOfLength[] {
  const codes: CodesOfLength[] = [noCodes];
  let first = 0;
  for (let length = 1; length <= longestCode; length++) {
    const symbols = codeLengths.flatMap((bits, symbol) => bits === length ? [symbol] : []);
    codes.push({ first, symbols });
    first = (first + symbols.length) * 2;
  }
  return codes;
}

// RFC 7541, appendix A, entries 1 to 61.
const staticTable: readonly HeaderField[] = `
:authority
:method GET
:method POST
:path /
:path /index.html
:scheme http
:scheme https
:status 200
:status 204
:status 206
:status 304
:status 400
:status 404
:status 500
accept-charset
accept-encoding gzip, deflate
accept-language
accept-ranges
accept
access-control-allow-origin
age
allow
authorization
cache-control
content-disposition
content-encoding
content-language
content-length
content-location
content-range
content-type
cookie
date
etag
expect
expires
from
host
if-match
if-modified-since
if-none-match
if-range
if-unmodified-since
last-modified
link
location
max-forwards
proxy-authenticate
proxy-authorization
range
referer
refresh
retry-after
server
set-cookie
strict-transport-security
transfer-encoding
user-agent
vary
via
www-authenticate
`.trim().split("\n").map((line) => {
  const [name = "", ...value] = line.split(" ");
  return { name, value: value.join(" "), neverIndexed: false };
});

/** `name` and `name NUL value` to the first entry that has them. */
const staticIndexes = new Map<string, number>();
for (const [index, { name, value }] of staticTable.entries()) {
  for (const key of [name, `${name}\0${value}`]) {
    if (!staticIndexes.has(key)) staticIndexes.set(key, index + 1);
  }
}

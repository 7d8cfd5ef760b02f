/** An HTTP/2 client that sends exactly the given bytes: what real clients no longer, or must not, send. */
import assert from "node:assert/strict";
import net from "node:net";
import { encodeHuffman, HpackDecoder } from "../../lib/grpc/hpack.ts";

export type Header = readonly [name: string, value: string];

/** `plain` and `huffman` leave the server's table alone; `indexed` uses it as grpc-go does. */
export type Encoding = "plain" | "huffman" | "indexed";

/** Bytes of a header block that stand for themselves. */
export type RawHeader = Uint8Array;

export const frames = { data: 0, headers: 1, priority: 2, settings: 4, ping: 6, goaway: 7, continuation: 9 } as const;
export const flags = { endStream: 1, ack: 1, endHeaders: 4, padded: 8, priority: 0x20 } as const;

export const preface = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");

export function frame(type: number, flags: number, stream: number, payload: Uint8Array = new Uint8Array()): Buffer {
  const header = Buffer.alloc(9);
  header.writeUIntBE(payload.length, 0, 3);
  header[3] = type;
  header[4] = flags;
  header.writeUInt32BE(stream, 5);
  return Buffer.concat([header, payload]);
}

/** Encodes headers, remembering what `indexed` has put into the server's table. */
export class RawEncoder {
  readonly #table: string[] = [];

  encode(headers: readonly (Header | RawHeader)[], encoding: Encoding): Buffer {
    return Buffer.concat(headers.map((header) => {
      if (header instanceof Uint8Array) return header;
      const [name, value] = header;
      const known = this.#table.indexOf(`${name}\0${value}`);
      if (encoding === "indexed" && known >= 0) return Buffer.of(0x80 | 62 + known);
      if (encoding === "indexed") this.#table.unshift(`${name}\0${value}`);
      const huffman = encoding !== "plain";
      return Buffer.concat([Buffer.of(encoding === "indexed" ? 0x40 : 0), text(name, huffman), text(value, huffman)]);
    }));
  }
}

function text(value: string, huffman: boolean): Buffer {
  const bytes = huffman ? encodeHuffman(value) : Buffer.from(value, "latin1");
  assert.ok(bytes.length < 127 + 128, "longer strings need longer integers");
  const mark = huffman ? 0x80 : 0;
  const length = bytes.length < 127 ? [mark | bytes.length] : [mark | 127, bytes.length - 127];
  return Buffer.concat([Buffer.from(length), bytes]);
}

/** The five bytes before an empty protobuf message in gRPC. */
export const emptyMessage = Buffer.alloc(5);

export interface Reply {
  readonly headers: ReadonlyMap<string, string>;
  readonly trailers: ReadonlyMap<string, string>;
  readonly body: Buffer;
}

interface OpenReply {
  readonly blocks: Map<string, string>[];
  body: Buffer;
  resolve(reply: Reply): void;
  reject(error: Error): void;
}

/** One connection. Frames that come back are read until it closes. */
export class RawClient implements Disposable {
  readonly socket: net.Socket;
  readonly encoder = new RawEncoder();
  /** Resolves when the server's SETTINGS are here. */
  readonly settings: Promise<void>;
  /** Why the connection ended: the error code of GOAWAY, or "closed". */
  readonly ended: Promise<string>;
  readonly #decoder = new HpackDecoder();
  readonly #replies = new Map<number, OpenReply>();
  #received: Buffer = Buffer.alloc(0);
  #sending = false;
  #mustAcknowledge = false;
  #gotSettings: () => void = () => {};
  #end: (reason: string) => void = () => {};

  constructor(path: string) {
    this.settings = new Promise((resolve) => this.#gotSettings = resolve);
    this.ended = new Promise((resolve) => this.#end = resolve);
    this.socket = net.connect(path);
    this.socket.on("data", (chunk: Buffer) => this.#read(chunk));
    this.socket.on("error", () => {});
    this.socket.on("close", () => this.#fail("closed"));
  }

  /** Writes bytes, all at once or each on its own. */
  async send(bytes: Uint8Array, delivery: "whole" | "bytes" = "whole"): Promise<void> {
    if (delivery === "whole") {
      this.socket.write(bytes);
      return;
    }
    this.#sending = true;
    for (const byte of bytes) {
      await new Promise<void>((resolve) => this.socket.write(Buffer.of(byte), () => resolve()));
      // Gives the server a turn, so that it reads the byte before there are more.
      await new Promise((resolve) => setImmediate(resolve));
    }
    this.#sending = false;
    if (this.#mustAcknowledge) this.#acknowledge();
  }

  /** The reply on a stream; rejects when the connection ends first. Ask before sending the request. */
  reply(stream: number): Promise<Reply> {
    const reply = new Promise<Reply>((resolve, reject) => {
      this.#replies.set(stream, { blocks: [], body: Buffer.alloc(0), resolve, reject });
    });
    // It may fail while the request is still being sent, before a caller awaits it.
    reply.catch(() => {});
    return reply;
  }

  #read(chunk: Buffer): void {
    this.#received = Buffer.concat([this.#received, chunk]);
    while (this.#received.length >= 9) {
      const length = this.#received.readUIntBE(0, 3);
      if (this.#received.length < 9 + length) return;
      const type = this.#received.readUInt8(3);
      const bits = this.#received.readUInt8(4);
      const stream = this.#received.readUInt32BE(5);
      const payload = this.#received.subarray(9, 9 + length);
      this.#received = this.#received.subarray(9 + length);
      if (type === frames.settings && (bits & flags.ack) === 0) {
        // Not into the middle of a frame.
        if (this.#sending) this.#mustAcknowledge = true;
        else this.#acknowledge();
        this.#gotSettings();
      }
      if (type === frames.goaway) this.#fail(`GOAWAY ${payload.readUInt32BE(4)}`);
      const reply = this.#replies.get(stream);
      if (type === frames.headers) {
        assert.ok(bits & flags.endHeaders, "the server splits header blocks, this client cannot");
        const fields = this.#decoder.decode(payload, 1 << 20);
        reply?.blocks.push(new Map(fields.map(({ name, value }) => [name, value])));
      }
      if (reply === undefined) continue;
      if (type === frames.data) reply.body = Buffer.concat([reply.body, payload]);
      if ((type === frames.headers || type === frames.data) && (bits & flags.endStream)) {
        this.#replies.delete(stream);
        const headers = reply.blocks[0] ?? new Map();
        reply.resolve({ headers, trailers: reply.blocks.at(-1) ?? headers, body: reply.body });
      }
    }
  }

  #acknowledge(): void {
    this.#mustAcknowledge = false;
    this.socket.write(frame(frames.settings, flags.ack, 0));
  }

  #fail(reason: string): void {
    this.#end(reason);
    for (const { reject } of this.#replies.values()) reject(new Error(reason));
    this.#replies.clear();
  }

  [Symbol.dispose](): void {
    this.socket.destroy();
  }
}

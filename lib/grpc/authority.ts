/**
 * Serves callers whose `:authority` is not one that HTTP/2 allows.
 *
 * The kubelets of Kubernetes 1.17 to 1.25, and other Go programs that dial a Unix socket with an old grpc-go, send the path
 * of the socket (`/csi/csi.sock`), a URL (`unix:///csi/csi.sock`), an empty `:authority` or none. gRPC servers in Go accept
 * that; nghttp2 inside `node:http2` ends the connection with PROTOCOL_ERROR, and no option turns that off.
 *
 * So a filter inspects a connection until the first header block is complete. If nghttp2 accepts its authority, which is so
 * for every current client, all that follows passes through unchanged. Otherwise each header block of the connection is
 * decoded and rewritten with `:authority: localhost`, in a form that needs no compression table on the other side; all other
 * frames pass through unchanged.
 *
 * Rejected: replacing the authority in place (it is Huffman-coded, and later requests refer to the table entry), and passing
 * on the socket only when the header block is complete (clients wait for the server's SETTINGS).
 */
import { Duplex } from "node:stream";
import { encodeHeaders, type HeaderField, HpackDecoder } from "./hpack.ts";

/**
 * A connection over `socket` in which every request has an `:authority` that `node:http2` accepts.
 * It owns the socket from now on: ends, errors and back-pressure pass both ways.
 */
export function acceptAnyAuthority(socket: Duplex): Duplex {
  const filter = new AuthorityFilter();
  const connection = new Duplex({
    allowHalfOpen: socket.allowHalfOpen,
    read: () => void socket.resume(),
    write: (chunk: Buffer, _encoding, done) => void socket.write(chunk, done),
    final: (done) => void socket.end(done),
    destroy: (error, done) => {
      socket.destroy();
      done(error);
    },
  });
  // Nothing is read before the reader asks for it.
  socket.pause();
  socket.on("data", (chunk: Buffer) => {
    try {
      let hasRoom = true;
      for (const part of filter.push(chunk)) hasRoom = connection.push(part);
      if (!hasRoom) socket.pause();
    } catch (error) {
      connection.destroy(error instanceof Error ? error : new Error(String(error)));
    }
  });
  socket.on("end", () => connection.push(null));
  socket.on("error", (error) => connection.destroy(error));
  socket.on("close", () => connection.destroy());
  return connection;
}

const preface = Buffer.from("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
const frameHeaderBytes = 9;
// RFC 9113, section 4.2: the size that every peer accepts, and the largest that our server accepts.
const largestFrameBytes = 16_384;
const largestBlockBytes = 256 << 10;

// RFC 9113, section 6.
const frameType = { headers: 1, continuation: 9 };
const frameFlag = { endStream: 0x1, endHeaders: 0x4, padded: 0x8, priority: 0x20 };

/** A header block that is not complete yet. */
interface OpenBlock {
  readonly stream: number;
  readonly endStream: boolean;
  /** The five bytes of a stream's priority, or none. */
  readonly priority: Buffer;
  readonly fragments: Buffer[];
  /** The frames as they were received. */
  readonly frames: Buffer[];
  /** Length of all `frames`. */
  bytes: number;
}

/**
 * Rewrites the header blocks of one client where their authority requires it.
 *
 * Malformed input before the first rewritten block passes through unchanged, for the server to reject.
 */
export class AuthorityFilter {
  readonly #decoder = new HpackDecoder();
  #mode: "inspect" | "rewrite" | "pass through" = "inspect";
  #prefaceLeft = preface;
  /** Bytes of the current frame that pass through. */
  #passLeft = 0;
  /** Bytes that the next chunk continues. */
  #rest: Buffer = Buffer.alloc(0);
  #block: OpenBlock | undefined;

  /**
   * Takes bytes of the client, split anywhere, and returns the bytes that the server should read.
   *
   * @throws Error when the connection cannot continue: a header block has more than 256 KiB, or is malformed after an
   *   earlier one was rewritten
   */
  push(chunk: Buffer): Buffer[] {
    if (this.#mode === "pass through") return [chunk];
    this.#rest = this.#rest.length === 0 ? chunk : Buffer.concat([this.#rest, chunk]);
    const out: Buffer[] = [];
    while (this.#rest.length > 0) {
      const parts = this.#next();
      if (parts === undefined) break;
      out.push(...parts);
    }
    // A copy, because the chunk may be reused or large.
    this.#rest = Buffer.from(this.#rest);
    return out;
  }

  /** Consumes the next piece of `#rest`; undefined when more bytes are needed. */
  #next(): Buffer[] | undefined {
    if (this.#mode === "pass through") return [this.#take(this.#rest.length)];
    if (this.#prefaceLeft.length > 0) return this.#takePreface();
    if (this.#passLeft > 0) {
      const passed = this.#take(this.#passLeft);
      this.#passLeft -= passed.length;
      return [passed];
    }
    if (this.#rest.length < frameHeaderBytes) return undefined;
    const length = this.#rest.readUIntBE(0, 3);
    const type = this.#rest.readUInt8(3);
    const flags = this.#rest.readUInt8(4);
    const stream = this.#rest.readUInt32BE(5) & 0x7fff_ffff;
    const isOfBlock = type === frameType.headers || type === frameType.continuation;
    if (this.#block === undefined && !isOfBlock) {
      this.#passLeft = length;
      return [this.#take(frameHeaderBytes)];
    }
    const isInOrder = this.#block === undefined
      ? type === frameType.headers
      : type === frameType.continuation && stream === this.#block.stream;
    if (!isInOrder || length > largestFrameBytes) {
      const problem = `frame type ${type} with ${length} bytes is out of place`;
      return this.#giveUp(this.#take(this.#rest.length), problem);
    }
    if (this.#rest.length < frameHeaderBytes + length) return undefined;
    // A copy, because it may be kept longer than the chunk that it is part of.
    const frame = Buffer.from(this.#take(frameHeaderBytes + length));
    const result = this.#takeHeaderFrame(frame, flags, stream);
    return typeof result === "string" ? this.#giveUp(frame, result) : result;
  }

  #takePreface(): Buffer[] {
    const expected = this.#prefaceLeft.subarray(0, this.#rest.length);
    this.#prefaceLeft = this.#prefaceLeft.subarray(this.#rest.length);
    const seen = this.#take(expected.length);
    return seen.equals(expected) ? [seen] : this.#giveUp(seen, "it does not speak HTTP/2");
  }

  #take(bytes: number): Buffer {
    const taken = this.#rest.subarray(0, bytes);
    this.#rest = this.#rest.subarray(bytes);
    return taken;
  }

  /** Stops inspecting: passes on the frames held back, `bytes`, and all that follows. Throws after a rewrite. */
  #giveUp(bytes: Buffer, problem: string): Buffer[] {
    if (this.#mode === "rewrite") throw new Error(`Cannot read a client's headers: ${problem}`);
    this.#mode = "pass through";
    return [...this.#block?.frames ?? [], bytes];
  }

  /** Adds a frame to the open header block. Returns what the server should read, or why the block is malformed. */
  #takeHeaderFrame(frame: Buffer, flags: number, stream: number): Buffer[] | string {
    const payload = frame.subarray(frameHeaderBytes);
    if (this.#block === undefined) {
      const begun = beginBlock(payload, flags, stream);
      if (typeof begun === "string") return begun;
      this.#block = begun;
    } else {
      this.#block.fragments.push(payload);
    }
    const block = this.#block;
    block.frames.push(frame);
    block.bytes += frame.length;
    if (block.bytes > largestBlockBytes) {
      throw new Error(`Cannot read a client's headers: they have more than ${largestBlockBytes} bytes`);
    }
    if ((flags & frameFlag.endHeaders) === 0) return [];
    let fields: HeaderField[];
    try {
      fields = this.#decoder.decode(Buffer.concat(block.fragments), largestBlockBytes);
    } catch (error) {
      // The caller passes `frame` on after the frames that were held back.
      block.frames.pop();
      return error instanceof Error ? error.message : String(error);
    }
    this.#block = undefined;
    if (this.#mode === "inspect" && isAcceptable(fields)) {
      this.#mode = "pass through";
      return block.frames;
    }
    this.#mode = "rewrite";
    return framesOf(block, encodeHeaders(withLocalhost(fields)));
  }
}

function beginBlock(payload: Buffer, flags: number, stream: number): OpenBlock | string {
  const padded = (flags & frameFlag.padded) !== 0;
  const padding = padded ? payload[0] ?? 0 : 0;
  const priorityFrom = padded ? 1 : 0;
  const from = priorityFrom + ((flags & frameFlag.priority) === 0 ? 0 : 5);
  const to = payload.length - padding;
  if (from > to) return "its HEADERS frame is shorter than it says";
  return {
    stream,
    endStream: (flags & frameFlag.endStream) !== 0,
    priority: payload.subarray(priorityFrom, from),
    fragments: [payload.subarray(from, to)],
    frames: [],
    bytes: 0,
  };
}

/**
 * Whether nghttp2 accepts the request unchanged. Stricter than nghttp2: a needless rewrite costs a little time, a wrong pass
 * costs the connection.
 */
function isAcceptable(fields: readonly HeaderField[]): boolean {
  const authorities = fields.filter(({ name }) => name === ":authority" || name === "host");
  return authorities.length > 0 && authorities.every(({ value }) => /^[A-Za-z0-9.:_~%[\]-]+$/.test(value));
}

/** The fields of a request with `:authority: localhost`; other fields (trailers) unchanged. */
function withLocalhost(fields: readonly HeaderField[]): readonly HeaderField[] {
  const pseudo = fields.filter(({ name }) => name.startsWith(":") && name !== ":authority");
  if (pseudo.length === 0) return fields;
  // RFC 9113, section 8.3.1: `host` must not differ from `:authority`.
  const others = fields.filter(({ name }) => !name.startsWith(":") && name !== "host");
  return [...pseudo, { name: ":authority", value: "localhost", neverIndexed: false }, ...others];
}

function framesOf({ stream, endStream, priority }: OpenBlock, encoded: Buffer): Buffer[] {
  const whole = Buffer.concat([priority, encoded]);
  const out: Buffer[] = [];
  let at = 0;
  do {
    const part = whole.subarray(at, at + largestFrameBytes);
    const isFirst = at === 0;
    at += part.length;
    const flags = (isFirst && endStream ? frameFlag.endStream : 0) |
      (isFirst && priority.length > 0 ? frameFlag.priority : 0) |
      (at >= whole.length ? frameFlag.endHeaders : 0);
    const header = Buffer.alloc(frameHeaderBytes);
    header.writeUIntBE(part.length, 0, 3);
    header.writeUInt8(isFirst ? frameType.headers : frameType.continuation, 3);
    header.writeUInt8(flags, 4);
    header.writeUInt32BE(stream, 5);
    out.push(header, part);
  } while (at < whole.length);
  return out;
}

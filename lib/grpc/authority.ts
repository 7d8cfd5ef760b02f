/**
 * Serves callers whose `:authority` is not one that HTTP/2 allows.
 *
 * The kubelets of Kubernetes 1.17 to 1.25, and other Go programs that dial a unix socket with an old grpc-go, send the
 * path of the socket (`/csi/csi.sock`), a URL (`unix:///csi/csi.sock`), nothing, or no `:authority` at all. gRPC servers
 * in Go do not mind; nghttp2 inside `node:http2` ends the connection with PROTOCOL_ERROR. There is no option to stop it.
 *
 * So we read along until the first header block is complete. When nghttp2 will take its authority, which is so for
 * every client of today, all that follows passes through untouched. Otherwise each header block of that connection is
 * decoded and written again with `:authority: localhost`, in a form that needs no compression table on the other side;
 * all other frames pass through as they are.
 *
 * Rejected: renaming the authority in place (it is Huffman-coded, and later requests refer to the table entry), and
 * waiting with the hand-over of the socket until the header block is there (clients wait for the server's SETTINGS).
 */
import { Duplex } from "node:stream";
import { encodeHeaders, type HeaderField, HpackDecoder } from "./hpack.ts";

/**
 * The connection behind `socket`, with every request's `:authority` made acceptable to `node:http2`.
 * Owns the socket from now on: ends, errors and back-pressure pass both ways.
 */
export function acceptAnyAuthority(socket: Duplex): Duplex {
  const filter = createAuthorityFilter();
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
  // Nothing is read before the other side asks for it.
  socket.pause();
  socket.on("data", (chunk: Buffer) => {
    try {
      let wanted = true;
      for (const part of filter(chunk)) wanted = connection.push(part);
      if (!wanted) socket.pause();
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
// RFC 9113, section 4.2: the size that everybody accepts, and the largest that our server does.
const largestFrameBytes = 16_384;
const largestBlockBytes = 256 << 10;

// RFC 9113, section 6.
const frameType = { headers: 1, continuation: 9 };
const frameFlag = { endStream: 0x1, endHeaders: 0x4, padded: 0x8, priority: 0x20 };

/** A header block of which not all frames are here yet. */
interface OpenBlock {
  readonly stream: number;
  readonly endStream: boolean;
  /** The five bytes of a stream's priority, or none. */
  readonly priority: Buffer;
  readonly fragments: Buffer[];
  /** The frames as they came. */
  readonly frames: Buffer[];
  /** All of `frames`. */
  bytes: number;
}

/**
 * Takes the bytes of one client in any cut, and answers those that the server should read. Throws an Error when the
 * connection cannot go on: a header block of more than 256 KiB, or one that is malformed after an earlier one has
 * been written anew. What is malformed before that passes through, for the server to refuse.
 */
export function createAuthorityFilter(): (chunk: Buffer) => Buffer[] {
  const decoder = new HpackDecoder();
  let through = false;
  let rewriting = false;
  let prefaceLeft = preface;
  /** Bytes of the current frame that pass through. */
  let passLeft = 0;
  let pending: Buffer = Buffer.alloc(0);
  let block: OpenBlock | undefined;

  /** Ends the reading along: `bytes`, what was held back, and all that follows are for the server to judge. */
  const giveUp = (bytes: Buffer, problem: string): Buffer[] => {
    if (rewriting) throw new Error(`Cannot read a client's headers: ${problem}`);
    through = true;
    return [...block?.frames ?? [], bytes];
  };

  const takeHeaderFrame = (frame: Buffer, flags: number, stream: number): Buffer[] | string => {
    const payload = frame.subarray(frameHeaderBytes);
    if (block === undefined) {
      const begun = beginBlock(payload, flags, stream);
      if (typeof begun === "string") return begun;
      block = begun;
    } else {
      block.fragments.push(payload);
    }
    block.frames.push(frame);
    block.bytes += frame.length;
    if (block.bytes > largestBlockBytes) {
      throw new Error(`Cannot read a client's headers: they have more than ${largestBlockBytes} bytes`);
    }
    if ((flags & frameFlag.endHeaders) === 0) return [];
    const { frames } = block;
    let fields: HeaderField[];
    try {
      fields = decoder.decode(Buffer.concat(block.fragments), largestBlockBytes);
    } catch (error) {
      // `frame` goes the way of the others that were held back.
      frames.pop();
      return error instanceof Error ? error.message : String(error);
    }
    const complete = block;
    block = undefined;
    if (!rewriting && isAcceptable(fields)) {
      through = true;
      return frames;
    }
    rewriting = true;
    return framesOf(complete, encodeHeaders(withLocalhost(fields)));
  };

  return (chunk) => {
    if (through) return [chunk];
    const out: Buffer[] = [];
    let rest = pending.length === 0 ? chunk : Buffer.concat([pending, chunk]);
    pending = Buffer.alloc(0);
    const take = (bytes: number): Buffer => {
      const taken = rest.subarray(0, bytes);
      rest = rest.subarray(bytes);
      return taken;
    };
    while (rest.length > 0) {
      if (through) {
        out.push(rest);
        return out;
      }
      if (prefaceLeft.length > 0) {
        const expected = prefaceLeft.subarray(0, rest.length);
        prefaceLeft = prefaceLeft.subarray(rest.length);
        const seen = take(expected.length);
        out.push(...(seen.equals(expected) ? [seen] : giveUp(seen, "it does not speak HTTP/2")));
        continue;
      }
      if (passLeft > 0) {
        const passed = take(passLeft);
        passLeft -= passed.length;
        out.push(passed);
        continue;
      }
      if (rest.length < frameHeaderBytes) break;
      const length = rest.readUIntBE(0, 3);
      const type = rest.readUInt8(3);
      const flags = rest.readUInt8(4);
      const stream = rest.readUInt32BE(5) & 0x7fff_ffff;
      const ofBlock = type === frameType.headers || type === frameType.continuation;
      if (block === undefined && !ofBlock) {
        passLeft = length;
        out.push(take(frameHeaderBytes));
        continue;
      }
      const inOrder = block === undefined
        ? type === frameType.headers
        : type === frameType.continuation && stream === block.stream;
      if (!inOrder || length > largestFrameBytes) {
        out.push(...giveUp(take(rest.length), `frame type ${type} with ${length} bytes is out of place`));
        continue;
      }
      if (rest.length < frameHeaderBytes + length) break;
      // A copy of its own: it may be kept for longer than the chunk that it came in.
      const frame = Buffer.from(take(frameHeaderBytes + length));
      const result = takeHeaderFrame(frame, flags, stream);
      out.push(...(typeof result === "string" ? giveUp(frame, result) : result));
    }
    pending = Buffer.from(rest);
    return out;
  };
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
 * Whether nghttp2 takes the request as it is. Narrower than nghttp2: an authority that is rewritten without need costs
 * a little time, one that is passed on in error costs the connection.
 */
function isAcceptable(fields: readonly HeaderField[]): boolean {
  const authorities = fields.filter(({ name }) => name === ":authority" || name === "host");
  return authorities.length > 0 && authorities.every(({ value }) => /^[A-Za-z0-9.:_~%[\]-]+$/.test(value));
}

/** The fields of a request with `:authority: localhost`; those of anything else (trailers) as they are. */
function withLocalhost(fields: readonly HeaderField[]): readonly HeaderField[] {
  const pseudo = fields.filter(({ name }) => name.startsWith(":") && name !== ":authority");
  if (pseudo.length === 0) return fields;
  // RFC 9113, section 8.3.1: `host` may not say another thing than `:authority`.
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

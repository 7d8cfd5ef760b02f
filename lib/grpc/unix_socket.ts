/**
 * Unix sockets for streams of Node's kind, made of Deno's own connections.
 *
 * `node:net` of Deno 2.9.5 closes the descriptor of each connection over a Unix socket twice, and its listener's too. In
 * between another thread can have got that number for a device, a file or the pipe of a tool, which is then closed under
 * its owner. Deno.listen closes once. This file can go when tests/grpc/unix_socket_test.ts passes with `node:net`.
 */
import { Buffer } from "node:buffer";
import { Duplex } from "node:stream";

/** Something that accepts connections. */
export interface UnixListener {
  /** Accepts no more, and removes the socket's file. Connections go on. */
  close(): void;
}

/**
 * A read that waits holds its buffer, so an idle connection has a small one. It grows while reads fill it, and shrinks when
 * they do not.
 */
const leastChunkBytes = 1 << 10;
const mostChunkBytes = 64 << 10;
/** Before the next try to accept after one that failed, as all do while the process has no descriptor left. */
const pauseMs = 100;

/**
 * Listens at a path at which nothing is.
 *
 * @param refused is told why connections cannot be accepted, once until one has been; they wait meanwhile
 * @throws Error of the operating system when nobody can listen there
 */
export function listenUnix(
  path: string,
  accept: (connection: Duplex) => void,
  refused: (error: Error) => void,
): UnixListener {
  const listener = Deno.listen({ transport: "unix", path });
  let closed = false;
  (async () => {
    let failing = false;
    while (!closed) {
      let connection: Deno.UnixConn;
      try {
        connection = await listener.accept();
        failing = false;
      } catch (error) {
        if (closed) return;
        if (!failing) refused(error instanceof Error ? error : new Error(String(error)));
        failing = true;
        await new Promise((resolve) => setTimeout(resolve, pauseMs));
        continue;
      }
      const stream = streamOf(connection);
      try {
        accept(stream);
      } catch (error) {
        // It costs this connection, and not the acceptance of others.
        refused(error instanceof Error ? error : new Error(String(error)));
        stream.destroy();
      }
    }
  })();
  return {
    close() {
      if (closed) return;
      closed = true;
      listener.close();
    },
  };
}

/** Whether a process listens at this path. */
export async function isListening(path: string): Promise<boolean> {
  try {
    (await Deno.connect({ transport: "unix", path })).close();
    return true;
  } catch {
    return false;
  }
}

/** A connection as a stream, which owns it from now on. When the other side ends, so do we. */
function streamOf(connection: Deno.UnixConn): Duplex {
  let reading = false;
  let chunkBytes = leastChunkBytes;
  const stream = new Duplex({
    allowHalfOpen: false,
    read() {
      // Asked again while a read is under way, a stream would get its bytes out of order.
      if (reading) return;
      reading = true;
      const buffer = new Uint8Array(chunkBytes);
      connection.read(buffer).then((bytes) => {
        reading = false;
        if (bytes === chunkBytes) chunkBytes = Math.min(chunkBytes * 4, mostChunkBytes);
        else if ((bytes ?? 0) < chunkBytes / 4) chunkBytes = Math.max(chunkBytes / 4, leastChunkBytes);
        stream.push(bytes === null ? null : Buffer.from(buffer.buffer, 0, bytes));
      }, (error) => stream.destroy(error));
    },
    write(chunk: Buffer, _encoding, done) {
      writeAll(connection, chunk).then(() => done(), done);
    },
    final(done) {
      // It fails when the other side is gone, which is an end too.
      connection.closeWrite().then(() => done(), () => done());
    },
    destroy(error, done) {
      connection.close();
      done(error);
    },
  });
  return stream;
}

async function writeAll(connection: Deno.UnixConn, bytes: Uint8Array): Promise<void> {
  for (let rest = bytes; rest.length > 0;) rest = rest.subarray(await connection.write(rest));
}

/**
 * Unix sockets as Node streams over Deno's own connections.
 *
 * `node:net` of Deno 2.9.5 closes the descriptor of each connection over a Unix socket twice, and the listener's too. Between
 * the two another thread may have got that number for a device, a file or the pipe of a tool, which is then closed while it is
 * in use. Deno.listen closes once. This file can go when tests/grpc/unix_socket_test.ts passes with `node:net`.
 */
import { Buffer } from "node:buffer";
import { Duplex } from "node:stream";

/** A Unix socket that accepts connections. */
export interface UnixListener {
  /** Accepts no more connections and removes the socket's file. Open connections continue. */
  close(): void;
}

/**
 * A pending read holds its buffer, so an idle connection has a small one. It grows while reads fill it, and shrinks when they
 * do not.
 */
const leastChunkBytes = 1 << 10;
const mostChunkBytes = 64 << 10;
/** Pause after a failure to accept. All attempts fail while the process has no descriptor left. */
const pauseMs = 100;

/**
 * Listens at a path that does not exist.
 *
 * @param failed receives why connections cannot be accepted: once, until one is accepted again; connections wait meanwhile
 * @throws Error of the operating system when the process cannot listen there
 */
export function listenUnix(
  path: string,
  accept: (connection: Duplex) => void,
  failed: (error: Error) => void,
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
        if (!failing) failed(error instanceof Error ? error : new Error(String(error)));
        failing = true;
        await new Promise((resolve) => setTimeout(resolve, pauseMs));
        continue;
      }
      const stream = streamOf(connection);
      try {
        accept(stream);
      } catch (error) {
        // Only this connection is lost; others are accepted.
        failed(error instanceof Error ? error : new Error(String(error)));
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

/** A connection as a stream, which owns it from now on. It ends when the other side ends. */
function streamOf(connection: Deno.UnixConn): Duplex {
  let reading = false;
  let chunkBytes = leastChunkBytes;
  const stream = new Duplex({
    allowHalfOpen: false,
    read() {
      // Two reads at the same time would deliver bytes out of order.
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
      // It fails when the other side is gone, which is also an end.
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

/** Listens on a Unix socket or a TCP port, with or without TLS. */
import { chmodSync, lstatSync, mkdirSync, statSync, unlinkSync } from "node:fs";
import net from "node:net";
import { dirname } from "node:path";
import type { Duplex } from "node:stream";
import tls from "node:tls";
import { StatusError } from "../error.ts";
import type { Logger } from "../log.ts";
import { acceptAnyAuthority } from "./authority.ts";
import { isListening, listenUnix, type UnixListener } from "./unix_socket.ts";

/** Where to listen. Port 0 takes a free one. */
export type Listen =
  | { readonly path: string }
  | {
    readonly host: string;
    readonly port: number;
    /** PEM texts; plain HTTP/2 when absent. */
    readonly tls?: { readonly key: string; readonly cert: string };
  };

/** Something that accepts connections. */
export interface Listener {
  /** The port, or 0 for a socket path. */
  readonly port: number;
  /** Accepts no more connections. For TCP it resolves when all connections are closed. */
  close(): Promise<void>;
}

/**
 * Listens, and passes each connection to `accept`.
 *
 * The last directory of a socket's path is made when it is missing. A socket file on which no process listens is removed.
 *
 * @throws StatusError FAILED_PRECONDITION when the port or socket is in use, the socket's directory cannot be made or every
 *   user may write to it, the path is too long, or something else than a socket is there
 */
export async function startListener(
  listen: Listen,
  log: Logger,
  accept: (connection: Duplex) => void,
): Promise<Listener> {
  const listenError = (error: Error) => {
    const where = "path" in listen ? listen.path : `${listen.host}:${listen.port}`;
    return new StatusError("FAILED_PRECONDITION", `Cannot listen on ${where}: ${error.message}`, { cause: error });
  };
  if ("path" in listen) {
    await clearSocketPath(listen.path);
    let listener: UnixListener;
    try {
      listener = listenUnix(
        listen.path,
        (connection) => accept(acceptAnyAuthority(connection)),
        (error) => log.error("could not accept connections, tries again", { path: listen.path, error: error.message }),
      );
    } catch (error) {
      throw listenError(error as Error);
    }
    // A client that connects controls volumes: so only the driver's user, and its group for sidecars with another user.
    chmodSync(listen.path, 0o660);
    return { port: 0, close: () => Promise.resolve(listener.close()) };
  }
  const { host, port, tls: identity } = listen;
  const listener = identity === undefined
    ? net.createServer(accept)
    : tls.createServer({ ...identity, ALPNProtocols: ["h2"] }, accept)
      .on("tlsClientError", (error) => log.debug("refused a TLS connection", { error: error.message }));
  await new Promise<void>((resolve, reject) => {
    listener.once("error", (error) => reject(listenError(error)));
    listener.listen(port, host, resolve);
  });
  const address = listener.address();
  return {
    port: typeof address === "object" && address !== null ? address.port : 0,
    close: () => new Promise<void>((resolve) => listener.close(() => resolve())),
  };
}

// sockaddr_un holds 108 bytes with the final zero.
const longestSocketPath = 107;

/** Removes a socket file on which no process listens; throws FAILED_PRECONDITION when the path cannot be used. */
async function clearSocketPath(path: string): Promise<void> {
  const pathError = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot listen on ${path}: ${problem}`, { cause });
  if (Buffer.byteLength(path) > longestSocketPath) throw pathError(`the path has more than ${longestSocketPath} bytes`);
  try {
    // An emptyDir of Kubernetes is writable for every user of the pod; a directory in it is not.
    mkdirSync(dirname(path), { mode: 0o750 });
  } catch {
    // It exists, as usual, or the next check names the problem.
  }
  const directory = statIfThere(dirname(path));
  if (!directory?.isDirectory()) throw pathError(`its directory is missing, create ${dirname(path)} first`);
  // With the sticky bit, as in /tmp, other users cannot replace the socket.
  if ((directory.mode & 0o1002) === 0o002) {
    throw pathError(
      `every user of the machine may replace files in ${dirname(path)}, take that right away (chmod o-w)`,
    );
  }
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (found === undefined) return;
  if (!found.isSocket()) throw pathError("something that is not a socket is there");
  if (await isListening(path)) throw pathError("another process is listening there");
  unlinkSync(path);
}

function statIfThere(path: string) {
  try {
    return statSync(path);
  } catch {
    return undefined;
  }
}

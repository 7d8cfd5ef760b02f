/**
 * A small HTTP/1.1 server over TCP for an API with injected faults: it can be stopped and made to hang, and a request can be
 * left without an answer, for which the server must own the connection. One request per connection.
 */
import { createServer, type Server, type Socket } from "node:net";
import { StatusError } from "../error.ts";
import { onFreePort } from "./port.ts";

/** A complete request. */
export interface HttpRequest {
  readonly method: string;
  /** As it was sent, with its percent-encoding. */
  readonly path: string;
  /** By lower-case name. */
  readonly headers: ReadonlyMap<string, string>;
  readonly body: string;
  /** Aborts when the caller is gone or the server stops. */
  readonly signal: AbortSignal;
}

/** An answer; `Content-Length` and `Connection` are added. */
export interface HttpAnswer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
}

/** A server that can be stopped and made to hang. */
export interface HttpServer extends AsyncDisposable {
  /** `host:port`. */
  readonly address: string;
  readonly state: "running" | "stopped" | "hanging";
  stop(): Promise<void>;
  /** Listens again, on the same port. */
  start(): Promise<void>;
  /** Accepts connections and never answers. */
  hang(): Promise<void>;
  dropConnections(): void;
}

const longestRequest = 1 << 20;

/** Serves until it is disposed. `answer` resolves with undefined to end the connection without an answer. */
export async function serveHttp(
  host: string,
  firstPort: number,
  answer: (request: HttpRequest) => Promise<HttpAnswer | undefined>,
): Promise<HttpServer> {
  const sockets = new Map<Socket, AbortController>();
  let port = firstPort;
  let server: Server | undefined;
  let state: HttpServer["state"] = "stopped";

  const serve = async (socket: Socket) => {
    const gone = new AbortController();
    sockets.set(socket, gone);
    socket.on("error", () => {}); // The peer gives up; "close" follows.
    socket.on("close", () => {
      sockets.delete(socket);
      gone.abort(new StatusError("CANCELLED", "Cannot answer: the caller is gone"));
    });
    const request = await readRequest(socket);
    if (request === undefined || state !== "running") return;
    const reply = await answer({ ...request, signal: gone.signal });
    if (reply === undefined) {
      socket.destroy();
      return;
    }
    const body = Buffer.from(reply.body);
    const headers = { ...reply.headers, "Content-Length": String(body.length), Connection: "close" };
    const head = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`).join("");
    socket.end(Buffer.concat([Buffer.from(`HTTP/1.1 ${reply.status} -\r\n${head}\r\n`), body]));
  };
  const listen = (next: HttpServer["state"]) =>
    onFreePort(port, async (chosen) => {
      const opened = createServer((socket) => void serve(socket));
      await new Promise<void>((resolve, reject) => {
        opened.once("error", (cause) => {
          const problem = `Cannot listen on ${host}:${chosen}: ${cause.message}`;
          reject(new StatusError("FAILED_PRECONDITION", problem, { cause }));
        });
        opened.listen(chosen, host, resolve);
      });
      server = opened;
      port = chosen;
      state = next;
    });
  const dropConnections = () => {
    for (const socket of sockets.keys()) socket.destroy();
  };
  const stop = async () => {
    state = "stopped";
    const old = server;
    server = undefined;
    if (old === undefined) return;
    const closed = new Promise<void>((resolve) => old.close(() => resolve()));
    dropConnections();
    await closed;
  };
  const restart = async (next: HttpServer["state"]) => {
    if (state === next) return;
    await stop();
    await listen(next);
  };
  await listen("running");

  return {
    get address() {
      return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
    },
    get state() {
      return state;
    },
    stop,
    start: () => restart("running"),
    hang: () => restart("hanging"),
    dropConnections,
    [Symbol.asyncDispose]: stop,
  };
}

/** The first request of a connection; undefined when the connection ends before, or the request is too long. */
async function readRequest(socket: Socket): Promise<Omit<HttpRequest, "signal"> | undefined> {
  let bytes = Buffer.alloc(0);
  return await new Promise((resolve) => {
    socket.on("close", () => resolve(undefined));
    socket.on("data", (chunk: Buffer) => {
      bytes = Buffer.concat([bytes, chunk]);
      const end = bytes.indexOf("\r\n\r\n");
      if (end < 0 || bytes.length > longestRequest) {
        return bytes.length > longestRequest ? resolve(undefined) : undefined;
      }
      const [first = "", ...lines] = bytes.subarray(0, end).toString().split("\r\n");
      const [method = "", path = ""] = first.split(" ");
      const headers = new Map(lines.map((line) => {
        const colon = line.indexOf(":");
        return [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()];
      }));
      const body = wholeBody(bytes.subarray(end + 4), headers);
      if (body !== undefined) resolve({ method, path, headers, body: body.toString() });
    });
  });
}

/** The body in the bytes received so far; undefined while it is incomplete. */
function wholeBody(bytes: Buffer, headers: ReadonlyMap<string, string>): Buffer | undefined {
  if (headers.get("transfer-encoding")?.toLowerCase() !== "chunked") {
    const length = Number(headers.get("content-length") ?? 0);
    return bytes.length >= length ? bytes.subarray(0, length) : undefined;
  }
  const parts: Buffer[] = [];
  for (let at = 0;;) {
    const end = bytes.indexOf("\r\n", at);
    if (end < 0) return undefined;
    const length = Number.parseInt(bytes.subarray(at, end).toString(), 16);
    if (!(length > 0)) return Buffer.concat(parts);
    if (bytes.length < end + 2 + length + 2) return undefined;
    parts.push(bytes.subarray(end + 2, end + 2 + length));
    at = end + 2 + length + 2;
  }
}

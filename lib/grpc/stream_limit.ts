/**
 * Limits the calls that clients of our servers have open at once. Answers that a client does not read stay in memory: 5000
 * ended the driver (50 connections with 100 calls each and a window of 0, in a heap of 64 MiB).
 *
 * HTTP/2 limits the calls of a connection (SETTINGS_MAX_CONCURRENT_STREAMS), but nothing limits those of all connections.
 * Further calls get REFUSED_STREAM, which tells gRPC clients that nothing was done; they retry.
 *
 * This module must be imported before a server is made; goaway.ts explains why that changes grpc-js.
 */
import http2 from "node:http2";

/** Limit over all connections. Each sidecar has at most 100 calls open, kubelet one connection for each call. */
export const mostOpenCalls = 1000;

type AnyFunction = (...args: unknown[]) => unknown;
type Emitter = { emit: AnyFunction };
type Stream = { on(event: "close" | "error", listener: () => void): void; close(code: number): void };

let open = 0;

const module = http2 as unknown as Record<"createServer", AnyFunction>;
const { createServer } = module;
module.createServer = (...args) => {
  const server = createServer(...args) as Emitter;
  const emit = server.emit;
  server.emit = function (this: unknown, ...args: unknown[]) {
    if (args[0] !== "stream") return Reflect.apply(emit, this, args);
    const stream = args[1] as Stream;
    if (open >= mostOpenCalls) {
      // close() emits an error on the stream.
      stream.on("error", () => {});
      stream.close(http2.constants.NGHTTP2_REFUSED_STREAM);
      return true;
    }
    open++;
    stream.on("close", () => open--);
    return Reflect.apply(emit, this, args);
  };
  return server;
};

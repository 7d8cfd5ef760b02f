/**
 * Bounds the calls that clients of our servers have open at once. A client that takes no answers keeps each of them in memory:
 * 5000 ended the driver (measured: 50 connections with 100 calls each and a window of 0, in a heap of 64 MiB).
 *
 * HTTP/2 itself bounds the calls of a connection (SETTINGS_MAX_CONCURRENT_STREAMS), and nothing bounds those of all. What is
 * beyond is refused with REFUSED_STREAM, by which gRPC clients know that nothing was done; they try again.
 *
 * This module must be imported before a server is made; goaway.ts explains how grpc-js is reached.
 */
import http2 from "node:http2";

/** At once, over all connections. Sidecars have at most 100 each, kubelet one for each call that runs. */
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
      // The refusal comes back as an error of the stream.
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

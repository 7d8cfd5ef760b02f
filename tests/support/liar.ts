/** A management API of LightOS that hands every call on to another one, and changes what it answers. */
import type { DescMethodUnary, Message } from "@bufbuild/protobuf";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { type CallContext, serve, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { DurosAPI } from "../../proto/gen/lightos_pb.ts";

export interface Liar extends AsyncDisposable {
  /** `127.0.0.1:port`, clear text. */
  readonly address: string;
  /** Ends the connections to it, so that the next call begins with a look at the version. */
  dropConnections(): void;
}

// deno-lint-ignore no-explicit-any -- the answers of all methods, which each test knows the form of
type Answer = any;

/**
 * Starts one.
 *
 * @param behind `host:port` of the API that tells the truth
 * @param lies by name of the RPC: changes the answer in place, or returns another one
 */
export async function startLiar(
  behind: string,
  lies: Readonly<Record<string, (answer: Answer) => Answer>>,
): Promise<Liar> {
  const channel = new Channel({ address: behind });
  const handlers = Object.fromEntries(DurosAPI.methods.map((method) => [
    method.localName,
    async (request: Message, call: CallContext) => {
      const headers: Record<string, string> = {};
      for (const name of ["authorization", "if-match"]) {
        const value = call.header(name);
        if (value !== undefined) headers[name] = value;
      }
      const answer: Answer = await channel.call(method as DescMethodUnary, request, { signal: call.signal, headers })
        .catch((error) => Promise.reject(asStatus(error)));
      return lies[method.name]?.(answer) ?? answer;
    },
  ]));
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0 },
    services: [service(DurosAPI, handlers)],
    log: createLogger("error", "json", () => {}),
  });
  return {
    address: `127.0.0.1:${server.port}`,
    dropConnections: () => server.dropConnections(),
    async [Symbol.asyncDispose]() {
      channel[Symbol.dispose]();
      await server.stop(100);
    },
  };
}

function asStatus(error: unknown): unknown {
  return error instanceof CallError ? new StatusError(error.code as StatusCode, error.message) : error;
}

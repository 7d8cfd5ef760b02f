/** An HTTP/2 server without gRPC: it answers as proxies, load balancers and wrong ports do in a server's place. */
import { create, type DescMessage, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import http2 from "node:http2";
import type { AddressInfo } from "node:net";

const enhanceYourCalm = http2.constants.NGHTTP2_ENHANCE_YOUR_CALM;

/** What to answer each request with. */
export interface Http2Answer {
  readonly headers: Readonly<Record<string, string | number>>;
  readonly body?: Uint8Array | string;
  readonly trailers?: Readonly<Record<string, string>>;
  /**
   * How the stream ends instead of its regular end: with an RST_STREAM of this code, with the headers, with the
   * connection, or with the connection after GOAWAY as servers send it to clients that ping too often.
   */
  readonly end?: number | "headers" | "lost connection" | "too many pings";
}

/** A page as load balancers send it. */
export function page(status: number): Http2Answer {
  return {
    headers: { ":status": status, "content-type": "text/html" },
    body: `<!DOCTYPE html><html><h1>${status}</h1></html>`,
  };
}

/** A regular answer of gRPC. */
export function grpcAnswer<S extends DescMessage>(schema: S, message: MessageInitShape<S>): Http2Answer {
  const bytes = toBinary(schema, create(schema, message));
  const head = Buffer.alloc(5);
  head.writeUInt32BE(bytes.length, 1);
  return {
    headers: { ":status": 200, "content-type": "application/grpc" },
    body: Buffer.concat([head, bytes]),
    trailers: { "grpc-status": "0" },
  };
}

export interface Http2Answers extends AsyncDisposable {
  readonly address: string;
  /** The path of each request so far. */
  readonly paths: readonly string[];
}

/**
 * Listens on a free port of 127.0.0.1 and answers each request as `answer` says.
 *
 * @param answer gets the path of a request, `/lightbits.api.duros.v2.DurosAPI/GetVersion`
 */
export async function answerHttp2(answer: (path: string) => Http2Answer | Promise<Http2Answer>): Promise<Http2Answers> {
  const paths: string[] = [];
  const sessions = new Set<http2.ServerHttp2Session>();
  const server = http2.createServer();
  server.on("session", (session) => {
    sessions.add(session);
    session.on("error", () => {});
    session.on("close", () => sessions.delete(session));
  });
  server.on("stream", (stream: http2.ServerHttp2Stream, headers) => {
    stream.on("error", () => {});
    const path = String(headers[":path"]);
    paths.push(path);
    stream.resume();
    stream.on("end", async () => {
      const { headers: answered, body, trailers, end } = await answer(path);
      stream.respond({ ...answered }, { waitForTrailers: trailers !== undefined, endStream: end === "headers" });
      if (end === "headers") return;
      stream.on("wantTrailers", () => stream.sendTrailers({ ...trailers }));
      if (end === undefined) {
        stream.end(body);
        return;
      }
      stream.write(body ?? "", () => {
        if (typeof end === "number") return stream.close(end);
        if (end === "too many pings") stream.session?.goaway(enhanceYourCalm, 0, Buffer.from("too_many_pings"));
        setImmediate(() => stream.session?.destroy());
      });
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  return {
    address: `127.0.0.1:${port}`,
    paths,
    async [Symbol.asyncDispose]() {
      for (const session of sessions) session.destroy();
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}

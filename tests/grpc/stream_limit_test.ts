/** What a client that takes no answers costs: the driver bounds connections and open calls, and serves the others. */
import { ok, strictEqual } from "node:assert/strict";
import { identityHandlers } from "../../lib/csi/identity.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { mostOpenCalls } from "../../lib/grpc/stream_limit.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity } from "../../proto/gen/csi_pb.ts";
import { flags, frame, frames, preface, RawEncoder } from "../support/raw_http2.ts";

const never = new AbortController().signal;

Deno.test("calls beyond the limit are rejected as not begun, and served when earlier ones have ended", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-limit-" });
  const path = `${directory}/csi.sock`;
  const server = await serve({
    listen: { path },
    services: [
      service(
        Identity,
        identityHandlers({ name: "x.example", version: "0", expansion: false, snapshotMetadata: false }),
      ),
    ],
    log: createLogger("error"),
  });
  const greedy: Deno.UnixConn[] = [];
  try {
    // A window of 0: no answer's body gets through, so each call stays open. Then calls without end.
    const noWindow = frame(frames.settings, 0, 0, new Uint8Array([0, 4, 0, 0, 0, 0]));
    for (let begun = 0; begun < mostOpenCalls + 200; begun += 100) {
      const connection = await Deno.connect({ transport: "unix", path });
      greedy.push(connection);
      const encoder = new RawEncoder();
      const calls = Array.from({ length: 100 }, (_, n) => {
        const block = encoder.encode([
          [":method", "POST"],
          [":scheme", "http"],
          [":path", "/csi.v1.Identity/GetPluginInfo"],
          [":authority", "localhost"],
          ["content-type", "application/grpc"],
          ["te", "trailers"],
        ], "plain");
        const stream = 2 * n + 1;
        return [
          frame(frames.headers, flags.endHeaders, stream, block),
          frame(frames.data, flags.endStream, stream, new Uint8Array(5)),
        ];
      });
      const bytes = new Uint8Array(
        await new Blob([preface, noWindow, ...calls.flat()].map((part) => new Uint8Array(part))).arrayBuffer(),
      );
      for (let at = 0; at < bytes.length;) at += await connection.write(bytes.subarray(at));
    }
    using channel = new Channel({ address: `unix://${path}` });
    const ask = () =>
      channel.call(Identity.method.getPluginInfo, {}, { signal: never, deadline: new Date(Date.now() + 5000) });

    const refused = await until(() => ask().then(() => undefined, (error: Error) => error));
    ok(refused instanceof Error);

    for (const connection of greedy.splice(0)) connection.close();
    const answer = await until(() => ask().catch(() => undefined));
    strictEqual(answer.name, "x.example");
  } finally {
    for (const connection of greedy) connection.close();
    await server.stop(0);
    await Deno.remove(directory, { recursive: true });
  }
});

async function until<T>(look: () => Promise<T | undefined>): Promise<T> {
  const giveUpAt = Date.now() + 60_000;
  for (;;) {
    const found = await look();
    if (found !== undefined) return found;
    ok(Date.now() < giveUpAt, "nothing has changed");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

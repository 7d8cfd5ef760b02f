/** A gRPC server and a channel to it, for tests. */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { sleep } from "../../lib/timing.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { type Handlers, serve, type ServeOptions, service } from "../../lib/grpc/server.ts";
import { createLogger } from "../../lib/log.ts";
import { Identity, type ProbeResponse, SnapshotMetadata } from "../../proto/gen/csi_pb.ts";

/** Handlers of the services of `withServer`. */
export type IdentityHandlers = Handlers<typeof Identity>;
export type MetadataHandlers = Handlers<typeof SnapshotMetadata>;
/** A line of the server's log. */
export interface Line {
  readonly level: string;
  readonly event: string;
  readonly [field: string]: unknown;
}
/** A server and a channel to it. */
export interface Setup {
  readonly path: string;
  readonly channel: Channel;
  readonly lines: readonly Line[];
  readonly stop: (graceMs: number) => Promise<void>;
  readonly dropConnections: () => void;
}

/** A Probe handler. */
export const ready = () => Promise.resolve({ ready: true });
/** A limit for calls that must succeed. */
export const patient = () => AbortSignal.timeout(20_000);

/** Runs `body` with a directory that is removed afterwards. */
export async function withDirectory(body: (directory: string) => Promise<void>): Promise<void> {
  const directory = mkdtempSync("/tmp/lbcsi-rpc-");
  try {
    await body(directory);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/** Serves on a Unix socket and calls from this process. */
export async function withServer(
  identity: IdentityHandlers,
  body: (setup: Setup) => Promise<void>,
  more: Partial<ServeOptions> & { readonly metadata?: MetadataHandlers } = {},
): Promise<void> {
  await withDirectory(async (directory) => {
    const path = `${directory}/csi.sock`;
    const lines: Line[] = [];
    const { metadata = {}, ...options } = more;
    const server = await serve({
      listen: { path },
      log: createLogger("debug", "json", (line) => lines.push(JSON.parse(line))),
      services: [service(Identity, identity), service(SnapshotMetadata, metadata)],
      ...options,
    });
    using channel = new Channel({ address: `unix://${path}` });
    try {
      await body({ path, channel, lines, stop: server.stop, dropConnections: server.dropConnections });
    } finally {
      await server.stop(1000);
    }
  });
}

/** Waits until `condition` holds, 10 s at most. */
export async function until(condition: () => boolean, what: string): Promise<void> {
  const signal = AbortSignal.timeout(10_000);
  while (!condition()) await sleep(5, signal).catch(() => assert.fail(`never: ${what}`));
}

/** Calls Probe. */
export function probe(
  channel: Channel,
  options: { readonly deadline?: Date; readonly signal?: AbortSignal } = {},
): Promise<ProbeResponse> {
  return channel.call(Identity.method.probe, {}, { signal: patient(), ...options });
}

/** The time in `ms` milliseconds. */
export const soon = (ms: number) => new Date(Date.now() + ms);

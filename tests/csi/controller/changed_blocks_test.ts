import { deepStrictEqual, ok, rejects, strictEqual } from "node:assert/strict";
import { join } from "node:path";
import { snapshotMetadataHandlers } from "../../../lib/csi/controller/changed_blocks.ts";
import { Channel } from "../../../lib/grpc/client.ts";
import { serve, service } from "../../../lib/grpc/server.ts";
import { createLogger } from "../../../lib/log.ts";
import { BlockMetadataType, type GetMetadataAllocatedResponse, SnapshotMetadata } from "../../../proto/gen/csi_pb.ts";
import { openLightos } from "../../support/backends.ts";
import { answers } from "../../support/controller_service.ts";
import { needs } from "../../support/needs.ts";
import { eventually, startSimulator } from "../../support/simulator.ts";

const ignore = !needs("root", "loop");
const mib = 1 << 20;
const host = "nqn.2019-09.com.lightbitslabs:host:n1.node";

/** The service behind a real socket, and one volume of 64 MiB on a loop device to write to. */
async function start() {
  await using stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator({ data: "loop" }));
  const { cluster } = simulator.control;
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-metadata-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const log = createLogger("error", "json", () => {});
  const backend = stack.use(openLightos(simulator, { log }));
  ok(backend.changedBlocks);
  const server = await serve({
    listen: { path: `${directory}/csi.sock` },
    services: [service(SnapshotMetadata, snapshotMetadataHandlers(backend.changedBlocks))],
    log,
  });
  stack.defer(() => server.stop(5000));
  const channel = stack.use(new Channel({ address: `unix://${directory}/csi.sock` }));

  const volume = await cluster.createVolume({
    project: "default",
    name: "v1",
    size: `${64 * mib}b`,
    replicaCount: 1,
    compression: "",
    acl: [host],
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
  });
  const discovery = simulator.addresses.discoveryDir ?? "";
  const line = `-t tcp -a 127.0.0.1 -s 8009 -q ${host} -n ${simulator.addresses.subsystemNqn}\n`;
  await Deno.writeTextFile(join(discovery, "tmp.dc.x"), line);
  await Deno.rename(join(discovery, "tmp.dc.x"), join(discovery, volume.uuid));
  const device = await eventually("the device appears", () => simulator.control.machine().devices[0]?.path);
  await simulator.control.waitUntilSettled();
  const idOf = (uuid: string) => `mgmt:${simulator.addresses.grpc.join(",")}|nguid:${uuid}|proj:default|scheme:grpc`;
  const parts = stack.move();
  return {
    simulator,
    channel,
    idOf,
    async write(offsetBytes: number, bytes: Uint8Array) {
      using file = await Deno.open(device, { read: true, write: true });
      await file.seek(offsetBytes, Deno.SeekMode.Start);
      for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
      await file.syncData();
    },
    content: () => Deno.readFile(device),
    async snapshot(name: string): Promise<string> {
      const source = { uuid: volume.uuid, name: "" };
      const request = { project: "default", name, description: "", source, retentionMs: undefined };
      const snapshot = await cluster.createSnapshot(request);
      await eventually(`snapshot ${name} is Available`, () => snapshot.state === "Available");
      return idOf(snapshot.uuid);
    },
    async allocated(snapshotId: string, more: { startingOffset?: bigint; maxResults?: number } = {}) {
      const messages = channel.stream(SnapshotMetadata.method.getMetadataAllocated, { snapshotId, ...more }, {
        signal: AbortSignal.timeout(20_000),
      });
      return await Array.fromAsync(messages);
    },
    async delta(
      baseSnapshotId: string,
      targetSnapshotId: string,
      more: { startingOffset?: bigint; maxResults?: number } = {},
    ) {
      const request = { baseSnapshotId, targetSnapshotId, ...more };
      const messages = channel.stream(SnapshotMetadata.method.getMetadataDelta, request, {
        signal: AbortSignal.timeout(20_000),
      });
      return await Array.fromAsync(messages);
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

type Messages = readonly Omit<GetMetadataAllocatedResponse, "$typeName">[];

function tuples(messages: Messages) {
  return messages.flatMap(({ blockMetadata }) => blockMetadata);
}

/** Every message says the same of the volume; the tuples ascend and never overlap, also across messages. */
function assertWellFormed(messages: Messages): void {
  let end = 0n;
  ok(messages.length > 0);
  for (const message of messages) {
    strictEqual(message.blockMetadataType, BlockMetadataType.VARIABLE_LENGTH);
    strictEqual(message.volumeCapacityBytes, BigInt(64 * mib));
    for (const { byteOffset, sizeBytes } of message.blockMetadata) {
      ok(sizeBytes > 0n && byteOffset >= end, `${byteOffset} follows ${end}`);
      end = byteOffset + sizeBytes;
    }
  }
  ok(end <= BigInt(64 * mib));
}

const noise = (bytes: number) => {
  const out = new Uint8Array(bytes);
  for (let at = 0; at < bytes; at += 65_536) crypto.getRandomValues(out.subarray(at, Math.min(at + 65_536, bytes)));
  return out;
};

Deno.test({
  name: "GetMetadataAllocated and GetMetadataDelta let a volume be rebuilt byte for byte from base and changes",
  ignore,
  fn: async () => {
    await using env = await start();
    await env.write(0, noise(300_000));
    await env.write(20 * mib + 123, noise(2 * mib));
    const base = await env.snapshot("base");
    const baseContent = await env.content();
    await env.write(100_000, noise(5000));
    await env.write(40 * mib, noise(1 * mib));
    await env.write(64 * mib - 4096, noise(4096));
    const target = await env.snapshot("target");
    const targetContent = await env.content();

    const allocated = await env.allocated(base);
    const delta = await env.delta(base, target, { maxResults: 2 });

    assertWellFormed(allocated);
    assertWellFormed(delta);
    const rebuilt = new Uint8Array(64 * mib);
    for (const [content, list] of [[baseContent, tuples(allocated)], [targetContent, tuples(delta)]] as const) {
      for (const { byteOffset, sizeBytes } of list) {
        const [from, to] = [Number(byteOffset), Number(byteOffset + sizeBytes)];
        rebuilt.set(content.subarray(from, to), from);
      }
    }
    strictEqual(Buffer.compare(rebuilt, targetContent), 0);
    const changedBytes = tuples(delta).reduce((sum, { sizeBytes }) => sum + sizeBytes, 0n);
    ok(changedBytes < BigInt(4 * mib), `${changedBytes} bytes are named for 1 MiB of changes`);
    ok(delta.every(({ blockMetadata }) => blockMetadata.length <= 2));
    ok(delta.length >= 2);
  },
});

Deno.test({
  name: "GetMetadataAllocated continues after starting_offset, and begins with the tuple that contains it",
  ignore,
  fn: async () => {
    await using env = await start();
    await env.write(1 * mib, noise(mib));
    await env.write(30 * mib, noise(mib));
    const snapshot = await env.snapshot("s");
    const all = tuples(await env.allocated(snapshot));

    const middle = BigInt(mib + mib / 2);
    const rest = tuples(await env.allocated(snapshot, { startingOffset: middle }));
    const end = await env.allocated(snapshot, { startingOffset: BigInt(64 * mib) });

    strictEqual(all.length, 2);
    const first = rest[0];
    ok(first && first.byteOffset + first.sizeBytes > middle);
    deepStrictEqual(rest.at(-1), all.at(-1));
    deepStrictEqual(tuples(end), []);
    strictEqual(end[0]?.volumeCapacityBytes, BigInt(64 * mib));
  },
});

Deno.test({
  name: "GetMetadataDelta of a snapshot with itself names no block and still the size",
  ignore,
  fn: async () => {
    await using env = await start();
    await env.write(0, noise(4096));
    const snapshot = await env.snapshot("s");

    const messages = await env.delta(snapshot, snapshot);

    deepStrictEqual(tuples(messages), []);
    assertWellFormed(messages);
  },
});

Deno.test({
  name: "the SnapshotMetadata service rejects missing fields, unknown snapshots and offsets beyond the end",
  ignore,
  fn: async () => {
    await using env = await start();
    const snapshot = await env.snapshot("s");
    const absent = env.idOf(crypto.randomUUID());

    await rejects(env.allocated(""), answers("INVALID_ARGUMENT", /snapshot_id is missing/));
    await rejects(env.delta("", snapshot), answers("INVALID_ARGUMENT", /base_snapshot_id is missing/));
    await rejects(env.delta(snapshot, ""), answers("INVALID_ARGUMENT", /target_snapshot_id is missing/));
    await rejects(
      env.allocated(snapshot, { maxResults: -1 }),
      answers("INVALID_ARGUMENT", /max_results -1 is negative/),
    );
    await rejects(env.allocated("reallyfakesnapshotid"), answers("NOT_FOUND", /Cannot find snapshot/));
    await rejects(env.allocated(absent), answers("NOT_FOUND", /^Cannot list the blocks of snapshot /));
    await rejects(env.delta(absent, snapshot), answers("NOT_FOUND", /^Cannot list the blocks that differ/));
    for (const startingOffset of [-1n, BigInt(64 * mib + 1)]) {
      await rejects(env.allocated(snapshot, { startingOffset }), answers("OUT_OF_RANGE", /starting_offset/));
    }
  },
});

Deno.test({
  name: "GetMetadataAllocated of a cluster that is too busy to be read answers UNAVAILABLE, and later the blocks",
  ignore,
  fn: async () => {
    await using env = await start();
    const snapshot = await env.snapshot("s");
    const { control } = env.simulator;
    control.fail({ rpc: "ListChangedBlocks", count: 0, code: "RESOURCE_EXHAUSTED", message: "too many requests" });

    await rejects(
      env.allocated(snapshot),
      answers("UNAVAILABLE", /ListChangedBlocks with RESOURCE_EXHAUSTED: too many requests; repeat the call$/),
    );
    control.clearFaults();
    assertWellFormed(await env.allocated(snapshot));
  },
});

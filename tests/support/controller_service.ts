import { match, ok, strictEqual } from "node:assert/strict";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { createLogger, type Logger } from "../../lib/context.ts";
import { controllerHandlers, nodeServiceOfController } from "../../lib/csi/controller/service.ts";
import { describeRequest, redactRequest } from "../../lib/csi/request.ts";
import type { StatusCode } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { KeyedLock } from "../../lib/lock.ts";
import type { StorageBackend } from "../../lib/storage/backend.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import type { LightosOptions } from "../../lib/storage/lightos/cluster.ts";
import { knownClusters } from "../../lib/storage/lightos/cluster_file.ts";
import { Controller, Node } from "../../proto/gen/csi_pb.ts";

/** What the controller of a test is told. */
export interface ControllerSettings {
  /** The text of a cluster file, and of the files that it names by path. */
  readonly clusterFile?: string;
  readonly files?: Readonly<Record<string, string>>;
  readonly globalJwt?: () => string | undefined;
  readonly volumeHealth?: boolean;
  /** Another storage system than LightOS. */
  readonly backend?: (log: Logger) => StorageBackend;
}

/** The Controller service on a socket of its own. Dispose it to end it and remove what it made. */
export async function startController(
  { clusterFile, files = {}, globalJwt = () => undefined, volumeHealth = false, backend: open }: ControllerSettings,
) {
  await using stack = new AsyncDisposableStack();
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-controller-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  const texts: Record<string, string | undefined> = { ...files, "/clusters.yaml": clusterFile };
  const options: LightosOptions = {
    log,
    globalJwt,
    globalJwtPath: "/etc/lb-csi/jwt",
    globalJwtFor: "any endpoint",
    ca: undefined,
    verifyTls: true,
    userAgent: "lbcsi/test",
    clusters: clusterFile === undefined ? undefined : knownClusters("/clusters.yaml", {
      stamp: () => "unchanged",
      read(path) {
        const text = texts[path];
        if (text === undefined) throw new Error(`ENOENT: ${path}`);
        return text;
      },
    }, log),
  };
  const backend = stack.use(open === undefined ? lightosBackend(options) : open(log));
  const path = `${directory}/csi.sock`;
  const handlers = controllerHandlers({
    backend,
    locks: new KeyedLock(),
    defaultFsType: "ext4",
    nodeIdSuffix: ".node",
    volumeHealth,
  });
  const server = await serve({
    listen: { path },
    services: [service(Controller, handlers), service(Node, nodeServiceOfController)],
    log,
    describe: describeRequest,
    redact: redactRequest,
  });
  stack.defer(() => server.stop(5000));
  const channel = stack.use(new Channel({ address: `unix://${path}` }));
  const parts = stack.move();
  return {
    lines,
    call: <I extends DescMessage, O extends DescMessage>(
      method: DescMethodUnary<I, O>,
      request: MessageInitShape<I>,
    ): Promise<MessageShape<O>> =>
      channel.call(method, request, { signal: AbortSignal.timeout(20_000), deadline: new Date(Date.now() + 15_000) }),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** For `rejects`: the call was answered with this code and a message that matches. */
export function answers(code: StatusCode, ...messages: readonly RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof CallError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

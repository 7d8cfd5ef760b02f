/** The controller service on a socket, alone or in front of a simulated cluster, for tests. */
import { match, ok, strictEqual } from "node:assert/strict";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { controllerHandlers, nodeServiceOfController } from "../../lib/csi/controller/service.ts";
import { identityHandlers } from "../../lib/csi/identity.ts";
import { describeRequest, redactRequest } from "../../lib/csi/request.ts";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import { CallError, Channel } from "../../lib/grpc/client.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { createLogger, type Logger } from "../../lib/log.ts";
import type { StorageBackend } from "../../lib/storage/backend.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import type { LightosOptions } from "../../lib/storage/lightos/cluster.ts";
import { knownClusters } from "../../lib/storage/lightos/cluster_file.ts";
import {
  Controller,
  type CreateVolumeRequestSchema,
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../proto/gen/csi_pb.ts";
import { gib, lightosOptions } from "./backends.ts";
import { type Capability, mountCapability } from "./node_calls.ts";
import { startSimulator, type TestSimulator } from "./simulator.ts";

/** How the controller of a test is set up. */
export interface ControllerSettings {
  /** The text of a cluster file, and of the files that it names by path. */
  readonly clusterFile?: string;
  readonly files?: Readonly<Record<string, string>>;
  readonly globalJwt?: () => string | undefined;
  readonly volumeHealth?: boolean;
  /** Another storage system than LightOS. */
  readonly backend?: (log: Logger) => StorageBackend;
}

/**
 * The Controller service on a socket of its own, with the Identity service. Dispose it to end it and remove its files.
 */
export async function startController(
  { clusterFile, files = {}, globalJwt = () => undefined, volumeHealth = false, backend: open }: ControllerSettings,
) {
  await using stack = new AsyncDisposableStack();
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-controller-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  const contents: Record<string, string | undefined> = { ...files, "/clusters.yaml": clusterFile };
  const options: LightosOptions = {
    ...lightosOptions,
    log,
    globalJwt,
    clusters: clusterFile === undefined ? undefined : knownClusters("/clusters.yaml", {
      stamp: () => "unchanged",
      read(path) {
        const text = contents[path];
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
    services: [
      service(Identity, identityHandlers(identity)),
      service(Controller, handlers),
      service(Node, nodeServiceOfController),
    ],
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
      timeoutMs = 15_000,
    ): Promise<MessageShape<O>> =>
      channel.call(method, request, {
        signal: AbortSignal.timeout(timeoutMs + 5000),
        deadline: new Date(Date.now() + timeoutMs),
      }),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

export type Creation = Extract<MessageInitShape<typeof CreateVolumeRequestSchema>, { readonly $typeName?: never }>;

/** A file system for one node. */
export const writer: Capability = mountCapability("", Mode.SINGLE_NODE_WRITER);

/**
 * A CreateVolume request for a volume of 1 GiB on a simulated cluster, with changes of the request and of its
 * parameters.
 */
export function volumeCreation(
  { addresses }: TestSimulator,
  changes: Creation = {},
  parameters: Readonly<Record<string, string>> = {},
): Creation {
  return {
    name: "pvc-1",
    capacityRange: { requiredBytes: gib },
    volumeCapabilities: [writer],
    parameters: {
      "mgmt-endpoint": addresses.grpc.join(","),
      "mgmt-scheme": "grpc",
      "replica-count": "1",
      "project-name": "default",
      ...parameters,
    },
    secrets: { jwt: addresses.jwt },
    ...changes,
  };
}

/** An entry of a cluster file for a simulated cluster, as YAML flow. */
export function clusterFileEntry(name: string, { addresses }: TestSimulator, more: string): string {
  return `{name: ${name}, endpoints: "${addresses.grpc.join(",")}", scheme: grpc, ${more}}`;
}

export interface ControlledClusterSettings {
  readonly simulator?: Parameters<typeof startSimulator>[0];
  /** Absent: the controller knows no cluster and has no token; its calls bring both. */
  readonly controller?: (simulator: TestSimulator) => ControllerSettings;
}

/** A controller in front of a simulated cluster, and the usual requests. Dispose it, with `await using`. */
export async function startControlledCluster(
  { simulator: overrides = {}, controller: settings = () => ({}) }: ControlledClusterSettings = {},
) {
  await using stack = new AsyncDisposableStack();
  const simulator = stack.use(await startSimulator(overrides));
  const { call, lines } = stack.use(await startController(settings(simulator)));
  const secrets = { jwt: simulator.addresses.jwt };
  const parts = stack.move();
  const createVolume = async (changes: Creation = {}, parameters: Readonly<Record<string, string>> = {}) => {
    const { volume } = await call(Controller.method.createVolume, volumeCreation(simulator, changes, parameters));
    ok(volume);
    return volume;
  };
  return {
    simulator,
    lines,
    secrets,
    call,
    createVolume,
    /** The ID of a new volume. */
    create: async (name: string): Promise<string> => (await createVolume({ name })).volumeId,
    creation: (changes: Creation = {}, parameters: Readonly<Record<string, string>> = {}) =>
      volumeCreation(simulator, changes, parameters),
    async createSnapshot(name: string, sourceVolumeId: string) {
      const { snapshot } = await call(Controller.method.createSnapshot, { name, sourceVolumeId, secrets });
      ok(snapshot);
      return snapshot;
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

export type ControlledCluster = Awaited<ReturnType<typeof startControlledCluster>>;

/** What the Identity service of `startController` reports. */
export const identity = {
  name: "csi.lightbitslabs.com",
  version: "1.2.3",
  expansion: true,
  snapshotMetadata: false,
} as const;

/** For `rejects`: the call failed with this code and a message that matches. */
export function answers(code: StatusCode, ...messages: readonly RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof CallError || error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

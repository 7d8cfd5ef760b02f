/** What tests of storage backends share: the context of a call, its errors, and backends at simulators. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { type RequestContext, requestContext } from "../../lib/context.ts";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import { createLogger, type Logger } from "../../lib/log.ts";
import { Metrics } from "../../lib/metrics.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { Secrets } from "../../lib/secrets.ts";
import type { VolumeRequest } from "../../lib/storage/backend.ts";
import type { ConfigFiles } from "../../lib/storage/cluster_file.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import type { LightosOptions } from "../../lib/storage/lightos/cluster.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { knownSystems } from "../../lib/storage/poseidon/cluster_file.ts";
import { poseidonParameters, startPoseidon } from "./poseidon.ts";
import { startSimulator, type TestSimulator } from "./simulator.ts";

export const mib = 1n << 20n;
export const gib = 1n << 30n;

export const hostA = hostNqn("a.node");
export const hostB = hostNqn("b.node");

/** A logger that writes nothing. */
export const quiet = createLogger("error", "json", () => {});

/** The secrets of a call that brings none. */
export const none = new Secrets();

/** The context of a call whose caller waits for `ms`. */
export function within(ms: number): RequestContext {
  const aborted = new AbortController();
  const timer = setTimeout(() => aborted.abort(new StatusError("DEADLINE_EXCEEDED", "too slow")), ms);
  Deno.unrefTimer(timer);
  return requestContext(aborted.signal, new Date(Date.now() + ms), quiet);
}

/** For `rejects` and `throws`: a StatusError with this code, whose message matches each pattern. */
export function failsWith(code: StatusCode, ...messages: readonly RegExp[]) {
  return (error: unknown) => {
    ok(error instanceof StatusError, String(error));
    strictEqual(error.code, code, error.message);
    for (const message of messages) match(error.message, message);
    return true;
  };
}

/** The options of a LightOS backend in tests: no token, no certificates, no output. */
export const lightosOptions: LightosOptions = {
  log: quiet,
  globalJwt: () => undefined,
  globalJwtPath: "/etc/lb-csi/jwt",
  globalJwtFor: "any endpoint",
  ca: undefined,
  verifyTls: true,
  userAgent: "lbcsi/test",
};

/** A LightOS backend with the token of a simulator. */
export function openLightos(simulator: Pick<TestSimulator, "addresses">, changes: Partial<LightosOptions> = {}) {
  return lightosBackend({ ...lightosOptions, globalJwt: () => simulator.addresses.jwt, ...changes });
}

/** A logger whose lines are collected. */
export function collectingLogger(lines: string[]): Logger {
  return createLogger("debug", "json", (line) => lines.push(line));
}

/** A request for a volume of 1 GiB on LightOS, in clear text. */
export function lightosRequest(
  endpoints: readonly string[],
  changes: Partial<VolumeRequest> = {},
  parameters: Readonly<Record<string, string>> = {},
): VolumeRequest {
  return {
    name: "pvc-1",
    requiredBytes: gib,
    limitBytes: 0n,
    ...changes,
    parameters: {
      "mgmt-endpoint": endpoints.join(","),
      "mgmt-scheme": "grpc",
      "replica-count": "1",
      "project-name": "default",
      ...parameters,
    },
  };
}

/** A LightOS backend at a simulator. */
export async function startLightos(
  overrides: Parameters<typeof startSimulator>[0] = {},
  options: Partial<LightosOptions> = {},
) {
  const simulator = await startSimulator(overrides);
  const lines: string[] = [];
  const backend = openLightos(simulator, { log: collectingLogger(lines), ...options });
  return {
    simulator,
    backend,
    lines,
    request: (changes: Partial<VolumeRequest> = {}, parameters: Record<string, string> = {}): VolumeRequest =>
      lightosRequest(simulator.addresses.grpc, changes, parameters),
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await simulator[Symbol.asyncDispose]();
    },
  };
}

/**
 * A cluster of some servers, and a LightOS backend that has connected to none of them.
 *
 * @param more further endpoints of the cluster, before those of the simulator
 */
export async function startCluster(
  servers: number,
  more: readonly string[] = [],
  overrides: Parameters<typeof startSimulator>[0] = {},
) {
  const simulator = await startSimulator({ servers, ...overrides });
  const parts = new AsyncDisposableStack();
  parts.use(simulator);
  const metrics = new Metrics();
  const lines: string[] = [];
  const open = (endpoints: readonly string[]) => {
    const backend = parts.use(openLightos(simulator, { log: collectingLogger(lines), metrics }));
    const request = (name: string, changes: Partial<VolumeRequest> = {}) =>
      lightosRequest(endpoints, { name, ...changes });
    return { backend, request };
  };
  const endpoints = [...simulator.addresses.grpc].sort();
  return {
    simulator,
    metrics,
    lines,
    endpoints,
    open,
    ...open([...more, ...endpoints]),
    volumes: () => simulator.control.cluster.listVolumes({ project: "default", showAll: true }).map(({ uuid }) => uuid),
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** An address that sorts before all others, so that it is asked first. */
export function asFirst(address: string): string {
  return address.replace("127.0.0.1", "0.0.0.0");
}

/** Files in memory, each with a stamp that changes when it is written. */
export function memoryFiles(initial: Record<string, string>) {
  const files = new Map(Object.entries(initial).map(([path, text]) => [path, { text, version: 0 }]));
  const find = (path: string) => {
    const file = files.get(path);
    if (file === undefined) throw new Error(`ENOENT: ${path}`);
    return file;
  };
  const reads: string[] = [];
  return {
    reads,
    write: (path: string, text: string) => files.set(path, { text, version: (files.get(path)?.version ?? 0) + 1 }),
    remove: (path: string) => files.delete(path),
    stamp: (path: string) => String(find(path).version),
    read: (path: string) => {
      reads.push(path);
      return find(path).text;
    },
  } satisfies ConfigFiles & Record<string, unknown>;
}

/** A PoseidonOS backend at a simulator; at its end no request may have done harm. */
export async function startPoseidonBackend(overrides: Parameters<typeof startPoseidon>[0] = {}, withFile = false) {
  const sim = await startPoseidon(overrides);
  const file = `systems: [{ name: rack1, endpoint: "${sim.addresses.dagent}", arrays: [${sim.addresses.arrays}] }]`;
  const files = { stamp: () => "unchanged", read: () => file };
  const backend = poseidonBackend({
    log: quiet,
    systems: withFile ? knownSystems("/clusters.yaml", files, quiet) : undefined,
  });
  const { model } = sim.control;
  const self = {
    sim,
    backend,
    model,
    request: (changes: Partial<VolumeRequest> = {}, parameters: Record<string, string> = {}): VolumeRequest => ({
      name: "pvc-1",
      requiredBytes: gib,
      limitBytes: 0n,
      ...changes,
      parameters: { ...poseidonParameters(sim), ...parameters },
    }),
    create: (name = "pvc-1", parameters: Record<string, string> = {}) =>
      backend.createVolume(within(10_000), none, self.request({ name }, parameters)),
    grant: (id: string, host = hostA, ctx = within(10_000)) =>
      backend.grantAccess(ctx, none, id, { hostNqn: host, shared: false, volumeContext: poseidonParameters(sim) }),
    revoke: (id: string, host: string | undefined = hostA, ctx = within(10_000)) =>
      backend.revokeAccess(ctx, none, id, host),
    remove: (id: string, ctx = within(10_000)) => backend.deleteVolume(ctx, none, id),
    get: (id: string) => backend.getVolume(within(10_000), none, id),
    /** Volumes of the first array, whatever it shows. */
    volumes: () => model.arrays[0]?.volumes ?? [],
    calls: (rpc: string) => sim.control.calls()[rpc]?.total ?? 0,
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await sim[Symbol.asyncDispose]();
      deepStrictEqual(sim.control.api.harmful, []);
    },
  };
  return self;
}

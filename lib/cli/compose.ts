/**
 * Builds backends and attachers from settings: the only place where the concrete parts of the driver meet. Each part is
 * loaded when it is needed.
 */
import type { Attacher } from "../host/attach/attacher.ts";
import type { Host } from "../host/host.ts";
import type { ConnectionTuning } from "../host/nvme/connect_options.ts";
import type { KeyedLock } from "../lock.ts";
import type { Logger } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { hostNqn } from "../namespace.ts";
import type { StorageBackend } from "../storage/backend.ts";
import type { LightosOptions } from "../storage/lightos/cluster.ts";
import type { BackendName } from "./backends.ts";
import { readMachineCa } from "./machine_ca.ts";
import { clusterFiles, readFileIfPresent, readRequiredCertificates, withUsageErrors } from "./option_files.ts";
import { type connectionOptions, type hostOptions, tokenOption, type trustOptions } from "./option_groups.ts";
import { type Settings, UsageError } from "./options.ts";
import { version } from "./version.ts";

/** Settings of any command that opens a backend. */
export type BackendSettings = LightosSettings & PoseidonSettings & { readonly backend: BackendName };

const openers: Readonly<
  Record<BackendName, (settings: BackendSettings, log: Logger, metrics?: Metrics) => Promise<StorageBackend>>
> = { lightos: openLightos, poseidon: openPoseidon };

/** The backend that `--backend` names. Throws UsageError for settings and files that it cannot use. */
export async function openBackend(
  settings: BackendSettings,
  log: Logger,
  metrics?: Metrics,
): Promise<StorageBackend> {
  return await openers[settings.backend](settings, log, metrics);
}

/** Opens what a node asks its cluster for: inline volumes and the keys of connections. Undefined: it has neither. */
export const nodeOpeners = { lightos: openLightos, poseidon: undefined } as const satisfies Readonly<
  Record<BackendName, typeof openLightos | undefined>
>;

const optionChecks: Readonly<Record<BackendName, (settings: PoseidonSettings) => void>> = {
  lightos: () => {},
  poseidon: assertPoseidonOptions,
};

/** Throws UsageError for options that have no effect with the storage system. */
export function assertBackendOptions(backend: BackendName, settings: PoseidonSettings): void {
  optionChecks[backend](settings);
}

/** Settings that a LightOS backend is built from. */
export type LightosSettings = Settings<typeof trustOptions> & {
  readonly config?: string | undefined;
  /** Undefined: tokens come from calls and from the cluster file only. */
  readonly "jwt-path"?: string;
  /** Undefined for commands whose user gives the token, and names the endpoint or the volume. */
  readonly "jwt-for-any-endpoint"?: boolean;
};

/** The LightOS backend. Throws UsageError when a file that the settings name cannot be used. */
export async function openLightos(settings: LightosSettings, log: Logger, metrics?: Metrics) {
  const { lightosBackend } = await import("../storage/lightos/backend.ts");
  if (!settings["mgmt-tls-verify"]) log.warning("does not verify the certificates of management endpoints");
  return lightosBackend({ ...await lightosOptions(settings, log), metrics });
}

/** What LightOS clusters are called with. Throws UsageError when a file that the settings name cannot be used. */
export async function lightosOptions(settings: LightosSettings, log: Logger): Promise<LightosOptions> {
  const { config, "jwt-path": jwtPath, "mgmt-ca": ca } = settings;
  return {
    log,
    globalJwt: () => jwtPath === undefined ? undefined : readFileIfPresent(jwtPath),
    globalJwtPath: jwtPath ?? "file of a token",
    globalJwtFor: settings["jwt-for-any-endpoint"] ?? true
      ? "any endpoint"
      : ca === undefined
      ? "cluster file"
      : "own CA",
    ca: ca === undefined ? readMachineCa(log) : readRequiredCertificates("--mgmt-ca", ca),
    verifyTls: settings["mgmt-tls-verify"],
    userAgent: `lbcsi/${version}`,
    clusters: config === undefined ? undefined : await readLightosClusters(config, log),
  };
}

async function readLightosClusters(path: string, log: Logger) {
  const { knownClusters } = await import("../storage/lightos/cluster_file.ts");
  return withUsageErrors(() => knownClusters(path, clusterFiles, log));
}

/** Settings of any command, as far as they can contradict `--backend poseidon`. */
export interface PoseidonSettings {
  readonly config?: string | undefined;
  readonly attach?: Settings<typeof hostOptions>["attach"];
  readonly "node-id"?: string | undefined;
  readonly "snapshot-metadata"?: boolean;
  readonly "mgmt-ca"?: string | undefined;
  readonly "mgmt-tls-verify"?: boolean;
  readonly "jwt-path"?: string;
  readonly "jwt-for-any-endpoint"?: boolean;
}

/** Throws UsageError for options that have no effect with PoseidonOS. */
export function assertPoseidonOptions(settings: PoseidonSettings): void {
  const defaultJwtPath = tokenOption["jwt-path"].fallback;
  const http = "its management API is plain HTTP";
  const problems = ([
    [settings["snapshot-metadata"], "--snapshot-metadata", "it has no snapshots"],
    [settings["mgmt-ca"] !== undefined, "--mgmt-ca", http],
    [settings["mgmt-tls-verify"] === false, "--mgmt-tls-verify", http],
    [(settings["jwt-path"] ?? defaultJwtPath) !== defaultJwtPath, "--jwt-path", "it takes no tokens"],
    [settings["jwt-for-any-endpoint"], "--jwt-for-any-endpoint", "it takes no tokens"],
    [
      settings["node-id"] !== undefined && settings.config !== undefined,
      "--config of a node",
      "it has no inline volumes",
    ],
    [settings.attach === "discovery-client", "--attach discovery-client", "that daemon is for LightOS"],
  ] as const).flatMap(([isGiven, option, reason]) =>
    isGiven ? [`${option} cannot be used with PoseidonOS: ${reason}`] : []
  );
  if (problems.length > 0) throw new UsageError(problems.join("\n"));
}

/** The PoseidonOS backend. Throws UsageError for options that have no effect, and for a bad cluster file. */
export async function openPoseidon(settings: PoseidonSettings, log: Logger, metrics?: Metrics) {
  assertPoseidonOptions(settings);
  removeProxyVariables();
  const systems = await readPoseidonSystems(settings.config, log);
  const { poseidonBackend } = await import("../storage/poseidon/backend.ts");
  return poseidonBackend({ log, systems, metrics });
}

/** The systems of a cluster file for PoseidonOS; undefined without one. Throws UsageError when it cannot be used. */
export async function readPoseidonSystems(config: string | undefined, log: Logger) {
  if (config === undefined) return undefined;
  const { knownSystems } = await import("../storage/poseidon/cluster_file.ts");
  return withUsageErrors(() => knownSystems(config, clusterFiles, log));
}

/**
 * Makes `fetch` connect to DAgent directly. With these variables it would send every call, and so every request for a
 * volume, to a proxy; this process fetches nothing else.
 */
export function removeProxyVariables(): void {
  for (const name of ["http_proxy", "all_proxy"]) {
    for (const variable of [name, name.toUpperCase()]) Deno.env.delete(variable);
  }
}

/** Settings that an attacher is built from. */
export type AttacherSettings = Pick<Settings<typeof hostOptions>, "attach" | "discovery-dir" | "node-id">;

/** What the attacher needs besides the settings. */
export interface AttacherParts {
  readonly host: Host;
  readonly locks: KeyedLock;
  readonly tuning: ConnectionTuning;
}

/** How this machine connects to subsystems: by itself, or through a discovery client. */
export async function createAttacher(settings: AttacherSettings, parts: AttacherParts): Promise<Attacher> {
  const { host, locks, tuning } = parts;
  const { hostIdOf } = await import("../host/attach/attacher.ts");
  const { createDirectAttacher } = await import("../host/attach/direct.ts");
  const { createDiscoveryClientAttacher } = await import("../host/attach/discovery_client.ts");
  const nodeId = settings["node-id"];
  return settings.attach === "direct"
    ? createDirectAttacher({ host, hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId), locks, tuning })
    : createDiscoveryClientAttacher({ host, hostNqn: hostNqn(nodeId), directory: settings["discovery-dir"] });
}

/** The settings of new connections, with `--attach=direct`. */
export function connectionTuning(settings: Settings<typeof connectionOptions>): ConnectionTuning {
  return {
    controllerLossSeconds: settings["ctrl-loss-tmo"],
    reconnectDelaySeconds: settings["reconnect-delay"],
    keepAliveSeconds: settings["keep-alive-tmo"],
    fastIoFailSeconds: settings["fast-io-fail-tmo"],
    ioQueues: settings["nr-io-queues"],
    queueSize: settings["queue-size"],
  };
}

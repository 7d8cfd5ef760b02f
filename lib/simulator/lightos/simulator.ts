/**
 * A simulated LightOS cluster as one object: management API, control port and data plane over one model.
 *
 * With a state directory it keeps everything: identity, ports, certificate, model and contents. A simulator that starts
 * there again is the same cluster and continues what was half done.
 */
import { join } from "node:path";
import { StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import type { Scheme } from "../../volume_id.ts";
import { type Control, createControl, serveControl } from "../control.ts";
import type { DataPlane } from "../data_plane/data_plane.ts";
import { openDataPlane } from "../data_plane/open.ts";
import { createFaults, type Faults } from "../faults.ts";
import { lockFile } from "../state_file.ts";
import { type Behaviour, defaultBehaviour } from "./behaviour.ts";
import { Cluster } from "./cluster.ts";
import { type IdentityRecord, readIdentity, writeIdentity } from "./identity.ts";
import { type ApiEndpoint, serveLightos } from "./service.ts";
import { createTokens, type Tokens } from "./token.ts";

/** Settings of a simulator; `defaultSimulateSettings` has a value for each. */
export interface LightosSimulatorSettings {
  /** Address that the management API listens on. */
  readonly host: string;
  /** Number of storage servers; each has one management endpoint per scheme. */
  readonly servers: number;
  readonly schemes: readonly Scheme[];
  /** Port of the first server for clear text, the next ones follow; 0 takes free ones. */
  readonly grpcPort: number;
  /** The same for TLS. */
  readonly grpcsPort: number;
  /** Port of the control port, which is always on 127.0.0.1; 0 takes a free one. */
  readonly controlPort: number;
  readonly clusterName: string;
  readonly projects: readonly string[];
  /** Space of the cluster in bytes; a volume takes its size times its replicas. */
  readonly capacityBytes: bigint;
  /** False admits calls without a token. */
  readonly authentication: boolean;
  /** Whether hosts must authenticate their connections (LightOS' in-band authentication). */
  readonly inBandAuth: boolean;
  readonly behaviour: Partial<Behaviour>;
  /**
   * `none`: management only. `loop`: volumes are files behind loop devices of this machine; needs root. `nvmet`: volumes
   * are namespaces of the kernel's NVMe/TCP target; needs root and its modules.
   */
  readonly data: DataPlane["kind"];
  /** Directory that keeps the cluster between runs; undefined: nothing is kept. */
  readonly stateDir: string | undefined;
  /** Directory that the simulated Discovery-Client watches; undefined: `discovery.d` beside the contents. */
  readonly discoveryDir: string | undefined;
  /** Where device nodes appear; undefined: `dev` beside the contents. */
  readonly devRoot: string | undefined;
  /** Where the sysfs-shaped tree appears; undefined: `sys` beside the contents. */
  readonly sysfsRoot: string | undefined;
}

/** Three servers on this machine without a data plane. */
export const defaultSimulateSettings: LightosSimulatorSettings = {
  host: "127.0.0.1",
  servers: 3,
  schemes: ["grpc", "grpcs"],
  grpcPort: 0,
  grpcsPort: 0,
  controlPort: 0,
  clusterName: "simulated",
  projects: ["default"],
  capacityBytes: 16n << 40n,
  authentication: true,
  inBandAuth: false,
  behaviour: {},
  data: "none",
  stateDir: undefined,
  discoveryDir: undefined,
  devRoot: undefined,
  sysfsRoot: undefined,
};

/** What a user of the simulator needs; printed as one line of JSON. */
export interface SimulatorAddresses {
  readonly clusterUuid: string;
  readonly subsystemNqn: string;
  /** Management endpoints, `host:port`, one per server; empty when the scheme is not served. */
  readonly grpc: readonly string[];
  readonly grpcs: readonly string[];
  /** Control port, `http://127.0.0.1:port`. */
  readonly control: string;
  /** PEM of the CA behind `grpcs`; absent when that is not served. */
  readonly ca: string | undefined;
  /** Token for the whole cluster. */
  readonly adminJwt: string;
  /** Token for the configured projects. */
  readonly jwt: string;
  readonly projects: readonly string[];
  readonly data: DataPlane["kind"];
  readonly stateDir: string | undefined;
  /** The next four are absent without a simulated machine (`data` is not `loop`). */
  readonly discoveryDir: string | undefined;
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
  /** Directory of the machine's `nvme`, which must come first on the PATH of a node that attaches directly. */
  readonly programs: string | undefined;
}

/** A running simulator. */
export interface Simulator {
  readonly addresses: SimulatorAddresses;
  /** The control port's functions, for callers in this process. */
  readonly control: Control;
  /** Ends everything, removes its devices, and deletes what is not in a state directory. */
  stop(): Promise<void>;
}

/**
 * Starts a simulator.
 *
 * @throws StatusError INVALID_ARGUMENT for impossible settings; FAILED_PRECONDITION when a port is taken, the state
 *   directory holds something else, or the machine lacks what the data plane needs
 */
export async function simulate(settings: LightosSimulatorSettings, log: Logger): Promise<Simulator> {
  if (!Number.isInteger(settings.servers) || settings.servers < 1 || settings.servers > 16) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot simulate ${settings.servers} servers: 1 to 16 are possible`);
  }
  if (settings.schemes.length === 0) throw new StatusError("INVALID_ARGUMENT", "Cannot simulate without a scheme");
  await using stack = new AsyncDisposableStack();
  const { stateDir } = settings;
  if (stateDir !== undefined) {
    await Deno.mkdir(stateDir, { recursive: true, mode: 0o700 });
    stack.use(await lockFile(join(stateDir, "lock"), stateDir));
  }
  const record = await readIdentity(stateDir, settings);
  const dataPlane = stack.use(await openDataPlane(settings, record.identity, stack, log));
  const cluster = stack.use(
    await Cluster.open({
      identity: record.identity,
      projects: settings.projects,
      capacityBytes: settings.capacityBytes,
      behaviour: { ...defaultBehaviour, ...settings.behaviour },
      dataPlane: dataPlane.plane,
      log,
      file: stateDir === undefined ? undefined : join(stateDir, "cluster.json"),
    }),
  );
  if (settings.inBandAuth && !cluster.inBandAuthentication) cluster.setInBandAuthentication(true);
  const tokens = createTokens(Buffer.from(record.key, "base64url"));
  const faults = createFaults();
  const endpoints: ApiEndpoint[] = [];
  stack.defer(async () => {
    await Promise.all(endpoints.map((endpoint) => endpoint[Symbol.asyncDispose]()));
  });
  await startEndpoints(endpoints, { settings, record, cluster, tokens, faults, log });
  const control = createControl(cluster, endpoints, faults, tokens);
  const port = stack.use(
    await serveControl(control, () => addresses, {
      host: "127.0.0.1",
      port: settings.controlPort > 0 ? settings.controlPort : record.controlPort ?? 0,
      log,
    }),
  );
  const addresses: SimulatorAddresses = {
    clusterUuid: cluster.identity.uuid,
    subsystemNqn: cluster.identity.subsystemNqn,
    grpc: addressesOf(endpoints, "grpc"),
    grpcs: addressesOf(endpoints, "grpcs"),
    control: port.url,
    ca: settings.schemes.includes("grpcs") ? record.certificate?.ca : undefined,
    adminJwt: tokens.issue({ scope: "cluster" }),
    jwt: tokens.issue({ scope: "projects", projects: settings.projects }),
    projects: settings.projects,
    data: settings.data,
    stateDir,
    discoveryDir: dataPlane.discoveryDir,
    devRoot: dataPlane.devRoot,
    sysfsRoot: dataPlane.sysfsRoot,
    programs: dataPlane.programs,
  };
  if (stateDir !== undefined) {
    const controlPort = Number(new URL(port.url).port);
    writeIdentity(stateDir, { ...record, ports: portsOf(endpoints), controlPort });
  }
  const parts = stack.move();
  let stopped: Promise<void> | undefined;
  return { addresses, control, stop: () => stopped ??= parts.disposeAsync() };
}

/** What the management endpoints of a simulator are made from. */
interface EndpointParts {
  readonly settings: LightosSimulatorSettings;
  readonly record: IdentityRecord;
  readonly cluster: Cluster;
  readonly tokens: Tokens;
  readonly faults: Faults;
  readonly log: Logger;
}

/** Starts one endpoint per scheme and server, and adds each to `endpoints` as soon as it runs. */
async function startEndpoints(
  endpoints: ApiEndpoint[],
  { settings, record, cluster, tokens, faults, log }: EndpointParts,
): Promise<void> {
  for (const scheme of settings.schemes) {
    const firstPort = scheme === "grpc" ? settings.grpcPort : settings.grpcsPort;
    for (let server = 0; server < settings.servers; server++) {
      endpoints.push(
        await serveLightos({
          cluster,
          faults,
          tokens,
          authentication: settings.authentication,
          host: settings.host,
          port: firstPort > 0 ? firstPort + server : record.ports[scheme]?.[server] ?? 0,
          scheme,
          server,
          tls: scheme === "grpcs" ? record.certificate : undefined,
          apiEndpoints: () => addressesOf(endpoints, scheme),
          log,
        }),
      );
    }
  }
}

function addressesOf(endpoints: readonly ApiEndpoint[], scheme: Scheme): string[] {
  return endpoints.filter((endpoint) => endpoint.scheme === scheme).map(({ address }) => address);
}

/** The ports of the endpoints by scheme, in the order of the servers. */
function portsOf(endpoints: readonly ApiEndpoint[]): Record<string, number[]> {
  return Object.fromEntries((["grpc", "grpcs"] as const).map((scheme) => [
    scheme,
    addressesOf(endpoints, scheme).map((address) => Number(address.slice(address.lastIndexOf(":") + 1))),
  ]));
}

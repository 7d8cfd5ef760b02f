/**
 * A simulated LightOS cluster as one object: management API, control port and data plane over one model.
 *
 * With a state directory it remembers everything: identity, ports, certificate, model and contents, so that one that is
 * started again there is the same cluster, with what was half done going on.
 */
import * as z from "zod";
import { join } from "node:path";
import type { Logger } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { Scheme } from "../../volume_id.ts";
import { type Behaviour, defaultBehaviour } from "./behaviour.ts";
import { Cluster } from "./cluster.ts";
import type { ClusterIdentity } from "./model.ts";
import { type Control, control, serveControl } from "../control.ts";
import { type DataPlane, noDataPlane } from "../data_plane/data_plane.ts";
import { faults } from "../faults.ts";
import { lockFile, readState, stateText, writeState } from "../state_file.ts";
import { type ApiEndpoint, serveLightos } from "./service.ts";
import { tokens } from "./token.ts";

/** How a simulator is to be; `defaultSimulateSettings` has a value for each. */
export interface SimulateSettings {
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
  /** Whether hosts have to authenticate their connections, as LightOS does once that was enabled. */
  readonly inBandAuth: boolean;
  readonly behaviour: Partial<Behaviour>;
  /**
   * `none`: management only. `loop`: volumes are files behind loop devices of this machine; needs root. `nvmet`: volumes
   * are namespaces of the kernel's NVMe/TCP target; needs root and its modules.
   */
  readonly data: DataPlane["kind"];
  /** Directory that remembers the cluster; undefined: nothing outlives the simulator. */
  readonly stateDir: string | undefined;
  /** Directory that the simulated Discovery-Client watches; undefined: `discovery.d` beside the contents. */
  readonly discoveryDir: string | undefined;
  /** Where device nodes appear; undefined: `dev` beside the contents. */
  readonly devRoot: string | undefined;
  /** Where the sysfs-shaped tree appears; undefined: `sys` beside the contents. */
  readonly sysfsRoot: string | undefined;
}

export const defaultSimulateSettings: SimulateSettings = {
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

/** All that somebody needs to use the simulator; printed as one line of JSON. */
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
  /** Directory of the machine's `nvme`, to be first on the PATH of a node that attaches directly. */
  readonly programs: string | undefined;
}

export interface Simulator {
  readonly addresses: SimulatorAddresses;
  /** The control port's functions, for callers in this process. */
  readonly control: Control;
  /** Ends everything, takes its devices away, and forgets what is not in a state directory. */
  stop(): Promise<void>;
}

/**
 * Starts a simulator.
 *
 * @throws StatusError INVALID_ARGUMENT for impossible settings; FAILED_PRECONDITION when a port is taken, the state
 *   directory holds something else, or the machine lacks what the data plane needs
 */
export async function simulate(settings: SimulateSettings, log: Logger): Promise<Simulator> {
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
  const remembered = await readIdentity(stateDir, settings);
  const dataPlane = stack.use(await openDataPlane(settings, remembered.identity, stack, log));
  const cluster = stack.use(
    await Cluster.open({
      identity: remembered.identity,
      projects: settings.projects,
      capacityBytes: settings.capacityBytes,
      behaviour: { ...defaultBehaviour, ...settings.behaviour },
      dataPlane: dataPlane.plane,
      log,
      file: stateDir === undefined ? undefined : join(stateDir, "cluster.json"),
    }),
  );
  if (settings.inBandAuth && !cluster.inBandAuthentication) cluster.setInBandAuthentication(true);
  const issuer = tokens(Buffer.from(remembered.key, "base64url"));
  const rules = faults();
  const certificate = settings.schemes.includes("grpcs") ? remembered.certificate : undefined;
  const endpoints: ApiEndpoint[] = [];
  stack.defer(async () => {
    await Promise.all(endpoints.map((endpoint) => endpoint[Symbol.asyncDispose]()));
  });
  const addressesOf = (scheme: Scheme) =>
    endpoints.filter((endpoint) => endpoint.scheme === scheme).map(({ address }) => address);
  for (const scheme of settings.schemes) {
    const firstPort = scheme === "grpc" ? settings.grpcPort : settings.grpcsPort;
    for (let server = 0; server < settings.servers; server++) {
      endpoints.push(
        await serveLightos({
          cluster,
          faults: rules,
          tokens: issuer,
          authentication: settings.authentication,
          host: settings.host,
          port: firstPort > 0 ? firstPort + server : remembered.ports[scheme]?.[server] ?? 0,
          scheme,
          server,
          tls: scheme === "grpcs" ? certificate : undefined,
          apiEndpoints: () => addressesOf(scheme),
          log,
        }),
      );
    }
  }
  const controls = control(cluster, endpoints, rules, issuer);
  const port = stack.use(
    await serveControl(controls, () => addresses, {
      host: "127.0.0.1",
      port: settings.controlPort > 0 ? settings.controlPort : remembered.controlPort ?? 0,
      log,
    }),
  );
  const addresses: SimulatorAddresses = {
    clusterUuid: cluster.identity.uuid,
    subsystemNqn: cluster.identity.subsystemNqn,
    grpc: addressesOf("grpc"),
    grpcs: addressesOf("grpcs"),
    control: port.url,
    ca: certificate?.ca,
    adminJwt: issuer.issue({ scope: "cluster" }),
    jwt: issuer.issue({ scope: "projects", projects: settings.projects }),
    projects: settings.projects,
    data: settings.data,
    stateDir,
    discoveryDir: dataPlane.discoveryDir,
    devRoot: dataPlane.devRoot,
    sysfsRoot: dataPlane.sysfsRoot,
    programs: dataPlane.programs,
  };
  if (stateDir !== undefined) {
    const ports = Object.fromEntries(
      (["grpc", "grpcs"] as const).map((scheme) => [
        scheme,
        addressesOf(scheme).map((address) => Number(address.slice(address.lastIndexOf(":") + 1))),
      ]),
    );
    writeIdentity(stateDir, { ...remembered, ports, controlPort: Number(new URL(port.url).port) });
  }
  const parts = stack.move();
  let stopped: Promise<void> | undefined;
  return { addresses, control: controls, stop: () => stopped ??= parts.disposeAsync() };
}

// ----------------------------------------------------------------------------------------------------------- identity

const identitySchema = z.object({
  format: z.literal(1),
  identity: z.object({
    uuid: z.string(),
    name: z.string(),
    subsystemNqn: z.string(),
    servers: z.array(z.object({
      uuid: z.string(),
      nodeUuid: z.string(),
      name: z.string(),
      nvmeEndpoint: z.string(),
      discoveryEndpoint: z.string(),
    })),
  }),
  /** Key of the tokens, base64url. */
  key: z.string(),
  certificate: z.object({ key: z.string(), cert: z.string(), ca: z.string(), host: z.string() }).optional(),
  ports: z.record(z.string(), z.array(z.number())),
  controlPort: z.number().optional(),
});
type Remembered = z.infer<typeof identitySchema>;

async function readIdentity(stateDir: string | undefined, settings: SimulateSettings): Promise<Remembered> {
  const found = stateDir === undefined
    ? undefined
    : await readState(join(stateDir, "identity.json"), identitySchema, "the simulator's identity");
  const remembered: Remembered = found ?? {
    format: 1,
    identity: newIdentity(settings.clusterName),
    key: Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("base64url"),
    ports: {},
  };
  const { servers } = remembered.identity;
  for (let number = servers.length; number < settings.servers; number++) servers.push(newServer(number, settings.host));
  servers.length = settings.servers;
  if (settings.schemes.includes("grpcs") && remembered.certificate?.host !== settings.host) {
    const { selfSigned } = await import("../certificate.ts");
    remembered.certificate = { ...await selfSigned([settings.host]), host: settings.host };
  }
  if (stateDir !== undefined) writeIdentity(stateDir, remembered);
  return remembered;
}

function writeIdentity(stateDir: string, remembered: Remembered): void {
  writeState(join(stateDir, "identity.json"), stateText(remembered));
}

function newIdentity(name: string): ClusterIdentity & { servers: [] } {
  const uuid = crypto.randomUUID();
  return { uuid, name, subsystemNqn: `nqn.2016-01.com.lightbitslabs:uuid:${uuid}`, servers: [] };
}

function newServer(number: number, host: string): Remembered["identity"]["servers"][number] {
  // Each server has its own address where that costs nothing: all of 127/8 is this machine.
  const loopback = host.startsWith("127.") || host === "localhost";
  const address = loopback ? `127.0.0.${number + 1}` : host.includes(":") ? `[${host}]` : host;
  const shift = loopback ? 0 : number;
  return {
    uuid: crypto.randomUUID(),
    nodeUuid: crypto.randomUUID(),
    name: `server${number}`,
    nvmeEndpoint: `${address}:${4420 + shift}`,
    discoveryEndpoint: `${address}:${8009 + shift}`,
  };
}

// --------------------------------------------------------------------------------------------------------- data plane

/** A data plane, and where the machine that it plays has its things. */
export interface OpenedPlane extends AsyncDisposable {
  readonly plane: DataPlane;
  readonly discoveryDir: string | undefined;
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
  /** Directory of the machine's `nvme`. */
  readonly programs: string | undefined;
}

/** Opens the data plane that `settings` ask for; what it needs besides goes with `stack`. */
export async function openDataPlane(
  settings:
    & Pick<SimulateSettings, "data" | "stateDir" | "discoveryDir" | "devRoot" | "sysfsRoot">
    & Partial<Pick<SimulateSettings, "inBandAuth">>,
  identity: ClusterIdentity,
  stack: AsyncDisposableStack,
  log: Logger,
): Promise<OpenedPlane> {
  if (settings.data === "none") return withoutMachine(noDataPlane());
  let home = settings.stateDir;
  if (home === undefined) {
    const temporary = home = await Deno.makeTempDir({ prefix: "lbcsi-simulate-" });
    stack.defer(() =>
      Deno.remove(temporary, { recursive: true }).catch((error) => {
        log.warning("could not remove the contents", { path: temporary, error: messageOf(error) });
      })
    );
  }
  const contentDir = join(home, "content");
  if (settings.data === "nvmet") {
    const { openNvmetPlane } = await import("../data_plane/nvmet.ts");
    return withoutMachine(
      await openNvmetPlane({ contentDir, identity, inBandAuth: settings.inBandAuth === true, log }),
    );
  }
  const { openLoopPlane } = await import("../data_plane/loop.ts");
  const discoveryDir = settings.discoveryDir ?? join(home, "discovery.d");
  const devRoot = settings.devRoot ?? join(home, "dev");
  const sysfsRoot = settings.sysfsRoot ?? join(home, "sys");
  const programs = join(home, "programs");
  const plane = await openLoopPlane({
    programs,
    contentDir,
    discoveryDir,
    devRoot,
    sysfsRoot,
    identity,
    log,
  });
  return {
    plane,
    discoveryDir,
    devRoot,
    sysfsRoot,
    programs,
    [Symbol.asyncDispose]: () => plane[Symbol.asyncDispose](),
  };
}

function withoutMachine(plane: DataPlane): OpenedPlane {
  return {
    plane,
    discoveryDir: undefined,
    devRoot: undefined,
    sysfsRoot: undefined,
    programs: undefined,
    [Symbol.asyncDispose]: () => plane[Symbol.asyncDispose](),
  };
}

/**
 * lbcsi: a CSI driver for NVMe/TCP storage. This file turns the command line into settings and is the only place where
 * concrete parts meet. Subcommands load what they need when they start, so a node plugin never pays for a simulator.
 */
import "./lib/goaway.ts";
import { readFileSync, statSync } from "node:fs";
import { z } from "zod";
import config from "./deno.json" with { type: "json" };
import { createLogger, type Logger, logLevels } from "./lib/context.ts";
import { StatusError } from "./lib/error.ts";
import { schemes } from "./lib/id.ts";
import {
  absolutePath,
  describeOptions,
  type Options,
  readOptions,
  type Settings,
  switchSchema,
  unixEndpoint,
  UsageError,
  wholeNumber,
} from "./lib/options.ts";

const driverName = "csi.lightbitslabs.com";
const version = config.version;

interface Command {
  readonly summary: string;
  /** More for `--help`, after the summary. */
  readonly text?: string;
  readonly options: Options;
  run(args: readonly string[]): Promise<number>;
}

function command<O extends Options>(
  summary: string,
  options: O,
  run: (settings: Settings<O>) => Promise<number>,
  text?: string,
): Command {
  return {
    summary,
    options,
    run: (args) => run(readOptions(options, args, (name) => Deno.env.get(name))),
    ...(text === undefined ? {} : { text }),
  };
}

// ---------------------------------------------------------------------------------------------------------- options

const logOptions = {
  "log-level": {
    short: "l",
    env: ["LB_CSI_LOG_LEVEL"],
    fallback: "info",
    value: "LEVEL",
    meaning: `least level that is written: ${logLevels.join(", ")}`,
    schema: z.preprocess(
      (text) => text === "warn" ? "warning" : text,
      z.enum(logLevels, { error: `is not one of ${logLevels.join(", ")}` }),
    ),
  },
  "log-fmt": {
    short: "f",
    env: ["LB_CSI_LOG_FMT"],
    fallback: "json",
    value: "FORMAT",
    meaning: "json, or text for people",
    schema: z.enum(["json", "text"], { error: "is not json or text" }),
  },
} as const satisfies Options;

const serviceOptions = {
  endpoint: {
    short: "e",
    env: ["CSI_ENDPOINT"],
    fallback: "unix:///tmp/csi.sock",
    value: "URL",
    meaning: "socket to serve CSI on; its directory must exist",
    schema: unixEndpoint,
  },
  "snapshot-metadata": {
    env: ["LB_CSI_SNAPSHOT_METADATA"],
    meaning:
      "announce the SnapshotMetadata service (alpha), which the controller serves; give it to controller and node",
    schema: switchSchema,
  },
  "csi-1.13": {
    env: ["LB_CSI_1_13"],
    meaning: "announce and serve the health calls of CSI 1.13 (alpha), which tools made for 1.12 may not know",
    schema: switchSchema,
  },
  ...logOptions,
} as const satisfies Options;

const fsOption = {
  "default-fs": {
    short: "F",
    env: ["LB_CSI_DEFAULT_FS"],
    fallback: "ext4",
    value: "TYPE",
    meaning: "file system of a new volume whose StorageClass names none: ext4, xfs, btrfs",
    schema: z.enum(["ext4", "xfs", "btrfs"], { error: "is not ext4, xfs or btrfs" }),
  },
  "node-id-suffix": {
    env: ["LB_CSI_NODE_ID_SUFFIX"],
    fallback: ".node",
    value: "TEXT",
    meaning: "how every node ID of this deployment ends; others are refused as unknown nodes",
    schema: z.string(),
  },
} as const satisfies Options;

const controllerOptions = {
  ...serviceOptions,
  ...fsOption,
  "jwt-path": {
    short: "j",
    env: ["LB_CSI_JWT_PATH"],
    fallback: "/etc/lb-csi/jwt",
    value: "FILE",
    meaning: "token for calls that bring none in their secrets; read at each use, so it may change or come later",
    schema: absolutePath,
  },
  "mgmt-ca": {
    env: ["LB_CSI_MGMT_CA"],
    value: "FILE",
    meaning: "PEM certificates to trust for management endpoints, instead of the system's",
    schema: absolutePath.optional(),
  },
  "mgmt-tls-verify": {
    env: ["LB_CSI_MGMT_TLS_VERIFY"],
    fallback: "true",
    value: "true|false",
    meaning: "false accepts any certificate of a management endpoint: whoever sits in between can read the token",
    schema: z.enum(["true", "false"], { error: "is not true or false" }).transform((text) => text === "true"),
  },
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning: "clusters to list and measure, and where the endpoints of old volume IDs lead today; read again on change",
    schema: absolutePath.optional(),
  },
} as const satisfies Options;

const nodeOptions = {
  ...serviceOptions,
  ...fsOption,
  "node-id": {
    short: "n",
    env: ["LB_CSI_NODE_ID"],
    value: "ID",
    meaning: "name of this node in access lists: letters, digits, '.', '-'; Kubernetes: <node name>.node",
    schema: z.string({ error: "is missing" }),
  },
  attach: {
    env: ["LB_CSI_ATTACH"],
    fallback: "discovery-client",
    value: "HOW",
    meaning: "who connects to subsystems: discovery-client (a daemon follows files that we write), direct (nvme-cli)",
    schema: z.enum(["discovery-client", "direct"], { error: "is not discovery-client or direct" }),
  },
  "discovery-dir": {
    env: ["LB_CSI_DISCOVERY_DIR"],
    fallback: "/etc/discovery-client/discovery.d",
    value: "DIR",
    meaning: "input directory of the Discovery-Client",
    schema: absolutePath,
  },
  sysfs: {
    env: ["LB_CSI_SYSFS"],
    fallback: "/sys",
    value: "DIR",
    meaning: "where sysfs is mounted",
    schema: absolutePath,
  },
  dev: {
    env: ["LB_CSI_DEV"],
    fallback: "/dev",
    value: "DIR",
    meaning: "where device nodes are",
    schema: absolutePath,
  },
  "max-volumes": {
    env: ["LB_CSI_MAX_VOLUMES"],
    fallback: "0",
    value: "COUNT",
    meaning: "volumes that this node can take; 0: the orchestrator decides",
    schema: wholeNumber(0, 100_000),
  },
} as const satisfies Options;

/** `10Gi`, `2Ti` or bytes. */
const sizeSchema = z.string().regex(/^[1-9]\d{0,17}(?:[KMGTP]i)?$/, "is not a size such as 500Gi, 16Ti or bytes")
  .transform((text) => {
    const power = " KMGTP".indexOf(text.replace(/[\di]/g, "") || " ");
    return BigInt(text.replace(/\D/g, "")) << BigInt(10 * power);
  });

const port = wholeNumber(0, 65535);
const delayMs = wholeNumber(0, 3_600_000);

const simulateOptions = {
  data: {
    fallback: "none",
    value: "PLANE",
    meaning: "none: management only; loop: volumes are files behind loop devices of this machine (root)",
    schema: z.enum(["none", "loop"], { error: "is not none or loop" }),
  },
  state: {
    value: "DIR",
    meaning: "remember the cluster here; without it everything is forgotten at the end",
    schema: absolutePath.optional(),
  },
  host: { fallback: "127.0.0.1", value: "IP", meaning: "address of the management API", schema: z.string() },
  schemes: {
    fallback: "grpc,grpcs",
    value: "LIST",
    meaning: "what the management API is served over: grpc, grpcs, or both",
    schema: z.string().transform((list) => list.split(","))
      .pipe(z.array(z.enum(schemes, { error: `is not of ${schemes.join(", ")}` }))),
  },
  servers: { fallback: "3", value: "COUNT", meaning: "storage servers, 1 to 16", schema: wholeNumber(1, 16) },
  "grpc-port": {
    fallback: "0",
    value: "PORT",
    meaning: "first server's clear-text port, the others follow; 0: free ones",
    schema: port,
  },
  "grpcs-port": { fallback: "0", value: "PORT", meaning: "the same for TLS", schema: port },
  "control-port": { fallback: "0", value: "PORT", meaning: "port of the control port on 127.0.0.1", schema: port },
  name: { fallback: "simulated", value: "TEXT", meaning: "name of the cluster", schema: z.string() },
  projects: {
    fallback: "default",
    value: "LIST",
    meaning: "projects, separated by commas",
    schema: z.string().transform((list) => list.split(",")),
  },
  capacity: {
    fallback: "16Ti",
    value: "SIZE",
    meaning: "space of the cluster; a volume takes its size times its replicas",
    schema: sizeSchema,
  },
  "no-auth": { meaning: "admit calls without a token", schema: switchSchema },
  "creation-ms": { fallback: "50", value: "MS", meaning: "how long a new volume is Creating", schema: delayMs },
  "deletion-ms": { fallback: "50", value: "MS", meaning: "how long a deleted volume is Deleting", schema: delayMs },
  "update-ms": { fallback: "0", value: "MS", meaning: "how long a changed volume is Updating", schema: delayMs },
  "discovery-dir": {
    value: "DIR",
    meaning: "directory that the simulated Discovery-Client watches; default: in the state",
    schema: absolutePath.optional(),
  },
  dev: { value: "DIR", meaning: "where block devices appear; default: in the state", schema: absolutePath.optional() },
  sysfs: {
    value: "DIR",
    meaning: "where the sysfs tree of these devices appears; default: in the state",
    schema: absolutePath.optional(),
  },
  ...logOptions,
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
} as const satisfies Options;

const simulateText =
  `A LightOS cluster to try and to test against: the management API over gRPC and TLS, tokens, projects, asynchronous
creation and deletion, and (with --data loop) a machine whose block devices are loop devices.

It prints one line of JSON with everything that is needed to use it, and runs until SIGTERM or Ctrl-C:
  grpc, grpcs            management endpoints: join them with commas for the StorageClass parameter mgmt-endpoint
  jwt, adminJwt          tokens: the key "jwt" of the StorageClass' secrets, or a file for --jwt-path
  ca                     certificate to trust for mgmt-scheme grpcs: key "mgmt-ca.crt", or a file for --mgmt-ca
  discoveryDir, devRoot, sysfsRoot
                         with --data loop: start the node with --discovery-dir, --dev and --sysfs set to these
  control                control port, on this machine only: counters, faults, delays, states, devices; for example
                           curl CONTROL/model                    everything the cluster holds
                           curl CONTROL/calls                    how often each RPC was called
                           curl CONTROL/faults -d '{"rpc":"CreateVolume","code":"UNAVAILABLE","count":2}'
                           curl CONTROL/faults -d '{"rpc":"UpdateVolume","drop":true,"when":"after"}'
                           curl -X PATCH CONTROL/volumes/UUID -d '{"protection":"Degraded"}'
                           curl CONTROL/endpoints/stop -d '{"server":0}'
                         (all of them: the head of lib/sim/control.ts)

  lbcsi simulate --data loop --state /var/tmp/cluster &
  lbcsi controller --endpoint unix:///tmp/controller.sock &
  lbcsi node --endpoint unix:///tmp/node.sock --node-id here.node --discovery-dir DIR --dev DIR --sysfs DIR &

lbcsi demo does all of this by itself.`;

// --------------------------------------------------------------------------------------------------------- commands

const commands: Readonly<Record<string, Command>> = {
  controller: command(
    "serve the CSI identity and controller services",
    controllerOptions,
    async (settings) => {
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "controller" });
      const { controllerHandlers } = await import("./lib/csi/controller.ts");
      const { snapshotMetadataHandlers } = await import("./lib/csi/snapshot_metadata.ts");
      const { lightosBackend } = await import("./lib/storage/lightos.ts");
      const { KeyedLock } = await import("./lib/lock.ts");
      const { service } = await import("./lib/rpc.ts");
      const { Controller, SnapshotMetadata } = await import("./proto/gen/csi_pb.ts");
      if (!settings["mgmt-tls-verify"]) log.warning("does not verify the certificates of management endpoints");
      await using backend = lightosBackend({
        log,
        globalJwt: () => readIfThere(settings["jwt-path"]),
        globalJwtPath: settings["jwt-path"],
        ca: settings["mgmt-ca"] === undefined ? undefined : readRequired("--mgmt-ca", settings["mgmt-ca"]),
        verifyTls: settings["mgmt-tls-verify"],
        userAgent: `lbcsi/${version}`,
        clusters: settings.config === undefined ? undefined : await readClusters(settings.config, log),
      });
      const handlers = controllerHandlers({
        backend,
        locks: new KeyedLock(),
        defaultFsType: settings["default-fs"],
        nodeIdSuffix: settings["node-id-suffix"],
        volumeHealth: settings["csi-1.13"],
      });
      const services = [service(Controller, handlers)];
      if (settings["snapshot-metadata"] && backend.changedBlocks !== undefined) {
        services.push(service(SnapshotMetadata, snapshotMetadataHandlers(backend.changedBlocks)));
      }
      return await serveCsi(settings, log, services);
    },
  ),

  node: command("serve the CSI identity and node services", nodeOptions, async (settings) => {
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "node" });
    const { hostNqn, nodeIdProblem } = await import("./lib/namespace.ts");
    const suffix = settings["node-id-suffix"];
    const problem = nodeIdProblem(settings["node-id"]) ??
      (settings["node-id"].endsWith(suffix) ? undefined : `it does not end in "${suffix}" (see --node-id-suffix)`);
    if (problem !== undefined) throw new UsageError(`--node-id "${settings["node-id"]}": ${problem}`);
    const { nodeHandlers } = await import("./lib/csi/node.ts");
    const { direct, discoveryClient, hostIdOf } = await import("./lib/host/attach.ts");
    const { linuxHost } = await import("./lib/host/host.ts");
    const { parseVolumeId } = await import("./lib/id.ts");
    const { KeyedLock } = await import("./lib/lock.ts");
    const { service } = await import("./lib/rpc.ts");
    const { Node } = await import("./proto/gen/csi_pb.ts");
    const nodeId = settings["node-id"];
    const host = linuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
    const locks = new KeyedLock();
    const attacher = settings.attach === "direct"
      ? direct({ host, hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId), locks })
      : discoveryClient({ host, hostNqn: hostNqn(nodeId), directory: settings["discovery-dir"] });
    const handlers = nodeHandlers({
      host,
      attacher,
      locks,
      nodeId,
      defaultFsType: settings["default-fs"],
      maxVolumes: settings["max-volumes"],
      parseId: parseVolumeId,
      volumeHealth: settings["csi-1.13"],
    });
    return await serveCsi(settings, log, [service(Node, handlers)]);
  }),

  simulate: command(
    "run a simulated storage cluster, to try and to test against",
    simulateOptions,
    async (settings) => {
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "simulator" });
      const { defaultSimulateSettings, simulate } = await import("./lib/sim/simulate.ts");
      const stopped = untilStopped();
      const simulator = await simulate({
        ...defaultSimulateSettings,
        host: settings.host,
        schemes: settings.schemes,
        servers: settings.servers,
        grpcPort: settings["grpc-port"],
        grpcsPort: settings["grpcs-port"],
        controlPort: settings["control-port"],
        clusterName: settings.name,
        projects: settings.projects,
        capacityBytes: settings.capacity,
        authentication: !settings["no-auth"],
        behaviour: {
          creationMs: settings["creation-ms"],
          deletionMs: settings["deletion-ms"],
          updateMs: settings["update-ms"],
        },
        data: settings.data,
        stateDir: settings.state,
        discoveryDir: settings["discovery-dir"],
        devRoot: settings.dev,
        sysfsRoot: settings.sysfs,
      }, log);
      console.log(JSON.stringify(simulator.addresses));
      await stopped;
      await simulator.stop();
      return 0;
    },
    simulateText,
  ),

  demo: command(
    "take volumes through their whole lives on a simulated cluster, with real file systems",
    {
      fs: {
        value: "LIST",
        meaning:
          "file systems to play, separated by commas; default: ext4, and each other one that this machine can make",
        schema: z.string().transform((list) => list.split(","))
          .pipe(z.array(z.enum(["ext4", "xfs", "btrfs"], { error: "is not of ext4, xfs, btrfs" }))).optional(),
      },
      keep: { meaning: "leave the temporary directory, with the logs in it", schema: switchSchema },
      verbose: { meaning: "show every command that is run", schema: switchSchema },
    },
    async (settings) => await (await import("./lib/demo/demo.ts")).demo(settings),
    "It starts a simulated cluster, a controller and a node as processes of their own, plays the orchestrator over CSI, and\n" +
      "checks at the end that nothing is left over. File systems need root, loop devices and mkfs; without them it says\n" +
      "what is missing and plays the control plane alone.",
  ),

  identity: command("serve the CSI identity service alone", serviceOptions, async (settings) => {
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "identity" });
    return await serveCsi(settings, log, []);
  }),
};

/** Serves CSI until SIGTERM or SIGINT, then lets running calls end. */
async function serveCsi(
  settings: Settings<typeof serviceOptions>,
  log: Logger,
  services: readonly import("./lib/rpc.ts").Service[],
): Promise<number> {
  const { serve, service } = await import("./lib/rpc.ts");
  const { identityHandlers } = await import("./lib/csi/identity.ts");
  const { describeRequest, redactRequest } = await import("./lib/csi/request.ts");
  const { Identity } = await import("./proto/gen/csi_pb.ts");
  const stopped = untilStopped();
  const path = settings.endpoint;
  const snapshotMetadata = settings["snapshot-metadata"];
  const identity = { name: driverName, version, expansion: true, snapshotMetadata };
  const server = await serve({
    listen: { path },
    services: [service(Identity, identityHandlers(identity)), ...services],
    log,
    describe: describeRequest,
    redact: redactRequest,
    // Probes come all the time, questions before each call, and the others once a minute, some for each volume.
    quiet: ({ name }) =>
      /^(Probe|GetPlugin.*|.*GetCapa(bilities|city)|NodeGet(Info|VolumeStats)|ListVolumes|ControllerGetVolume|.*Health)$/
        .test(name),
  });
  log.info("serves", { path, version });
  const signal = await stopped;
  log.info("stops on a signal", { name: signal });
  // Kubernetes kills 30 s after SIGTERM unless the manifest says otherwise.
  await server.stop(25_000);
  log.info("stopped");
  return 0;
}

function untilStopped(): Promise<Deno.Signal> {
  return new Promise((resolve) => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) Deno.addSignalListener(signal, () => resolve(signal));
  });
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}

async function readClusters(path: string, log: Logger) {
  const { knownClusters } = await import("./lib/storage/lightos_config.ts");
  const stamp = (path: string) => {
    const { dev, ino, size, mtimeNs, ctimeNs } = statSync(path, { bigint: true });
    return [dev, ino, size, mtimeNs, ctimeNs].join(" ");
  };
  try {
    return knownClusters(path, { stamp, read: (path) => readFileSync(path, "utf8") }, log);
  } catch (error) {
    if (error instanceof StatusError) throw new UsageError(error.message);
    throw error;
  }
}

function readRequired(flag: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new UsageError(`${flag} "${path}": ${error instanceof Error ? error.message : String(error)}`);
  }
}

function help(): string {
  const width = Math.max(...Object.keys(commands).map((name) => name.length)) + 2;
  const rows = Object.entries(commands).map(([name, { summary }]) => `  ${name.padEnd(width)}${summary}`);
  return [
    `lbcsi ${version}: CSI driver for NVMe/TCP storage`,
    "",
    "usage: lbcsi COMMAND [OPTIONS]",
    "",
    ...rows,
    `  ${"version".padEnd(width)}print the version`,
    "",
    "lbcsi COMMAND --help lists the options of a command.",
  ].join("\n");
}

async function main(args: readonly string[]): Promise<number> {
  const [name, ...rest] = args;
  if (name === undefined || name === "help" || name === "--help" || name === "-h") {
    console.log(help());
    return name === undefined ? 2 : 0;
  }
  if (name === "version" || name === "--version") {
    console.log(`lbcsi ${version} (CSI 1.12, Deno ${Deno.version.deno})`);
    return 0;
  }
  const chosen = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (chosen === undefined) {
    console.error(`lbcsi: there is no command "${name}"; lbcsi --help lists them`);
    return 2;
  }
  if (rest.includes("--help") || rest.includes("-h")) {
    const text = chosen.text === undefined ? [] : ["", chosen.text];
    console.log([`lbcsi ${name}: ${chosen.summary}`, ...text, "", describeOptions(chosen.options)].join("\n"));
    return 0;
  }
  try {
    return await chosen.run(rest);
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`lbcsi ${name}: ${error.message}\nlbcsi ${name} --help lists the options.`);
      return 2;
    }
    if (error instanceof StatusError) {
      console.error(`lbcsi ${name}: ${error.message}`);
      return 1;
    }
    throw error;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));

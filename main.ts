/**
 * lbcsi: a CSI driver for NVMe/TCP storage. This file turns the command line into settings and is the only place where
 * concrete parts meet. Subcommands load what they need when they start, so a node plugin never pays for a simulator.
 */
import "./lib/goaway.ts";
import { readFileSync, statSync } from "node:fs";
import { z } from "zod";
import config from "./deno.json" with { type: "json" };
import type { Check } from "./lib/check.ts";
import {
  backgroundContext,
  createLogger,
  type Logger,
  logLevels,
  type RequestContext,
  requestContext,
  Secrets,
  sleep,
  timeLimit,
} from "./lib/context.ts";
import { hasCode, messageOf, StatusError } from "./lib/error.ts";
import { type Endpoint, parseEndpoints, parsePoseidonId, parseVolumeId, schemes } from "./lib/id.ts";
import type { Metrics } from "./lib/metrics.ts";
import {
  hostNqn,
  inBandAuthKey,
  isSubsystemOf,
  nodeIdProblem,
  parseAddress,
  type TransportAddress,
} from "./lib/namespace.ts";
import {
  absolutePath,
  describeOptions,
  listenAddress,
  type Options,
  readOptions,
  type Settings,
  switchSchema,
  unixEndpoint,
  UsageError,
  wholeNumber,
} from "./lib/options.ts";
import type { MachineOptions } from "./lib/shell/machine_checks.ts";
import type { SystemReport } from "./lib/storage/backend.ts";
import type { LightosOptions } from "./lib/storage/lightos_cluster.ts";

/** Name of the CSIDriver object and the StorageClass provisioner, by storage system. */
const driverNames = { lightos: "csi.lightbitslabs.com", poseidon: "csi.pos.io" } as const;
const version = config.version;
/** The commit that the program was built from; the build puts it here, and unbuilt there is no such name. */
declare const LBCSI_COMMIT: string | undefined;

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

const metricsOption = {
  "metrics-address": {
    env: ["LB_CSI_METRICS_ADDRESS"],
    value: "HOST:PORT",
    meaning: "serve metrics over plain HTTP at /metrics, to whoever comes there; default: nowhere",
    schema: listenAddress.optional(),
  },
} as const satisfies Options;

const serviceOptions = {
  endpoint: {
    short: "e",
    env: ["CSI_ENDPOINT"],
    fallback: "unix:///tmp/csi.sock",
    value: "URL",
    meaning: "socket to serve CSI on; its directory is made (mode 0750) if only that is missing",
    schema: unixEndpoint,
  },
  backend: {
    env: ["LB_CSI_BACKEND"],
    fallback: "lightos",
    value: "NAME",
    meaning: "storage system of this deployment, the same for controller and node: lightos, poseidon (PoseidonOS)",
    schema: z.enum(["lightos", "poseidon"], { error: "is not lightos or poseidon" }),
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
  ...metricsOption,
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

/** How management endpoints are reached. */
const trustOptions = {
  "mgmt-ca": {
    env: ["LB_CSI_MGMT_CA"],
    value: "FILE",
    meaning:
      "PEM certificates to trust for management endpoints; default: SSL_CERT_FILE, else the machine's, else Mozilla's",
    schema: absolutePath.optional(),
  },
  "mgmt-tls-verify": {
    env: ["LB_CSI_MGMT_TLS_VERIFY"],
    fallback: "true",
    value: "true|false",
    meaning: "false accepts any certificate of a management endpoint: whoever sits in between can read the token",
    schema: z.enum(["true", "false"], { error: "is not true or false" }).transform((text) => text === "true"),
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
  ...trustOptions,
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning: "clusters to list and measure, and where the endpoints of old volume IDs lead today; read again on change",
    schema: absolutePath.optional(),
  },
} as const satisfies Options;

// How long what the storage cluster does not answer is waited for. LightOS' own Discovery-Client has 600 and 10 too
// (spec/lightos.md 12.2); the kernel's keep-alive of 5 s is short for a cluster that moves a volume.
const connectionOptions = {
  "ctrl-loss-tmo": {
    env: ["LB_CSI_CTRL_LOSS_TMO"],
    fallback: "600",
    value: "SECONDS",
    meaning:
      "with --attach=direct: a connection is given up after so long, and I/O fails when it was the last; -1: never, " +
      "then a pod whose volume is lost for good hangs until an operator disconnects it",
    schema: z.union([z.literal("-1").transform(Number), wholeNumber(1, 86_400)], {
      error: "is neither -1 nor a whole number from 1 to 86400",
    }),
  },
  "keep-alive-tmo": {
    env: ["LB_CSI_KEEP_ALIVE_TMO"],
    fallback: "10",
    value: "SECONDS",
    meaning: "with --attach=direct: a silent connection counts as lost after so long",
    schema: wholeNumber(1, 3600),
  },
  "reconnect-delay": {
    env: ["LB_CSI_RECONNECT_DELAY"],
    value: "SECONDS",
    meaning: "with --attach=direct: time between attempts to connect again; default: the kernel's (10)",
    schema: wholeNumber(1, 3600).optional(),
  },
  "fast-io-fail-tmo": {
    env: ["LB_CSI_FAST_IO_FAIL_TMO"],
    value: "SECONDS",
    meaning:
      "with --attach=direct: I/O fails after so long without any connection, instead of waiting for --ctrl-loss-tmo; " +
      "file systems then have errors; default: off",
    schema: wholeNumber(1, 86_400).optional(),
  },
  "nr-io-queues": {
    env: ["LB_CSI_NR_IO_QUEUES"],
    value: "COUNT",
    meaning: "with --attach=direct: queues per connection; default: the kernel's, one per processor",
    schema: wholeNumber(1, 1024).optional(),
  },
  "queue-size": {
    env: ["LB_CSI_QUEUE_SIZE"],
    value: "COUNT",
    meaning: "with --attach=direct: commands per queue, 16 to 1024; default: the kernel's (128)",
    schema: wholeNumber(16, 1024).optional(),
  },
} as const satisfies Options;

const nodeOptions = {
  ...serviceOptions,
  ...fsOption,
  ...trustOptions,
  ...connectionOptions,
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning:
      "the controller's cluster file: where it allows them, pods may have inline volumes; its tokens read keys of in-band-auth",
    schema: absolutePath.optional(),
  },
  "node-id": {
    short: "n",
    env: ["LB_CSI_NODE_ID"],
    value: "ID",
    meaning: "name of this node in access lists: letters, digits, '.', '-'; Kubernetes: <node name>.node",
    schema: z.string({ error: "is missing" }),
  },
  attach: {
    env: ["LB_CSI_ATTACH"],
    value: "HOW",
    meaning:
      "who connects to subsystems: discovery-client (a daemon follows files that we write; default with LightOS), " +
      "direct (nvme-cli; PoseidonOS)",
    schema: z.enum(["discovery-client", "direct"], { error: "is not discovery-client or direct" }).optional(),
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
  "luks-cipher": {
    env: ["LB_CSI_LUKS_CIPHER"],
    fallback: "aes-xts-plain64",
    value: "CIPHER",
    meaning: "of new volumes with host encryption, as cryptsetup calls it",
    schema: z.string().regex(/^[a-z0-9][a-z0-9:-]{0,63}$/, "is not the name of a cipher"),
  },
  "luks-key-size": {
    env: ["LB_CSI_LUKS_KEY_SIZE"],
    fallback: "512",
    value: "BITS",
    meaning: "of new volumes; XTS halves it: 512 is AES-256, 256 is AES-128",
    schema: z.enum(["128", "256", "512"], { error: "is not 128, 256 or 512" }).transform(Number),
  },
  "luks-pbkdf": {
    env: ["LB_CSI_LUKS_PBKDF"],
    fallback: "argon2id",
    value: "PBKDF",
    meaning: "how the key of a new volume is made of the passphrase: argon2id, pbkdf2",
    schema: z.enum(["argon2id", "pbkdf2"], { error: "is not argon2id or pbkdf2" }),
  },
  "luks-pbkdf-memory": {
    env: ["LB_CSI_LUKS_PBKDF_MEMORY"],
    fallback: "65535",
    value: "KIB",
    meaning: "most memory for argon2id: every node that opens the volume needs it",
    schema: wholeNumber(32, 4 << 20),
  },
  "luks-sector-size": {
    env: ["LB_CSI_LUKS_SECTOR_SIZE"],
    value: "BYTES",
    meaning: "encryption sectors of new volumes: 512 or 4096; default: what suits the device",
    schema: z.enum(["512", "4096"], { error: "is not 512 or 4096" }).transform((text) => text === "512" ? 512 : 4096)
      .optional(),
  },
  "luks-discard": {
    env: ["LB_CSI_LUKS_DISCARD"],
    meaning: "let discards through to the cluster, which then sees which blocks are unused",
    schema: switchSchema,
  },
  "max-volumes": {
    env: ["LB_CSI_MAX_VOLUMES"],
    fallback: "0",
    value: "COUNT",
    meaning:
      "volumes that this node can take; the orchestrator is told, and more are refused; 0: the orchestrator decides",
    schema: wholeNumber(0, 100_000),
  },
} as const satisfies Options;

/** IP addresses with or without a port, separated by commas. */
function addressList(defaultPort: string): z.ZodType<readonly TransportAddress[], string> {
  return z.string().transform((list, check) =>
    list.split(",").flatMap((text) => {
      const bare = text.includes(":") && !text.startsWith("[") ? `[${text}]` : text;
      const address = parseAddress(text) ?? parseAddress(`${bare}:${defaultPort}`);
      if (address === undefined) check.addIssue(`"${text}" is not an IP address, or one with a port`);
      return address === undefined ? [] : [address];
    })
  );
}

const shellLogOptions = {
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
  "log-fmt": { ...logOptions["log-fmt"], fallback: "text" },
} as const satisfies Options;

const volumeOptions = {
  volume: {
    word: true,
    value: "VOLUME_ID",
    meaning: "volumeHandle of the PersistentVolume; the cluster is asked for access and for the way to it",
    schema: z.string().optional(),
  },
  uuid: {
    value: "UUID",
    meaning: "instead of VOLUME_ID, with --nqn: the namespace UUID; the cluster is not asked",
    schema: z.uuid({ error: "is not a UUID" }).toLowerCase().optional(),
  },
  nqn: {
    value: "NQN",
    meaning: "instead of VOLUME_ID, with --uuid: the subsystem NQN",
    schema: z.string().startsWith("nqn.", "is not an NQN").max(223, "is longer than 223 bytes").optional(),
  },
  mount: {
    value: "DIR",
    meaning: "attach: mount it there, the directory has to exist; detach: unmount it there first",
    schema: absolutePath.optional(),
  },
  "jwt-path": { ...controllerOptions["jwt-path"], meaning: "token for the management API" },
  secrets: {
    value: "FILE",
    meaning: "more secrets, one key=value per line, with the keys of the Kubernetes Secret: jwt, ...",
    schema: absolutePath.optional(),
  },
  "mgmt-ca": controllerOptions["mgmt-ca"],
  "mgmt-tls-verify": controllerOptions["mgmt-tls-verify"],
  config: { ...controllerOptions.config, meaning: "cluster file: where the endpoints of old volume IDs lead today" },
  "node-id": nodeOptions["node-id"],
  attach: { ...nodeOptions.attach, fallback: "direct" },
  "discovery-dir": nodeOptions["discovery-dir"],
  sysfs: nodeOptions.sysfs,
  dev: nodeOptions.dev,
  timeout: {
    value: "SECONDS",
    fallback: "60",
    meaning: "how long it may take; a command that changes something is let finish",
    schema: wholeNumber(1, 86_400),
  },
  ...shellLogOptions,
} as const satisfies Options;

/** Files, for an argument could be read by every user of the machine. */
const keyOptions = {
  "dhchap-key-file": {
    env: ["LB_CSI_DHCHAP_KEY_FILE"],
    value: "FILE",
    meaning:
      "authenticate connections with the DH-HMAC-CHAP key (DHHC-1:...) in this file, which only its owner may read",
    schema: absolutePath.optional(),
  },
  "dhchap-ctrl-key-file": {
    env: ["LB_CSI_DHCHAP_CTRL_KEY_FILE"],
    value: "FILE",
    meaning: "with --dhchap-key-file: let the controller prove itself too, with the key in this file",
    schema: absolutePath.optional(),
  },
} as const satisfies Options;

const attachOptions = {
  ...volumeOptions,
  ...connectionOptions,
  address: {
    value: "LIST",
    meaning:
      "with --nqn and --attach=direct: IP[:PORT] of I/O controllers, separated by commas; port 4420 if none is given",
    schema: addressList("4420").optional(),
  },
  discovery: {
    value: "LIST",
    meaning: "with --nqn and --attach=discovery-client: IP[:PORT] of discovery controllers; port 8009 if none is given",
    schema: addressList("8009").optional(),
  },
  ...keyOptions,
  "volume-attributes": {
    value: "LIST",
    meaning:
      "volumeAttributes of the PersistentVolume, key=value separated by commas; PoseidonOS needs them, and LightOS " +
      "in-band-auth",
    schema: z.string().regex(/^[^=,]+=[^=,]*(,[^=,]+=[^=,]*)*$/, "is not key=value,key=value")
      .transform((list): Record<string, string> =>
        Object.fromEntries(list.split(",").map((pair) => [pair.split("=")[0] ?? "", pair.split("=")[1] ?? ""]))
      ).optional(),
  },
  fs: {
    value: "TYPE",
    meaning: "with --mount: the file system that it has to have; with --format: that it gets, ext4 if none is given",
    schema: z.enum(["ext4", "xfs", "btrfs"], { error: "is not ext4, xfs or btrfs" }).optional(),
  },
  "read-only": { meaning: "with --mount: mount it read-only", schema: switchSchema },
  format: {
    meaning: "with --mount: make a file system if the volume is blank; without this, nothing is ever formatted",
    schema: switchSchema,
  },
  json: { meaning: "print what was attached as JSON", schema: switchSchema },
} as const satisfies Options;

/** Seconds; -1: never. */
const lossSeconds = z.string().regex(/^(?:-1|\d{1,9})$/, "is not a whole number of seconds, or -1").transform(Number);

const discoveryOptions = {
  "discovery-dir": {
    ...nodeOptions["discovery-dir"],
    meaning: "directory whose files say what to connect; made if missing",
  },
  poll: {
    env: ["LB_CSI_DISCOVERY_POLL"],
    fallback: "10",
    value: "SECONDS",
    meaning: "how often each discovery controller is asked whether its log page has changed",
    schema: wholeNumber(1, 3600),
  },
  "ctrl-loss-tmo": {
    env: ["LB_CSI_DISCOVERY_CTRL_LOSS_TMO"],
    fallback: "600",
    value: "SECONDS",
    meaning:
      "when the kernel gives up a new I/O connection that is lost, -1: never; an entry of a file may say otherwise",
    schema: lossSeconds,
  },
  "keep-alive-tmo": {
    env: ["LB_CSI_DISCOVERY_KEEP_ALIVE_TMO"],
    fallback: "10",
    value: "SECONDS",
    meaning: "keep-alive timeout of new I/O connections",
    schema: wholeNumber(1, 3600),
  },
  "io-queues": {
    env: ["LB_CSI_DISCOVERY_IO_QUEUES"],
    fallback: "0",
    value: "COUNT",
    meaning: "queues of new I/O connections; 0: one for each processor",
    schema: wholeNumber(0, 65_535),
  },
  ...keyOptions,
  sysfs: nodeOptions.sysfs,
  dev: nodeOptions.dev,
  "metrics-address": { ...metricsOption["metrics-address"], env: ["LB_CSI_DISCOVERY_METRICS_ADDRESS"] },
  ...logOptions,
} as const satisfies Options;

const discoveryText =
  `Takes the same files as LightOS' Discovery-Client, one per volume with --attach=discovery-client, and stands in its place
on a machine that has only lbcsi and nvme-cli. It connects to the discovery controllers that the files name, and to every
I/O controller that these list for the subsystems in the files; follows changes and referrals; and lets go of a subsystem
that no file names any more, as soon as nothing uses it. It takes over the connections that are there when it starts, and
leaves them when it ends (SIGTERM): I/O goes on meanwhile.`;

const listOptions = {
  uuid: { ...volumeOptions.uuid, meaning: "this volume only; exit status 1 when it is not here" },
  all: { meaning: "also volumes and connections over TCP that another program made", schema: switchSchema },
  json: { meaning: "print JSON", schema: switchSchema },
  "discovery-dir": nodeOptions["discovery-dir"],
  sysfs: nodeOptions.sysfs,
  dev: nodeOptions.dev,
  ...shellLogOptions,
} as const satisfies Options;

/** Management endpoints, as a StorageClass names them. */
const endpointsSchema: z.ZodType<readonly Endpoint[], string> = z.string().transform((text, check) => {
  const endpoints = parseEndpoints(text);
  if (typeof endpoints !== "string") return endpoints;
  check.addIssue(endpoints);
  return z.NEVER;
});

const doctorOptions = {
  checks: {
    fallback: "all",
    value: "WHAT",
    meaning: "what is looked at: machine, cluster (from where no volume will be attached), all",
    schema: z.enum(["all", "machine", "cluster"], { error: "is not all, machine or cluster" }),
  },
  backend: serviceOptions.backend,
  "node-id": { ...nodeOptions["node-id"], schema: z.string().optional() },
  attach: nodeOptions.attach,
  "discovery-dir": nodeOptions["discovery-dir"],
  "kubelet-dir": {
    env: ["LB_CSI_KUBELET_DIR"],
    fallback: "/var/lib/kubelet",
    value: "DIR",
    meaning: "kubelet's directory; without one there is nothing to see",
    schema: absolutePath,
  },
  sysfs: nodeOptions.sysfs,
  dev: nodeOptions.dev,
  "default-fs": { ...fsOption["default-fs"], meaning: "the file system that this node cannot do without" },
  "max-volumes": nodeOptions["max-volumes"],
  config: { ...controllerOptions.config, meaning: "cluster file: the clusters to look at" },
  "mgmt-endpoint": {
    value: "LIST",
    meaning: "instead of all clusters of --config: host:port of management endpoints (PoseidonOS: of DAgent)",
    schema: endpointsSchema.optional(),
  },
  "mgmt-scheme": {
    fallback: "grpcs",
    value: "SCHEME",
    meaning: "with --mgmt-endpoint: grpcs is TLS, grpc clear text",
    schema: z.enum(schemes, { error: `is not one of ${schemes.join(", ")}` }),
  },
  "jwt-path": volumeOptions["jwt-path"],
  secrets: volumeOptions.secrets,
  ...trustOptions,
  timeout: {
    value: "SECONDS",
    fallback: "60",
    meaning: "how long all of it may take; what does not answer takes less",
    schema: wholeNumber(1, 600),
  },
  json: { meaning: "print JSON", schema: switchSchema },
  ...shellLogOptions,
  // What is worth a warning is what it prints.
  "log-level": { ...shellLogOptions["log-level"], fallback: "error" },
} as const satisfies Options;

const doctorText =
  `Looks at this machine, and with --config or --mgmt-endpoint at the storage cluster, and says what is wrong with them and
what to do. Give it the options of the node service; in its container they are there already, as environment variables.

It changes nothing: it writes no file, connects to no subsystem, opens no device, and runs tools to ask for their versions
only. Of the cluster it reads what the token may see; to data and discovery addresses it makes a TCP connection and drops it.

  problem       volumes do not work here, or not safely, until something is done
  warning       they do, but for something that only some of them need, or something will soon stop them
  not checked   it cannot be seen from here

Exit status: 0 no problem, 1 problems, or it could not be done, 2 for bad options.`;

const statusText =
  `Exit status: 0 done (also when there was nothing to do), 1 failed, 2 bad options, 130 after Ctrl-C, 143 after SIGTERM.
A signal never cuts a command off that formats, mounts or connects; a second one leaves it running and returns at once.`;

const attachText = `usage: lbcsi attach VOLUME_ID --node-id ID [--mount DIR [--format] [--read-only]] ...
       lbcsi attach --uuid UUID --nqn NQN --address IP[:PORT],... --node-id ID ...

Connects this machine to a volume as the node plugin does, without an orchestrator, and prints its block device. It may be
repeated. A volume that another host has access to is refused; so is anything that would overwrite what is on it: only
--format makes a file system, and only on a device that was read and found blank.

${statusText}`;

const detachText = `usage: lbcsi detach VOLUME_ID --node-id ID [--mount DIR] ...
       lbcsi detach --uuid UUID --nqn NQN --node-id ID [--mount DIR] ...

Undoes lbcsi attach with the same VOLUME_ID (or --uuid and --nqn), --mount, --attach and --node-id: unmounts, disconnects
unless another volume of the subsystem is here, and takes this host's access away. It refuses while anything else uses the
volume, works on any leftover, and may be repeated.

${statusText}`;

const listText =
  `Shows volumes with device, paths and mounts, from sysfs and the mount table. It does not hang on a dead path: a device is
read only when it has a live one, for two seconds at most.

Exit status: 0, or 1 when it failed or --uuid names a volume that is not here, 2 for bad options.`;

/** `10Gi`, `2Ti` or bytes. */
const sizeSchema = z.string().regex(/^[1-9]\d{0,17}(?:[KMGTP]i)?$/, "is not a size such as 500Gi, 16Ti or bytes")
  .transform((text) => {
    const power = " KMGTP".indexOf(text.replace(/[\di]/g, "") || " ");
    return BigInt(text.replace(/\D/g, "")) << BigInt(10 * power);
  });

const sweepOptions = {
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning: "cluster file",
    schema: z.string({ error: "is missing" }).startsWith("/", "is not an absolute path"),
  },
  "node-id": { short: "n", value: "ID", meaning: "the dead node", schema: z.string({ error: "is missing" }) },
  delete: { meaning: "remove what is found; without it, list it and change nothing", schema: switchSchema },
  "even-if-connected": {
    meaning: "remove volumes too that the cluster shows as connected to the node: for a connection that died with it",
    schema: switchSchema,
  },
  ...trustOptions,
  ...logOptions,
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
} as const satisfies Options;

const sweepText =
  `A pod's inline volume is removed by the node that made it, after the pod, or when that node starts again. A node that
never comes back leaves its volumes; this lists them, and with --delete removes them with everything in them.

Be sure that the node is dead, and not merely out of Kubernetes' sight: a pod that still runs there loses its data. A volume
that the cluster shows as connected to the node is refused. Removing takes the node's access away first.`;

const port = wholeNumber(0, 65535);
const delayMs = wholeNumber(0, 3_600_000);

const simulateOptions = {
  backend: {
    fallback: "lightos",
    value: "NAME",
    meaning: "what is simulated: lightos, poseidon (PoseidonOS)",
    schema: z.enum(["lightos", "poseidon"], { error: "is not lightos or poseidon" }),
  },
  data: {
    fallback: "none",
    value: "PLANE",
    meaning: "none: management only; loop: volumes are files behind loop devices of this machine (root); nvmet: " +
      "namespaces of this kernel's NVMe/TCP target (root)",
    schema: z.enum(["none", "loop", "nvmet"], { error: "is not none, loop or nvmet" }),
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
  arrays: {
    fallback: "POSArray",
    value: "LIST",
    meaning: "PoseidonOS: arrays, separated by commas, each with --capacity",
    schema: z.string().transform((list) => list.split(",")),
  },
  "dagent-port": { fallback: "0", value: "PORT", meaning: "PoseidonOS: port of DAgent; 0: a free one", schema: port },
  "call-ms": { fallback: "0", value: "MS", meaning: "PoseidonOS: how long each call takes at least", schema: delayMs },
  "no-auth": { meaning: "admit calls without a token", schema: switchSchema },
  "in-band-auth": {
    meaning: "enable in-band authentication: with --data nvmet only trusted hosts connect, with their keys",
    schema: switchSchema,
  },
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
  programs               with --data loop: directory of an nvme for --attach=direct, to be first in the node's PATH
  control                control port, on this machine only: counters, faults, delays, states, devices; for example
                           curl CONTROL/model                    everything the cluster holds
                           curl CONTROL/calls                    how often each RPC was called
                           curl CONTROL/faults -d '{"rpc":"CreateVolume","code":"UNAVAILABLE","count":2}'
                           curl CONTROL/faults -d '{"rpc":"UpdateVolume","drop":true,"when":"after"}'
                           curl -X PATCH CONTROL/volumes/UUID -d '{"protection":"Degraded"}'
                           curl CONTROL/endpoints/stop -d '{"server":0}'
                           curl CONTROL/paths/down -d '{"server":0}'      (with --data nvmet)
                         (all of them: the head of lib/sim/control.ts)

  lbcsi simulate --data loop --state /var/tmp/cluster &
  lbcsi controller --endpoint unix:///tmp/controller.sock &
  lbcsi node --endpoint unix:///tmp/node.sock --node-id here.node --discovery-dir DIR --dev DIR --sysfs DIR &

With --backend poseidon it is a PoseidonOS: DAgent's REST API, arrays of volumes, status codes, and an export that is
forgotten at each restart. --servers, --schemes, ports for gRPC, --projects, --no-auth and the times of states do not apply.
Its line of JSON has
  dagent, arrays, targetAddress, transportServiceId
                         for the StorageClass: provisionerIP and provisionerPort, arrayName, and the two of these names
  devRoot, sysfsRoot, programs
                         with --data loop: start the node with --dev, --sysfs, and the directory programs first in PATH,
                         where an nvme is that connects to the simulated machine's devices
  control                the same as above, with the events of PoseidonOS for codes:
                           curl CONTROL/faults -d '{"rpc":"MountVolume","event":"VOL_MGR_BUSY","count":2}'
                           curl -X PATCH CONTROL/arrays/POSArray -d '{"state":"OFFLINE"}'
                           curl -X POST CONTROL/restart          forgets exports, as PoseidonOS does
                         (all of them: the head of lib/sim/poseidon_control.ts)

lbcsi demo does all of this by itself.`;

// --------------------------------------------------------------------------------------------------------- commands

const commands: Readonly<Record<string, Command>> = {
  controller: command(
    "serve the CSI identity and controller services",
    controllerOptions,
    async (settings) => {
      refuseOutOfReach(settings);
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "controller" });
      const { controllerHandlers } = await import("./lib/csi/controller.ts");
      const { snapshotMetadataHandlers } = await import("./lib/csi/snapshot_metadata.ts");
      const { KeyedLock } = await import("./lib/lock.ts");
      const { service } = await import("./lib/rpc.ts");
      const { Controller, SnapshotMetadata } = await import("./proto/gen/csi_pb.ts");
      const metrics = await serveMetrics(settings, "controller", settings.backend, log);
      await using backend = settings.backend === "poseidon"
        ? await openPoseidon(settings, log, metrics)
        : await openLightos(settings, log, metrics);
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
      return await serveCsi(settings, log, services, metrics);
    },
  ),

  node: command("serve the CSI identity and node services", nodeOptions, async (settings) => {
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "node" });
    const suffix = settings["node-id-suffix"];
    const problem = nodeIdProblem(settings["node-id"]) ??
      (settings["node-id"].endsWith(suffix) ? undefined : `it does not end in "${suffix}" (see --node-id-suffix)`);
    if (problem !== undefined) throw new UsageError(`--node-id "${settings["node-id"]}": ${problem}`);
    if (settings.backend === "poseidon") refusePoseidon(settings);
    const { inlineVolumes, sweepUntilSettled } = await import("./lib/csi/ephemeral.ts");
    const { volumeLimit } = await import("./lib/csi/limit.ts");
    const { nodeHandlers } = await import("./lib/csi/node.ts");
    const { linuxHost } = await import("./lib/host/host.ts");
    const { KeyedLock } = await import("./lib/lock.ts");
    const { service } = await import("./lib/rpc.ts");
    const { Node } = await import("./proto/gen/csi_pb.ts");
    const nodeId = settings["node-id"];
    const metrics = await serveMetrics(settings, "node", settings.backend, log);
    const host = linuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
    metrics?.gather(() => [["lbcsi_volumes_limit", [], settings["max-volumes"]]]);
    if (metrics !== undefined) await measureMachine(metrics, host, settings.backend);
    const locks = new KeyedLock();
    const attacher = await attacherOf(
      settings.backend === "poseidon" ? { ...settings, attach: "direct" } : settings,
      host,
      locks,
      tuningOf(settings),
    );
    // What talks to the cluster is loaded by those nodes only that are to make volumes, or when keys are asked for.
    await using opened = new AsyncDisposableStack();
    let opening: ReturnType<typeof openLightos> | undefined;
    const open = () => opening ??= openLightos(settings, log, metrics).then((backend) => opened.use(backend));
    const defaultFsType = settings["default-fs"];
    const volumes = settings.config === undefined ? undefined : (await open()).ephemeral;
    const limit = volumeLimit(host, settings["max-volumes"], isSubsystemOf(settings.backend));
    const inline = inlineVolumes({ host, attacher, locks, nodeId, defaultFsType, volumes, limit });
    const handlers = nodeHandlers({
      host,
      attacher,
      locks,
      nodeId,
      inline,
      defaultFsType,
      maxVolumes: settings["max-volumes"],
      limit,
      luks: {
        cipher: settings["luks-cipher"],
        keyBits: settings["luks-key-size"],
        pbkdf: settings["luks-pbkdf"],
        pbkdfMemoryKib: settings["luks-pbkdf-memory"],
        sectorBytes: settings["luks-sector-size"],
        discard: settings["luks-discard"],
      },
      parseId: settings.backend === "poseidon"
        ? (text) => ({ uuid: parsePoseidonId(text).uuid, hostEncryption: undefined })
        : parseVolumeId,
      expansion: grows(settings.backend),
      volumeHealth: settings["csi-1.13"],
      ...(settings.backend === "poseidon" ? {} : {
        authentication: { keysOf: async (...asked) => await (await open()).authentication.keysOf(...asked) },
      }),
    });
    const ending = new AbortController();
    const swept = sweepUntilSettled(inline, log, ending.signal);
    using _tending = tending(attacher, log);
    try {
      return await serveCsi(settings, log, [service(Node, handlers)], metrics);
    } finally {
      ending.abort(new StatusError("CANCELLED", "Cannot go on: the node service is stopping"));
      await swept;
    }
  }),

  sweep: command("list, or remove, the inline volumes that a dead node has left", sweepOptions, async (settings) => {
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "sweep" });
    const nodeId = settings["node-id"];
    const problem = nodeIdProblem(nodeId);
    if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
    await using backend = await openLightos(settings, log);
    const { ephemeral } = backend;
    const obstacle = ephemeral?.obstacle();
    if (ephemeral === undefined || obstacle !== undefined) {
      throw new UsageError(`--config "${settings.config}": ${obstacle}`);
    }
    const ctx = backgroundContext(`sweep after ${nodeId}`, log, 600_000);
    const { volumes, problems } = await ephemeral.listVolumes(ctx, nodeId);
    let failures = problems.length;
    for (const text of problems) console.error(`lbcsi sweep: ${text}`);
    for (const volume of volumes) {
      const { uuid, place, pod, capacityBytes } = volume;
      const isConnected = volume.connectedHosts.includes(hostNqn(nodeId));
      let outcome = `${isConnected ? "connected to the node, " : ""}${settings.delete ? "removed" : "left alone"}`;
      if (settings.delete) {
        try {
          if (isConnected && !settings["even-if-connected"]) {
            throw new StatusError("FAILED_PRECONDITION", "refused: the node is connected to it (--even-if-connected)");
          }
          await ephemeral.removeVolume(ctx, volume);
        } catch (error) {
          failures++;
          outcome = messageOf(error);
        }
      }
      console.log(`${uuid}  ${capacityBytes} bytes  ${place}  pod ${pod.namespace}/${pod.name}: ${outcome}`);
    }
    console.log(
      `${volumes.length} inline volumes of ${nodeId}${settings.delete ? "" : ", nothing was changed (--delete)"}`,
    );
    return failures === 0 ? 0 : 1;
  }, sweepText),

  simulate: command(
    "run a simulated storage cluster, to try and to test against",
    simulateOptions,
    async (settings) => {
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "simulator" });
      const stopped = untilStopped();
      if (settings.backend === "poseidon") {
        const { defaultPoseidonSettings, simulatePoseidon } = await import("./lib/sim/simulate_poseidon.ts");
        const simulator = await simulatePoseidon({
          ...defaultPoseidonSettings,
          host: settings.host,
          port: settings["dagent-port"],
          controlPort: settings["control-port"],
          arrays: settings.arrays,
          capacityBytes: settings.capacity,
          behaviour: { callMs: settings["call-ms"] },
          data: settings.data,
          stateDir: settings.state,
          devRoot: settings.dev,
          sysfsRoot: settings.sysfs,
        }, log);
        console.log(JSON.stringify(simulator.addresses));
        await stopped;
        await simulator.stop();
        return 0;
      }
      const { defaultSimulateSettings, simulate } = await import("./lib/sim/simulate.ts");
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
        inBandAuth: settings["in-band-auth"],
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

  attach: command("attach a volume to this machine by hand, and mount it", attachOptions, async (settings) => {
    const { mount, fs, format, "read-only": readOnly, address = [], discovery = [] } = settings;
    if (mount === undefined && (fs !== undefined || format || readOnly)) {
      throw new UsageError("--fs, --format and --read-only are for --mount, which is missing");
    }
    if (format && readOnly) throw new UsageError("--format and --read-only exclude each other");
    const needed = settings.attach === "direct" ? { address } : { discovery };
    for (const [name, list] of Object.entries(needed)) {
      if (settings.volume === undefined && settings.nqn !== undefined && list.length === 0) {
        throw new UsageError(
          `--${name} is missing: with --nqn and --attach=${settings.attach} it says where to connect`,
        );
      }
    }
    if (settings.attach !== "direct" && settings["dhchap-key-file"] !== undefined) {
      throw new UsageError(
        "--dhchap-key-file: with --attach=discovery-client the daemon has the keys, not this command",
      );
    }
    return await atShell("attach the volume", settings, async (ctx) => {
      const place = { addresses: address, discovery };
      await using work = await volumeWork(
        settings,
        ctx.log,
        place,
        settings["volume-attributes"],
        tuningOf(settings),
        await readKeys(settings),
      );
      if (format && work.hostEncryption !== undefined) {
        throw new UsageError(
          `--format: the volume is encrypted on its host (${work.hostEncryption}), not in clear text`,
        );
      }
      const { attachVolume } = await import("./lib/shell/attach.ts");
      const wish = mount === undefined ? undefined : { path: mount, fsType: fs, readOnly, format };
      const { device, mount: mounted } = await attachVolume(ctx, work.machine, work.wanted, wish);
      const { uuid, path, sizeBytes, subsystemNqn } = device;
      console.log(
        settings.json
          ? JSON.stringify({ uuid, device: path, sizeBytes: Number(sizeBytes), subsystemNqn, mount: mounted }, null, 2)
          : mounted === undefined
          ? path
          : `${path} ${mounted.path}`,
      );
    });
  }, attachText),

  detach: command(
    "undo lbcsi attach",
    volumeOptions,
    async (settings) =>
      await atShell("detach the volume", settings, async (ctx) => {
        await using work = await volumeWork(settings, ctx.log, { addresses: [], discovery: [] });
        const { detachVolume } = await import("./lib/shell/attach.ts");
        await detachVolume(ctx, work.machine, work.wanted, settings.mount);
      }),
    detachText,
  ),

  list: command(
    "show the volumes on this machine, their paths and mounts",
    listOptions,
    async (settings) =>
      await atShell("list volumes", { ...settings, timeout: 60 }, async (ctx) => {
        const { linuxHost } = await import("./lib/host/host.ts");
        const { listAsJson, listAsText, listVolumes } = await import("./lib/shell/list.ts");
        const listed = await listVolumes(ctx, {
          host: linuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev }),
          uuid: settings.uuid,
          all: settings.all,
          discoveryDirectory: settings["discovery-dir"],
        });
        if (settings.uuid !== undefined && listed.volumes.length === 0) {
          throw new StatusError("NOT_FOUND", `Cannot list volume ${settings.uuid}: it is not on this machine`);
        }
        console.log(settings.json ? listAsJson(listed) : listAsText(listed));
      }),
    listText,
  ),

  doctor: command(
    "say what is wrong with this machine and the cluster, before the first pod does",
    doctorOptions,
    async (settings) => {
      const machine = settings.checks === "cluster" ? undefined : machineOf(settings);
      return await atShell("look at this machine", settings, async (ctx) => {
        const { doctorAsJson, doctorAsText, examine, tally } = await import("./lib/shell/doctor.ts");
        const { linuxHost } = await import("./lib/host/host.ts");
        const host = linuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
        const reports = settings.checks === "machine" ? Promise.resolve([]) : systemReports(settings, ctx);
        const sections = await examine(ctx, machine === undefined ? undefined : { host, ...machine }, reports);
        await writeOut(`${settings.json ? doctorAsJson(sections) : doctorAsText(sections)}\n`);
        return tally(sections).problem === 0 ? 0 : 1;
      });
    },
    doctorText,
  ),

  "discovery-client": command(
    "keep this machine connected to what the files of a directory name, as the cluster moves",
    discoveryOptions,
    async (settings) => {
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "discovery-client" });
      const { discoveryDaemon } = await import("./lib/discovery/client.ts");
      const { linuxHost } = await import("./lib/host/host.ts");
      const { host: key, controller } = await readKeys(settings);
      const stop = new AbortController();
      const stopped = untilStopped().then((signal) => {
        log.info("stops on a signal", { name: signal });
        stop.abort();
      });
      const metrics = await serveMetrics(settings, "discovery-client", "lightos", log);
      const host = linuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
      if (metrics !== undefined) await measureMachine(metrics, host, "lightos");
      const daemon = discoveryDaemon({
        host,
        directory: settings["discovery-dir"],
        log,
        pollMs: settings.poll * 1000,
        controllerLossSeconds: settings["ctrl-loss-tmo"],
        keepAliveSeconds: settings["keep-alive-tmo"],
        ioQueues: settings["io-queues"] === 0 ? undefined : settings["io-queues"],
        keys: key === undefined ? undefined : { host: key, controller },
      });
      log.info("watches", { path: settings["discovery-dir"], version });
      // Kubernetes kills 30 s after SIGTERM unless the manifest says otherwise.
      await daemon.run(stop.signal, 25_000);
      await stopped;
      log.info("stopped");
      return 0;
    },
    discoveryText,
  ),

  completion: command(
    "print a script that lets a shell complete lbcsi's options",
    {
      shell: {
        word: true,
        value: "SHELL",
        meaning: "bash, zsh or fish",
        schema: z.enum(["bash", "zsh", "fish"], { error: "is not bash, zsh or fish" }),
      },
    },
    async ({ shell }) => {
      const { completionScript } = await import("./lib/shell/completion.ts");
      const described = Object.entries(commands).map(([name, { summary, options }]) => ({ name, summary, options }));
      await writeOut(completionScript(shell, described));
      return 0;
    },
    `bash:  source <(lbcsi completion bash)
zsh:   source <(lbcsi completion zsh), after compinit
fish:  lbcsi completion fish | source`,
  ),

  demo: command(
    "take volumes through their whole lives on a simulated cluster, with real file systems",
    {
      backend: { ...simulateOptions.backend, meaning: "what is played: lightos, poseidon (PoseidonOS)" },
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
    if (settings.backend === "poseidon") refusePoseidon(settings);
    refuseOutOfReach(settings);
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "identity" });
    return await serveCsi(settings, log, [], await serveMetrics(settings, "identity", settings.backend, log));
  }),
};

/** What the process is to measure of itself, served until it ends; undefined when nobody asked for it. */
async function serveMetrics(
  { "metrics-address": address }: Settings<typeof metricsOption>,
  role: string,
  backend: string,
  log: Logger,
): Promise<Metrics | undefined> {
  if (address === undefined) return undefined;
  const { cannotServe, Metrics, metricsResponse } = await import("./lib/metrics.ts");
  const metrics = new Metrics();
  metrics.gather(() => [
    ["lbcsi_build_info", [version, role, backend], 1],
    ["process_resident_memory_bytes", [], Deno.memoryUsage().rss],
    ["process_start_time_seconds", [], performance.timeOrigin / 1000],
  ]);
  const { hostname, port } = address;
  const where = (port: number) => `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
  try {
    const server = Deno.serve({ hostname, port, onListen: () => {} }, (request) => metricsResponse(metrics, request));
    server.unref();
    log.info("serves metrics", { address: where(server.addr.port) });
  } catch (error) {
    throw cannotServe(where(port), error);
  }
  return metrics;
}

async function measureMachine(
  metrics: Metrics,
  host: import("./lib/host/host.ts").Host,
  backend: keyof typeof driverNames,
): Promise<void> {
  const { machineSamples } = await import("./lib/host/measure.ts");
  metrics.gather(() => machineSamples(host, isSubsystemOf(backend)));
}

/** Serves CSI until SIGTERM or SIGINT, then lets running calls end. */
async function serveCsi(
  settings: Settings<typeof serviceOptions>,
  log: Logger,
  services: readonly import("./lib/rpc.ts").Service[],
  metrics: Metrics | undefined,
): Promise<number> {
  const { serve, service } = await import("./lib/rpc.ts");
  const { identityHandlers } = await import("./lib/csi/identity.ts");
  const { describeRequest, redactRequest } = await import("./lib/csi/request.ts");
  const { Identity } = await import("./proto/gen/csi_pb.ts");
  const stopped = untilStopped();
  const path = settings.endpoint;
  const snapshotMetadata = settings["snapshot-metadata"];
  const { backend } = settings;
  const identity = { name: driverNames[backend], version, expansion: grows(backend), snapshotMetadata };
  const server = await serve({
    listen: { path },
    services: [service(Identity, identityHandlers(identity)), ...services],
    log,
    describe: describeRequest,
    redact: redactRequest,
    ...(metrics === undefined ? {} : { observe: (await import("./lib/metrics.ts")).callObserver(metrics) }),
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

const exitStatusOf = { SIGINT: 130, SIGTERM: 143 } as const;

/** Work for a person at a shell: it ends at its timeout or with the first signal, but lets running changes finish. */
async function atShell(
  what: string,
  settings: Settings<typeof shellLogOptions> & { readonly timeout: number },
  work: (ctx: RequestContext) => Promise<number | void>,
): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]);
  const stop = new AbortController();
  let status = 0;
  for (const [signal, code] of Object.entries(exitStatusOf) as ["SIGINT" | "SIGTERM", number][]) {
    Deno.addSignalListener(signal, () => {
      // A command in the middle of a change is in a process group of its own and goes on.
      if (status !== 0) Deno.exit(status);
      status = code;
      stop.abort(
        new StatusError("CANCELLED", `Cannot ${what}: interrupted, what has been done stays and may be repeated`),
      );
    });
  }
  try {
    return await work(backgroundContext(what, log, settings.timeout * 1000, stop.signal)) ?? 0;
  } catch (error) {
    if (status === 0 || !hasCode(error, "CANCELLED")) throw error;
    console.error(`lbcsi: ${error.message}`);
    return status;
  }
}

/** What the doctor is told of this machine. */
function machineOf(settings: Settings<typeof doctorOptions>): Omit<MachineOptions, "host"> {
  const { backend, "node-id": nodeId } = settings;
  const problem = nodeId === undefined ? undefined : nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  if (backend === "poseidon") refusePoseidon({ attach: settings.attach });
  return {
    nodeId,
    attach: settings.attach ?? (backend === "poseidon" ? "direct" : "discovery-client"),
    discoveryDirectory: settings["discovery-dir"],
    kubeletDirectory: settings["kubelet-dir"],
    maxVolumes: settings["max-volumes"],
    isOurs: isSubsystemOf(backend),
    defaultFsType: settings["default-fs"],
  };
}

/** What the storage systems say of themselves that the options name. */
async function systemReports(
  settings: Settings<typeof doctorOptions>,
  ctx: RequestContext,
): Promise<readonly SystemReport[]> {
  const { backend, config, "mgmt-endpoint": endpoints, "node-id": nodeId } = settings;
  if (config === undefined && endpoints === undefined) {
    if (settings.checks === "cluster") throw new UsageError("--checks cluster needs --config or --mgmt-endpoint");
    const check = { name: "cluster", verdict: "not checked", found: "neither --config nor --mgmt-endpoint is given" };
    const nothing = { addresses: [], discovery: [], connected: undefined, inBandAuth: undefined };
    return [{ name: "cluster", checks: [check as Check], ...nothing }];
  }
  if (backend === "poseidon") {
    // Of a node it refuses a cluster file, which is here for the cluster's sake.
    const { "node-id": _node, ...others } = settings;
    refusePoseidon(others);
    useNoProxy();
    const { poseidonReports } = await import("./lib/storage/poseidon_checkup.ts");
    const [endpoint, ...surplus] = endpoints ?? [];
    if (surplus.length > 0) throw new UsageError("--mgmt-endpoint: a PoseidonOS has one DAgent");
    return await poseidonReports(ctx, await poseidonSystems(settings, ctx.log), endpoint);
  }
  const { lightosReports } = await import("./lib/storage/lightos_checkup.ts");
  const options = await lightosOptions(settings, ctx.log);
  // Once: a token that comes through a pipe (/dev/stdin) can be read once.
  const jwt = options.globalJwt();
  return await lightosReports(
    ctx,
    { ...options, globalJwt: () => jwt },
    endpoints === undefined ? undefined : { endpoints, scheme: settings["mgmt-scheme"] },
    new Secrets(settings.secrets === undefined ? {} : await readSecrets(settings.secrets)),
    nodeId === undefined ? undefined : hostNqn(nodeId),
  );
}

/** What attach and detach work with: this machine, and the volume that the options name. */
async function volumeWork(
  settings: Settings<typeof volumeOptions>,
  log: Logger,
  addresses: { readonly addresses: readonly TransportAddress[]; readonly discovery: readonly TransportAddress[] },
  volumeContext: Readonly<Record<string, string>> = {},
  tuning: import("./lib/host/nvme.ts").ConnectionTuning = {},
  keys: import("./lib/dhchap.ts").GivenKeys = { host: undefined, controller: undefined },
) {
  const { volume, uuid, nqn, "node-id": nodeId, ...rest } = settings;
  const problem = nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  if (volume === undefined ? uuid === undefined || nqn === undefined : uuid !== undefined || nqn !== undefined) {
    throw new UsageError("either VOLUME_ID or both --uuid and --nqn are needed");
  }
  const { linuxHost } = await import("./lib/host/host.ts");
  const { KeyedLock } = await import("./lib/lock.ts");
  const host = linuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
  const attacher = await attacherOf(settings, host, new KeyedLock(), tuning);
  const discoveryDirectory = settings.attach === "direct" ? settings["discovery-dir"] : undefined;
  const machine = { host, attacher, hostNqn: hostNqn(nodeId), discoveryDirectory };
  const kind = authOf(keys);
  await using ending = new AsyncDisposableStack();
  let wanted: import("./lib/shell/attach.ts").Wanted;
  if (volume !== undefined) {
    const secrets = settings.secrets === undefined ? {} : await readSecrets(settings.secrets);
    wanted = {
      backend: ending.use(
        // An ID says whose it is.
        volume.startsWith("pos:") ? await openPoseidon(rest, log) : await openLightos(settings, log),
      ),
      volumeId: volume,
      volumeContext: kind === undefined ? volumeContext : { [inBandAuthKey]: kind, ...volumeContext },
      // What the options say goes before what the file of secrets says, and has to pass the same checks.
      secrets: new Secrets({
        ...secrets,
        ...(keys.host === undefined ? {} : { "dhchap-key": keys.host.reveal() }),
        ...(keys.controller === undefined ? {} : { "dhchap-ctrl-key": keys.controller.reveal() }),
      }),
    };
  } else {
    wanted = {
      namespace: {
        uuid: uuid ?? "",
        subsystemNqn: nqn ?? "",
        ...addresses,
        ...(kind === undefined ? {} : { inBandAuth: kind }),
      },
      keys,
    };
  }
  const hostEncryption = volume?.startsWith("mgmt:") ? parseVolumeId(volume).hostEncryption : undefined;
  const owned = ending.move();
  return { machine, wanted, hostEncryption, [Symbol.asyncDispose]: () => owned.disposeAsync() };
}

/** The keys in the files that the options name; what is wrong with one is told without a word of it. */
async function readKeys(
  settings: Settings<typeof keyOptions>,
): Promise<import("./lib/dhchap.ts").GivenKeys> {
  const { DhchapKey } = await import("./lib/dhchap.ts");
  const read = (option: keyof typeof keyOptions) => {
    const path = settings[option];
    if (path === undefined) return undefined;
    const refuse = (problem: string) => new UsageError(`--${option} "${path}": ${problem}`);
    const text = readRequired(`--${option}`, path);
    const mode = statSync(path).mode & 0o777;
    if ((mode & 0o077) !== 0) {
      throw refuse(`others than its owner may use it (mode ${mode.toString(8)}), take that away (chmod 600)`);
    }
    try {
      return DhchapKey.parse(text);
    } catch (error) {
      throw refuse(`its content ${messageOf(error)}`);
    }
  };
  const keys = { host: read("dhchap-key-file"), controller: read("dhchap-ctrl-key-file") };
  if (keys.controller !== undefined && keys.host === undefined) {
    throw new UsageError("--dhchap-ctrl-key-file: --dhchap-key-file is missing, which proves the host");
  }
  return keys;
}

/** What a volume says of its connections that are made with these keys. */
function authOf({ host, controller }: import("./lib/dhchap.ts").GivenKeys) {
  return host === undefined ? undefined : controller === undefined ? "unidirectional" : "bidirectional";
}

async function readSecrets(path: string): Promise<Readonly<Record<string, string>>> {
  const { parseSecretFile } = await import("./lib/shell/secret_file.ts");
  const text = readRequired("--secrets", path);
  try {
    return parseSecretFile(text);
  } catch (error) {
    throw error instanceof StatusError ? new UsageError(`--secrets "${path}": ${error.message}`) : error;
  }
}

async function attacherOf(
  settings: Settings<Pick<typeof nodeOptions, "attach" | "discovery-dir" | "node-id">>,
  host: import("./lib/host/host.ts").Host,
  locks: import("./lib/lock.ts").KeyedLock,
  tuning: import("./lib/host/nvme.ts").ConnectionTuning,
) {
  const { direct, discoveryClient, hostIdOf } = await import("./lib/host/attach.ts");
  const nodeId = settings["node-id"];
  return settings.attach === "direct"
    ? direct({ host, hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId), locks, tuning })
    : discoveryClient({ host, hostNqn: hostNqn(nodeId), directory: settings["discovery-dir"] });
}

function tuningOf(settings: Settings<typeof connectionOptions>): import("./lib/host/nvme.ts").ConnectionTuning {
  return {
    controllerLossSeconds: settings["ctrl-loss-tmo"],
    reconnectDelaySeconds: settings["reconnect-delay"],
    keepAliveSeconds: settings["keep-alive-tmo"],
    fastIoFailSeconds: settings["fast-io-fail-tmo"],
    ioQueues: settings["nr-io-queues"],
    queueSize: settings["queue-size"],
  };
}

// The kernel gives a connection up after minutes, so nobody is in a hurry.
const tendEveryMs = 10_000;
const longestTendMs = 300_000;

/** Looks after the connections from time to time, until it is disposed. */
function tending(attacher: import("./lib/host/attach.ts").Attacher, log: Logger): Disposable {
  const stop = new AbortController();
  const tend = async () => {
    while (attacher.tend !== undefined) {
      await sleep(tendEveryMs, stop.signal);
      using limit = timeLimit(stop.signal, longestTendMs);
      try {
        await attacher.tend(requestContext(limit.signal, new Date(Date.now() + longestTendMs), log));
      } catch (error) {
        stop.signal.throwIfAborted();
        log.warning("could not look after the connections", { error: messageOf(error) });
      }
    }
  };
  tend().catch((error) => {
    if (!stop.signal.aborted) log.error("looks after no connections any more", { error: messageOf(error) });
  });
  return { [Symbol.dispose]: () => stop.abort() };
}

type LightosSettings = Settings<Pick<typeof controllerOptions, "mgmt-ca" | "mgmt-tls-verify" | "config">> & {
  readonly "jwt-path"?: string;
};

async function openLightos(settings: LightosSettings, log: Logger, metrics?: Metrics) {
  const { lightosBackend } = await import("./lib/storage/lightos.ts");
  if (!settings["mgmt-tls-verify"]) log.warning("does not verify the certificates of management endpoints");
  return lightosBackend({ ...await lightosOptions(settings, log), metrics });
}

/** Without `jwt-path`, tokens come from calls and from the cluster file. */
async function lightosOptions(settings: LightosSettings, log: Logger): Promise<LightosOptions> {
  const jwtPath = settings["jwt-path"];
  return {
    log,
    globalJwt: () => jwtPath === undefined ? undefined : readIfThere(jwtPath),
    globalJwtPath: jwtPath ?? "file of a token",
    ca: settings["mgmt-ca"] === undefined ? machineCa() : readRequired("--mgmt-ca", settings["mgmt-ca"]),
    verifyTls: settings["mgmt-tls-verify"],
    userAgent: `lbcsi/${version}`,
    clusters: settings.config === undefined ? undefined : await readClusters(settings.config, log),
  };
}

/** Where distributions keep the certificates that a machine trusts: Debian, Alpine; Fedora; SUSE; BSD, Alpine. */
const machineCaFiles = [
  "/etc/ssl/certs/ca-certificates.crt",
  "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem",
  "/etc/ssl/cert.pem",
];

/** The CAs that this machine trusts; undefined, for the list in the program, on one that has none, like the image. */
function machineCa(): string | undefined {
  const named = Deno.env.get("SSL_CERT_FILE");
  if (named !== undefined && named !== "") return readRequired("SSL_CERT_FILE", named);
  return machineCaFiles.map(readIfThere).find((text) => text?.includes("-----BEGIN CERTIFICATE-----"));
}

/**
 * The executable for controllers may use few directories: said at start, with what is wrong, and not as a token that is
 * not found when the first volume is asked for.
 */
function refuseOutOfReach(
  settings:
    & Pick<Settings<typeof serviceOptions>, "endpoint" | "backend">
    & Partial<Pick<Settings<typeof controllerOptions>, "jwt-path" | "mgmt-ca" | "config">>,
): void {
  const { endpoint, backend, "jwt-path": jwt, "mgmt-ca": ca, config } = settings;
  const uses = [
    ["endpoint", endpoint, "write"],
    ["jwt-path", backend === "poseidon" ? undefined : jwt, "read"],
    ["mgmt-ca", ca, "read"],
    ["config", config, "read"],
  ] as const;
  const problems = uses.flatMap(([option, path, name]) =>
    path === undefined || Deno.permissions.querySync({ name, path }).state === "granted"
      ? []
      : [`--${option} "${path}": this executable was built without the right to ${name} there`]
  );
  if (problems.length > 0) throw new UsageError(problems.join("\n"));
}

/** Whether volumes of a storage system can grow, for the processes that do not open it. */
function grows(backend: keyof typeof driverNames): boolean {
  return backend === "lightos";
}

/** What has no sense with PoseidonOS is refused, for who gives it expects something of it. */
function refusePoseidon(
  settings: Partial<Settings<typeof controllerOptions> & Pick<Settings<typeof nodeOptions>, "attach" | "node-id">>,
): void {
  const jwtPath = settings["jwt-path"] ?? controllerOptions["jwt-path"].fallback;
  const http = "its management API is plain HTTP";
  const problems = ([
    [settings["snapshot-metadata"], "--snapshot-metadata", "it has no snapshots"],
    [settings["mgmt-ca"] !== undefined, "--mgmt-ca", http],
    [settings["mgmt-tls-verify"] === false, "--mgmt-tls-verify", http],
    [jwtPath !== controllerOptions["jwt-path"].fallback, "--jwt-path", "it takes no tokens"],
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

async function openPoseidon(settings: Parameters<typeof refusePoseidon>[0], log: Logger, metrics?: Metrics) {
  refusePoseidon(settings);
  useNoProxy();
  const systems = await poseidonSystems(settings, log);
  const { poseidonBackend } = await import("./lib/storage/poseidon.ts");
  return poseidonBackend({ log, systems, metrics });
}

async function poseidonSystems({ config }: { readonly config?: string | undefined }, log: Logger) {
  if (config === undefined) return undefined;
  const { knownSystems } = await import("./lib/storage/poseidon_config.ts");
  return asUsage(() => knownSystems(config, configFiles, log));
}

/** For DAgent. */
function useNoProxy(): void {
  // fetch would send every call to a proxy, a request for volumes among them; this process has nothing else to fetch.
  for (const name of ["http_proxy", "all_proxy"]) {
    for (const variable of [name, name.toUpperCase()]) Deno.env.delete(variable);
  }
}

/** Writes all of a long text; a reader who has had enough (`| head`) is no failure. */
async function writeOut(text: string): Promise<void> {
  try {
    await new Blob([text]).stream().pipeTo(Deno.stdout.writable, { preventClose: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.BrokenPipe)) throw error;
  }
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

const configFiles = {
  stamp(path: string): string {
    const { dev, ino, size, mtimeNs, ctimeNs } = statSync(path, { bigint: true });
    return [dev, ino, size, mtimeNs, ctimeNs].join(" ");
  },
  read: (path: string) => readFileSync(path, "utf8"),
};

async function readClusters(path: string, log: Logger) {
  const { knownClusters } = await import("./lib/storage/lightos_config.ts");
  return asUsage(() => knownClusters(path, configFiles, log));
}

/** A file that cannot be used at start is a mistake on the command line. */
function asUsage<T>(read: () => T): T {
  try {
    return read();
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

/** What was built or, in a checkout, what is there: with `-dirty` when files differ from it. */
function commit(): string | undefined {
  if (typeof LBCSI_COMMIT === "string") return LBCSI_COMMIT;
  const directory = import.meta.dirname;
  try {
    // Without this, git would tell of a repository that these files merely lie in.
    if (directory === undefined || !statSync(`${directory}/.git`)) return undefined;
    const { success, stdout } = new Deno.Command("git", {
      args: ["-C", directory, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
      stderr: "null",
    }).outputSync();
    return success ? new TextDecoder().decode(stdout).trim() : undefined;
  } catch {
    return undefined; // No checkout, or no git.
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
    console.log(`lbcsi ${version} (commit ${commit() ?? "unknown"}, CSI 1.12, Deno ${Deno.version.deno})`);
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

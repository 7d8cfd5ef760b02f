/**
 * The options of each subcommand: their names, variables, defaults and meanings, and the text of `--help` around them. What
 * becomes of them is for main.ts.
 */
import * as z from "zod";
import { logLevels } from "../context.ts";
import { type Endpoint, parseEndpoints, schemes } from "../volume_id.ts";
import { parseAddress, type TransportAddress } from "../namespace.ts";
import { absolutePath, listenAddress, type Options, switchSchema, unixEndpoint, wholeNumber } from "./options.ts";

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

export const metricsOption = {
  "metrics-address": {
    env: ["LB_CSI_METRICS_ADDRESS"],
    value: "HOST:PORT",
    meaning: "serve metrics over plain HTTP at /metrics, to whoever comes there; default: nowhere",
    schema: listenAddress.optional(),
  },
} as const satisfies Options;

export const serviceOptions = {
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

export const controllerOptions = {
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
  "jwt-for-any-endpoint": {
    env: ["LB_CSI_JWT_FOR_ANY_ENDPOINT"],
    meaning:
      "send the token of --jwt-path to every endpoint that a StorageClass or volume ID names, over clear text too; " +
      "default: over TLS only, to clusters of --config and to servers whose certificate --mgmt-ca verifies",
    schema: switchSchema,
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
// (docs/reference/lightos-api.md 12.2); the kernel's keep-alive of 5 s is short for a cluster that moves a volume.
export const connectionOptions = {
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

export const nodeOptions = {
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
  "luks-iter-time": {
    env: ["LB_CSI_LUKS_ITER_TIME"],
    fallback: "2000",
    value: "MS",
    meaning:
      "how long the key of a new volume takes to make of its passphrase, at each opening; 100 will do for random passphrases",
    schema: wholeNumber(10, 60_000),
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
  "allow-system-paths": {
    env: ["LB_CSI_ALLOW_SYSTEM_PATHS"],
    meaning:
      "mount volumes in directories of the operating system too (/etc, /usr …), where no orchestrator keeps them",
    schema: switchSchema,
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

export const shellLogOptions = {
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
  "log-fmt": { ...logOptions["log-fmt"], fallback: "text" },
} as const satisfies Options;

export const volumeOptions = {
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
export const keyOptions = {
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

export const attachOptions = {
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

export const discoveryOptions = {
  "discovery-dir": {
    ...nodeOptions["discovery-dir"],
    meaning: "directory whose files say what to connect; it has to exist",
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

export const discoveryText =
  `Takes the same files as LightOS' Discovery-Client, one per volume with --attach=discovery-client, and stands in its place
on a machine that has only lbcsi and nvme-cli. It connects to the discovery controllers that the files name, and to every
I/O controller that these list for the subsystems in the files; follows changes and referrals; and lets go of a subsystem
that no file names any more, as soon as nothing uses it. It takes over the connections that are there when it starts, and
leaves them when it ends (SIGTERM): I/O goes on meanwhile.`;

export const listOptions = {
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

export const doctorOptions = {
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

export const doctorText =
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

export const attachText = `usage: lbcsi attach VOLUME_ID --node-id ID [--mount DIR [--format] [--read-only]] ...
       lbcsi attach --uuid UUID --nqn NQN --address IP[:PORT],... --node-id ID ...

Connects this machine to a volume as the node plugin does, without an orchestrator, and prints its block device. It may be
repeated. A volume that another host has access to is refused; so is anything that would overwrite what is on it: only
--format makes a file system, and only on a device that was read and found blank.

${statusText}`;

export const detachText = `usage: lbcsi detach VOLUME_ID --node-id ID [--mount DIR] ...
       lbcsi detach --uuid UUID --nqn NQN --node-id ID [--mount DIR] ...

Undoes lbcsi attach with the same VOLUME_ID (or --uuid and --nqn), --mount, --attach and --node-id: unmounts, disconnects
unless another volume of the subsystem is here, and takes this host's access away. It refuses while anything else uses the
volume, works on any leftover, and may be repeated.

${statusText}`;

export const listText =
  `Shows volumes with device, paths and mounts, from sysfs and the mount table. It does not hang on a dead path: a device is
read only when it has a live one, for two seconds at most. With --dev and --sysfs it shows what is of that tree.

Exit status: 0, or 1 when it failed or --uuid names a volume that is not here, 2 for bad options.`;

/** `10Gi`, `2Ti` or bytes. */
const sizeSchema = z.string().regex(/^[1-9]\d{0,17}(?:[KMGTP]i)?$/, "is not a size such as 500Gi, 16Ti or bytes")
  .transform((text) => {
    const power = " KMGTP".indexOf(text.replace(/[\di]/g, "") || " ");
    return BigInt(text.replace(/\D/g, "")) << BigInt(10 * power);
  });

export const sweepOptions = {
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

export const sweepText =
  `A pod's inline volume is removed by the node that made it, after the pod, or when that node starts again. A node that
never comes back leaves its volumes; this lists them, and with --delete removes them with everything in them.

Be sure that the node is dead, and not merely out of Kubernetes' sight: a pod that still runs there loses its data. A volume
that the cluster shows as connected to the node is refused. Removing takes the node's access away first.`;

const port = wholeNumber(0, 65535);
const delayMs = wholeNumber(0, 3_600_000);

export const simulateOptions = {
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

export const simulateText =
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
                         (all of them: the head of lib/simulator/control.ts)

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
                         (all of them: the head of lib/simulator/poseidon/control.ts)

lbcsi demo does all of this by itself.`;

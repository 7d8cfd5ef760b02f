/**
 * The options that several commands share, in groups: names, variables, defaults and meanings. Options of one command are
 * in the file of that command.
 */
import * as z from "zod";
import { logLevels } from "../log.ts";
import { backendNames } from "./backends.ts";
import { absolutePath, listenAddress, switchSchema, unixEndpoint, wholeNumber } from "./option_schemas.ts";
import type { Options } from "./options.ts";

/** Level and format of the log of a process that runs for long. */
export const logOptions = {
  "log-level": {
    short: "l",
    env: ["LB_CSI_LOG_LEVEL"],
    fallback: "info",
    value: "LEVEL",
    meaning: `lowest level that is written: ${logLevels.join(", ")}`,
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

/** The same for a command at a shell, whose log is read by a person. */
export const shellLogOptions = {
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
  "log-fmt": { ...logOptions["log-fmt"], fallback: "text" },
} as const satisfies Options;

/** Where metrics are served. */
export const metricsOption = {
  "metrics-address": {
    env: ["LB_CSI_METRICS_ADDRESS"],
    value: "HOST:PORT",
    meaning: "serve metrics over plain HTTP at /metrics, without authentication; default: not served",
    schema: listenAddress.optional(),
  },
} as const satisfies Options;

/** Options of every process that serves CSI. */
export const serviceOptions = {
  endpoint: {
    short: "e",
    env: ["CSI_ENDPOINT"],
    fallback: "unix:///tmp/csi.sock",
    value: "URL",
    meaning: "socket to serve CSI on; its directory is created (mode 0750) if the parent directory exists",
    schema: unixEndpoint,
  },
  backend: {
    env: ["LB_CSI_BACKEND"],
    fallback: "lightos",
    value: "NAME",
    meaning: "storage system of this deployment, the same for controller and node: lightos, poseidon (PoseidonOS)",
    schema: z.enum(backendNames, { error: `is not ${backendNames.join(" or ")}` }),
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

/** Options that controller and node have in common, with the same values. */
export const controllerAndNodeOptions = {
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
    meaning: "suffix of every node ID of this deployment; other IDs are rejected as unknown nodes",
    schema: z.string(),
  },
} as const satisfies Options;

/** How certificates of management endpoints are verified. */
export const trustOptions = {
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
    meaning: "false accepts any certificate of a management endpoint: an attacker on the way can read the token",
    schema: z.enum(["true", "false"], { error: "is not true or false" }).transform((text) => text === "true"),
  },
} as const satisfies Options;

/** The token for the management API. */
export const tokenOption = {
  "jwt-path": {
    short: "j",
    env: ["LB_CSI_JWT_PATH"],
    fallback: "/etc/lb-csi/jwt",
    value: "FILE",
    meaning: "token for calls without one in their secrets; read at each use, so the file may change or appear later",
    schema: absolutePath,
  },
} as const satisfies Options;

/** The cluster file. */
export const clusterFileOption = {
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning:
      "clusters whose volumes and capacity are reported, and new endpoints for those in old volume IDs; read again on change",
    schema: absolutePath.optional(),
  },
} as const satisfies Options;

/**
 * How connections to subsystems are made. The timeouts of 600 and 10 s are those of LightOS' own Discovery-Client
 * (docs/reference/lightos-api.md 12.2); the kernel's keep-alive of 5 s is too short for a cluster that moves a volume.
 */
export const connectionOptions = {
  "ctrl-loss-tmo": {
    env: ["LB_CSI_CTRL_LOSS_TMO"],
    fallback: "600",
    value: "SECONDS",
    meaning:
      "with --attach=direct: time after which a lost connection is given up, and I/O fails if it was the last one; " +
      "-1: never, and a pod whose volume is lost for good hangs until an operator disconnects it",
    schema: z.union([z.literal("-1").transform(Number), wholeNumber(1, 86_400)], {
      error: "is neither -1 nor a whole number from 1 to 86400",
    }),
  },
  "keep-alive-tmo": {
    env: ["LB_CSI_KEEP_ALIVE_TMO"],
    fallback: "10",
    value: "SECONDS",
    meaning: "with --attach=direct: time after which a silent connection counts as lost",
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
    meaning: "with --attach=direct: time without any connection after which I/O fails, instead of waiting for " +
      "--ctrl-loss-tmo; file systems then have errors; default: off",
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

/** Which node this machine is, how it attaches volumes, and where its devices appear. */
export const hostOptions = {
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
      "what connects to subsystems: discovery-client (a daemon that reads the files of this driver; default with " +
      "LightOS), direct (nvme-cli; the only one with PoseidonOS)",
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
} as const satisfies Options;

/** How many volumes the node can take. */
export const maxVolumesOption = {
  "max-volumes": {
    env: ["LB_CSI_MAX_VOLUMES"],
    fallback: "0",
    value: "COUNT",
    meaning:
      "number of volumes that this node can take, reported to the orchestrator and enforced; 0: the orchestrator decides",
    schema: wholeNumber(0, 100_000),
  },
} as const satisfies Options;

/** Where kubelet keeps its files. */
export const kubeletDirectoryOption = {
  "kubelet-dir": {
    env: ["LB_CSI_KUBELET_DIR"],
    fallback: "/var/lib/kubelet",
    value: "DIR",
    meaning: "kubelet's directory; not checked where there is none",
    schema: absolutePath,
  },
} as const satisfies Options;

/** Which storage system is simulated. */
export const simulatedBackendOption = {
  backend: {
    fallback: "lightos",
    value: "NAME",
    meaning: "what is simulated: lightos, poseidon (PoseidonOS)",
    schema: z.enum(backendNames, { error: `is not ${backendNames.join(" or ")}` }),
  },
} as const satisfies Options;

/** Which volume, and as which node: options of attach and detach. */
export const volumeOptions = {
  volume: {
    word: true,
    value: "VOLUME_ID",
    meaning: "volumeHandle of the PersistentVolume; the cluster grants access and says where the volume is",
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
    meaning: "attach: directory to mount the volume at, which has to exist; detach: unmount it there first",
    schema: absolutePath.optional(),
  },
  "jwt-path": { ...tokenOption["jwt-path"], meaning: "token for the management API" },
  secrets: {
    value: "FILE",
    meaning: "more secrets, one key=value per line, with the keys of the Kubernetes Secret: jwt, ...",
    schema: absolutePath.optional(),
  },
  "mgmt-ca": trustOptions["mgmt-ca"],
  "mgmt-tls-verify": trustOptions["mgmt-tls-verify"],
  config: { ...clusterFileOption.config, meaning: "cluster file: new endpoints for those in old volume IDs" },
  "node-id": hostOptions["node-id"],
  attach: { ...hostOptions.attach, fallback: "direct" },
  "discovery-dir": hostOptions["discovery-dir"],
  sysfs: hostOptions.sysfs,
  dev: hostOptions.dev,
  timeout: {
    value: "SECONDS",
    fallback: "60",
    meaning: "how long it may take; a program that is changing something may finish",
    schema: wholeNumber(1, 86_400),
  },
  ...shellLogOptions,
} as const satisfies Options;

/** Keys are read from files, because every user of the machine can read arguments. */
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
    meaning: "with --dhchap-key-file: the controller has to authenticate too, with the key in this file",
    schema: absolutePath.optional(),
  },
} as const satisfies Options;

/** End of the help of attach and detach. */
export const exitStatusText =
  `Exit status: 0 done (also when there was nothing to do), 1 failed, 2 bad options, 130 after Ctrl-C, 143 after SIGTERM.
A signal never interrupts a program that formats, mounts or connects; a second one leaves it running and returns at once.`;

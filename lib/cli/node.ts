/** `lbcsi node`: serves the CSI identity and node services. */
import * as z from "zod";
import { StatusError } from "../error.ts";
import type { Attacher } from "../host/attach/attacher.ts";
import type { Host } from "../host/host.ts";
import type { LuksSettings } from "../host/luks.ts";
import type { KeyedLock } from "../lock.ts";
import { createLogger } from "../log.ts";
import { nodeIdProblem } from "../namespace.ts";
import { attachMode, isSubsystemOf, storageSystems } from "./backends.ts";
import { defineCommand, type ListCommands } from "./command.ts";
import { assertBackendOptions, connectionTuning, createAttacher, nodeOpeners } from "./compose.ts";
import { assertDiscoveryDirectory } from "./discovery_directory.ts";
import { logMachineProblems } from "./machine_problems.ts";
import {
  connectionOptions,
  controllerAndNodeOptions,
  hostOptions,
  maxVolumesOption,
  serviceOptions,
  trustOptions,
} from "./option_groups.ts";
import { absolutePath, switchSchema, wholeNumber } from "./option_schemas.ts";
import { type Options, type Settings, UsageError } from "./options.ts";
import { reconcileRegularly } from "./reconcile.ts";
import { serveCsi } from "./serve_csi.ts";
import { gatherMachineMetrics, serveMetrics } from "./serve_metrics.ts";
import { warnOfUnknownVariables } from "./unknown_variables.ts";

/** The options of `lbcsi node`. */
export const nodeOptions = {
  ...serviceOptions,
  ...controllerAndNodeOptions,
  ...trustOptions,
  ...connectionOptions,
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning:
      "the controller's cluster file: its clusters may allow inline volumes; its tokens are used to read in-band-auth keys",
    schema: absolutePath.optional(),
  },
  ...hostOptions,
  "luks-cipher": {
    env: ["LB_CSI_LUKS_CIPHER"],
    fallback: "aes-xts-plain64",
    value: "CIPHER",
    meaning: "cipher of new volumes with host encryption, as cryptsetup names it",
    schema: z.string().regex(/^[a-z0-9][a-z0-9:-]{0,63}$/, "is not the name of a cipher"),
  },
  "luks-key-size": {
    env: ["LB_CSI_LUKS_KEY_SIZE"],
    fallback: "512",
    value: "BITS",
    meaning: "key size of new volumes; XTS halves it: 512 is AES-256, 256 is AES-128",
    schema: z.enum(["128", "256", "512"], { error: "is not 128, 256 or 512" }).transform(Number),
  },
  "luks-pbkdf": {
    env: ["LB_CSI_LUKS_PBKDF"],
    fallback: "argon2id",
    value: "PBKDF",
    meaning: "how the key of a new volume is derived from the passphrase: argon2id, pbkdf2",
    schema: z.enum(["argon2id", "pbkdf2"], { error: "is not argon2id or pbkdf2" }),
  },
  "luks-pbkdf-memory": {
    env: ["LB_CSI_LUKS_PBKDF_MEMORY"],
    fallback: "65535",
    value: "KIB",
    meaning: "memory limit of argon2id: every node that opens the volume needs as much",
    schema: wholeNumber(32, 4 << 20),
  },
  "luks-iter-time": {
    env: ["LB_CSI_LUKS_ITER_TIME"],
    fallback: "2000",
    value: "MS",
    meaning:
      "how long it takes to derive the key of a new volume, at each opening; 100 is enough for random passphrases",
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
    meaning: "pass discards on to the cluster, which then sees which blocks are unused",
    schema: switchSchema,
  },
  ...maxVolumesOption,
  "allow-system-paths": {
    env: ["LB_CSI_ALLOW_SYSTEM_PATHS"],
    meaning:
      "also mount volumes in directories of the operating system (/etc, /usr …), where no orchestrator puts them",
    schema: switchSchema,
  },
} as const satisfies Options;

/** `lbcsi node`. */
export const nodeCommand = defineCommand(nodeOptions, run);

type NodeSettings = Settings<typeof nodeOptions>;

async function run(settings: NodeSettings, listCommands: ListCommands): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "node" });
  await warnOfUnknownVariables(log, nodeOptions, listCommands);
  assertNodeSettings(settings);
  const { sweepUntilSettled } = await import("../csi/inline/sweep.ts");
  const { createLinuxHost } = await import("../host/linux_host.ts");
  const { KeyedLock } = await import("../lock.ts");
  const { service } = await import("../grpc/server.ts");
  const { Node } = await import("../../proto/gen/csi_pb.ts");
  const metrics = await serveMetrics(settings, "node", settings.backend, log);
  const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
  metrics?.gather(() => [["lbcsi_volumes_limit", [], settings["max-volumes"]]]);
  if (metrics !== undefined) await gatherMachineMetrics(metrics, host, settings.backend);
  const locks = new KeyedLock();
  const attacher = await createAttacher(
    { ...settings, attach: attachMode(settings) },
    { host, locks, tuning: connectionTuning(settings) },
  );
  // The parts that call the cluster are loaded only by nodes that make inline volumes, or when keys are asked for.
  await using opened = new AsyncDisposableStack();
  const open = nodeOpeners[settings.backend];
  let opening: ReturnType<NonNullable<typeof open>> | undefined;
  const openCluster = open && (() => opening ??= open(settings, log, metrics).then((backend) => opened.use(backend)));
  const { handlers, inline } = await createNodeService(settings, { host, attacher, locks, openCluster });
  const stopping = new AbortController();
  const sweep = sweepUntilSettled(inline, log, stopping.signal);
  using _reconciliation = reconcileRegularly(attacher, log);
  const onServing = () => void logMachineProblems(settings, log, stopping.signal);
  try {
    return await serveCsi({ settings, log, services: [service(Node, handlers)], metrics, onServing });
  } finally {
    stopping.abort(new StatusError("CANCELLED", "Cannot go on: the node service is stopping"));
    await sweep;
  }
}

function assertNodeSettings(settings: NodeSettings): void {
  const { "node-id": nodeId, "node-id-suffix": suffix } = settings;
  const problem = nodeIdProblem(nodeId) ??
    (nodeId.endsWith(suffix) ? undefined : `it does not end in "${suffix}" (see --node-id-suffix)`);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  assertBackendOptions(settings.backend, settings);
  if (attachMode(settings) === "discovery-client") assertDiscoveryDirectory(settings["discovery-dir"]);
}

/** What the node service is built from. */
interface NodeServiceParts {
  readonly host: Host;
  readonly attacher: Attacher;
  readonly locks: KeyedLock;
  /** Undefined: the storage system has neither inline volumes nor keys of connections. */
  readonly openCluster: (() => ReturnType<NonNullable<typeof nodeOpeners[keyof typeof nodeOpeners]>>) | undefined;
}

async function createNodeService(settings: NodeSettings, { host, attacher, locks, openCluster }: NodeServiceParts) {
  const { inlineVolumes } = await import("../csi/inline/inline_volumes.ts");
  const { volumeLimit } = await import("../csi/node/limit.ts");
  const { nodeHandlers } = await import("../csi/node/service.ts");
  const { backend, "node-id": nodeId, "default-fs": defaultFsType, "allow-system-paths": allowSystemPaths } = settings;
  const volumes = settings.config === undefined ? undefined : (await openCluster?.())?.inline;
  const limit = volumeLimit(host, settings["max-volumes"], isSubsystemOf(backend));
  const inline = inlineVolumes({ host, attacher, locks, nodeId, defaultFsType, volumes, limit, allowSystemPaths });
  const handlers = nodeHandlers({
    host,
    attacher,
    locks,
    nodeId,
    inline,
    defaultFsType,
    maxVolumes: settings["max-volumes"],
    limit,
    allowSystemPaths,
    luks: luksFormat(settings),
    parseId: storageSystems[backend].parseId,
    canExpand: storageSystems[backend].canExpand,
    volumeHealth: settings["csi-1.13"],
    ...(openCluster === undefined ? {} : {
      authentication: { keysOf: async (...args) => await (await openCluster()).authentication.keysOf(...args) },
    }),
  });
  return { handlers, inline };
}

/** How new volumes with host encryption are formatted. */
function luksFormat(settings: NodeSettings): LuksSettings {
  return {
    cipher: settings["luks-cipher"],
    keyBits: settings["luks-key-size"],
    pbkdf: settings["luks-pbkdf"],
    pbkdfMemoryKib: settings["luks-pbkdf-memory"],
    iterMs: settings["luks-iter-time"],
    sectorBytes: settings["luks-sector-size"],
    discard: settings["luks-discard"],
  };
}

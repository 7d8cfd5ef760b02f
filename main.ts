/**
 * lbcsi: a CSI driver for NVMe/TCP storage. This file turns the command line into settings and is the only place where
 * concrete parts meet. Subcommands load what they need when they start, so a node plugin never pays for a simulator.
 */
import "./lib/grpc/goaway.ts";
import { readFileSync, statSync } from "node:fs";
import { dirname } from "node:path";
import * as z from "zod";
import config from "./deno.json" with { type: "json" };
import type { Check } from "./lib/check.ts";
import {
  attachOptions,
  attachText,
  connectionOptions,
  controllerOptions,
  detachText,
  discoveryOptions,
  discoveryText,
  doctorOptions,
  doctorText,
  keyOptions,
  listOptions,
  listText,
  metricsOption,
  nodeOptions,
  serviceOptions,
  shellLogOptions,
  simulateOptions,
  simulateText,
  sweepOptions,
  sweepText,
  volumeOptions,
} from "./lib/cli/option_groups.ts";
import {
  backgroundContext,
  createLogger,
  type Logger,
  type RequestContext,
  requestContext,
  Secrets,
  sleep,
  timeLimit,
  unlessAborted,
} from "./lib/context.ts";
import { hasCode, messageOf, StatusError } from "./lib/error.ts";
import { parsePoseidonId, parseVolumeId } from "./lib/volume_id.ts";
import type { Metrics } from "./lib/metrics.ts";
import { pemProblem, readPem } from "./lib/pem.ts";
import { hostNqn, inBandAuthKey, isSubsystemOf, nodeIdProblem, type TransportAddress } from "./lib/namespace.ts";
import {
  describeOptions,
  type Options,
  readOptions,
  type Settings,
  switchSchema,
  unknownVariables,
  UsageError,
} from "./lib/cli/options.ts";
import { surviveUncaught } from "./lib/cli/uncaught.ts";
import type { MachineOptions } from "./lib/cli/doctor/machine.ts";
import type { SystemReport } from "./lib/storage/backend.ts";
import type { LightosOptions } from "./lib/storage/lightos/cluster.ts";
import { suggestion } from "./lib/suggestion.ts";

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

const commands: Readonly<Record<string, Command>> = {
  controller: command(
    "serve the CSI identity and controller services",
    controllerOptions,
    async (settings) => {
      refuseOutOfReach(settings);
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "controller" });
      warnOfUnknownVariables(log);
      const { controllerHandlers, nodeServiceOfController } = await import("./lib/csi/controller/service.ts");
      const { snapshotMetadataHandlers } = await import("./lib/csi/controller/changed_blocks.ts");
      const { KeyedLock } = await import("./lib/lock.ts");
      const { service } = await import("./lib/grpc/server.ts");
      const { Controller, Node, SnapshotMetadata } = await import("./proto/gen/csi_pb.ts");
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
      const services = [service(Controller, handlers), service(Node, nodeServiceOfController)];
      if (settings["snapshot-metadata"] && backend.changedBlocks !== undefined) {
        services.push(service(SnapshotMetadata, snapshotMetadataHandlers(backend.changedBlocks)));
      }
      return await serveCsi(settings, log, services, metrics);
    },
  ),

  node: command("serve the CSI identity and node services", nodeOptions, async (settings) => {
    const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "node" });
    warnOfUnknownVariables(log);
    const suffix = settings["node-id-suffix"];
    const problem = nodeIdProblem(settings["node-id"]) ??
      (settings["node-id"].endsWith(suffix) ? undefined : `it does not end in "${suffix}" (see --node-id-suffix)`);
    if (problem !== undefined) throw new UsageError(`--node-id "${settings["node-id"]}": ${problem}`);
    if (settings.backend === "poseidon") refusePoseidon(settings);
    else if (settings.attach !== "direct") refuseMistypedDirectory(settings["discovery-dir"]);
    const { inlineVolumes, sweepUntilSettled } = await import("./lib/csi/inline/inline_volumes.ts");
    const { volumeLimit } = await import("./lib/csi/node/limit.ts");
    const { nodeHandlers } = await import("./lib/csi/node/service.ts");
    const { createLinuxHost } = await import("./lib/host/linux_host.ts");
    const { KeyedLock } = await import("./lib/lock.ts");
    const { service } = await import("./lib/grpc/server.ts");
    const { Node } = await import("./proto/gen/csi_pb.ts");
    const nodeId = settings["node-id"];
    const metrics = await serveMetrics(settings, "node", settings.backend, log);
    const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
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
    const volumes = settings.config === undefined ? undefined : (await open()).inline;
    const limit = volumeLimit(host, settings["max-volumes"], isSubsystemOf(settings.backend));
    const allowSystemPaths = settings["allow-system-paths"];
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
      luks: {
        cipher: settings["luks-cipher"],
        keyBits: settings["luks-key-size"],
        pbkdf: settings["luks-pbkdf"],
        pbkdfMemoryKib: settings["luks-pbkdf-memory"],
        iterMs: settings["luks-iter-time"],
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
    const onServing = () => void warnOfProblems(settings, log, ending.signal);
    try {
      return await serveCsi(settings, log, [service(Node, handlers)], metrics, onServing);
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
    const { inline } = backend;
    const obstacle = inline?.obstacle();
    if (inline === undefined || obstacle !== undefined) {
      throw new UsageError(`--config "${settings.config}": ${obstacle}`);
    }
    const ctx = backgroundContext(`sweep after ${nodeId}`, log, 600_000);
    const { volumes, problems } = await inline.listVolumes(ctx, nodeId);
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
          await inline.removeVolume(ctx, volume);
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
        const { defaultPoseidonSettings, simulatePoseidon } = await import("./lib/simulator/poseidon/simulator.ts");
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
      const { defaultSimulateSettings, simulate } = await import("./lib/simulator/lightos/simulator.ts");
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
    refuseMistypedDirectory(settings["discovery-dir"]);
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
      const { assertReady, mountPrograms } = await import("./lib/cli/readiness.ts");
      await assertReady("attach the volume", work.machine.host, {
        rights: settings.attach === "direct" || mount !== undefined,
        nvme: true,
        programs: {
          ...(settings.attach === "direct" ? { "nvme-cli": ["nvme"] } : {}),
          ...(mount === undefined ? {} : mountPrograms(fs ?? (format ? "ext4" : undefined))),
        },
      });
      const { attachVolume } = await import("./lib/cli/attach_volume.ts");
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
    async (settings) => {
      refuseMistypedDirectory(settings["discovery-dir"]);
      return await atShell("detach the volume", settings, async (ctx) => {
        await using work = await volumeWork(settings, ctx.log, { addresses: [], discovery: [] });
        const { allControllers } = await import("./lib/host/nvme/controllers.ts");
        const { host, hostNqn: us } = work.machine;
        const isConnected = (await allControllers(host)).some(({ hostNqn }) => hostNqn === us);
        const { assertReady, mountPrograms } = await import("./lib/cli/readiness.ts");
        await assertReady("detach the volume", host, {
          rights: settings.attach === "direct" || settings.mount !== undefined,
          // What is connected has the module, and without connections there is nothing to do.
          nvme: false,
          programs: {
            ...(settings.attach === "direct" && isConnected ? { "nvme-cli": ["nvme"] } : {}),
            ...(settings.mount === undefined ? {} : mountPrograms(undefined)),
          },
        });
        const { detachVolume } = await import("./lib/cli/attach_volume.ts");
        await detachVolume(ctx, work.machine, work.wanted, settings.mount);
      });
    },
    detachText,
  ),

  list: command(
    "show the volumes on this machine, their paths and mounts",
    listOptions,
    async (settings) => {
      refuseMistypedDirectory(settings["discovery-dir"]);
      return await atShell("list volumes", { ...settings, timeout: 60 }, async (ctx) => {
        const { createLinuxHost } = await import("./lib/host/linux_host.ts");
        const { listAsJson, listAsText, listVolumes } = await import("./lib/cli/listed_volumes.ts");
        const { describeCheck, missingFor } = await import("./lib/cli/readiness.ts");
        const host = createLinuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
        // It shows what there is all the same.
        for (const check of await missingFor(host, { rights: true, nvme: true, programs: {} })) {
          console.error(`lbcsi list: ${describeCheck(check)}`);
        }
        const listed = await listVolumes(ctx, {
          host,
          uuid: settings.uuid,
          all: settings.all,
          discoveryDirectory: settings["discovery-dir"],
        });
        if (settings.uuid !== undefined && listed.volumes.length === 0) {
          throw new StatusError("NOT_FOUND", `Cannot list volume ${settings.uuid}: it is not on this machine`);
        }
        console.log(settings.json ? listAsJson(listed) : listAsText(listed));
      });
    },
    listText,
  ),

  doctor: command(
    "say what is wrong with this machine and the cluster, before the first pod does",
    doctorOptions,
    async (settings) => {
      const machine = settings.checks === "cluster" ? undefined : machineOf(settings);
      return await atShell("look at this machine", settings, async (ctx) => {
        const { doctorAsJson, doctorAsText, runChecks, tally } = await import("./lib/cli/doctor/report.ts");
        const { createLinuxHost } = await import("./lib/host/linux_host.ts");
        const host = createLinuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
        const reports = settings.checks === "machine" ? Promise.resolve([]) : systemReports(settings, ctx);
        const sections = await runChecks(ctx, machine === undefined ? undefined : { host, ...machine }, reports);
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
      refuseMissingDirectory(
        settings["discovery-dir"],
        "make it (mkdir -p), or give the one that the node service writes to",
      );
      const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "discovery-client" });
      warnOfUnknownVariables(log);
      const { createDiscoveryDaemon } = await import("./lib/discovery/daemon.ts");
      const { createLinuxHost } = await import("./lib/host/linux_host.ts");
      const { host: key, controller } = await readKeys(settings);
      const stop = new AbortController();
      const stopped = untilStopped().then((signal) => {
        log.info("stops on a signal", { name: signal });
        stop.abort();
      });
      const metrics = await serveMetrics(settings, "discovery-client", "lightos", log);
      const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
      if (metrics !== undefined) await measureMachine(metrics, host, "lightos");
      const daemon = createDiscoveryDaemon({
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
      const { logProblems, missingFor } = await import("./lib/cli/readiness.ts");
      logProblems(log, await missingFor(host, { rights: true, nvme: true, programs: { "nvme-cli": ["nvme"] } }));
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
      const { completionScript } = await import("./lib/cli/completion_scripts.ts");
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
    warnOfUnknownVariables(log);
    return await serveCsi(settings, log, [], await serveMetrics(settings, "identity", settings.backend, log));
  }),
};

/** Of the vendor's driver for LightOS, which this one does not have. */
const vendorVariables = [
  "LB_CSI_BE_CONFIG_PATH",
  "LB_CSI_LOG_ROLE",
  "LB_CSI_LOG_TIME",
  "LB_CSI_LUKS_CONFIG_PATH",
  "LB_CSI_RWX",
];

/**
 * Warns of variables that look like an option and are none, of any command: containers run others too, as the doctor. The
 * executable for controllers may read variables by name only, so there just those of the vendor's driver are found.
 */
function warnOfUnknownVariables(log: Logger): void {
  const mayListAll = Deno.permissions.querySync({ name: "env" }).state === "granted";
  const names = mayListAll
    ? Object.keys(Deno.env.toObject())
    : vendorVariables.filter((name) => Deno.env.get(name) !== undefined);
  const known = Object.values(commands).flatMap(({ options }) => Object.values(options).flatMap(({ env = [] }) => env));
  for (const { name, suggestion } of unknownVariables(names, known)) {
    log.warning("ignores an unknown environment variable", { name, error: `${name} is no option's${suggestion}` });
  }
}

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
  const { machineSamples } = await import("./lib/host/nvme/metrics.ts");
  metrics.gather(() => machineSamples(host, isSubsystemOf(backend)));
}

/** Serves CSI until SIGTERM, SIGINT or SIGHUP, then lets running calls end. */
async function serveCsi(
  settings: Settings<typeof serviceOptions>,
  log: Logger,
  services: readonly import("./lib/grpc/server.ts").Service[],
  metrics: Metrics | undefined,
  onServing: () => void = () => {},
): Promise<number> {
  const { serve, service } = await import("./lib/grpc/server.ts");
  const { identityHandlers } = await import("./lib/csi/identity.ts");
  const { servingCheck } = await import("./lib/cli/serving.ts");
  const { describeRequest, redactRequest } = await import("./lib/csi/request.ts");
  const { Identity } = await import("./proto/gen/csi_pb.ts");
  const stopped = untilStopped();
  const path = settings.endpoint;
  const snapshotMetadata = settings["snapshot-metadata"];
  const { backend } = settings;
  const isServing = servingCheck(() => Deno.realPath(dirname(path)));
  const identity = { name: driverNames[backend], version, expansion: grows(backend), snapshotMetadata };
  const server = await serve({
    listen: { path },
    services: [service(Identity, identityHandlers(identity, isServing)), ...services],
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
  onServing();
  using _survival = surviveUncaught(log, () => answersProbe(path), () => Deno.exit(1));
  const signal = await stopped;
  log.info("stops on a signal", { name: signal });
  // Kubernetes kills 30 s after SIGTERM unless the manifest says otherwise.
  await server.stop(25_000);
  log.info("stopped");
  return 0;
}

/** Whether this process answers on its own socket; it may be busy. */
async function answersProbe(path: string): Promise<boolean> {
  const { CallError, Channel } = await import("./lib/grpc/client.ts");
  const { Identity } = await import("./proto/gen/csi_pb.ts");
  using channel = new Channel({ address: `unix://${path}` });
  try {
    await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(30_000), connectTimeoutMs: 30_000 });
    return true;
  } catch (error) {
    return error instanceof CallError && error.origin === "server";
  }
}

const exitStatusOf = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;

/** Work for a person at a shell: it ends at its timeout or with the first signal, but lets running changes finish. */
async function atShell(
  what: string,
  settings: Settings<typeof shellLogOptions> & { readonly timeout: number },
  work: (ctx: RequestContext) => Promise<number | void>,
): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]);
  // The work has its time, and says itself what became of it.
  using _survival = surviveUncaught(log, () => Promise.resolve(true), () => {});
  const stop = new AbortController();
  let status = 0;
  for (const [signal, code] of Object.entries(exitStatusOf) as [keyof typeof exitStatusOf, number][]) {
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

const longestLookMs = 60_000;

/**
 * Says in the log what `lbcsi doctor` would call a problem of this machine, one line each, so that it is there before the
 * first volume meets it. It runs beside the service, which does not wait for it.
 */
async function warnOfProblems(settings: Settings<typeof nodeOptions>, log: Logger, signal: AbortSignal): Promise<void> {
  try {
    const { machineChecks } = await import("./lib/cli/doctor/machine.ts");
    const { logProblems } = await import("./lib/cli/readiness.ts");
    const { createLinuxHost } = await import("./lib/host/linux_host.ts");
    const { sysfs, dev, backend, "node-id": nodeId } = settings;
    const ctx = backgroundContext("look at this machine", log, longestLookMs, signal);
    const looking = machineChecks(ctx, {
      // Without metrics: these commands are no work of the driver.
      host: createLinuxHost({ log, sysfsRoot: sysfs, devRoot: dev }),
      nodeId,
      attach: settings.attach ?? (backend === "poseidon" ? "direct" : "discovery-client"),
      discoveryDirectory: settings["discovery-dir"],
      kubeletDirectory: Deno.env.get("LB_CSI_KUBELET_DIR") ?? doctorOptions["kubelet-dir"].fallback,
      maxVolumes: settings["max-volumes"],
      isOurs: isSubsystemOf(backend),
      defaultFsType: settings["default-fs"],
    });
    // A mount that does not answer must not keep the rest back for ever.
    const checks = await unlessAborted(looking, ctx.signal);
    // A simulated machine has no modules.
    const isThisMachine = sysfs === nodeOptions.sysfs.fallback && dev === nodeOptions.dev.fallback;
    logProblems(log, checks.filter(({ name }) => isThisMachine || name !== "NVMe/TCP"));
  } catch (error) {
    if (!signal.aborted) log.warning("could not look for problems of this machine", { error: messageOf(error) });
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
    const { poseidonReports } = await import("./lib/storage/poseidon/checks.ts");
    const [endpoint, ...surplus] = endpoints ?? [];
    if (surplus.length > 0) throw new UsageError("--mgmt-endpoint: a PoseidonOS has one DAgent");
    return await poseidonReports(ctx, await poseidonSystems(settings, ctx.log), endpoint);
  }
  const { lightosReports } = await import("./lib/storage/lightos/checks.ts");
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
  tuning: import("./lib/host/nvme/connect_options.ts").ConnectionTuning = {},
  keys: import("./lib/auth_key.ts").GivenKeys = { host: undefined, controller: undefined },
) {
  const { volume, uuid, nqn, "node-id": nodeId, ...rest } = settings;
  const problem = nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  if (volume === undefined ? uuid === undefined || nqn === undefined : uuid !== undefined || nqn !== undefined) {
    throw new UsageError("either VOLUME_ID or both --uuid and --nqn are needed");
  }
  const { createLinuxHost } = await import("./lib/host/linux_host.ts");
  const { KeyedLock } = await import("./lib/lock.ts");
  const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
  const attacher = await attacherOf(settings, host, new KeyedLock(), tuning);
  const discoveryDirectory = settings.attach === "direct" ? settings["discovery-dir"] : undefined;
  const machine = { host, attacher, hostNqn: hostNqn(nodeId), discoveryDirectory };
  const kind = authOf(keys);
  await using ending = new AsyncDisposableStack();
  let wanted: import("./lib/cli/attach_volume.ts").AttachRequest;
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
): Promise<import("./lib/auth_key.ts").GivenKeys> {
  const { DhchapKey } = await import("./lib/auth_key.ts");
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
function authOf({ host, controller }: import("./lib/auth_key.ts").GivenKeys) {
  return host === undefined ? undefined : controller === undefined ? "unidirectional" : "bidirectional";
}

async function readSecrets(path: string): Promise<Readonly<Record<string, string>>> {
  const { parseSecretFile } = await import("./lib/cli/secret_file.ts");
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
  tuning: import("./lib/host/nvme/connect_options.ts").ConnectionTuning,
) {
  const { hostIdOf } = await import("./lib/host/attach/attacher.ts");
  const { createDirectAttacher } = await import("./lib/host/attach/direct.ts");
  const { createDiscoveryClientAttacher } = await import("./lib/host/attach/discovery_client.ts");
  const nodeId = settings["node-id"];
  return settings.attach === "direct"
    ? createDirectAttacher({ host, hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId), locks, tuning })
    : createDiscoveryClientAttacher({ host, hostNqn: hostNqn(nodeId), directory: settings["discovery-dir"] });
}

function tuningOf(settings: Settings<typeof connectionOptions>): import("./lib/host/nvme/connect_options.ts").ConnectionTuning {
  return {
    controllerLossSeconds: settings["ctrl-loss-tmo"],
    reconnectDelaySeconds: settings["reconnect-delay"],
    keepAliveSeconds: settings["keep-alive-tmo"],
    fastIoFailSeconds: settings["fast-io-fail-tmo"],
    ioQueues: settings["nr-io-queues"],
    queueSize: settings["queue-size"],
  };
}

const longestTendMs = 300_000;

/** Looks after the connections from time to time, until it is disposed. */
function tending(attacher: import("./lib/host/attach/attacher.ts").Attacher, log: Logger): Disposable {
  const stop = new AbortController();
  const tend = async () => {
    const { lookMs } = await import("./lib/host/attach/direct.ts");
    while (attacher.reconcile !== undefined) {
      // The kernel gives a connection up after minutes, so nobody is in a hurry.
      await sleep(lookMs, stop.signal);
      using limit = timeLimit(stop.signal, longestTendMs);
      try {
        await attacher.reconcile(requestContext(limit.signal, new Date(Date.now() + longestTendMs), log));
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
  /** Undefined for commands whose user names the endpoint, or the volume, and the token. */
  readonly "jwt-for-any-endpoint"?: boolean;
};

async function openLightos(settings: LightosSettings, log: Logger, metrics?: Metrics) {
  const { lightosBackend } = await import("./lib/storage/lightos/backend.ts");
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
    globalJwtFor: settings["jwt-for-any-endpoint"] ?? true
      ? "any endpoint"
      : settings["mgmt-ca"] === undefined
      ? "cluster file"
      : "own CA",
    ca: settings["mgmt-ca"] === undefined ? machineCa(log) : requiredCertificates("--mgmt-ca", settings["mgmt-ca"]),
    verifyTls: settings["mgmt-tls-verify"],
    userAgent: `lbcsi/${version}`,
    clusters: settings.config === undefined ? undefined : await readClusters(settings.config, log),
  };
}

/** The certificates in a file each of which has to be good. */
function requiredCertificates(flag: string, path: string): string {
  const read = readPem(readRequired(flag, path));
  const problem = pemProblem(read);
  if (problem !== undefined) throw new UsageError(`${flag} "${path}": ${problem}`);
  return read.pem;
}

/** Where distributions keep the certificates that a machine trusts: Debian, Alpine; Fedora; SUSE; BSD, Alpine. */
const machineCaFiles = [
  "/etc/ssl/certs/ca-certificates.crt",
  "/etc/pki/tls/certs/ca-bundle.crt",
  "/etc/ssl/ca-bundle.pem",
  "/etc/ssl/cert.pem",
];

/**
 * The CAs that this machine trusts; undefined, for the list in the program, on one that has none. Images of other makers set
 * SSL_CERT_FILE without being asked, so one that cannot be read is no reason to end.
 */
function machineCa(log: Logger): string | undefined {
  const holdsCertificates = (path: string) => {
    const { pem, problems } = readPem(readIfThere(path) ?? "");
    for (const problem of problems) log.warning("passes over a certificate to trust", { path, error: problem });
    return pem === "" ? undefined : pem;
  };
  const named = Deno.env.get("SSL_CERT_FILE") ?? "";
  const chosen = named === "" ? undefined : holdsCertificates(named);
  if (chosen !== undefined) return chosen;
  if (named !== "") log.warning("cannot read certificates from the file in SSL_CERT_FILE", { path: named });
  return machineCaFiles.map(holdsCertificates).find((text) => text !== undefined);
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

/**
 * Throws UsageError when `path` is not a directory. Nothing makes it: a directory that nobody else knows is watched, or
 * written to, in vain.
 */
function refuseMissingDirectory(path: string, advice: string): void {
  let problem = "there is no such directory";
  try {
    if (statSync(path).isDirectory()) return;
    problem = "it is not a directory";
  } catch (error) {
    if (!hasErrno(error, "ENOENT")) problem = messageOf(error);
  }
  throw new UsageError(`--discovery-dir "${path}": ${problem}, ${advice}`);
}

/**
 * The same for commands that need the directory only where there is a Discovery-Client. The default may be missing: without
 * the daemon nobody makes it, and with it it may come later.
 */
function refuseMistypedDirectory(path: string): void {
  if (path === nodeOptions["discovery-dir"].fallback) return;
  refuseMissingDirectory(path, "give the one that the Discovery-Client watches");
}

function hasErrno(error: unknown, code: string): boolean {
  return (error as { code?: unknown } | undefined)?.code === code;
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

async function openPoseidon(settings: Parameters<typeof refusePoseidon>[0], log: Logger, metrics?: Metrics) {
  refusePoseidon(settings);
  useNoProxy();
  const systems = await poseidonSystems(settings, log);
  const { poseidonBackend } = await import("./lib/storage/poseidon/backend.ts");
  return poseidonBackend({ log, systems, metrics });
}

async function poseidonSystems({ config }: { readonly config?: string | undefined }, log: Logger) {
  if (config === undefined) return undefined;
  const { knownSystems } = await import("./lib/storage/poseidon/cluster_file.ts");
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

const stopSignals = ["SIGTERM", "SIGINT", "SIGHUP"] as const;

/** SIGHUP too: a terminal that goes away must not leave a socket and half an answer behind. */
function untilStopped(): Promise<Deno.Signal> {
  return new Promise((resolve) => {
    for (const signal of stopSignals) Deno.addSignalListener(signal, () => resolve(signal));
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
  const { knownClusters } = await import("./lib/storage/lightos/cluster_file.ts");
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
    const meant = suggestion(name, Object.keys(commands));
    console.error(`lbcsi: there is no command "${name}"${meant || ";"} lbcsi --help lists them`);
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

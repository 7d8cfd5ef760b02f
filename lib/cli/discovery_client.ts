/** `lbcsi discovery-client`: keeps this machine connected to the subsystems that the files of a directory name. */
import * as z from "zod";
import { createLogger } from "../log.ts";
import { defineCommand, type ListCommands } from "./command.ts";
import { assertDirectory } from "./discovery_directory.ts";
import { readKeyFiles } from "./key_files.ts";
import { hostOptions, keyOptions, logOptions, metricsOption } from "./option_groups.ts";
import { wholeNumber } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";
import { gatherMachineMetrics, serveMetrics } from "./serve_metrics.ts";
import { waitForStopSignal } from "./stop_signals.ts";
import { warnOfUnknownVariables } from "./unknown_variables.ts";
import { version } from "./version.ts";

/** Seconds; -1: never. */
const lossSeconds = z.string().regex(/^(?:-1|\d{1,9})$/, "is not a whole number of seconds, or -1").transform(Number);

/** The options of `lbcsi discovery-client`. */
export const discoveryClientOptions = {
  "discovery-dir": {
    ...hostOptions["discovery-dir"],
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
      "time after which the kernel gives up a new I/O connection that is lost, -1: never; an entry of a file may override it",
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
  sysfs: hostOptions.sysfs,
  dev: hostOptions.dev,
  "metrics-address": { ...metricsOption["metrics-address"], env: ["LB_CSI_DISCOVERY_METRICS_ADDRESS"] },
  ...logOptions,
} as const satisfies Options;

const helpText =
  `Takes the same files as LightOS' Discovery-Client, one per volume with --attach=discovery-client, and replaces it on a
machine that has only lbcsi and nvme-cli. It connects to the discovery controllers that the files name, and to every I/O
controller that these list for the subsystems in the files. It follows changes and referrals, and disconnects a subsystem
that no file names any more as soon as nothing uses it. It takes over existing connections when it starts, and leaves them
when it ends (SIGTERM): I/O continues meanwhile.`;

/** `lbcsi discovery-client`. */
export const discoveryClientCommand = defineCommand(discoveryClientOptions, run, helpText);

/** Kubernetes kills a container 30 s after SIGTERM unless the manifest says otherwise. */
const stopMs = 25_000;

async function run(settings: Settings<typeof discoveryClientOptions>, listCommands: ListCommands): Promise<number> {
  const { "discovery-dir": directory } = settings;
  assertDirectory(directory, "create it (mkdir -p), or give the one that the node service writes to");
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "discovery-client" });
  await warnOfUnknownVariables(log, discoveryClientOptions, listCommands);
  const { createDiscoveryDaemon } = await import("../discovery/daemon.ts");
  const { createLinuxHost } = await import("../host/linux_host.ts");
  const { host: key, controller } = readKeyFiles(settings);
  const stop = new AbortController();
  const stopped = waitForStopSignal().then((signal) => {
    log.info("stops on a signal", { name: signal });
    stop.abort();
  });
  const metrics = await serveMetrics(settings, "discovery-client", "lightos", log);
  const host = createLinuxHost({ log, sysfsRoot: settings.sysfs, devRoot: settings.dev, metrics });
  if (metrics !== undefined) await gatherMachineMetrics(metrics, host, "lightos");
  const daemon = createDiscoveryDaemon({
    host,
    directory,
    log,
    pollMs: settings.poll * 1000,
    controllerLossSeconds: settings["ctrl-loss-tmo"],
    keepAliveSeconds: settings["keep-alive-tmo"],
    ioQueues: settings["io-queues"] === 0 ? undefined : settings["io-queues"],
    keys: key === undefined ? undefined : { host: key, controller },
  });
  log.info("watches", { path: directory, version });
  const { logProblems, findMissing } = await import("./readiness.ts");
  logProblems(log, await findMissing(host, { rights: true, nvme: true, programs: { "nvme-cli": ["nvme"] } }));
  await daemon.run(stop.signal, stopMs);
  await stopped;
  log.info("stopped");
  return 0;
}

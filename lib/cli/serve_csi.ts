/** Serves CSI on a socket until a signal ends the process. */
import { dirname } from "node:path";
import type { Service } from "../grpc/server.ts";
import type { Logger } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { storageSystems } from "./backends.ts";
import type { serviceOptions } from "./option_groups.ts";
import type { Settings } from "./options.ts";
import { waitForStopSignal } from "./stop_signals.ts";
import { surviveUncaught } from "./uncaught.ts";
import { version } from "./version.ts";

/** What serveCsi serves, and with what. */
export interface CsiServer {
  readonly settings: Settings<typeof serviceOptions>;
  readonly log: Logger;
  /** Besides the identity service. */
  readonly services: readonly Service[];
  readonly metrics: Metrics | undefined;
  /** Called when the socket accepts calls. */
  readonly onServing?: () => void;
}

/**
 * RPCs whose calls are logged at level debug: probes come all the time, capabilities are asked for before each call, and
 * the others come once a minute, some of them for each volume.
 */
const frequentRpcs =
  /^(Probe|GetPlugin.*|.*GetCapa(bilities|city)|NodeGet(Info|VolumeStats)|ListVolumes|ControllerGetVolume|.*Health)$/;

/** Kubernetes kills a container 30 s after SIGTERM unless the manifest says otherwise. */
const stopMs = 25_000;

/**
 * Serves CSI until SIGTERM, SIGINT or SIGHUP, then lets running calls end. The result is the exit status.
 *
 * @throws StatusError when the socket cannot be served
 */
export async function serveCsi({ settings, log, services, metrics, onServing }: CsiServer): Promise<number> {
  const { serve, service } = await import("../grpc/server.ts");
  const { identityHandlers } = await import("../csi/identity.ts");
  const { createFileOperationsProbe } = await import("./file_operations_probe.ts");
  const { describeRequest, redactRequest } = await import("../csi/request.ts");
  const { Identity } = await import("../../proto/gen/csi_pb.ts");
  const stopSignal = waitForStopSignal();
  const { endpoint: path, backend } = settings;
  const identity = identityHandlers({
    name: storageSystems[backend].driverName,
    version,
    expansion: storageSystems[backend].canExpand,
    snapshotMetadata: settings["snapshot-metadata"],
  }, createFileOperationsProbe(() => Deno.realPath(dirname(path))));
  const server = await serve({
    listen: { path },
    services: [service(Identity, identity), ...services],
    log,
    describe: describeRequest,
    redact: redactRequest,
    ...(metrics === undefined ? {} : { observe: (await import("../metrics.ts")).callObserver(metrics) }),
    quiet: ({ name }) => frequentRpcs.test(name),
  });
  log.info("serves", { path, version });
  onServing?.();
  using _survival = surviveUncaught(log, () => isAnswering(path), () => Deno.exit(1));
  log.info("stops on a signal", { name: await stopSignal });
  await server.stop(stopMs);
  log.info("stopped");
  return 0;
}

/** Whether this process answers on its own socket; it may be busy. */
async function isAnswering(path: string): Promise<boolean> {
  const { CallError, Channel } = await import("../grpc/client.ts");
  const { Identity } = await import("../../proto/gen/csi_pb.ts");
  using channel = new Channel({ address: `unix://${path}` });
  try {
    await channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(30_000), connectTimeoutMs: 30_000 });
    return true;
  } catch (error) {
    return error instanceof CallError && error.origin === "server";
  }
}

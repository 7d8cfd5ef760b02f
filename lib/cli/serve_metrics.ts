/** Serves the metrics of this process over HTTP. */
import type { Host } from "../host/host.ts";
import type { Logger } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { type BackendName, isSubsystemOf } from "./backends.ts";
import type { metricsOption } from "./option_groups.ts";
import type { Settings } from "./options.ts";
import { version } from "./version.ts";

/**
 * Serves metrics until the process ends, and returns what collects them; undefined without `--metrics-address`.
 *
 * @throws StatusError FAILED_PRECONDITION when the address cannot be used
 */
export async function serveMetrics(
  { "metrics-address": address }: Settings<typeof metricsOption>,
  role: string,
  backend: BackendName,
  log: Logger,
): Promise<Metrics | undefined> {
  if (address === undefined) return undefined;
  const { cannotServe, Metrics, metricsResponse } = await import("../metrics.ts");
  const metrics = new Metrics();
  metrics.gather(() => [
    ["lbcsi_build_info", [version, role, backend], 1],
    ["process_resident_memory_bytes", [], Deno.memoryUsage().rss],
    ["process_start_time_seconds", [], performance.timeOrigin / 1000],
  ]);
  const { hostname, port } = address;
  const formatAddress = (port: number) => `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
  try {
    const server = Deno.serve({ hostname, port, onListen: () => {} }, (request) => metricsResponse(metrics, request));
    server.unref();
    log.info("serves metrics", { address: formatAddress(server.addr.port) });
  } catch (error) {
    throw cannotServe(formatAddress(port), error);
  }
  return metrics;
}

/** Adds the machine's volumes and NVMe connections to `metrics`, read at each request. */
export async function gatherMachineMetrics(metrics: Metrics, host: Host, backend: BackendName): Promise<void> {
  const { machineSamples } = await import("../host/nvme/metrics.ts");
  metrics.gather(() => machineSamples(host, isSubsystemOf(backend)));
}

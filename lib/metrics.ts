/**
 * The metrics of the process, in the text format that Prometheus and others read (exposition format 0.0.4).
 *
 * Labels name a kind of thing, never a single one: there is no volume, claim, pod or node among them, and no secret. A
 * label that grew with what callers send would fill the memory of the system that collects it; so each label has a
 * bounded number of values, and all further values become `other`.
 *
 * Our own code and no library: prom-client costs 12 MiB of RSS in every node plugin.
 */
import { messageOf, StatusError } from "./error.ts";

interface Family {
  readonly type: "counter" | "gauge" | "histogram";
  readonly labels: readonly string[];
  readonly help: string;
}

/** All metrics by name; durations are in seconds. */
export const families = {
  lbcsi_build_info: { type: "gauge", labels: ["version", "role", "backend"], help: "Always 1" },
  process_resident_memory_bytes: { type: "gauge", labels: [], help: "Memory of the process" },
  process_start_time_seconds: { type: "gauge", labels: [], help: "When the process started, since 1970" },
  lbcsi_csi_calls_total: { type: "counter", labels: ["method", "code"], help: "CSI calls that were answered" },
  lbcsi_csi_call_duration_seconds: {
    type: "histogram",
    labels: ["method"],
    help: "Time until the work for a CSI call had ended, which may be after its answer",
  },
  lbcsi_csi_calls_running: { type: "gauge", labels: ["method"], help: "CSI calls that are worked on now" },
  lbcsi_csi_oldest_call_seconds: { type: "gauge", labels: ["method"], help: "Age of the oldest of these calls" },
  lbcsi_mgmt_calls_total: {
    type: "counter",
    labels: ["endpoint", "method", "code"],
    help: "Calls to management APIs, each attempt at an endpoint counted separately",
  },
  lbcsi_mgmt_call_duration_seconds: {
    type: "histogram",
    labels: ["endpoint", "method"],
    help: "Time until a management endpoint had answered, or was given up",
  },
  lbcsi_mgmt_connections: {
    type: "gauge",
    labels: ["endpoint", "security"],
    help: "Connections to management endpoints: verified, unverified (TLS with any certificate), clear (no TLS)",
  },
  lbcsi_mgmt_endpoint_resting: {
    type: "gauge",
    labels: ["endpoint"],
    help: "1 while an endpoint that failed is left alone",
  },
  lbcsi_mgmt_endpoint_failures: { type: "gauge", labels: ["endpoint"], help: "Failures since its last answer" },
  lbcsi_commands_total: { type: "counter", labels: ["program", "exit"], help: "Programs that were run on the node" },
  lbcsi_command_duration_seconds: { type: "histogram", labels: ["program"], help: "Time that these programs took" },
  lbcsi_volumes_attached: { type: "gauge", labels: [], help: "Volumes that the node is connected to" },
  lbcsi_volumes_in_use: { type: "gauge", labels: [], help: "Those of them that are mounted or encrypted" },
  lbcsi_volumes_without_path: { type: "gauge", labels: [], help: "Those of them that no live path leads to" },
  lbcsi_volumes_not_answering: {
    type: "gauge",
    labels: [],
    help: "Volumes that have not answered the driver; they are asked nothing more until they do",
  },
  lbcsi_longest_unanswered_seconds: { type: "gauge", labels: [], help: "Since when the first of them has not" },
  lbcsi_volumes_limit: { type: "gauge", labels: [], help: "How many the node may have; 0: not limited by the driver" },
  lbcsi_nvme_connections: {
    type: "gauge",
    labels: ["kind", "state"],
    help: "NVMe/TCP connections of the node: to I/O and to discovery controllers, by the kernel's state",
  },
} as const satisfies Readonly<Record<string, Family>>;

type Families = typeof families;
type NamesOf<T extends Family["type"]> = { [N in keyof Families]: Families[N]["type"] extends T ? N : never }[
  keyof Families
];
type LabelValues<T extends readonly string[]> = { readonly [I in keyof T]: string };
/** One value for each label of the family. */
type LabelsOf<N extends keyof Families> = LabelValues<Families[N]["labels"]>;

/** The current value of a gauge. */
export type MetricSample = { [N in NamesOf<"gauge">]: readonly [name: N, labels: LabelsOf<N>, value: number] }[
  NamesOf<"gauge">
];

/** The shortest calls are answered from memory, the longest are file system checks. */
const bucketSeconds = [0.005, 0.02, 0.1, 0.5, 1, 5, 15, 60, 300] as const;

interface Series {
  readonly labels: readonly string[];
  value: number;
  /** Of a histogram: the number of observations up to each limit. */
  readonly buckets: number[];
  sum: number;
}

/** The most values of one label: more than any deployment needs. */
const mostValues = 100;

/** Counters and histograms of the process, and the sources of its gauges. */
export class Metrics {
  readonly #series = new Map<keyof Families, Map<string, Series>>();
  readonly #values = new Map<string, Set<string>>();
  readonly #sources = new Set<() => Iterable<MetricSample> | Promise<Iterable<MetricSample>>>();

  /** Adds one to a counter. */
  count<N extends NamesOf<"counter">>(name: N, labels: LabelsOf<N>): void {
    this.#seriesOf(name, labels).value++;
  }

  /** Adds an observation to a histogram. */
  observe<N extends NamesOf<"histogram">>(name: N, labels: LabelsOf<N>, seconds: number): void {
    const series = this.#seriesOf(name, labels);
    series.value++;
    series.sum += seconds;
    for (const [at, limit] of bucketSeconds.entries()) {
      if (seconds <= limit) series.buckets[at] = (series.buckets[at] ?? 0) + 1;
    }
  }

  /**
   * Calls `source` at each reading, until disposed. Samples of several sources with the same name and labels are added
   * up.
   */
  gather(source: () => Iterable<MetricSample> | Promise<Iterable<MetricSample>>): Disposable {
    this.#sources.add(source);
    return { [Symbol.dispose]: () => void this.#sources.delete(source) };
  }

  /** All metrics as text. A source that fails is left out, and the reason is a comment. */
  async text(): Promise<string> {
    const gathered = await Promise.allSettled([...this.#sources].map(async (source) => await source()));
    const gauges = new Map<keyof Families, Map<string, Series>>();
    const problems: string[] = [];
    for (const result of gathered) {
      if (result.status === "rejected") {
        problems.push(`# could not be read: ${messageOf(result.reason).replace(/\s+/g, " ")}`);
        continue;
      }
      for (const [name, labels, value] of result.value) this.#seriesIn(gauges, name, labels).value += value;
    }
    const lines = Object.entries(families).flatMap(([name, { type, help, labels }]) => {
      const series = (type === "gauge" ? gauges : this.#series).get(name as keyof Families);
      if (series === undefined) return [];
      const rows = [...series.values()].flatMap((each) =>
        type === "histogram" ? histogramLines(name, labels, each) : [line(name, labels, each.labels, each.value)]
      );
      return [`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`, ...rows];
    });
    return [...lines, ...problems, ""].join("\n");
  }

  #seriesOf(name: keyof Families, labels: readonly string[]): Series {
    return this.#seriesIn(this.#series, name, labels);
  }

  #seriesIn(all: Map<keyof Families, Map<string, Series>>, name: keyof Families, given: readonly string[]): Series {
    const labels = given.map((value, at) => this.#bounded(families[name].labels[at] ?? "", value));
    let family = all.get(name);
    if (family === undefined) all.set(name, family = new Map());
    const key = JSON.stringify(labels);
    let series = family.get(key);
    if (series === undefined) {
      family.set(key, series = { labels, value: 0, buckets: bucketSeconds.map(() => 0), sum: 0 });
    }
    return series;
  }

  #bounded(label: string, value: string): string {
    let known = this.#values.get(label);
    if (known === undefined) this.#values.set(label, known = new Set());
    if (known.has(value)) return value;
    if (known.size >= mostValues) return "other";
    known.add(value);
    return value;
  }
}

function histogramLines(name: string, labels: readonly string[], series: Series): readonly string[] {
  const bucket = (limit: string, value: number) =>
    line(`${name}_bucket`, [...labels, "le"], [...series.labels, limit], value);
  return [
    ...bucketSeconds.map((limit, at) => bucket(String(limit), series.buckets[at] ?? 0)),
    bucket("+Inf", series.value),
    line(`${name}_sum`, labels, series.labels, series.sum),
    line(`${name}_count`, labels, series.labels, series.value),
  ];
}

function line(name: string, labels: readonly string[], values: readonly string[], value: number): string {
  const pairs = labels.map((label, at) => `${label}="${escaped(values[at] ?? "")}"`);
  return `${name}${pairs.length === 0 ? "" : `{${pairs.join(",")}}`} ${value}`;
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}

/**
 * FAILED_PRECONDITION for an address where metrics cannot be served: thrown at the start, because the operator relies
 * on them.
 */
export function cannotServe(address: string, cause: unknown): StatusError {
  return new StatusError("FAILED_PRECONDITION", `Cannot serve metrics on ${address}: ${messageOf(cause)}`, { cause });
}

/** The answer to an HTTP request: the text at `GET /metrics`, and 404 anywhere else. */
export async function metricsResponse(metrics: Metrics, request: Request): Promise<Response> {
  if (new URL(request.url).pathname !== "/metrics") return new Response("there is /metrics\n", { status: 404 });
  if (request.method !== "GET" && request.method !== "HEAD") {
    return new Response("GET it\n", { status: 405, headers: { Allow: "GET, HEAD" } });
  }
  return new Response(await metrics.text(), {
    headers: { "Content-Type": "text/plain; version=0.0.4; charset=utf-8" },
  });
}

/** Called at the beginning of a call; returns what to call with its code at its end. */
export type CallObserver = (method: string) => (code: string) => void;

/** An observer that counts CSI calls, and reports those that are running. */
export function callObserver(metrics: Metrics): CallObserver {
  const running = new Map<object, { readonly method: string; readonly since: number }>();
  metrics.gather(() => {
    const now = performance.now();
    const byMethod = Map.groupBy(running.values(), ({ method }) => method);
    return [...byMethod].flatMap(([method, calls]): MetricSample[] => [
      ["lbcsi_csi_calls_running", [method], calls.length],
      ["lbcsi_csi_oldest_call_seconds", [method], (now - Math.min(...calls.map(({ since }) => since))) / 1000],
    ]);
  });
  return (method) => {
    const call = {};
    const since = performance.now();
    running.set(call, { method, since });
    return (code) => {
      running.delete(call);
      metrics.count("lbcsi_csi_calls_total", [method, code]);
      metrics.observe("lbcsi_csi_call_duration_seconds", [method], (performance.now() - since) / 1000);
    };
  };
}

/** An attempt of a call to a management API. */
export interface ManagementCall {
  readonly endpoint: string;
  readonly method: string;
  readonly code: string;
  readonly ms: number;
}

/** Counts one attempt of a call to a management API. */
export function countManagementCall(
  metrics: Metrics | undefined,
  { endpoint, method, code, ms }: ManagementCall,
): void {
  metrics?.count("lbcsi_mgmt_calls_total", [endpoint, method, code]);
  metrics?.observe("lbcsi_mgmt_call_duration_seconds", [endpoint, method], ms / 1000);
}

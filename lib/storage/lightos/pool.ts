/** The clusters that the process is connected to: one set of endpoints for each, shared by all calls. */
import { createHash } from "node:crypto";
import { clearInterval, setInterval } from "node:timers";
import * as z from "zod";
import type { Trust } from "../../grpc/tls.ts";
import { pemProblem, readPem } from "../../pem.ts";
import type { Secrets } from "../../secrets.ts";
import { type Endpoint, formatEndpoint, formatEndpoints, type Scheme } from "../../volume_id.ts";
import { Cluster, type LightosOptions } from "./cluster.ts";
import type { KnownCluster } from "./cluster_file.ts";
import { ClusterEndpoints } from "./endpoints.ts";
import { selectCredentials } from "./tokens.ts";
import { parseTrustOptions, resolveTrust, type TrustOptions, trustSchema } from "./trust.ts";

/** The keys of a call's secrets that concern the management API. */
const secretsSchema = z.object({
  jwt: z.string().optional(),
  "mgmt-ca.crt": z.string().transform((text, check) => {
    const read = readPem(text);
    const problem = pemProblem(read);
    if (problem === undefined) return read.pem;
    check.addIssue(problem);
    return z.NEVER;
  }).optional(),
  ...trustSchema,
});

/** How long an unused connection is kept. */
const idleMs = 10 * 60 * 1000;

/** The connections of this process, shared by all calls to one cluster, and closed after ten idle minutes. */
export class ClusterPool implements AsyncDisposable {
  readonly #options: LightosOptions;
  readonly #endpoints = new Map<string, ClusterEndpoints>();
  readonly #sweeper: ReturnType<typeof setInterval>;
  readonly #gathering: Disposable | undefined;

  constructor(options: LightosOptions) {
    this.#options = options;
    this.#gathering = options.metrics?.gather(() =>
      [...this.#endpoints.values()].flatMap((endpoints) => endpoints.samples())
    );
    this.#sweeper = setInterval(() => this.#closeIdle(), idleMs / 10);
    this.#sweeper.unref();
  }

  /**
   * The cluster behind these endpoints, with the credentials of this call. Connects to nothing yet.
   *
   * Endpoints of a known cluster, former ones too, lead to that cluster as it is today: its endpoints, its scheme, and
   * its certificates and token unless the call brings some. Volume IDs never change, endpoints do.
   *
   * @param trustOptions take precedence over all other sources
   * @throws StatusError INVALID_ARGUMENT for bad secrets; UNAVAILABLE when the CA file of the cluster cannot be read
   */
  open(secrets: Secrets, endpoints: readonly Endpoint[], scheme: Scheme, trustOptions: TrustOptions = {}): Cluster {
    const known = this.#options.clusters?.owning(endpoints);
    const trust = this.trust(secrets, endpoints, scheme, trustOptions);
    return this.#at(known?.endpoints ?? endpoints, known, secrets, trust);
  }

  /** The same cluster at each of today's endpoints separately: shows which of them answer. Throws what `open` throws. */
  openEach(
    secrets: Secrets,
    endpoints: readonly Endpoint[],
    scheme: Scheme,
  ): readonly { readonly address: string; readonly cluster: Cluster; readonly trust: Trust | undefined }[] {
    const known = this.#options.clusters?.owning(endpoints);
    const trust = this.trust(secrets, endpoints, scheme);
    return (known?.endpoints ?? endpoints).map((endpoint) => ({
      address: formatEndpoint(endpoint),
      cluster: this.#at([endpoint], known, secrets, trust),
      trust,
    }));
  }

  /**
   * How the cluster behind these endpoints has to prove who it is; undefined: not at all, because the scheme is clear
   * text. Throws what `open` throws.
   */
  trust(
    secrets: Secrets,
    endpoints: readonly Endpoint[],
    scheme: Scheme,
    trustOptions: TrustOptions = {},
  ): Trust | undefined {
    const known = this.#options.clusters?.owning(endpoints);
    if ((known?.scheme ?? scheme) === "grpc") return undefined;
    const given = secrets.parse(secretsSchema);
    const ca = given["mgmt-ca.crt"] ?? known?.ca() ?? this.#options.ca;
    const verify = this.#options.verifyTls;
    return resolveTrust(ca, trustOptions, parseTrustOptions(given), known?.trust ?? {}, { verify });
  }

  #at(
    endpoints: readonly Endpoint[],
    known: KnownCluster | undefined,
    secrets: Secrets,
    trust: Trust | undefined,
  ): Cluster {
    const given = secrets.parse(secretsSchema);
    const proof = createHash("sha256").update(JSON.stringify(trust ?? null)).digest("hex");
    const key = [formatEndpoints(endpoints), trust === undefined ? "grpc" : "grpcs", proof].join(" ");
    let shared = this.#endpoints.get(key);
    if (shared === undefined) {
      shared = new ClusterEndpoints(this.#options, endpoints, trust);
      this.#endpoints.set(key, shared);
    }
    const credentials = selectCredentials(this.#options, {
      secretJwt: given.jwt,
      hasSecretCa: given["mgmt-ca.crt"] !== undefined,
      known,
      trust,
    });
    const isAlsoAt = (others: readonly Endpoint[]) =>
      known !== undefined && this.#options.clusters?.owning(others)?.name === known.name;
    return new Cluster(shared, credentials, isAlsoAt);
  }

  #closeIdle(): void {
    for (const [key, endpoints] of this.#endpoints) {
      if (!endpoints.isIdleFor(idleMs)) continue;
      endpoints[Symbol.dispose]();
      this.#endpoints.delete(key);
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#sweeper);
    this.#gathering?.[Symbol.dispose]();
    for (const endpoints of this.#endpoints.values()) endpoints[Symbol.dispose]();
    this.#endpoints.clear();
    return Promise.resolve();
  }
}

/**
 * A LightOS cluster as one call sees it, through the management API (facts: docs/reference/lightos-api.md section 6).
 *
 * `Cluster` has the token of one call and shares its connections with all others: see endpoints.ts for the fail-over
 * between endpoints, pool.ts for the clusters of the process, tokens.ts for the tokens.
 */
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { type ClusterInfoV2, DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Logger } from "../../log.ts";
import type { Metrics } from "../../metrics.ts";
import type { Endpoint } from "../../volume_id.ts";
import { answerProblem } from "./answer_check.ts";
import type { KnownClusters } from "./cluster_file.ts";
import type { ClusterEndpoints } from "./endpoints.ts";
import { removeToken, withoutSecrets } from "./redaction.ts";
import { type Credentials, type TokenFacts, tokenFacts } from "./tokens.ts";

/**
 * Which servers receive the token of the process:
 *
 * - `cluster file`: clusters of the cluster file, over TLS
 * - `own CA`: these, and every server that proves itself by the certificates that the process itself was given
 * - `any endpoint`: every server that a StorageClass or a volume ID names, over clear text too
 */
export type TokenAudience = "cluster file" | "own CA" | "any endpoint";

/** The settings of the process for the management API of LightOS. */
export interface LightosOptions {
  readonly log: Logger;
  /** The token for calls that bring none of their own; undefined when there is none now. */
  readonly globalJwt: () => string | undefined;
  /** Where that token comes from, for messages. */
  readonly globalJwtPath: string;
  /** Which servers receive that token. */
  readonly globalJwtFor: TokenAudience;
  /** PEM certificates to trust instead of the built-in ones, as `readPem` returns them. */
  readonly ca: string | undefined;
  /** False accepts any certificate of the management API. */
  readonly verifyTls: boolean;
  readonly userAgent: string;
  /** The clusters of the cluster file; undefined: no cluster file. */
  readonly clusters?: KnownClusters | undefined;
  readonly metrics?: Metrics | undefined;
}

/** One cluster as one call sees it: shared connections, its own credentials. */
export class Cluster {
  readonly #endpoints: ClusterEndpoints;
  readonly #credentials: Credentials;
  /** Whether the cluster file says that these endpoints, former ones too, are this cluster's. */
  readonly isAlsoAt: (endpoints: readonly Endpoint[]) => boolean;

  constructor(
    endpoints: ClusterEndpoints,
    credentials: Credentials,
    isAlsoAt: (endpoints: readonly Endpoint[]) => boolean,
  ) {
    this.#endpoints = endpoints;
    this.#credentials = credentials;
    this.isAlsoAt = isAlsoAt;
  }

  /** What may be shown of the token of this call. */
  get token(): TokenFacts {
    return tokenFacts(this.#credentials);
  }

  /** The endpoint that answered last, for messages. */
  get lastAddress(): string {
    return this.#endpoints.lastAddress;
  }

  /**
   * Calls a method of the management API, at an endpoint that answers: see ClusterEndpoints.call.
   *
   * @throws StatusError INTERNAL, too, when the answer does not fit the request
   */
  async call<I extends DescMessage, O extends DescMessage>(
    ctx: RequestContext,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    headers: Readonly<Record<string, string>> = {},
  ): Promise<MessageShape<O>> {
    const { jwt } = this.#credentials;
    const answer = await this.#endpoints.call(ctx, { method, request, headers, credentials: this.#credentials });
    removeToken(answer, jwt);
    const problem = answerProblem(method.name, request, answer);
    if (problem === undefined) return answer;
    const shown = withoutSecrets(problem, request, jwt);
    throw ctx.error("INTERNAL", `LightOS at ${this.lastAddress} answered ${method.name} with ${shown}`);
  }

  /** What the cluster reports of itself, at most a minute old. Throws UNAVAILABLE while it has no subsystem NQN. */
  async info(ctx: RequestContext): Promise<ClusterInfoV2> {
    const known = this.#endpoints.freshInfo();
    if (known !== undefined) return known;
    const info = await this.call(ctx, DurosAPI.method.getClusterInfo, {});
    if (!info.subsystemNQN.startsWith("nqn.")) {
      throw ctx.error(
        "UNAVAILABLE",
        `LightOS at ${this.lastAddress} has no subsystem NQN yet ("${info.subsystemNQN}")`,
      );
    }
    this.#endpoints.remember(info);
    return info;
  }
}

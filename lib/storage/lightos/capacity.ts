/**
 * GetCapacity on LightOS: the space that is left, as LightOS estimates it, divided by the number of replicas. LightOS
 * reports it for whole clusters, to tokens with a right to the cluster, and has no quota for a project (facts:
 * docs/reference/lightos-api.md sections 9.9, 14 and 15).
 */
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { Secrets } from "../../secrets.ts";
import type { Endpoint, Scheme } from "../../volume_id.ts";
import type { Capacity } from "../backend.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import type { KnownClusters } from "./cluster_file.ts";
import type { ClusterPool } from "./pool.ts";
import { gib } from "./size.ts";
import type { TrustOptions } from "./trust.ts";

/** The StorageClass parameters that GetCapacity needs. */
export interface CapacityParameters {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly replicaCount: number;
  readonly trust: TrustOptions;
}

/**
 * The capacity part of the LightOS backend.
 *
 * @param parse reads StorageClass parameters; throws INVALID_ARGUMENT
 */
export function lightosCapacity(
  clusters: ClusterPool,
  known: KnownClusters | undefined,
  parse: (ctx: RequestContext, parameters: Readonly<Record<string, string>>) => CapacityParameters,
): Capacity {
  return {
    async getCapacity(call, parameters) {
      const ctx = call.doing("measure the capacity");
      const targets = Object.keys(parameters).length === 0 && known !== undefined
        ? known.all().map(({ endpoints, scheme }) => ({ endpoints, scheme, replicaCount: 1, trust: {} }))
        : [parse(ctx, parameters)];
      const free = await Promise.all(
        targets.map(({ endpoints, scheme, replicaCount, trust }) =>
          freeBytes(ctx, clusters.open(new Secrets(), endpoints, scheme, trust), replicaCount)
        ),
      );
      return { availableBytes: free.reduce((sum, bytes) => sum + bytes, 0n), minimumVolumeBytes: gib };
    },
  };
}

async function freeBytes(ctx: RequestContext, cluster: Cluster, replicaCount: number): Promise<bigint> {
  try {
    const { statistics, currentMaxReplicas } = await cluster.call(ctx, DurosAPI.method.getCluster, {});
    if (statistics === undefined) {
      throw ctx.error("UNAVAILABLE", `LightOS at ${cluster.lastAddress} reports no statistics of the cluster now`);
    }
    // No volume of that many replicas can be made. A cluster reports 0 for a moment while it starts.
    if (currentMaxReplicas > 0 && replicaCount > currentMaxReplicas) return 0n;
    return statistics.estimatedFreeLogicalStorage / BigInt(replicaCount);
  } catch (error) {
    if (!(error instanceof LightosError) || !hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) throw error;
    throw new StatusError(
      error.code,
      `${error.message}; the statistics of a cluster need a token with a right to the cluster`,
      { cause: error },
    );
  }
}

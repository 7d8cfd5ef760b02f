/** Gives hosts access to LightOS volumes, takes it away, and says where a volume can be connected to. */
import type { AuthKind } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import type { Logger } from "../../log.ts";
import { parseAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import type { VolumeId } from "../../volume_id.ts";
import { aclWith, aclWithout, volumeAcl } from "./acl.ts";
import type { Cluster } from "./cluster.ts";
import { changeVolume } from "./volumes.ts";

/**
 * Puts a host on the access list of a volume. Rejects a second node where access is for a single writer: `aclWith` throws
 * FAILED_PRECONDITION then.
 */
export async function allowHost(
  ctx: RequestContext,
  cluster: Cluster,
  id: VolumeId,
  { hostNqn, shared }: { readonly hostNqn: string; readonly shared: boolean },
): Promise<void> {
  await changeAcl(ctx, cluster, id, (acl) => aclWith(ctx, acl, hostNqn, shared));
}

/** Takes a host (undefined: every host) off the access list of a volume. Absent volume or host: done. */
export async function disallowHost(
  ctx: RequestContext,
  cluster: Cluster,
  id: VolumeId,
  hostNqn: string | undefined,
): Promise<void> {
  try {
    await changeAcl(ctx, cluster, id, (acl) => aclWithout(acl, hostNqn));
  } catch (error) {
    if (!hasCode(error, "NOT_FOUND")) throw error;
  }
}

/** Where hosts connect to a volume now. Throws UNAVAILABLE when the cluster names no endpoint. */
export async function remoteNamespace(
  ctx: RequestContext,
  cluster: Cluster,
  uuid: string,
  inBandAuth: AuthKind | undefined,
): Promise<RemoteNamespace> {
  const info = await cluster.info(ctx);
  const addresses = toAddresses(ctx.log, info.nvmeEndpoints);
  const discovery = toAddresses(ctx.log, info.discoveryEndpoints);
  if (addresses.length === 0 && discovery.length === 0) {
    throw ctx.error("UNAVAILABLE", `LightOS at ${cluster.lastAddress} names no NVMe and no discovery endpoint`);
  }
  const place = { uuid, subsystemNqn: info.subsystemNQN, addresses, discovery };
  return inBandAuth === undefined ? place : { ...place, inBandAuth };
}

async function changeAcl(
  ctx: RequestContext,
  cluster: Cluster,
  id: VolumeId,
  decide: (acl: readonly string[]) => readonly string[] | undefined,
): Promise<void> {
  await changeVolume(ctx, cluster, id, {
    decide: (volume) => {
      const values = decide(volumeAcl(volume));
      return values === undefined ? undefined : { acl: { values: [...values] } };
    },
    confirmation: "trust the answer",
  });
}

function toAddresses(log: Logger, endpoints: readonly string[]): readonly TransportAddress[] {
  return [...new Set(endpoints)].sort().flatMap((text) => {
    const address = parseAddress(text);
    if (address === undefined) log.warning("passed over an endpoint that is not an IP address", { address: text });
    return address === undefined ? [] : [address];
  });
}

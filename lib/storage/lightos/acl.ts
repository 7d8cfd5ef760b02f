/**
 * Access lists of LightOS volumes: the host NQNs that may connect (facts: docs/reference/lightos-api.md section 1).
 *
 * An access list does not say with which access mode a host got access, so a request for shared access joins a host
 * that has the volume exclusively. Orchestrators use one mode for each volume: Kubernetes derives it from the
 * PersistentVolume, where it cannot change. A label that remembers the mode, written with the list, was considered and
 * rejected: LightOS keeps 16 labels of which some are the owner's, older versions do not change them, and a volume of
 * the incumbent driver has none.
 */
import type { Volume as LightosVolume } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { nodeIdOf } from "../../namespace.ts";

/** The entry of a list that lets no host in. */
export const aclNone = "ALLOW_NONE";
/** The entry of a list that lets any host in. */
export const aclAny = "ALLOW_ANY";

/** The access list, sorted, each entry once. */
export function volumeAcl(volume: LightosVolume): readonly string[] {
  return [...new Set(volume.acl?.values ?? [])].sort();
}

/** The host NQNs of an access list. */
export function hostsIn(acl: readonly string[]): readonly string[] {
  return acl.filter((entry) => entry !== aclNone && entry !== aclAny);
}

/** Node IDs of hosts for a message; only the first ten, because there may be thousands. */
export function nameHosts(hosts: readonly string[]): string {
  const named = hosts.slice(0, 10).map(nodeIdOf).join(", ");
  return hosts.length <= 10 ? named : `${named} and ${hosts.length - 10} others`;
}

/**
 * The ACL with this host in it, or undefined when it needs no change. Throws FAILED_PRECONDITION when it is open to any
 * host, or when another host is in it and access is not shared: this is what rejects a second node (single-writer access).
 */
export function aclWith(
  ctx: RequestContext,
  acl: readonly string[],
  hostNqn: string,
  shared: boolean,
): readonly string[] | undefined {
  if (acl.includes(aclAny)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `its access list is open to any host (${aclAny}), set it to ${aclNone} on LightOS first`,
    );
  }
  const hosts = hostsIn(acl);
  const others = hosts.filter((host) => host !== hostNqn);
  if (!shared && others.length > 0) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${nameHosts(others)} has it, and its access mode is for one node; it must be detached there first`,
    );
  }
  if (hosts.includes(hostNqn) && !acl.includes(aclNone)) return undefined;
  return [...new Set([...hosts, hostNqn])].sort();
}

/** The ACL without this host (undefined: without any), or undefined when it needs no change. */
export function aclWithout(acl: readonly string[], hostNqn: string | undefined): readonly string[] | undefined {
  // This driver never makes an open list; removing one host from it means nothing, removing every host does.
  if (hostNqn !== undefined && !acl.includes(hostNqn) && acl.length > 0) return undefined;
  if (acl.length === 1 && acl[0] === aclNone) return undefined;
  const left = hostNqn === undefined ? [] : acl.filter((entry) => entry !== hostNqn);
  return left.length === 0 ? [aclNone] : left;
}

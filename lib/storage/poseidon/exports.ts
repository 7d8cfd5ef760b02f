/**
 * Exports of volumes on PoseidonOS: which hosts can connect to a volume (facts: docs/reference/poseidonos-api.md
 * sections 6.7 to 6.12, 11.3, 11.4).
 *
 * PoseidonOS has no access lists: every host that can connect to the port gets in. So a volume is exported when a node
 * is granted access and un-exported when it is revoked, through a subsystem of its own whose NQN names volume and node.
 * That subsystem is how PoseidonOS remembers which node has a volume; and a host that lost its grant finds no such subsystem.
 * A volume is exported in one place only, so only one node can have it.
 *
 * PoseidonOS forgets exports, subsystems and listeners when it starts. Granting the same node again makes them again
 * under the same names, and the kernel of that node, which still tries to reconnect, continues where it was.
 */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { hostNqn, nodeIdOf, poseidonNqnPrefix, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import { converge, type Next } from "./converge.ts";
import type { Dagent } from "./dagent.ts";
import { means, type PoseidonError } from "./dagent_error.ts";
import {
  hasTcpTransport,
  namespaceOf,
  type PoseidonNamespace,
  type PoseidonSubsystem,
  type PoseidonVolume,
  readSubsystems,
} from "./inventory.ts";

/** poseidonNqnPrefix is followed by a volume's UUID, a colon and a node ID. An NQN has 223 bytes at most. */
const longestNqn = 223;

/** Host NQNs of the nodes that a volume is exported to. */
export function hostsOf(
  subsystems: readonly PoseidonSubsystem[],
  volume: PoseidonVolume,
  arrayName: string,
): readonly string[] {
  return subsystems.flatMap((subsystem) => {
    const node = nodeOf(subsystem, volume.uuid);
    return node === undefined || namespaceOf(subsystem, volume, arrayName) === undefined ? [] : [hostNqn(node)];
  });
}

/** Who may still use a volume, for messages; undefined: it is not exported. */
export function exportHolders(
  subsystems: readonly PoseidonSubsystem[],
  volume: PoseidonVolume,
  arrayName: string,
): string | undefined {
  const holders = subsystems.filter((subsystem) => namespaceOf(subsystem, volume, arrayName) !== undefined);
  if (holders.length === 0) return undefined;
  return `${holders.map((subsystem) => describeHolder(subsystem, volume.uuid)).join(", ")} may still use it`;
}

/** A volume and the name of its array. */
export interface ArrayVolume {
  readonly array: string;
  readonly volume: PoseidonVolume;
}

/** To whom a volume is exported, and where. */
export interface ExportTarget {
  /** Host NQN of the node. */
  readonly host: string;
  /** Where PoseidonOS listens for it. */
  readonly addresses: readonly TransportAddress[];
}

/**
 * Exports the volume to one node, at these addresses.
 *
 * @throws StatusError FAILED_PRECONDITION when another node has it, or the target cannot listen there
 */
export async function exportVolume(
  ctx: RequestContext,
  dagent: Dagent,
  { array, volume }: ArrayVolume,
  { host, addresses }: ExportTarget,
): Promise<RemoteNamespace> {
  const nqn = subsystemNqn(ctx, volume, host);
  let isStale = volume.status === "Mounted";
  await converge(ctx, dagent, {
    look: () => readSubsystems(ctx, dagent),
    next: (subsystems): Next<void> => {
      assertNotElsewhere(ctx, subsystems, nqn, { array, volume });
      const own = subsystems.find((subsystem) => subsystem.nqn === nqn);
      if (own === undefined) {
        const param = newSubsystem(nqn, volume);
        return { step: "make the subsystem", change: { method: "POST", path: "/subsystem", param } };
      }
      const missing = addresses.find((address) => !listensAt(own, address));
      if (missing !== undefined) return listenerStep(ctx, dagent, nqn, missing);
      if (namespaceOf(own, volume, array) !== undefined) return { done: undefined };
      if (isStale) {
        // It says that it is exported, and is not: no host can have it, and PoseidonOS would reject the export.
        isStale = false;
        return unexportChange(volume, array);
      }
      const path = `/volumes/${encodeURIComponent(volume.name)}/mount`;
      return { step: "export the volume", change: { method: "POST", path, param: { array, subnqn: nqn } } };
    },
  });
  return { uuid: volume.uuid, subsystemNqn: nqn, addresses, discovery: [] };
}

/** The step that un-exports a volume. */
export function unexportChange({ name }: PoseidonVolume, array: string): Next<never> {
  return {
    step: "un-export the volume",
    change: { method: "DELETE", path: `/volumes/${encodeURIComponent(name)}/mount`, param: { array } },
  };
}

/** From whom a volume is taken, and how it is found. */
export interface UnexportOptions {
  /** Host NQN of the node; undefined: every host. */
  readonly host: string | undefined;
  /**
   * The volume as the array shows it now; undefined when the array certainly has none of this UUID. Called only when
   * something is exported.
   */
  readonly find: () => Promise<PoseidonVolume | undefined>;
}

/**
 * Un-exports a volume and removes the subsystems that were made for it. When this returns, the namespace is gone: the
 * next change, such as a deletion, cannot overtake it.
 *
 * @throws StatusError UNAVAILABLE while it stays exported, FAILED_PRECONDITION when its subsystem has another namespace
 */
export async function unexportVolume(
  ctx: RequestContext,
  dagent: Dagent,
  { uuid, array }: { readonly uuid: string; readonly array: string },
  { host, find }: UnexportOptions,
): Promise<void> {
  const node = host === undefined ? undefined : nodeIdOf(host);
  const isMeant = (subsystem: PoseidonSubsystem) => {
    const holder = nodeOf(subsystem, uuid);
    return holder !== undefined && (node === undefined || holder === node);
  };
  await converge(ctx, dagent, {
    look: () => readSubsystems(ctx, dagent),
    next: async (subsystems): Promise<Next<void>> => {
      // A version that shows no UUIDs of namespaces shows block devices, by the number of the volume.
      const showsUuids = subsystems.every(({ namespaces }) => namespaces.every(({ uuid }) => uuid !== ""));
      const known = showsUuids ? { uuid, index: -1 } : await find() ?? { uuid, index: -1 };
      const exporting = subsystems.filter((subsystem) =>
        (node === undefined || isMeant(subsystem)) && namespaceOf(subsystem, known, array) !== undefined
      );
      if (exporting.length > 0) {
        const volume = await find();
        if (volume === undefined) {
          throw ctx.error(
            "UNAVAILABLE",
            `PoseidonOS at ${dagent.address} exports it and does not list it on array "${array}"`,
          );
        }
        if (volume.status === "Mounted") return unexportChange(volume, array);
        // It says that it is not exported, and still is (docs/reference/poseidonos-api.md 6.8): then its subsystem
        // goes, and the namespace with it.
      }
      const next = exporting.find(isMeant) ?? subsystems.find(isMeant);
      if (next !== undefined) {
        assertOwnSubsystem(ctx, next, namespaceOf(next, known, array));
        return {
          step: `delete ${next.nqn}`,
          // The key was `name` before POS 0.12.
          change: { method: "DELETE", path: "/subsystem", param: { subnqn: next.nqn, name: next.nqn } },
        };
      }
      const stuck = exporting[0];
      if (stuck === undefined) return { done: undefined };
      throw ctx.error(
        "UNAVAILABLE",
        `PoseidonOS at ${dagent.address} still shows it in ${stuck.nqn}, which this driver did not make`,
      );
    },
  });
}

/** The node that a subsystem was made for, if it is one of ours for this volume. */
function nodeOf({ nqn }: PoseidonSubsystem, uuid: string): string | undefined {
  const prefix = `${poseidonNqnPrefix}${uuid}:`;
  return nqn.startsWith(prefix) ? nqn.slice(prefix.length) : undefined;
}

/** Who can connect to the volume, for messages: a node, or a subsystem that is not ours. */
function describeHolder(subsystem: PoseidonSubsystem, uuid: string): string {
  return nodeOf(subsystem, uuid) ?? `any host that connects to ${subsystem.nqn}`;
}

/** The NQN of the subsystem for a volume and a node; throws FAILED_PRECONDITION when it is too long. */
function subsystemNqn(ctx: RequestContext, volume: PoseidonVolume, host: string): string {
  const node = nodeIdOf(host);
  const nqn = `${poseidonNqnPrefix}${volume.uuid}:${node}`;
  if (nqn.length <= longestNqn) return nqn;
  throw ctx.error(
    "FAILED_PRECONDITION",
    `with PoseidonOS a node ID has ${
      longestNqn - nqn.length + node.length
    } characters at most, "${node}" has ${node.length}`,
  );
}

/** Throws FAILED_PRECONDITION when the volume is exported through another subsystem than `nqn`. */
function assertNotElsewhere(
  ctx: RequestContext,
  subsystems: readonly PoseidonSubsystem[],
  nqn: string,
  { array, volume }: ArrayVolume,
): void {
  const elsewhere = subsystems.filter((subsystem) =>
    subsystem.nqn !== nqn && namespaceOf(subsystem, volume, array) !== undefined
  );
  if (elsewhere.length === 0) return;
  const areOurs = elsewhere.every((subsystem) => nodeOf(subsystem, volume.uuid) !== undefined);
  const holders = elsewhere.map((subsystem) => describeHolder(subsystem, volume.uuid)).join(", ");
  const advice = areOurs
    ? "and PoseidonOS exports a volume in one place only; it must be detached there first"
    : "and only its maker knows whether it is in use; un-export it on PoseidonOS first (volume unmount)";
  throw ctx.error("FAILED_PRECONDITION", `${holders} has it, ${advice}`);
}

/**
 * The parameters of a new subsystem. It has room for one namespace, so that no other one is put where this node sees
 * it; any host may connect, because PoseidonOS has no way to name one (docs/reference/poseidonos-api.md 6.11).
 */
function newSubsystem(nqn: string, { uuid }: PoseidonVolume): Readonly<Record<string, unknown>> {
  return {
    nqn,
    // 20 characters at most. Volumes with the same serial would share links below /dev/disk/by-id.
    serialNumber: uuid.replaceAll("-", "").slice(0, 20).toUpperCase(),
    modelNumber: "PoseidonOS volume by lbcsi",
    maxNamespaces: 1,
    allowAnyHost: true,
    anaReporting: false,
  };
}

function listensAt(subsystem: PoseidonSubsystem, { traddr, trsvcid }: TransportAddress): boolean {
  return subsystem.listenAddresses.some(({ transportType, targetAddress, transportServiceId }) =>
    transportType.toUpperCase() === "TCP" && targetAddress === traddr && transportServiceId === trsvcid
  );
}

function listenerStep(ctx: RequestContext, dagent: Dagent, nqn: string, address: TransportAddress): Next<never> {
  const { traddr, trsvcid } = address;
  return {
    step: `listen on ${traddr}:${trsvcid}`,
    change: {
      method: "POST",
      path: "/listener",
      param: { subnqn: nqn, transportType: "tcp", targetAddress: traddr, transportServiceId: trsvcid },
    },
    explain: (rejection) => explainListener(ctx, dagent, address, rejection),
  };
}

/** Why the target does not listen. Its answer does not say, so its transports are looked at. */
async function explainListener(
  ctx: RequestContext,
  dagent: Dagent,
  { traddr, trsvcid }: TransportAddress,
  rejection: PoseidonError,
): Promise<StatusError | undefined> {
  if (!means(rejection, "refused by the target")) return undefined;
  const reason = await hasTcpTransport(ctx, dagent)
    ? `targetAddress ${traddr} is not one of its addresses, or port ${trsvcid} is taken there`
    : "it has no TCP transport, which has to be made first (poseidonos-cli subsystem create-transport, or " +
      "transport.enable in its pos.conf)";
  return new StatusError("FAILED_PRECONDITION", `${rejection.message}; ${reason}`, { cause: rejection });
}

/**
 * Throws FAILED_PRECONDITION for a subsystem with another namespace: deleting it removes all
 * (docs/reference/poseidonos-api.md 6.11).
 */
function assertOwnSubsystem(
  ctx: RequestContext,
  { nqn, namespaces }: PoseidonSubsystem,
  own: PoseidonNamespace | undefined,
): void {
  const foreign = namespaces.find((namespace) => namespace !== own);
  if (foreign === undefined) return;
  throw ctx.error(
    "FAILED_PRECONDITION",
    `somebody has put namespace ${foreign.uuid || foreign.bdevName} into ${nqn}, which was made for this ` +
      `volume alone; it has to be taken out first`,
  );
}

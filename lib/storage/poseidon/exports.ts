/**
 * Who may reach a volume on PoseidonOS (facts: docs/reference/poseidonos-api.md sections 6.7 to 6.12, 11.3, 11.4).
 *
 * PoseidonOS lets any host in that reaches the port: it has no access lists. So a volume is exported when a node is granted
 * access and un-exported when it is revoked, through a subsystem of its own whose NQN names volume and node. PoseidonOS
 * remembers for us who has a volume, in the only words that it has; and a host that lost its grant finds no such
 * subsystem. A volume is exported in one place only, so it can be with one node only.
 *
 * PoseidonOS forgets exports, subsystems and listeners when it starts. Granting the same node again makes them anew under
 * the same names, and the kernel of that node, which still tries to reach them, goes on where it was.
 */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { hostNqn, nodeIdOf, poseidonNqnPrefix, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import { converge, type Dagent, means, type Next, type PoseidonError } from "./dagent.ts";
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

/** The node that a subsystem was made for, if it is one of ours for this volume. */
function nodeOf({ nqn }: PoseidonSubsystem, uuid: string): string | undefined {
  const prefix = `${poseidonNqnPrefix}${uuid}:`;
  return nqn.startsWith(prefix) ? nqn.slice(prefix.length) : undefined;
}

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

/** Who can reach the volume, for messages: a node, or a subsystem that is not ours. */
function describeHolder(subsystem: PoseidonSubsystem, uuid: string): string {
  return nodeOf(subsystem, uuid) ?? `whoever connects to ${subsystem.nqn}`;
}

/** Why a volume that is exported cannot go, or undefined. */
export function heldBy(
  subsystems: readonly PoseidonSubsystem[],
  volume: PoseidonVolume,
  arrayName: string,
): string | undefined {
  const holders = subsystems.filter((subsystem) => namespaceOf(subsystem, volume, arrayName) !== undefined);
  if (holders.length === 0) return undefined;
  return `${holders.map((subsystem) => describeHolder(subsystem, volume.uuid)).join(", ")} may still use it`;
}

/** A volume and where it is. */
export interface Place {
  readonly dagent: Dagent;
  readonly array: string;
  readonly volume: PoseidonVolume;
}

/**
 * Exports the volume to one node, at these addresses.
 *
 * @throws StatusError FAILED_PRECONDITION when another node has it, or the target cannot listen there
 */
export async function exportVolume(
  ctx: RequestContext,
  action: string,
  { dagent, array, volume }: Place,
  host: string,
  addresses: readonly TransportAddress[],
): Promise<RemoteNamespace> {
  const node = nodeIdOf(host);
  const nqn = `${poseidonNqnPrefix}${volume.uuid}:${node}`;
  if (nqn.length > longestNqn) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: with PoseidonOS a node ID has ${
        longestNqn - nqn.length + node.length
      } characters at most, "${node}" has ${node.length}`,
    );
  }
  let isStale = volume.status === "Mounted";
  await converge(
    ctx,
    action,
    dagent,
    () => readSubsystems(ctx, dagent, action),
    (subsystems): Next<void> => {
      const elsewhere = subsystems.filter((subsystem) =>
        subsystem.nqn !== nqn && namespaceOf(subsystem, volume, array) !== undefined
      );
      if (elsewhere.length > 0) {
        const ours = elsewhere.every((subsystem) => nodeOf(subsystem, volume.uuid) !== undefined);
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot ${action}: ${
            elsewhere.map((subsystem) => describeHolder(subsystem, volume.uuid)).join(", ")
          } has it, ${
            ours
              ? "and PoseidonOS exports a volume in one place only; it must be detached there first"
              : "and nobody but its maker can tell whether it is in use; un-export it on PoseidonOS first (volume unmount)"
          }`,
        );
      }
      const mine = subsystems.find((subsystem) => subsystem.nqn === nqn);
      if (mine === undefined) {
        return {
          step: "make the subsystem",
          change: { method: "POST", path: "/subsystem", param: subsystem(nqn, volume) },
        };
      }
      const missing = addresses.find((address) => !listens(mine, address));
      if (missing !== undefined) {
        return {
          step: `listen on ${missing.traddr}:${missing.trsvcid}`,
          change: {
            method: "POST",
            path: "/listener",
            param: {
              subnqn: nqn,
              transportType: "tcp",
              targetAddress: missing.traddr,
              transportServiceId: missing.trsvcid,
            },
          },
          explain: (refusal) => explainListener(ctx, action, dagent, missing, refusal),
        };
      }
      if (namespaceOf(mine, volume, array) !== undefined) return { done: undefined };
      if (isStale) {
        // Exported by its own word, and nowhere in fact: nobody can have it, and PoseidonOS would refuse to export it.
        isStale = false;
        return unmount(volume, array);
      }
      return {
        step: "export the volume",
        change: {
          method: "POST",
          path: `/volumes/${encodeURIComponent(volume.name)}/mount`,
          param: { array, subnqn: nqn },
        },
      };
    },
  );
  return { uuid: volume.uuid, subsystemNqn: nqn, addresses, discovery: [] };
}

/**
 * What a new subsystem is to be. It has room for one namespace, so that nobody puts another one where this node sees it;
 * any host may connect, for there is no way to name one (docs/reference/poseidonos-api.md 6.11).
 */
function subsystem(nqn: string, { uuid }: PoseidonVolume): Readonly<Record<string, unknown>> {
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

function listens(subsystem: PoseidonSubsystem, { traddr, trsvcid }: TransportAddress): boolean {
  return subsystem.listenAddresses.some(({ transportType, targetAddress, transportServiceId }) =>
    transportType.toUpperCase() === "TCP" && targetAddress === traddr && transportServiceId === trsvcid
  );
}

/** Why the target refuses to listen. It does not say, so what it lacks is looked up. */
async function explainListener(
  ctx: RequestContext,
  action: string,
  dagent: Dagent,
  { traddr, trsvcid }: TransportAddress,
  refusal: PoseidonError,
): Promise<StatusError | undefined> {
  if (!means(refusal, "refused by the target")) return undefined;
  const reason = await hasTcpTransport(ctx, dagent, action)
    ? `targetAddress ${traddr} is not one of its addresses, or port ${trsvcid} is taken there`
    : "it has no TCP transport, which has to be made first (poseidonos-cli subsystem create-transport, or " +
      "transport.enable in its pos.conf)";
  return new StatusError("FAILED_PRECONDITION", `${refusal.message}; ${reason}`, { cause: refusal });
}

function unmount({ name }: PoseidonVolume, array: string): Next<never> {
  return {
    step: "un-export the volume",
    change: { method: "DELETE", path: `/volumes/${encodeURIComponent(name)}/mount`, param: { array } },
  };
}

/**
 * Takes a volume away from a node, or from everybody when `host` is undefined, and removes the subsystems that were made
 * for it. When it returns, the namespace is gone: what comes next, a deletion as well, cannot overtake it.
 *
 * @param find the volume as the array shows it now; undefined when the array surely has none of this UUID. Asked for only
 *   when something is exported
 */
export async function unexportVolume(
  ctx: RequestContext,
  action: string,
  dagent: Dagent,
  { uuid, array }: { readonly uuid: string; readonly array: string },
  host: string | undefined,
  find: () => Promise<PoseidonVolume | undefined>,
): Promise<void> {
  const node = host === undefined ? undefined : nodeIdOf(host);
  const isMeant = (subsystem: PoseidonSubsystem) => {
    const holder = nodeOf(subsystem, uuid);
    return holder !== undefined && (node === undefined || holder === node);
  };
  await converge(
    ctx,
    action,
    dagent,
    () => readSubsystems(ctx, dagent, action),
    async (subsystems): Promise<Next<void>> => {
      // A version that tells no UUIDs of namespaces tells block devices, by the number of the volume.
      const tellsUuids = subsystems.every(({ namespaces }) => namespaces.every(({ uuid }) => uuid !== ""));
      const known = tellsUuids ? { uuid, index: -1 } : await find() ?? { uuid, index: -1 };
      const exporting = subsystems.filter((subsystem) =>
        (node === undefined || isMeant(subsystem)) && namespaceOf(subsystem, known, array) !== undefined
      );
      if (exporting.length > 0) {
        const volume = await find();
        if (volume === undefined) {
          throw new StatusError(
            "UNAVAILABLE",
            `Cannot ${action}: PoseidonOS at ${dagent.address} exports it and does not list it on array "${array}"`,
          );
        }
        if (volume.status === "Mounted") return unmount(volume, array);
        // Un-exported by its own word, and still there (docs/reference/poseidonos-api.md 6.8): then its subsystem goes, and the namespace with it.
      }
      const next = exporting.find(isMeant) ?? subsystems.find(isMeant);
      if (next !== undefined) {
        assertOwnSubsystem(action, next, namespaceOf(next, known, array));
        return {
          step: `delete ${next.nqn}`,
          // The key was `name` before POS 0.12.
          change: { method: "DELETE", path: "/subsystem", param: { subnqn: next.nqn, name: next.nqn } },
        };
      }
      const stuck = exporting[0];
      if (stuck === undefined) return { done: undefined };
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot ${action}: PoseidonOS at ${dagent.address} still shows it in ${stuck.nqn}, which this driver did not make`,
      );
    },
  );
}

/** Deleting a subsystem takes away whatever is in it (docs/reference/poseidonos-api.md 6.11). */
function assertOwnSubsystem(
  action: string,
  { nqn, namespaces }: PoseidonSubsystem,
  own: PoseidonNamespace | undefined,
): void {
  const foreign = namespaces.find((namespace) => namespace !== own);
  if (foreign === undefined) return;
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: somebody has put namespace ${
      foreign.uuid || foreign.bdevName
    } into ${nqn}, which was made for this ` +
      `volume alone; it has to be taken out first`,
  );
}

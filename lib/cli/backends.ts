/**
 * The storage systems that `--backend` names, one record each. A further system gets a record here, and the compiler then
 * names the tables by system that lack it: compose.ts (opens backends), doctor.ts (reports) and simulate.ts.
 */
import { poseidonNqnPrefix } from "../namespace.ts";
import { parsePoseidonId, parseVolumeId, type VolumeId } from "../volume_id.ts";

/** What commands know of a storage system before they open its backend. */
export interface StorageSystem {
  /** Name of the CSIDriver object and the StorageClass provisioner. */
  readonly driverName: string;
  /** Whether volumes can grow: what `expansion` of the backend says, for processes that do not open it. */
  readonly canExpand: boolean;
  /** How the NQNs of its subsystems begin; undefined: in no way that is known, because the cluster chooses them. */
  readonly nqnPrefix: string | undefined;
  /** What connects a node to subsystems unless `--attach` says otherwise. */
  readonly defaultAttach: "direct" | "discovery-client";
  /** Whether its management API takes the token of `--jwt-path`. */
  readonly takesTokens: boolean;
  /** Parses a volume ID; throws NOT_FOUND for one that is not of this system. */
  readonly parseId: (text: string) => Pick<VolumeId, "uuid" | "hostEncryption">;
}

/** The storage systems of this driver. */
export const storageSystems = {
  lightos: {
    driverName: "csi.lightbitslabs.com",
    canExpand: true,
    nqnPrefix: undefined,
    defaultAttach: "discovery-client",
    takesTokens: true,
    parseId: parseVolumeId,
  },
  poseidon: {
    driverName: "csi.pos.io",
    canExpand: false,
    nqnPrefix: poseidonNqnPrefix,
    defaultAttach: "direct",
    takesTokens: false,
    parseId: (text) => ({ uuid: parsePoseidonId(text).uuid, hostEncryption: undefined }),
  },
} as const satisfies Readonly<Record<string, StorageSystem>>;

/** A storage system, as `--backend` names it. */
export type BackendName = keyof typeof storageSystems;

/** All names of `--backend`. */
export const backendNames = Object.keys(storageSystems) as readonly BackendName[];

/**
 * Whether a subsystem is of this storage system; a node can have volumes of several. A system without a prefix has all
 * subsystems that no other one claims.
 */
export function isSubsystemOf(backend: BackendName): (subsystemNqn: string) => boolean {
  const systems: readonly StorageSystem[] = Object.values(storageSystems);
  const { nqnPrefix } = storageSystems[backend];
  if (nqnPrefix !== undefined) return (nqn) => nqn.startsWith(nqnPrefix);
  return (nqn) => !systems.some((system) => system.nqnPrefix !== undefined && nqn.startsWith(system.nqnPrefix));
}

/** What connects this node to subsystems: `--attach`, or what the storage system has by default. */
export function attachMode(
  { attach, backend }: {
    readonly attach?: StorageSystem["defaultAttach"] | undefined;
    readonly backend: BackendName;
  },
): StorageSystem["defaultAttach"] {
  return attach ?? storageSystems[backend].defaultAttach;
}

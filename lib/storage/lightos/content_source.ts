/**
 * The content of new LightOS volumes: a snapshot, or another volume, which is cloned through a helper snapshot (facts:
 * docs/reference/lightos-api.md sections 6.5, 9.4 and 14; helper_snapshots.ts).
 */
import {
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as State,
  type Volume as LightosVolume,
} from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import {
  type Endpoint,
  formatEndpoint,
  formatEndpoints,
  parseVolumeId,
  type Scheme,
  type VolumeId,
} from "../../volume_id.ts";
import type { ContentSource } from "../backend.ts";
import type { Cluster } from "./cluster.ts";
import {
  cloneLabel,
  cloneSourceOf,
  isRepeated,
  namedCloneSource,
  removeHelpers,
  takeHelper,
} from "./helper_snapshots.ts";
import { readSnapshot } from "./snapshots.ts";
import { readVolume } from "./volumes.ts";

/** The new volume that gets its content from a source: its name, and the parameters that have to fit the source. */
export interface CopyTarget {
  readonly name: string;
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly project: string | undefined;
  readonly hostEncryption: VolumeId["hostEncryption"];
}

/** Where a new volume gets its content from. */
export interface Origin {
  /** The project of source and volume. */
  readonly project: string | undefined;
  /** Labels for the new volume that name its source. */
  readonly labels: Readonly<Record<string, string>>;
  /**
   * The snapshot to make the volume from, and the size to make it with.
   *
   * @param sizeFor the size of a volume whose source has so many bytes; throws OUT_OF_RANGE
   * @throws StatusError NOT_FOUND, INVALID_ARGUMENT when the source is on another cluster, UNAVAILABLE while it is not
   *   ready
   */
  begin(ctx: RequestContext, sizeFor: (sourceBytes: bigint) => bigint): Promise<SourceSnapshot>;
  /** How the source of an existing volume differs from this one; undefined when it does not. */
  differenceOf(ctx: RequestContext, volume: LightosVolume): Promise<string | undefined>;
  /** Removes what was needed only while the volume was made, by this attempt or an earlier one. */
  finish(ctx: RequestContext): Promise<void>;
}

/** The snapshot that a new volume is made from. */
export interface SourceSnapshot {
  readonly snapshotUuid: string;
  /** The size of the new volume. */
  readonly sizeBytes: bigint;
}

/**
 * The origin of a volume that is to be made from `source`.
 *
 * @throws StatusError NOT_FOUND when the ID is not one of this driver, INVALID_ARGUMENT when project, scheme or
 *   encryption of the source are not those of the StorageClass
 */
export function originOf(ctx: RequestContext, cluster: Cluster, source: ContentSource, target: CopyTarget): Origin {
  const given = parseVolumeId(source.id, source.type);
  const what = `source ${source.type} ${given.uuid}`;
  const mismatch = (problem: string) => ctx.error("INVALID_ARGUMENT", `${what} ${problem}`);
  // A cluster that has moved: the source has the endpoints and the scheme of its time.
  const isKnown = cluster.isAlsoAt(given.endpoints);
  if (given.scheme !== target.scheme && !isKnown) {
    throw mismatch(`is reached over ${given.scheme}, StorageClass parameter "mgmt-scheme" is "${target.scheme}"`);
  }
  if (given.project !== undefined && target.project !== undefined && given.project !== target.project) {
    throw mismatch(
      `is in project "${given.project}", StorageClass parameter "project-name" is "${target.project}"; ` +
        `LightOS copies within a project only`,
    );
  }
  if (given.hostEncryption !== target.hostEncryption) {
    // A copy is encrypted as its source is, with the same passphrase.
    const [is, asked] = given.hostEncryption === undefined ? ["not ", "enabled"] : ["", "disabled"];
    throw mismatch(`is ${is}encrypted on the host, StorageClass parameter "host-encryption" is ${asked}`);
  }
  const id = { ...given, project: target.project ?? given.project };
  /** Reads the source; distinguishes an absent one from one on another cluster. */
  const readSource = async <T>(read: () => Promise<T>): Promise<T> => {
    try {
      return await read();
    } catch (error) {
      if (!hasCode(error, "NOT_FOUND") || isKnown || haveCommon(given.endpoints, target.endpoints)) throw error;
      throw mismatch(
        `is at ${formatEndpoints(given.endpoints)} and not on the cluster of StorageClass parameter ` +
          `"mgmt-endpoint" (${formatEndpoints(target.endpoints)})`,
      );
    }
  };
  return source.type === "snapshot"
    ? snapshotOrigin(cluster, id, readSource)
    : cloneOrigin(cluster, target.name, id, readSource);
}

/** How an existing volume with another source than `asked` differs, for ALREADY_EXISTS. */
export function sourceDifference(volume: LightosVolume, asked: string): string {
  const { sourceSnapshotUUID: uuid } = volume;
  const source = namedCloneSource(volume);
  const is = uuid === "" ? "none" : source === undefined ? `snapshot ${uuid}` : `volume ${source}`;
  return `content source is ${is}, asked is ${asked}`;
}

/**
 * Makes a volume from `origin` and removes what only the creation needed, also after an error that makes the caller
 * give up; after one that makes it repeat, the repeat does so.
 */
export async function withCleanup<T>(ctx: RequestContext, origin: Origin, make: () => Promise<T>): Promise<T> {
  let made: T;
  try {
    made = await make();
  } catch (error) {
    if (isRepeated(error)) throw error;
    try {
      await origin.finish(ctx);
    } catch (leftover) {
      throw new StatusError("UNAVAILABLE", `${messageOf(error)}; and then: ${messageOf(leftover)}`, { cause: error });
    }
    throw error;
  }
  await origin.finish(ctx);
  return made;
}

type ReadSource = <T>(read: () => Promise<T>) => Promise<T>;

function snapshotOrigin(cluster: Cluster, id: VolumeId, readSource: ReadSource): Origin {
  return {
    project: id.project,
    labels: {},
    async begin(ctx, sizeFor) {
      const snapshot = await readSource(() => readSnapshot(ctx, cluster, id));
      if (snapshot.state !== State.Available) {
        throw ctx.error(
          "UNAVAILABLE",
          `LightOS shows snapshot ${id.uuid} as ${State[snapshot.state]}, it is not ready yet`,
        );
      }
      return { snapshotUuid: id.uuid, sizeBytes: sizeFor(snapshot.size) };
    },
    differenceOf(_ctx, volume) {
      if (volume.sourceSnapshotUUID.toLowerCase() === id.uuid) return Promise.resolve(undefined);
      return Promise.resolve(sourceDifference(volume, `snapshot ${id.uuid}`));
    },
    finish: () => Promise.resolve(),
  };
}

function cloneOrigin(cluster: Cluster, volumeName: string, id: VolumeId, readSource: ReadSource): Origin {
  let helper: LightosSnapshot | undefined;
  return {
    project: id.project,
    labels: { [cloneLabel]: id.uuid },
    async begin(ctx, sizeFor) {
      const source = await readSource(() => readVolume(ctx, cluster, id));
      // Throws before anything is made.
      sizeFor(source.size);
      helper ??= await takeHelper(ctx, cluster, id, volumeName);
      return { snapshotUuid: helper.UUID.toLowerCase(), sizeBytes: sizeFor(helper.size) };
    },
    async differenceOf(ctx, volume) {
      if (await cloneSourceOf(ctx, cluster, volume) === id.uuid) return undefined;
      return sourceDifference(volume, `volume ${id.uuid}`);
    },
    finish: (ctx) => removeHelpers(ctx, cluster, volumeName, id.project),
  };
}

function haveCommon(some: readonly Endpoint[], others: readonly Endpoint[]): boolean {
  const known = new Set(others.map(formatEndpoint));
  return some.some((endpoint) => known.has(formatEndpoint(endpoint)));
}

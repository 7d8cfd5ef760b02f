/**
 * Snapshots of LightOS volumes, and where a new volume gets its content from (facts: docs/reference/lightos-api.md sections 6.5 to 6.7,
 * 9.4, 9.11, 9.12 and 14).
 *
 * LightOS copies from snapshots only, so a clone of a volume takes a helper snapshot first and removes it when the volume
 * is there. The driver can be killed between any two of these calls, and remembers nothing; so:
 * - A helper's name says for which new volume it is and of which source, and ends at random. An attempt uses no helper
 *   but its own: one of an earlier attempt may lack what was written to the source since.
 * - The volume is looked for by name before anything is made. Who finds it makes neither a second one nor a helper.
 * - Helpers, those of earlier attempts too, are removed when the volume is settled and no earlier, for a volume that is
 *   being made may still read its snapshot; also when the caller is told to give up; and before the clone is deleted, so
 *   that a request which reached the cluster late leaves nothing for ever.
 * Only a caller who neither repeats the creation nor deletes the volume leaves a helper, and its description says what
 * it was for.
 */
import { timestampDate } from "@bufbuild/protobuf/wkt";
import { createHash, randomBytes } from "node:crypto";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import {
  type Endpoint,
  formatEndpoint,
  formatEndpoints,
  formatVolumeId,
  longestId,
  longestIdBytes,
  parseVolumeId,
} from "../../volume_id.ts";
import type { Scheme, VolumeId } from "../../volume_id.ts";
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as State,
  type Volume as LightosVolume,
  Volume_StateEnum as VolumeState,
} from "../../../proto/gen/lightos_pb.ts";
import type { ContentSource, Snapshot, Snapshots, VolumeRequest } from "../backend.ts";
import { type Cluster, type ClusterPool, LightosError, readInParts } from "./cluster.ts";
import {
  afterRefusal,
  growingDelays,
  lookAgainLater,
  notDoneCodes,
  pause,
  readVolume,
  unknownState,
  waitUntilSettled,
} from "./volumes.ts";

/** The snapshots of the LightOS backend. A snapshot ID has the form of a volume ID, with the snapshot's UUID. */
export function lightosSnapshots(clusters: ClusterPool): Omit<Snapshots, "listSnapshots"> {
  return {
    uuidOf: (snapshotId) => parseVolumeId(snapshotId, "snapshot").uuid,
    async createSnapshot(ctx, secrets, { name, sourceVolumeId, madeFor }) {
      const source = parseVolumeId(sourceVolumeId);
      const action = `create snapshot "${name}" of volume ${source.uuid}`;
      const cluster = clusters.open(secrets, source.endpoints, source.scheme);
      const bytes = longestIdBytes(source);
      if (bytes > longestId) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action}: with the endpoints of its volume a snapshot ID has up to ${bytes} bytes, ${longestId} are allowed`,
        );
      }
      const description = describe(madeFor);
      const snapshot = await takeSnapshot(ctx, cluster, action, { name, description, source }, "look first");
      const project = snapshot.projectName === "" ? source.project : snapshot.projectName;
      return toSnapshot({ ...source, uuid: snapshot.UUID.toLowerCase(), project }, snapshot);
    },
    async deleteSnapshot(ctx, secrets, snapshotId) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      await removeSnapshot(ctx, cluster, `delete snapshot ${id.uuid}`, id);
    },
    async getSnapshot(ctx, secrets, snapshotId) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      return toSnapshot(id, await readSnapshot(ctx, cluster, `read snapshot ${id.uuid}`, id));
    },
  };
}

/**
 * A snapshot as the controller sees it; `id` is how it is called there. Some versions of LightOS give no creation time;
 * then it is the epoch, which at least stays the same.
 */
export function toSnapshot(id: VolumeId, snapshot: LightosSnapshot): Snapshot {
  return {
    id: formatVolumeId(id),
    sourceVolumeId: formatVolumeId({ ...id, uuid: snapshot.sourceVolumeUUID.toLowerCase() }),
    sizeBytes: snapshot.size,
    createdAt: snapshot.creationTime === undefined ? new Date(0) : timestampDate(snapshot.creationTime),
    ready: snapshot.state === State.Available,
  };
}

/** Whether a snapshot of this name is the helper of a clone, which nobody but this driver should see. */
export function isHelperName(name: string): boolean {
  return helperPattern.test(name);
}

// ------------------------------------------------------------------------------------------------- content of volumes

/** What of a StorageClass has to fit the content source. */
export interface Place {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly project: string | undefined;
  readonly hostEncryption: VolumeId["hostEncryption"];
}

/** Where a new volume gets its content from. */
export interface Origin {
  /** The project of source and volume. */
  readonly project: string | undefined;
  /** Labels for the new volume that tell its source. */
  readonly labels: Readonly<Record<string, string>>;
  /**
   * The snapshot to make the volume from, and the size to make it with.
   *
   * @param sizeFor the size of a volume whose source has so many bytes; throws OUT_OF_RANGE
   * @throws StatusError NOT_FOUND, INVALID_ARGUMENT when the source is on another cluster, UNAVAILABLE while it is not ready
   */
  begin(ctx: RequestContext, sizeFor: (sourceBytes: bigint) => bigint): Promise<Beginning>;
  /** How the source of an existing volume differs from this one; undefined when it does not. */
  differenceOf(ctx: RequestContext, volume: LightosVolume): Promise<string | undefined>;
  /** Removes what was needed only while the volume was made, by this attempt or an earlier one. */
  finish(ctx: RequestContext): Promise<void>;
}

export interface Beginning {
  readonly snapshotUuid: string;
  readonly sizeBytes: bigint;
}

/**
 * The origin of a volume that is to be made from `source`.
 *
 * @throws StatusError NOT_FOUND when the ID is not one of this driver, INVALID_ARGUMENT when project, scheme or encryption of
 *   the source are not those of the StorageClass
 */
export function originOf(
  cluster: Cluster,
  action: string,
  volumeName: string,
  source: ContentSource,
  place: Place,
): Origin {
  const given = parseVolumeId(source.id, source.type);
  const what = `source ${source.type} ${given.uuid}`;
  const refuse = (problem: string) => new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${problem}`);
  // A cluster that has moved: the source has the endpoints and the scheme of its time.
  const isKnown = cluster.isAlsoAt(given.endpoints);
  if (given.scheme !== place.scheme && !isKnown) {
    throw refuse(`${what} is reached over ${given.scheme}, StorageClass parameter "mgmt-scheme" is "${place.scheme}"`);
  }
  if (given.project !== undefined && place.project !== undefined && given.project !== place.project) {
    throw refuse(
      `${what} is in project "${given.project}", StorageClass parameter "project-name" is "${place.project}"; ` +
        `LightOS copies within a project only`,
    );
  }
  if (given.hostEncryption !== place.hostEncryption) {
    // A copy is encrypted as its source is, with the same passphrase.
    const [is, asked] = given.hostEncryption === undefined ? ["not ", "enabled"] : ["", "disabled"];
    throw refuse(`${what} is ${is}encrypted on the host, StorageClass parameter "host-encryption" is ${asked}`);
  }
  const id = { ...given, project: place.project ?? given.project };
  /** The source as `read` finds it; tells an absent one from one on another cluster. */
  const read = async <T>(read: () => Promise<T>): Promise<T> => {
    try {
      return await read();
    } catch (error) {
      if (!hasCode(error, "NOT_FOUND") || isKnown || haveCommon(given.endpoints, place.endpoints)) throw error;
      throw refuse(
        `${what} is at ${formatEndpoints(given.endpoints)} and not on the cluster of StorageClass parameter ` +
          `"mgmt-endpoint" (${formatEndpoints(place.endpoints)})`,
      );
    }
  };
  return source.type === "snapshot"
    ? snapshotOrigin(cluster, action, id, read)
    : cloneOrigin(cluster, action, volumeName, id, read);
}

type Reading = <T>(read: () => Promise<T>) => Promise<T>;

function snapshotOrigin(cluster: Cluster, action: string, id: VolumeId, read: Reading): Origin {
  return {
    project: id.project,
    labels: {},
    async begin(ctx, sizeFor) {
      const snapshot = await read(() => readSnapshot(ctx, cluster, action, id));
      if (snapshot.state !== State.Available) {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot ${action}: LightOS shows snapshot ${id.uuid} as ${State[snapshot.state]}, it is not ready yet`,
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

function cloneOrigin(cluster: Cluster, action: string, volumeName: string, id: VolumeId, read: Reading): Origin {
  let helper: LightosSnapshot | undefined;
  return {
    project: id.project,
    labels: { [cloneLabel]: id.uuid },
    async begin(ctx, sizeFor) {
      const source = await read(() => readVolume(ctx, cluster, action, id));
      sizeFor(source.size);
      const name = `${helperPrefix(volumeName)}${id.uuid}-${randomBytes(6).toString("hex")}`;
      const description = `made by lbcsi to clone volume ${id.uuid} as ${printable(volumeName)}, then to be deleted`;
      helper ??= await takeSnapshot(ctx, cluster, action, { name, description, source: id }, "take it");
      return { snapshotUuid: helper.UUID.toLowerCase(), sizeBytes: sizeFor(helper.size) };
    },
    async differenceOf(ctx, volume) {
      if (await cloneSourceOf(ctx, cluster, action, volume) === id.uuid) return undefined;
      return sourceDifference(volume, `volume ${id.uuid}`);
    },
    finish: (ctx) => removeHelpers(ctx, cluster, action, volumeName, id.project),
  };
}

/** What ALREADY_EXISTS says of a volume with another source than `asked`. */
export function sourceDifference(volume: LightosVolume, asked: string): string {
  const { sourceSnapshotUUID: uuid, sourceSnapshotName: name } = volume;
  const source = volume.labels.find(({ key }) => key === cloneLabel)?.value ?? helperPattern.exec(name)?.[1];
  const is = uuid === "" ? "none" : source === undefined ? `snapshot ${uuid}` : `volume ${source}`;
  return `content source is ${is}, asked is ${asked}`;
}

/**
 * Makes a volume from `origin` and tidies up. After an error that makes the caller give up nothing is left that only the
 * creation needed; after one that makes it repeat, the repeat sees to that.
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

/** Whether the orchestrator repeats CreateVolume after this error for sure (docs/reference/csi.md 2.5). */
function isRepeated(error: unknown): boolean {
  return hasCode(error, "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "UNAVAILABLE");
}

/** Removes the helpers of a volume that is about to be deleted, if it is a clone. */
export async function removeHelpersOf(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  volume: LightosVolume,
  project: string | undefined,
): Promise<void> {
  const isClone = isHelperName(volume.sourceSnapshotName) || volume.labels.some(({ key }) => key === cloneLabel);
  if (isClone) await removeHelpers(ctx, cluster, action, volume.name, project);
}

async function removeHelpers(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  volumeName: string,
  project: string | undefined,
): Promise<void> {
  const prefix = helperPrefix(volumeName);
  // A refusal is for good, and the volume is as it was wanted: neither its creation nor its deletion fails for it.
  const unlessRefused = async (event: string, name: string, work: () => Promise<void>) => {
    try {
      await work();
    } catch (error) {
      if (isRepeated(error)) throw error;
      ctx.log.warning(event, { name, error: messageOf(error) });
    }
  };
  await unlessRefused("could not look for helper snapshots", volumeName, async () => {
    for await (const snapshot of snapshotsIn(ctx, cluster, action, project)) {
      if (!snapshot.name.startsWith(prefix) || !isHelperName(snapshot.name)) continue;
      const uuid = snapshot.UUID.toLowerCase();
      const deleting = `${action}, delete its helper snapshot ${uuid}`;
      await unlessRefused(
        "could not delete a helper snapshot",
        snapshot.name,
        () => removeSnapshot(ctx, cluster, deleting, { uuid, project }, snapshot),
      );
    }
  });
}

const longestPage = 1000;

async function* snapshotsIn(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  project: string | undefined,
): AsyncGenerator<LightosSnapshot> {
  for (let offset = "";;) {
    const { snapshots } = await readInParts(
      longestPage,
      (limit) =>
        lookAgainLater(() =>
          cluster.call(ctx, action, DurosAPI.method.listSnapshots, {
            projectName: project ?? "",
            offsetUUID: offset,
            limit: BigInt(limit),
          })
        ),
    );
    yield* snapshots;
    // Whether what LightOS leaves out counts towards the limit is not documented: only an empty page is the end for sure.
    const last = snapshots.at(-1)?.UUID;
    if (last === undefined || last === offset) return;
    offset = last;
  }
}

// Only letters: LightOS keeps no more of a label's key than what follows its last "-" or "." (docs/reference/lightos-api.md section 14).
const cloneLabel = "clonedfrom";
const helperPattern = /^lbcsi-clone-[0-9a-f]{16}-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-[0-9a-f]{12}$/;

/** How the names of all helpers for a new volume begin. Volume names may be longer and stranger than LightOS' names. */
function helperPrefix(volumeName: string): string {
  return `lbcsi-clone-${createHash("sha256").update(volumeName).digest("hex").slice(0, 16)}-`;
}

/** The UUID of the volume that a volume is a clone of; undefined when it is none, or nothing tells. */
async function cloneSourceOf(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  volume: LightosVolume,
): Promise<string | undefined> {
  if (volume.sourceSnapshotUUID === "") return undefined;
  const label = volume.labels.find(({ key }) => key === cloneLabel)?.value;
  const told = label ?? helperPattern.exec(volume.sourceSnapshotName)?.[1];
  if (told !== undefined) return told.toLowerCase();
  try {
    const snapshot = await cluster.call(ctx, action, DurosAPI.method.getSnapshot, {
      UUID: volume.sourceSnapshotUUID,
      projectName: volume.projectName,
    });
    // So the vendor's driver names its helpers.
    const isHelper = isHelperName(snapshot.name) || snapshot.name === `snapshot-${volume.name}`;
    return isHelper ? snapshot.sourceVolumeUUID.toLowerCase() : undefined;
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

function haveCommon(some: readonly Endpoint[], others: readonly Endpoint[]): boolean {
  const texts = new Set(others.map(formatEndpoint));
  return some.some((endpoint) => texts.has(formatEndpoint(endpoint)));
}

// ---------------------------------------------------------------------------------------------------------- snapshots

interface SnapshotWish {
  readonly name: string;
  readonly description: string;
  readonly source: VolumeId;
}

/**
 * The snapshot of this name and source, taken now unless it is there; Available when this returns. With "take it" the
 * name is known to be new, and looked for only after an answer was lost.
 */
async function takeSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  { name, description, source }: SnapshotWish,
  first: "look first" | "take it",
): Promise<LightosSnapshot> {
  const projectName = source.project ?? "";
  const delays = growingDelays();
  let refusals = 0;
  for (let look = first === "look first";; look = true) {
    const find = () => findByName(ctx, cluster, action, name, projectName);
    let snapshot = look ? await lookAgainLater(find) : undefined;
    if (snapshot === undefined) {
      try {
        snapshot = await cluster.call(ctx, action, DurosAPI.method.createSnapshot, {
          name,
          description,
          sourceVolumeUUID: source.uuid,
          projectName,
        });
      } catch (error) {
        if (!(error instanceof LightosError)) throw error;
        if (notDoneCodes.has(error.code)) {
          // It did not make one now; an earlier request may have, that reached the cluster after the look.
          const earlier = await afterRefusal(action, error, find);
          if (earlier === undefined) throw error;
          continue;
        }
        if (error.code === "FAILED_PRECONDITION") {
          // The source is in between states, or on its way out. In a steady state it is something else.
          const { state } = await lookAgainLater(() => readVolume(ctx, cluster, action, source));
          const isSteady = state === VolumeState.Available || state === VolumeState.Migrating;
          if (isSteady && ++refusals > 2) throw error;
        }
        await pause(ctx, delays, action, messageOf(error));
        continue;
      }
    }
    if (snapshot.sourceVolumeUUID.toLowerCase() !== source.uuid) {
      throw new StatusError(
        "ALREADY_EXISTS",
        `Cannot ${action}: snapshot ${snapshot.UUID} has that name and differs: source is volume ` +
          `${snapshot.sourceVolumeUUID}, asked is volume ${source.uuid}`,
      );
    }
    const taken = await waitUntilSettled(
      ctx,
      cluster,
      action,
      "snapshot",
      snapshot,
      delays,
      ({ UUID, projectName }) => cluster.call(ctx, action, DurosAPI.method.getSnapshot, { UUID, projectName }),
    );
    if (taken !== undefined) return taken;
  }
}

/**
 * The living snapshot of this name; undefined when there is none, or only the husks of failed ones. Throws ABORTED while
 * one is being deleted: LightOS would accept another of that name and then let it fail (docs/reference/lightos-api.md 6.7).
 */
async function findByName(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  name: string,
  projectName: string,
): Promise<LightosSnapshot | undefined> {
  const request = { Name: name, projectName, showAll: true };
  const { snapshots } = await cluster.call(ctx, action, DurosAPI.method.listSnapshots, request);
  const namesakes = snapshots.filter((snapshot) => snapshot.name === name);
  const living = namesakes.filter(({ state }) => ![State.Deleting, State.Deleted, State.Failed].includes(state));
  const leaving = namesakes.find(({ state }) => state === State.Deleting);
  if (living.length > 0) return living.find(({ state }) => state === State.Available) ?? living[0];
  if (leaving === undefined) return undefined;
  throw new StatusError(
    "ABORTED",
    `Cannot ${action}: snapshot ${leaving.UUID} of that name is being deleted, repeat the call later`,
  );
}

/** The snapshot; throws NOT_FOUND when it is absent, being deleted, or the husk of a failed creation. */
async function readSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: Pick<VolumeId, "uuid" | "project">,
): Promise<LightosSnapshot> {
  const snapshot = await cluster.call(ctx, action, DurosAPI.method.getSnapshot, {
    UUID: id.uuid,
    projectName: id.project ?? "",
  });
  if ([State.Deleting, State.Deleted, State.Failed].includes(snapshot.state)) {
    throw new StatusError(
      "NOT_FOUND",
      `Cannot ${action}: LightOS shows snapshot ${id.uuid} as ${State[snapshot.state]}`,
    );
  }
  return snapshot;
}

/** Deletes a snapshot as far as LightOS lets go of it now; with clones of it alive, some versions keep it Deleting. */
async function removeSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: Pick<VolumeId, "uuid" | "project">,
  known?: LightosSnapshot,
): Promise<void> {
  const delays = growingDelays();
  let refusals = 0;
  for (let seen = known;; seen = undefined) {
    try {
      const snapshot = seen ?? await readSnapshot(ctx, cluster, action, id);
      if (snapshot.state === State.Failed || snapshot.state === State.Deleting) return;
      if (snapshot.state !== State.Available) {
        if (State[snapshot.state] === undefined) throw unknownState(action, "snapshot", snapshot);
        await pause(ctx, delays, action, `LightOS shows it as ${State[snapshot.state]}`);
        continue;
      }
      await cluster.call(ctx, action, DurosAPI.method.deleteSnapshot, { UUID: id.uuid, projectName: id.project ?? "" });
      return;
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return;
      if (!(error instanceof LightosError)) throw error;
      // Of another state since it was read, or a refusal for good: the next look tells.
      const isRefusal = error.code === "FAILED_PRECONDITION" || error.code === "INVALID_ARGUMENT";
      if (isRefusal ? ++refusals > 2 : notDoneCodes.has(error.code)) throw error;
      await pause(ctx, delays, action, messageOf(error));
    }
  }
}

// ------------------------------------------------------------------------------------------------- labels, description

// LightOS keeps of a key what follows its last separator (docs/reference/lightos-api.md section 14), so there is none in ours.
const encryptionLabel = "hostcrypto";

/** The label that tells how a volume is encrypted on the host: LightOS does not know. */
export function encryptionLabels(hostEncryption: VolumeId["hostEncryption"]): Readonly<Record<string, string>> {
  return hostEncryption === undefined ? {} : { [encryptionLabel]: hostEncryption };
}

type Labels = readonly { readonly key: string; readonly value: string }[];

/** What the labels of a volume or snapshot say of its encryption on the host. */
export function encryptionOf(labels: Labels): VolumeId["hostEncryption"] {
  return labels.some(({ key, value }) => key === encryptionLabel && value === "luks2") ? "luks2" : undefined;
}

/** Whether this driver made the volume, or one that it comes from. */
export function isMadeByUs(labels: Labels): boolean {
  return labels.some(({ key, value }) => key === "madeby" && value === "lbcsi");
}

/**
 * The labels of a new volume: who made it, for whom, and what else `more` says. Keys and values have 1 to 253 letters,
 * digits, "-", "_" and "." (docs/reference/lightos-api.md 15.1); anything else in a value becomes "_".
 */
export function volumeLabels(
  madeFor: VolumeRequest["madeFor"],
  more: Readonly<Record<string, string>> = {},
): { key: string; value: string }[] {
  return Object.entries({ madeby: "lbcsi", ...madeFor, ...more })
    .map(([key, value]) => ({ key, value: value.replace(/[^A-Za-z0-9_.-]/g, "_").slice(0, 253) }))
    .filter(({ key, value }) => value !== "" && /^[A-Za-z0-9]{1,253}$/.test(key));
}

/** What the description of a snapshot says of its maker: its labels are those of its volume, CreateSnapshot takes none. */
function describe(madeFor: VolumeRequest["madeFor"]): string {
  const facts = Object.entries(madeFor ?? {}).map(([key, value]) => `${key}=${printable(value)}`);
  return ["made by lbcsi", ...facts].join(" ");
}

function printable(text: string): string {
  return text.replace(/[^\x21-\x7e]/g, "_").slice(0, 253);
}

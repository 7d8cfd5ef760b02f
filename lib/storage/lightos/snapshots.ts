/** Snapshots of LightOS volumes (facts: docs/reference/lightos-api.md sections 6.5 to 6.7, 9.11 and 9.12). */
import { timestampDate } from "@bufbuild/protobuf/wkt";
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  Snapshot_StateEnum as State,
  Volume_StateEnum as VolumeState,
} from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import { formatVolumeId, longestId, longestIdBytes, parseVolumeId, type VolumeId } from "../../volume_id.ts";
import type { Snapshot, Snapshots } from "../backend.ts";
import { growingDelays } from "../polling.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import { snapshotDescription } from "./labels.ts";
import type { ClusterPool } from "./pool.ts";
import { readVolume } from "./volumes.ts";
import {
  lookAfterRejection,
  lookForEarlier,
  notDoneCodes,
  pause,
  unknownStateError,
  waitUntilSettled,
} from "./waiting.ts";

/** The snapshots of the LightOS backend. A snapshot ID has the form of a volume ID, with the snapshot's UUID. */
export function lightosSnapshots(clusters: ClusterPool): Omit<Snapshots, "listSnapshots"> {
  return {
    uuidOf: (snapshotId) => parseVolumeId(snapshotId, "snapshot").uuid,
    async createSnapshot(call, secrets, { name, sourceVolumeId, owner }) {
      const source = parseVolumeId(sourceVolumeId);
      const ctx = call.doing(`create snapshot "${name}" of volume ${source.uuid}`);
      const cluster = clusters.open(secrets, source.endpoints, source.scheme);
      const bytes = longestIdBytes(source);
      if (bytes > longestId) {
        throw ctx.error(
          "INVALID_ARGUMENT",
          `with the endpoints of its volume a snapshot ID has up to ${bytes} bytes, ${longestId} are allowed`,
        );
      }
      const description = snapshotDescription(owner);
      const snapshot = await takeSnapshot(ctx, cluster, { name, description, source }, "look first");
      const project = snapshot.projectName === "" ? source.project : snapshot.projectName;
      return toSnapshot({ ...source, uuid: snapshot.UUID.toLowerCase(), project }, snapshot);
    },
    async deleteSnapshot(call, secrets, snapshotId) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const ctx = call.doing(`delete snapshot ${id.uuid}`);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      await removeSnapshot(ctx, cluster, id);
    },
    async getSnapshot(call, secrets, snapshotId) {
      const id = parseVolumeId(snapshotId, "snapshot");
      const ctx = call.doing(`read snapshot ${id.uuid}`);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      return toSnapshot(id, await readSnapshot(ctx, cluster, id));
    },
  };
}

/**
 * A snapshot as the controller sees it; `id` is its ID there. Some versions of LightOS give no creation time; then it
 * is the epoch, which at least stays the same.
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

/** The snapshot to take. */
export interface NewSnapshot {
  readonly name: string;
  readonly description: string;
  readonly source: VolumeId;
}

/**
 * The snapshot of this name and source, taken now unless it exists; Available when this returns. With "take it" the
 * name is known to be new, and looked for only after an answer was lost.
 *
 * @throws StatusError ALREADY_EXISTS when a snapshot of another volume has the name, ABORTED while a namesake is being
 *   deleted
 */
export async function takeSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  { name, description, source }: NewSnapshot,
  first: "look first" | "take it",
): Promise<LightosSnapshot> {
  const projectName = source.project ?? "";
  const delays = growingDelays();
  let rejections = 0;
  for (let look = first === "look first";; look = true) {
    const find = () => findByName(ctx, cluster, name, projectName);
    let snapshot = look ? await lookForEarlier(find) : undefined;
    if (snapshot === undefined) {
      try {
        snapshot = await cluster.call(ctx, DurosAPI.method.createSnapshot, {
          name,
          description,
          sourceVolumeUUID: source.uuid,
          projectName,
        });
      } catch (error) {
        if (!(error instanceof LightosError)) throw error;
        if (notDoneCodes.has(error.code)) {
          // It did not make one now; an earlier request, which arrived after the look, may have.
          const earlier = await lookAfterRejection(ctx, error, find);
          if (earlier === undefined) throw error;
          continue;
        }
        if (error.code === "FAILED_PRECONDITION") {
          // The source is in between states, or about to go. In a steady state there is another reason.
          const { state } = await lookForEarlier(() => readVolume(ctx, cluster, source));
          const isSteady = state === VolumeState.Available || state === VolumeState.Migrating;
          if (isSteady && ++rejections > 2) throw error;
        }
        await pause(ctx, delays, messageOf(error));
        continue;
      }
    }
    if (snapshot.sourceVolumeUUID.toLowerCase() !== source.uuid) {
      throw ctx.error(
        "ALREADY_EXISTS",
        `snapshot ${snapshot.UUID} has that name and differs: source is volume ` +
          `${snapshot.sourceVolumeUUID}, asked is volume ${source.uuid}`,
      );
    }
    const taken = await waitUntilSettled(ctx, cluster, {
      what: "snapshot",
      created: snapshot,
      delays,
      read: ({ UUID, projectName }) => cluster.call(ctx, DurosAPI.method.getSnapshot, { UUID, projectName }),
    });
    if (taken !== undefined) return taken;
  }
}

/** The snapshot; throws NOT_FOUND when it is absent, being deleted, or left over from a failed creation. */
export async function readSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  id: Pick<VolumeId, "uuid" | "project">,
): Promise<LightosSnapshot> {
  const snapshot = await cluster.call(ctx, DurosAPI.method.getSnapshot, {
    UUID: id.uuid,
    projectName: id.project ?? "",
  });
  if ([State.Deleting, State.Deleted, State.Failed].includes(snapshot.state)) {
    throw ctx.error("NOT_FOUND", `LightOS shows snapshot ${id.uuid} as ${State[snapshot.state]}`);
  }
  return snapshot;
}

/**
 * Deletes a snapshot as far as LightOS releases it now: while clones of it exist, some versions keep it Deleting.
 * Absent: done.
 *
 * @param known the snapshot, when it was read just now
 */
export async function removeSnapshot(
  ctx: RequestContext,
  cluster: Cluster,
  id: Pick<VolumeId, "uuid" | "project">,
  known?: LightosSnapshot,
): Promise<void> {
  const delays = growingDelays();
  let rejections = 0;
  for (let seen = known;; seen = undefined) {
    try {
      const snapshot = seen ?? await readSnapshot(ctx, cluster, id);
      if (snapshot.state === State.Failed || snapshot.state === State.Deleting) return;
      if (snapshot.state !== State.Available) {
        if (State[snapshot.state] === undefined) throw unknownStateError(ctx, "snapshot", snapshot);
        await pause(ctx, delays, `LightOS shows it as ${State[snapshot.state]}`);
        continue;
      }
      await cluster.call(ctx, DurosAPI.method.deleteSnapshot, { UUID: id.uuid, projectName: id.project ?? "" });
      return;
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return;
      if (!(error instanceof LightosError)) throw error;
      // Its state has changed since it was read, or it is rejected for good: the next look shows which.
      const isRejection = error.code === "FAILED_PRECONDITION" || error.code === "INVALID_ARGUMENT";
      if (isRejection ? ++rejections > 2 : notDoneCodes.has(error.code)) throw error;
      await pause(ctx, delays, messageOf(error));
    }
  }
}

/**
 * The existing snapshot of this name; undefined when there is none, or only what failed creations left. Throws ABORTED
 * while one is being deleted: LightOS would accept another of that name and then let it fail
 * (docs/reference/lightos-api.md 6.7).
 */
async function findByName(
  ctx: RequestContext,
  cluster: Cluster,
  name: string,
  projectName: string,
): Promise<LightosSnapshot | undefined> {
  const request = { Name: name, projectName, showAll: true };
  const { snapshots } = await cluster.call(ctx, DurosAPI.method.listSnapshots, request);
  const namesakes = snapshots.filter((snapshot) => snapshot.name === name);
  const existing = namesakes.filter(({ state }) => ![State.Deleting, State.Deleted, State.Failed].includes(state));
  const leaving = namesakes.find(({ state }) => state === State.Deleting);
  if (existing.length > 0) return existing.find(({ state }) => state === State.Available) ?? existing[0];
  if (leaving === undefined) return undefined;
  throw ctx.error("ABORTED", `snapshot ${leaving.UUID} of that name is being deleted, repeat the call later`);
}

/**
 * Helper snapshots of clones: LightOS copies from snapshots only, so a clone of a volume is made from a snapshot that
 * is taken for it and removed when the clone exists (facts: docs/reference/lightos-api.md sections 6.5, 9.4 and 14).
 *
 * The driver can be killed between any two of these calls, and remembers nothing; so:
 * - The name of a helper says for which new volume it is and of which source, and ends at random. An attempt uses only
 *   its own helper: one of an earlier attempt may lack what was written to the source since.
 * - Helpers, those of earlier attempts too, are removed when the new volume has settled and no earlier, because a
 *   volume that is being made may still read its snapshot; also when the caller is going to give up; and before the
 *   clone is deleted, so that a request which reached the cluster late leaves nothing behind.
 *
 * A helper stays only when the caller neither repeats the creation nor deletes the volume; its description says what it
 * was for.
 */
import { createHash, randomBytes } from "node:crypto";
import {
  DurosAPI,
  type Snapshot as LightosSnapshot,
  type Volume as LightosVolume,
} from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { VolumeId } from "../../volume_id.ts";
import type { Cluster } from "./cluster.ts";
import { printable } from "./labels.ts";
import { readAll } from "./paging.ts";
import { removeSnapshot, takeSnapshot } from "./snapshots.ts";
import { lookForEarlier } from "./waiting.ts";

/** The label of a clone with the UUID of its source volume. */
export const cloneLabel = "clonedfrom";
const helperPattern = /^lbcsi-clone-[0-9a-f]{16}-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-[0-9a-f]{12}$/;

/** Whether a snapshot of this name is the helper of a clone; helpers are never listed. */
export function isHelperName(name: string): boolean {
  return helperPattern.test(name);
}

/** Takes a helper snapshot of `source` for the new volume of this name. */
export async function takeHelper(
  ctx: RequestContext,
  cluster: Cluster,
  source: VolumeId,
  volumeName: string,
): Promise<LightosSnapshot> {
  const name = `${helperPrefix(volumeName)}${source.uuid}-${randomBytes(6).toString("hex")}`;
  const description = `made by lbcsi to clone volume ${source.uuid} as ${printable(volumeName)}, then to be deleted`;
  return await takeSnapshot(ctx, cluster, { name, description, source }, "take it");
}

/** Removes the helpers of a volume that is about to be deleted, if it is a clone. */
export async function removeHelpersOf(
  ctx: RequestContext,
  cluster: Cluster,
  volume: LightosVolume,
  project: string | undefined,
): Promise<void> {
  const isClone = isHelperName(volume.sourceSnapshotName) || volume.labels.some(({ key }) => key === cloneLabel);
  if (isClone) await removeHelpers(ctx, cluster, volume.name, project);
}

/**
 * Removes the helpers for a new volume of this name. A rejection that is final is logged: the volume is as it was asked
 * for, so neither its creation nor its deletion fails because of it.
 */
export async function removeHelpers(
  ctx: RequestContext,
  cluster: Cluster,
  volumeName: string,
  project: string | undefined,
): Promise<void> {
  const prefix = helperPrefix(volumeName);
  const unlessFinal = async (event: string, name: string, work: () => Promise<void>) => {
    try {
      await work();
    } catch (error) {
      if (isRepeated(error)) throw error;
      ctx.log.warning(event, { name, error: messageOf(error) });
    }
  };
  await unlessFinal("could not look for helper snapshots", volumeName, async () => {
    const listed = readAll((range) =>
      lookForEarlier(async () =>
        (await cluster.call(ctx, DurosAPI.method.listSnapshots, { projectName: project ?? "", ...range })).snapshots
      )
    );
    for await (const snapshot of listed) {
      if (!snapshot.name.startsWith(prefix) || !isHelperName(snapshot.name)) continue;
      const uuid = snapshot.UUID.toLowerCase();
      const deletion = ctx.doing(`${ctx.action}, delete its helper snapshot ${uuid}`);
      await unlessFinal(
        "could not delete a helper snapshot",
        snapshot.name,
        () => removeSnapshot(deletion, cluster, { uuid, project }, snapshot),
      );
    }
  });
}

/** Whether the orchestrator certainly repeats CreateVolume after this error (docs/reference/csi.md 2.5). */
export function isRepeated(error: unknown): boolean {
  return hasCode(error, "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "UNAVAILABLE");
}

/** The UUID of the volume that a volume is a clone of; undefined when it is none, or when that is unknown. */
export async function cloneSourceOf(
  ctx: RequestContext,
  cluster: Cluster,
  volume: LightosVolume,
): Promise<string | undefined> {
  if (volume.sourceSnapshotUUID === "") return undefined;
  const named = namedCloneSource(volume);
  if (named !== undefined) return named.toLowerCase();
  try {
    const snapshot = await cluster.call(ctx, DurosAPI.method.getSnapshot, {
      UUID: volume.sourceSnapshotUUID,
      projectName: volume.projectName,
    });
    // The second name is the one that the vendor's driver gives its helpers.
    const isHelper = isHelperName(snapshot.name) || snapshot.name === `snapshot-${volume.name}`;
    return isHelper ? snapshot.sourceVolumeUUID.toLowerCase() : undefined;
  } catch (error) {
    if (hasCode(error, "NOT_FOUND")) return undefined;
    throw error;
  }
}

/** The UUID of the volume that a volume is a clone of, as far as its label or the name of its snapshot says. */
export function namedCloneSource({ labels, sourceSnapshotName }: LightosVolume): string | undefined {
  return labels.find(({ key }) => key === cloneLabel)?.value ?? helperPattern.exec(sourceSnapshotName)?.[1];
}

/**
 * How the names of all helpers for a new volume begin. The volume name may have characters that LightOS does not allow.
 */
function helperPrefix(volumeName: string): string {
  return `lbcsi-clone-${createHash("sha256").update(volumeName).digest("hex").slice(0, 16)}-`;
}

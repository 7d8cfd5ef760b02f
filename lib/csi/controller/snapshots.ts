/**
 * The snapshot calls of the CSI controller service.
 *
 * One call at a time runs per snapshot name while a snapshot is taken, and per snapshot afterwards. The source volume
 * is not locked: its other calls run beside a snapshot, and the cluster serialises them where it has to.
 */
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { Controller, CreateSnapshotRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { KeyedLock } from "../../lock.ts";
import { Secrets } from "../../secrets.ts";
import type { Snapshot, Snapshots } from "../../storage/backend.ts";
import { assertNoTopology, longestVolumeId, requireText, withoutOrchestratorKeys } from "../request.ts";
import { withFullClusterCode } from "./full_cluster.ts";
import { assertNoControlCharacters, ownerOf } from "./name_and_owner.ts";
import { parsePageRequest } from "./paging.ts";

/** The calls of the Controller service that are about snapshots. */
export function snapshotHandlers(snapshots: Snapshots, locks: KeyedLock) {
  return {
    createSnapshot: (request, call) => createSnapshot(snapshots, locks, request, call),

    /** CSI specification, "DeleteSnapshot". */
    async deleteSnapshot(request, call) {
      const ctx = call.doing("delete a snapshot");
      const snapshotId = requireText(ctx, "snapshot_id", request.snapshotId, longestVolumeId);
      try {
        using _held = locks.take(`snapshot ${snapshots.uuidOf(snapshotId)}`, "DeleteSnapshot");
        await snapshots.deleteSnapshot(ctx, new Secrets(request.secrets), snapshotId);
      } catch (error) {
        // Also for an ID that cannot be one of this driver: then there is nothing that it could name.
        if (!hasCode(error, "NOT_FOUND")) throw error;
        ctx.log.warning("had nothing to delete", { error: messageOf(error) });
      }
      return {};
    },

    /** CSI specification, "GetSnapshot". */
    async getSnapshot(request, call) {
      const ctx = call.doing("read a snapshot");
      const snapshotId = requireText(ctx, "snapshot_id", request.snapshotId, longestVolumeId);
      return { snapshot: toMessage(await snapshots.getSnapshot(ctx, new Secrets(request.secrets), snapshotId)) };
    },

    /** CSI specification, "ListSnapshots". */
    async listSnapshots(request, call) {
      const ctx = call.doing("list snapshots");
      const page = parsePageRequest(ctx, request);
      const snapshotId = optionalId(ctx, "snapshot_id", request.snapshotId);
      const sourceVolumeId = optionalId(ctx, "source_volume_id", request.sourceVolumeId);
      const filter = { snapshotId, sourceVolumeId };
      const { entries, nextToken } = await snapshots.listSnapshots(ctx, new Secrets(request.secrets), filter, page);
      return {
        entries: entries.map((snapshot) => ({
          // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
          snapshot: toMessage({
            ...snapshot,
            id: snapshotId ?? snapshot.id,
            sourceVolumeId: sourceVolumeId ?? snapshot.sourceVolumeId,
          }),
        })),
        nextToken,
      };
    },
  } satisfies Handlers<typeof Controller>;
}

/** CSI specification, "CreateSnapshot". Answers when volumes can be made from the snapshot. */
async function createSnapshot(
  snapshots: Snapshots,
  locks: KeyedLock,
  request: CreateSnapshotRequest,
  call: RequestContext,
) {
  const parsing = call.doing("create a snapshot");
  const name = requireText(parsing, "name", request.name);
  const sourceVolumeId = requireText(parsing, "source_volume_id", request.sourceVolumeId, longestVolumeId);
  const ctx = call.doing(`create snapshot "${name}"`);
  assertNoControlCharacters(ctx, name);
  const { requisite = [], preferred = [] } = request.accessibilityRequirements ?? {};
  assertNoTopology(ctx, "accessibility_requirements", [...requisite, ...preferred]);
  const unknown = Object.keys(withoutOrchestratorKeys(request.parameters)).filter((key) =>
    !key.startsWith("snapshot.storage.kubernetes.io/")
  );
  if (unknown.length > 0) {
    const keys = unknown.map((key) => `"${key}"`).join(", ");
    throw ctx.error("INVALID_ARGUMENT", `VolumeSnapshotClass parameter ${keys} is unknown, there are none`);
  }
  using _held = locks.take(`snapshot name "${name}"`, "CreateSnapshot");
  const snapshot = await withFullClusterCode(
    "FAILED_PRECONDITION",
    "; make room on the cluster, or delete the snapshot that was asked for",
    () =>
      snapshots.createSnapshot(ctx, new Secrets(request.secrets), {
        name,
        sourceVolumeId,
        owner: ownerOf(request.parameters),
      }),
  );
  // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
  return { snapshot: { ...toMessage(snapshot), sourceVolumeId } };
}

function optionalId(ctx: RequestContext, field: string, value: string): string | undefined {
  return value === "" ? undefined : requireText(ctx, field, value, longestVolumeId);
}

/** A snapshot in CSI's words. */
function toMessage({ id, sourceVolumeId, sizeBytes, createdAt, ready }: Snapshot) {
  return {
    snapshotId: id,
    sourceVolumeId,
    sizeBytes,
    creationTime: timestampFromDate(createdAt),
    readyToUse: ready,
  };
}

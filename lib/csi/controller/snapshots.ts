/**
 * The snapshot calls of the CSI controller service, the content sources of new volumes, and for whom objects are made.
 *
 * One call at a time per snapshot name while a snapshot is taken, and per snapshot afterwards. The source volume is not
 * held: its other calls go on beside a snapshot, and the cluster keeps the two apart where it has to.
 */
import { timestampFromDate } from "@bufbuild/protobuf/wkt";
import { Secrets } from "../../context.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import type { KeyedLock } from "../../lock.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { ContentSource, Snapshot, Snapshots } from "../../storage/backend.ts";
import type { Controller, VolumeContentSource } from "../../../proto/gen/csi_pb.ts";
import { whenFull } from "./full_cluster.ts";
import { pageRequest } from "./listing.ts";
import { assertNoTopology, longestVolumeId, requireText, withoutOrchestratorKeys } from "../request.ts";

/** The calls of the Controller service that are about snapshots. */
export function snapshotHandlers(snapshots: Snapshots, locks: KeyedLock) {
  return {
    /** CSI specification, "CreateSnapshot". Answers when volumes can be made from the snapshot. */
    async createSnapshot(request, call) {
      const action = "create a snapshot";
      const name = requireText(action, "name", request.name);
      const sourceVolumeId = requireText(action, "source_volume_id", request.sourceVolumeId, longestVolumeId);
      assertNoControlCharacters(`create snapshot "${name}"`, name);
      const { requisite = [], preferred = [] } = request.accessibilityRequirements ?? {};
      assertNoTopology(`create snapshot "${name}"`, "accessibility_requirements", [...requisite, ...preferred]);
      const unknown = Object.keys(withoutOrchestratorKeys(request.parameters)).filter((key) =>
        !key.startsWith("snapshot.storage.kubernetes.io/")
      );
      if (unknown.length > 0) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot create snapshot "${name}": VolumeSnapshotClass parameter ${
            unknown.map((key) => `"${key}"`).join(", ")
          } is unknown, there are none`,
        );
      }
      using _held = locks.take(`snapshot name "${name}"`, "CreateSnapshot");
      const snapshot = await whenFull(
        "FAILED_PRECONDITION",
        "; make room on the cluster, or delete the snapshot that was asked for",
        () =>
          snapshots.createSnapshot(call, new Secrets(request.secrets), {
            name,
            sourceVolumeId,
            owner: ownerOf(request.parameters),
          }),
      );
      // Orchestrators compare the text of IDs, and ours may have another order of endpoints than the caller's.
      return { snapshot: { ...toMessage(snapshot), sourceVolumeId } };
    },

    /** CSI specification, "DeleteSnapshot". */
    async deleteSnapshot(request, call) {
      const snapshotId = requireText("delete a snapshot", "snapshot_id", request.snapshotId, longestVolumeId);
      try {
        using _held = locks.take(`snapshot ${snapshots.uuidOf(snapshotId)}`, "DeleteSnapshot");
        await snapshots.deleteSnapshot(call, new Secrets(request.secrets), snapshotId);
      } catch (error) {
        // An ID that cannot be ours names nothing that could be there.
        if (!hasCode(error, "NOT_FOUND")) throw error;
        call.log.warning("had nothing to delete", { error: messageOf(error) });
      }
      return {};
    },

    /** CSI specification, "GetSnapshot". */
    async getSnapshot(request, call) {
      const snapshotId = requireText("read a snapshot", "snapshot_id", request.snapshotId, longestVolumeId);
      return { snapshot: toMessage(await snapshots.getSnapshot(call, new Secrets(request.secrets), snapshotId)) };
    },

    /** CSI specification, "ListSnapshots". */
    async listSnapshots(request, call) {
      const wanted = pageRequest("list snapshots", request);
      const snapshotId = optionalId("snapshot_id", request.snapshotId);
      const sourceVolumeId = optionalId("source_volume_id", request.sourceVolumeId);
      const filter = { snapshotId, sourceVolumeId };
      const { entries, nextToken } = await snapshots.listSnapshots(call, new Secrets(request.secrets), filter, wanted);
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

function optionalId(field: string, value: string): string | undefined {
  return value === "" ? undefined : requireText("list snapshots", field, value, longestVolumeId);
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

/**
 * The content source of a CreateVolume request; undefined when it has none.
 *
 * @throws StatusError INVALID_ARGUMENT for one without a type that we know (a volume would be made without its content) or
 *   without an ID
 */
export function parseContentSource(action: string, source: VolumeContentSource | undefined): ContentSource | undefined {
  if (source === undefined) return undefined;
  const field = "volume_content_source";
  switch (source.type.case) {
    case "snapshot": {
      const { snapshotId } = source.type.value;
      return {
        type: "snapshot",
        id: requireText(action, `${field}.snapshot.snapshot_id`, snapshotId, longestVolumeId),
      };
    }
    case "volume": {
      const { volumeId } = source.type.value;
      return { type: "volume", id: requireText(action, `${field}.volume.volume_id`, volumeId, longestVolumeId) };
    }
    case undefined:
      throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${field} is neither a snapshot nor a volume`);
  }
}

/** Throws INVALID_ARGUMENT for a name with characters that CSI does not allow (docs/reference/csi.md 2.2). */
export function assertNoControlCharacters(action: string, name: string): void {
  // deno-lint-ignore no-control-regex
  if (!/[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/.test(name)) return;
  throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: the name holds control characters`);
}

// Keys that provisioner and snapshotter add with --extra-create-metadata (docs/reference/csi.md 16.4).
const metadataKeys: Readonly<Record<string, string>> = {
  "csi.storage.k8s.io/pvc/name": "pvc",
  "csi.storage.k8s.io/pvc/namespace": "namespace",
  "csi.storage.k8s.io/pv/name": "pv",
  "csi.storage.k8s.io/volumesnapshot/name": "volumesnapshot",
  "csi.storage.k8s.io/volumesnapshot/namespace": "namespace",
  "csi.storage.k8s.io/volumesnapshotcontent/name": "content",
};

/** For whom an object is made, as far as the sidecars' keys among the parameters tell. */
export function ownerOf(parameters: Readonly<Record<string, string>>): Readonly<Record<string, string>> {
  return Object.fromEntries(
    Object.entries(metadataKeys).flatMap(([key, name]) => {
      const value = parameters[key];
      return value === undefined || value === "" ? [] : [[name, value]];
    }),
  );
}

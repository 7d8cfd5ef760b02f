/**
 * The CSI controller service: turns wishes into volumes and access, through a StorageBackend.
 *
 * It remembers nothing. One call at a time per volume (and per name, while a volume is being made); a second one is told
 * which call is running. The sections of the CSI specification are named at each handler.
 */
import type { MessageInitShape } from "@bufbuild/protobuf";
import {
  type Controller,
  type ControllerGetCapabilitiesResponseSchema,
  ControllerServiceCapability_RPC_Type as Rpc,
  type Node,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../../proto/gen/csi_pb.ts";
import { Secrets } from "../../context.ts";
import { hasCode, messageOf, StatusError } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import { parseMkfsOptions } from "../../host/filesystem/mkfs_options.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import type { KeyedLock } from "../../lock.ts";
import { hostNqn, nodeIdProblem, toPublishContext } from "../../namespace.ts";
import type { StorageBackend } from "../../storage/backend.ts";
import {
  type Access,
  assertNoTopology,
  isShared,
  longestVolumeId,
  mkfsOptionsKey,
  parseCapability,
  requireText,
  statedCapability,
  withoutOrchestratorKeys,
} from "../request.ts";
import { whenFull } from "./full_cluster.ts";
import { healthHandlers } from "./health.ts";
import { capacityHandlers, listingHandlers } from "./listing.ts";
import { modifyHandlers, withMutable } from "./modification.ts";
import { assertNoControlCharacters, ownerOf, parseContentSource, snapshotHandlers } from "./snapshots.ts";

export interface ControllerOptions {
  readonly backend: StorageBackend;
  readonly locks: KeyedLock;
  /** The file system of a volume whose StorageClass names none, for checking mkfs options early. */
  readonly defaultFsType: FsType;
  /**
   * How every node ID of this deployment ends; empty when nothing is known of them. The cluster knows host NQNs and no
   * nodes, so this is all there is to tell a node that cannot exist.
   */
  readonly nodeIdSuffix: string;
  /** Whether the health calls of CSI 1.13 are announced and served; tools for 1.12 fail on their capabilities. */
  readonly volumeHealth?: boolean;
}

/**
 * How long attaching and detaching wait for another call for the volume, in milliseconds. csi-attacher has ten workers by
 * default, and each of them waits here.
 */
const longestWaitMs = 10_000;

/** The Controller service over `backend`. What it does not announce answers UNIMPLEMENTED. */
export function controllerHandlers(
  { backend, locks, defaultFsType, nodeIdSuffix, volumeHealth = false }: ControllerOptions,
): Handlers<typeof Controller> {
  const { snapshots, expansion, listing, modification } = backend;
  /** Takes the volume for this call, or throws ABORTED; the caller disposes it when the work has ended. */
  const hold = (rpc: string, volumeId: string) => locks.take(`volume ${backend.uuidOf(volumeId)}`, rpc);
  /** The same, but waits for calls that are about to end: other nodes that attach or detach a shared volume at the moment. */
  const holdSoon = (rpc: string, volumeId: string, signal: AbortSignal) =>
    locks.takeWithin(longestWaitMs, `volume ${backend.uuidOf(volumeId)}`, rpc, signal);
  /** Comes before `holdSoon`: a repetition for the same node is told at once what runs. */
  const holdNode = (rpc: string, volumeId: string, nodeId: string) =>
    locks.take(`volume ${backend.uuidOf(volumeId)} and node "${nodeId}"`, rpc);

  return {
    controllerGetCapabilities: () => Promise.resolve({ capabilities: controllerCapabilities(backend, volumeHealth) }),

    /** CSI specification, "CreateVolume". */
    async createVolume(request, call) {
      const name = requireText("create a volume", "name", request.name);
      const action = `create volume "${name}"`;
      assertNoControlCharacters(action, name);
      if (request.volumeCapabilities.length === 0) {
        throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: volume_capabilities is missing`);
      }
      const accesses = request.volumeCapabilities.map((capability) => parseCapability(action, capability));
      for (const access of accesses) assertSharingSupported(action, backend, access);
      const { requisite = [], preferred = [] } = request.accessibilityRequirements ?? {};
      assertNoTopology(action, "accessibility_requirements", [...requisite, ...preferred]);
      const source = parseContentSource(action, request.volumeContentSource);
      if (source !== undefined && snapshots === undefined) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action}: volume_content_source is given, but this driver announces neither snapshots nor clones`,
        );
      }
      const { [mkfsOptionsKey]: mkfsText, ...given } = withoutOrchestratorKeys(request.parameters);
      const parameters = withMutable(call.doing(action), modification, given, request.mutableParameters);
      checkNodeSettings(accesses, mkfsText ?? "", defaultFsType);

      using _held = locks.take(`volume name "${name}"`, "CreateVolume");
      const volume = await backend.createVolume(call, new Secrets(request.secrets), {
        name,
        requiredBytes: request.capacityRange?.requiredBytes ?? 0n,
        limitBytes: request.capacityRange?.limitBytes ?? 0n,
        parameters,
        source,
        owner: ownerOf(request.parameters),
      });
      if (volume.condition !== undefined) {
        call.log.warning("created a volume in trouble", { volume: volume.uuid, error: volume.condition.message });
      }
      return {
        volume: {
          volumeId: volume.id,
          capacityBytes: volume.capacityBytes,
          volumeContext: { ...volume.context, ...(mkfsText === undefined ? {} : { [mkfsOptionsKey]: mkfsText }) },
          // The provisioner deletes a volume whose answer does not name the source that it asked for.
          ...(request.volumeContentSource === undefined ? {} : { contentSource: request.volumeContentSource }),
        },
      };
    },

    /** CSI specification, "DeleteVolume". */
    async deleteVolume(request, call) {
      const volumeId = requireText("delete a volume", "volume_id", request.volumeId, longestVolumeId);
      try {
        using _held = hold("DeleteVolume", volumeId);
        await backend.deleteVolume(call, new Secrets(request.secrets), volumeId);
      } catch (error) {
        // An ID that cannot be ours names nothing that could be there.
        if (!hasCode(error, "NOT_FOUND")) throw error;
        call.log.warning("had nothing to delete", { error: messageOf(error) });
      }
      return {};
    },

    /** CSI specification, "ControllerPublishVolume". */
    async controllerPublishVolume(request, call) {
      const volumeId = requireText("publish a volume", "volume_id", request.volumeId, longestVolumeId);
      const nodeId = requireText("publish a volume", "node_id", request.nodeId, 256);
      const action = `publish volume "${volumeId}" to node "${nodeId}"`;
      const access = parseCapability(action, request.volumeCapability);
      assertSharingSupported(action, backend, access);
      if (request.readonly) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action}: readonly is set, but this driver does not announce PUBLISH_READONLY`,
        );
      }
      requireOurNode(action, nodeId, nodeIdSuffix);
      using _node = holdNode("ControllerPublishVolume", volumeId, nodeId);
      using _held = await holdSoon("ControllerPublishVolume", volumeId, call.signal);
      const namespace = await whenFull(
        "UNAVAILABLE",
        "; this is no limit of the node",
        () =>
          backend.grantAccess(call, new Secrets(request.secrets), volumeId, {
            hostNqn: hostNqn(nodeId),
            shared: isShared(access.mode),
            volumeContext: withoutOrchestratorKeys(request.volumeContext),
          }),
      );
      return { publishContext: toPublishContext(namespace) };
    },

    /** CSI specification, "ControllerUnpublishVolume". An empty node_id means every node. */
    async controllerUnpublishVolume(request, call) {
      const volumeId = requireText("unpublish a volume", "volume_id", request.volumeId, longestVolumeId);
      const host = request.nodeId === "" ? undefined : hostNqn(request.nodeId);
      try {
        using _node = holdNode("ControllerUnpublishVolume", volumeId, request.nodeId);
        using _held = await holdSoon("ControllerUnpublishVolume", volumeId, call.signal);
        await backend.revokeAccess(call, new Secrets(request.secrets), volumeId, host);
      } catch (error) {
        if (!hasCode(error, "NOT_FOUND")) throw error;
        call.log.warning("had nothing to unpublish", { error: messageOf(error) });
      }
      return {};
    },

    ...(expansion === undefined ? {} : {
      /** CSI specification, "ControllerExpandVolume". */
      async controllerExpandVolume(request, call) {
        const action = "expand a volume";
        const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
        if (request.capacityRange === undefined) {
          throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: capacity_range is missing`);
        }
        const capability = statedCapability(request.volumeCapability);
        if (capability !== undefined) parseCapability(action, capability);
        using _held = hold("ControllerExpandVolume", volumeId);
        const secrets = new Secrets(request.secrets);
        const range = request.capacityRange;
        const { capacityBytes } = await whenFull(
          "OUT_OF_RANGE",
          "; ask for less, in Kubernetes by a smaller size in the claim, or make room on the cluster",
          () => expansion.expandVolume(call, secrets, volumeId, range),
        );
        // For block devices too: the node sees to it that the kernel shows the new size, and answers what it measured.
        return { capacityBytes, nodeExpansionRequired: true };
      },
    } satisfies Handlers<typeof Controller>),

    ...(snapshots === undefined ? {} : snapshotHandlers(snapshots, locks)),
    ...(listing === undefined ? {} : listingHandlers(backend, listing)),
    ...(volumeHealth ? healthHandlers(backend) : {}),
    ...capacityHandlers(backend),
    ...(modification === undefined ? {} : modifyHandlers(modification, hold)),

    /** CSI specification, "ValidateVolumeCapabilities". */
    async validateVolumeCapabilities(request, call) {
      const action = "validate volume capabilities";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      if (request.volumeCapabilities.length === 0) {
        throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: volume_capabilities is missing`);
      }
      await backend.getVolume(call, new Secrets(request.secrets), volumeId);
      try {
        for (const capability of request.volumeCapabilities) {
          assertSharingSupported(action, backend, parseCapability(action, capability));
        }
      } catch (error) {
        if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
        return { message: error.message };
      }
      return {
        confirmed: {
          volumeContext: request.volumeContext,
          volumeCapabilities: request.volumeCapabilities,
          parameters: request.parameters,
          mutableParameters: request.mutableParameters,
        },
      };
    },
  };
}

/**
 * The Node service of a controller: no capabilities, and every other call answers UNIMPLEMENTED. For csi-resizer, which
 * asks the socket that it has whether nodes can grow volumes when the controller cannot, and ends when nobody answers.
 */
export const nodeServiceOfController: Handlers<typeof Node> = {
  nodeGetCapabilities: () => Promise.resolve({ capabilities: [] }),
};

type Capabilities = NonNullable<MessageInitShape<typeof ControllerGetCapabilitiesResponseSchema>["capabilities"]>;

/** What the backend has is announced, and nothing else. */
function controllerCapabilities(backend: StorageBackend, volumeHealth: boolean): Capabilities {
  const { snapshots, expansion, listing, capacity, modification } = backend;
  const announced = [Rpc.CREATE_DELETE_VOLUME, Rpc.PUBLISH_UNPUBLISH_VOLUME, Rpc.SINGLE_NODE_MULTI_WRITER];
  if (expansion !== undefined) announced.push(Rpc.EXPAND_VOLUME);
  if (snapshots !== undefined) {
    announced.push(Rpc.CREATE_DELETE_SNAPSHOT, Rpc.CLONE_VOLUME, Rpc.GET_SNAPSHOT, Rpc.LIST_SNAPSHOTS);
  }
  if (listing !== undefined) {
    announced.push(Rpc.LIST_VOLUMES, Rpc.LIST_VOLUMES_PUBLISHED_NODES, Rpc.GET_VOLUME, Rpc.VOLUME_CONDITION);
  }
  if (capacity !== undefined) announced.push(Rpc.GET_CAPACITY);
  if (modification !== undefined) announced.push(Rpc.MODIFY_VOLUME);
  if (volumeHealth) announced.push(Rpc.GET_VOLUME_HEALTH);
  if (volumeHealth && listing !== undefined) announced.push(Rpc.LIST_VOLUME_HEALTH);
  return announced.map((type) => ({ type: { case: "rpc", value: { type } } }));
}

/** Throws INVALID_ARGUMENT for an access mode of several nodes, where the backend can give a volume to one only. */
function assertSharingSupported(action: string, backend: StorageBackend, access: Access): void {
  if (backend.oneHostOnly === undefined || !isShared(access.mode)) return;
  throw new StatusError(
    "INVALID_ARGUMENT",
    `Cannot ${action}: access mode ${Mode[access.mode]} is for several nodes, and ${backend.oneHostOnly}`,
  );
}

function requireOurNode(action: string, nodeId: string, suffix: string): void {
  const problem = nodeIdProblem(nodeId) ?? (nodeId.endsWith(suffix) ? undefined : `it does not end in "${suffix}"`);
  if (problem !== undefined) {
    throw new StatusError("NOT_FOUND", `Cannot ${action}: no node of this driver has that ID, ${problem}`);
  }
}

/** What only the node will use is refused here already, where the author of the StorageClass is told. */
function checkNodeSettings(accesses: readonly Access[], mkfsText: string, defaultFsType: FsType): void {
  for (const access of accesses) {
    if (access.type !== "mount") continue;
    parseMkfsOptions(access.fsType ?? defaultFsType, mkfsText);
    parseMountFlags(access.mountFlags);
  }
}

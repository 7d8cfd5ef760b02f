/** CreateVolume, DeleteVolume and ValidateVolumeCapabilities. */
import type {
  Controller,
  CreateVolumeRequest,
  DeleteVolumeRequest,
  ValidateVolumeCapabilitiesRequest,
} from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import { parseMkfsOptions } from "../../host/filesystem/mkfs_options.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import { Secrets } from "../../secrets.ts";
import {
  type Access,
  assertNoTopology,
  longestVolumeId,
  mkfsOptionsKey,
  parseCapability,
  requireText,
  withoutOrchestratorKeys,
} from "../request.ts";
import { parseContentSource } from "./content_source.ts";
import { mergeMutable } from "./modification.ts";
import { assertNoControlCharacters, ownerOf } from "./name_and_owner.ts";
import { type ControllerOptions, lockVolume } from "./options.ts";
import { assertSharingSupported } from "./shared_modes.ts";

/** The calls of the Controller service that make, remove and validate volumes. */
export function volumeHandlers(controller: ControllerOptions) {
  return {
    createVolume: (request, call) => createVolume(controller, request, call),
    deleteVolume: (request, call) => deleteVolume(controller, request, call),
    validateVolumeCapabilities: (request, call) => validateVolumeCapabilities(controller, request, call),
  } satisfies Handlers<typeof Controller>;
}

/** CSI specification, "CreateVolume". */
async function createVolume(controller: ControllerOptions, request: CreateVolumeRequest, call: RequestContext) {
  const { backend, locks } = controller;
  const name = requireText(call.doing("create a volume"), "name", request.name);
  const ctx = call.doing(`create volume "${name}"`);
  assertNoControlCharacters(ctx, name);
  if (request.volumeCapabilities.length === 0) throw ctx.error("INVALID_ARGUMENT", "volume_capabilities is missing");
  const accesses = request.volumeCapabilities.map((capability) => parseCapability(ctx, capability));
  for (const access of accesses) assertSharingSupported(ctx, backend, access);
  const { requisite = [], preferred = [] } = request.accessibilityRequirements ?? {};
  assertNoTopology(ctx, "accessibility_requirements", [...requisite, ...preferred]);
  const source = parseContentSource(ctx, request.volumeContentSource);
  if (source !== undefined && backend.snapshots === undefined) {
    throw ctx.error(
      "INVALID_ARGUMENT",
      "volume_content_source is given, but this driver announces neither snapshots nor clones",
    );
  }
  const { [mkfsOptionsKey]: mkfsOptions, ...given } = withoutOrchestratorKeys(request.parameters);
  const parameters = mergeMutable(ctx, backend.modification, given, request.mutableParameters);
  assertNodeSettings(accesses, mkfsOptions ?? "", controller.defaultFsType);

  using _held = locks.take(`volume name "${name}"`, "CreateVolume");
  const volume = await backend.createVolume(ctx, new Secrets(request.secrets), {
    name,
    requiredBytes: request.capacityRange?.requiredBytes ?? 0n,
    limitBytes: request.capacityRange?.limitBytes ?? 0n,
    parameters,
    source,
    owner: ownerOf(request.parameters),
  });
  if (volume.condition !== undefined) {
    ctx.log.warning("created a volume in an abnormal condition", {
      volume: volume.uuid,
      error: volume.condition.message,
    });
  }
  return {
    volume: {
      volumeId: volume.id,
      capacityBytes: volume.capacityBytes,
      volumeContext: { ...volume.context, ...(mkfsOptions === undefined ? {} : { [mkfsOptionsKey]: mkfsOptions }) },
      // The provisioner deletes a volume when the response does not repeat the requested source.
      ...(request.volumeContentSource === undefined ? {} : { contentSource: request.volumeContentSource }),
    },
  };
}

/** CSI specification, "DeleteVolume". */
async function deleteVolume(controller: ControllerOptions, request: DeleteVolumeRequest, call: RequestContext) {
  const ctx = call.doing("delete a volume");
  const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
  try {
    using _held = lockVolume(controller, "DeleteVolume", volumeId);
    await controller.backend.deleteVolume(ctx, new Secrets(request.secrets), volumeId);
  } catch (error) {
    // Also for an ID that cannot be one of this driver: then there is nothing that it could name.
    if (!hasCode(error, "NOT_FOUND")) throw error;
    ctx.log.warning("had nothing to delete", { error: messageOf(error) });
  }
  return {};
}

/** CSI specification, "ValidateVolumeCapabilities". */
async function validateVolumeCapabilities(
  { backend }: ControllerOptions,
  request: ValidateVolumeCapabilitiesRequest,
  call: RequestContext,
) {
  const ctx = call.doing("validate volume capabilities");
  const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
  if (request.volumeCapabilities.length === 0) throw ctx.error("INVALID_ARGUMENT", "volume_capabilities is missing");
  await backend.getVolume(ctx, new Secrets(request.secrets), volumeId);
  try {
    for (const capability of request.volumeCapabilities) {
      assertSharingSupported(ctx, backend, parseCapability(ctx, capability));
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
}

/**
 * Throws INVALID_ARGUMENT for settings that the node would reject later: the author of the StorageClass sees the errors
 * of CreateVolume.
 */
function assertNodeSettings(accesses: readonly Access[], mkfsOptions: string, defaultFsType: FsType): void {
  for (const access of accesses) {
    if (access.type !== "mount") continue;
    parseMkfsOptions(access.fsType ?? defaultFsType, mkfsOptions);
    parseMountFlags(access.mountFlags);
  }
}

/** ControllerPublishVolume and ControllerUnpublishVolume: which nodes may connect to a volume. */
import type {
  Controller,
  ControllerPublishVolumeRequest,
  ControllerUnpublishVolumeRequest,
} from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import { hostNqn, nodeIdProblem, toPublishContext } from "../../namespace.ts";
import { Secrets } from "../../secrets.ts";
import { isShared, longestVolumeId, parseCapability, requireText, withoutOrchestratorKeys } from "../request.ts";
import { withFullClusterCode } from "./full_cluster.ts";
import { type ControllerOptions, lockVolumeOnNode, lockVolumeSoon } from "./options.ts";
import { assertSharingSupported } from "./shared_modes.ts";

/** The calls of the Controller service that give and take access. */
export function accessHandlers(controller: ControllerOptions) {
  return {
    controllerPublishVolume: (request, call) => publishVolume(controller, request, call),
    controllerUnpublishVolume: (request, call) => unpublishVolume(controller, request, call),
  } satisfies Handlers<typeof Controller>;
}

/** CSI specification, "ControllerPublishVolume". */
async function publishVolume(
  controller: ControllerOptions,
  request: ControllerPublishVolumeRequest,
  call: RequestContext,
) {
  const { backend } = controller;
  const parsing = call.doing("publish a volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const nodeId = requireText(parsing, "node_id", request.nodeId, 256);
  const ctx = call.doing(`publish volume "${volumeId}" to node "${nodeId}"`);
  const access = parseCapability(ctx, request.volumeCapability);
  assertSharingSupported(ctx, backend, access);
  if (request.readonly) {
    throw ctx.error("INVALID_ARGUMENT", "readonly is set, but this driver does not announce PUBLISH_READONLY");
  }
  assertOurNode(ctx, nodeId, controller.nodeIdSuffix);
  using _node = lockVolumeOnNode(controller, "ControllerPublishVolume", volumeId, nodeId);
  using _held = await lockVolumeSoon(controller, "ControllerPublishVolume", volumeId, call.signal);
  const namespace = await withFullClusterCode(
    "UNAVAILABLE",
    "; this is no limit of the node",
    () =>
      backend.grantAccess(ctx, new Secrets(request.secrets), volumeId, {
        hostNqn: hostNqn(nodeId),
        shared: isShared(access.mode),
        volumeContext: withoutOrchestratorKeys(request.volumeContext),
      }),
  );
  return { publishContext: toPublishContext(namespace) };
}

/** CSI specification, "ControllerUnpublishVolume". An empty node_id means every node. */
async function unpublishVolume(
  controller: ControllerOptions,
  request: ControllerUnpublishVolumeRequest,
  call: RequestContext,
) {
  const ctx = call.doing("unpublish a volume");
  const volumeId = requireText(ctx, "volume_id", request.volumeId, longestVolumeId);
  const host = request.nodeId === "" ? undefined : hostNqn(request.nodeId);
  try {
    using _node = lockVolumeOnNode(controller, "ControllerUnpublishVolume", volumeId, request.nodeId);
    using _held = await lockVolumeSoon(controller, "ControllerUnpublishVolume", volumeId, call.signal);
    await controller.backend.revokeAccess(ctx, new Secrets(request.secrets), volumeId, host);
  } catch (error) {
    if (!hasCode(error, "NOT_FOUND")) throw error;
    ctx.log.warning("had nothing to unpublish", { error: messageOf(error) });
  }
  return {};
}

/** Throws NOT_FOUND for an ID that no node of this driver can have. */
function assertOurNode(ctx: RequestContext, nodeId: string, suffix: string): void {
  const problem = nodeIdProblem(nodeId) ?? (nodeId.endsWith(suffix) ? undefined : `it does not end in "${suffix}"`);
  if (problem !== undefined) throw ctx.error("NOT_FOUND", `no node of this driver has that ID, ${problem}`);
}

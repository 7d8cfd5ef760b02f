/** NodeStageVolume: makes the volume's device appear, and mounts its file system at the staging path. */
import type { NodeStageVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import { canonicalPath, isEmptyDirectory, onNodeDisk } from "../../host/mount_point.ts";
import { mountsAt, mountTable } from "../../host/mount_table.ts";
import { Secrets } from "../../secrets.ts";
import { assertNotInline } from "../inline/inline_id.ts";
import {
  type Access,
  longestVolumeId,
  mkfsOptionsKey,
  parseCapability,
  parsePassphrases,
  requirePath,
  requireText,
} from "../request.ts";
import { assertMountPath } from "./mount_path.ts";
import type { NodeParts } from "./options.ts";
import { stageVolume } from "./staging.ts";
import { parseRemoteNamespace } from "./volume.ts";

/** CSI specification, "NodeStageVolume" (docs/reference/csi.md 7.3). */
export async function nodeStageVolume(node: NodeParts, request: NodeStageVolumeRequest, call: RequestContext) {
  const { host } = node;
  const parsing = call.doing("stage the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const given = requirePath(parsing, "staging_target_path", request.stagingTargetPath);
  assertNotInline(parsing, volumeId);
  const access = parseCapability(parsing, request.volumeCapability);
  // Parsed only when a file system is made. A PersistentVolume keeps these options for ever, and its file system must
  // stay mountable with a later version of the driver that allows fewer of them.
  const mkfsOptions = request.volumeContext[mkfsOptionsKey] ?? "";
  if (access.type === "mount") parseMountFlags(access.mountFlags);
  const id = node.parseId(volumeId);
  const ctx = call.with({ volume: id.uuid }).doing(`stage the volume ${id.uuid}`);
  const namespace = parseRemoteNamespace(ctx, id, request.publishContext);
  const secrets = new Secrets(request.secrets);
  if (id.hostEncryption !== undefined) parsePassphrases(ctx, secrets);
  using _held = node.locks.take(`volume ${id.uuid}`, "NodeStageVolume");
  host.pending.assertAnswering(ctx, id.uuid);

  const path = await resolveStagingPath(node, ctx, given, access);
  await stageVolume(node, ctx, { volumeId, id, access, namespace, secrets, path, mkfsOptions, isRepair: false });
  return {};
}

/** The staging path without symbolic links; throws where the volume cannot be staged there without hiding files. */
async function resolveStagingPath(
  { host, allowSystemPaths = false }: NodeParts,
  ctx: RequestContext,
  given: string,
  access: Access,
): Promise<string> {
  const path = await canonicalPath(host, given);
  if (path !== undefined) assertMountPath(ctx, "staging_target_path", path, allowSystemPaths);
  // A mount point is not looked at: a file system that is shut down answers with an error (seen with xfs).
  const isMounted = path !== undefined && mountsAt(await mountTable(host), path).length > 0;
  const kind = path === undefined
    ? "absent"
    : isMounted
    ? "directory"
    : await onNodeDisk(host, path, "look at", () => host.kindOf(path));
  if (path === undefined || (kind !== "directory" && (access.type === "mount" || kind !== "absent"))) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the staging path "${given}" is ${
        kind === "absent" ? "missing" : "not a directory"
      }, the orchestrator has to make it`,
    );
  }
  if (access.type === "mount" && !isMounted && !await isEmptyDirectory(host, path)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the staging path "${given}" holds files of the node's own disk, which the mount would hide; move them away`,
    );
  }
  return path;
}

/**
 * The health calls of CSI 1.13 on the node (docs/reference/csi.md section 20): what is wrong with a volume, and with
 * the connections to the storage, as this machine sees them. ../controller/health.ts says why they are behind a switch.
 *
 * The state of connections comes from sysfs. Volumes are probed as NodeGetVolumeStats probes them, so no question
 * hangs.
 */
import { type NodeGetVolumeHealthRequest, StorageHealthErrorType as StorageStatus } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { type Mount, mountsAt, mountTable } from "../../host/mount_table.ts";
import { allControllers, controllersOf, type NvmeController } from "../../host/nvme/controllers.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { relationOf } from "../../host/volume_mounts.ts";
import { hostNqn } from "../../namespace.ts";
import type { AbnormalCondition } from "../../storage/backend.ts";
import { inlineUuid, isInlineId } from "../inline/inline_id.ts";
import { longestPath, longestVolumeId, requireText } from "../request.ts";
import { clipMessage, toVolumeHealth } from "../volume_health.ts";
import { type ConditionOptions, probeDeadMount, probeDevice, probeMount } from "./condition.ts";
import type { NodeParts } from "./options.ts";
import { findVolumeDevice, type VolumeOnNode } from "./volume.ts";

/** What the health calls use of the node service. */
export type NodeHealthOptions = ConditionOptions & Pick<NodeParts, "parseId">;

/**
 * CSI specification 1.13, "NodeGetVolumeHealth". The call may come for a volume whose stage or publish has failed. A
 * volume that has neither a device nor a path here is NOT_FOUND.
 */
export async function nodeGetVolumeHealth(
  options: NodeHealthOptions,
  request: NodeGetVolumeHealthRequest,
  call: RequestContext,
) {
  const { host, parseId } = options;
  const parsing = call.doing("report the health of the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const paths = Object.entries({
    volume_publish_path: request.volumePublishPath,
    staging_target_path: request.stagingTargetPath,
  }).filter(([, path]) => path !== "").map(([field, path]) => requireText(parsing, field, path, longestPath));
  const id: VolumeOnNode = isInlineId(volumeId)
    ? { uuid: await inlineUuid(host, volumeId, request.volumePublishPath) }
    : parseId(volumeId);
  const ctx = call.with({ volume: id.uuid }).doing(`report the health of the volume ${id.uuid}`);
  const conditions = await conditionsOf(options, ctx, id, paths);
  for (const { message } of conditions) ctx.log.warning("found an abnormal volume condition", { error: message });
  return { volumeHealth: toVolumeHealth(volumeId, conditions) };
}

/** CSI specification 1.13, "NodeGetStorageHealth". A node without connections reports nothing. */
export async function nodeGetStorageHealth({ host, nodeId }: Pick<NodeParts, "host" | "nodeId">) {
  const ours = (await allControllers(host)).filter((controller) =>
    controller.hostNqn === hostNqn(nodeId) && !controller.isDiscovery
  );
  const lost: string[] = [];
  const reduced: string[] = [];
  for (const subsystemNqn of new Set(ours.map((controller) => controller.subsystemNqn))) {
    const controllers = ours.filter((controller) => controller.subsystemNqn === subsystemNqn);
    const down = downOf(controllers);
    if (down.length === 0) continue;
    const entry = `${subsystemNqn} (${statesOf(down)})`;
    if (down.length === controllers.length) lost.push(entry);
    else reduced.push(entry);
  }
  // One entry each: a pair of status and reason may occur only once.
  return {
    backendHealth: [
      ...(lost.length === 0 ? [] : [{
        status: StorageStatus.STORAGE_UNREACHABLE,
        reason: "NoLivePath",
        message: clipMessage(`this node has no live connection to ${lost.join(", ")}`),
      }]),
      ...(reduced.length === 0 ? [] : [{
        status: StorageStatus.STORAGE_DEGRADED,
        reason: "PathsDown",
        message: clipMessage(`this node has lost some of its connections to ${reduced.join(", ")}`),
      }]),
    ],
  };
}

async function conditionsOf(
  options: ConditionOptions,
  ctx: RequestContext,
  id: VolumeOnNode,
  paths: readonly string[],
): Promise<readonly AbnormalCondition[]> {
  const { host } = options;
  const device = await findVolumeDevice(host, id);
  const { ownMount, dead, isAnyThere } = await lookAtPaths(host, device, paths);
  if (dead !== undefined) {
    const { condition } = await probeDeadMount(options, ctx, id.uuid, dead);
    return withReducedPaths(host, device, condition);
  }
  if (device !== undefined) {
    const { condition } = ownMount === undefined
      ? await probeDevice(options, ctx, device)
      : await probeMount(options, ctx, device, ownMount);
    return withReducedPaths(host, device, condition);
  }
  const problem = "this node has no block device of it";
  if (!isAnyThere) throw ctx.error("NOT_FOUND", `${problem}, and none of the paths is there`);
  return [{ usable: false, reason: "NoDevice", message: problem }];
}

/**
 * The first mount of the volume at one of the paths, the first one that has lost its device, and whether any path
 * exists.
 */
async function lookAtPaths(host: Host, device: BlockDevice | undefined, paths: readonly string[]) {
  const table = await mountTable(host);
  let ownMount: Mount | undefined;
  let dead: Mount | undefined;
  let isAnyThere = false;
  for (const given of paths) {
    const path = given.startsWith("/") ? await canonicalPath(host, given) : undefined;
    if (path === undefined) continue;
    const mount = mountsAt(table, path).at(-1);
    // A mount point is not looked at: its file system may not answer.
    isAnyThere ||= mount !== undefined || await host.kindOf(path) !== "absent";
    const relation = mount === undefined ? undefined : await relationOf(host, mount, device);
    if (relation === "dead") dead ??= mount;
    if (relation === "ours") ownMount ??= mount;
  }
  return { ownMount, dead, isAnyThere };
}

/** The conditions of a volume: the one that a probe found, and a reduced number of connections. */
async function withReducedPaths(
  host: Host,
  device: BlockDevice | undefined,
  found: AbnormalCondition | undefined,
): Promise<readonly AbnormalCondition[]> {
  const conditions = found === undefined ? [] : [found];
  if (device === undefined) return conditions;
  const controllers = await controllersOf(host, device.subsystemNqn);
  const down = downOf(controllers);
  if (down.length === 0 || down.length === controllers.length) return conditions;
  const message = `${down.length} of ${controllers.length} connections to ${device.subsystemNqn} are not live ` +
    `(${statesOf(down)}): reads and writes go on`;
  return [...conditions, { usable: true, reason: "PathsDown", message }];
}

function downOf(controllers: readonly NvmeController[]): readonly NvmeController[] {
  return controllers.filter(({ state }) => state !== "live");
}

/** `nvme0 connecting, nvme1 resetting`. */
function statesOf(controllers: readonly NvmeController[]): string {
  return controllers.map(({ name, state }) => `${name} ${state}`).join(", ");
}

/**
 * Repair of broken staging, which is part of NodePublishVolume: kubelet stages a volume once per node, so nothing else
 * repairs it for the next pod on the node (see staging.ts).
 */
import type { RequestContext } from "../../context.ts";
import { checkMount } from "../../host/filesystem/health.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import type { Host } from "../../host/host.ts";
import { describeMount, mountsAt, mountTable } from "../../host/mount_table.ts";
import { isEmptyDirectory, onNodeDisk } from "../../host/mount_point.ts";
import { relationOf } from "../../host/volume_mounts.ts";
import { assertHasPath } from "../../host/nvme/paths.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { recheckDevice } from "../../host/nvme/recheck.ts";
import { type Access, isReaderOnly } from "../request.ts";
import { type StageRequest, stageVolume, type StagingOptions } from "./staging.ts";
import { findVolumeDevice } from "./volume.ts";

/**
 * The device that the volume is read and written through. The volume is staged again first if its staging is broken.
 *
 * @param staging where the volume was staged, free of symbolic links; undefined: the directory of that path is missing
 * @throws StatusError FAILED_PRECONDITION where staging it again is impossible or would hide something; else as
 *   stageVolume
 */
export async function ensureStaged(
  options: StagingOptions,
  ctx: RequestContext,
  request: Omit<StageRequest, "path">,
  staging: string | undefined,
): Promise<BlockDevice> {
  const { host } = options;
  const { id, access, namespace } = request;
  const found = await findVolumeDevice(host, id);
  const isDead = isMapperOfLostDevice(found);
  const device = found === undefined || isDead ? found : await recheckDevice(host, ctx, found);
  if (device !== undefined) await assertHasPath(host, ctx, device);
  const problem = await stagingProblem(host, ctx, { device, staging, access });
  if (problem === undefined && device !== undefined) return device;
  const isHere = (device !== undefined && !isDead) || await findDevice(host, id.uuid) !== undefined;
  const reason = !isHere
    ? "this node has no block device of it"
    : device === undefined
    ? "its encryption is not open"
    : problem ?? "";
  if (namespace === undefined && !isHere) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${reason}, it has to be staged first (the call brings no publish context of this driver)`,
    );
  }
  const obstacle = await stagingPathProblem(host, staging, access);
  if (staging === undefined || obstacle !== undefined) {
    throw ctx.error("FAILED_PRECONDITION", `${reason}, and ${obstacle ?? ""}`);
  }
  ctx.log.warning("stages again what is broken", { path: staging, error: reason });
  return await stageVolume(options, ctx, { ...request, path: staging });
}

/** Whether a device is an encryption that is still open although the device below it has gone. */
function isMapperOfLostDevice(device: BlockDevice | undefined): boolean {
  return device?.encrypts !== undefined && device.encrypts.beneath === undefined;
}

/** What a publish finds of an earlier stage. */
interface FoundStaging {
  readonly device: BlockDevice | undefined;
  readonly staging: string | undefined;
  readonly access: Access;
}

/**
 * Why the volume has to be staged again before a pod can have it, or undefined. Without this, a bind mount of a plain
 * directory would put the pod's files on the root disk.
 *
 * @throws StatusError FAILED_PRECONDITION where staging it again would be wrong
 */
async function stagingProblem(
  host: Host,
  ctx: RequestContext,
  { device, staging, access }: FoundStaging,
): Promise<string | undefined> {
  const mounted = staging === undefined ? undefined : mountsAt(await mountTable(host), staging).at(-1);
  const relation = mounted === undefined ? undefined : await relationOf(host, mounted, device);
  if (isMapperOfLostDevice(device)) return "its encryption is of a device that has gone";
  const conflict = (problem: string) => ctx.error("FAILED_PRECONDITION", problem);
  if (access.type === "block") {
    if (relation === "ours") throw conflict(`it is staged at "${staging}" as a file system, not as a block device`);
    return undefined;
  }
  if (mounted === undefined) return "nothing is mounted at the staging path";
  if (relation === "dead") return `${describeMount(mounted)} at the staging path has lost its device`;
  if (device === undefined || relation !== "ours" || mounted.root !== "/") {
    throw conflict(`${describeMount(mounted)} is mounted at the staging path, which is not this volume`);
  }
  if (access.fsType !== undefined && access.fsType !== mounted.fsType) {
    throw conflict(`it is staged as ${mounted.fsType}, the request wants ${access.fsType}`);
  }
  const readOnly = isReaderOnly(access.mode) || parseMountFlags(access.mountFlags).readOnly;
  return await checkMount(host, ctx, device, { mount: mounted, readOnly });
}

/** Why nothing can be staged at this path without hiding something, or undefined. */
async function stagingPathProblem(
  host: Host,
  staging: string | undefined,
  access: Access,
): Promise<string | undefined> {
  if (staging === undefined) return "the directory of the staging path is missing";
  // A mount point is not looked at: its file system may not answer.
  if (access.type === "block" || mountsAt(await mountTable(host), staging).length > 0) return undefined;
  const kind = await onNodeDisk(host, staging, "look at", () => host.kindOf(staging));
  if (kind !== "directory") {
    return `the staging path "${staging}" is ${kind === "absent" ? "missing" : "not a directory"}`;
  }
  if (await isEmptyDirectory(host, staging)) return undefined;
  return `the staging path "${staging}" holds files of the node's own disk`;
}

/** NodeExpandVolume: grows the file system to the size of the device. */
import type { NodeExpandVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import { sleep } from "../../timing.ts";
import type { RequestContext } from "../../context.ts";
import { fsTypes } from "../../host/filesystem/fs_type.ts";
import { ensureGrown } from "../../host/filesystem/grow.ts";
import type { Host } from "../../host/host.ts";
import { growMapper } from "../../host/luks.ts";
import { describeMount, type Mount, mountTable } from "../../host/mount_table.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { recheckDevice } from "../../host/nvme/recheck.ts";
import { rescanNamespaces } from "../../host/nvme/rescan.ts";
import { mountsOf } from "../../host/volume_mounts.ts";
import { assertNotInline } from "../inline/inline_id.ts";
import { longestPath, longestVolumeId, parseCapability, requireText, statedCapability } from "../request.ts";
import type { NodeParts } from "./options.ts";
import { findAtPath } from "./volume_path.ts";

/**
 * CSI specification, "NodeExpandVolume" (docs/reference/csi.md 7.8, 9). Answers the size that the device has in the
 * end.
 */
export async function nodeExpandVolume(node: NodeParts, request: NodeExpandVolumeRequest, call: RequestContext) {
  const { host } = node;
  const parsing = call.doing("expand the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  const given = requireText(parsing, "volume_path", request.volumePath, longestPath);
  const { requiredBytes, limitBytes } = parseRange(parsing, request.capacityRange);
  const capability = statedCapability(request.volumeCapability);
  if (capability !== undefined) parseCapability(parsing, capability);
  assertNotInline(parsing, volumeId);
  const id = node.parseId(volumeId);
  const ctx = call.with({ volume: id.uuid }).doing(`expand the volume ${id.uuid}`);
  using _held = node.locks.take(`volume ${id.uuid}`, "NodeExpandVolume");
  host.pending.assertAnswering(ctx, id.uuid);

  const shown = await findAtPath(host, ctx, id, given);
  if (shown.kind === "dead") {
    throw ctx.error("UNAVAILABLE", `${describeMount(shown.mount)} at "${shown.mount.path}" has lost its device`);
  }
  const { encrypts } = shown.device;
  const namespaceDevice = encrypts === undefined ? shown.device : encrypts.beneath;
  if (namespaceDevice === undefined) throw ctx.error("UNAVAILABLE", `${shown.device.path} has lost its device`);
  const { sizeBytes } = await waitForSize(host, ctx, namespaceDevice, requiredBytes);
  if (limitBytes > 0n && sizeBytes > limitBytes) {
    throw ctx.error("OUT_OF_RANGE", `it has ${sizeBytes} bytes already, at most ${limitBytes} are wanted`);
  }
  const device = encrypts === undefined ? shown.device : await growMapper(host, ctx, shown.device);
  if (shown.kind === "mount") await growFileSystem(host, ctx, device, shown.mount);
  return { capacityBytes: sizeBytes };
}

/** The bounds of a capacity range in bytes, 0 where none is given; throws INVALID_ARGUMENT for impossible ones. */
function parseRange(
  ctx: RequestContext,
  { requiredBytes, limitBytes }: { requiredBytes: bigint; limitBytes: bigint } = { requiredBytes: 0n, limitBytes: 0n },
) {
  if (requiredBytes < 0n || limitBytes < 0n || (limitBytes > 0n && limitBytes < requiredBytes)) {
    throw ctx.error(
      "INVALID_ARGUMENT",
      `capacity_range from ${requiredBytes} to ${limitBytes} bytes makes no sense`,
    );
  }
  return { requiredBytes, limitBytes };
}

// The cluster announces a new size by itself (within 0.1 s in measurements). After this time the kernel is asked to
// rescan.
const longestAnnouncementMs = 1000;
const pollMs = 50;

/**
 * The device, once the kernel shows at least `requiredBytes`; throws UNAVAILABLE when it does not before the call ends.
 */
async function waitForSize(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  requiredBytes: bigint,
): Promise<BlockDevice> {
  const started = performance.now();
  let hasRescanned = false;
  for (;;) {
    const now = await recheckDevice(host, ctx, device);
    if (now.sizeBytes >= requiredBytes) return now;
    if (!hasRescanned && performance.now() - started >= longestAnnouncementMs) {
      hasRescanned = true;
      await rescanNamespaces(host, ctx, device.subsystemNqn);
      continue;
    }
    try {
      await sleep(pollMs, ctx.signal);
    } catch (error) {
      throw ctx.error(
        "UNAVAILABLE",
        `${now.path} still has ${now.sizeBytes} bytes, ${requiredBytes} are wanted; the cluster has not shown this node ` +
          `a larger size`,
        { cause: error },
      );
    }
  }
}

async function growFileSystem(host: Host, ctx: RequestContext, device: BlockDevice, mount: Mount): Promise<void> {
  const fsType = fsTypes.find((fsType) => fsType === mount.fsType);
  if (fsType === undefined) {
    throw ctx.error("FAILED_PRECONDITION", `${describeMount(mount)} is none of ${fsTypes.join(", ")}`);
  }
  const mounts = await mountsOf(host, await mountTable(host), device);
  // A read-only target shares its file system with the staging mount, which may be writable.
  const writable = mounts.find((other) => !other.options.includes("ro")) ?? mount;
  await ensureGrown(host, ctx, device, { path: writable.path, fsType });
}

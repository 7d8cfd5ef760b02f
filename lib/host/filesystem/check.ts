/** Checks and repairs a file system before it is mounted. */
import type { RequestContext } from "../../context.ts";
import { reasonOf } from "../command_reason.ts";
import type { Host } from "../host.ts";
import { mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { mountedSomewhere, mountsOf } from "../volume_mounts.ts";
import { viewOf } from "./bytes.ts";
import { createDeviceReader } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";
import { canGrowMountedExt4 } from "./grow.ts";
import { runTool, toolError } from "./run_tool.ts";

/**
 * Checks an ext4 that is mounted nowhere on this machine and repairs what e2fsck repairs by itself; grows it where it could
 * not grow once it is mounted. Does nothing for xfs and btrfs, which repair themselves when they are mounted.
 *
 * @throws StatusError FAILED_PRECONDITION when e2fsck has to be run by hand, or a tool fails
 */
export async function repairFileSystem(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { fsType, isSmaller }: { readonly fsType: FsType; readonly isSmaller: boolean },
): Promise<void> {
  if (fsType !== "ext4") return;
  // Mounted elsewhere on this machine, at an earlier staging path or in a container that has a copy of the mount: then it
  // is in order, and e2fsck would fail.
  if ((await mountsOf(host, await mountTable(host), device)).length > 0) return;
  if (await mountedSomewhere(host, device) !== undefined) return;
  // A mounted ext4 grows much faster, without a full check; but that takes a right which not every container has.
  const growsHere = isSmaller && !await canGrowMountedExt4(host);
  await recheckDevice(host, ctx, device);
  const check = await runTool(host, ctx, "e2fsck", growsHere ? ["-f", "-p", device.path] : ["-p", device.path]);
  // e2fsck(8): the exit code is a sum; 1 is "errors corrected", 2 is "and the system should be rebooted" (a mounted root).
  if ((check.code & ~3) === 0) {
    if (!growsHere) return;
    await recheckDevice(host, ctx, device);
    const grown = await runTool(host, ctx, "resize2fs", [device.path]);
    if (grown.code !== 0) throw toolError(ctx, "resize2fs", grown);
    return;
  }
  if ((check.code & 4) !== 0) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `ext4 on ${device.path} has errors that e2fsck does not repair by itself, run e2fsck by hand ` +
        `(${reasonOf("e2fsck", check)})`,
    );
  }
  throw toolError(ctx, "e2fsck", check);
}

/**
 * Throws FAILED_PRECONDITION when the log of a file system contains changes that are not in their places yet, as in a copy
 * of a volume in use. Shared read-only mounts do not replay the log, because other hosts read the device too; files would
 * then be missing without an error (seen with xfs: an empty directory).
 */
export async function assertReplayed(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
): Promise<void> {
  if (!await hasUnreplayedLog(host, ctx, device, fsType)) return;
  throw ctx.error(
    "FAILED_PRECONDITION",
    `the log of its ${fsType} holds changes that a shared read-only mount would not show, as in a copy ` +
      `of a volume in use; mount it once with access for one node, or make it from a source that was unmounted`,
  );
}

async function hasUnreplayedLog(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  fsType: FsType,
): Promise<boolean> {
  const read = createDeviceReader(host, ctx, device);
  switch (fsType) {
    case "ext4":
      // INCOMPAT_RECOVER in s_feature_incompat.
      return (viewOf(await read(0n, 4096), 1024).getUint32(0x60, true) & 4) !== 0;
    case "btrfs":
      // log_root of the super block: what was synced file by file since the last commit.
      return viewOf(await read(65536n, 4096), 0).getBigUint64(0x60, true) !== 0n;
    case "xfs": {
      const args = ["-t", device.path];
      const log = await host.run("xfs_logprint", args, { signal: ctx.signal, onAbort: "kill", log: ctx.log });
      const state = /^\s*log tail: .* state: <(CLEAN|DIRTY)>/m.exec(log.stdout)?.[1];
      if (state === undefined) throw toolError(ctx, "xfs_logprint", log);
      return state === "DIRTY";
    }
  }
}

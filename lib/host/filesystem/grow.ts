/** Grows mounted file systems to the size of their devices. */
import type { RequestContext } from "../../context.ts";
import type { Host } from "../host.ts";
import { describeMount, mountsAt, mountTable } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { relationOf } from "../volume_mounts.ts";
import { runTool, toolError } from "./run_tool.ts";
import { measureFileSystem, type MountedFileSystem } from "./size.ts";

/**
 * Grows a mounted file system to the size of its device if it is smaller, and returns its size in bytes as measured
 * afterwards. Never shrinks it; runs no command when it is large enough.
 *
 * @throws StatusError FAILED_PRECONDITION when the mount is read-only or the tool fails; UNAVAILABLE when the file system
 *   has not grown although the tool says so
 */
export async function ensureGrown(
  host: Host,
  outer: RequestContext,
  device: BlockDevice,
  { path, fsType }: MountedFileSystem,
): Promise<bigint> {
  const ctx = outer.doing(`grow the ${fsType} of namespace ${device.uuid} at "${path}"`);
  const now = await recheckDevice(host, ctx, device);
  const before = await measureFileSystem(host, ctx, now, { path, fsType });
  if (now.sizeBytes - before.fsBytes < before.stepBytes) return before.fsBytes;
  const mount = mountsAt(await mountTable(host), path).at(-1);
  // Some of the tools get the path alone, and grow what is mounted on top there.
  if (mount === undefined || await relationOf(host, mount, now) !== "ours") {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `${mount === undefined ? "nothing" : describeMount(mount)} is mounted there instead of ${now.path}`,
    );
  }
  if (mount.superOptions.includes("ro") || mount.options.includes("ro")) {
    throw ctx.error("FAILED_PRECONDITION", `it is mounted read-only`);
  }
  if (fsType === "ext4" && !await canGrowMountedExt4(host)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the driver lacks the capability CAP_SYS_RESOURCE to grow it while it is mounted; it grows when it ` +
        `is staged the next time, or run the node service privileged`,
    );
  }
  const [program, ...args] = {
    ext4: ["resize2fs", now.path],
    xfs: ["xfs_growfs", "-d", path],
    btrfs: ["btrfs", "filesystem", "resize", "max", path],
  }[fsType];
  const grown = await runTool(host, ctx, program as string, args);
  if (grown.code !== 0) throw toolError(ctx, program as string, grown);
  const after = await measureFileSystem(host, ctx, now, { path, fsType });
  // resize2fs leaves out a last block group that is too small to hold its own tables.
  if (now.sizeBytes - after.fsBytes >= after.unusableBytes) {
    throw ctx.error(
      "UNAVAILABLE",
      `${program} succeeded, but it has ${after.fsBytes} of the ${now.sizeBytes} bytes of ${now.path}`,
    );
  }
  return after.fsBytes;
}

/** Whether this process may grow a mounted ext4: that takes CAP_SYS_RESOURCE (24), also as root. */
export async function canGrowMountedExt4(host: Host): Promise<boolean> {
  const status = await host.readText(`${host.roots.proc}/self/status`);
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status ?? "")?.[1];
  return effective !== undefined && (BigInt(`0x${effective}`) & (1n << 24n)) !== 0n;
}

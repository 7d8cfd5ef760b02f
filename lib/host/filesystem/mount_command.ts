/** Runs mount(8) for the file system of a volume. */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { recheckDevice } from "../nvme/recheck.ts";
import { viewOf } from "./bytes.ts";
import { createDeviceReader } from "./device_reader.ts";
import type { FsType } from "./fs_type.ts";
import { featureProblem } from "./kernel_features.ts";
import { runTool, toolError } from "./run_tool.ts";

/** What is to be mounted where; `flags` without `ro` and `rw`. */
export interface MountCommand {
  readonly path: string;
  readonly fsType: FsType;
  readonly flags: readonly string[];
  readonly readOnly: boolean;
  /** Other hosts may have it mounted at the same time. */
  readonly shared: boolean;
}

/**
 * Mounts the file system of `device`. Not idempotent: a second call mounts it a second time.
 *
 * @throws StatusError FAILED_PRECONDITION when mount fails, with the reason if it can be found; UNAVAILABLE when the device
 *   has changed or cannot be read
 */
export async function runMount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  command: MountCommand,
): Promise<void> {
  const { path, fsType, flags, readOnly } = command;
  await recheckDevice(host, ctx, device);
  const options = await driverOptions(host, ctx, device, command);
  // Without -w, mount falls back to a read-only mount of a write-protected device and reports success.
  const writable = readOnly ? [] : ["-w"];
  const args = [...writable, "-t", fsType, "-o", [...options, ...flags].join(","), device.path, path];
  const mounted = await runTool(host, ctx, "mount", args);
  if (mounted.code === 0) return;
  if (fsType === "btrfs" && mounted.stderr.includes("File exists")) {
    // EEXIST: before Linux 6.7 the kernel knows one btrfs by each UUID, and a clone has the UUID of its origin.
    throw ctx.error(
      "FAILED_PRECONDITION",
      `this node has another btrfs with the same UUID, its origin or a clone of it; this kernel mounts them on different ` +
        `nodes only, Linux 6.7 and later also on one`,
    );
  }
  const failure = toolError(ctx, "mount", mounted);
  const problem = await featureProblem(host, ctx, fsType, createDeviceReader(host, ctx, device));
  if (problem !== undefined) {
    throw new StatusError(failure.code, `${failure.message}; ${problem}: use a node with a newer kernel`);
  }
  if (flags.length === 0) throw failure;
  // mount prints the same message for a damaged file system and for a flag that the kernel rejects.
  throw new StatusError(
    failure.code,
    `${failure.message}; its mount flags are ${
      flags.join(",")
    }, the kernel log (dmesg) says when it refuses one of them`,
  );
}

/** The options that the driver adds to the flags of the user. */
async function driverOptions(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { fsType, flags, readOnly, shared }: MountCommand,
): Promise<readonly string[]> {
  const options = [readOnly ? "ro" : "rw"];
  // A clone has the UUID of its origin and may be mounted beside it.
  if (fsType === "xfs") options.push("nouuid");
  if (shared && readOnly) {
    // Other hosts read it too: not even the journal may be replayed.
    options.push({ ext4: "noload", xfs: "norecovery", btrfs: "rescue=nologreplay" }[fsType]);
  }
  if (fsType === "ext4" && !flags.some((flag) => flag.startsWith("errors="))) {
    // s_errors of the super block: a volume must not be able to stop the node (EXT4_ERRORS_PANIC).
    const superBlock = viewOf(await createDeviceReader(host, ctx, device)(0n, 4096), 1024);
    if (superBlock.getUint16(0x3c, true) === 3) options.push("errors=remount-ro");
  }
  return options;
}

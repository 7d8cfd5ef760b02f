/** Unmounts volumes. */
import type { RequestContext } from "../context.ts";
import type { Host } from "./host.ts";
import { describeMount, mountsAt, mountsElsewhere, mountTable } from "./mount_table.ts";
import { type BlockDevice, describeDevice } from "./nvme/devices.ts";
import { assertHasPath } from "./nvme/paths.ts";
import { foreignMountsOf } from "./processes.ts";
import { holdersOf } from "./users.ts";
import { mountedSomewhere, mountsOf, relationOf } from "./volume_mounts.ts";

/** An unmount that is about to begin. */
export interface ComingUnmount {
  readonly device: BlockDevice;
  /** Free of symbolic links. */
  readonly path: string;
}

/**
 * Throws UNAVAILABLE when the unmount at `path` would be the last of its file system and would not end. Without a path to the
 * device, umount(8) would hang in the kernel and hold the volume. A frozen file system would stay in the kernel, without a
 * mount through which it can be thawed. A repeat continues when that has changed, or when the device is gone: a dead mount is
 * unmounted at once.
 */
export async function assertUnmountCanEnd(
  host: Host,
  ctx: RequestContext,
  { device, path }: ComingUnmount,
): Promise<void> {
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, device);
  const here = mounts.find((mount) => mount.path === path);
  // Only the last unmount of a file system writes.
  if (here === undefined || here.superOptions.includes("ro") || here.fsType === "devtmpfs") return;
  if (mountsElsewhere(table, mounts, path).some((mount) => mount.fsType === here.fsType)) return;
  await assertHasPath(host, ctx, device);
  if (here.options.includes("ro")) return;
  // The kernel does not show that a file system is frozen; but a write waits then.
  const write = async () => {
    try {
      await host.tryWrite(path);
    } catch {
      // Full, broken or shut down: it has answered.
    }
  };
  const asked = { volume: device.uuid, what: `a write at "${path}"`, longestMs: longestWriteMs };
  const answer = await host.pending.ask(ctx, asked, write);
  if (answer.kind === "answered") return;
  const { what, ms } = answer.pending;
  throw ctx.error(
    "UNAVAILABLE",
    `${describeMount(here)} has not answered ${what} for ${Math.round(ms / 1000)} s, it is frozen or its ` +
      `storage does not answer; if a backup has left it frozen, thaw it on this node: fsfreeze --unfreeze ${path}`,
  );
}

/**
 * Throws FAILED_PRECONDITION while the kernel has the file system of `device` active although our mount table has no mount of
 * it: data in memory is written with the last unmount, which has not happened yet.
 */
export async function assertFileSystemInactive(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const fsType = await mountedSomewhere(host, device);
  if (fsType === undefined) return;
  const places = await foreignMountsOf(host, device);
  throw ctx.error(
    "FAILED_PRECONDITION",
    `its ${fsType} is still in use by ${
      places.length > 0
        ? places.join(", ")
        : `something that this process cannot see: a mount of another container, or a freeze that outlived its mounts; in ` +
          `that case mount ${device.path} somewhere on this node, thaw it (fsfreeze --unfreeze) and unmount it`
    }`,
  );
}

/**
 * Unmounts every mount at `path` that is the volume's or dead, topmost first, and returns their number; 0 when there is none.
 *
 * @throws StatusError FAILED_PRECONDITION when something foreign is mounted there, which stays, or the mount is busy,
 *   naming what uses it; UNAVAILABLE when umount fails otherwise
 */
export async function unmountAll(
  host: Host,
  ctx: RequestContext,
  path: string,
  device: BlockDevice | undefined,
): Promise<number> {
  const stacked = mountsAt(await mountTable(host), path);
  for (const mount of stacked.toReversed()) {
    if (await relationOf(host, mount, device) === "foreign") {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${describeMount(mount)} is mounted at "${path}", which is not this volume` +
          `${device === undefined ? "" : `, ${describeDevice(device)},`} and left as it is`,
      );
    }
    await unmount(host, ctx, path);
  }
  const left = mountsAt(await mountTable(host), path);
  if (left[0] !== undefined) {
    throw ctx.error("UNAVAILABLE", `${describeMount(left[0])} is still mounted at "${path}"`);
  }
  return stacked.length;
}

/**
 * Unmounts what is on top at `path`, whatever it is: never lazily, because the data must be on the device when it returns, and
 * never by force. Does nothing when nothing is mounted there.
 *
 * @throws StatusError FAILED_PRECONDITION when it is busy, naming what uses it; UNAVAILABLE when umount fails otherwise
 */
export async function unmount(host: Host, ctx: RequestContext, path: string): Promise<void> {
  const result = await host.run("umount", [path], { signal: ctx.signal, onAbort: "finish", log: ctx.log });
  // Another program has unmounted it meanwhile.
  if (result.code === 0 || /not mounted|no mount point/.test(result.stderr)) return;
  const text = result.stderr.trim();
  if (/busy/.test(text)) {
    const holders = await holdersOf(host, path);
    throw ctx.error(
      "FAILED_PRECONDITION",
      `"${path}" is in use by ${holders.length === 0 ? "something that this process cannot see" : holders.join(", ")}`,
    );
  }
  throw ctx.error("UNAVAILABLE", text === "" ? `umount exits ${result.code}` : text);
}

// A healthy file system takes a write in milliseconds, a busy one in some hundred.
const longestWriteMs = 2000;

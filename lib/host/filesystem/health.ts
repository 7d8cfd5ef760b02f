/** Whether a mounted volume can be read and written. */
import type { RequestContext } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import type { Host } from "../host.ts";
import { describeMount, type Mount } from "../mount_table.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { volumeQuestioner } from "./device_reader.ts";

/**
 * What is wrong with a mount of `device`, or undefined. The file system must look up a name in its root, the device must
 * answer a read, and a mount for writing must take writes: the kernel makes a damaged file system read-only, which the mount
 * table does not always show.
 *
 * @throws as checkReadable
 */
export async function checkMount(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { mount, readOnly }: { readonly mount: Mount; readonly readOnly: boolean },
): Promise<string | undefined> {
  return await checkReadable(host, ctx, device, mount) ??
    (readOnly ? undefined : await checkWritable(host, ctx, device, mount));
}

/**
 * Why a mount of `device` cannot be read, or undefined. A volume that does not answer does not count as broken, because a
 * mount that hangs must be left alone.
 *
 * @throws the reason of `ctx.signal`; StatusError UNAVAILABLE while the volume has a pending operation (pending.ts)
 */
export async function checkReadable(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
): Promise<string | undefined> {
  const quote = `${describeMount(mount)} at "${mount.path}"`;
  const ask = volumeQuestioner(host, ctx.doing(`use ${quote}`), device);
  try {
    await ask(`a look at "${mount.path}"`, () => host.lookUp(mount.path));
    // At a random place, so that the answer does not come from a cache.
    const blocks = device.sizeBytes / 4096n;
    if (blocks === 0n) return `${device.path} has no size`;
    const block = BigInt(Math.floor(Math.random() * Number(blocks)));
    await ask(`a read of ${device.path}`, () => host.readBytes(device.path, block * 4096n, 4096));
  } catch (error) {
    if (error instanceof StatusError) throw error;
    ctx.signal.throwIfAborted();
    return `${quote} cannot be read (${messageOf(error)})`;
  }
  return undefined;
}

/** Why a mount for writing takes no writes, or undefined. Throws as checkReadable does. */
export async function checkWritable(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
): Promise<string | undefined> {
  const quote = `${describeMount(mount)} at "${mount.path}"`;
  const state = ["ro", "emergency_ro", "shutdown"].find((option) => mount.superOptions.includes(option));
  if (state !== undefined) {
    return `${quote} is ${state === "shutdown" ? "shut down" : "read-only"} although it should not`;
  }
  if (mount.options.includes("ro")) return undefined;
  try {
    const ask = volumeQuestioner(host, ctx.doing(`use ${quote}`), device);
    await ask(`a write at "${mount.path}"`, () => host.tryWrite(mount.path));
  } catch (error) {
    if (error instanceof StatusError) throw error;
    ctx.signal.throwIfAborted();
    // A full file system, or one that does not support unnamed files, is not broken.
    if (/EROFS|EIO|ESHUTDOWN|EUCLEAN|ENODEV|ENXIO/.test(codeOf(error))) {
      return `${quote} takes no writes (${messageOf(error)})`;
    }
  }
  return undefined;
}

function codeOf(error: unknown): string {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  return typeof code === "string" ? code : messageOf(error);
}

/**
 * How a volume is on this node: whether its device is there, has a path, answers a read, and takes the writes that its
 * mount promises. Asked once a minute for each volume in use (docs/reference/csi.md section 11).
 *
 * A file system or device may never answer, and what was asked cannot be taken back: it holds a thread until the device
 * answers or goes. So the answer comes after ten seconds at most, and a volume that has not answered since an earlier
 * question is asked nothing more.
 */
import { type RequestContext, requestContext } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { checkReadable, checkWritable } from "../../host/filesystem/health.ts";
import type { Host } from "../../host/host.ts";
import { describeMount, type Mount, mountTable } from "../../host/mount_table.ts";
import { controllersOf } from "../../host/nvme/controllers.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { mountsOf } from "../../host/volume_mounts.ts";
import type { Usage } from "../../host/volume_operations.ts";
import type { AbnormalCondition } from "../../storage/backend.ts";

/** How long a volume is waited for. */
export const longestAnswerMs = 10_000;

/** What was found out about a volume. */
export interface MountReport {
  /** Undefined when the file system does not tell. */
  readonly usage: Usage | undefined;
  /** What is wrong; undefined when the volume is well. */
  readonly condition: AbnormalCondition | undefined;
}

/** Asks volumes how they are. Its questions reject with the reason of `ctx.signal` and with nothing else. */
export interface ConditionProbe {
  /** A mounted file system. */
  ofMount(ctx: RequestContext, device: BlockDevice, mount: Mount): Promise<MountReport>;
  /** A mounted file system whose device has gone; what it tells of its size, it tells from memory. */
  ofDeadMount(ctx: RequestContext, uuid: string, mount: Mount): Promise<MountReport>;
  /** A raw block device. */
  ofDevice(ctx: RequestContext, device: BlockDevice): Promise<MountReport>;
}

/** @param longestMs how long a volume is waited for */
export function conditionProbe(host: Host, longestMs: number = longestAnswerMs): ConditionProbe {
  /** What `question` finds out; it is given a signal that never aborts, so that it ends when the machine has answered. */
  async function ask(
    ctx: RequestContext,
    uuid: string,
    what: string,
    question: (ctx: RequestContext) => Promise<MountReport>,
  ): Promise<MountReport> {
    const asking = requestContext(new AbortController().signal, ctx.deadline, ctx.log, ctx.action);
    try {
      const asked = { volume: uuid, what: `a look at ${what}`, longestMs };
      const answer = await host.pending.ask(ctx, asked, () => question(asking));
      if (answer.kind === "answered") return answer.value;
      const seconds = Math.round(answer.owed.ms / 1000);
      const condition = unusable("NotAnswering", `${what} has not answered for ${seconds} s`);
      return { usage: undefined, condition };
    } catch (error) {
      ctx.signal.throwIfAborted();
      return {
        usage: undefined,
        condition: unusable("Unreadable", `${what} cannot be looked at (${messageOf(error)})`),
      };
    }
  }

  /** Why no I/O gets through to the device, as far as its connections show; undefined when they show nothing of it. */
  async function pathCondition(device: BlockDevice): Promise<AbnormalCondition | undefined> {
    const controllers = await controllersOf(host, device.subsystemNqn);
    if (controllers.length === 0 || controllers.some(({ state }) => state === "live")) return undefined;
    const states = controllers.map(({ name, state }) => `${name} ${state}`).join(", ");
    return unusable(
      "NoLivePath",
      `${device.path} has no live path to ${device.subsystemNqn} (${states}): reads and writes wait or fail`,
    );
  }

  return {
    ofMount: (ctx, device, mount) =>
      ask(ctx, device.uuid, `${mount.fsType} of ${device.path} at "${mount.path}"`, async (asking) => {
        const noPath = await pathCondition(device);
        const usage = await host.usage(mount.path);
        if (noPath !== undefined) return { usage, condition: noPath };
        // A read-only target shares its file system with the staging mount. Where no mount of it is for writing, the
        // volume is meant to be read only.
        const mounts = await mountsOf(host, await mountTable(host), device);
        const writable = mounts.find((other) => other.root === "/" && !other.options.includes("ro"));
        const unreadable = await checkReadable(host, asking, device, writable ?? mount);
        if (unreadable !== undefined) return { usage, condition: unusable("Unreadable", unreadable) };
        // A volume for writing that takes no writes is of no use to its pods.
        const readOnly = writable === undefined ? undefined : await checkWritable(host, asking, device, writable);
        return { usage, condition: readOnly === undefined ? undefined : unusable("ReadOnly", readOnly) };
      }),
    ofDeadMount: (ctx, uuid, mount) =>
      ask(ctx, uuid, `${mount.fsType} at "${mount.path}"`, async () => {
        const isNode = mount.root !== "/";
        const condition =
          `${isNode ? "the device node" : describeMount(mount)} at "${mount.path}" has lost its device: ` +
          `reads and writes fail, the pod has to be started anew`;
        // Of a bound device node, statfs tells the size of the directory of devices.
        return { usage: isNode ? undefined : await statfs(mount.path), condition: unusable("DeviceGone", condition) };
      }),
    ofDevice: (ctx, device) =>
      ask(ctx, device.uuid, device.path, async () => {
        const noPath = await pathCondition(device);
        if (noPath !== undefined) return { usage: undefined, condition: noPath };
        const blocks = device.sizeBytes / 4096n;
        if (blocks === 0n) {
          return { usage: undefined, condition: unusable("Unreadable", `${device.path} has no size`) };
        }
        try {
          // Somewhere, so that the answer does not come from a cache.
          const block = BigInt(Math.floor(Math.random() * Number(blocks)));
          await host.readBytes(device.path, block * 4096n, 4096);
          return { usage: undefined, condition: undefined };
        } catch (error) {
          const condition = unusable("Unreadable", `${device.path} cannot be read (${messageOf(error)})`);
          return { usage: undefined, condition };
        }
      }),
  };

  async function statfs(path: string): Promise<Usage | undefined> {
    try {
      return await host.usage(path);
    } catch {
      // A dead file system need not answer; that it is dead is the answer.
      return undefined;
    }
  }
}

/** Trouble that keeps a volume from being used. Status and reason are what orchestrators compare from call to call. */
function unusable(
  reason: "DeviceGone" | "NoLivePath" | "NotAnswering" | "Unreadable" | "ReadOnly",
  message: string,
): AbnormalCondition {
  return { usable: false, reason, message };
}

/**
 * The condition of a volume on this node: whether its device is there, has a path, answers a read, and accepts the
 * writes that its mount promises. Kubelet asks once a minute for each volume in use (docs/reference/csi.md section 11).
 *
 * A file system or device may never answer, and a question cannot be taken back: it holds a thread until the device
 * answers or disappears. So the answer comes after ten seconds at most, and a volume with a pending operation gets no new
 * question.
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

/** The machine that is asked, and for how long. */
export interface ConditionOptions {
  readonly host: Host;
  /** How long a volume may take to answer, in milliseconds; `longestAnswerMs` when absent. */
  readonly longestAnswerMs?: number;
}

/** How long a volume may take to answer unless the options say otherwise, in milliseconds. */
export const longestAnswerMs = 10_000;

/** What a probe found out about a volume. */
export interface VolumeReport {
  /** Undefined when the file system does not report it. */
  readonly usage: Usage | undefined;
  /** What is wrong; undefined for a healthy volume. */
  readonly condition: AbnormalCondition | undefined;
}

/** Probes a mounted file system. Rejects only with the reason of `ctx.signal`, like the other probes. */
export async function probeMount(
  options: ConditionOptions,
  ctx: RequestContext,
  device: BlockDevice,
  mount: Mount,
): Promise<VolumeReport> {
  const { host } = options;
  const subject = { uuid: device.uuid, name: `${mount.fsType} of ${device.path} at "${mount.path}"` };
  return await probe(options, ctx, subject, async (probing) => {
    const noPath = await pathCondition(host, device);
    const usage = await host.usage(mount.path);
    if (noPath !== undefined) return { usage, condition: noPath };
    // A read-only target shares its file system with the staging mount. If no mount of the file system is writable, the
    // volume is read-only on purpose.
    const mounts = await mountsOf(host, await mountTable(host), device);
    const writable = mounts.find((other) => other.root === "/" && !other.options.includes("ro"));
    const unreadable = await checkReadable(host, probing, device, writable ?? mount);
    if (unreadable !== undefined) return { usage, condition: unusable("Unreadable", unreadable) };
    // Pods cannot use a writable volume that rejects writes.
    const readOnly = writable === undefined ? undefined : await checkWritable(host, probing, device, writable);
    return { usage, condition: readOnly === undefined ? undefined : unusable("ReadOnly", readOnly) };
  });
}

/** Probes a mounted file system whose device has gone. It reports its usage from memory, if it still does. */
export async function probeDeadMount(
  options: ConditionOptions,
  ctx: RequestContext,
  uuid: string,
  mount: Mount,
): Promise<VolumeReport> {
  return await probe(options, ctx, { uuid, name: `${mount.fsType} at "${mount.path}"` }, async () => {
    const isDeviceNode = mount.root !== "/";
    const message =
      `${isDeviceNode ? "the device node" : describeMount(mount)} at "${mount.path}" has lost its device: ` +
      `reads and writes fail, the pod has to be started again`;
    // For a bound device node, statfs reports the size of the directory of devices.
    const usage = isDeviceNode ? undefined : await usageIfAny(options.host, mount.path);
    return { usage, condition: unusable("DeviceGone", message) };
  });
}

/** Probes a raw block device. */
export async function probeDevice(
  options: ConditionOptions,
  ctx: RequestContext,
  device: BlockDevice,
): Promise<VolumeReport> {
  const { host } = options;
  return await probe(options, ctx, { uuid: device.uuid, name: device.path }, async () => {
    const noPath = await pathCondition(host, device);
    if (noPath !== undefined) return { usage: undefined, condition: noPath };
    const blocks = device.sizeBytes / 4096n;
    if (blocks === 0n) {
      return { usage: undefined, condition: unusable("Unreadable", `${device.path} has no size`) };
    }
    try {
      // A random block, so that the answer does not come from a cache.
      const block = BigInt(Math.floor(Math.random() * Number(blocks)));
      await host.readBytes(device.path, block * 4096n, 4096);
      return { usage: undefined, condition: undefined };
    } catch (error) {
      const condition = unusable("Unreadable", `${device.path} cannot be read (${messageOf(error)})`);
      return { usage: undefined, condition };
    }
  });
}

/**
 * The result of `question`, or the condition of a volume that does not answer. The question gets a context whose signal
 * never aborts, so that it ends only when the machine has answered.
 */
async function probe(
  { host, longestAnswerMs: longestMs = longestAnswerMs }: ConditionOptions,
  ctx: RequestContext,
  { uuid, name }: { readonly uuid: string; readonly name: string },
  question: (ctx: RequestContext) => Promise<VolumeReport>,
): Promise<VolumeReport> {
  const probing = requestContext(new AbortController().signal, ctx.deadline, ctx.log, ctx.action);
  try {
    const asked = { volume: uuid, what: `a look at ${name}`, longestMs };
    const answer = await host.pending.ask(ctx, asked, () => question(probing));
    if (answer.kind === "answered") return answer.value;
    const seconds = Math.round(answer.pending.ms / 1000);
    return { usage: undefined, condition: unusable("NotAnswering", `${name} has not answered for ${seconds} s`) };
  } catch (error) {
    ctx.signal.throwIfAborted();
    return { usage: undefined, condition: unusable("Unreadable", `${name} cannot be looked at (${messageOf(error)})`) };
  }
}

/** Why the device's connections let no I/O through; undefined when at least one does, or when they do not show it. */
async function pathCondition(host: Host, device: BlockDevice): Promise<AbnormalCondition | undefined> {
  const controllers = await controllersOf(host, device.subsystemNqn);
  if (controllers.length === 0 || controllers.some(({ state }) => state === "live")) return undefined;
  const states = controllers.map(({ name, state }) => `${name} ${state}`).join(", ");
  return unusable(
    "NoLivePath",
    `${device.path} has no live path to ${device.subsystemNqn} (${states}): reads and writes wait or fail`,
  );
}

async function usageIfAny(host: Host, path: string): Promise<Usage | undefined> {
  try {
    return await host.usage(path);
  } catch {
    // A dead file system may answer with an error. The condition says already that it is dead.
    return undefined;
  }
}

/** A condition that keeps a volume from being used. Orchestrators compare status and reason from call to call. */
function unusable(
  reason: "DeviceGone" | "NoLivePath" | "NotAnswering" | "Unreadable" | "ReadOnly",
  message: string,
): AbnormalCondition {
  return { usable: false, reason, message };
}

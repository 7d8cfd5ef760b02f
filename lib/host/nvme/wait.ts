/** Waits until the device of a namespace is there. */
import type { RequestContext } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { formatAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { addressOf, controllersOf } from "./controllers.ts";
import { type BlockDevice, describeDevice, devicesWithUuid, findDevice } from "./devices.ts";
import { rescanAll } from "./rescan.ts";

// A cluster announces a namespace within 0.3 s where it was measured. After this time the kernel is asked to rescan.
const announcedMs = 2000;

const rescanEveryMs = 15_000;

/** How to wait for a device. */
export interface WaitOptions {
  /** The namespace has to be one of this subsystem. */
  readonly subsystemNqn?: string | undefined;
  /** Advice for the error when the device does not appear. */
  readonly hint: string;
  readonly pollMs?: number;
}

/**
 * Waits until the block device with this namespace UUID and its device node are there, and returns it: sysfs is polled and
 * the directory of devices is watched, until `ctx.signal` aborts.
 *
 * @throws StatusError UNAVAILABLE at the deadline, saying what is there instead and what to look at; FAILED_PRECONDITION
 *   as findDevice does
 */
export async function waitForDevice(
  host: Host,
  ctx: RequestContext,
  uuid: string,
  options: WaitOptions,
): Promise<BlockDevice> {
  const findReady = async () => {
    const device = await findDevice(host, uuid, options.subsystemNqn);
    if (device === undefined) return undefined;
    return await host.blockNumber(device.path) === device.number && device.sizeBytes > 0n ? device : undefined;
  };
  const here = await findReady();
  if (here !== undefined) return here;
  const started = performance.now();
  // The watch begins before sysfs is read again, or a device that appears in between would be missed.
  const wakeup = new Wakeup();
  using _watch = host.watch(host.roots.dev, () => wakeup.ring());
  let rescanAtMs = announcedMs;
  for (;;) {
    const device = await findReady();
    if (device !== undefined) {
      ctx.log.debug("device arrived", { device: device.path, ms: Math.round(performance.now() - started) });
      return device;
    }
    if (options.subsystemNqn !== undefined && performance.now() - started >= rescanAtMs) {
      // The announcement of the namespace may be lost, for instance after a change of the access list during a reconnect.
      // Each connection has its own announcements, and the namespace may be visible over one connection only.
      rescanAtMs += rescanEveryMs;
      await rescanAll(host, ctx, options.subsystemNqn);
    }
    try {
      await wakeup.wait(options.pollMs ?? 100, ctx.signal);
    } catch (error) {
      if (hasCode(error, "CANCELLED")) throw error;
      const seconds = Math.round((performance.now() - started) / 1000);
      throw new StatusError(
        "UNAVAILABLE",
        `Cannot find a block device of namespace ${uuid} after ${seconds} s: ` +
          `${await describeAbsence(host, uuid, options.subsystemNqn)}; ${options.hint}`,
        { cause: error },
      );
    }
  }
}

async function describeAbsence(host: Host, uuid: string, subsystemNqn: string | undefined): Promise<string> {
  const elsewhere = await devicesWithUuid(host, uuid);
  const other = elsewhere.find((device) => device.subsystemNqn !== subsystemNqn);
  if (subsystemNqn !== undefined && other !== undefined) {
    return `${describeDevice(other)} has this UUID, but belongs to another subsystem than ${subsystemNqn}`;
  }
  const device = elsewhere[0];
  if (device !== undefined) {
    if (device.sizeBytes === 0n) return `sysfs has ${device.name}, but its size is zero`;
    const node = await host.blockNumber(device.path);
    return `sysfs has ${device.name} as device ${device.number}, but the node ${device.path} is ` +
      `${node === undefined ? "missing" : `device ${node}`}`;
  }
  if (await host.list(`${host.roots.sysfs}/class/nvme`) === undefined) {
    return `this machine has no NVMe controllers at all, the kernel module nvme_tcp is needed`;
  }
  if (subsystemNqn === undefined) return "sysfs has no such namespace";
  const controllers = await controllersOf(host, subsystemNqn);
  if (controllers.length === 0) return `this machine has no connection to ${subsystemNqn}`;
  const list = controllers.map((controller) => {
    const address = addressOf(controller);
    return `${controller.name} to ${
      address === undefined ? controller.address : formatAddress(address)
    } is ${controller.state}`;
  });
  return `of ${subsystemNqn}, ${list.join(", ")}, but it shows no such namespace to this host`;
}

/** Wakes one waiter; a ring without a waiter is kept for the next one. */
class Wakeup {
  #rung = false;
  #wake: (() => void) | undefined;
  #end: (() => void) | undefined;

  ring(): void {
    this.#rung = true;
    this.#wake?.();
  }

  /** Resolves at the next ring or after `ms`; rejects with `signal.reason`. */
  wait(ms: number, signal: AbortSignal): Promise<void> {
    return new Promise<void>((resolve, reject) => {
      if (signal.aborted) return reject(signal.reason);
      const timer = setTimeout(resolve, this.#rung ? 0 : ms);
      this.#wake = resolve;
      const giveUp = () => reject(signal.reason);
      signal.addEventListener("abort", giveUp, { once: true });
      this.#end = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", giveUp);
      };
    }).finally(() => {
      this.#end?.();
      this.#rung = false;
      this.#wake = undefined;
    });
  }
}

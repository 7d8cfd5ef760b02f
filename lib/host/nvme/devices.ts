import { StatusError } from "../../error.ts";
import { isNodeHostNqn } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { allControllers } from "./controllers.ts";
import { multipathObstacle } from "./multipath.ts";
import { readAttribute } from "./sysfs.ts";

/** A namespace as this machine sees it. */
export interface BlockDevice {
  /** `nvme0n1`. Says nothing for long. */
  readonly name: string;
  /** Its node, below the root of device nodes. */
  readonly path: string;
  /** `major:minor`. */
  readonly number: string;
  /** Namespace UUID, lower case. */
  readonly uuid: string;
  readonly subsystemNqn: string;
  readonly sizeBytes: bigint;
  /** Whether the kernel refuses writes to it. */
  readonly readOnly: boolean;
  /** Of a mapper that encrypts (luks.ts): its name, and the namespace under it, undefined when that has gone. */
  readonly encrypts?: { readonly name: string; readonly beneath: BlockDevice | undefined };
}

/**
 * The block device with this namespace UUID, or undefined. Does not touch the device itself.
 *
 * @throws StatusError FAILED_PRECONDITION when two devices claim the UUID, so that no choice is safe
 */
export async function findDevice(host: Host, uuid: string, subsystemNqn?: string): Promise<BlockDevice | undefined> {
  const found = (await devicesWithUuid(host, uuid)).filter((device) =>
    subsystemNqn === undefined || device.subsystemNqn === subsystemNqn
  );
  if (found.length > 1) {
    const isOneSubsystem = new Set(found.map((device) => device.subsystemNqn)).size === 1;
    const obstacle = isOneSubsystem ? await multipathObstacle(host) : undefined;
    const devices = found.map(describeDevice).join(" and ");
    throw new StatusError(
      "FAILED_PRECONDITION",
      obstacle === undefined
        ? `Cannot tell which block device is namespace ${uuid}: ${devices} both claim it, one subsystem has to be disconnected`
        : `Cannot tell which block device is namespace ${uuid}: ${devices} both claim it, for each path is a device of its ` +
          `own here: ${obstacle.found}, ${obstacle.needed} is needed`,
    );
  }
  return found[0];
}

/** All block devices of a subsystem on this machine. */
export async function devicesOf(host: Host, subsystemNqn: string): Promise<readonly BlockDevice[]> {
  return (await allDevices(host)).filter((device) => device.subsystemNqn === subsystemNqn);
}

/** The block device with this number (`major:minor`); undefined when it is not a namespace with a UUID. */
export async function deviceNumbered(host: Host, number: string): Promise<BlockDevice | undefined> {
  return (await allDevices(host)).find((device) => device.number === number);
}

/**
 * Whether this machine shows any block device of a subsystem, be it one that has no UUID or that is half there.
 *
 * @param but names of devices that do not count
 */
export async function hasNamespaces(host: Host, subsystemNqn: string, but: readonly string[] = []): Promise<boolean> {
  for (const name of await namespaceNames(host)) {
    if (but.includes(name)) continue;
    if (await readAttribute(host, `class/block/${name}/device/subsysnqn`) === subsystemNqn) return true;
  }
  return false;
}

/** All NVMe namespaces of this machine that have a UUID, local drives among them. Does not touch the devices. */
export async function allDevices(host: Host): Promise<readonly BlockDevice[]> {
  const devices = await Promise.all((await namespaceNames(host)).map((name) => readDevice(host, name)));
  return devices.filter((device) => device !== undefined);
}

/**
 * The volumes that this machine is connected to as a node of this driver, whoever made the connections. Does not touch the
 * devices.
 */
export async function attachedVolumes(host: Host): Promise<readonly BlockDevice[]> {
  const subsystems = new Set(
    (await allControllers(host))
      .filter(({ transport, hostNqn }) => transport === "tcp" && isNodeHostNqn(hostNqn))
      .map(({ subsystemNqn }) => subsystemNqn),
  );
  return (await allDevices(host)).filter(({ subsystemNqn }) => subsystems.has(subsystemNqn));
}

/** `nvme0n1 (namespace <uuid> of <subsystem NQN>)`. */
export function describeDevice(device: BlockDevice): string {
  return `${device.name} (namespace ${device.uuid} of ${device.subsystemNqn})`;
}

export async function devicesWithUuid(host: Host, uuid: string): Promise<readonly BlockDevice[]> {
  const found: BlockDevice[] = [];
  for (const name of await namespaceNames(host)) {
    // One file tells most devices apart; the rest is read of the right one only.
    if (await readUuid(host, name) !== uuid.toLowerCase()) continue;
    const device = await readDevice(host, name);
    if (device !== undefined) found.push(device);
  }
  return found;
}

async function namespaceNames(host: Host): Promise<readonly string[]> {
  // Neither paths (nvme0c1n1) nor partitions (nvme0n1p1).
  return (await host.list(`${host.roots.sysfs}/class/block`) ?? []).filter((name) => /^nvme\d+n\d+$/.test(name));
}

async function readUuid(host: Host, name: string): Promise<string | undefined> {
  const wwid = await readAttribute(host, `class/block/${name}/wwid`);
  return wwid?.startsWith("uuid.") ? wwid.slice("uuid.".length).toLowerCase() : undefined;
}

export async function readDevice(host: Host, name: string): Promise<BlockDevice | undefined> {
  const base = `class/block/${name}`;
  const [uuid, number, size, hidden, ro, nqn] = await Promise.all([
    readUuid(host, name),
    readAttribute(host, `${base}/dev`),
    readAttribute(host, `${base}/size`),
    readAttribute(host, `${base}/hidden`),
    readAttribute(host, `${base}/ro`),
    readAttribute(host, `${base}/device/subsysnqn`),
  ]);
  // A device on its way out loses its files one by one; then it is not there.
  if (uuid === undefined || number === undefined || size === undefined || nqn === undefined) return undefined;
  if (hidden === "1" || !/^\d+$/.test(size)) return undefined;
  return {
    name,
    path: `${host.roots.dev}/${name}`,
    number,
    uuid,
    subsystemNqn: nqn,
    // The kernel counts in 512 bytes whatever the device's own sectors are.
    sizeBytes: BigInt(size) * 512n,
    readOnly: ro === "1",
  };
}

/**
 * Block devices of NVMe namespaces: found in sysfs by namespace UUID, never by name or number. Nothing here touches a device.
 *
 * What the kernel shows (seen on 6.1): `class/block/nvmeXnY` is the multipath head of a namespace, `nvmeXcYnZ` are its
 * paths (`hidden` is 1, no device node). `wwid` begins with `uuid.` if the namespace has a UUID; the file `uuid` shows the
 * NGUID when it has none, so only `wwid` decides. X is the subsystem's number, Y is not the NSID, and a name can belong to
 * another namespace after a reconnect: identity is read again before each step that relies on it.
 */
import { StatusError } from "../../error.ts";
import { isNodeHostNqn } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { allControllers } from "./controllers.ts";
import { multipathObstacle } from "./multipath.ts";
import { readAttribute } from "./sysfs.ts";

/** A namespace as this machine sees it. */
export interface BlockDevice {
  /** `nvme0n1`. The kernel gives it to other namespaces later. */
  readonly name: string;
  /** Path of its device node. */
  readonly path: string;
  /** `major:minor`. */
  readonly number: string;
  /** Namespace UUID, lower case. */
  readonly uuid: string;
  readonly subsystemNqn: string;
  readonly sizeBytes: bigint;
  /** Whether the kernel refuses writes to it. */
  readonly readOnly: boolean;
  /** For a mapper that encrypts (luks.ts): its name, and the namespace beneath it, undefined when that has gone. */
  readonly encrypts?: { readonly name: string; readonly beneath: BlockDevice | undefined };
}

/**
 * The block device with this namespace UUID, or undefined.
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
        : `Cannot tell which block device is namespace ${uuid}: ${devices} both claim it, because each path is a device of its ` +
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
 * Whether this machine shows any block device of a subsystem, including one without a UUID or one that is being removed.
 *
 * @param ignored names of devices that do not count
 */
export async function hasNamespaces(
  host: Host,
  subsystemNqn: string,
  ignored: readonly string[] = [],
): Promise<boolean> {
  for (const name of await namespaceNames(host)) {
    if (ignored.includes(name)) continue;
    if (await readAttribute(host, `class/block/${name}/device/subsysnqn`) === subsystemNqn) return true;
  }
  return false;
}

/** All NVMe namespaces of this machine that have a UUID, including local drives. */
export async function allDevices(host: Host): Promise<readonly BlockDevice[]> {
  const devices = await Promise.all((await namespaceNames(host)).map((name) => readDevice(host, name)));
  return devices.filter((device) => device !== undefined);
}

/** The volumes that this machine is connected to under a host NQN of this driver, whatever program made the connections. */
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

/** All block devices with this namespace UUID; more than one where two subsystems, or paths without multipath, have it. */
export async function devicesWithUuid(host: Host, uuid: string): Promise<readonly BlockDevice[]> {
  const found: BlockDevice[] = [];
  for (const name of await namespaceNames(host)) {
    // One file rules out most devices; the rest is read for the right one only.
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

/** One namespace by the name of its device; undefined when it is gone, hidden, or has no UUID. */
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
  // A device that is being removed loses its files one by one; it counts as gone.
  if (uuid === undefined || number === undefined || size === undefined || nqn === undefined) return undefined;
  if (hidden === "1" || !/^\d+$/.test(size)) return undefined;
  return {
    name,
    path: `${host.roots.dev}/${name}`,
    number,
    uuid,
    subsystemNqn: nqn,
    // The kernel counts in units of 512 bytes, whatever the device's own sector size is.
    sizeBytes: BigInt(size) * 512n,
    readOnly: ro === "1",
  };
}

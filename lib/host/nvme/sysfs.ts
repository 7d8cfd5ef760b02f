/**
 * Block devices of NVMe namespaces, and the mappers that encrypt them: found in sysfs by namespace UUID, never by name or
 * number.
 *
 * What the kernel shows (measured on 6.1): `class/block/nvmeXnY` is the multipath head of a namespace, `nvmeXcYnZ` are its
 * paths (`hidden` is 1, no device node). `wwid` begins with `uuid.` if the namespace has a UUID; the file `uuid` shows the
 * NGUID when it has none, so only `wwid` decides. X is the subsystem's number, Y is not the NSID, and a name can belong to
 * another namespace after a reconnect: identity is read again before each step that relies on it.
 */
import { createHash } from "node:crypto";
import { messageOf, StatusError } from "../../error.ts";
import { isNodeHostNqn, type TransportAddress } from "../../namespace.ts";
import type { Host } from "../host.ts";
import { discoveryNqn } from "./discovery_log.ts";

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

/** A connection of this machine to a subsystem: one path to each of its namespaces. */
export interface NvmeController {
  /** `nvme0`. */
  readonly name: string;
  /** `live`, `connecting`, `resetting`, `deleting` … */
  readonly state: string;
  readonly subsystemNqn: string;
  readonly hostNqn: string;
  readonly hostId: string;
  /** Tells of other controllers, no data goes over it. */
  readonly isDiscovery: boolean;
  readonly transport: string;
  /** As sysfs has it: `traddr=192.0.2.1,trsvcid=4420,src_addr=…`. */
  readonly address: string;
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

/**
 * Why this kernel shows each path to a namespace as a device of its own, and what is needed instead; undefined: it has native
 * multipath, or sysfs does not tell.
 */
export async function multipathObstacle(
  host: Host,
): Promise<{ readonly found: string; readonly needed: string } | undefined> {
  const text = (await host.readText(`${host.roots.sysfs}/module/nvme_core/parameters/multipath`))?.trim();
  if (text === "Y") return undefined;
  if (text !== undefined) {
    return {
      found: `native NVMe multipath is off (nvme_core.multipath=${text})`,
      needed: "nvme_core.multipath=Y on the kernel's command line",
    };
  }
  if (await host.kindOf(`${host.roots.sysfs}/module/nvme_core`) === "absent") return undefined;
  return {
    found: "this kernel was built without native NVMe multipath (CONFIG_NVME_MULTIPATH)",
    needed: "a kernel with it",
  };
}

/** Name of the volume's mapper, the incumbent driver's. */
export function mapperName(uuid: string): string {
  return `lb-csi-nvme-uuid.${uuid.toLowerCase()}`;
}

/**
 * The open mapper of a volume as a block device, or undefined. Does not touch the device itself.
 *
 * @throws as findDevice
 */
export async function findMapper(host: Host, uuid: string): Promise<BlockDevice | undefined> {
  const base = `${host.roots.sysfs}/class/block`;
  for (const name of await host.list(base) ?? []) {
    if (!/^dm-\d+$/.test(name)) continue;
    const text = async (path: string) => (await host.readText(`${base}/${name}/${path}`))?.trim();
    if (await text("dm/name") !== mapperName(uuid)) continue;
    const [number, size, ro] = await Promise.all([text("dev"), text("size"), text("ro")]);
    if (number === undefined || size === undefined || !/^\d+$/.test(size)) continue;
    const slaves = await host.list(`${base}/${name}/slaves`) ?? [];
    const device = await findDevice(host, uuid);
    const beneath = device !== undefined && slaves.includes(device.name) ? device : undefined;
    return {
      name,
      path: `${host.roots.dev}/${name}`,
      number,
      uuid: uuid.toLowerCase(),
      subsystemNqn: device?.subsystemNqn ?? "",
      sizeBytes: BigInt(size) * 512n,
      readOnly: ro === "1",
      encrypts: { name: mapperName(uuid), beneath },
    };
  }
  return undefined;
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
    if (await attribute(host, `class/block/${name}/device/subsysnqn`) === subsystemNqn) return true;
  }
  return false;
}

/** All connections of this machine to a subsystem. */
export async function controllersOf(host: Host, subsystemNqn: string): Promise<readonly NvmeController[]> {
  return (await allControllers(host)).filter((controller) => controller.subsystemNqn === subsystemNqn);
}

/** All NVMe controllers of this machine, local drives and discovery controllers among them. */
export async function allControllers(host: Host): Promise<readonly NvmeController[]> {
  const names = await host.list(`${host.roots.sysfs}/class/nvme`) ?? [];
  const controllers = await Promise.all(names.map((name) => readController(host, name)));
  return controllers.filter((controller) => controller !== undefined);
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

/** The traddr and trsvcid in a controller's address. */
export function addressOf(controller: NvmeController): TransportAddress | undefined {
  const fields = new Map(
    controller.address.split(",").map((field) => {
      const equals = field.indexOf("=");
      return [field.slice(0, equals), field.slice(equals + 1)] as const;
    }),
  );
  const traddr = fields.get("traddr");
  const trsvcid = fields.get("trsvcid");
  return traddr === undefined || trsvcid === undefined ? undefined : { traddr, trsvcid };
}

/** Whether a controller is a connection to `address`. */
export function isAt(controller: NvmeController, address: TransportAddress): boolean {
  const at = addressOf(controller);
  return at !== undefined && at.trsvcid === address.trsvcid && canonical(at.traddr) === canonical(address.traddr);
}

/** IPv6 has many spellings of one address. */
function canonical(traddr: string): string {
  if (!traddr.includes(":")) return traddr;
  const [plain = "", zone] = traddr.split("%");
  const url = URL.parse(`http://[${plain}]`);
  return `${url === null ? plain.toLowerCase() : url.hostname}${zone === undefined ? "" : `%${zone}`}`;
}

/** Whether a controller works or heals by itself, as a connecting one does; one that is being deleted never does. */
export function isUsable(controller: NvmeController): boolean {
  return !controller.state.startsWith("deleting") && controller.state !== "dead";
}

/** `nvme0n1 (namespace <uuid> of <subsystem NQN>)`. */
export function describeDevice(device: BlockDevice): string {
  return `${device.name} (namespace ${device.uuid} of ${device.subsystemNqn})`;
}

/** A UUID (version 8, RFC 9562) that depends on `name` alone. */
export function nameUuid(name: string): string {
  const bytes = createHash("sha256").update(name).digest().subarray(0, 16);
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x80;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
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
  const wwid = await attribute(host, `class/block/${name}/wwid`);
  return wwid?.startsWith("uuid.") ? wwid.slice("uuid.".length).toLowerCase() : undefined;
}

export async function readDevice(host: Host, name: string): Promise<BlockDevice | undefined> {
  const base = `class/block/${name}`;
  const [uuid, number, size, hidden, ro, nqn] = await Promise.all([
    readUuid(host, name),
    attribute(host, `${base}/dev`),
    attribute(host, `${base}/size`),
    attribute(host, `${base}/hidden`),
    attribute(host, `${base}/ro`),
    attribute(host, `${base}/device/subsysnqn`),
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

export async function readController(host: Host, name: string): Promise<NvmeController | undefined> {
  const base = `class/nvme/${name}`;
  const [subsystemNqn, state, hostNqn, hostId, type, transport, address] = await Promise.all([
    attribute(host, `${base}/subsysnqn`),
    attribute(host, `${base}/state`),
    attribute(host, `${base}/hostnqn`),
    attribute(host, `${base}/hostid`),
    attribute(host, `${base}/cntrltype`),
    attribute(host, `${base}/transport`),
    attribute(host, `${base}/address`),
  ]);
  if (subsystemNqn === undefined || state === undefined) return undefined;
  return {
    name,
    subsystemNqn,
    state,
    hostNqn: hostNqn ?? "",
    hostId: hostId ?? "",
    isDiscovery: type === "discovery" || subsystemNqn === discoveryNqn,
    transport: transport ?? "",
    address: address ?? "",
  };
}

export async function attribute(host: Host, path: string): Promise<string | undefined> {
  try {
    return (await host.readText(`${host.roots.sysfs}/${path}`))?.trim();
  } catch (error) {
    // An attribute of a device that is being removed answers ENODEV or EIO.
    if (/No such device|os error (5|19)\b/.test(messageOf(error))) return undefined;
    throw error;
  }
}

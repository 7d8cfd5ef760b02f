/**
 * What lbcsi has on this machine: volumes with their devices, paths and mounts, volumes that are only asked for, mounts
 * whose device has gone, and connections without a volume.
 *
 * It works while things are broken. Everything comes from sysfs, the mount table and the directory of the
 * Discovery-Client, which answer from memory; a device is read (for the type of a file system that is not mounted) only
 * when it has a live path, and for a short time.
 */
import { type RequestContext, timeLimit } from "../context.ts";
import { messageOf } from "../error.ts";
import { fsTypes } from "../host/filesystem/fs_type.ts";
import type { Host } from "../host/host.ts";
import { type Mount, mountTable } from "../host/mount_table.ts";
import { addressOf, allControllers, type NvmeController } from "../host/nvme/controllers.ts";
import { allDevices, type BlockDevice } from "../host/nvme/devices.ts";
import { isLivePath, type NamespacePath, pathsOf } from "../host/nvme/paths.ts";
import { mountsOf, relationOf } from "../host/volume_mounts.ts";
import { formatAddress, isNodeHostNqn } from "../namespace.ts";
import { columns, printable } from "./table.ts";

/** One way to a volume, or one connection without. */
export interface ListedPath {
  /** `nvme0`. */
  readonly controller: string;
  /** `192.0.2.1:4420`; as sysfs has it when it is no address with a port. */
  readonly address: string;
  /** Of the controller: `live`, `connecting` … */
  readonly state: string;
  /** Undefined without multipath. */
  readonly anaState: string | undefined;
  readonly hostNqn: string;
}

export interface ListedMount {
  readonly path: string;
  /** `block` is the device node, bound to a file. */
  readonly type: "filesystem" | "block";
  readonly fileSystem: string | undefined;
  readonly readOnly: boolean;
}

export interface ListedVolume {
  readonly uuid: string;
  /** Undefined when the machine has no device of it; then it is only asked for. */
  readonly device: string | undefined;
  readonly sizeBytes: bigint | undefined;
  /** Undefined when there is none, or it cannot be told now. */
  readonly fileSystem: string | undefined;
  readonly subsystemNqn: string | undefined;
  readonly paths: readonly ListedPath[];
  /** Devices on top of it, such as the mapper of an encrypted volume: `dm-0`. */
  readonly holders: readonly string[];
  /** Its own, and those of its holders. */
  readonly mounts: readonly ListedMount[];
  /** The file that asks the Discovery-Client for it. */
  readonly discoveryFile: string | undefined;
}

export interface ListedConnection extends ListedPath {
  readonly subsystemNqn: string;
}

export interface Listed {
  /** Those with a device first, by its name. */
  readonly volumes: readonly ListedVolume[];
  /** Mounts of NVMe namespaces that are not on this machine any more: reads and writes there fail. */
  readonly deadMounts: readonly (ListedMount & { readonly source: string })[];
  /** Connections to subsystems that show this machine no volume, and to discovery controllers. */
  readonly connections: readonly ListedConnection[];
}

export interface ListOptions {
  readonly host: Host;
  /** Only the volume with this UUID, and no connections; undefined: everything. */
  readonly uuid: string | undefined;
  /** Also volumes that other programs connected over TCP. */
  readonly all: boolean;
  readonly discoveryDirectory: string;
}

/** See the head of this file. Throws UNAVAILABLE when there is no mount table, and nothing else that lasts. */
export async function listVolumes(
  ctx: RequestContext,
  { host, uuid, all, discoveryDirectory }: ListOptions,
): Promise<Listed> {
  const [controllers, devices, table, files] = await Promise.all([
    allControllers(host),
    allDevices(host),
    mountTable(host),
    host.list(discoveryDirectory),
  ]);
  const isListed = ({ transport, hostNqn }: NvmeController) => transport === "tcp" && (all || isNodeHostNqn(hostNqn));
  const asked = (files ?? []).filter(isUuid);
  const fileOf = (uuid: string) => asked.includes(uuid) ? `${discoveryDirectory}/${uuid}` : undefined;
  const isWanted = (found: string) => uuid === undefined || found === uuid;

  const here = await Promise.all(
    devices.filter((device) => isWanted(device.uuid)).map(async (device) => {
      const paths = await pathsOf(host, device, controllers);
      if (!paths.some(({ controller }) => isListed(controller))) return [];
      const holders = await host.list(`${host.roots.sysfs}/class/block/${device.name}/holders`) ?? [];
      const numbers = await Promise.all(
        holders.map(async (name) => (await host.readText(`${host.roots.sysfs}/class/block/${name}/dev`))?.trim()),
      );
      const own = await mountsOf(host, table, device);
      const mounts = [...own, ...table.filter((mount) => numbers.includes(mount.number))];
      return [{
        uuid: device.uuid,
        device: device.path,
        sizeBytes: device.sizeBytes,
        fileSystem: own.find((mount) => mount.root === "/")?.fsType ?? await probe(host, ctx, device, paths),
        subsystemNqn: device.subsystemNqn,
        paths: paths.map(({ controller, anaState }) => listedPath(controller, anaState)),
        holders,
        mounts: mounts.map(listedMount),
        discoveryFile: fileOf(device.uuid),
      }];
    }),
  );
  const present = here.flat().sort((a, b) => byName(a.device, b.device));
  const absent = asked.filter((found) => isWanted(found) && present.every((volume) => volume.uuid !== found));
  const deadMounts: Mount[] = [];
  for (const mount of table) {
    if (uuid === undefined && isOfTree(host, table, mount) && await relationOf(host, mount, undefined) === "dead") {
      deadMounts.push(mount);
    }
  }
  const shown = new Set(present.flatMap((volume) => volume.paths.map((path) => path.controller)));
  return {
    volumes: [
      ...present,
      ...absent.map((uuid): ListedVolume => ({
        uuid,
        device: undefined,
        sizeBytes: undefined,
        fileSystem: undefined,
        subsystemNqn: undefined,
        paths: [],
        holders: [],
        mounts: [],
        discoveryFile: fileOf(uuid),
      })),
    ],
    deadMounts: deadMounts.map((mount) => ({ ...listedMount(mount), source: mount.source })),
    connections: uuid !== undefined ? [] : controllers
      .filter((controller) => isListed(controller) && !shown.has(controller.name))
      .map((controller) => ({ ...listedPath(controller, undefined), subsystemNqn: controller.subsystemNqn }))
      .sort((a, b) => byName(a.controller, b.controller)),
  };
}

/**
 * Whether a mount can be of a device of the tree that `host.roots` names. With a tree that is not the kernel's own (`--sysfs`
 * of a simulated machine), the devices of all others are missing in it, and nothing is wrong with their mounts.
 */
export function isOfTree(host: Host, table: readonly Mount[], { root, source }: Mount): boolean {
  const { dev, sysfs } = host.roots;
  // A container can have the kernel's at another place.
  if (sysfs === "/sys" || table.some((mount) => mount.fsType === "sysfs" && mount.path === sysfs)) return true;
  if (source.startsWith(`${dev}/`)) return true;
  // A device node that is bound to a file: its place in the file system that the tree is on.
  const place = root.replace(/\/\/deleted$/, "");
  const name = place.slice(place.lastIndexOf("/"));
  return place !== name && `${dev}${name}`.endsWith(place);
}

function isUuid(text: string): boolean {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(text);
}

function byName(a: string, b: string): number {
  return a.localeCompare(b, "en", { numeric: true });
}

function listedPath(controller: NvmeController, anaState: string | undefined): ListedPath {
  const address = addressOf(controller);
  return {
    controller: controller.name,
    address: address === undefined ? controller.address : formatAddress(address),
    state: controller.state,
    anaState,
    hostNqn: controller.hostNqn,
  };
}

function listedMount(mount: Mount): ListedMount {
  const isNode = mount.fsType === "devtmpfs" || mount.root !== "/" && /\/nvme\d+n\d+/.test(mount.root);
  return {
    path: mount.path,
    type: isNode ? "block" : "filesystem",
    fileSystem: isNode ? undefined : mount.fsType,
    readOnly: mount.options.includes("ro"),
  };
}

// A controller that has just lost its other end says `live` for some seconds more, and a read then waits.
const probeMs = 2000;

async function probe(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  paths: readonly NamespacePath[],
): Promise<string | undefined> {
  if (!paths.some(isLivePath)) return undefined;
  using limit = timeLimit(ctx.signal, probeMs);
  try {
    // What can be mounted first: asked for everything, blkid takes the content of files for members of a RAID.
    for (const filter of [["-n", fsTypes.join(",")], ["-n", "crypto_LUKS"], []]) {
      const { stdout } = await host.run("blkid", ["-p", ...filter, "-s", "TYPE", "-o", "value", device.path], {
        signal: limit.signal,
        onAbort: "kill",
        log: ctx.log,
      });
      if (stdout.trim() !== "") return stdout.trim();
    }
    return undefined;
  } catch (error) {
    ctx.signal.throwIfAborted();
    ctx.log.debug("could not tell the file system", { device: device.path, error: messageOf(error) });
    return undefined;
  }
}

// ---------------------------------------------------------------------------------------------------------- showing

/** The list as JSON, for programs; sizes are numbers of bytes, what is not known is left out. */
export function listAsJson(listed: Listed): string {
  return JSON.stringify(listed, (_key, value) => typeof value === "bigint" ? Number(value) : value, 2);
}

/** The list as text for people; ends without a newline. */
export function listAsText({ volumes, deadMounts, connections }: Listed): string {
  const lines: string[] = [];
  if (volumes.length > 0) {
    const rows = [
      ["VOLUME", "DEVICE", "SIZE", "FILE SYSTEM", "SUBSYSTEM"],
      ...volumes.map((volume) => [
        volume.uuid,
        volume.device ?? "none",
        volume.sizeBytes === undefined ? "-" : formatSize(volume.sizeBytes),
        volume.fileSystem ?? "-",
        volume.subsystemNqn ?? "-",
      ]),
    ];
    const [head = "", ...heads] = columns(rows);
    lines.push(head);
    const paths = columns(volumes.flatMap((volume) => volume.paths.map(pathCells)));
    for (const [at, volume] of volumes.entries()) {
      lines.push(heads[at] ?? "");
      for (const line of paths.splice(0, volume.paths.length)) lines.push(`  path   ${line}`);
      for (const holder of volume.holders) lines.push(`  under  ${holder}`);
      for (const mount of volume.mounts) lines.push(`  mount  ${describe(mount)}`);
      if (volume.device === undefined) {
        lines.push(`  asked for by ${volume.discoveryFile}, but this machine has no device of it`);
      }
    }
  }
  if (deadMounts.length > 0) {
    lines.push("", "MOUNTS WITHOUT A DEVICE (reads and writes fail; unmount them)");
    for (const mount of deadMounts) lines.push(`  ${describe(mount)}  was ${printable(mount.source)}`);
  }
  if (connections.length > 0) {
    lines.push("", "CONNECTIONS WITHOUT A VOLUME");
    for (const line of columns(connections.map((each) => [...pathCells(each), each.subsystemNqn]))) {
      lines.push(`  ${line}`);
    }
  }
  if (lines[0] === "") lines.shift();
  return lines.length === 0 ? "lbcsi has nothing on this machine" : lines.join("\n");
}

function pathCells({ controller, address, state, anaState }: ListedPath): string[] {
  return [controller, address, state, anaState ?? "-"];
}

function describe({ path, type, fileSystem, readOnly }: ListedMount): string {
  return `${printable(path)}  ${type === "block" ? "block device" : fileSystem}  ${readOnly ? "ro" : "rw"}`;
}

/** `64 MiB`, `1.5 TiB`. */
function formatSize(bytes: bigint): string {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = Number(bytes);
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at++;
  }
  return `${Number(value.toFixed(1))} ${units[at]}`;
}

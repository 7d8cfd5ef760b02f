/**
 * Collects what lbcsi has on this machine: volumes with their devices, paths and mounts, volumes that the Discovery-Client
 * is asked for, mounts whose device has gone, and connections without a volume.
 *
 * It works while things are broken. Everything comes from sysfs, the mount table and the directory of the
 * Discovery-Client, which answer from memory. A device is read (for the type of a file system that is not mounted) only
 * when it has a live path, and for a short time.
 */
import { timeLimit } from "../timing.ts";
import type { RequestContext } from "../context.ts";
import { messageOf } from "../error.ts";
import { fsTypes } from "../host/filesystem/fs_type.ts";
import type { Host } from "../host/host.ts";
import { type Mount, mountTable } from "../host/mount_table.ts";
import { addressOf, allControllers, type NvmeController } from "../host/nvme/controllers.ts";
import { allDevices, type BlockDevice } from "../host/nvme/devices.ts";
import { isLivePath, type NamespacePath, pathsOf } from "../host/nvme/paths.ts";
import { mountsOf, relationOf } from "../host/volume_mounts.ts";
import { formatAddress, isNodeHostNqn } from "../namespace.ts";
import { isOfDeviceTree } from "./device_tree.ts";

/** One path of a volume, or one connection without a volume. */
export interface ListedPath {
  /** `nvme0`. */
  readonly controller: string;
  /** `192.0.2.1:4420`; the text of sysfs when it is not an address with a port. */
  readonly address: string;
  /** Of the controller: `live`, `connecting` … */
  readonly state: string;
  /** Undefined without multipath. */
  readonly anaState: string | undefined;
  readonly hostNqn: string;
}

/** One mount of a volume. */
export interface ListedMount {
  readonly path: string;
  /** `block`: the device node is bound to a file. */
  readonly type: "filesystem" | "block";
  readonly fileSystem: string | undefined;
  readonly readOnly: boolean;
}

/** One volume. */
export interface ListedVolume {
  readonly uuid: string;
  /** Undefined when the machine has no device of it, and only the Discovery-Client is asked for it. */
  readonly device: string | undefined;
  readonly sizeBytes: bigint | undefined;
  /** Undefined when there is none, or it cannot be read now. */
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

/** One connection without a volume. */
export interface ListedConnection extends ListedPath {
  readonly subsystemNqn: string;
}

/** What lbcsi has on this machine. */
export interface VolumeList {
  /** Volumes with a device come first, sorted by its name. */
  readonly volumes: readonly ListedVolume[];
  /** Mounts of NVMe namespaces that are no longer on this machine: reads and writes there fail. */
  readonly deadMounts: readonly (ListedMount & { readonly source: string })[];
  /** Connections to subsystems that show this machine no volume, and to discovery controllers. */
  readonly connections: readonly ListedConnection[];
}

/** Which volumes are listed, and where. */
export interface ListOptions {
  readonly host: Host;
  /** Only the volume with this UUID, and no connections; undefined: everything. */
  readonly uuid: string | undefined;
  /** Also volumes that other programs connected over TCP. */
  readonly all: boolean;
  readonly discoveryDirectory: string;
}

/** Lists what lbcsi has on this machine. Throws UNAVAILABLE when the mount table cannot be read. */
export async function listVolumes(
  ctx: RequestContext,
  { host, uuid, all, discoveryDirectory }: ListOptions,
): Promise<VolumeList> {
  const [controllers, devices, table, files] = await Promise.all([
    allControllers(host),
    allDevices(host),
    mountTable(host),
    host.list(discoveryDirectory),
  ]);
  const isListed = ({ transport, hostNqn }: NvmeController) => transport === "tcp" && (all || isNodeHostNqn(hostNqn));
  const requested = (files ?? []).filter(isUuid);
  const fileOf = (uuid: string) => requested.includes(uuid) ? `${discoveryDirectory}/${uuid}` : undefined;
  const isSelected = (found: string) => uuid === undefined || found === uuid;

  const here = await Promise.all(
    devices.filter((device) => isSelected(device.uuid)).map(async (device) => {
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
        fileSystem: own.find((mount) => mount.root === "/")?.fsType ??
          await readFileSystemType(host, ctx, device, paths),
        subsystemNqn: device.subsystemNqn,
        paths: paths.map(({ controller, anaState }) => listedPath(controller, anaState)),
        holders,
        mounts: mounts.map(listedMount),
        discoveryFile: fileOf(device.uuid),
      }];
    }),
  );
  const present = here.flat().sort((a, b) => byName(a.device, b.device));
  const absent = requested.filter((found) => isSelected(found) && present.every((volume) => volume.uuid !== found));
  const deadMounts: Mount[] = [];
  for (const mount of table) {
    if (
      uuid === undefined && isOfDeviceTree(host, table, mount) && await relationOf(host, mount, undefined) === "dead"
    ) {
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
  const isDeviceNode = mount.fsType === "devtmpfs" || mount.root !== "/" && /\/nvme\d+n\d+/.test(mount.root);
  return {
    path: mount.path,
    type: isDeviceNode ? "block" : "filesystem",
    fileSystem: isDeviceNode ? undefined : mount.fsType,
    readOnly: mount.options.includes("ro"),
  };
}

// A controller that has just lost its connection stays `live` for some seconds, and a read then waits.
const readMs = 2000;

async function readFileSystemType(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  paths: readonly NamespacePath[],
): Promise<string | undefined> {
  if (!paths.some(isLivePath)) return undefined;
  using limit = timeLimit(ctx.signal, readMs);
  try {
    // Mountable file systems first: without a filter, blkid takes the content of files for members of a RAID.
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

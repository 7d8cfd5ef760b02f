/** Device-mapper devices of volumes with host encryption, as sysfs shows them. */
import type { Host } from "./host.ts";
import { type BlockDevice, findDevice } from "./nvme/devices.ts";

/** Name of a volume's mapper: the incumbent driver's, so that its volumes open here. */
export function mapperName(uuid: string): string {
  return `lb-csi-nvme-uuid.${uuid.toLowerCase()}`;
}

/**
 * The open mapper of a volume as a block device, or undefined. Does not touch the device.
 *
 * @throws StatusError FAILED_PRECONDITION as findDevice does
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

/**
 * Block devices of NVMe namespaces, and the mappers that encrypt them: found in sysfs by namespace UUID, never by name or
 * number.
 *
 * What the kernel shows (measured on 6.1): `class/block/nvmeXnY` is the multipath head of a namespace, `nvmeXcYnZ` are its
 * paths (`hidden` is 1, no device node). `wwid` begins with `uuid.` if the namespace has a UUID; the file `uuid` shows the
 * NGUID when it has none, so only `wwid` decides. X is the subsystem's number, Y is not the NSID, and a name can belong to
 * another namespace after a reconnect: identity is read again before each step that relies on it.
 */
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";

export async function readAttribute(host: Host, path: string): Promise<string | undefined> {
  try {
    return (await host.readText(`${host.roots.sysfs}/${path}`))?.trim();
  } catch (error) {
    // An attribute of a device that is being removed answers ENODEV or EIO.
    if (/No such device|os error (5|19)\b/.test(messageOf(error))) return undefined;
    throw error;
  }
}

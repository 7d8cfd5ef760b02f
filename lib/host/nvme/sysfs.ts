/** Reads attributes in sysfs. */
import { messageOf } from "../../error.ts";
import type { Host } from "../host.ts";

/** The trimmed text of a file below the root of sysfs; undefined when it does not exist or its device is being removed. */
export async function readAttribute(host: Host, path: string): Promise<string | undefined> {
  try {
    return (await host.readText(`${host.roots.sysfs}/${path}`))?.trim();
  } catch (error) {
    // An attribute of a device that is being removed answers ENODEV or EIO.
    if (/No such device|os error (5|19)\b/.test(messageOf(error))) return undefined;
    throw error;
  }
}

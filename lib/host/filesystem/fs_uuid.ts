/** The UUIDs that the driver gives to file systems. */
import { nameUuid } from "../../uuid.ts";

/** The UUID of the file system of a namespace; the same each time, so that an unfinished one is recognised. */
export function fileSystemUuid(namespaceUuid: string): string {
  return nameUuid(`file system on ${namespaceUuid}`);
}

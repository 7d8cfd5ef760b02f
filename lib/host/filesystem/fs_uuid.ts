import { nameUuid } from "../../uuid.ts";

/** The file system UUID that the driver gives a namespace's file system. */
export function fileSystemUuid(namespaceUuid: string): string {
  return nameUuid(`file system on ${namespaceUuid}`);
}

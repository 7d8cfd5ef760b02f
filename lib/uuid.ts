/** UUIDs: their text form, and UUIDs that are derived from a name. */
import { createHash } from "node:crypto";

const form = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** The UUID that names nothing (RFC 9562, 5.9). */
export const nilUuid = "00000000-0000-0000-0000-000000000000";

/** Whether `text` has the usual form of a UUID, with dashes; upper case counts, and so does the nil UUID. */
export function hasUuidForm(text: string): boolean {
  return form.test(text.toLowerCase());
}

/** Whether `text` is a UUID in its usual form with dashes, and not the nil UUID. */
export function isUuid(text: string): boolean {
  return hasUuidForm(text) && text !== nilUuid;
}

/** A UUID (version 8, RFC 9562) that depends on `name` alone: the same name always has the same UUID. */
export function nameUuid(name: string): string {
  const bytes = createHash("sha256").update(name).digest().subarray(0, 16);
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x80;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

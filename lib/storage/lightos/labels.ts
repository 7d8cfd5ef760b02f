/**
 * Labels of LightOS volumes and descriptions of snapshots: what this driver writes for people who find them on the
 * cluster, and what it reads again (facts: docs/reference/lightos-api.md sections 14 and 15.1).
 *
 * LightOS keeps of a label's key only what follows its last "-" or "." (section 14), so the keys here have letters only.
 */
import type { VolumeRequest } from "../backend.ts";
import type { VolumeId } from "../../volume_id.ts";

/** The labels of a volume or snapshot, as LightOS has them. */
export type Labels = readonly { readonly key: string; readonly value: string }[];

const encryptionLabel = "hostcrypto";

/** The label that says how a volume is encrypted on the host: LightOS does not know. */
export function encryptionLabels(hostEncryption: VolumeId["hostEncryption"]): Readonly<Record<string, string>> {
  return hostEncryption === undefined ? {} : { [encryptionLabel]: hostEncryption };
}

/** How a volume or snapshot is encrypted on the host, by its labels. */
export function encryptionOf(labels: Labels): VolumeId["hostEncryption"] {
  return labels.some(({ key, value }) => key === encryptionLabel && value === "luks2") ? "luks2" : undefined;
}

/** Whether this driver made the volume, or one that it comes from. */
export function isMadeByUs(labels: Labels): boolean {
  return labels.some(({ key, value }) => key === "madeby" && value === "lbcsi");
}

/**
 * The labels of a new volume: who made it, for whom, and what else `more` says. Keys and values have 1 to 253 letters,
 * digits, "-", "_" and "." (docs/reference/lightos-api.md 15.1); anything else in a value becomes "_".
 */
export function volumeLabels(
  owner: VolumeRequest["owner"],
  more: Readonly<Record<string, string>> = {},
): { key: string; value: string }[] {
  return Object.entries({ madeby: "lbcsi", ...owner, ...more })
    .map(([key, value]) => ({ key, value: value.replace(/[^A-Za-z0-9_.-]/g, "_").slice(0, 253) }))
    .filter(({ key, value }) => value !== "" && /^[A-Za-z0-9]{1,253}$/.test(key));
}

/** The description of a snapshot: its labels are those of its volume, because CreateSnapshot takes none. */
export function snapshotDescription(owner: VolumeRequest["owner"]): string {
  const facts = Object.entries(owner ?? {}).map(([key, value]) => `${key}=${printable(value)}`);
  return ["made by lbcsi", ...facts].join(" ");
}

/** The text with "_" in place of each character that a description should not have, cut to 253 characters. */
export function printable(text: string): string {
  return text.replace(/[^\x21-\x7e]/g, "_").slice(0, 253);
}

/** Checks of the arguments of calls to a simulated cluster. Each throws the error with which LightOS answers. */
import type { Action } from "./action.ts";
import type { Behaviour } from "./behaviour.ts";
import type { VolumeState } from "./model.ts";

/** A label of a volume. */
export interface Label {
  readonly key: string;
  readonly value: string;
}

/** Sizes are multiples of this (docs/reference/lightos-api.md 6.5). */
const sizeStepBytes = 4096n;

const sizeUnits: Readonly<Record<string, bigint>> = {
  "": 1n,
  b: 1n,
  kib: 1n << 10n,
  mib: 1n << 20n,
  gib: 1n << 30n,
  tib: 1n << 40n,
  pib: 1n << 50n,
};

/** Throws INVALID_ARGUMENT for a text that cannot name a volume, snapshot or policy. */
export function assertName(action: Action, name: string): void {
  if (!/^[A-Za-z0-9_.-]{1,253}$/.test(name)) {
    throw action.invalid(`"${name}" is not a name of 1 to 253 letters, digits, "-", "_" and "."`);
  }
}

/** Throws FAILED_PRECONDITION when the caller has seen another ETag; `ifMatch` undefined: no check. */
export function assertEtag(action: Action, etag: string, ifMatch: string | undefined): void {
  if (ifMatch === undefined || ifMatch === etag) return;
  throw action.error("FAILED_PRECONDITION", `its ETag is ${etag}, not ${ifMatch}`);
}

/** Throws UNAVAILABLE for a state that passes, and `finalCode` for one that does not: Deleting or Failed. */
export function assertIdle(
  action: Action,
  state: VolumeState,
  finalCode: "INVALID_ARGUMENT" | "FAILED_PRECONDITION" = "INVALID_ARGUMENT",
): void {
  if (state === "Available" || state === "Migrating") return;
  const isFinal = state === "Deleting" || state === "Failed";
  throw action.error(isFinal ? finalCode : "UNAVAILABLE", `the volume is ${state}`);
}

/**
 * Bytes of a size in text form: `10737418240b`, `10737418240`, `5 gib` (docs/reference/lightos-api.md 6.5 and 14).
 * Throws INVALID_ARGUMENT.
 */
export function parseSize(action: Action, text: string): bigint {
  const match = /^(\d{1,20})\s*([a-z]*)$/i.exec(text.trim());
  const unit = sizeUnits[(match?.[2] ?? "?").toLowerCase()];
  if (match === null || unit === undefined) throw action.invalid(`size "${text}" is not a number of bytes`);
  const bytes = BigInt(match[1] ?? "0") * unit;
  if (bytes === 0n) throw action.invalid(`size "${text}" is zero`);
  if (bytes >= 1n << 63n) throw action.invalid(`size "${text}" is out of range`);
  return bytes;
}

/** The size that a volume gets: rounded up to 4 KiB, or INVALID_ARGUMENT where the documentation demands multiples. */
export function parseVolumeSize(action: Action, text: string, { asDocumented }: Behaviour): bigint {
  const bytes = parseSize(action, text);
  const rest = bytes % sizeStepBytes;
  if (rest === 0n) return bytes;
  if (asDocumented) throw action.invalid(`size "${text}" is not a multiple of ${sizeStepBytes} bytes`);
  return bytes + sizeStepBytes - rest;
}

/** Compression in text form; undefined for an empty text. Throws INVALID_ARGUMENT. */
export function parseCompression(action: Action, text: string): boolean | undefined {
  switch (text.toLowerCase()) {
    case "":
      return undefined;
    case "true":
      return true;
    case "false":
      return false;
    default:
      throw action.invalid(`compression "${text}" is neither "true" nor "false"`);
  }
}

/** A copy of the ACL; throws INVALID_ARGUMENT for entries that LightOS does not accept. */
export function parseAcl(action: Action, acl: readonly string[], { asDocumented }: Behaviour): string[] {
  for (const entry of acl) {
    const isKeyword = entry === "ALLOW_NONE" || entry === "ALLOW_ANY";
    if (isKeyword && acl.length > 1) throw action.invalid(`${entry} is not alone in the ACL`);
    const isAllowed = asDocumented ? /^nqn\.[\x21-\x7e]{1,219}$/.test(entry) : entry !== "";
    if (!isKeyword && !isAllowed) throw action.invalid(`"${entry}" is not a host NQN`);
  }
  if (new Set(acl).size < acl.length) throw action.invalid("the ACL holds an entry twice");
  return [...acl];
}

/** A copy of the IP ACL; throws INVALID_ARGUMENT for entries that are not addresses. */
export function parseIpAcl(action: Action, acl: readonly string[]): string[] {
  for (const entry of acl) {
    if (entry === "ALLOW_NONE" || entry === "ALLOW_ANY" || /^[0-9a-fA-F.:/]+$/.test(entry)) continue;
    throw action.invalid(`"${entry}" is not an IP address`);
  }
  return [...acl];
}

/** A copy of the labels; throws INVALID_ARGUMENT for too many or bad ones. */
export function parseLabels(action: Action, labels: readonly Label[]): { key: string; value: string }[] {
  if (labels.length > 16) throw action.invalid(`${labels.length} labels are given, 16 are allowed`);
  for (const { key, value } of labels) {
    for (const text of [key, value]) {
      if (!/^[A-Za-z0-9_.-]{1,253}$/.test(text)) throw action.invalid(`"${text}" is not part of a label`);
    }
  }
  return labels.map(({ key, value }) => ({ key, value }));
}

/** The keys of the Secrets in calls. Other keys are ignored, unless they look like a mistyped key of this driver. */
import { slipsBetween } from "./suggestion.ts";

/** All keys that this driver reads. */
export const secretKeys: readonly string[] = [
  "jwt",
  "mgmt-ca.crt",
  "mgmt-server-name",
  "mgmt-tls-pin",
  "mgmt-tls-verify",
  "host-encryption-passphrase",
  "host-encryption-passphrase-previous",
  "dhchap-key",
  "dhchap-ctrl-key",
];

/**
 * What is wrong with a key that looks like one of this driver and is not. Undefined: nothing. If such keys were ignored, a
 * mistyped `mgmt-tls-pin` would mean no pin at all, and `JWT` would mean the token of the controller.
 */
export function secretKeyProblem(key: string): string | undefined {
  if (secretKeys.includes(key)) return undefined;
  const plain = plainOf(key);
  const isLike = /^(mgmt|dhchap|host-encryption)-/.test(plain) || plain === "jwt";
  if (!isLike) return undefined;
  // `mgmt-ca` is the beginning of a key.
  const distanceTo = (known: string) =>
    plainOf(known).startsWith(`${plain}-`) ? 1 : slipsBetween(plain, plainOf(known));
  const [nearest] = secretKeys.map((known) => ({ known, distance: distanceTo(known) }))
    .sort((a, b) => a.distance - b.distance);
  return nearest !== undefined && nearest.distance <= 3
    ? `is not a key of this driver, did you mean "${nearest.known}"?`
    : `is not a key of this driver (known: ${secretKeys.join(", ")})`;
}

/** Whether the value of a key is used unchanged, because one byte more or less makes another passphrase. */
export function isTakenAsItIs(key: string): boolean {
  return key.startsWith("host-encryption-passphrase");
}

function plainOf(key: string): string {
  return key.toLowerCase().replaceAll(/[_.]/g, "-");
}

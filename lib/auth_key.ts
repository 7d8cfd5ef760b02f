/**
 * Keys of NVMe's in-band authentication, DH-HMAC-CHAP (NVMe base specification 2.0, 8.13.5): host and controller prove
 * to each other that they know a key, and never send it.
 *
 * A key is a text, `DHHC-1:HH:BASE64:`. HH names the hash that both sides apply to the key before its use: 00 none, 01
 * SHA-256, 02 SHA-384, 03 SHA-512. BASE64 holds the key, 32, 48 or 64 bytes, as many as the hash has if there is one,
 * and its CRC-32, least significant byte first.
 */
import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import { crc32 } from "node:zlib";
import * as z from "zod";
import { type Secrets, Unprintable } from "./secrets.ts";

/** Which side proves that it knows a key: the host to the controller, or each to the other. */
export const authKinds = ["unidirectional", "bidirectional"] as const;
export type AuthKind = typeof authKinds[number];

/** A key. It prints as `[key]` wherever it ends up. */
export class DhchapKey extends Unprintable {
  readonly #text: string;

  private constructor(text: string) {
    super("[key]");
    this.#text = text;
  }

  /** Reads a key, ignoring blanks around it; throws a TypeError that says what is wrong and shows nothing of the key. */
  static parse(text: string): DhchapKey {
    const trimmed = text.trim();
    const problem = problemOf(trimmed);
    if (problem !== undefined) throw new TypeError(problem);
    return new DhchapKey(trimmed);
  }

  /** A new key of 256 bits, from the system's source of random numbers. */
  static generate(): DhchapKey {
    const key = randomBytes(32);
    return new DhchapKey(`DHHC-1:01:${Buffer.concat([key, checksum(key)]).toString("base64")}:`);
  }

  /** The text form, for the kernel and the cluster only. */
  reveal(): string {
    return this.#text;
  }

  equals(other: DhchapKey | undefined): boolean {
    return other !== undefined && other.#text === this.#text;
  }
}

/** The keys that a host authenticates a connection with. */
export interface DhchapKeys {
  /** Proves the host to the controller. */
  readonly host: DhchapKey;
  /** Proves the controller to the host; undefined: unidirectional, the controller proves nothing. */
  readonly controller: DhchapKey | undefined;
}

// The issues of this schema show nothing of the value.
const dhchapKeySchema: z.ZodType<DhchapKey, string> = z.string().transform((text, check) => {
  const problem = problemOf(text.trim());
  if (problem === undefined) return DhchapKey.parse(text);
  check.addIssue(problem);
  return z.NEVER;
});

/** Keys that a call brings itself. */
export interface GivenKeys {
  readonly host: DhchapKey | undefined;
  readonly controller: DhchapKey | undefined;
}

const givenSchema = z.object({
  "dhchap-key": dhchapKeySchema.optional(),
  "dhchap-ctrl-key": dhchapKeySchema.optional(),
}).refine((keys) => keys["dhchap-ctrl-key"] === undefined || keys["dhchap-key"] !== undefined, {
  path: ["dhchap-ctrl-key"],
  error: "is given without dhchap-key, which proves the host",
});

/** The keys in the secrets of a call; throws INVALID_ARGUMENT that names the bad one. */
export function givenKeys(secrets: Secrets): GivenKeys {
  const { "dhchap-key": host, "dhchap-ctrl-key": controller } = secrets.parse(givenSchema);
  return { host, controller };
}

/**
 * The keys for a kind of authentication: those that are given, and from `source` what is missing of them. A key of the
 * controller that `source` knows is used for either kind: it can prove itself then, and others may rely on it.
 */
export async function keysFor(
  kind: AuthKind,
  { host, controller }: GivenKeys,
  source: () => Promise<DhchapKeys>,
): Promise<DhchapKeys> {
  if (host !== undefined && kind === "unidirectional") return { host, controller: undefined };
  if (host !== undefined && controller !== undefined) return { host, controller };
  const found = await source();
  return {
    host: host ?? found.host,
    controller: kind === "unidirectional" ? found.controller : controller ?? found.controller,
  };
}

const form = /^DHHC-1:(0[0-3]):([0-9A-Za-z+/]+={0,2}):$/;
const lengths: Readonly<Record<string, readonly number[]>> = { "00": [32, 48, 64], "01": [32], "02": [48], "03": [64] };

function problemOf(text: string): string | undefined {
  const [, hash = "", base64 = ""] = form.exec(text) ?? [];
  if (hash === "") return `is not a key of the form "DHHC-1:01:<base64>:", as nvme gen-dhchap-key prints it`;
  const bytes = Buffer.from(base64, "base64");
  const key = bytes.subarray(0, -4);
  const allowed = lengths[hash] ?? [];
  if (bytes.toString("base64") !== base64 || !allowed.includes(key.length)) {
    return `is not a key: after "DHHC-1:${hash}:" the base64 of ${allowed.join(", ")} bytes and their CRC-32 is needed`;
  }
  return bytes.subarray(-4).equals(checksum(key)) ? undefined : "is damaged: its CRC-32 does not fit";
}

function checksum(key: Uint8Array): Uint8Array {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(crc32(key));
  return bytes;
}

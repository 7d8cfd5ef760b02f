/** Reads fields out of bytes. */
import { Buffer } from "node:buffer";

/** `length` bytes as text, one character each. */
export function textAt(bytes: Uint8Array, at: number, length: number): string {
  return String.fromCharCode(...bytes.subarray(at, at + length));
}

/** The UUID in 16 bytes. */
export function uuidAt(bytes: Uint8Array, at: number): string {
  const hex = bytes.subarray(at, at + 16).toHex();
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** The bytes from `at` on, to read numbers from. */
export function viewOf(bytes: Uint8Array, at = 0): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset + at, bytes.byteLength - at);
}

/** The index of the first byte that is not zero; undefined: all are zero. */
export function firstNonZero(bytes: Uint8Array): number | undefined {
  for (let from = 0; from < bytes.length; from += zeros.length) {
    const part = bytes.subarray(from, from + zeros.length);
    // A loop in JavaScript takes 100 times as long where V8 does not compile (--lite-mode).
    if (Buffer.compare(part, zeros.subarray(0, part.length)) === 0) continue;
    return from + part.findIndex((value) => value !== 0);
  }
  return undefined;
}

const zeros = Buffer.alloc(256 << 10);

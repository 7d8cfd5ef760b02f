/** Which parts of a device are read to see whether it is blank: its head, its tail, and samples in between. */
import { Buffer } from "node:buffer";

/** A part of a device. */
export interface Sample {
  readonly offsetBytes: bigint;
  readonly lengthBytes: number;
}

const edgeBytes = 2n << 20n;
const sampleBytes = 64 << 10;
const evenSamples = 62n;
// Where known formats keep copies of what identifies them, should the head be lost: ext4's backup super blocks with
// blocks of 1, 2 and 4 KiB, and btrfs' mirrors.
const copies = [8193n << 10n, 16384n << 11n, 32768n << 12n, 64n << 20n, 256n << 30n];

/** The parts of a device of this size in bytes; the whole of a small one. */
export function samplesOf(sizeBytes: bigint): readonly Sample[] {
  if (sizeBytes <= 2n * edgeBytes) return [{ offsetBytes: 0n, lengthBytes: Number(sizeBytes) }];
  const between = sizeBytes - 2n * edgeBytes;
  const offsets = copies.filter((offset) => offset > edgeBytes && offset < sizeBytes - edgeBytes);
  for (let n = 1n; n < evenSamples; n++) offsets.push(edgeBytes + (between * n / evenSamples / 4096n) * 4096n);
  return [
    { offsetBytes: 0n, lengthBytes: Number(edgeBytes) },
    { offsetBytes: sizeBytes - edgeBytes, lengthBytes: Number(edgeBytes) },
    ...offsets.map((offsetBytes) => {
      const left = sizeBytes - edgeBytes - offsetBytes;
      return { offsetBytes, lengthBytes: left < BigInt(sampleBytes) ? Number(left) : sampleBytes };
    }),
  ];
}

const zeros = Buffer.alloc(256 << 10);

/** Where the first byte is that is not zero; undefined: nowhere. */
export function firstNonZero(bytes: Uint8Array): number | undefined {
  for (let from = 0; from < bytes.length; from += zeros.length) {
    const part = bytes.subarray(from, from + zeros.length);
    // A loop in JavaScript takes 100 times as long where V8 does not compile (--lite-mode).
    if (Buffer.compare(part, zeros.subarray(0, part.length)) === 0) continue;
    return from + part.findIndex((value) => value !== 0);
  }
  return undefined;
}

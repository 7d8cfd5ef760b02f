/** The parts of a device that are read to see whether it is blank: its head, its tail, and samples in between. */
import { firstNonZero } from "./bytes.ts";
import type { DeviceReader } from "./device_reader.ts";

/** A part of a device. */
export interface DataSample {
  readonly offsetBytes: bigint;
  readonly lengthBytes: number;
}

/** The parts of a device of this size in bytes; the whole of a small one. */
export function samplesOf(sizeBytes: bigint): readonly DataSample[] {
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

/** The offset in bytes of the first byte that is not zero in the samples of a device; undefined: all are zero. */
export async function firstDataOffset(read: DeviceReader, sizeBytes: bigint): Promise<bigint | undefined> {
  for (const { offsetBytes, lengthBytes } of samplesOf(sizeBytes)) {
    const at = firstNonZero(await read(offsetBytes, lengthBytes));
    if (at !== undefined) return offsetBytes + BigInt(at);
  }
  return undefined;
}

const edgeBytes = 2n << 20n;
const sampleBytes = 64 << 10;
const evenSamples = 62n;
// Where known formats keep copies of their super block, in case the head is lost: those of ext4 with blocks of 1, 2 and
// 4 KiB, and those of btrfs.
const copies = [8193n << 10n, 16384n << 11n, 32768n << 12n, 64n << 20n, 256n << 30n];

/** Which parts of a device are read to see whether it is blank: its head, its tail, and samples in between. */
import { StatusError } from "../../error.ts";
import type { BlockDevice } from "../nvme/devices.ts";
import { firstNonZero } from "./bytes.ts";
import type { DeviceReader } from "./device_reader.ts";

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

/** Reads head, tail, and samples in between; throws `refuse` at the first byte that is not zero. */
export async function proveBlank(
  read: DeviceReader,
  device: BlockDevice,
  refuse: (problem: string) => StatusError,
): Promise<void> {
  for (const { offsetBytes, lengthBytes } of samplesOf(device.sizeBytes)) {
    const at = firstNonZero(await read(offsetBytes, lengthBytes));
    if (at === undefined) continue;
    throw refuse(
      `${device.path} is not blank and holds no file system: there is data at byte ${
        offsetBytes + BigInt(at)
      }; it is left ` +
        `alone. If nothing on it is needed, delete the volume and make it anew`,
    );
  }
}

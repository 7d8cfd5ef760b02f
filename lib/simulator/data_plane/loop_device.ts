/** Loop devices of this machine. */
import { basename } from "node:path";
import { StatusError } from "../../error.ts";
import { output, readText } from "./run_command.ts";

/** Sets up a free loop device over a file and resolves with its path, `/dev/loop5`. */
export async function attachLoop(file: string, sectorSizeBytes: number): Promise<string> {
  return await output("losetup", "-f", "--show", "-b", String(sectorSizeBytes), file);
}

/** As attachLoop, and writable: the kernel keeps a loop device read-only that an earlier user made so. */
export async function attachWritableLoop(file: string, sectorSizeBytes: number): Promise<string> {
  const loop = await attachLoop(file, sectorSizeBytes);
  await output("blockdev", "--setrw", loop);
  return loop;
}

/** The file behind a loop device, `… (deleted)` when it was removed; undefined when the device is free. */
export function backingFile(loop: string): string | undefined {
  return readText(`/sys/block/${basename(loop)}/loop/backing_file`);
}

/** Major and minor number, `7:5`; throws INTERNAL when sysfs does not know the device. */
export function deviceNumber(loop: string): string {
  const number = readText(`/sys/block/${basename(loop)}/dev`);
  if (number !== undefined) return number;
  throw new StatusError("INTERNAL", `Cannot find the number of ${loop}: it is not in sysfs`);
}

/** Paths of the loop devices that this machine shows. */
export function allLoops(): readonly string[] {
  return [...Deno.readDirSync("/sys/block")].map(({ name }) => name).filter((name) => /^loop\d+$/.test(name))
    .map((name) => `/dev/${name}`);
}

/**
 * Contents of the volumes and snapshots of a simulated cluster: sparse files in a directory.
 *
 * Each step may be repeated after a crash: unfinished files have the suffix `.new`.
 */
import { join } from "node:path";
import type { ChangedRun } from "./data_plane.ts";
import { output } from "./run_command.ts";

/** The files of one cluster. */
export class Contents {
  readonly directory: string;

  /** @param directory without symbolic links, because the kernel reports the real paths of the files behind loop devices */
  constructor(directory: string) {
    this.directory = directory;
  }

  /** Makes the directories. Idempotent. */
  static async open(directory: string): Promise<Contents> {
    for (const kind of ["volumes", "snapshots"]) {
      await Deno.mkdir(join(directory, kind), { recursive: true, mode: 0o700 });
    }
    return new Contents(await Deno.realPath(directory));
  }

  volumeFile(uuid: string): string {
    return join(this.directory, "volumes", `${uuid}.img`);
  }

  snapshotFile(uuid: string): string {
    return join(this.directory, "snapshots", `${uuid}.img`);
  }

  /** Makes a volume of zeros, or a copy of a snapshot followed by zeros. Exists already: nothing. */
  async createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void> {
    const file = this.volumeFile(uuid);
    if (exists(file)) return;
    if (sourceSnapshotUuid === undefined) {
      await Deno.writeFile(`${file}.new`, new Uint8Array());
    } else {
      await copySparse(this.snapshotFile(sourceSnapshotUuid), `${file}.new`);
    }
    await Deno.truncate(`${file}.new`, Number(sizeBytes));
    await Deno.rename(`${file}.new`, file);
  }

  async resizeVolume(uuid: string, sizeBytes: bigint): Promise<void> {
    await Deno.truncate(this.volumeFile(uuid), Number(sizeBytes));
  }

  /** Makes the file at least this large: a simulator that was killed while a volume grew had changed the model first. */
  async finishGrowth(uuid: string, sizeBytes: bigint): Promise<void> {
    const { size } = await Deno.stat(this.volumeFile(uuid));
    if (BigInt(size) < sizeBytes) await this.resizeVolume(uuid, sizeBytes);
  }

  async deleteVolume(uuid: string): Promise<void> {
    await removeFile(this.volumeFile(uuid));
    await removeFile(`${this.volumeFile(uuid)}.new`);
  }

  async createSnapshot(uuid: string, volumeUuid: string): Promise<void> {
    const file = this.snapshotFile(uuid);
    await copySparse(this.volumeFile(volumeUuid), `${file}.new`);
    await Deno.rename(`${file}.new`, file);
  }

  hasSnapshot(uuid: string): boolean {
    return exists(this.snapshotFile(uuid));
  }

  async deleteSnapshot(uuid: string): Promise<void> {
    await removeFile(this.snapshotFile(uuid));
    await removeFile(`${this.snapshotFile(uuid)}.new`);
  }

  /** Gives a volume the content of a snapshot. No host may use the volume. */
  async rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void> {
    const file = this.volumeFile(uuid);
    await copySparse(this.snapshotFile(snapshotUuid), `${file}.new`);
    await Deno.truncate(`${file}.new`, Number(sizeBytes));
    await Deno.rename(`${file}.new`, file);
  }

  /** Runs of blocks in which a snapshot differs from a base (from zeros when undefined), from block `start` on. */
  async *changedRuns(
    snapshotUuid: string,
    baseUuid: string | undefined,
    blockSizeBytes: number,
    start: bigint,
  ): AsyncIterable<ChangedRun> {
    using newer = await Deno.open(this.snapshotFile(snapshotUuid));
    using older = baseUuid === undefined ? undefined : await Deno.open(this.snapshotFile(baseUuid));
    const chunkBytes = blockSizeBytes * Math.max(1, (1 << 20) / blockSizeBytes);
    const from = start * BigInt(blockSizeBytes);
    await newer.seek(from, Deno.SeekMode.Start);
    await older?.seek(from, Deno.SeekMode.Start);
    let run: { start: bigint; end: bigint } | undefined;
    for (let block = start;;) {
      const bytes = await readFully(newer, chunkBytes);
      if (bytes.length === 0) break;
      const base = Buffer.alloc(bytes.length);
      if (older !== undefined) base.set((await readFully(older, chunkBytes)).subarray(0, bytes.length));
      const same = bytes.equals(base);
      for (let at = 0; at < bytes.length; at += blockSizeBytes, block++) {
        const changed = !same &&
          !bytes.subarray(at, at + blockSizeBytes).equals(base.subarray(at, at + blockSizeBytes));
        if (changed && run?.end === block) run.end++;
        else if (changed) {
          if (run !== undefined) yield run;
          run = { start: block, end: block + 1n };
        }
      }
    }
    if (run !== undefined) yield run;
  }

  /** Deletes all contents. */
  async clear(): Promise<void> {
    for (const kind of ["volumes", "snapshots"]) {
      for await (const { name } of Deno.readDir(join(this.directory, kind))) {
        await removeFile(join(this.directory, kind, name));
      }
    }
  }
}

/** Whether a path exists, also as a dangling link. */
export function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

/** Removes a file. Absent: nothing. */
export async function removeFile(path: string): Promise<void> {
  try {
    await Deno.remove(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/** Copies a file and keeps its holes. */
export async function copySparse(from: string, to: string): Promise<void> {
  await output("cp", "--reflink=auto", "--sparse=always", from, to);
}

async function readFully(file: Deno.FsFile, lengthBytes: number): Promise<Buffer> {
  const bytes = Buffer.alloc(lengthBytes);
  let filled = 0;
  while (filled < lengthBytes) {
    const count = await file.read(bytes.subarray(filled));
    if (count === null) break;
    filled += count;
  }
  return bytes.subarray(0, filled);
}

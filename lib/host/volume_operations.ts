/**
 * The operations on a volume that can block in the kernel: those that touch its device or its file system. A volume that is
 * frozen, or whose storage does not answer, blocks the calling thread until it answers, and nothing can free that thread
 * (volume_threads.ts).
 */

/** Size and use of a mounted file system, from statfs(2). */
export interface Usage {
  readonly totalBytes: bigint;
  readonly freeBytes: bigint;
  /** For users without privileges. */
  readonly availableBytes: bigint;
  readonly totalInodes: bigint;
  readonly freeInodes: bigint;
}

/** See the head of this file. */
export interface VolumeOperations {
  /** Reads exactly `lengthBytes` bytes; throws when there are fewer or one cannot be read. */
  readBytes(path: string, offsetBytes: bigint, lengthBytes: number): Promise<Uint8Array>;
  /** Writes bytes to an existing block device and waits until they are on the disk. Does not check what uses the device. */
  writeDevice(path: string, offsetBytes: bigint, bytes: Uint8Array): Promise<void>;
  /** Looks up a name that a directory does not have; throws the error of its file system. Takes one step at any size. */
  lookUp(directory: string): Promise<void>;
  /** Opens an unnamed file in `directory`, which the kernel removes at once; throws the error that a write would meet. */
  tryWrite(directory: string): Promise<void>;
  /** Reads size and use of the file system at `path`. */
  usage(path: string): Promise<Usage>;
}

/**
 * Makes the operations, which run on the I/O threads of the calling process or worker. Its source text is also the program of
 * a worker (volume_threads.ts), so it must not refer to anything outside of itself.
 */
export async function volumeOperations(): Promise<VolumeOperations> {
  const { constants, statfs } = await import("node:fs");
  const { open } = await import("node:fs/promises");
  return {
    async readBytes(path, offsetBytes, lengthBytes) {
      const bytes = new Uint8Array(lengthBytes);
      const file = await Deno.open(path, { read: true });
      try {
        await file.seek(offsetBytes, Deno.SeekMode.Start);
        for (let at = 0; at < lengthBytes;) {
          const count = await file.read(bytes.subarray(at));
          if (count === null) {
            throw new Error(`${path} ends at byte ${offsetBytes + BigInt(at)}, ${lengthBytes - at} more were expected`);
          }
          at += count;
        }
      } finally {
        file.close();
      }
      return bytes;
    },
    async writeDevice(path, offsetBytes, bytes) {
      const device = await Deno.open(path, { write: true, create: false });
      try {
        await device.seek(offsetBytes, Deno.SeekMode.Start);
        for (let at = 0; at < bytes.length;) at += await device.write(bytes.subarray(at));
        await device.sync();
      } finally {
        device.close();
      }
    },
    async lookUp(directory) {
      if (!(await Deno.stat(directory)).isDirectory) throw new Error(`${directory} is not a directory`);
      try {
        // A name that was never looked up, or the kernel would answer from memory.
        await Deno.lstat(`${directory}/.lbcsi-${crypto.randomUUID()}`);
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    },
    async tryWrite(directory) {
      // O_TMPFILE: the file leaves no trace, but the file system has to start a transaction.
      const unnamed = 0o20000000 | constants.O_DIRECTORY;
      await (await open(directory, unnamed | constants.O_WRONLY, 0o600)).close();
    },
    usage: (path) =>
      new Promise((resolve, reject) =>
        statfs(path, { bigint: true }, (error, found) => {
          if (error !== null) return reject(error);
          // Deno's own types lack `frsize`, which statvfs(3) says is the unit of the block counts.
          const unit = BigInt((found as { frsize?: bigint }).frsize || found.bsize);
          resolve({
            totalBytes: found.blocks * unit,
            freeBytes: found.bfree * unit,
            availableBytes: found.bavail * unit,
            totalInodes: found.files,
            freeInodes: found.ffree,
          });
        })
      ),
  };
}

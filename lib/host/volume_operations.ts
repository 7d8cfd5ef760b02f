/**
 * The operations on a volume that can block in the kernel: whatever touches its device or its file system. A volume without
 * an answering storage, or a frozen one, keeps the thread that asks until it answers, and nothing can take that thread back
 * (see volume_threads.ts).
 */

/** Size and use of a mounted file system, as statfs(2) tells it. */
export interface Usage {
  readonly totalBytes: bigint;
  readonly freeBytes: bigint;
  /** For users without privileges. */
  readonly availableBytes: bigint;
  readonly totalInodes: bigint;
  readonly freeInodes: bigint;
}

export interface VolumeOperations {
  /** Exactly `lengthBytes` bytes; throws when there are fewer or one cannot be read. */
  readBytes(path: string, offsetBytes: bigint, lengthBytes: number): Promise<Uint8Array>;
  /** Writes bytes to an existing block device, and waits until they are on the disk. It does not look who uses the device. */
  writeDevice(path: string, offsetBytes: bigint, bytes: Uint8Array): Promise<void>;
  /** Asks a directory for a name that it does not have: throws what its file system answers. One step, whatever it holds. */
  lookUp(directory: string): Promise<void>;
  /** Opens an unnamed file in `directory`, which the kernel drops at once: throws what a write to that file system meets. */
  tryWrite(directory: string): Promise<void>;
  /** Asks the file system at `path` for its size and use. */
  usage(path: string): Promise<Usage>;
}

/**
 * The operations, on threads of the thread that calls this. Its text is also the program of a worker (volume_threads.ts), so it
 * refers to nothing outside of itself.
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
        // A name that was not asked for before, or the kernel would answer from memory.
        await Deno.lstat(`${directory}/.lbcsi-${crypto.randomUUID()}`);
      } catch (error) {
        if (!(error instanceof Deno.errors.NotFound)) throw error;
      }
    },
    async tryWrite(directory) {
      // O_TMPFILE: no name, no trace, and yet the file system must start a transaction.
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

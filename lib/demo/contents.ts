/** What the demo's pods write to their volumes and read back: files in a file system, bytes on a block device. */
import { join } from "node:path";

/** Number, size and checksum of the files below a directory. */
interface Written {
  readonly files: number;
  readonly bytes: number;
  /** SHA-256 over the names and contents of all files. */
  readonly sum: string;
}

/** Writes new files of random bytes in new folders, syncs each to the device, and resolves with their checksum. */
export async function writeFiles(directory: string): Promise<Written> {
  for (let folder = 0; folder < 3; folder++) {
    await Deno.mkdir(join(directory, `folder-${folder}`));
    for (let number = 0; number < 8; number++) {
      const content = new Uint8Array(1 << (10 + number + folder));
      for (let at = 0; at < content.length; at += 65536) crypto.getRandomValues(content.subarray(at, at + 65536));
      const file = await Deno.open(join(directory, `folder-${folder}`, `file-${number}`), {
        write: true,
        createNew: true,
      });
      try {
        for (let at = 0; at < content.length;) at += await file.write(content.subarray(at));
        await file.sync();
      } finally {
        file.close();
      }
    }
  }
  return await checksum(directory);
}

/** Reads every file below `directory`. `lost+found`, which mkfs makes, holds no files and does not count. */
export async function checksum(directory: string): Promise<Written> {
  const files: { readonly path: string; readonly content: Uint8Array }[] = [];
  const walk = async (path: string) => {
    const entries = await Array.fromAsync(Deno.readDir(join(directory, path)));
    for (const { name, isDirectory } of entries.sort((a, b) => a.name < b.name ? -1 : 1)) {
      const inside = join(path, name);
      if (isDirectory) await walk(inside);
      else files.push({ path: inside, content: await Deno.readFile(join(directory, inside)) });
    }
  };
  await walk("");
  const parts = files.flatMap((
    { path, content },
  ) => [new TextEncoder().encode(`${path}\0${content.length}\0`), content]);
  const digest = await crypto.subtle.digest("SHA-256", new Uint8Array(await new Blob(parts.map(plain)).arrayBuffer()));
  const sum = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { files: files.length, bytes: files.reduce((total, { content }) => total + content.length, 0), sum };
}

function plain(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(bytes);
}

/** Writes `content` at each of these offsets of a block device, and syncs it. */
export async function writeAt(device: string, offsets: readonly bigint[], content: Uint8Array): Promise<void> {
  const file = await Deno.open(device, { write: true });
  try {
    for (const offset of offsets) {
      await file.seek(offset, Deno.SeekMode.Start);
      for (let at = 0; at < content.length;) at += await file.write(content.subarray(at));
    }
    await file.sync();
  } finally {
    file.close();
  }
}

/** The first of these offsets where the device holds other bytes than `content`; undefined when there is none. */
export async function differsAt(
  device: string,
  offsets: readonly bigint[],
  content: Uint8Array,
): Promise<bigint | undefined> {
  const file = await Deno.open(device, { read: true });
  try {
    const found = new Uint8Array(content.length);
    for (const offset of offsets) {
      await file.seek(offset, Deno.SeekMode.Start);
      for (let at = 0; at < found.length;) {
        const count = await file.read(found.subarray(at));
        if (count === null) return offset + BigInt(at);
        at += count;
      }
      if (found.some((byte, at) => byte !== content[at])) return offset;
    }
    return undefined;
  } finally {
    file.close();
  }
}

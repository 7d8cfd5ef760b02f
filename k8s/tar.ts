/**
 * Reproducible tar.gz archives: the same files give the same bytes, on any machine and at any time. Entries are sorted,
 * and owners, modes and times are fixed. tar(1) can do so too, but only GNU's.
 */
import { Buffer } from "node:buffer";
import { gzipSync } from "node:zlib";

/** A regular file of an archive. */
export interface ArchiveEntry {
  /** At most 100 bytes. */
  readonly path: string;
  readonly content: Uint8Array;
}

/** 2020-01-01. Not 0, because some programs take that for a mistake and print a warning. */
const modifiedSeconds = 1_577_836_800;

const blockBytes = 512;

/** A gzipped tar archive of the files. Throws when a path is too long. */
export function tarGzip(entries: readonly ArchiveEntry[]): Uint8Array {
  // Compared by code units: the order of a locale differs between machines.
  const blocks = entries.toSorted((a, b) => a.path < b.path ? -1 : 1).flatMap((entry) => {
    const padding = new Uint8Array((blockBytes - entry.content.length % blockBytes) % blockBytes);
    return [header(entry), entry.content, padding];
  });
  const end = new Uint8Array(2 * blockBytes);
  const zipped = gzipSync(Buffer.concat([...blocks, end]), { level: 9 });
  zipped[9] = 255; // the operating system that made it: unknown
  return zipped;
}

/** The header of a regular file, owned by root with mode 0644, in the POSIX ustar format. */
function header({ path, content }: ArchiveEntry): Uint8Array {
  const encoder = new TextEncoder();
  if (encoder.encode(path).length > 100) throw new Error(`Cannot pack "${path}": its name is over 100 bytes`);
  const block = new Uint8Array(blockBytes);
  const put = (offset: number, text: string) => block.set(encoder.encode(text), offset);
  const putOctal = (offset: number, length: number, value: number) =>
    put(offset, value.toString(8).padStart(length - 1, "0"));
  put(0, path);
  putOctal(100, 8, 0o644);
  putOctal(108, 8, 0);
  putOctal(116, 8, 0);
  putOctal(124, 12, content.length);
  putOctal(136, 12, modifiedSeconds);
  put(148, " ".repeat(8)); // the checksum is computed with blanks in its own place
  put(156, "0");
  put(257, "ustar\0" + "00");
  put(265, "root");
  put(297, "root");
  const checksum = block.reduce((sum, byte) => sum + byte, 0);
  put(148, checksum.toString(8).padStart(6, "0") + "\0 ");
  return block;
}

/**
 * How much one answer with a list may hold. gRPC clients, all sidecars among them, refuse messages of more than 4 MiB, and a
 * controller has a heap of 64 MiB.
 */
import type { Snapshot, Volume } from "./backend.ts";

/** Most entries in one answer: as many as LightOS gives objects at a time, so that a page costs one call. */
export const mostEntries = 1000;
/** Most bytes in one answer, as far as `entryBytes` knows them. */
export const mostBytes = 3 << 20;

/** About how many bytes of an answer an entry takes: its texts, and what is around them. */
export function entryBytes(entry: Volume | Snapshot): number {
  const around = 64;
  if ("sourceVolumeId" in entry) return entry.id.length + entry.sourceVolumeId.length + around;
  const hosts = entry.hosts.reduce((sum, host) => sum + host.length + 4, 0);
  return entry.id.length + hosts + (entry.condition?.message.length ?? 0) + around;
}

/** The entries of one answer, as they come in. */
export class AnswerPage<Entry extends Volume | Snapshot> {
  readonly entries: Entry[] = [];
  readonly #most: number;
  #bytes = 0;

  /** @param maxEntries as the caller has it; 0: as many as fit */
  constructor(maxEntries: number) {
    this.#most = maxEntries === 0 ? mostEntries : Math.min(maxEntries, mostEntries);
  }

  /** How many more entries may come. */
  get room(): number {
    return this.#most - this.entries.length;
  }

  /** Takes an entry; false when it does not fit any more. The first one always does. */
  add(entry: Entry): boolean {
    const bytes = entryBytes(entry);
    if (this.room <= 0 || (this.entries.length > 0 && this.#bytes + bytes > mostBytes)) return false;
    this.entries.push(entry);
    this.#bytes += bytes;
    return true;
  }
}

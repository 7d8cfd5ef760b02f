/**
 * Pages of a list, and the tokens that lead from one page to the next.
 *
 * gRPC clients, all sidecars among them, reject messages of more than 4 MiB, and a controller has a heap of 64 MiB. So
 * an answer has a limited number of entries and of bytes.
 */
import { createHash } from "node:crypto";
import type { RequestContext } from "../context.ts";
import type { StatusError } from "../error.ts";
import type { Snapshot, Volume } from "./backend.ts";

/** The most entries in one answer: as many objects as LightOS gives at a time, so that a page costs one call. */
export const mostEntries = 1000;
/** The most bytes in one answer, as far as `entryBytes` knows them. */
export const mostBytes = 3 << 20;

/** About how many bytes of an answer an entry takes: its texts, and the fields around them. */
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

  /** @param maxEntries the caller's limit; 0: as many as fit */
  constructor(maxEntries: number) {
    this.#most = maxEntries === 0 ? mostEntries : Math.min(maxEntries, mostEntries);
  }

  /** How many more entries fit. */
  get room(): number {
    return this.#most - this.entries.length;
  }

  /** Adds an entry; false when it does not fit any more. The first one always fits. */
  add(entry: Entry): boolean {
    const bytes = entryBytes(entry);
    if (this.room <= 0 || (this.entries.length > 0 && this.#bytes + bytes > mostBytes)) return false;
    this.entries.push(entry);
    this.#bytes += bytes;
    return true;
  }
}

/**
 * Identifies a listed place in a token; short, because CSI allows a token 128 bytes and names alone may have as many.
 */
export function tokenKey(place: string): string {
  return createHash("sha256").update(place).digest("hex").slice(0, 32);
}

/** ABORTED for a token that does not lead to a next page (any more). */
export function tokenError(ctx: RequestContext, token: string): StatusError {
  return ctx.error("ABORTED", `starting_token "${token}" is not one that leads on now, begin again without one`);
}

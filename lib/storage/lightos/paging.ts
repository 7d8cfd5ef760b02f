/**
 * Lists of LightOS' management API in pages, which are ordered by UUID (facts: docs/reference/lightos-api.md section
 * 15.1).
 */
import { LightosError } from "./api_error.ts";

/** The most objects in one page of LightOS. */
export const longestPage = 1000;

/** A page of a list: the objects behind one of them; empty: from the beginning. */
export interface PageRange {
  readonly offsetUUID: string;
  readonly limit: bigint;
}

/**
 * All objects of a list, page by page.
 *
 * Whether LightOS counts what it leaves out towards the limit is not documented, so only an empty page is the end.
 */
export async function* readAll<T extends { readonly UUID: string }>(
  read: (range: PageRange) => Promise<readonly T[]>,
): AsyncGenerator<T> {
  for (let offsetUUID = "";;) {
    const objects = await readInParts(longestPage, (limit) => read({ offsetUUID, limit }));
    const last = objects.at(-1)?.UUID;
    if (last === undefined || last === offsetUUID) return;
    yield* objects;
    offsetUUID = last;
  }
}

/**
 * Reads a page of a list, and a smaller one when the answer would be larger than the driver accepts.
 *
 * @param limit how many objects to ask for at first
 */
export async function readInParts<T>(limit: number, read: (limit: bigint) => Promise<T>): Promise<T> {
  for (let size = limit;; size = Math.ceil(size / 2)) {
    try {
      return await read(BigInt(size));
    } catch (error) {
      if (!(error instanceof LightosError) || !error.isTooLarge || size <= 1) throw error;
    }
  }
}

/** The page of a list that a request asks for. */
import type { RequestContext } from "../../context.ts";
import type { PageRequest } from "../../storage/backend.ts";

/** Throws INVALID_ARGUMENT for a negative number of entries. */
export function parsePageRequest(ctx: RequestContext, { maxEntries, startingToken }: PageRequest): PageRequest {
  if (maxEntries >= 0) return { maxEntries, startingToken };
  throw ctx.error("INVALID_ARGUMENT", `max_entries ${maxEntries} is negative`);
}

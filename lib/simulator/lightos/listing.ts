/** Pages of lists in the LightOS management API (docs/reference/lightos-api.md 15.1). */
import { Action } from "./action.ts";
import type { ObjectIndex } from "./object_index.ts";

/** Which objects a list holds. Empty texts do not restrict it. */
export interface ListRequest {
  /** Undefined: all projects. */
  readonly project: string | undefined;
  readonly uuid?: string;
  readonly name?: string;
  /** The list starts after this UUID. */
  readonly offsetUuid?: string;
  /** 0: `longestPage`. */
  readonly limit?: number;
  /** Also Deleting ones. */
  readonly showAll?: boolean;
  /** Volumes made from this snapshot. */
  readonly snapshotUuid?: string;
  readonly failureDomain?: string;
}

/** The largest number of objects in one page of a list (docs/reference/lightos-api.md 15.1). */
export const longestPage = 1000;

/** What every listed object has. */
interface Listed {
  readonly uuid: string;
  readonly name: string;
  readonly project: string;
}

/**
 * One page of the objects that `isListed` admits, ordered by UUID.
 *
 * @throws StatusError INVALID_ARGUMENT for a limit that is not between 1 and `longestPage`
 */
export function listPage<T extends Listed>(
  index: ObjectIndex<T>,
  request: ListRequest,
  isListed: (object: T) => boolean,
): T[] {
  const limit = request.limit ? request.limit : longestPage;
  if (limit < 0 || limit > longestPage) {
    throw new Action("list").invalid(`limit ${limit} is not between 1 and ${longestPage}`);
  }
  return candidates(index, request)
    .filter((object) =>
      isListed(object) &&
      (request.project === undefined || object.project === request.project) &&
      (!request.uuid || object.uuid === request.uuid.toLowerCase()) &&
      (!request.name || object.name === request.name) &&
      (!request.offsetUuid || object.uuid > request.offsetUuid.toLowerCase())
    )
    .sort((a, b) => a.uuid < b.uuid ? -1 : 1)
    .slice(0, limit);
}

/** The objects that can match the request, found without a walk over all objects where possible. */
function candidates<T extends Listed>(index: ObjectIndex<T>, request: ListRequest): readonly T[] {
  if (request.uuid) {
    const found = index.get(request.uuid.toLowerCase());
    return found === undefined ? [] : [found];
  }
  if (request.name && request.project !== undefined) return index.named(request.project, request.name);
  return [...index.values()];
}

/**
 * ListVolumes and GetCapacity on PoseidonOS, for the arrays of the cluster file.
 *
 * Kubernetes compares volume IDs as texts. So an ID in a list is written as CreateVolume wrote it for a StorageClass
 * whose `provisionerIP` and `provisionerPort` are the `idEndpoint` of the system in the file; and where the file names
 * former endpoints, a volume has an entry for each of them too, of which Kubernetes uses the one that it knows.
 * PoseidonOS lists a whole array at once, 256 volumes at most; a token names the array and the last volume of the page
 * before it, nothing is kept in between.
 */
import type { RequestContext } from "../../context.ts";
import { isUuid } from "../../uuid.ts";
import { formatEndpoint } from "../../volume_id.ts";
import type { Capacity, Listing, Page, PageRequest, Volume } from "../backend.ts";
import { AnswerPage, tokenError, tokenKey } from "../listing_page.ts";
import type { KnownSystem, KnownSystems } from "./cluster_file.ts";
import type { Dagents } from "./dagent.ts";
import { mib, mostVolumes, readSubsystems, readVolumes } from "./inventory.ts";
import { parseCapacityParameters } from "./parameters.ts";
import { toVolume } from "./volumes.ts";

/** The listing part of the PoseidonOS backend: what is on the arrays of the file. */
export function poseidonListing(dagents: Dagents, systems: KnownSystems): Listing {
  return {
    listVolumes: (call, page) => readPage(call.doing("list volumes"), places(dagents, systems), page, () => true),
    listAbnormal: (call, _secrets, page) =>
      readPage(
        call.doing("list abnormal volumes"),
        places(dagents, systems),
        page,
        ({ condition }) => condition !== undefined,
      ),
  };
}

/** The capacity part of the PoseidonOS backend: of the array that parameters name, or of all arrays of the file. */
export function poseidonCapacity(dagents: Dagents, systems: KnownSystems): Capacity {
  return {
    async getCapacity(call, parameters) {
      const ctx = call.doing("measure the capacity");
      const targets = Object.keys(parameters).length === 0
        ? systems.all().flatMap(({ endpoint, arrays }) => arrays.map((array) => ({ endpoint, array })))
        : [parseCapacityParameters(ctx, parameters)];
      let availableBytes = 0n;
      for (const { endpoint, array: name } of targets) {
        const dagent = dagents.at(systems.owning(endpoint)?.endpoint ?? endpoint);
        const { array, volumes } = await readVolumes(ctx, dagent, name);
        const free = array.capacity - array.used;
        // Where no volume can be added, space is of no use.
        if (free > 0n && volumes.length < mostVolumes) availableBytes += free / mib * mib;
      }
      return { availableBytes, minimumVolumeBytes: mib };
    },
  };
}

/** An array of a system. */
interface ArrayPlace {
  /** Identifies this array in tokens. */
  readonly key: string;
  readonly dagents: Dagents;
  readonly system: KnownSystem;
  readonly array: string;
}

function places(dagents: Dagents, systems: KnownSystems): readonly ArrayPlace[] {
  return systems.all().flatMap((system) =>
    system.arrays.map((array): ArrayPlace => ({
      key: tokenKey(JSON.stringify([system.name, array])),
      dagents,
      system,
      array,
    }))
  );
}

/** An entry of a list. */
interface ListEntry {
  readonly volume: Volume;
  /** How many entries of this volume have been listed with this one; undefined: all. */
  readonly answered: number | undefined;
}

async function readPage(
  ctx: RequestContext,
  places: readonly ArrayPlace[],
  { maxEntries, startingToken }: PageRequest,
  belongs: (volume: Volume) => boolean,
): Promise<Page<Volume>> {
  const start = startingToken === ""
    ? { at: 0, after: "", answered: undefined }
    : parseToken(ctx, places, startingToken);
  const answer = new AnswerPage<Volume>(maxEntries);
  let nextToken = "";
  for (const [at, place] of places.entries()) {
    if (at < start.at) continue;
    for (const { volume, answered } of await entriesAt(ctx, place)) {
      if ((at === start.at && isAnswered(start, volume.uuid, answered)) || !belongs(volume)) continue;
      if (!answer.add(volume)) return { entries: answer.entries, nextToken };
      nextToken = `${place.key}.${volume.uuid}${answered === undefined ? "" : `.${answered}`}`;
    }
  }
  return { entries: answer.entries, nextToken: "" };
}

/** The volumes of an array by UUID, each with an entry for every ID that it may have. */
async function entriesAt(
  ctx: RequestContext,
  { dagents, system, array: name }: ArrayPlace,
): Promise<readonly ListEntry[]> {
  const dagent = dagents.at(system.endpoint);
  const { array, volumes } = await readVolumes(ctx, dagent, name);
  const subsystems = await readSubsystems(ctx, dagent);
  const endpoints = new Map(
    [system.idEndpoint, ...system.formerEndpoints].map((endpoint) => [formatEndpoint(endpoint), endpoint]),
  );
  return volumes.toSorted((a, b) => a.uuid < b.uuid ? -1 : 1).flatMap((volume) =>
    [...endpoints.values()].map((endpoint, at) => ({
      volume: toVolume({ endpoint, array: name }, array, volume, subsystems),
      answered: at + 1 === endpoints.size ? undefined : at + 1,
    }))
  );
}

/** Where a page starts: at an array, behind a volume of it, or behind so many of that volume's entries. */
interface ArrayListStart {
  readonly at: number;
  readonly after: string;
  readonly answered: number | undefined;
}

/** Whether an entry was on an earlier page. */
function isAnswered(start: ArrayListStart, uuid: string, answered: number | undefined): boolean {
  if (uuid !== start.after || start.answered === undefined) return uuid <= start.after;
  return answered !== undefined && answered <= start.answered;
}

/** Where a token leads; throws ABORTED when it does not lead to an array (any more). */
function parseToken(ctx: RequestContext, places: readonly ArrayPlace[], token: string): ArrayListStart {
  const [key, after = "", answered] = token.split(".", 3);
  const at = places.findIndex((place) => place.key === key);
  if (at >= 0 && isUuid(after) && (answered === undefined || /^[1-9]\d{0,5}$/.test(answered))) {
    return { at, after, answered: answered === undefined ? undefined : Number(answered) };
  }
  throw tokenError(ctx, token);
}

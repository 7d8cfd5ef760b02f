/**
 * Lists of volumes and the space that is left, on the arrays of the cluster file.
 *
 * Kubernetes compares volume IDs as texts. So an ID in a list is written as CreateVolume wrote it for a StorageClass whose
 * `provisionerIP` and `provisionerPort` are the `idEndpoint` of the system in the file; and where the file names former
 * endpoints, a volume has an entry for each of them too, of which Kubernetes takes the one that it knows. PoseidonOS lists a whole array at
 * once, 256 volumes at most; a token names the array and the last volume of the page before it, nothing is kept in between.
 */
import { createHash } from "node:crypto";
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { formatEndpoint, isUuid, type PoseidonVolumeId } from "../../volume_id.ts";
import type { Capacity, Listing, Page, PageRequest, Volume } from "../backend.ts";
import { AnswerPage } from "../listing_page.ts";
import type { KnownSystem, KnownSystems } from "./cluster_file.ts";
import type { Dagents } from "./dagent.ts";
import { parseCapacityParameters } from "./parameters.ts";
import {
  mib,
  mostVolumes,
  type PoseidonArray,
  type PoseidonSubsystem,
  type PoseidonVolume,
  readSubsystems,
  readVolumes,
} from "./inventory.ts";

/** Makes an entry of a list. */
type ToVolume = (
  id: Pick<PoseidonVolumeId, "endpoint" | "array">,
  array: PoseidonArray,
  volume: PoseidonVolume,
  subsystems: readonly PoseidonSubsystem[],
) => Volume;

interface Place {
  /** Tells this array from others, in tokens. */
  readonly key: string;
  readonly system: KnownSystem;
  readonly array: string;
}

/** Lists of what is on the arrays of the file. */
export function poseidonListing(dagents: Dagents, systems: KnownSystems, toVolume: ToVolume): Listing {
  const volumesAt = async (ctx: RequestContext, action: string, { system, array: name }: Place) => {
    const dagent = dagents.at(system.endpoint);
    const { array, volumes } = await readVolumes(ctx, dagent, action, name);
    const subsystems = await readSubsystems(ctx, dagent, action);
    const endpoints = new Map(
      [system.idEndpoint, ...system.formerEndpoints].map((endpoint) => [formatEndpoint(endpoint), endpoint]),
    );
    return volumes.toSorted((a, b) => a.uuid < b.uuid ? -1 : 1).flatMap((volume) =>
      [...endpoints.values()].map((endpoint, at) => ({
        volume: toVolume({ endpoint, array: name }, array, volume, subsystems),
        /** How many entries of this volume are answered with this one; undefined: all. */
        answered: at + 1 === endpoints.size ? undefined : at + 1,
      }))
    );
  };
  const list = async (
    ctx: RequestContext,
    action: string,
    { maxEntries, startingToken }: PageRequest,
    belongs: (volume: Volume) => boolean,
  ): Promise<Page<Volume>> => {
    const places = systems.all().flatMap((system) =>
      system.arrays.map((array): Place => ({
        key: createHash("sha256").update(JSON.stringify([system.name, array])).digest("hex").slice(0, 32),
        system,
        array,
      }))
    );
    const start = startingToken === ""
      ? { at: 0, after: "", answered: undefined }
      : startOf(action, places, startingToken);
    const answer = new AnswerPage<Volume>(maxEntries);
    let nextToken = "";
    for (const [at, place] of places.entries()) {
      if (at < start.at) continue;
      for (const { volume, answered } of await volumesAt(ctx, action, place)) {
        if ((at === start.at && isAnswered(start, volume.uuid, answered)) || !belongs(volume)) continue;
        if (!answer.add(volume)) return { entries: answer.entries, nextToken };
        nextToken = `${place.key}.${volume.uuid}${answered === undefined ? "" : `.${answered}`}`;
      }
    }
    return { entries: answer.entries, nextToken: "" };
  };
  return {
    listVolumes: (ctx, wanted) => list(ctx, "list volumes", wanted, () => true),
    listAbnormal: (ctx, _secrets, wanted) =>
      list(ctx, "list volumes in trouble", wanted, ({ condition }) => condition !== undefined),
  };
}

/** Where a page starts: at an array, behind a volume of it, or behind so many of that volume's entries. */
interface Start {
  readonly at: number;
  readonly after: string;
  readonly answered: number | undefined;
}

/** Whether an entry was on an earlier page. */
function isAnswered(start: Start, uuid: string, answered: number | undefined): boolean {
  if (uuid !== start.after || start.answered === undefined) return uuid <= start.after;
  return answered !== undefined && answered <= start.answered;
}

function startOf(action: string, places: readonly Place[], token: string): Start {
  const [key, after = "", answered] = token.split(".", 3);
  const at = places.findIndex((place) => place.key === key);
  if (at >= 0 && isUuid(after) && (answered === undefined || /^[1-9]\d{0,5}$/.test(answered))) {
    return { at, after, answered: answered === undefined ? undefined : Number(answered) };
  }
  throw new StatusError(
    "ABORTED",
    `Cannot ${action}: starting_token "${token}" is not one that leads on now, begin again without one`,
  );
}

/** The space that is left on an array that parameters name, or on all arrays of the file. */
export function poseidonCapacity(dagents: Dagents, systems: KnownSystems): Capacity {
  const action = "measure the capacity";
  return {
    async getCapacity(ctx, parameters) {
      const wanted = Object.keys(parameters).length === 0
        ? systems.all().flatMap(({ endpoint, arrays }) => arrays.map((array) => ({ endpoint, array })))
        : [parseCapacityParameters(action, parameters)];
      let availableBytes = 0n;
      for (const { endpoint, array: name } of wanted) {
        const dagent = dagents.at(systems.owning(endpoint)?.endpoint ?? endpoint);
        const { array, volumes } = await readVolumes(ctx, dagent, action, name);
        const free = array.capacity - array.used;
        // Where no volume can be added, no space is of use.
        if (free > 0n && volumes.length < mostVolumes) availableBytes += free / mib * mib;
      }
      return { availableBytes, minimumVolumeBytes: mib };
    },
  };
}

/**
 * Volumes of PoseidonOS: found by UUID, created, deleted, and their limits of speed (facts:
 * docs/reference/poseidonos-api.md sections 6 and 11).
 *
 * PoseidonOS knows volumes by name, and names are used again. So the driver chooses the UUID of a new volume itself,
 * derived from the request's name and the place: a repeated request recognises its own volume, even when the answer
 * about its creation was lost. Nothing is done to a volume before its UUID was seen.
 */
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { nameUuid } from "../../uuid.ts";
import { formatEndpoint, formatPoseidonId, isPoseidonVolumeName, type PoseidonVolumeId } from "../../volume_id.ts";
import type { Volume, VolumeRequest } from "../backend.ts";
import { converge, type Next } from "./converge.ts";
import type { Dagent } from "./dagent.ts";
import { means } from "./dagent_error.ts";
import { exportHolders, hostsOf, unexportChange, unexportVolume } from "./exports.ts";
import {
  arrayCondition,
  mostVolumes,
  type PoseidonArray,
  type PoseidonSubsystem,
  type PoseidonVolume,
  readSubsystems,
  readVolumes,
} from "./inventory.ts";
import { type PoseidonParameters, type Qos, qosDifferences } from "./parameters.ts";

/** A volume and its array. */
export interface FoundVolume {
  readonly array: PoseidonArray;
  readonly volume: PoseidonVolume;
}

/** The volume with the ID's UUID, whatever its name is by now; undefined when the array certainly has none. */
export async function lookUpVolume(
  ctx: RequestContext,
  dagent: Dagent,
  id: PoseidonVolumeId,
): Promise<PoseidonVolume | undefined> {
  return (await readVolumes(ctx, dagent, id.array)).volumes.find(({ uuid }) => uuid === id.uuid);
}

/** The volume with the ID's UUID, and its array; throws NOT_FOUND when there is none. */
export async function findVolume(ctx: RequestContext, dagent: Dagent, id: PoseidonVolumeId): Promise<FoundVolume> {
  const { array, volumes } = await readVolumes(ctx, dagent, id.array);
  const volume = volumes.find(({ uuid }) => uuid === id.uuid);
  if (volume !== undefined) return { array, volume };
  const namesake = volumes.find(({ name }) => name === id.name);
  throw ctx.error(
    "NOT_FOUND",
    `array "${id.array}" of PoseidonOS at ${dagent.address} has no volume of that UUID${
      namesake === undefined ? "" : `, "${id.name}" is ${namesake.uuid}`
    }`,
  );
}

/** A volume as the controller sees it; `id` is its ID there, apart from its name of today. */
export function toVolume(
  id: Pick<PoseidonVolumeId, "endpoint" | "array">,
  array: PoseidonArray,
  volume: PoseidonVolume,
  subsystems: readonly PoseidonSubsystem[],
): Volume {
  return {
    id: formatPoseidonId({ ...id, name: volume.name, uuid: volume.uuid }),
    uuid: volume.uuid,
    name: volume.name,
    capacityBytes: volume.total,
    hosts: hostsOf(subsystems, volume, array.name),
    condition: arrayCondition(array),
  };
}

/** A volume that is to be created. */
export interface PoseidonCreation {
  readonly request: VolumeRequest;
  readonly parameters: PoseidonParameters;
  readonly sizeBytes: bigint;
}

/**
 * Creates a volume, or finds the one that an earlier call for the same name has created.
 *
 * @throws StatusError ALREADY_EXISTS that lists each difference when the volume of this name is another one,
 *   RESOURCE_EXHAUSTED when the array is full, FAILED_PRECONDITION when PoseidonOS ignores the limits of speed
 */
export async function createVolume(ctx: RequestContext, dagent: Dagent, creation: PoseidonCreation): Promise<Volume> {
  const { request, parameters, sizeBytes } = creation;
  const uuid = volumeUuid(request.name, parameters);
  // Kubernetes' names are allowed. Others may have characters that PoseidonOS does not allow.
  const name = isPoseidonVolumeName(request.name) ? request.name : `csi-${uuid}`;
  /** Whether the volume did not exist when this call began. */
  let isNew = false;
  const { array, volume } = await converge(ctx, dagent, {
    look: () => readVolumes(ctx, dagent, parameters.array),
    next: ({ array, volumes }): Next<FoundVolume> => {
      const volume = volumes.find((volume) => volume.uuid === uuid) ?? volumes.find((volume) => volume.name === name);
      if (volume !== undefined) return { done: { array, volume } };
      isNew = true;
      assertSpaceLeft(ctx, dagent, array, { count: volumes.length, sizeBytes });
      return creationStep(name, uuid, creation);
    },
  });
  const differences = differencesOf(volume, uuid, dagent.version, creation);
  const otherLimits = qosDifferences(parameters, volume);
  if (isNew && differences.length === 0 && otherLimits.length > 0) {
    // No host can have it yet, and left there it would block the name.
    await deleteVolume(ctx, dagent, { ...parameters, name, uuid: volume.uuid });
    throw ctx.error(
      "FAILED_PRECONDITION",
      `PoseidonOS at ${dagent.address} did not take its limits (${otherLimits.join("; ")}), QoS has to ` +
        `be switched on there first (fe_qos.enable in its pos.conf)`,
    );
  }
  if (differences.length + otherLimits.length > 0) {
    throw ctx.error(
      "ALREADY_EXISTS",
      `volume ${volume.uuid} on array "${parameters.array}" has that name and differs: ${
        [...differences, ...otherLimits].join("; ")
      }`,
    );
  }
  return { ...toVolume(parameters, array, volume, []), context: parameters.context };
}

/** Deletes a volume; absent: done. Throws FAILED_PRECONDITION while it is exported. */
export async function deleteVolume(ctx: RequestContext, dagent: Dagent, id: PoseidonVolumeId): Promise<void> {
  await converge(ctx, dagent, {
    look: async () => ({
      volume: await lookUpVolume(ctx, dagent, id),
      subsystems: await readSubsystems(ctx, dagent),
    }),
    next: ({ volume, subsystems }): Next<void> => {
      if (volume === undefined) return { done: undefined };
      const holders = exportHolders(subsystems, volume, id.array);
      if (holders !== undefined) {
        throw ctx.error("FAILED_PRECONDITION", `it is exported, ${holders}; detach it there first`);
      }
      // It says that it is exported, and is not: no host has it, and PoseidonOS would reject the deletion.
      if (volume.status === "Mounted") return unexportChange(volume, id.array);
      const path = `/volumes/${encodeURIComponent(volume.name)}`;
      return { step: "delete the volume", change: { method: "DELETE", path, param: { array: id.array } } };
    },
  });
  // Subsystems that were made for a node and never used; those that were used go when the volume is un-exported.
  await unexportVolume(ctx, dagent, id, { host: undefined, find: () => Promise.resolve(undefined) });
}

/** The step that gives a volume these limits of speed. */
export function qosStep(array: string, { name }: PoseidonVolume, { maxiops, maxbw }: Qos): Next<never> {
  // -1 keeps the current value, a field left out would mean "none" (docs/reference/poseidonos-api.md 6.15).
  const orKeep = (value: bigint | undefined) => value === undefined ? -1 : Number(value);
  return {
    step: "set the limits",
    change: {
      method: "POST",
      path: "/qos",
      param: {
        array,
        vol: [{ volumeName: name }],
        maxiops: orKeep(maxiops),
        maxbw: orKeep(maxbw),
        miniops: -1,
        minbw: -1,
      },
    },
    explain: (rejection) =>
      Promise.resolve(
        means(rejection, "QoS switched off")
          ? new StatusError(
            "FAILED_PRECONDITION",
            `${rejection.message}; fe_qos.enable in its pos.conf has to be switched on first`,
            { cause: rejection },
          )
          : undefined,
      ),
  };
}

/**
 * The UUID of the volume that a request makes: the same for each repetition, and another one for the same name on
 * another array. A volume that was deleted and is requested again has it again, which orchestrators avoid by using a
 * name once.
 */
function volumeUuid(name: string, { endpoint, array }: PoseidonParameters): string {
  return nameUuid(JSON.stringify(["volume", formatEndpoint(endpoint), array, name]));
}

function creationStep(name: string, uuid: string, { parameters, sizeBytes }: PoseidonCreation): Next<never> {
  return {
    step: "make the volume",
    change: {
      method: "POST",
      path: "/volumes",
      param: {
        array: parameters.array,
        name,
        size: Number(sizeBytes),
        maxiops: Number(parameters.maxiops ?? 0n),
        maxbw: Number(parameters.maxbw ?? 0n),
        iswalvol: false,
        uuid,
      },
    },
  };
}

/** How a volume differs from the request, its limits of speed apart. */
function differencesOf(
  volume: PoseidonVolume,
  uuid: string,
  version: string,
  { request: { limitBytes }, sizeBytes }: PoseidonCreation,
): readonly string[] {
  return [
    ...(volume.uuid === uuid || !acceptsUuids(version)
      ? []
      : [`its UUID is ${volume.uuid} instead of ${uuid}, so another request or another program made it`]),
    ...(volume.total < sizeBytes ? [`size is ${volume.total} bytes, asked are ${sizeBytes} bytes`] : []),
    ...(limitBytes !== 0n && volume.total > limitBytes
      ? [`size is ${volume.total} bytes, asked are at most ${limitBytes} bytes`]
      : []),
  ];
}

/** POS 0.12 was the first to accept a UUID for a new volume (docs/reference/poseidonos-api.md 6.4). */
function acceptsUuids(version: string): boolean {
  const match = /^v?0\.(\d+)/.exec(version);
  return match === null || Number(match[1]) >= 12;
}

/** Throws RESOURCE_EXHAUSTED for a volume that the array would reject. */
function assertSpaceLeft(
  ctx: RequestContext,
  dagent: Dagent,
  array: PoseidonArray,
  { count, sizeBytes }: { readonly count: number; readonly sizeBytes: bigint },
): void {
  const where = `array "${array.name}" of PoseidonOS at ${dagent.address}`;
  if (count >= mostVolumes) {
    throw ctx.error(
      "RESOURCE_EXHAUSTED",
      `${where} has ${count} volumes, ${mostVolumes} are allowed; delete one, or use another array`,
    );
  }
  const freeBytes = array.capacity - array.used;
  if (sizeBytes <= freeBytes) return;
  throw ctx.error(
    "RESOURCE_EXHAUSTED",
    `${where} has ${freeBytes < 0n ? 0n : freeBytes} bytes left, ${sizeBytes} are needed`,
  );
}

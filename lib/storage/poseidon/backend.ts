/**
 * PoseidonOS behind the StorageBackend contract, through DAgent's REST API (facts: docs/reference/poseidonos-api.md sections 5 to 7, 11 and 12).
 *
 * Three things decide the flows below:
 * - Every answer can be lost, and some failures are only half true. So each change is followed by a look, and what is found
 *   there is the result (`converge` in poseidon_dagent.ts).
 * - Volumes are known to PoseidonOS by name, and names come back. So we choose the UUID of a new volume ourselves, made of
 *   the request's name and the place: a repeated request knows its own volume, also when it never heard of its creation.
 *   Nothing is done to a volume before its UUID was seen.
 * - An array that is not mounted looks empty. Nothing is taken for gone unless the array was mounted at that moment.
 *
 * What PoseidonOS does not have is absent here too: snapshots, copies and growth (docs/reference/poseidonos-api.md 11.6).
 */
import { createHash } from "node:crypto";
import type { Logger, RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import {
  type Endpoint,
  formatEndpoint,
  formatPoseidonId,
  isPoseidonVolumeName,
  parsePoseidonId,
  type PoseidonVolumeId,
} from "../../volume_id.ts";
import type { Metrics } from "../../metrics.ts";
import { nodeIdOf } from "../../namespace.ts";
import type { StorageBackend, Volume, VolumeRequest } from "../backend.ts";
import type { KnownSystems } from "./cluster_file.ts";
import { converge, type Dagent, Dagents, means, type Next } from "./dagent.ts";
import { exportVolume, heldBy, hostsOf, unexportVolume } from "./exports.ts";
import { poseidonCapacity, poseidonListing } from "./listing.ts";
import {
  parseContext,
  parseMutable,
  parseParameters,
  type PoseidonParameters,
  type Qos,
  qosDifferences,
  volumeSize,
} from "./parameters.ts";
import {
  arrayConditionOf,
  mostVolumes,
  type PoseidonArray,
  type PoseidonSubsystem,
  type PoseidonVolume,
  readSubsystems,
  readVolumes,
} from "./inventory.ts";

/** What the process was told about reaching PoseidonOS. */
export interface PoseidonOptions {
  readonly log: Logger;
  /** Systems that the process was told about itself; undefined: none. */
  readonly systems?: KnownSystems | undefined;
  readonly metrics?: Metrics | undefined;
}

/** The PoseidonOS backend. */
export function poseidonBackend({ systems, metrics }: PoseidonOptions): StorageBackend {
  const dagents = new Dagents(metrics);
  /** The DAgent behind an endpoint, where it is today. */
  const dagentAt = (endpoint: Endpoint) => dagents.at(systems?.owning(endpoint)?.endpoint ?? endpoint);
  return {
    name: "poseidon",
    oneHostOnly:
      "PoseidonOS shows a volume in one place to whoever comes there, so it could not be taken from one node " +
      "and left to another",
    uuidOf: (volumeId) => parsePoseidonId(volumeId).uuid,
    async createVolume(ctx, _secrets, wanted) {
      const action = `create volume "${wanted.name}"`;
      const parameters = parseParameters(action, wanted.parameters);
      const sizeBytes = volumeSize(action, wanted);
      const dagent = dagentAt(parameters.endpoint);
      return await dagent.exclusively(
        ctx,
        action,
        `creating volume "${wanted.name}"`,
        () => createVolume(ctx, dagent, action, wanted, parameters, sizeBytes),
      );
    },
    async deleteVolume(ctx, _secrets, volumeId) {
      const id = parsePoseidonId(volumeId);
      const action = `delete volume ${id.uuid}`;
      const dagent = dagentAt(id.endpoint);
      await dagent.exclusively(
        ctx,
        action,
        `deleting volume ${id.uuid}`,
        () => deleteVolume(ctx, dagent, action, id),
      );
    },
    async getVolume(ctx, _secrets, volumeId) {
      const id = parsePoseidonId(volumeId);
      const action = `read volume ${id.uuid}`;
      const dagent = dagentAt(id.endpoint);
      const { array, volume } = await findVolume(ctx, dagent, action, id);
      return toVolume(id, array, volume, await readSubsystems(ctx, dagent, action));
    },
    async grantAccess(ctx, _secrets, volumeId, { hostNqn, volumeContext = {} }) {
      const id = parsePoseidonId(volumeId);
      const action = `give ${nodeIdOf(hostNqn)} access to volume ${id.uuid}`;
      const dagent = dagentAt(id.endpoint);
      return await dagent.exclusively(ctx, action, `exporting volume ${id.uuid}`, async () => {
        // An unknown volume is told before a bad context is.
        const { volume } = await findVolume(ctx, dagent, action, id);
        const addresses = parseContext(action, volumeContext);
        return await exportVolume(ctx, action, { dagent, array: id.array, volume }, hostNqn, addresses);
      });
    },
    async revokeAccess(ctx, _secrets, volumeId, hostNqn) {
      const id = parsePoseidonId(volumeId);
      const action = `take access to volume ${id.uuid} from ${
        hostNqn === undefined ? "every host" : nodeIdOf(hostNqn)
      }`;
      const dagent = dagentAt(id.endpoint);
      await dagent.exclusively(
        ctx,
        action,
        `un-exporting volume ${id.uuid}`,
        () => unexportVolume(ctx, action, dagent, id, hostNqn, () => lookUp(ctx, dagent, action, id)),
      );
    },
    modification: {
      merge(action, parameters, mutable) {
        parseMutable(action, mutable);
        return { ...parameters, ...mutable };
      },
      async modifyVolume(ctx, _secrets, volumeId, mutable) {
        const wanted = parseMutable("modify the volume", mutable);
        const id = parsePoseidonId(volumeId);
        const action = `modify volume ${id.uuid}`;
        const dagent = dagentAt(id.endpoint);
        await dagent.exclusively(ctx, action, `changing the limits of volume ${id.uuid}`, () =>
          converge(
            ctx,
            action,
            dagent,
            () => findVolume(ctx, dagent, action, id),
            ({ volume }): Next<void> =>
              qosDifferences(wanted, volume).length === 0 ? { done: undefined } : setQos(id.array, volume, wanted),
          ));
      },
    },
    ...(systems === undefined ? {} : {
      listing: poseidonListing(dagents, systems, toVolume),
      capacity: poseidonCapacity(dagents, systems),
    }),
    async [Symbol.asyncDispose]() {
      await dagents[Symbol.asyncDispose]();
    },
  };
}

// ------------------------------------------------------------------------------------------------------------- volumes

/** The volume with the ID's UUID, whatever its name is by now; undefined when the array surely has none. */
async function lookUp(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  id: PoseidonVolumeId,
): Promise<PoseidonVolume | undefined> {
  return (await readVolumes(ctx, dagent, action, id.array)).volumes.find(({ uuid }) => uuid === id.uuid);
}

/** The same; throws NOT_FOUND when there is none. */
async function findVolume(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  id: PoseidonVolumeId,
): Promise<{ readonly array: PoseidonArray; readonly volume: PoseidonVolume }> {
  const { array, volumes } = await readVolumes(ctx, dagent, action, id.array);
  const volume = volumes.find(({ uuid }) => uuid === id.uuid);
  if (volume !== undefined) return { array, volume };
  const namesake = volumes.find(({ name }) => name === id.name);
  throw new StatusError(
    "NOT_FOUND",
    `Cannot ${action}: array "${id.array}" of PoseidonOS at ${dagent.address} has no volume of that UUID${
      namesake === undefined ? "" : `, "${id.name}" is ${namesake.uuid}`
    }`,
  );
}

/** A volume as the controller sees it; `id` is how it is called there, with its name of today. */
function toVolume(
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
    condition: arrayConditionOf(array),
  };
}

/**
 * The UUID of the volume that a request makes, a version 8 one (RFC 9562): the same for each repetition, and another one
 * for the same name on another array. A volume that was deleted and is asked for again has it again, which orchestrators
 * avoid by giving a name once.
 */
function uuidFor(name: string, { endpoint, array }: PoseidonParameters): string {
  const text = JSON.stringify(["volume", formatEndpoint(endpoint), array, name]);
  const bytes = createHash("sha256").update(text).digest().subarray(0, 16);
  bytes[6] = ((bytes[6] ?? 0) & 0x0f) | 0x80;
  bytes[8] = ((bytes[8] ?? 0) & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** POS 0.12 was the first to take a UUID for a new volume (docs/reference/poseidonos-api.md 6.4). */
function takesUuids(version: string): boolean {
  const match = /^v?0\.(\d+)/.exec(version);
  return match === null || Number(match[1]) >= 12;
}

async function createVolume(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  wanted: VolumeRequest,
  parameters: PoseidonParameters,
  sizeBytes: bigint,
): Promise<Volume> {
  const uuid = uuidFor(wanted.name, parameters);
  // Kubernetes' names are fine. Others may hold what PoseidonOS does not allow.
  const name = isPoseidonVolumeName(wanted.name) ? wanted.name : `csi-${uuid}`;
  /** Whether the volume was not there when this call began. */
  let isNew = false;
  const look = () => readVolumes(ctx, dagent, action, parameters.array);
  const { array, volume } = await converge(
    ctx,
    action,
    dagent,
    look,
    ({ array, volumes }): Next<{ readonly array: PoseidonArray; readonly volume: PoseidonVolume }> => {
      const volume = volumes.find((volume) => volume.uuid === uuid) ?? volumes.find((volume) => volume.name === name);
      if (volume !== undefined) return { done: { array, volume } };
      isNew = true;
      assertSpaceLeft(action, dagent, array, volumes.length, sizeBytes);
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
    },
  );
  const differences = [
    ...(volume.uuid === uuid || !takesUuids(dagent.version)
      ? []
      : [`its UUID is ${volume.uuid} instead of ${uuid}, so another request or another program made it`]),
    ...(volume.total < sizeBytes ? [`size is ${volume.total} bytes, asked are ${sizeBytes} bytes`] : []),
    ...(wanted.limitBytes !== 0n && volume.total > wanted.limitBytes
      ? [`size is ${volume.total} bytes, asked are at most ${wanted.limitBytes} bytes`]
      : []),
  ];
  const otherLimits = qosDifferences(parameters, volume);
  if (isNew && differences.length === 0 && otherLimits.length > 0) {
    // Nobody can have it yet, and left there it would block the name.
    await deleteVolume(ctx, dagent, action, { ...parameters, name, uuid: volume.uuid });
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: PoseidonOS at ${dagent.address} did not take its limits (${
        otherLimits.join("; ")
      }), QoS has to ` +
        `be switched on there first (fe_qos.enable in its pos.conf)`,
    );
  }
  if (differences.length + otherLimits.length > 0) {
    throw new StatusError(
      "ALREADY_EXISTS",
      `Cannot ${action}: volume ${volume.uuid} on array "${parameters.array}" has that name and differs: ${
        [...differences, ...otherLimits].join("; ")
      }`,
    );
  }
  return { ...toVolume(parameters, array, volume, []), context: parameters.context };
}

/** Throws RESOURCE_EXHAUSTED for what the array would refuse. */
function assertSpaceLeft(
  action: string,
  dagent: Dagent,
  array: PoseidonArray,
  volumes: number,
  sizeBytes: bigint,
): void {
  const where = `array "${array.name}" of PoseidonOS at ${dagent.address}`;
  if (volumes >= mostVolumes) {
    throw new StatusError(
      "RESOURCE_EXHAUSTED",
      `Cannot ${action}: ${where} has ${volumes} volumes, ${mostVolumes} are allowed; delete one, or use another array`,
    );
  }
  const freeBytes = array.capacity - array.used;
  if (sizeBytes <= freeBytes) return;
  throw new StatusError(
    "RESOURCE_EXHAUSTED",
    `Cannot ${action}: ${where} has ${freeBytes < 0n ? 0n : freeBytes} bytes left, ${sizeBytes} are needed`,
  );
}

async function deleteVolume(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  id: PoseidonVolumeId,
): Promise<void> {
  await converge(
    ctx,
    action,
    dagent,
    async () => ({
      volume: await lookUp(ctx, dagent, action, id),
      subsystems: await readSubsystems(ctx, dagent, action),
    }),
    ({ volume, subsystems }): Next<void> => {
      if (volume === undefined) return { done: undefined };
      const holder = heldBy(subsystems, volume, id.array);
      if (holder !== undefined) {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot ${action}: it is exported, ${holder}; detach it there first`,
        );
      }
      const path = `/volumes/${encodeURIComponent(volume.name)}`;
      const param = { array: id.array };
      // Exported by its own word, and nowhere in fact: nobody has it, and PoseidonOS would refuse to delete it.
      return volume.status === "Mounted"
        ? { step: "un-export the volume", change: { method: "DELETE", path: `${path}/mount`, param } }
        : { step: "delete the volume", change: { method: "DELETE", path, param } };
    },
  );
  // What was made for a node and never used; the volume's detachment takes it away as a rule.
  await unexportVolume(ctx, action, dagent, id, undefined, () => Promise.resolve(undefined));
}

function setQos(array: string, { name }: PoseidonVolume, { maxiops, maxbw }: Qos): Next<never> {
  // -1 keeps what is there, a field left out would be "none" (docs/reference/poseidonos-api.md 6.15).
  const keep = (value: bigint | undefined) => value === undefined ? -1 : Number(value);
  return {
    step: "set the limits",
    change: {
      method: "POST",
      path: "/qos",
      param: {
        array,
        vol: [{ volumeName: name }],
        maxiops: keep(maxiops),
        maxbw: keep(maxbw),
        miniops: -1,
        minbw: -1,
      },
    },
    explain: (refusal) =>
      Promise.resolve(
        means(refusal, "QoS switched off")
          ? new StatusError(
            "FAILED_PRECONDITION",
            `${refusal.message}; fe_qos.enable in its pos.conf has to be switched on first`,
            { cause: refusal },
          )
          : undefined,
      ),
  };
}

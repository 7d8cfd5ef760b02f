/**
 * Arrays, volumes and subsystems of a PoseidonOS, as it shows them (facts: docs/reference/poseidonos-api.md sections 6
 * and 11).
 *
 * Two answers are misleading. An array that is not mounted answers with an empty list of volumes, or "no such volume";
 * and lists of volumes do not say where a volume is exported. So volumes are looked up in the list of an array that was
 * mounted before and after, and exports in the list of subsystems.
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { isUuid } from "../../uuid.ts";
import { isPoseidonVolumeName } from "../../volume_id.ts";
import type { AbnormalCondition } from "../backend.ts";
import type { Dagent } from "./dagent.ts";
import { means } from "./dagent_error.ts";

/** A number of up to 64 bits: a decimal text, a JSON number in older versions, absent when it is 0. */
const wide = z.union([z.string().regex(/^\d{1,20}$/), z.int().min(0)]).default(0).transform(BigInt);

const arraySchema = z.object({
  state: z.string().default(""),
  situation: z.string().default(""),
  capacity: wide,
  used: wide,
});
/** An array of volumes. */
export type PoseidonArray = z.infer<typeof arraySchema> & { readonly name: string };

const volumeSchema = z.object({
  name: z.string(),
  /** POS 0.10 shows none. */
  uuid: z.string().default("").transform((uuid) => uuid.toLowerCase()),
  index: z.number().default(0),
  total: wide,
  status: z.string().default(""),
  maxiops: wide,
  maxbw: wide,
});
/** A volume; QoS limits in thousands of I/O per second and in MiB/s, 0 is unlimited. */
export type PoseidonVolume = z.infer<typeof volumeSchema>;

const volumesSchema = z.object({ volumes: z.array(volumeSchema).default([]) }).default({ volumes: [] });

const subsystemsSchema = z.object({
  subsystemlist: z.array(z.object({
    nqn: z.string(),
    listenAddresses: z.array(z.object({
      transportType: z.string().default(""),
      targetAddress: z.string().default(""),
      transportServiceId: z.string().default(""),
    })).default([]),
    namespaces: z.array(z.object({
      nsid: z.number().default(0),
      bdevName: z.string().default(""),
      /** Its name before POS 0.12. */
      bdev_name: z.string().default(""),
      uuid: z.string().default("").transform((uuid) => uuid.toLowerCase()),
    })).default([]),
  })).default([]),
}).default({ subsystemlist: [] });
/** A subsystem with its namespaces and the addresses where it listens. */
export type PoseidonSubsystem = z.infer<typeof subsystemsSchema>["subsystemlist"][number];
/** A namespace of a subsystem. */
export type PoseidonNamespace = PoseidonSubsystem["namespaces"][number];

const transportsSchema = z.object({
  transportlist: z.array(z.object({ type: z.string().default("") })).default([]),
}).default({ transportlist: [] });

/** The most volumes that an array can have (docs/reference/poseidonos-api.md 11.1). */
export const mostVolumes = 256;
/** The unit in which PoseidonOS allocates volumes. */
export const mib = 1n << 20n;

/** The array, whatever its state. Throws FAILED_PRECONDITION when there is none of that name. */
export async function readArray(
  ctx: RequestContext,
  dagent: Dagent,
  name: string,
): Promise<PoseidonArray> {
  try {
    return { name, ...await dagent.read(ctx, `/array/${encodeURIComponent(name)}`, arraySchema) };
  } catch (error) {
    if (!means(error, "no such array")) throw error;
    throw ctx.error(
      "FAILED_PRECONDITION",
      `PoseidonOS at ${dagent.address} has no array "${name}"`,
      { cause: error },
    );
  }
}

/** Whether volumes can be seen and changed (docs/reference/poseidonos-api.md 6.3). */
function isMounted({ state }: PoseidonArray): boolean {
  return state === "NORMAL" || state === "BUSY";
}

/** Throws UNAVAILABLE unless the array is mounted: otherwise nothing that it says about volumes is reliable. */
export function assertMounted(ctx: RequestContext, dagent: Dagent, array: PoseidonArray): void {
  if (isMounted(array)) return;
  throw ctx.error(
    "UNAVAILABLE",
    `array "${array.name}" of PoseidonOS at ${dagent.address} is not mounted (${
      array.state === "" ? "no state" : array.state
    }${array.situation === "" ? "" : `, ${array.situation}`}), it has to be mounted first`,
  );
}

/**
 * The volumes of an array that is mounted before the answer and after it. Throws UNAVAILABLE otherwise,
 * FAILED_PRECONDITION for an absent array or a version that shows no UUIDs, INTERNAL for an answer that is not
 * understood.
 */
export async function readVolumes(
  ctx: RequestContext,
  dagent: Dagent,
  arrayName: string,
): Promise<{ readonly array: PoseidonArray; readonly volumes: readonly PoseidonVolume[] }> {
  assertMounted(ctx, dagent, await readArray(ctx, dagent, arrayName));
  const { volumes } = await dagent.read(ctx, `/volumelist/${encodeURIComponent(arrayName)}`, volumesSchema);
  const array = await readArray(ctx, dagent, arrayName);
  assertMounted(ctx, dagent, array);
  const nameless = volumes.find(({ uuid }) => uuid === "");
  if (nameless !== undefined) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `PoseidonOS ${dagent.version} at ${dagent.address} shows no UUID of volume "${nameless.name}", ` +
        `version 0.11 or later is needed`,
    );
  }
  assertVolumesReadable(ctx, dagent, arrayName, volumes);
  return { array, volumes };
}

/** Throws INTERNAL for volumes that share a UUID, or whose names or UUIDs a volume ID cannot have. */
function assertVolumesReadable(
  ctx: RequestContext,
  dagent: Dagent,
  arrayName: string,
  volumes: readonly PoseidonVolume[],
): void {
  const listError = (problem: string) =>
    ctx.error(
      "INTERNAL",
      `PoseidonOS at ${dagent.address} lists on array "${arrayName}" ${problem}`,
    );
  const seen = new Map<string, string>();
  for (const { name, uuid } of volumes) {
    if (!isPoseidonVolumeName(name)) {
      throw listError(`volume ${JSON.stringify(name)}, which is not the name of a volume`);
    }
    if (!isUuid(uuid)) throw listError(`volume "${name}" with ${JSON.stringify(uuid)}, which is not a UUID`);
    const other = seen.get(uuid);
    if (other !== undefined) throw listError(`volumes "${other}" and "${name}" with the same UUID ${uuid}`);
    seen.set(uuid, name);
  }
}

/** All subsystems. */
export async function readSubsystems(
  ctx: RequestContext,
  dagent: Dagent,
): Promise<readonly PoseidonSubsystem[]> {
  return (await dagent.read(ctx, "/subsystem", subsystemsSchema)).subsystemlist;
}

/** Whether PoseidonOS has a transport for NVMe over TCP. */
export async function hasTcpTransport(ctx: RequestContext, dagent: Dagent): Promise<boolean> {
  const { transportlist } = await dagent.read(ctx, "/transports", transportsSchema);
  return transportlist.some(({ type }) => type.toUpperCase() === "TCP");
}

/** The namespace of a volume in a subsystem. A version that shows no UUIDs there shows the block device behind it. */
export function namespaceOf(
  subsystem: PoseidonSubsystem,
  { uuid, index }: Pick<PoseidonVolume, "uuid" | "index">,
  arrayName: string,
): PoseidonNamespace | undefined {
  return subsystem.namespaces.find((namespace) =>
    namespace.uuid === ""
      ? (namespace.bdevName || namespace.bdev_name) === `bdev_${index}_${arrayName}`
      : namespace.uuid === uuid
  );
}

/** What is wrong with the volumes of an array; undefined: nothing (states: docs/reference/poseidonos-api.md 6.3). */
export function arrayCondition({ name, state, situation }: PoseidonArray): AbnormalCondition | undefined {
  const words = `PoseidonOS: array "${name}" ${state}, ${situation}`;
  switch (situation) {
    case "DEGRADED":
      return {
        usable: true,
        reason: "ArrayDegraded",
        message: `a device is missing: reads and writes go on (${words})`,
      };
    case "REBUILDING":
      return { usable: true, reason: "ArrayRebuilding", message: `the array is being rebuilt (${words})` };
    case "FAULT":
      return { usable: false, reason: "ArrayFault", message: `too many devices are missing (${words})` };
    default:
      if (state === "NORMAL" || state === "BUSY") return undefined;
      return { usable: false, reason: "ArrayNotMounted", message: `the array is not mounted (${words})` };
  }
}

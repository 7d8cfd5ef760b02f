/**
 * What there is on a PoseidonOS, as it shows it: arrays, volumes, subsystems (facts: docs/reference/poseidonos-api.md sections 6 and 11).
 *
 * Two things must not be believed. An empty list of volumes, or "no such volume", is also what an array answers that is
 * not mounted; and a volume's own word of where it is exported is missing from lists. So volumes are looked up in the list
 * of an array that was mounted before and after, and exports in the list of subsystems.
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { isPoseidonVolumeName, isUuid } from "../../volume_id.ts";
import { type Dagent, means } from "./dagent.ts";
import type { AbnormalCondition } from "../backend.ts";

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
  /** POS 0.10 tells none. */
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
/** A subsystem with what it shows to hosts, and where. */
export type PoseidonSubsystem = z.infer<typeof subsystemsSchema>["subsystemlist"][number];
export type PoseidonNamespace = PoseidonSubsystem["namespaces"][number];

const transportsSchema = z.object({
  transportlist: z.array(z.object({ type: z.string().default("") })).default([]),
}).default({ transportlist: [] });

/** The most volumes that an array has (docs/reference/poseidonos-api.md 11.1). */
export const mostVolumes = 256;
export const mib = 1n << 20n;

/** The array, whatever its state. Throws FAILED_PRECONDITION when there is none of that name. */
export async function readArray(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  name: string,
): Promise<PoseidonArray> {
  try {
    return { name, ...await dagent.read(ctx, action, `/array/${encodeURIComponent(name)}`, arraySchema) };
  } catch (error) {
    if (!means(error, "no such array")) throw error;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: PoseidonOS at ${dagent.address} has no array "${name}"`,
      { cause: error },
    );
  }
}

/** Whether volumes can be seen and changed (docs/reference/poseidonos-api.md 6.3). */
function isMounted({ state }: PoseidonArray): boolean {
  return state === "NORMAL" || state === "BUSY";
}

/** Throws UNAVAILABLE unless the array is mounted: nothing that it says of volumes is true otherwise. */
export function requireMounted(dagent: Dagent, action: string, array: PoseidonArray): void {
  if (isMounted(array)) return;
  throw new StatusError(
    "UNAVAILABLE",
    `Cannot ${action}: array "${array.name}" of PoseidonOS at ${dagent.address} is not mounted (${
      array.state === "" ? "no state" : array.state
    }${array.situation === "" ? "" : `, ${array.situation}`}), it has to be mounted first`,
  );
}

/** The volumes of an array that is mounted, before the answer and after it. Throws UNAVAILABLE otherwise. */
export async function readVolumes(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
  arrayName: string,
): Promise<{ readonly array: PoseidonArray; readonly volumes: readonly PoseidonVolume[] }> {
  requireMounted(dagent, action, await readArray(ctx, dagent, action, arrayName));
  const { volumes } = await dagent.read(ctx, action, `/volumelist/${encodeURIComponent(arrayName)}`, volumesSchema);
  const array = await readArray(ctx, dagent, action, arrayName);
  requireMounted(dagent, action, array);
  const nameless = volumes.find(({ uuid }) => uuid === "");
  if (nameless !== undefined) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: PoseidonOS ${dagent.version} at ${dagent.address} tells no UUID of volume "${nameless.name}", ` +
        `version 0.11 or later is needed`,
    );
  }
  assertVolumesReadable(dagent, action, arrayName, volumes);
  return { array, volumes };
}

/** Throws INTERNAL for volumes that cannot be told apart, or whose names and UUIDs would not be those of an ID. */
function assertVolumesReadable(
  dagent: Dagent,
  action: string,
  arrayName: string,
  volumes: readonly PoseidonVolume[],
): void {
  const refuse = (problem: string) =>
    new StatusError(
      "INTERNAL",
      `Cannot ${action}: PoseidonOS at ${dagent.address} lists on array "${arrayName}" ${problem}`,
    );
  const seen = new Map<string, string>();
  for (const { name, uuid } of volumes) {
    if (!isPoseidonVolumeName(name)) throw refuse(`volume ${JSON.stringify(name)}, which is not the name of a volume`);
    if (!isUuid(uuid)) throw refuse(`volume "${name}" with ${JSON.stringify(uuid)}, which is not a UUID`);
    const other = seen.get(uuid);
    if (other !== undefined) throw refuse(`volumes "${other}" and "${name}" with the same UUID ${uuid}`);
    seen.set(uuid, name);
  }
}

export async function readSubsystems(
  ctx: RequestContext,
  dagent: Dagent,
  action: string,
): Promise<readonly PoseidonSubsystem[]> {
  return (await dagent.read(ctx, action, "/subsystem", subsystemsSchema)).subsystemlist;
}

/** Whether the target speaks NVMe over TCP. */
export async function hasTcpTransport(ctx: RequestContext, dagent: Dagent, action: string): Promise<boolean> {
  const { transportlist } = await dagent.read(ctx, action, "/transports", transportsSchema);
  return transportlist.some(({ type }) => type.toUpperCase() === "TCP");
}

/** The namespace of a volume in a subsystem. A version that tells no UUIDs there tells the block device it is made of. */
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

/** What is wrong with the volumes of an array; undefined when they are well (states: docs/reference/poseidonos-api.md 6.3). */
export function arrayConditionOf({ name, state, situation }: PoseidonArray): AbnormalCondition | undefined {
  const told = `PoseidonOS: array "${name}" ${state}, ${situation}`;
  switch (situation) {
    case "DEGRADED":
      return {
        usable: true,
        reason: "ArrayDegraded",
        message: `a device is missing: reads and writes go on (${told})`,
      };
    case "REBUILDING":
      return { usable: true, reason: "ArrayRebuilding", message: `the array is being rebuilt (${told})` };
    case "FAULT":
      return { usable: false, reason: "ArrayFault", message: `too many devices are missing (${told})` };
    default:
      if (state === "NORMAL" || state === "BUSY") return undefined;
      return { usable: false, reason: "ArrayNotMounted", message: `the array is not mounted (${told})` };
  }
}

/**
 * What a StorageClass for PoseidonOS may say (docs/reference/poseidonos-api.md section 2): the parameters of the vendor's driver under its
 * names, so that its users can move over, and limits of speed under PoseidonOS' own names and in its own units.
 */
import * as z from "zod";
import { StatusError } from "../../error.ts";
import { type Endpoint, isArrayName, parseEndpoints } from "../../volume_id.ts";
import { inBandAuthKey, parseAddress, type TransportAddress } from "../../namespace.ts";
import { unknownKeys } from "../../suggestion.ts";
import type { CapacityRange } from "../backend.ts";
import { mib, type PoseidonVolume } from "./inventory.ts";

type Texts = Readonly<Record<string, string>>;

const port = z.string().regex(/^[1-9]\d{0,4}$/, "is not a port from 1 to 65535")
  .refine((text) => Number(text) <= 65535, "is not a port from 1 to 65535");

const exportKeys = {
  "transportType": z.string().toLowerCase().refine(
    (type) => type === "tcp",
    "is not tcp: this driver speaks NVMe over TCP only",
  ).default("tcp"),
  "targetAddress": z.string({ error: "is missing, give the IPv4 address that PoseidonOS serves volumes at" })
    .transform((list, check) => {
      const addresses = list.split(",").map((text) => parseAddress(`${text}:1`)?.traddr);
      if (addresses.every((address) => address !== undefined)) return addresses;
      check.addIssue(
        list.includes(":")
          ? "is an IPv6 address: PoseidonOS listens on IPv4 addresses only"
          : "is not an IPv4 address, or several with commas",
      );
      return z.NEVER;
    }),
  "transportServiceId": port.default("1158"),
};

// JSON numbers pass through a double on their way to PoseidonOS.
const mostKiops = BigInt(Number.MAX_SAFE_INTEGER);
const mostMibps = 17_592_186_044_415n;
const limit = (most: bigint, unit: string) => {
  const problem = `is not 0 or a number of ${unit} from 10 to ${most}`;
  return z.string().regex(/^\d{1,17}$/, problem).transform(BigInt)
    .refine((value) => value === 0n || (value >= 10n && value <= most), problem);
};
const qosKeys = {
  "maxiops": limit(mostKiops, "thousands of I/O per second").optional(),
  "maxbw": limit(mostMibps, "MiB per second").optional(),
};

const placeKeys = {
  "provisionerIP": z.string({ error: "is missing, give the address of DAgent" }),
  "provisionerPort": port.default("3000"),
  "arrayName": z.string({ error: "is missing, give the name of an array" }).refine(
    isArrayName,
    'is not the name of an array (2 to 63 letters, digits, "_", "-", blanks)',
  ),
};

const parametersSchema = z.strictObject({
  ...placeKeys,
  ...exportKeys,
  ...qosKeys,
  // For the provisioner, which makes a capability of it; it leaves it among the parameters.
  "fsType": z.enum(["ext4", "xfs", "btrfs"], { error: "is not ext4, xfs or btrfs" }).optional(),
});
const mutableSchema = z.strictObject(qosKeys);
const contextSchema = z.object({
  ...exportKeys,
  // Written by a person who expects something of it.
  [inBandAuthKey]: z.literal("none", { error: "cannot be had, PoseidonOS has no in-band authentication" }).optional(),
});

/** Limits of speed; undefined: not given, 0: none. */
export interface Qos {
  /** Thousands of I/O per second. */
  readonly maxiops: bigint | undefined;
  /** MiB per second. */
  readonly maxbw: bigint | undefined;
}

export interface PoseidonParameters extends Qos {
  readonly endpoint: Endpoint;
  readonly array: string;
  /** What the volume needs to be exported, for its context. */
  readonly context: Texts;
}

/** Reads StorageClass parameters; throws INVALID_ARGUMENT that names each bad one. */
export function parseParameters(action: string, parameters: Texts): PoseidonParameters {
  const data = parse(
    action,
    "StorageClass parameter",
    parametersSchema,
    // The driver takes mkfs-options out before, for the node.
    [...Object.keys(parametersSchema.shape), "mkfs-options"],
    parameters,
  );
  const host = data.provisionerIP;
  const endpoints = parseEndpoints(`${host.includes(":") ? `[${host}]` : host}:${data.provisionerPort}`);
  const endpoint = typeof endpoints === "string" ? undefined : endpoints[0];
  if (endpoint === undefined || host.includes(",")) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot ${action}: StorageClass parameter "provisionerIP" "${host}" is not an address`,
    );
  }
  return {
    endpoint,
    array: data.arrayName,
    maxiops: data.maxiops,
    maxbw: data.maxbw,
    context: {
      transportType: data.transportType,
      targetAddress: data.targetAddress.join(","),
      transportServiceId: data.transportServiceId,
    },
  };
}

/** GetCapacity needs no more than where the array is. */
export function parseCapacityParameters(action: string, parameters: Texts): PoseidonParameters {
  return parseParameters(action, { targetAddress: "0.0.0.0", ...parameters });
}

/** Reads the parameters of a VolumeAttributesClass; throws INVALID_ARGUMENT. */
export function parseMutable(action: string, mutable: Texts): Qos {
  const { maxiops, maxbw } = parse(
    action,
    "mutable parameter",
    mutableSchema,
    Object.keys(mutableSchema.shape),
    mutable,
  );
  return { maxiops, maxbw };
}

/** Where a volume is to be exported, by its context; throws FAILED_PRECONDITION when that does not say. */
export function parseContext(action: string, context: Texts): readonly TransportAddress[] {
  try {
    const data = parse(action, "volume attribute", contextSchema, [], context);
    return data.targetAddress.map((traddr) => ({ traddr, trsvcid: data.transportServiceId }));
  } catch (error) {
    if (!(error instanceof StatusError)) throw error;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `${error.message}; the PersistentVolume needs the attributes targetAddress and transportServiceId`,
      { cause: error },
    );
  }
}

function parse<T>(action: string, what: string, schema: z.ZodType<T>, known: readonly string[], given: Texts): T {
  const parsed = schema.safeParse(given);
  if (parsed.success) return parsed.data;
  const problems = parsed.error.issues.map((issue) => {
    if (issue.code === "unrecognized_keys") {
      const why = issue.keys.includes(inBandAuthKey) ? ", PoseidonOS has no in-band authentication" : "";
      return `${unknownKeys(issue.keys, known)}${why}`;
    }
    const key = String(issue.path[0]);
    const value = given[key];
    return `"${key}"${value === undefined ? "" : ` "${value}"`} ${issue.message}`;
  });
  throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${what} ${problems.join("; ")}`);
}

/** The size of a new volume: whole MiB, at least one (docs/reference/poseidonos-api.md 11.1). */
export function volumeSize(action: string, { requiredBytes, limitBytes }: CapacityRange): bigint {
  if (requiredBytes < 0n || limitBytes < 0n) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: capacity_range has a negative number of bytes`);
  }
  if (limitBytes !== 0n && limitBytes < requiredBytes) {
    throw new StatusError(
      "INVALID_ARGUMENT",
      `Cannot ${action}: limit_bytes ${limitBytes} is below required_bytes ${requiredBytes}`,
    );
  }
  const wanted = requiredBytes === 0n ? mib : requiredBytes;
  const rounded = (wanted + mib - 1n) / mib * mib;
  if (rounded > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: ${requiredBytes} bytes are more than PoseidonOS can be told`,
    );
  }
  if (limitBytes !== 0n && rounded > limitBytes) {
    throw new StatusError(
      "OUT_OF_RANGE",
      `Cannot ${action}: PoseidonOS allocates whole MiB, and ${rounded} bytes are above limit_bytes ${limitBytes}`,
    );
  }
  return rounded;
}

/** How the limits of a volume differ from those wanted; limits that are not given do not differ. */
export function qosDifferences(wanted: Qos, volume: PoseidonVolume): readonly string[] {
  return (["maxiops", "maxbw"] as const).flatMap((key) => {
    const asked = wanted[key];
    return asked === undefined || asked === volume[key] ? [] : [`${key} is ${volume[key]}, asked is ${asked}`];
  });
}

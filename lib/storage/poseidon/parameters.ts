/**
 * The StorageClass parameters of PoseidonOS (docs/reference/poseidonos-api.md section 2): those of the vendor's driver,
 * under its names, so that its users can move to this driver, and limits of speed under PoseidonOS' own names and in
 * its own units.
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import { inBandAuthKey, parseAddress, type TransportAddress } from "../../namespace.ts";
import { unknownKeys } from "../../suggestion.ts";
import { type Endpoint, isArrayName, parseEndpoints } from "../../volume_id.ts";
import type { CapacityRange } from "../backend.ts";
import { assertCapacityRange, roundUp } from "../capacity_range.ts";
import { mib, type PoseidonVolume } from "./inventory.ts";

type TextMap = Readonly<Record<string, string>>;

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
  // For the provisioner, which turns it into a capability and does not remove it from the parameters.
  "fsType": z.enum(["ext4", "xfs", "btrfs"], { error: "is not ext4, xfs or btrfs" }).optional(),
});
const mutableSchema = z.strictObject(qosKeys);
const contextSchema = z.object({
  ...exportKeys,
  // A person who has written it expects authentication.
  [inBandAuthKey]: z.literal("none", { error: "cannot be had, PoseidonOS has no in-band authentication" }).optional(),
});

/** Limits of speed; undefined: not given, 0: none. */
export interface Qos {
  /** Thousands of I/O per second. */
  readonly maxiops: bigint | undefined;
  /** MiB per second. */
  readonly maxbw: bigint | undefined;
}

/** StorageClass parameters, parsed. */
export interface PoseidonParameters extends Qos {
  readonly endpoint: Endpoint;
  readonly array: string;
  /** The context of the volume: what its export needs. */
  readonly context: TextMap;
}

/** Reads StorageClass parameters; throws INVALID_ARGUMENT that names each bad one. */
export function parseParameters(ctx: RequestContext, parameters: TextMap): PoseidonParameters {
  // The driver has removed mkfs-options, which is for the node.
  const known = [...Object.keys(parametersSchema.shape), "mkfs-options"];
  const data = parse(ctx, { what: "StorageClass parameter", schema: parametersSchema, known }, parameters);
  const host = data.provisionerIP;
  const endpoints = parseEndpoints(`${host.includes(":") ? `[${host}]` : host}:${data.provisionerPort}`);
  const endpoint = typeof endpoints === "string" ? undefined : endpoints[0];
  if (endpoint === undefined || host.includes(",")) {
    throw ctx.error(
      "INVALID_ARGUMENT",
      `StorageClass parameter "provisionerIP" "${host}" is not an address`,
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

/** Reads the parameters of GetCapacity, which needs to know only the array; throws INVALID_ARGUMENT. */
export function parseCapacityParameters(ctx: RequestContext, parameters: TextMap): PoseidonParameters {
  return parseParameters(ctx, { targetAddress: "0.0.0.0", ...parameters });
}

/** Reads the parameters of a VolumeAttributesClass; throws INVALID_ARGUMENT. */
export function parseMutable(ctx: RequestContext, mutable: TextMap): Qos {
  const { maxiops, maxbw } = parse(
    ctx,
    { what: "mutable parameter", schema: mutableSchema, known: Object.keys(mutableSchema.shape) },
    mutable,
  );
  return { maxiops, maxbw };
}

/** Where a volume is to be exported, by its context; throws FAILED_PRECONDITION when the context does not say. */
export function parseContext(ctx: RequestContext, context: TextMap): readonly TransportAddress[] {
  try {
    const data = parse(ctx, { what: "volume attribute", schema: contextSchema, known: [] }, context);
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

/** What is parsed: what errors call one entry, its schema, and the keys to suggest. */
interface ParsedKind<T> {
  readonly what: string;
  readonly schema: z.ZodType<T>;
  readonly known: readonly string[];
}

function parse<T>(ctx: RequestContext, { what, schema, known }: ParsedKind<T>, given: TextMap): T {
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
  throw ctx.error("INVALID_ARGUMENT", `${what} ${problems.join("; ")}`);
}

/**
 * The size of a new volume: whole MiB, at least one (docs/reference/poseidonos-api.md 11.1). Throws OUT_OF_RANGE,
 * INVALID_ARGUMENT.
 */
export function volumeSize(ctx: RequestContext, range: CapacityRange): bigint {
  assertCapacityRange(ctx, range);
  const { requiredBytes, limitBytes } = range;
  const rounded = roundUp(requiredBytes === 0n ? mib : requiredBytes, mib);
  if (rounded > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `${requiredBytes} bytes are too many for PoseidonOS`,
    );
  }
  if (limitBytes !== 0n && rounded > limitBytes) {
    throw ctx.error(
      "OUT_OF_RANGE",
      `PoseidonOS allocates whole MiB, and ${rounded} bytes are above limit_bytes ${limitBytes}`,
    );
  }
  return rounded;
}

/** How the limits of a volume differ from those requested; limits that are not given do not differ. */
export function qosDifferences(limits: Qos, volume: PoseidonVolume): readonly string[] {
  return (["maxiops", "maxbw"] as const).flatMap((key) => {
    const asked = limits[key];
    return asked === undefined || asked === volume[key] ? [] : [`${key} is ${volume[key]}, asked is ${asked}`];
  });
}

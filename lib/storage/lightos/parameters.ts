/** The StorageClass parameters of LightOS volumes (facts: docs/reference/lightos-api.md 3.1). */
import * as z from "zod";
import { type AuthKind, authKinds } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { inBandAuthKey } from "../../namespace.ts";
import { unknownKeys } from "../../suggestion.ts";
import {
  type Endpoint,
  isProjectName,
  longestId,
  longestIdBytes,
  parseEndpoints,
  type Scheme,
  schemes,
  type VolumeId,
} from "../../volume_id.ts";
import { qosParameters, type QosPolicy, qosPolicyOf } from "./modification.ts";
import { parseTrustOptions, type TrustOptions, trustSchema } from "./trust.ts";

/** StorageClass parameters, parsed. */
export interface LightosParameters {
  readonly endpoints: readonly Endpoint[];
  readonly scheme: Scheme;
  readonly replicaCount: number;
  readonly compression: boolean;
  readonly project: string | undefined;
  readonly qosPolicy: QosPolicy | undefined;
  readonly hostEncryption: VolumeId["hostEncryption"];
  readonly inBandAuth: AuthKind | undefined;
  readonly trust: TrustOptions;
}

const onOff = (name: string) =>
  z.enum(["enabled", "disabled", ""], { error: `is not "enabled" or "disabled"` }).default("").transform((text) =>
    text === "enabled"
  ).describe(name);

/** How connections are authenticated; none: not at all. */
const inBandAuth = z.enum(["none", ...authKinds, ""], { error: `is not one of none, ${authKinds.join(", ")}` })
  .default("none").transform((kind) => kind === "none" || kind === "" ? undefined : kind);

/** StorageClass parameters as texts (docs/reference/lightos-api.md 3.1). */
export const parametersSchema = z.strictObject({
  "mgmt-endpoint": z.string({ error: "is missing, give host:port of one or more management endpoints" })
    .transform((list, check) => {
      const endpoints = parseEndpoints(list);
      if (typeof endpoints !== "string") return endpoints;
      check.addIssue(endpoints);
      return z.NEVER;
    }),
  "mgmt-scheme": z.enum([...schemes, ""], { error: `is not one of ${schemes.join(", ")}` }).default("grpcs")
    .transform((scheme): Scheme => scheme === "" ? "grpcs" : scheme),
  "replica-count": z.string({ error: "is missing, give 1, 2 or 3" })
    .regex(/^[1-9]\d{0,2}$/, "is not a number from 1 to 128").transform(Number)
    .refine((count) => count <= 128, "is not a number from 1 to 128"),
  "compression": onOff("compression"),
  "project-name": z.string().refine(isProjectName, 'is not a project name (a-z, 0-9, ".", "-", 1 to 63 characters)')
    .optional(),
  "qos-policy-name": z.string().transform((name) => name === "" ? undefined : name).optional(),
  "qos-policy-uuid": qosParameters["qos-policy-uuid"].optional(),
  "host-encryption": onOff("host-encryption"),
  [inBandAuthKey]: inBandAuth,
  // The vendor's documents name these two, although its driver never read them; classes that have them keep working.
  "encryption-secret-name": z.string().optional(),
  "encryption-secret-namespace": z.string().optional(),
  ...trustSchema,
});

/** Reads StorageClass parameters; throws INVALID_ARGUMENT that lists each bad one with what is wrong. */
export function parseParameters(ctx: RequestContext, parameters: Readonly<Record<string, string>>): LightosParameters {
  const parsed = parametersSchema.safeParse(parameters);
  if (!parsed.success) {
    // The driver has removed mkfs-options, which is for the node.
    const known = [...Object.keys(parametersSchema.shape), "mkfs-options"];
    const problems = problemsOf(parsed.error, parameters, known);
    throw ctx.error("INVALID_ARGUMENT", `StorageClass parameter ${problems.join("; ")}`);
  }
  const { data } = parsed;
  const isEncrypted = data["host-encryption"];
  if (isEncrypted && data.compression) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      'StorageClass parameters "host-encryption" and "compression" are both enabled, but what is ' +
        `encrypted on the host cannot be compressed by the cluster`,
    );
  }
  const place = {
    endpoints: data["mgmt-endpoint"],
    scheme: data["mgmt-scheme"],
    project: data["project-name"],
    hostEncryption: isEncrypted ? "luks2" as const : undefined,
  };
  assertIdFits(ctx, place);
  return {
    ...place,
    replicaCount: data["replica-count"],
    compression: data.compression,
    qosPolicy: qosPolicyOf(ctx, data),
    inBandAuth: data[inBandAuthKey],
    trust: parseTrustOptions(data),
  };
}

/**
 * Throws INVALID_ARGUMENT for endpoints that would make a volume ID too long for other calls: the volume could not be
 * deleted.
 */
function assertIdFits(ctx: RequestContext, place: Omit<VolumeId, "uuid">): void {
  const bytes = longestIdBytes(place);
  if (bytes <= longestId) return;
  throw ctx.error(
    "INVALID_ARGUMENT",
    `StorageClass parameter "mgmt-endpoint" has ${place.endpoints.length} endpoints, with which a volume ID has ` +
      `up to ${bytes} bytes and ${longestId} are allowed; name fewer, the cluster names the others`,
  );
}

/**
 * How connections to a volume are authenticated, by its context; that of an older volume, or one that a person wrote,
 * may not say. Throws INVALID_ARGUMENT.
 */
export function parseAuthKind(ctx: RequestContext, context: Readonly<Record<string, string>>): AuthKind | undefined {
  const parsed = inBandAuth.safeParse(context[inBandAuthKey]);
  if (parsed.success) return parsed.data;
  const problems = parsed.error.issues.map(({ message }) => message).join("; ");
  throw ctx.error(
    "INVALID_ARGUMENT",
    `volume attribute "${inBandAuthKey}" "${context[inBandAuthKey]}" ${problems}`,
  );
}

/** What is wrong with a map of texts, key by key. */
export function problemsOf(
  error: z.ZodError,
  given: Readonly<Record<string, string>>,
  known: readonly string[],
): readonly string[] {
  return error.issues.map((issue) => {
    if (issue.code === "unrecognized_keys") {
      return unknownKeys(issue.keys, known);
    }
    const key = String(issue.path[0]);
    const value = given[key];
    // Some problems quote the value, or a part of it.
    if (value === undefined || issue.message.includes(`"${value}"`)) return `"${key}" ${issue.message}`;
    return `"${key}" "${value}"${issue.message.startsWith('"') ? ":" : ""} ${issue.message}`;
  });
}

/** Reads the parameters of GetCapacity, which may come without a number of replicas; throws as `parseParameters`. */
export function parseCapacityParameters(
  ctx: RequestContext,
  parameters: Readonly<Record<string, string>>,
): LightosParameters {
  return parseParameters(ctx, { "replica-count": "1", ...parameters });
}

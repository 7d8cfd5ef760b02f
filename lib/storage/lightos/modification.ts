/**
 * ControllerModifyVolume on LightOS: the QoS policy of a volume, and whether it is compressed, can change while hosts
 * use it (facts: docs/reference/lightos-api.md sections 6.7, 6.8 and 15.1). One UpdateVolume under the ETag of what was
 * read changes all or nothing.
 */
import * as z from "zod";
import type { Volume as LightosVolume } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import { unknownKeys } from "../../suggestion.ts";
import { isUuid } from "../../uuid.ts";
import { parseVolumeId } from "../../volume_id.ts";
import type { Modification } from "../backend.ts";
import { LightosError } from "./api_error.ts";
import type { ClusterPool } from "./pool.ts";
import { changeVolume, readVolume, type VolumeUpdate } from "./volumes.ts";

/** A QoS policy by its name or its UUID, in the form of LightOS' requests. */
export type QosPolicy =
  | { readonly case: "qosPolicyName"; readonly value: string }
  | { readonly case: "qosPolicyUUID"; readonly value: string };

/** StorageClass and VolumeAttributesClass parameters that name a QoS policy; only one of them may be given. */
export const qosParameters = {
  "qos-policy-name": z.string().regex(
    /^[A-Za-z0-9_.-]{1,253}$/,
    'is not the name of a policy (letters, digits, "-", "_", ".")',
  ),
  "qos-policy-uuid": z.string().refine(isUuid, "is not a UUID").transform((uuid) => uuid.toLowerCase()),
};

/** The policy that parsed parameters name, if any. Throws INVALID_ARGUMENT when they name two. */
export function qosPolicyOf(
  ctx: RequestContext,
  parameters: { readonly "qos-policy-name"?: string | undefined; readonly "qos-policy-uuid"?: string | undefined },
): QosPolicy | undefined {
  const { "qos-policy-name": name, "qos-policy-uuid": uuid } = parameters;
  if (name !== undefined && uuid !== undefined) {
    throw ctx.error(
      "INVALID_ARGUMENT",
      'parameters "qos-policy-name" and "qos-policy-uuid" are both given, one is needed',
    );
  }
  if (name !== undefined) return { case: "qosPolicyName", value: name };
  return uuid === undefined ? undefined : { case: "qosPolicyUUID", value: uuid };
}

/** The policy of a volume, by name or by UUID as `policy` has it, for comparison. */
export function qosPolicyLike(policy: QosPolicy, volume: LightosVolume): string {
  return policy.case === "qosPolicyName" ? volume.qosPolicyName : volume.qosPolicyUUID.toLowerCase();
}

const mutableSchema = z.strictObject({
  "qos-policy-name": qosParameters["qos-policy-name"].optional(),
  "qos-policy-uuid": qosParameters["qos-policy-uuid"].optional(),
  "compression": z.enum(["enabled", "disabled"], { error: `is not "enabled" or "disabled"` }).optional(),
});

/** The modification part of the LightOS backend. */
export function lightosModification(clusters: ClusterPool): Modification {
  return {
    merge(ctx, parameters, mutable) {
      const { policy } = parseMutable(ctx, mutable);
      const kept = { ...parameters };
      // A policy by UUID replaces one by name, and the other way round.
      if (policy !== undefined) { for (const key of Object.keys(qosParameters)) delete kept[key]; }
      return { ...kept, ...mutable };
    },
    async modifyVolume(call, secrets, volumeId, mutable) {
      const { policy, isCompressed } = parseMutable(call.doing("modify the volume"), mutable);
      const id = parseVolumeId(volumeId);
      const ctx = call.doing(`modify volume ${id.uuid}`);
      if (isCompressed && id.hostEncryption !== undefined) {
        throw ctx.error(
          // The only code that marks the class as one that this volume cannot have (docs/reference/csi.md 2.5).
          "INVALID_ARGUMENT",
          "it is encrypted on the host, and what is encrypted cannot be compressed by the cluster",
        );
      }
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      try {
        await changeVolume(ctx, cluster, id, {
          decide: (volume) => differenceFrom(volume, policy, isCompressed),
          confirmation: "look again",
        });
      } catch (error) {
        if (policy === undefined || !(error instanceof LightosError) || !hasCode(error, "NOT_FOUND")) throw error;
        // Either the volume is gone, which reading it shows, or there is no such policy.
        await readVolume(ctx, cluster, id);
        throw new StatusError("INVALID_ARGUMENT", error.message, { cause: error });
      }
    },
  };
}

/** The change that gives a volume this policy and compression; undefined: none is needed. */
function differenceFrom(
  volume: LightosVolume,
  policy: QosPolicy | undefined,
  isCompressed: boolean | undefined,
): VolumeUpdate | undefined {
  const change: VolumeUpdate = {
    ...(policy === undefined || qosPolicyLike(policy, volume) === policy.value ? {} : { qosPolicyID: policy }),
    ...(isCompressed === undefined || (volume.compression.toLowerCase() === "true") === isCompressed
      ? {}
      : { compression: String(isCompressed) }),
  };
  return Object.keys(change).length === 0 ? undefined : change;
}

function parseMutable(
  ctx: RequestContext,
  mutable: Readonly<Record<string, string>>,
): { readonly policy: QosPolicy | undefined; readonly isCompressed: boolean | undefined } {
  const parsed = mutableSchema.safeParse(mutable);
  if (!parsed.success) {
    const problems = parsed.error.issues.map((issue) =>
      issue.code === "unrecognized_keys"
        ? unknownKeys(issue.keys, Object.keys(mutableSchema.shape))
        : `"${String(issue.path[0])}" "${mutable[String(issue.path[0])] ?? ""}" ${issue.message}`
    );
    throw ctx.error("INVALID_ARGUMENT", `mutable parameter ${problems.join("; ")}`);
  }
  const { compression } = parsed.data;
  return {
    policy: qosPolicyOf(ctx, parsed.data),
    isCompressed: compression === undefined ? undefined : compression === "enabled",
  };
}

/**
 * The volume attributes that the author of a pod gives for an inline volume on LightOS (facts: docs/reference/csi.md
 * section 15).
 */
import * as z from "zod";
import type { RequestContext } from "../../context.ts";
import { parseQuantity } from "../../quantity.ts";
import { formatEndpoints } from "../../volume_id.ts";
import type { InlineRules, KnownCluster } from "./cluster_file.ts";
import { qosPolicyOf } from "./modification.ts";
import { parametersSchema, problemsOf } from "./parameters.ts";
import { volumeSize } from "./size.ts";

/** A cluster that allows inline volumes. */
export type InlineCluster = KnownCluster & { readonly inline: InlineRules };

/** A project of such a cluster. */
export interface InlinePlace {
  readonly cluster: InlineCluster;
  readonly project: string;
}

/** The inline volume that the attributes describe. */
export interface InlineVolumeSpec {
  readonly place: InlinePlace;
  readonly sizeBytes: bigint;
  /** As in a StorageClass. */
  readonly parameters: Readonly<Record<string, string>>;
}

const { shape } = parametersSchema;
const attributesSchema = z.strictObject({
  "cluster": z.string().optional(),
  "size": z.string({ error: "is missing, give a size such as 10Gi" }).transform((text, check) => {
    const bytes = parseQuantity(text);
    if (bytes !== undefined) return bytes;
    check.addIssue("is not a size such as 10Gi");
    return z.NEVER;
  }),
  "project-name": shape["project-name"],
  "replica-count": shape["replica-count"].optional(),
  "compression": shape.compression,
  "qos-policy-name": shape["qos-policy-name"],
  "qos-policy-uuid": shape["qos-policy-uuid"],
  "host-encryption": shape["host-encryption"]
    .refine((enabled) => !enabled, "is enabled, but inline volumes have no secret of their own to be encrypted with"),
  // Read by the node.
  "mkfs-options": z.string().optional(),
});

/**
 * Keys of a StorageClass or a Secret that a pod must not have: its author could have the operator's token sent anywhere.
 */
const forbidden = /^(?:mgmt-.*|jwt)$/;

/**
 * The volume that these attributes describe, on one of the clusters that allow inline volumes.
 *
 * @throws StatusError INVALID_ARGUMENT for bad attributes, OUT_OF_RANGE for a size above the limit of the cluster
 */
export function parseInlineAttributes(
  ctx: RequestContext,
  given: Readonly<Record<string, string>>,
  clusters: readonly InlineCluster[],
): InlineVolumeSpec {
  const attributeError = (problem: string, code: "INVALID_ARGUMENT" | "OUT_OF_RANGE" = "INVALID_ARGUMENT") =>
    ctx.error(code, `volume attribute ${problem}`);
  const forbiddenKeys = Object.keys(given).filter((key) => forbidden.test(key));
  if (forbiddenKeys.length > 0) {
    const named = forbiddenKeys.map((key) => `"${key}"`).join(", ");
    throw attributeError(
      `${named} is not for pods: the cluster file of the node says where clusters are, "cluster" names one of them`,
    );
  }
  const parsed = attributesSchema.safeParse(given);
  if (!parsed.success) {
    throw attributeError(problemsOf(parsed.error, given, Object.keys(attributesSchema.shape)).join("; "));
  }
  const { cluster: name, size, "project-name": asked, ...rest } = parsed.data;
  qosPolicyOf(ctx, rest);

  const names = clusters.map((cluster) => cluster.name).join(", ");
  const cluster = name === undefined && clusters.length === 1
    ? clusters[0]
    : clusters.find((cluster) => cluster.name === name);
  if (cluster === undefined) {
    throw attributeError(
      name === undefined
        ? `"cluster" is missing, give one of ${names}`
        : `"cluster" "${name}" is not one that allows inline volumes (${names})`,
    );
  }
  const { projects, maxSizeBytes } = cluster.inline;
  const project = asked ?? (projects.length === 1 ? projects[0] : undefined);
  if (project === undefined) throw attributeError(`"project-name" is missing, give one of ${projects.join(", ")}`);
  if (!projects.includes(project)) {
    throw attributeError(
      `"project-name" "${project}" is not one that cluster "${cluster.name}" allows (${projects.join(", ")})`,
    );
  }
  const sizeBytes = volumeSize(ctx, { requiredBytes: size, limitBytes: 0n });
  if (sizeBytes > maxSizeBytes) {
    throw attributeError(
      `"size" "${given["size"]}" is ${sizeBytes} bytes in whole GiB, cluster "${cluster.name}" allows ${maxSizeBytes}`,
      "OUT_OF_RANGE",
    );
  }
  return { place: { cluster, project }, sizeBytes, parameters: classParameters(given, cluster, project) };
}

/** The StorageClass parameters of an inline volume: some of its attributes, and the place. */
function classParameters(
  given: Readonly<Record<string, string>>,
  cluster: InlineCluster,
  project: string,
): Readonly<Record<string, string>> {
  const passedOn = ["replica-count", "compression", "qos-policy-name", "qos-policy-uuid"].flatMap((key) => {
    const value = given[key];
    return value === undefined ? [] : [[key, value] as const];
  });
  return {
    "replica-count": "1",
    ...Object.fromEntries(passedOn),
    "mgmt-endpoint": formatEndpoints(cluster.endpoints),
    "mgmt-scheme": cluster.scheme,
    "project-name": project,
  };
}

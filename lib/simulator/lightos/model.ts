/** The model of a simulated LightOS cluster as it is kept in memory and in its file: schemas, types, and what follows from them. */
import * as z from "zod";

/** States of a volume (docs/reference/lightos-api.md 6). */
export const volumeStates = [
  "Creating",
  "Available",
  "Deleting",
  "Failed",
  "Updating",
  "Rollback",
  "Migrating",
] as const;
/** See volumeStates. */
export type VolumeState = typeof volumeStates[number];
/** How well the replicas of a volume protect it. */
export const protections = ["Unknown", "FullyProtected", "Degraded", "ReadOnly", "NotAvailable"] as const;
/** See protections. */
export type Protection = typeof protections[number];
/** States of a snapshot. */
export const snapshotStates = ["Creating", "Available", "Deleting", "Failed"] as const;

const labelSchema = z.object({ key: z.string(), value: z.string() });

/** What volumes and snapshots have in common. */
const objectFields = {
  uuid: z.string(),
  name: z.string(),
  project: z.string(),
  replicaCount: z.number(),
  sizeBytes: z.coerce.bigint(),
  compression: z.boolean(),
  etag: z.string(),
  nsid: z.number(),
  sectorSizeBytes: z.number(),
  labels: z.array(labelSchema),
  nodeUuids: z.array(z.string()),
  createdAtMs: z.number(),
  /** When the state changes by itself; absent while it stays as it is. */
  dueAtMs: z.number().optional(),
  /** The creation will end as Failed. */
  doomed: z.boolean().optional(),
  /** The creation waits until it is released. */
  held: z.boolean().optional(),
};

const volumeSchema = z.object({
  ...objectFields,
  state: z.enum(volumeStates),
  protection: z.enum(protections),
  acl: z.array(z.string()),
  ipAcl: z.array(z.string()),
  sourceSnapshotUuid: z.string().optional(),
  sourceSnapshotName: z.string().optional(),
  qosPolicyUuid: z.string().optional(),
  /** UUID of the snapshot that a rollback restores. */
  rollbackTo: z.string().optional(),
});
/** A volume of the cluster. */
export type SimVolume = z.infer<typeof volumeSchema>;

const snapshotSchema = z.object({
  ...objectFields,
  state: z.enum(snapshotStates),
  description: z.string(),
  sourceVolumeUuid: z.string(),
  sourceVolumeName: z.string(),
  /** When the snapshot deletes itself. */
  expiresAtMs: z.number().optional(),
});
/** A snapshot of the cluster. */
export type SimSnapshot = z.infer<typeof snapshotSchema>;

const policySchema = z.object({
  uuid: z.string(),
  name: z.string(),
  description: z.string(),
  /** Projects that may use it; absent: all projects. */
  projects: z.array(z.string()).optional(),
  limit: z.discriminatedUnion("kind", [
    z.object({ kind: z.literal("iops"), read: z.number(), write: z.number() }),
    z.object({ kind: z.literal("bandwidth"), read: z.number(), write: z.number() }),
    z.object({ kind: z.literal("iopsPerGb"), read: z.number(), write: z.number() }),
  ]),
});
/** A QoS policy of the cluster. */
export type SimPolicy = z.infer<typeof policySchema>;

const trustedHostSchema = z.object({
  uuid: z.string(),
  name: z.string(),
  project: z.string(),
  hostNqn: z.string(),
  labels: z.array(labelSchema),
  authRequired: z.string(),
  hostSecret: z.string(),
  targetSecret: z.string(),
});
/** A host with its DH-HMAC-CHAP keys. */
export type SimTrustedHost = z.infer<typeof trustedHostSchema>;

const projectSchema = z.object({ uuid: z.string(), name: z.string(), description: z.string() });
/** A project of the cluster. */
export type SimProject = z.infer<typeof projectSchema>;

/** The model in its file. */
export const modelSchema = z.object({
  format: z.literal(1),
  revision: z.number(),
  nextNsid: z.number(),
  projects: z.array(projectSchema),
  volumes: z.array(volumeSchema),
  snapshots: z.array(snapshotSchema),
  policies: z.array(policySchema),
  trustedHosts: z.array(trustedHostSchema),
  features: z.record(z.string(), z.boolean()),
  inBandAuthentication: z.boolean(),
});
/** Everything that the cluster holds. */
export type ClusterModel = z.infer<typeof modelSchema>;

/** One storage server, which has one LightOS node. */
export interface StorageServer {
  readonly uuid: string;
  readonly nodeUuid: string;
  readonly name: string;
  /** `address:port` of the node's I/O controller. */
  readonly nvmeEndpoint: string;
  /** `address:port` of the server's discovery controller. */
  readonly discoveryEndpoint: string;
}

/** The facts that identify a cluster and do not change. */
export interface ClusterIdentity {
  readonly uuid: string;
  readonly name: string;
  readonly subsystemNqn: string;
  readonly servers: readonly StorageServer[];
}

/** Whether hosts can access the volume in its present state. */
export function isServed({ state, protection }: SimVolume): boolean {
  return (state === "Available" || state === "Updating" || state === "Migrating") && protection !== "NotAvailable";
}

/**
 * The ACL of a volume, or an empty one when its IP ACL does not admit this machine, from which all hosts connect.
 */
export function effectiveAcl({ acl, ipAcl }: SimVolume): readonly string[] {
  return ipAcl.includes("ALLOW_ANY") || ipAcl.includes("127.0.0.1") ? acl : [];
}

/** The QoS policies that a project may use; all of them when `project` is undefined. */
export function policiesOf({ policies }: ClusterModel, project: string | undefined): SimPolicy[] {
  return policies.filter((policy) =>
    project === undefined || policy.projects === undefined || policy.projects.includes(project)
  );
}

const featureNames = ["event-log", "evict-data", "fail-in-place", "in-band-authentication", "proactive-rebalance"];

/** The model of a new cluster. */
export function emptyModel(): ClusterModel {
  return {
    format: 1,
    revision: 0,
    nextNsid: 1,
    projects: [],
    volumes: [],
    snapshots: [],
    policies: [],
    trustedHosts: [],
    features: Object.fromEntries(featureNames.map((name) => [name, false])),
    inBandAuthentication: false,
  };
}

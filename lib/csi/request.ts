/**
 * What every CSI request is checked for, and how requests are described in logs.
 *
 * Order of checks (docs/reference/csi.md 2.3): a missing or malformed required field is INVALID_ARGUMENT before anything is looked
 * up; an ID that cannot be ours is "unknown", not malformed.
 */
import { clone, type DescMessage, type DescMethod, hasOption, type Message, toJson } from "@bufbuild/protobuf";
import { reflect } from "@bufbuild/protobuf/reflect";
import * as z from "zod";
import {
  csi_secret,
  type Topology,
  type VolumeCapability,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../proto/gen/csi_pb.ts";
import type { Fields, Secrets } from "../context.ts";
import { hasCode, StatusError } from "../error.ts";
import { type FsType, fsTypes } from "../host/filesystem/fs_type.ts";
import type { Passphrases } from "../host/luks.ts";
import { longestId, uuidInId } from "../volume_id.ts";

/** How a volume is to be used: `VolumeCapability`, checked. */
export type Access = MountAccess | BlockAccess;

export interface MountAccess {
  readonly type: "mount";
  readonly mode: Mode;
  /** Undefined: the driver's default for a new file system, whatever is there on an old one. */
  readonly fsType: FsType | undefined;
  readonly mountFlags: readonly string[];
}

export interface BlockAccess {
  readonly type: "block";
  readonly mode: Mode;
}

/**
 * Checks one capability.
 *
 * @param action what cannot be done when it is bad: `create volume "pvc-1"`
 * @throws StatusError INVALID_ARGUMENT for a missing part, an unknown file system or an access mode that a plain file
 *   system cannot have (two nodes that write, or one that reads what another writes)
 */
export function parseCapability(action: string, capability: VolumeCapability | undefined): Access {
  const refuse = (problem: string) => new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${problem}`);
  if (capability === undefined) throw refuse("volume_capability is missing");
  const mode = capability.accessMode?.mode ?? Mode.UNKNOWN;
  if (Mode[mode] === undefined) throw refuse(`access mode ${mode} is unknown to this driver`);
  if (mode === Mode.UNKNOWN) throw refuse("volume_capability.access_mode is missing");
  switch (capability.accessType.case) {
    case undefined:
      throw refuse("volume_capability has neither mount nor block");
    case "block":
      return { type: "block", mode };
    case "mount": {
      const { fsType, mountFlags, volumeMountGroup } = capability.accessType.value;
      if (mode === Mode.MULTI_NODE_MULTI_WRITER || mode === Mode.MULTI_NODE_SINGLE_WRITER) {
        throw refuse(
          `access mode ${Mode[mode]} is for raw block volumes: a file system that several nodes mount is damaged by ` +
            `the first write; use volumeMode: Block, or ReadOnlyMany`,
        );
      }
      if (fsType !== "" && !isFsType(fsType)) {
        throw refuse(`file system "${fsType}" is not one of ${fsTypes.join(", ")}`);
      }
      if (volumeMountGroup !== "") throw refuse("volume_mount_group is not announced by this driver");
      if (mountFlags.some((flag) => flag === "" || flag.includes("\0"))) throw refuse("a mount flag is empty");
      return { type: "mount", mode, fsType: fsType === "" ? undefined : fsType, mountFlags };
    }
  }
}

export function isFsType(text: string): text is FsType {
  return fsTypes.some((fsType) => fsType === text);
}

/** Whether hosts may have the volume at the same time. */
export function isShared(mode: Mode): boolean {
  return mode === Mode.MULTI_NODE_READER_ONLY || mode === Mode.MULTI_NODE_SINGLE_WRITER ||
    mode === Mode.MULTI_NODE_MULTI_WRITER;
}

/** Whether nobody writes through this access mode. */
export function isReaderOnly(mode: Mode): boolean {
  return mode === Mode.SINGLE_NODE_READER_ONLY || mode === Mode.MULTI_NODE_READER_ONLY;
}

/**
 * A capability that asks for something; undefined for one whose access type or access mode is not given. For calls that take
 * capabilities as advice: csi-provisioner 3.6 asks for the capacity with access mode UNKNOWN.
 */
export function statedCapability(capability: VolumeCapability | undefined): VolumeCapability | undefined {
  const mode = capability?.accessMode?.mode ?? Mode.UNKNOWN;
  return capability?.accessType.case === undefined || mode === Mode.UNKNOWN ? undefined : capability;
}

/**
 * Throws INVALID_ARGUMENT when one of `topologies` names a segment: every node reaches every volume, and no segment has a
 * meaning. A topology without segments asks for nothing; csi-provisioner sends one for a driver without topology.
 *
 * @param field the field of the request that has them: `accessible_topology`
 */
export function assertNoTopology(action: string, field: string, topologies: readonly Topology[]): void {
  const segments = topologies.flatMap(({ segments }) => Object.entries(segments));
  if (segments.length === 0) return;
  const named = [...new Set(segments.map(([key, value]) => `"${key}" "${value}"`))].join(", ");
  throw new StatusError(
    "INVALID_ARGUMENT",
    `Cannot ${action}: ${field} asks for ${named}, but every node reaches every volume of this driver; leave topology out`,
  );
}

/** The value of a required text field; throws INVALID_ARGUMENT when it is empty or has more than `longest` bytes. */
export function requireText(action: string, field: string, value: string, longest = 128): string {
  if (value === "") throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${field} is missing`);
  const bytes = new TextEncoder().encode(value).length;
  if (bytes <= longest) return value;
  throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${field} has ${bytes} bytes, ${longest} are allowed`);
}

/** The longest volume ID that is taken. */
export const longestVolumeId = longestId;

/** A path that the orchestrator gave; throws INVALID_ARGUMENT when it is empty, not absolute or longer than PATH_MAX. */
export function requirePath(action: string, field: string, value: string): string {
  requireText(action, field, value, 4095);
  if (!value.startsWith("/") || value.includes("\0") || /(?:^|\/)\.{1,2}(?:\/|$)/.test(value)) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${field} "${value}" is not a plain absolute path`);
  }
  return value;
}

/**
 * The keys of a parameter or context map that are meant for a driver. Sidecars and kubelet add keys of their own, which
 * differ between calls for one volume (docs/reference/csi.md 15, 16.4).
 */
export function withoutOrchestratorKeys(map: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(map).filter(([key]) =>
      !key.startsWith("csi.storage.k8s.io/") && !key.startsWith("storage.kubernetes.io/")
    ),
  );
}

/** The pod that a volume is published for, as kubelet tells it with podInfoOnMount (docs/reference/csi.md 15); empty where it does not. */
export function podInfo(context: Readonly<Record<string, string>>) {
  return {
    namespace: context["csi.storage.k8s.io/pod.namespace"] ?? "",
    name: context["csi.storage.k8s.io/pod.name"] ?? "",
    uid: context["csi.storage.k8s.io/pod.uid"] ?? "",
  };
}

// A LUKS2 passphrase may have 512 bytes (cryptsetup's limit for what is typed, and the incumbent's).
const passphrase = z.string({ error: "is missing, the volume is encrypted on the host" }).min(1, "is empty")
  .refine((text) => new TextEncoder().encode(text).length <= 512, "has more than 512 bytes");
const passphrasesSchema = z.object({
  "host-encryption-passphrase": passphrase,
  "host-encryption-passphrase-previous": passphrase.optional(),
});

/** Whether the secrets of a call hold a passphrase at all, good or bad. */
export function hasPassphrase(secrets: Secrets): boolean {
  const key = "host-encryption-passphrase";
  return secrets.parse(z.object({ [key]: z.string().optional() }))[key] !== undefined;
}

/** What opens an encrypted volume; throws INVALID_ARGUMENT that names the key and shows no value. */
export function parsePassphrases(action: string, secrets: Secrets): Passphrases {
  try {
    const values = secrets.parse(passphrasesSchema);
    return {
      current: values["host-encryption-passphrase"],
      previous: values["host-encryption-passphrase-previous"],
    };
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${error.message.replace(/^Cannot /, "cannot ")}`);
  }
}

/** StorageClass parameter for mkfs, kept in the volume context: the node needs it when it makes the file system. */
export const mkfsOptionsKey = "mkfs-options";

/** The facts of a CSI request which go into every log line of its call. */
export function describeRequest(_method: DescMethod, request: Message): Fields {
  const text = (key: string) => {
    const value = (request as unknown as Record<string, unknown>)[key];
    return typeof value === "string" && value !== "" ? value : undefined;
  };
  const volumeId = text("volumeId") ?? text("sourceVolumeId");
  const snapshotId = text("snapshotId");
  const facts = {
    volume: volumeId === undefined ? undefined : uuidIn(volumeId),
    snapshot: snapshotId === undefined ? undefined : uuidIn(snapshotId),
    name: text("name"),
    node: text("nodeId"),
    path: text("targetPath") ?? text("volumePath") ?? text("volumePublishPath") ?? text("stagingTargetPath"),
  };
  return Object.fromEntries(Object.entries(facts).filter(([, value]) => value !== undefined));
}

function uuidIn(volumeId: string): string {
  return uuidInId(volumeId) ?? volumeId.slice(0, longestVolumeId);
}

/** A request as JSON, with every field that the schema marks as secret emptied. */
export function redactRequest(method: DescMethod, request: Message): unknown {
  return toJson(method.input, withoutSecrets(method.input, request));
}

// Kubelet can put service account tokens into the volume context, which the schema does not mark (docs/reference/csi.md 15).
const secretContextKey = "csi.storage.k8s.io/serviceAccount.tokens";

function withoutSecrets(schema: DescMessage, message: Message): Message {
  const copy = reflect(schema, clone(schema, message));
  for (const field of schema.fields) {
    if (!copy.isSet(field)) continue;
    if (hasOption(field, csi_secret)) copy.clear(field);
    else if (field.fieldKind === "map" && field.mapKind === "scalar") {
      const map = copy.get(field);
      if (map.has(secretContextKey)) map.set(secretContextKey, "[secret]");
    }
  }
  return copy.message;
}

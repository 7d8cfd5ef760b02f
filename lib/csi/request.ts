/**
 * Validates the fields that CSI requests share, and describes requests for the log.
 *
 * Order of checks (docs/reference/csi.md 2.3): a missing or malformed required field is INVALID_ARGUMENT before
 * anything is looked up; an ID that cannot be one of this driver is "unknown", not malformed.
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
import type { RequestContext } from "../context.ts";
import { hasCode } from "../error.ts";
import { type FsType, fsTypes } from "../host/filesystem/fs_type.ts";
import type { Passphrases } from "../host/luks.ts";
import type { Fields } from "../log.ts";
import type { Secrets } from "../secrets.ts";
import { longestId, uuidInId } from "../volume_id.ts";

/** How a volume is to be used: a valid `VolumeCapability`. */
export type Access = MountAccess | BlockAccess;

export interface MountAccess {
  readonly type: "mount";
  readonly mode: Mode;
  /** Undefined: the driver's default for a blank volume, the existing file system of any other. */
  readonly fsType: FsType | undefined;
  readonly mountFlags: readonly string[];
}

export interface BlockAccess {
  readonly type: "block";
  readonly mode: Mode;
}

/**
 * Parses one capability.
 *
 * @throws StatusError INVALID_ARGUMENT for a missing part, an unknown file system or an access mode that a plain file
 *   system cannot have (several nodes that write, or one node that reads what another writes)
 */
export function parseCapability(ctx: RequestContext, capability: VolumeCapability | undefined): Access {
  const invalid = (problem: string) => ctx.error("INVALID_ARGUMENT", problem);
  if (capability === undefined) throw invalid("volume_capability is missing");
  const mode = capability.accessMode?.mode ?? Mode.UNKNOWN;
  if (Mode[mode] === undefined) throw invalid(`access mode ${mode} is unknown to this driver`);
  if (mode === Mode.UNKNOWN) throw invalid("volume_capability.access_mode is missing");
  switch (capability.accessType.case) {
    case undefined:
      throw invalid("volume_capability has neither mount nor block");
    case "block":
      return { type: "block", mode };
    case "mount": {
      const { fsType, mountFlags, volumeMountGroup } = capability.accessType.value;
      if (mode === Mode.MULTI_NODE_MULTI_WRITER || mode === Mode.MULTI_NODE_SINGLE_WRITER) {
        throw invalid(
          `access mode ${Mode[mode]} is for raw block volumes: a file system that several nodes mount is damaged by ` +
            `the first write; use volumeMode: Block, or ReadOnlyMany`,
        );
      }
      if (fsType !== "" && !isFsType(fsType)) {
        throw invalid(`file system "${fsType}" is not one of ${fsTypes.join(", ")}`);
      }
      if (volumeMountGroup !== "") throw invalid("volume_mount_group is not announced by this driver");
      if (mountFlags.some((flag) => flag === "" || flag.includes("\0"))) throw invalid("a mount flag is empty");
      return { type: "mount", mode, fsType: fsType === "" ? undefined : fsType, mountFlags };
    }
  }
}

/** Whether `text` is a file system that the driver can make. */
export function isFsType(text: string): text is FsType {
  return fsTypes.some((fsType) => fsType === text);
}

/** Whether several hosts may use the volume at the same time. */
export function isShared(mode: Mode): boolean {
  return mode === Mode.MULTI_NODE_READER_ONLY || mode === Mode.MULTI_NODE_SINGLE_WRITER ||
    mode === Mode.MULTI_NODE_MULTI_WRITER;
}

/** Whether an access mode only reads. */
export function isReaderOnly(mode: Mode): boolean {
  return mode === Mode.SINGLE_NODE_READER_ONLY || mode === Mode.MULTI_NODE_READER_ONLY;
}

/**
 * The capability, or undefined when its access type or access mode is missing. For calls where capabilities are only
 * advice: csi-provisioner 3.6 calls GetCapacity with access mode UNKNOWN.
 */
export function statedCapability(capability: VolumeCapability | undefined): VolumeCapability | undefined {
  const mode = capability?.accessMode?.mode ?? Mode.UNKNOWN;
  return capability?.accessType.case === undefined || mode === Mode.UNKNOWN ? undefined : capability;
}

/**
 * Throws INVALID_ARGUMENT when one of `topologies` names a segment: every node can use every volume, so no segment has
 * a meaning. A topology without segments restricts nothing; csi-provisioner sends one to a driver without topology.
 *
 * @param field the field of the request that holds them: `accessible_topology`
 */
export function assertNoTopology(ctx: RequestContext, field: string, topologies: readonly Topology[]): void {
  const segments = topologies.flatMap(({ segments }) => Object.entries(segments));
  if (segments.length === 0) return;
  const named = [...new Set(segments.map(([key, value]) => `"${key}" "${value}"`))].join(", ");
  throw ctx.error(
    "INVALID_ARGUMENT",
    `${field} asks for ${named}, but every node reaches every volume of this driver; leave topology out`,
  );
}

/** The value of a required text field; throws INVALID_ARGUMENT when it is empty or has more than `longest` bytes. */
export function requireText(ctx: RequestContext, field: string, value: string, longest = 128): string {
  if (value === "") throw ctx.error("INVALID_ARGUMENT", `${field} is missing`);
  const bytes = new TextEncoder().encode(value).length;
  if (bytes <= longest) return value;
  throw ctx.error("INVALID_ARGUMENT", `${field} has ${bytes} bytes, ${longest} are allowed`);
}

/** The longest path that Linux accepts, in bytes: PATH_MAX without the final zero. */
export const longestPath = 4095;

/** The longest volume ID that is accepted, in bytes. */
export const longestVolumeId = longestId;

/**
 * The value of a required path field; throws INVALID_ARGUMENT when it is empty, not absolute or longer than PATH_MAX.
 */
export function requirePath(ctx: RequestContext, field: string, value: string): string {
  requireText(ctx, field, value, longestPath);
  if (!value.startsWith("/") || value.includes("\0") || /(?:^|\/)\.{1,2}(?:\/|$)/.test(value)) {
    throw ctx.error("INVALID_ARGUMENT", `${field} "${value}" is not a plain absolute path`);
  }
  return value;
}

/**
 * The entries of a parameter or context map that are meant for a driver. Sidecars and kubelet add entries of their own,
 * which differ between the calls for one volume (docs/reference/csi.md 15, 16.4).
 */
export function withoutOrchestratorKeys(map: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(map).filter(([key]) =>
      !key.startsWith("csi.storage.k8s.io/") && !key.startsWith("storage.kubernetes.io/")
    ),
  );
}

/**
 * The pod that a volume is published for (podInfoOnMount, docs/reference/csi.md 15); empty strings where kubelet sends
 * none.
 */
export function podInfo(context: Readonly<Record<string, string>>) {
  return {
    namespace: context["csi.storage.k8s.io/pod.namespace"] ?? "",
    name: context["csi.storage.k8s.io/pod.name"] ?? "",
    uid: context["csi.storage.k8s.io/pod.uid"] ?? "",
  };
}

// A LUKS2 passphrase may have 512 bytes (cryptsetup's limit for a typed passphrase, and the incumbent's).
const passphrase = z.string({ error: "is missing, the volume is encrypted on the host" }).min(1, "is empty")
  .refine((text) => new TextEncoder().encode(text).length <= 512, "has more than 512 bytes");
const passphrasesSchema = z.object({
  "host-encryption-passphrase": passphrase,
  "host-encryption-passphrase-previous": passphrase.optional(),
});

/** Whether the secrets of a call hold a passphrase, valid or not. */
export function hasPassphrase(secrets: Secrets): boolean {
  const key = "host-encryption-passphrase";
  return secrets.parse(z.object({ [key]: z.string().optional() }))[key] !== undefined;
}

/** The passphrases that open an encrypted volume; throws INVALID_ARGUMENT that names the key and shows no value. */
export function parsePassphrases(ctx: RequestContext, secrets: Secrets): Passphrases {
  try {
    const values = secrets.parse(passphrasesSchema);
    return {
      current: values["host-encryption-passphrase"],
      previous: values["host-encryption-passphrase-previous"],
    };
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    throw ctx.error("INVALID_ARGUMENT", error.message.replace(/^Cannot /, "cannot "));
  }
}

/**
 * StorageClass parameter with options for mkfs. The volume context keeps it for the node that makes the file system.
 */
export const mkfsOptionsKey = "mkfs-options";

/** The facts of a CSI request that every log line of its call carries. */
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

/** A request as JSON, without the fields that the schema marks as secret. */
export function redactRequest(method: DescMethod, request: Message): unknown {
  return toJson(method.input, withoutSecrets(method.input, request));
}

// Kubelet can put service account tokens into the volume context, which the schema does not mark as secret
// (docs/reference/csi.md 15).
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

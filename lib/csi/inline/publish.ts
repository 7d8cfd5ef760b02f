/** NodePublishVolume of an inline volume: makes it on the cluster and mounts it at the pod's target path. */
import type { NodePublishVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, isFinal, messageOf, StatusError } from "../../error.ts";
import { ensureFilesystem } from "../../host/filesystem/format.ts";
import { parseMkfsOptions } from "../../host/filesystem/mkfs_options.ts";
import { type MountOptions, mountVolume } from "../../host/filesystem/mount.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath, makeMountPoint, onNodeDisk, removeMountPoint } from "../../host/mount_point.ts";
import { mountsAt, mountsElsewhere, mountTable } from "../../host/mount_table.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { assertHasPath } from "../../host/nvme/paths.ts";
import { waitForDevice } from "../../host/nvme/wait.ts";
import { mountsOf } from "../../host/volume_mounts.ts";
import type { RemoteNamespace } from "../../namespace.ts";
import { Secrets } from "../../secrets.ts";
import type { InlineVolumeRequest, InlineVolumeStore } from "../../storage/backend.ts";
import { assertMountPath } from "../node/mount_path.ts";
import {
  isReaderOnly,
  isShared,
  mkfsOptionsKey,
  parseCapability,
  podInfo,
  requirePath,
  withoutOrchestratorKeys,
} from "../request.ts";
import { inlineLock } from "./inline_id.ts";
import { type InlineOptions, inlineStore } from "./options.ts";

/**
 * Idempotent. Once there may be something of the volume on the cluster, no error is final (see inline_volumes.ts).
 *
 * @throws StatusError INVALID_ARGUMENT, FAILED_PRECONDITION or RESOURCE_EXHAUSTED while nothing is on the cluster;
 *   ALREADY_EXISTS when it is published in another way; otherwise as the store, the attacher and mountVolume do
 */
export async function publishInlineVolume(
  options: InlineOptions,
  request: NodePublishVolumeRequest,
  call: RequestContext,
): Promise<void> {
  const { host, nodeId } = options;
  const { volumeId } = request;
  const ctx = call.doing(`publish the inline volume ${volumeId}`);
  const given = requirePath(ctx, "target_path", request.targetPath);
  const { attributes, mountSettings } = parseRequest(options, ctx, request);
  const store = inlineStore(options);
  if (typeof store === "string") throw ctx.error("FAILED_PRECONDITION", store);
  using _held = options.locks.take(inlineLock(volumeId), "NodePublishVolume");

  const target = await canonicalPath(host, given);
  if (target === undefined) {
    throw ctx.error("FAILED_PRECONDITION", `the directory of the target path "${given}" is missing`);
  }
  assertMountPath(ctx, "target_path", target, options.allowSystemPaths ?? false);
  const isMounted = mountsAt(await mountTable(host), target).length > 0;
  const isRepeat = isMounted || await onNodeDisk(host, target, "look at", () => host.kindOf(target)) !== "absent";
  using _counted = isMounted ? undefined : await options.limit?.admit(ctx, volumeId);
  if (!isMounted) {
    await makeMountPoint(host, ctx, target, "directory");
  }
  const pod = podInfo(request.volumeContext);
  const secrets = new Secrets(request.secrets);
  const volume = { volumeId, attributes, nodeId, targetPath: given, pod, isRepeat };
  const namespace = await makeVolume(options, ctx, { store, secrets, volume, target, isMounted });
  try {
    await mountAtTarget(options, ctx.with({ volume: namespace.uuid, name: volumeId }), {
      namespace,
      target,
      mountSettings,
    });
  } catch (error) {
    // ALREADY_EXISTS: it is published in another way, so the orchestrator knows of it.
    if (!isFinal(error) || hasCode(error, "ALREADY_EXISTS")) throw error;
    throw new StatusError("UNAVAILABLE", messageOf(error), { cause: error });
  }
}

/** How the file system is mounted, wherever that is. */
type MountSettings = Omit<MountOptions, "path">;

/** What the request says about the volume and its file system; throws INVALID_ARGUMENT or FAILED_PRECONDITION. */
function parseRequest(
  { defaultFsType }: InlineOptions,
  ctx: RequestContext,
  request: NodePublishVolumeRequest,
): { readonly attributes: Readonly<Record<string, string>>; readonly mountSettings: MountSettings } {
  const access = parseCapability(ctx, request.volumeCapability);
  if (access.type === "block" || isShared(access.mode)) {
    throw ctx.error(
      "INVALID_ARGUMENT",
      `${
        access.type === "block" ? "volume_capability is block" : "its access mode is for several nodes"
      }, an inline volume is a file system for one pod`,
    );
  }
  if (request.volumeContext["csi.storage.k8s.io/ephemeral"] !== "true") {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `its ID is that of an inline volume and the volume context does not say so, the CSIDriver object has to have ` +
        `podInfoOnMount: true and Ephemeral among its volumeLifecycleModes`,
    );
  }
  const attributes = withoutOrchestratorKeys(request.volumeContext);
  const mkfsOptions = attributes[mkfsOptionsKey] ?? "";
  const { fsType, mountFlags: flags } = access;
  const { readOnly: isFlaggedReadOnly } = parseMountFlags(flags);
  parseMkfsOptions(fsType ?? defaultFsType, mkfsOptions);
  const readOnly = request.readonly || isReaderOnly(access.mode) || isFlaggedReadOnly;
  return {
    attributes,
    mountSettings: { fsType, defaultFsType, mkfsOptions, flags, readOnly, shared: false, mayFormat: true },
  };
}

interface Creation {
  readonly store: InlineVolumeStore;
  readonly secrets: Secrets;
  readonly volume: InlineVolumeRequest;
  readonly target: string;
  readonly isMounted: boolean;
}

/**
 * Makes the volume on the cluster, unless it is there. Removes the empty target again when nothing is on the cluster.
 */
async function makeVolume(
  { host }: InlineOptions,
  ctx: RequestContext,
  { store, secrets, volume, target, isMounted }: Creation,
): Promise<RemoteNamespace> {
  try {
    return await store.makeVolume(ctx, secrets, volume);
  } catch (error) {
    // After a final error nothing of the volume is on the cluster.
    if (isFinal(error) && !isMounted) await removeMountPoint(host, target);
    throw error;
  }
}

interface InlineMount {
  readonly namespace: RemoteNamespace;
  /** Free of symbolic links. */
  readonly target: string;
  readonly mountSettings: MountSettings;
}

/** Attaches the namespace, and mounts its file system at the target. */
async function mountAtTarget(
  { host, attacher }: InlineOptions,
  ctx: RequestContext,
  { namespace, target, mountSettings }: InlineMount,
): Promise<void> {
  const { uuid, subsystemNqn } = namespace;
  await attacher.attach(ctx, namespace);
  const device = await waitForDevice(host, ctx, uuid, { subsystemNqn, hint: attacher.hint });
  await assertHasPath(host, ctx, device);
  const isMounted = await isMountedAlready(host, ctx, device, { target, readOnly: mountSettings.readOnly });
  // mountVolume makes no file system for a read-only mount.
  if (mountSettings.readOnly && !isMounted) await ensureFilesystem(host, ctx, device, mountSettings);
  await mountVolume(host, ctx, device, { ...mountSettings, path: target });
}

/** Whether the volume is mounted anywhere; throws where its mounts forbid this one. */
async function isMountedAlready(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { target, readOnly }: { readonly target: string; readonly readOnly: boolean },
): Promise<boolean> {
  const table = await mountTable(host);
  const mounts = await mountsOf(host, table, device);
  // A directory of the volume that kubelet shows to a container (subPath) is not a target.
  const other = mountsElsewhere(table, mounts, target).find((mount) => mount.root === "/");
  if (other !== undefined) {
    throw ctx.error("FAILED_PRECONDITION", `it is published at "${other.path}", and an inline volume has one target`);
  }
  const isReadOnly = mounts.find((mount) => mount.path === target)?.options.includes("ro") ?? readOnly;
  if (isReadOnly !== readOnly) {
    // Mounting it again would take it away from a pod.
    const [is, asked] = isReadOnly ? ["read-only", "writable"] : ["writable", "read-only"];
    throw ctx.error("ALREADY_EXISTS", `it is published there already, ${is} instead of ${asked}`);
  }
  return mounts.length > 0;
}

/**
 * Staging: from a place on the cluster to a device of this node, and to a file system that is mounted at the staging
 * path.
 *
 * NodeStageVolume stages a new volume. NodePublishVolume stages a volume again whose staging is broken: kubelet calls
 * NodeStageVolume once per node, and NodeUnstageVolume only when no pod of the node uses the volume any more. So when a
 * device is lost for good and comes back under a new name, only NodePublishVolume can repair that for the next pod on
 * the node.
 */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import { probeContent } from "../../host/filesystem/content.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import { mountVolume } from "../../host/filesystem/mount.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import { abandonUnfinished } from "../../host/filesystem/unfinished.ts";
import type { Host } from "../../host/host.ts";
import { defaultLuksSettings, type LuksSettings, openMapper } from "../../host/luks.ts";
import { markUsed } from "../../host/luks_label.ts";
import { describeMount, mountsAt, mountTable } from "../../host/mount_table.ts";
import { assertAuthenticated } from "../../host/nvme/authentication.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { assertHasPath } from "../../host/nvme/paths.ts";
import { recheckDevice } from "../../host/nvme/recheck.ts";
import { waitForDevice } from "../../host/nvme/wait.ts";
import { mountAs, relationOf } from "../../host/volume_mounts.ts";
import type { RemoteNamespace } from "../../namespace.ts";
import type { Secrets } from "../../secrets.ts";
import type { Authentication } from "../../storage/backend.ts";
import { type Access, hasPassphrase, isReaderOnly, isShared, parsePassphrases } from "../request.ts";
import { connectionKeys } from "./authentication.ts";
import type { VolumeLimit } from "./limit.ts";
import type { VolumeOnNode } from "./volume.ts";

/** The parts of the node service that staging uses. */
export interface StagingOptions {
  readonly host: Host;
  readonly attacher: Attacher;
  readonly nodeId: string;
  /** For a blank volume whose capability names no file system. */
  readonly defaultFsType: FsType;
  /** Limits how many volumes the node has in use; shared with the inline volumes. Absent: no limit. */
  readonly limit?: VolumeLimit;
  /** How volumes with host encryption are formatted and opened. */
  readonly luks?: LuksSettings;
  /**
   * Reads the keys of authenticated connections from the cluster when no secret brings them. Nothing else makes a node
   * call the management API while it stages a volume. Absent: secrets must bring the keys.
   */
  readonly authentication?: Authentication;
}

/** What has to be staged, and where. */
export interface StageRequest {
  readonly volumeId: string;
  readonly id: VolumeOnNode;
  readonly access: Access;
  /** Undefined: another driver attached the volume, and its device has to be here. */
  readonly namespace: RemoteNamespace | undefined;
  readonly secrets: Secrets;
  /** The staging path, free of symbolic links; for a file system an existing directory. */
  readonly path: string;
  /** Text of the StorageClass parameter `mkfs-options`. */
  readonly mkfsOptions: string;
  /**
   * Whether this repairs the staging of a volume that was staged before. Then nothing is formatted or encrypted, and
   * the secrets of the call may lack what only the node-stage secret brings.
   */
  readonly isRepair: boolean;
}

/**
 * Attaches the volume, waits for its device, opens its encryption, and mounts its file system at the staging path
 * unless it is a raw block device. Idempotent: steps that are done already are left as they are, so it can be repeated
 * after any failure. The caller holds the volume's lock.
 *
 * @returns the device that the volume is read and written through on this node: an encrypted volume's mapper
 * @throws StatusError as the attacher, waitForDevice, openMapper and mountVolume do; FAILED_PRECONDITION when a repair
 *   needs a secret that the call does not bring; RESOURCE_EXHAUSTED when the node has as many volumes as it may have
 */
export async function stageVolume(
  options: StagingOptions,
  ctx: RequestContext,
  request: StageRequest,
): Promise<BlockDevice> {
  const { host, luks = defaultLuksSettings } = options;
  const { access, id, path } = request;
  using _counted = await options.limit?.admit(ctx, id.uuid);
  const namespaceDevice = await attachAndWait(options, ctx, request);
  await assertHasPath(host, ctx, namespaceDevice);
  const readOnly = isReaderOnly(access.mode) ||
    (access.type === "mount" && parseMountFlags(access.mountFlags).readOnly);
  const device = id.hostEncryption === undefined ? namespaceDevice : await openMapper(host, ctx, namespaceDevice, {
    passphrases: () => passphrasesOf(ctx, request),
    settings: luks,
    readOnly,
    shared: isShared(access.mode),
    mayFormat: !request.isRepair,
    stagingPath: path,
    probeContent: async (device) => {
      const { kind } = await probeContent(host, ctx, device);
      return kind === "blank" || kind === "luks" ? kind : "other";
    },
  });
  if (access.type === "block") {
    const asBlock = ctx.doing(`${ctx.action} as a block device`);
    await assertNoFileSystemStaged(host, asBlock, device, path);
    await assertNotMounted(host, asBlock, device);
    if (!readOnly) {
      await abandonUnfinished(host, ctx, device);
      await markUsed(host, ctx, device);
    }
    return device;
  }
  await mountVolume(host, ctx, device, {
    path,
    fsType: access.fsType,
    defaultFsType: options.defaultFsType,
    flags: access.mountFlags,
    readOnly,
    shared: isShared(access.mode),
    mkfsOptions: request.mkfsOptions,
    mayFormat: !request.isRepair,
    ...(request.isRepair ? { unformattedAdvice: blankAdvice } : {}),
  });
  return device;
}

/** Attaches the namespace and waits for its device. Its connections are authenticated where the volume asks for that. */
async function attachAndWait(
  options: StagingOptions,
  ctx: RequestContext,
  request: StageRequest,
): Promise<BlockDevice> {
  const { host, attacher } = options;
  const { namespace, id } = request;
  if (namespace === undefined) return await findDeviceOfOtherDriver(host, ctx, id.uuid);
  const { subsystemNqn, inBandAuth } = namespace;
  const keys = await keysToAttach(options, ctx, request, namespace);
  if (keys !== "unknown") await attacher.attach(ctx, namespace, keys);
  const device = await waitForDevice(host, ctx, id.uuid, { subsystemNqn, hint: attacher.hint });
  if (inBandAuth !== undefined) await assertAuthenticated(host, ctx, subsystemNqn, inBandAuth);
  return device;
}

/**
 * The keys to connect with; undefined where none are needed; `unknown` when a repair brings none and the device is
 * here: then its connections stay as they are.
 */
async function keysToAttach(
  options: StagingOptions,
  ctx: RequestContext,
  { id, volumeId, secrets, isRepair }: StageRequest,
  namespace: RemoteNamespace,
): Promise<DhchapKeys | undefined | "unknown"> {
  try {
    return await connectionKeys(options, ctx, { volumeId, namespace, secrets });
  } catch (error) {
    if (!isRepair || !hasCode(error, "FAILED_PRECONDITION")) throw error;
    if (await findDevice(options.host, id.uuid, namespace.subsystemNqn) !== undefined) return "unknown";
    throw new StatusError("FAILED_PRECONDITION", `${error.message}; ${restageAdvice}`, { cause: error });
  }
}

/** The device of a volume that another driver attached, so that there is no publish context of this driver. */
async function findDeviceOfOtherDriver(host: Host, ctx: RequestContext, uuid: string): Promise<BlockDevice> {
  const device = await findDevice(host, uuid);
  if (device !== undefined) return await recheckDevice(host, ctx, device);
  throw ctx.error(
    "FAILED_PRECONDITION",
    `its publish context was made by another driver and the device is not here; delete the VolumeAttachment of this ` +
      `volume and node, so that it is attached again`,
  );
}

/** What an operator can do for a volume whose staging cannot be repaired because the volume is blank. */
const blankAdvice =
  "and publish makes none: if the volume was used before, its data is gone from the storage, look there; if " +
  "not, it has to be staged first";

/** What an operator can do for a volume whose staging cannot be repaired without a secret. */
const restageAdvice =
  "end every pod on this node that uses the volume (scale it to zero, or drain the node), so that it " +
  "is staged again; with csi.storage.k8s.io/node-publish-secret-name and -namespace in its StorageClass, volumes " +
  "created afterwards are repaired automatically";

function passphrasesOf(ctx: RequestContext, { secrets, isRepair }: StageRequest) {
  if (isRepair && !hasPassphrase(secrets)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `its encryption is not open on this node, and the call brings no passphrase; ${restageAdvice}`,
    );
  }
  return parsePassphrases(ctx, secrets);
}

async function assertNoFileSystemStaged(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  path: string,
): Promise<void> {
  const mounted = mountsAt(await mountTable(host), path).at(-1);
  if (mounted === undefined || await relationOf(host, mounted, device) !== "ours") return;
  throw ctx.error("ALREADY_EXISTS", `${describeMount(mounted)} is staged at "${path}"`);
}

/**
 * Throws FAILED_PRECONDITION while a file system of the volume is mounted here: writes to the device below it would
 * damage it.
 */
export async function assertNotMounted(host: Host, ctx: RequestContext, device: BlockDevice): Promise<void> {
  const mount = await mountAs(host, device, "ours");
  if (mount === undefined) return;
  throw ctx.error(
    "FAILED_PRECONDITION",
    `${describeMount(mount)} is mounted at "${mount.path}", which has to end first`,
  );
}

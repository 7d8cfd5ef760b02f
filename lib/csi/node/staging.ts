/**
 * Staging: from a place on the cluster to a device of this node, and to a file system that is mounted at the staging path.
 *
 * NodeStageVolume does it for a new volume. NodePublishVolume does it again for a volume whose staging has broken: kubelet
 * stages a volume once per node, and unstages it only when no pod of the node wants it any more. So when a device is lost
 * for good and comes back under a new name, nobody but NodePublishVolume can mend that for the next pod on the node.
 */
import type { DhchapKeys } from "../../auth_key.ts";
import type { RequestContext, Secrets } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import { contentOf } from "../../host/filesystem/content.ts";
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
import type { Authentication } from "../../storage/backend.ts";
import type { VolumeId } from "../../volume_id.ts";
import { type Access, hasPassphrase, isReaderOnly, isShared, parsePassphrases } from "../request.ts";
import { connectionKeys } from "./authentication.ts";
import type { VolumeLimit } from "./limit.ts";

/** What of a volume ID is the node's business. */
export type VolumeOnNode = Pick<VolumeId, "uuid"> & Partial<Pick<VolumeId, "hostEncryption">>;

export interface StagingOptions {
  readonly host: Host;
  readonly attacher: Attacher;
  readonly nodeId: string;
  /** For a blank volume whose capability names no file system. */
  readonly defaultFsType: FsType;
  /** Keeps to the number of volumes that the node can hold, shared with the inline volumes. */
  readonly limit?: VolumeLimit;
  /** How volumes with host encryption are formatted and opened. */
  readonly luks?: LuksSettings;
  /**
   * Where the keys of authenticated connections come from that no secret brings. The one thing for which a node asks the
   * management API while it stages a volume; undefined: of nobody.
   */
  readonly authentication?: Authentication;
}

export interface StageRequest {
  /** What cannot be done when it fails: `stage the volume`. */
  readonly action: string;
  readonly volumeId: string;
  readonly id: VolumeOnNode;
  readonly access: Access;
  /** Undefined: the volume was attached by another driver, and its device has to be here. */
  readonly namespace: RemoteNamespace | undefined;
  readonly secrets: Secrets;
  /** The staging path, free of symbolic links; for a file system an existing directory. */
  readonly path: string;
  /** Text of the StorageClass parameter `mkfs-options`. */
  readonly mkfsOptions: string;
  /**
   * Whether this mends a volume that was staged before. Then nothing is formatted or encrypted, and what only the
   * node-stage secret brings may be missing.
   */
  readonly isRepair: boolean;
}

/**
 * Attaches the volume, waits for its device, opens its encryption, and mounts its file system at the staging path unless it
 * is a raw block device. Each step that is done already is left as it is: repeat it after any failure. The volume's lock
 * must be held.
 *
 * @returns what the volume is read and written through on this node: its device, or its mapper
 * @throws StatusError as the attacher, waitForDevice, openMapper and mountVolume do; FAILED_PRECONDITION when a repair needs
 *   a secret that the call does not bring; RESOURCE_EXHAUSTED when the node has as many volumes as it may have
 */
export async function stageVolume(
  options: StagingOptions,
  ctx: RequestContext,
  request: StageRequest,
): Promise<BlockDevice> {
  const { host, luks = defaultLuksSettings } = options;
  const { access, id, path } = request;
  const what = `${request.action} ${id.uuid}`;
  using _counted = await options.limit?.admit(what, id.uuid);
  const namespace = await attachedDevice(options, ctx, request);
  await assertHasPath(host, ctx.doing(what), namespace);
  const readOnly = isReaderOnly(access.mode) ||
    (access.type === "mount" && parseMountFlags(access.mountFlags).readOnly);
  const device = id.hostEncryption === undefined ? namespace : await openMapper(host, ctx, namespace, {
    passphrases: () => passphrasesOf(request),
    settings: luks,
    readOnly,
    shared: isShared(access.mode),
    formats: !request.isRepair,
    stagingPath: path,
    contentOf: async (device) => {
      const { kind } = await contentOf(host, ctx.doing(what), device);
      return kind === "blank" || kind === "luks" ? kind : "other";
    },
  });
  if (access.type === "block") {
    await assertNoFileSystemStaged(host, device, path, what);
    await assertNotMounted(host, device, `${what} as a block device`);
    if (!readOnly) {
      await abandonUnfinished(host, ctx.doing(what), device);
      await markUsed(host, ctx.doing(what), device);
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
    formats: !request.isRepair,
    ...(request.isRepair ? { unformattedAdvice: blankAdvice } : {}),
  });
  return device;
}

/** Makes the namespace's device appear, by connections that are authenticated where the volume asks for that. */
async function attachedDevice(
  options: StagingOptions,
  ctx: RequestContext,
  request: StageRequest,
): Promise<BlockDevice> {
  const { host, attacher } = options;
  const { namespace, id } = request;
  if (namespace === undefined) return await attachedBefore(host, ctx, request.action, id.uuid);
  const what = `${request.action} ${id.uuid}`;
  const { subsystemNqn, inBandAuth } = namespace;
  const keys = await keysToAttach(options, ctx, request, namespace);
  if (keys !== "unknown") await attacher.attach(ctx, namespace, keys);
  const device = await waitForDevice(host, ctx, id.uuid, { subsystemNqn, hint: attacher.hint });
  if (inBandAuth !== undefined) await assertAuthenticated(host, ctx.doing(what), subsystemNqn, inBandAuth);
  return device;
}

/**
 * The keys to connect with; undefined where none are needed; `unknown` when a repair brings none and the device is here, so
 * that its connections can stay as they are.
 */
async function keysToAttach(
  options: StagingOptions,
  ctx: RequestContext,
  { action, id, volumeId, secrets, isRepair }: StageRequest,
  namespace: RemoteNamespace,
): Promise<DhchapKeys | undefined | "unknown"> {
  try {
    return await connectionKeys(ctx, `${action} ${id.uuid}`, volumeId, namespace, secrets, options);
  } catch (error) {
    if (!isRepair || !hasCode(error, "FAILED_PRECONDITION")) throw error;
    if (await findDevice(options.host, id.uuid, namespace.subsystemNqn) !== undefined) return "unknown";
    throw new StatusError("FAILED_PRECONDITION", `${error.message}; ${restageAdvice}`, { cause: error });
  }
}

/** The device of a volume that was attached before this driver took over, without a publish context of ours. */
async function attachedBefore(host: Host, ctx: RequestContext, action: string, uuid: string): Promise<BlockDevice> {
  const device = await findDevice(host, uuid);
  if (device !== undefined) return await recheckDevice(host, ctx.doing(`${action} ${uuid}`), device);
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action} ${uuid}: its publish context was made by another driver and the device is not here; delete ` +
      `the VolumeAttachment of this volume and node, so that it is attached again`,
  );
}

/** What an operator can do for a volume whose staging cannot be mended, because nothing is on it. */
const blankAdvice =
  "and publish makes none: if the volume was used before, its data is gone from the storage, look there; if " +
  "not, it has to be staged first";

/** What an operator can do for a volume that cannot be mended without a secret. */
const restageAdvice =
  "end every pod on this node that uses the volume (scale it to zero, or drain the node), so that it " +
  "is staged again; with csi.storage.k8s.io/node-publish-secret-name and -namespace in its StorageClass, the next volumes " +
  "mend themselves";

function passphrasesOf({ action, id, secrets, isRepair }: StageRequest) {
  if (isRepair && !hasPassphrase(secrets)) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action} ${id.uuid}: its encryption is not open on this node, and the call brings no passphrase; ` +
        restageAdvice,
    );
  }
  return parsePassphrases(`${action} ${id.uuid}`, secrets);
}

async function assertNoFileSystemStaged(host: Host, device: BlockDevice, path: string, what: string): Promise<void> {
  const mounted = mountsAt(await mountTable(host), path).at(-1);
  if (mounted === undefined || await relationOf(host, mounted, device) !== "ours") return;
  throw new StatusError(
    "ALREADY_EXISTS",
    `Cannot ${what} as a block device: ${describeMount(mounted)} is staged at "${path}"`,
  );
}

/** Throws while a file system of the volume is mounted here: who writes to the device under it damages it. */
export async function assertNotMounted(host: Host, device: BlockDevice, action: string): Promise<void> {
  const mount = await mountAs(host, device, "ours");
  if (mount === undefined) return;
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: ${describeMount(mount)} is mounted at "${mount.path}", which has to end first`,
  );
}

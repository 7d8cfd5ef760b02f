/**
 * Attaches a volume for an engineer at a shell: what controller and node do for a pod, in one step and without an
 * orchestrator. To connect and mount, it calls the same functions as the node service.
 *
 * It goes forward only: repeated after a failure, an interruption or a success, it does what is missing. Nothing is written
 * down, so detachVolume needs the same arguments again.
 *
 * A blank device is formatted only on request. An orchestrator mounts a volume for the first time on purpose; a person who
 * types the ID of the wrong volume does not.
 */
import { type DhchapKeys, type GivenKeys, givenKeys, keysFor } from "../auth_key.ts";
import type { RequestContext } from "../context.ts";
import type { Attacher } from "../host/attach/attacher.ts";
import type { FsType } from "../host/filesystem/fs_type.ts";
import { mountVolume } from "../host/filesystem/mount.ts";
import type { Host } from "../host/host.ts";
import { canonicalPath } from "../host/mount_point.ts";
import { mountsAt, mountTable } from "../host/mount_table.ts";
import { assertAuthenticated } from "../host/nvme/authentication.ts";
import type { BlockDevice } from "../host/nvme/devices.ts";
import { assertHasPath } from "../host/nvme/paths.ts";
import { waitForDevice } from "../host/nvme/wait.ts";
import type { RemoteNamespace } from "../namespace.ts";
import type { Secrets } from "../secrets.ts";
import type { StorageBackend } from "../storage/backend.ts";

/** This machine, and the name under which it connects. */
export interface LocalMachine {
  readonly host: Host;
  readonly attacher: Attacher;
  readonly hostNqn: string;
  /** The directory that a Discovery-Client watches, when `attacher` does not write to it. */
  readonly discoveryDirectory: string | undefined;
}

/** Which volume: one that the cluster finds by its ID, or a namespace whose place is known. */
export type AttachRequest =
  | {
    readonly backend: StorageBackend;
    readonly volumeId: string;
    /** Attributes of the PersistentVolume, for backends that need them to grant access. */
    readonly volumeContext: Readonly<Record<string, string>>;
    readonly secrets: Secrets;
  }
  /** `inBandAuth` of the namespace says which kind of authentication `keys` are for. */
  | { readonly namespace: RemoteNamespace; readonly keys?: GivenKeys };

/** How an attached volume is mounted, and at which path. */
export interface MountRequest {
  readonly path: string;
  /** The file system that the volume has to have; undefined: any. */
  readonly fsType: FsType | undefined;
  readonly readOnly: boolean;
  /** Whether a blank device is formatted, with `fsType` or ext4. */
  readonly format: boolean;
}

/** The result of attachVolume. */
export interface Attached {
  readonly device: BlockDevice;
  readonly mount: { readonly path: string; readonly fsType: string; readonly readOnly: boolean } | undefined;
}

/**
 * Grants this host access (with a volume ID), connects, waits for the device, and mounts it. May be repeated.
 *
 * @throws StatusError FAILED_PRECONDITION when another host has access, the mount point is missing, or the content of the
 *   device is not the one that was asked for; UNAVAILABLE when the device does not appear before `ctx.signal` aborts; and
 *   what StorageBackend.grantAccess, Attacher.attach and mountVolume throw
 */
export async function attachVolume(
  ctx: RequestContext,
  { host, attacher, hostNqn }: LocalMachine,
  request: AttachRequest,
  mount: MountRequest | undefined,
): Promise<Attached> {
  // First, so that a missing mount point leaves nothing behind.
  const path = mount === undefined
    ? undefined
    : await findMountPoint(ctx.doing(`mount at "${mount.path}"`), host, mount.path);
  const namespace = "namespace" in request
    ? request.namespace
    : await request.backend.grantAccess(ctx, request.secrets, request.volumeId, {
      hostNqn,
      shared: false,
      volumeContext: request.volumeContext,
    });
  const volume = ctx.with({ volume: namespace.uuid });
  const { subsystemNqn, inBandAuth } = namespace;
  await attacher.attach(
    volume,
    namespace,
    attacher.takesKeys ? await connectionKeys(volume, hostNqn, namespace, request) : undefined,
  );
  const device = await waitForDevice(host, volume, namespace.uuid, { subsystemNqn, hint: attacher.hint });
  if (inBandAuth !== undefined) {
    await assertAuthenticated(host, ctx.doing(`attach namespace ${namespace.uuid}`), subsystemNqn, inBandAuth);
  }
  if (mount === undefined || path === undefined) return { device, mount: undefined };
  await assertHasPath(host, ctx.doing(`mount namespace ${namespace.uuid} at "${path}"`), device);
  await mountVolume(host, volume, device, {
    path,
    fsType: mount.fsType,
    defaultFsType: "ext4",
    flags: [],
    readOnly: mount.readOnly,
    shared: false,
    mkfsOptions: "",
    mayFormat: mount.format,
  });
  const fsType = mountsAt(await mountTable(host), path).at(-1)?.fsType ?? "";
  return { device, mount: { path, fsType, readOnly: mount.readOnly } };
}

const noKeys: GivenKeys = { host: undefined, controller: undefined };

/** The keys to connect with: those of the request, else those of the cluster. */
async function connectionKeys(
  ctx: RequestContext,
  hostNqn: string,
  { uuid, inBandAuth: kind }: RemoteNamespace,
  request: AttachRequest,
): Promise<DhchapKeys | undefined> {
  if (kind === undefined) return undefined;
  return await keysFor(kind, "backend" in request ? givenKeys(request.secrets) : request.keys ?? noKeys, async () => {
    const authentication = "backend" in request ? request.backend.authentication : undefined;
    if ("backend" in request && authentication !== undefined) {
      return await authentication.keysOf(ctx, request.secrets, request.volumeId, { hostNqn, kind });
    }
    throw ctx.doing(`attach namespace ${uuid}`).error(
      "FAILED_PRECONDITION",
      "no key is given (--dhchap-key-file)",
    );
  });
}

async function findMountPoint(ctx: RequestContext, host: Host, given: string): Promise<string> {
  const path = await canonicalPath(host, given);
  // The kind of a mounted file is not read: its file system may not answer.
  if (path !== undefined && mountsAt(await mountTable(host), path).length > 0) return path;
  const kind = path === undefined ? "absent" : await host.kindOf(path);
  if (path !== undefined && kind === "directory") return path;
  throw ctx.error(
    "FAILED_PRECONDITION",
    kind === "absent" ? "there is no such directory" : "it is not a directory",
  );
}

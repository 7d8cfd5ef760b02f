/**
 * Attaching and detaching a volume for the engineer at a shell: what controller and node do for a pod, in one go and
 * without an orchestrator. It has no way of its own to connect, mount or let go; it calls the ones that the node calls.
 *
 * Both go forward only. Repeated after a failure, an interruption or a success, attach does what is missing, and detach
 * undoes whatever part of attach is there. What attach was told, detach has to be told again: nothing is written down.
 *
 * A blank device is formatted only when that is asked for: an orchestrator mounts a volume for the first time on purpose,
 * a person who types the ID of the wrong volume does not.
 */
import { type DhchapKeys, type GivenKeys, givenKeys, keysFor } from "../auth_key.ts";
import type { RequestContext, Secrets } from "../context.ts";
import { StatusError } from "../error.ts";
import type { Attacher } from "../host/attach/attacher.ts";
import type { FsType } from "../host/filesystem/fs_type.ts";
import { mountVolume } from "../host/filesystem/mount.ts";
import type { Host } from "../host/host.ts";
import { canonicalPath } from "../host/mount_point.ts";
import { mountsAt, mountTable } from "../host/mount_table.ts";
import { assertAuthenticated } from "../host/nvme/authentication.ts";
import { assertHasPath } from "../host/nvme/paths.ts";
import type { BlockDevice } from "../host/nvme/devices.ts";
import { waitForDevice } from "../host/nvme/wait.ts";
import type { RemoteNamespace } from "../namespace.ts";
import type { StorageBackend } from "../storage/backend.ts";

/** This machine, and under which name it connects. */
export interface LocalMachine {
  readonly host: Host;
  readonly attacher: Attacher;
  readonly hostNqn: string;
  /** Where a Discovery-Client is told what to connect, when `attacher` is not the one that tells it. */
  readonly discoveryDirectory: string | undefined;
}

/** Which volume: one that a cluster is asked for by its ID, or a place that is known already. */
export type AttachRequest =
  | {
    readonly backend: StorageBackend;
    readonly volumeId: string;
    /** Attributes of the PersistentVolume, for backends that need them to grant access. */
    readonly volumeContext: Readonly<Record<string, string>>;
    readonly secrets: Secrets;
  }
  /** `inBandAuth` of the namespace says for what kind of authentication `keys` are. */
  | { readonly namespace: RemoteNamespace; readonly keys?: GivenKeys };

/** What is to be done with an attached volume; `path` is where to mount it. */
export interface MountRequest {
  readonly path: string;
  /** The file system that has to be there; undefined: whichever is. */
  readonly fsType: FsType | undefined;
  readonly readOnly: boolean;
  /** Whether a blank device is given a file system: `fsType`, or ext4. */
  readonly format: boolean;
}

/** What attachVolume leaves. */
export interface Attached {
  readonly device: BlockDevice;
  readonly mount: { readonly path: string; readonly fsType: string; readonly readOnly: boolean } | undefined;
}

/**
 * Grants this host access (where a cluster is asked), connects, waits for the device, and mounts it. May be repeated.
 *
 * @throws StatusError FAILED_PRECONDITION when another host has access, the directory to mount at is missing, or the device
 *   holds something else than asked for; UNAVAILABLE when it does not come before `ctx.signal` aborts; and what
 *   StorageBackend.grantAccess, Attacher.attach and mountVolume throw
 */
export async function attachVolume(
  ctx: RequestContext,
  { host, attacher, hostNqn }: LocalMachine,
  wanted: AttachRequest,
  mount: MountRequest | undefined,
): Promise<Attached> {
  // First, so that nothing has been done when it is refused.
  const path = mount === undefined ? undefined : await findMountPoint(host, mount.path);
  const namespace = "namespace" in wanted
    ? wanted.namespace
    : await wanted.backend.grantAccess(ctx, wanted.secrets, wanted.volumeId, {
      hostNqn,
      shared: false,
      volumeContext: wanted.volumeContext,
    });
  const volume = ctx.with({ volume: namespace.uuid });
  const { subsystemNqn, inBandAuth } = namespace;
  await attacher.attach(
    volume,
    namespace,
    attacher.takesKeys ? await connectionKeys(volume, hostNqn, namespace, wanted) : undefined,
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
    formats: mount.format,
  });
  const fsType = mountsAt(await mountTable(host), path).at(-1)?.fsType ?? "";
  return { device, mount: { path, fsType, readOnly: mount.readOnly } };
}

const noKeys: GivenKeys = { host: undefined, controller: undefined };

/** The keys to connect with: the cluster's where it is asked and nothing else gives them. */
async function connectionKeys(
  ctx: RequestContext,
  hostNqn: string,
  { uuid, inBandAuth: kind }: RemoteNamespace,
  wanted: AttachRequest,
): Promise<DhchapKeys | undefined> {
  if (kind === undefined) return undefined;
  return await keysFor(kind, "backend" in wanted ? givenKeys(wanted.secrets) : wanted.keys ?? noKeys, async () => {
    const authentication = "backend" in wanted ? wanted.backend.authentication : undefined;
    if ("backend" in wanted && authentication !== undefined) {
      return await authentication.keysOf(ctx, wanted.secrets, wanted.volumeId, hostNqn, kind);
    }
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot attach namespace ${uuid}: no key is given (--dhchap-key-file)`,
    );
  });
}

async function findMountPoint(host: Host, given: string): Promise<string> {
  const path = await canonicalPath(host, given);
  // What is mounted is not looked at, it may not answer.
  if (path !== undefined && mountsAt(await mountTable(host), path).length > 0) return path;
  const kind = path === undefined ? "absent" : await host.kindOf(path);
  if (path !== undefined && kind === "directory") return path;
  throw new StatusError(
    "FAILED_PRECONDITION",
    `Cannot mount at "${given}": ${kind === "absent" ? "there is no such directory" : "it is not a directory"}`,
  );
}

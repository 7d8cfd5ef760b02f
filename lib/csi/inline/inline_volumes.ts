/**
 * CSI inline volumes: volumes that are written into a pod, made when the pod starts on this node and removed after it
 * (docs/reference/csi.md section 15).
 *
 * Nobody but the node is asked: NodePublishVolume makes the volume on the cluster, lets this host connect, attaches,
 * formats, and mounts it at the target path itself, without staging; NodeUnpublishVolume, which is told nothing but the
 * volume ID and the target path, undoes any part of that. Each looks at the world first and does what is missing.
 *
 * The target directory is made before anything is made on the cluster, and removed after everything there has gone. So a
 * node that cannot ask the cluster can still tell a volume that may be left from one that never was.
 *
 * A final answer makes the orchestrator forget the volume without another call. So once there may be something on the
 * cluster, publish fails with UNAVAILABLE, whatever the reason: the orchestrator then asks for its removal in the end.
 */
import type { NodePublishVolumeRequest, NodeUnpublishVolumeRequest } from "../../../proto/gen/csi_pb.ts";
import { backgroundContext, type Logger, type RequestContext, Secrets, sleep } from "../../context.ts";
import { hasCode, isFinal, messageOf, StatusError } from "../../error.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import { ensureFilesystem } from "../../host/filesystem/format.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import { parseMkfsOptions } from "../../host/filesystem/mkfs_options.ts";
import { type MountOptions, mountVolume } from "../../host/filesystem/mount.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath, makeMountPoint, onNodeDisk, removeMountPoint } from "../../host/mount_point.ts";
import { mountsAt, mountsElsewhere, mountTable } from "../../host/mount_table.ts";
import { allControllers } from "../../host/nvme/controllers.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { assertHasPath } from "../../host/nvme/paths.ts";
import { waitForDevice } from "../../host/nvme/wait.ts";
import { assertUnmountCanEnd, unmountAll } from "../../host/unmount.ts";
import { deviceUnder, mountedSomewhere, mountsOf } from "../../host/volume_mounts.ts";
import type { KeyedLock } from "../../lock.ts";
import { hostNqn, type RemoteNamespace } from "../../namespace.ts";
import type { InlineVolume, InlineVolumeStore } from "../../storage/backend.ts";
import type { VolumeLimit } from "../node/limit.ts";
import { assertMountPath } from "../node/paths.ts";
import {
  isReaderOnly,
  isShared,
  mkfsOptionsKey,
  parseCapability,
  podInfo,
  requirePath,
  withoutOrchestratorKeys,
} from "../request.ts";

export interface InlineOptions {
  readonly host: Host;
  readonly attacher: Attacher;
  /** `volume <CSI volume ID>` is taken here. */
  readonly locks: KeyedLock;
  readonly nodeId: string;
  readonly defaultFsType: FsType;
  /** Undefined: this node was not told of any cluster. */
  readonly volumes: InlineVolumeStore | undefined;
  /** Shared with the node service. */
  readonly limit?: VolumeLimit;
  /** Whether volumes may be mounted in directories of the operating system. */
  readonly allowSystemPaths?: boolean;
}

/** Whether a volume ID is one that kubelet makes up for an inline volume. No ID of this driver has that form. */
export function isInlineId(volumeId: string): boolean {
  return /^csi-[0-9a-f]{64}$/.test(volumeId);
}

/** Throws INVALID_ARGUMENT for a call that makes no sense for an inline volume, and that kubelet never makes. */
export function assertNotInline(action: string, volumeId: string): void {
  if (!isInlineId(volumeId)) return;
  throw new StatusError(
    "INVALID_ARGUMENT",
    `Cannot ${action} ${volumeId}: it is an inline volume of a pod, which is published and unpublished and nothing else`,
  );
}

/**
 * The namespace of the inline volume that is mounted at a path, for calls that name no other way to it; the volume ID
 * itself, which no namespace has, when none is.
 */
export async function inlineUuid(host: Host, volumeId: string, path: string): Promise<string> {
  const canonical = path.startsWith("/") ? await canonicalPath(host, path) : undefined;
  const mount = canonical === undefined ? undefined : mountsAt(await mountTable(host), canonical).at(-1);
  const device = mount === undefined ? undefined : await deviceUnder(host, mount);
  return device?.uuid ?? volumeId;
}

/** What the node service does with inline volumes. */
export interface InlineVolumes {
  /** NodePublishVolume, for an ID of which isInlineId is true. */
  publish(request: NodePublishVolumeRequest, call: RequestContext): Promise<void>;
  /** NodeUnpublishVolume, likewise. */
  unpublish(request: NodeUnpublishVolumeRequest, call: RequestContext): Promise<void>;
  /**
   * Removes the volumes that were made for this node and that nobody on it knows any more, once; answers whether that is
   * settled, or has to be looked at again later.
   */
  sweep(ctx: RequestContext): Promise<boolean>;
}

/** Why a sweep leaves a volume alone, and whether that is for good. */
interface Kept {
  readonly reason: string;
  readonly isSettled: boolean;
}

export function inlineVolumes(options: InlineOptions): InlineVolumes {
  const { host, attacher, locks, nodeId, defaultFsType, volumes } = options;
  const obstacle = () =>
    volumes === undefined
      ? "this node knows no cluster for them, start it with --config and a cluster file that has the key ephemeral"
      : volumes.obstacle();

  return {
    async publish(request, call) {
      const { volumeId } = request;
      const action = `publish the inline volume ${volumeId}`;
      const given = requirePath(action, "target_path", request.targetPath);
      const access = parseCapability(action, request.volumeCapability);
      if (access.type === "block" || isShared(access.mode)) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action}: ${
            access.type === "block" ? "volume_capability is block" : "its access mode is for several nodes"
          }, an inline volume is a file system for one pod`,
        );
      }
      const refuse = (problem: string) => new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${problem}`);
      const context = request.volumeContext;
      if (context["csi.storage.k8s.io/ephemeral"] !== "true") {
        throw refuse(
          `its ID is that of an inline volume and the volume context does not say so, the CSIDriver object has to have ` +
            `podInfoOnMount: true and Ephemeral among its volumeLifecycleModes`,
        );
      }
      const attributes = withoutOrchestratorKeys(context);
      const mkfsOptions = attributes[mkfsOptionsKey] ?? "";
      const flags = parseMountFlags(access.mountFlags);
      parseMkfsOptions(access.fsType ?? defaultFsType, mkfsOptions);
      const problem = obstacle();
      if (volumes === undefined || problem !== undefined) throw refuse(problem ?? "");
      using _held = locks.take(lockOf(volumeId), "NodePublishVolume");

      const target = await canonicalPath(host, given);
      if (target === undefined) throw refuse(`the directory of the target path "${given}" is missing`);
      assertMountPath(action, "target_path", target, options.allowSystemPaths ?? false);
      const isMounted = mountsAt(await mountTable(host), target).length > 0;
      const isRepeat = isMounted || await onNodeDisk(host, target, "look at", () => host.kindOf(target)) !== "absent";
      using _counted = isMounted ? undefined : await options.limit?.admit(action, volumeId);
      if (!isMounted) await makeMountPoint(host, call.doing(action), target, "directory");
      let namespace: RemoteNamespace;
      try {
        namespace = await volumes.makeVolume(call, new Secrets(request.secrets), {
          volumeId,
          attributes,
          nodeId,
          targetPath: given,
          pod: podInfo(context),
          isRepeat,
        });
      } catch (error) {
        // Then nothing is on the cluster either.
        if (isFinal(error) && !isMounted) await removeMountPoint(host, target);
        throw error;
      }
      const readOnly = request.readonly || isReaderOnly(access.mode) || flags.readOnly;
      const wish = { fsType: access.fsType, defaultFsType, mkfsOptions, flags: access.mountFlags, readOnly };
      try {
        await show(call.with({ volume: namespace.uuid, name: volumeId }), action, namespace, target, wish);
      } catch (error) {
        // Published in another way already: then the orchestrator knows of it.
        if (!isFinal(error) || hasCode(error, "ALREADY_EXISTS")) throw error;
        throw new StatusError("UNAVAILABLE", messageOf(error), { cause: error });
      }
    },

    async unpublish(request, call) {
      const { volumeId } = request;
      const action = `unpublish the inline volume ${volumeId}`;
      const given = requirePath(action, "target_path", request.targetPath);
      using _held = locks.take(lockOf(volumeId), "NodeUnpublishVolume");

      const path = await canonicalPath(host, given);
      const there = path === undefined ? undefined : mountsAt(await mountTable(host), path).at(-1);
      // Which volume it is only the cluster knows for sure. But a namespace that is mounted where kubelet keeps this volume
      // is no other, and its data has to get there before anything else, also when the cluster does not answer.
      const mounted = there === undefined ? undefined : await deviceUnder(host, there);
      if (path !== undefined) {
        if (mounted !== undefined) await assertUnmountCanEnd(host, call.doing(action), { device: mounted, path });
        await unmountAll(host, call.doing(action), path, mounted);
      }
      const problem = obstacle();
      if (volumes === undefined || problem !== undefined) {
        // Made before anything else is, and removed last.
        if (path === undefined || await host.kindOf(path) === "absent") return;
        const what = mounted === undefined
          ? "a volume may be left on the cluster"
          : `namespace ${mounted.uuid} of ${mounted.subsystemNqn} is unmounted, and left on the cluster and attached`;
        throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: ${what}; ${problem}`);
      }
      const volume = await volumes.findVolume(call, volumeId);
      const uuid = volume?.uuid ?? mounted?.uuid;
      if (uuid !== undefined) {
        const ctx = call.with({ volume: uuid, name: volumeId });
        await letGo(ctx, action, uuid, volume);
        if (volume === undefined) ctx.log.warning("found no inline volume on any cluster that allows them");
      }
      if (path !== undefined) await removeMountPoint(host, path);
    },

    async sweep(ctx) {
      if (volumes === undefined || obstacle() !== undefined) return true;
      const { volumes: found, problems } = await volumes.listVolumes(ctx, nodeId);
      for (const error of problems) ctx.log.warning("could not look for leftover inline volumes", { error });
      let isSettled = problems.length === 0;
      for (const volume of found) {
        try {
          if (!await sweepOne(ctx, volumes, volume)) isSettled = false;
        } catch (error) {
          ctx.signal.throwIfAborted();
          // Its pod is being started or ended just now.
          if (!hasCode(error, "ABORTED")) {
            ctx.log.warning("could not remove a leftover inline volume", {
              name: volume.volumeId,
              error: messageOf(error),
            });
          }
          isSettled = false;
        }
      }
      return isSettled;
    },
  };

  /** Attaches the namespace, and mounts its file system at the target. */
  async function show(
    ctx: RequestContext,
    action: string,
    namespace: RemoteNamespace,
    target: string,
    wish: Omit<MountOptions, "path" | "shared">,
  ): Promise<void> {
    const { uuid, subsystemNqn } = namespace;
    await attacher.attach(ctx, namespace);
    const device = await waitForDevice(host, ctx, uuid, { subsystemNqn, hint: attacher.hint });
    await assertHasPath(host, ctx.doing(action), device);
    const table = await mountTable(host);
    const mounts = await mountsOf(host, table, device);
    // A directory of the volume that kubelet shows to a container (subPath) is not a target.
    const other = mountsElsewhere(table, mounts, target).find((mount) => mount.root === "/");
    if (other !== undefined) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: it is published at "${other.path}", and an inline volume has one target`,
      );
    }
    const there = mounts.find((mount) => mount.path === target);
    const isReadOnly = there?.options.includes("ro") ?? wish.readOnly;
    if (isReadOnly !== wish.readOnly) {
      // Mounting it anew would take it from under a pod.
      const [is, asked] = isReadOnly ? ["read-only", "writable"] : ["writable", "read-only"];
      throw new StatusError(
        "ALREADY_EXISTS",
        `Cannot ${action}: it is published there already, ${is} instead of ${asked}`,
      );
    }
    if (wish.readOnly && mounts.length === 0) await ensureFilesystem(host, ctx, device, wish);
    await mountVolume(host, ctx, device, { ...wish, path: target, shared: false });
  }

  /** Detaches a namespace that is unmounted, and removes its volume. */
  async function letGo(
    ctx: RequestContext,
    action: string,
    uuid: string,
    volume: InlineVolume | undefined,
  ): Promise<void> {
    const device = await findDevice(host, uuid);
    const mounts = device === undefined ? [] : await mountsOf(host, await mountTable(host), device);
    if (mounts.length > 0) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: namespace ${uuid} is still mounted at ${mounts.map(({ path }) => `"${path}"`).join(", ")}`,
      );
    }
    await attacher.detach(ctx, uuid);
    if (volume !== undefined) await volumes?.removeVolume(ctx, volume);
  }

  /** Answers whether the volume needs no other look. */
  async function sweepOne(ctx: RequestContext, volumes: InlineVolumeStore, seen: InlineVolume): Promise<boolean> {
    const log = ctx.with({ volume: seen.uuid, name: seen.volumeId });
    const keep = ({ reason, isSettled }: Kept) => {
      if (isSettled) log.log.debug("kept an inline volume", { error: reason });
      else log.log.warning("kept an inline volume that nobody may need", { error: reason });
      return isSettled;
    };
    // Without the lock at first, so that the calls for volumes in use go on.
    const first = await reasonToKeep(seen);
    if (first !== undefined) return keep(first);
    using _held = locks.take(lockOf(seen.volumeId), "the removal of leftovers");
    // Looked for again, for a publish or unpublish may have come in between.
    const volume = await volumes.findVolume(ctx, seen.volumeId);
    if (volume === undefined || volume.nodeId !== nodeId) return true;
    const second = await reasonToKeep(volume);
    if (second !== undefined) return keep(second);
    await letGo(log, `remove the leftover inline volume ${volume.volumeId}`, volume.uuid, volume);
    log.log.info("removed a leftover inline volume", { path: volume.targetPath ?? "" });
    return true;
  }

  /** Why a volume of this node is not a leftover, or may not be one; undefined when it surely is. */
  async function reasonToKeep(
    volume: InlineVolume,
  ): Promise<Kept | undefined> {
    const doubt = (reason: string) => ({ reason, isSettled: false });
    const { targetPath, pod, uuid } = volume;
    // Without kubelet's directory, or with another one, every path would seem to be gone.
    const podAt = targetPath === undefined || pod.uid === "" ? -1 : targetPath.indexOf(`/${pod.uid}/`);
    if (targetPath === undefined || podAt < 0) return doubt("its labels do not tell the path of its pod");
    const pods = targetPath.slice(0, podAt);
    if (await host.kindOf(pods) !== "directory") return doubt(`${pods}, where its pod was, is not here`);
    // Kubelet removes the directory of the target when it knows the volume no more.
    if (await canonicalPath(host, targetPath) !== undefined) {
      return { reason: `the directory of "${targetPath}" is there`, isSettled: true };
    }
    const device = await findDevice(host, uuid);
    if (device !== undefined) return await usedBy(device);
    const ours = hostNqn(nodeId);
    if (!volume.connectedHosts.includes(ours)) return undefined;
    const isConnected = (await allControllers(host)).some((controller) => controller.hostNqn === ours);
    // Either a connection from before a restart that the cluster has not given up yet, or a second machine of this name.
    return isConnected ? undefined : doubt(`a host of this node's name is connected to it, and this machine is not`);
  }

  async function usedBy(device: BlockDevice): Promise<Kept | undefined> {
    const mounts = await mountsOf(host, await mountTable(host), device);
    if (mounts[0] !== undefined) return { reason: `it is mounted at "${mounts[0].path}"`, isSettled: true };
    const fsType = await mountedSomewhere(host, device);
    if (fsType === undefined) return undefined;
    return { reason: `${fsType} of ${device.path} is mounted where this process cannot see it`, isSettled: false };
  }
}

const firstDelayMs = 5000;
const longestDelayMs = 300_000;
const longestSweepMs = 300_000;

/**
 * Sweeps until nothing is left to be looked at again, or `signal` aborts. For the start of the node: what a node leaves
 * behind when it dies is found when it is back.
 */
export async function sweepUntilSettled(inline: InlineVolumes, log: Logger, signal: AbortSignal): Promise<void> {
  const what = "remove leftover inline volumes";
  for (let delayMs = firstDelayMs;; delayMs = Math.min(delayMs * 2, longestDelayMs)) {
    try {
      if (await inline.sweep(backgroundContext(what, log, longestSweepMs, signal))) return;
    } catch (error) {
      if (signal.aborted) return;
      log.warning("could not look for leftover inline volumes", { error: messageOf(error) });
    }
    try {
      await sleep(delayMs, signal);
    } catch {
      return;
    }
  }
}

function lockOf(volumeId: string): string {
  return `volume ${volumeId}`;
}

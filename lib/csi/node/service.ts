/**
 * The CSI node service: turns a place on the cluster into a device, a mount, a path in a pod.
 *
 * Nothing is remembered between calls: each looks at sysfs, the device and the mount table, does what is missing, and
 * leaves the rest. So a repeated call goes on where the last one ended, whoever was killed in between, and unstage and
 * unpublish undo any part of stage and publish. One call at a time per volume; the others are told which one runs.
 *
 * Order of checks: docs/reference/csi.md 2.3.
 */
import {
  Node,
  NodeServiceCapability_RPC_Type as Capability,
  VolumeCapability_AccessMode_Mode as Mode,
  VolumeUsage_Unit as Unit,
} from "../../../proto/gen/csi_pb.ts";
import { type RequestContext, Secrets, sleep } from "../../context.ts";
import { hasCode, StatusError } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import { reasonOf } from "../../host/command_reason.ts";
import { fsTypes } from "../../host/filesystem/fs_type.ts";
import { ensureGrown } from "../../host/filesystem/grow.ts";
import { checkMount } from "../../host/filesystem/health.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import { closeMapper, growMapper } from "../../host/luks.ts";
import { findMapper } from "../../host/mapper.ts";
import {
  canonicalPath,
  isEmptyDirectory,
  makeMountPoint,
  onNodeDisk,
  removeMountPoint,
} from "../../host/mount_point.ts";
import { describeMount, type Mount, mountsAt, mountsElsewhere, mountTable } from "../../host/mount_table.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { assertHasPath } from "../../host/nvme/paths.ts";
import { recheckDevice } from "../../host/nvme/recheck.ts";
import { rescanNamespaces } from "../../host/nvme/rescan.ts";
import { assertFileSystemInactive, assertUnmountCanEnd, unmount, unmountAll } from "../../host/unmount.ts";
import { usersOf } from "../../host/users.ts";
import { mountsOf, relationOf } from "../../host/volume_mounts.ts";
import type { KeyedLock } from "../../lock.ts";
import { fromPublishContext, hostNqn, type RemoteNamespace } from "../../namespace.ts";
import type { VolumeId } from "../../volume_id.ts";
import {
  assertNotInline,
  inlineUuid,
  type InlineVolumes,
  inlineVolumes,
  isInlineId,
} from "../inline/inline_volumes.ts";
import {
  type Access,
  isReaderOnly,
  longestVolumeId,
  mkfsOptionsKey,
  parseCapability,
  parsePassphrases,
  requirePath,
  requireText,
  statedCapability,
} from "../request.ts";
import { conditionProbe } from "./condition.ts";
import { nodeHealthHandlers } from "./health.ts";
import { assertMountPath } from "./paths.ts";
import { assertNotMounted, type StageRequest, stageVolume, type StagingOptions, type VolumeOnNode } from "./staging.ts";

export interface NodeOptions extends StagingOptions {
  /** Shared with the attacher: `volume <uuid>` is taken here, `subsystem <nqn>` there. */
  readonly locks: KeyedLock;
  /** How many volumes of this driver the node can hold; undefined: the orchestrator decides. */
  readonly maxVolumes?: number | undefined;
  /** Reads a volume ID; throws NOT_FOUND for one that is not this driver's. */
  readonly parseId: (text: string) => Pick<VolumeId, "uuid" | "hostEncryption">;
  /** Inline volumes of pods; undefined: this node makes none, and says so. */
  readonly inline?: InlineVolumes;
  /** Whether volumes may be mounted in directories of the operating system. */
  readonly allowSystemPaths?: boolean;
  /** Whether volumes of this driver can grow. */
  readonly expansion?: boolean;
  /** Whether the health calls of CSI 1.13 are announced and served; tools for 1.12 fail on their capabilities. */
  readonly volumeHealth?: boolean;
}

// The cluster announces a new size by itself, within 0.1 s when it was measured; then the kernel is asked to look.
const announcedMs = 1000;

/** The handlers of CSI's Node service. */
export function nodeHandlers(options: NodeOptions): Handlers<typeof Node> {
  const { host, attacher, locks, parseId, allowSystemPaths = false } = options;
  const inline = options.inline ?? inlineVolumes({ ...options, volumes: undefined });
  const probe = conditionProbe(host);

  return {
    /** Makes the volume's device appear, and mounts its file system at the staging path (docs/reference/csi.md 7.3). */
    async nodeStageVolume(request, call) {
      const action = "stage the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const given = requirePath(action, "staging_target_path", request.stagingTargetPath);
      assertNotInline(action, volumeId);
      const access = parseCapability(action, request.volumeCapability);
      // Checked when a file system is made: a PersistentVolume keeps them for ever, and its volume is still mounted when a
      // later version of the driver allows less.
      const mkfsOptions = request.volumeContext[mkfsOptionsKey] ?? "";
      if (access.type === "mount") parseMountFlags(access.mountFlags);
      const id = parseId(volumeId);
      const namespace = placeOf(action, id, request.publishContext);
      const secrets = new Secrets(request.secrets);
      if (id.hostEncryption !== undefined) parsePassphrases(`${action} ${id.uuid}`, secrets);
      const ctx = call.with({ volume: id.uuid });
      using _held = locks.take(`volume ${id.uuid}`, "NodeStageVolume");
      host.pending.assertNothingOwed(ctx.doing(`${action} ${id.uuid}`), id.uuid);

      const path = await canonicalPath(host, given);
      if (path !== undefined) assertMountPath(`${action} ${id.uuid}`, "staging_target_path", path, allowSystemPaths);
      // What is mounted is not looked at: a file system that is shut down answers with an error (seen with xfs).
      const isMounted = path !== undefined && mountsAt(await mountTable(host), path).length > 0;
      const kind = path === undefined ? "absent" : isMounted ? "directory" : await kindOnDisk(path);
      if (path === undefined || (kind !== "directory" && (access.type === "mount" || kind !== "absent"))) {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot ${action} ${id.uuid}: the staging path "${given}" is ${
            kind === "absent" ? "missing" : "not a directory"
          }, the orchestrator has to make it`,
        );
      }
      if (access.type === "mount" && !isMounted && !await isEmptyDirectory(host, path)) {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot ${action} ${id.uuid}: the staging path "${given}" holds files of the node's own disk, which the mount ` +
            `would hide; move them away`,
        );
      }
      await stageVolume(options, ctx, {
        action,
        volumeId,
        id,
        access,
        namespace,
        secrets,
        path,
        mkfsOptions,
        isRepair: false,
      });
      return {};
    },

    /** Unmounts at the staging path and lets go of the volume (docs/reference/csi.md 7.4). Any leftover of a stage will do. */
    async nodeUnstageVolume(request, call) {
      const action = "unstage the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const given = requirePath(action, "staging_target_path", request.stagingTargetPath);
      assertNotInline(action, volumeId);
      const path = await canonicalPath(host, given);
      const id = await idUnlessIdle(volumeId, path);
      if (id === undefined) return {};
      const ctx = call.with({ volume: id.uuid });
      using _held = locks.take(`volume ${id.uuid}`, "NodeUnstageVolume");

      const what = `${action} ${id.uuid}`;
      const device = await deviceOf(id);
      if (path !== undefined) {
        if (device !== undefined) await assertUnmountCanEnd(host, ctx.doing(what), { device, path });
        await takeDownUnlessOwed(ctx, path, device, id.uuid, what);
      }
      if (device !== undefined) {
        const others = await mountsOf(host, await mountTable(host), device);
        if (others.length > 0) {
          throw new StatusError(
            "FAILED_PRECONDITION",
            `Cannot ${action} ${id.uuid}: it is still mounted at ${
              others.map((mount) => `"${mount.path}"`).join(", ")
            }, unpublish it there first`,
          );
        }
        await assertFileSystemInactive(host, ctx.doing(what), device);
      }
      if (id.hostEncryption !== undefined) await closeMapper(host, ctx.doing(what), id.uuid);
      await refuseHeld(id.uuid, what);
      await attacher.detach(ctx, id.uuid);
      return {};
    },

    /** Shows the staged volume at the target path (docs/reference/csi.md 7.5). */
    async nodePublishVolume(request, call) {
      const action = "publish the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      if (isInlineId(volumeId)) {
        await inline.publish(request, call);
        return {};
      }
      const givenTarget = requirePath(action, "target_path", request.targetPath);
      const access = parseCapability(action, request.volumeCapability);
      const readOnly = request.readonly || isReaderOnly(access.mode) ||
        (access.type === "mount" && parseMountFlags(access.mountFlags).readOnly);
      if (request.stagingTargetPath === "") {
        throw new StatusError(
          "FAILED_PRECONDITION",
          `Cannot ${action}: staging_target_path is missing, the volume has to be staged first`,
        );
      }
      const givenStaging = requirePath(action, "staging_target_path", request.stagingTargetPath);
      const id = parseId(volumeId);
      const namespace = placeOf(action, id, request.publishContext);
      const ctx = call.with({ volume: id.uuid });
      using _held = locks.take(`volume ${id.uuid}`, "NodePublishVolume");
      host.pending.assertNothingOwed(ctx.doing(`${action} ${id.uuid}`), id.uuid);

      const refuse = (problem: string) =>
        new StatusError("FAILED_PRECONDITION", `Cannot ${action} ${id.uuid}: ${problem}`);
      const target = await canonicalPath(host, givenTarget);
      if (target === undefined) throw refuse(`the directory of the target path "${givenTarget}" is missing`);
      const staging = await canonicalPath(host, givenStaging);
      assertMountPath(`${action} ${id.uuid}`, "target_path", target, allowSystemPaths);
      if (target === staging) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action} ${id.uuid}: target_path and staging_target_path are both "${target}"`,
        );
      }
      if (staging !== undefined) {
        assertMountPath(`${action} ${id.uuid}`, "staging_target_path", staging, allowSystemPaths);
      }
      const secrets = new Secrets(request.secrets);
      const wanted = { action, volumeId, id, access, namespace, secrets, mkfsOptions: "", isRepair: true } as const;
      const device = await stagedDevice(ctx, wanted, staging, refuse);

      const table = await mountTable(host);
      const there = mountsAt(table, target).at(-1);
      const relation = there === undefined ? undefined : await relationOf(host, there, device);
      if (there !== undefined && (relation === "ours" || relation === "our node")) {
        assertSamePublish(`${action} ${id.uuid} at "${target}"`, there, relation, access, readOnly);
        // An unpublish that was cut off may have made the device writable under a read-only mount.
        if (relation === "our node") await setReadOnly(ctx, device, readOnly);
        return {};
      }
      const others = mountsElsewhere(table, await mountsOf(host, table, device), staging, target);
      assertSingleTarget(access, others, readOnly, refuse);
      if (access.type === "block") await assertNotMounted(host, device, `${action} ${id.uuid} as a block device`);
      // What is dead there shows the pod nothing but errors; what is foreign is refused.
      if (there !== undefined) await unmountAll(host, ctx.doing(`${action} ${id.uuid}`), target, device);

      if (access.type === "block") {
        await makeMountPoint(host, ctx.doing(`${action} ${id.uuid}`), target, "file");
        await recheckDevice(host, ctx.doing(`${action} ${id.uuid}`), device);
        await setReadOnly(ctx, device, readOnly);
        await bind(ctx, device.path, target, readOnly, refuse);
      } else {
        await makeMountPoint(host, ctx.doing(`${action} ${id.uuid}`), target, "directory");
        await bind(ctx, staging ?? givenStaging, target, readOnly, refuse);
      }
      const mounted = mountsAt(await mountTable(host), target).at(-1);
      const now = mounted === undefined ? undefined : await relationOf(host, mounted, device);
      if (now !== (access.type === "block" ? "our node" : "ours")) {
        // The name went to another namespace in between. Left there, it would be foreign to every call for either volume.
        if (access.type === "block" && mounted?.root.endsWith(`/${device.name}`)) {
          await unmount(host, ctx.doing(`${action} ${id.uuid}`), target);
        }
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot ${action} ${id.uuid}: after the bind mount, ${
            mounted === undefined ? "nothing" : describeMount(mounted)
          } is at "${target}" instead of ${device.path}`,
        );
      }
      return {};
    },

    /** Takes the volume away from the target path, and the path with it (docs/reference/csi.md 7.6). Any leftover will do. */
    async nodeUnpublishVolume(request, call) {
      const action = "unpublish the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      if (isInlineId(volumeId)) {
        await inline.unpublish(request, call);
        return {};
      }
      const given = requirePath(action, "target_path", request.targetPath);
      const path = await canonicalPath(host, given);
      const id = await idUnlessIdle(volumeId, path);
      if (id === undefined || path === undefined) return {};
      const ctx = call.with({ volume: id.uuid });
      using _held = locks.take(`volume ${id.uuid}`, "NodeUnpublishVolume");

      const device = await deviceOf(id);
      const table = await mountTable(host);
      const there = mountsAt(table, path).at(-1);
      if (device !== undefined && (device.readOnly || there?.options.includes("ro") === true)) {
        const published = mountsElsewhere(table, await mountsOf(host, table, device), path);
        // Without a mount: a publish was cut off between the two.
        const isNode = there === undefined || await relationOf(host, there, device) === "our node";
        if (isNode && published.length === 0) await setReadOnly(ctx, device, false, there !== undefined);
      }
      const what = `${action} ${id.uuid}`;
      if (device !== undefined) await assertUnmountCanEnd(host, ctx.doing(what), { device, path });
      await takeDownUnlessOwed(ctx, path, device, id.uuid, what);
      await removeMountPoint(host, path);
      return {};
    },

    /**
     * Says how full the volume is and how it is (docs/reference/csi.md 7.7, 11). A path that does not show this volume is NOT_FOUND;
     * one that shows it dead, silent or read-only by itself is answered with that condition.
     */
    async nodeGetVolumeStats(request, call) {
      const action = "measure the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const given = requireText(action, "volume_path", request.volumePath, 4095);
      const id = isInlineId(volumeId) ? { uuid: await inlineUuid(host, volumeId, given) } : parseId(volumeId);
      const ctx = call.with({ volume: id.uuid });
      return await stats(ctx, `${action} ${id.uuid}`, id, given);
    },

    /** Grows the file system to the size of the device, and answers the size measured then (docs/reference/csi.md 7.8, 9). */
    async nodeExpandVolume(request, call) {
      const action = "expand the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const given = requireText(action, "volume_path", request.volumePath, 4095);
      const requiredBytes = request.capacityRange?.requiredBytes ?? 0n;
      const limitBytes = request.capacityRange?.limitBytes ?? 0n;
      if (requiredBytes < 0n || limitBytes < 0n || (limitBytes > 0n && limitBytes < requiredBytes)) {
        throw new StatusError(
          "INVALID_ARGUMENT",
          `Cannot ${action}: capacity_range from ${requiredBytes} to ${limitBytes} bytes makes no sense`,
        );
      }
      const capability = statedCapability(request.volumeCapability);
      if (capability !== undefined) parseCapability(action, capability);
      assertNotInline(action, volumeId);
      const id = parseId(volumeId);
      const ctx = call.with({ volume: id.uuid });
      using _held = locks.take(`volume ${id.uuid}`, "NodeExpandVolume");
      host.pending.assertNothingOwed(ctx.doing(`${action} ${id.uuid}`), id.uuid);

      const shown = await showing(`${action} ${id.uuid}`, id, given);
      if (shown.kind === "dead") {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot ${action} ${id.uuid}: ${describeMount(shown.mount)} at "${shown.mount.path}" has lost its device`,
        );
      }
      const namespace = shown.device.encrypts === undefined ? shown.device : shown.device.encrypts.beneath;
      if (namespace === undefined) {
        throw new StatusError("UNAVAILABLE", `Cannot ${action} ${id.uuid}: ${shown.device.path} has lost its device`);
      }
      const { sizeBytes } = await grownDevice(ctx, namespace, requiredBytes, `${action} ${id.uuid}`);
      if (limitBytes > 0n && sizeBytes > limitBytes) {
        throw new StatusError(
          "OUT_OF_RANGE",
          `Cannot ${action} ${id.uuid}: it has ${sizeBytes} bytes already, at most ${limitBytes} are wanted`,
        );
      }
      const device = shown.device.encrypts === undefined
        ? shown.device
        : await growMapper(host, ctx.doing(`${action} ${id.uuid}`), shown.device);
      if (shown.kind === "mount") {
        const mounts = await mountsOf(host, await mountTable(host), device);
        // A read-only target shares its file system with the staging mount, which may be writable.
        const writable = mounts.find((mount) => !mount.options.includes("ro")) ?? shown.mount;
        const fsType = fsTypes.find((fsType) => fsType === shown.mount.fsType);
        if (fsType === undefined) {
          throw new StatusError(
            "FAILED_PRECONDITION",
            `Cannot ${action} ${id.uuid}: ${describeMount(shown.mount)} is none of ${fsTypes.join(", ")}`,
          );
        }
        await ensureGrown(host, ctx, device, { path: writable.path, fsType });
      }
      return { capacityBytes: sizeBytes };
    },

    ...(options.volumeHealth ? nodeHealthHandlers({ host, probe, hostNqn: hostNqn(options.nodeId), parseId }) : {}),

    /** Names this node (docs/reference/csi.md 7.2). */
    nodeGetInfo() {
      return Promise.resolve({
        nodeId: options.nodeId,
        maxVolumesPerNode: BigInt(options.maxVolumes ?? 0),
      });
    },

    /** What this service can do (docs/reference/csi.md 7.1). */
    nodeGetCapabilities() {
      const types = [
        Capability.STAGE_UNSTAGE_VOLUME,
        Capability.GET_VOLUME_STATS,
        Capability.VOLUME_CONDITION,
        ...(options.expansion === false ? [] : [Capability.EXPAND_VOLUME]),
        Capability.SINGLE_NODE_MULTI_WRITER,
        ...(options.volumeHealth ? [Capability.GET_VOLUME_HEALTH, Capability.GET_STORAGE_HEALTH] : []),
      ];
      return Promise.resolve({
        capabilities: types.map((type) => ({ type: { case: "rpc" as const, value: { type } } })),
      });
    },
  };

  function kindOnDisk(path: string) {
    return onNodeDisk(host, path, "look at", () => host.kindOf(path));
  }

  /** What this node reads and writes the volume through: its device, or its mapper, and never the device under that. */
  async function deviceOf({ uuid, hostEncryption }: VolumeOnNode): Promise<BlockDevice | undefined> {
    return await (hostEncryption === undefined ? findDevice(host, uuid) : findMapper(host, uuid));
  }

  /**
   * What the volume is read and written through, after it was staged again if that was broken.
   *
   * @param staging where it was staged; undefined: the directory of that path is missing
   */
  async function stagedDevice(
    ctx: RequestContext,
    wanted: Omit<StageRequest, "path">,
    staging: string | undefined,
    refuse: (problem: string) => StatusError,
  ): Promise<BlockDevice> {
    const { id, access, namespace, action } = wanted;
    const found = await deviceOf(id);
    const isDead = found?.encrypts !== undefined && found.encrypts.beneath === undefined;
    const device = found === undefined || isDead
      ? found
      : await recheckDevice(host, ctx.doing(`${action} ${id.uuid}`), found);
    if (device !== undefined) await assertHasPath(host, ctx.doing(`${action} ${id.uuid}`), device);
    const problem = await stagingProblem(ctx, device, staging, access, refuse);
    if (problem === undefined && device !== undefined) return device;
    const isHere = (device !== undefined && !isDead) || await findDevice(host, id.uuid) !== undefined;
    const reason = !isHere
      ? "this node has no block device of it"
      : device === undefined
      ? "its encryption is not open"
      : problem ?? "";
    if (namespace === undefined && !isHere) {
      throw refuse(`${reason}, it has to be staged first (the call brings no publish context of this driver)`);
    }
    const path = await stagingDirectory(staging, access, (problem) => refuse([reason, problem].join(", and ")));
    ctx.log.warning("stages again what is broken", { path, error: reason });
    return await stageVolume(options, ctx, { ...wanted, path });
  }

  /** The staging path, when a volume can be mounted there without hiding something. */
  async function stagingDirectory(
    staging: string | undefined,
    access: Access,
    refuse: (problem: string) => StatusError,
  ): Promise<string> {
    if (staging === undefined) throw refuse("the directory of the staging path is missing");
    // What is mounted is not looked at, it may not answer.
    if (access.type === "block" || mountsAt(await mountTable(host), staging).length > 0) return staging;
    const kind = await kindOnDisk(staging);
    if (kind !== "directory") {
      throw refuse(`the staging path "${staging}" is ${kind === "absent" ? "missing" : "not a directory"}`);
    }
    if (!await isEmptyDirectory(host, staging)) {
      throw refuse(`the staging path "${staging}" holds files of the node's own disk`);
    }
    return staging;
  }

  /** The ID of a volume to let go of; undefined when it is not ours and nothing is mounted at the path: nothing to do. */
  async function idUnlessIdle(volumeId: string, path: string | undefined) {
    try {
      return parseId(volumeId);
    } catch (error) {
      if (path === undefined || mountsAt(await mountTable(host), path).length === 0) return undefined;
      throw error;
    }
  }

  /**
   * Why the volume has to be staged again before a pod can have it, or undefined: a bind mount of a plain directory would
   * put the pod's files on the root disk. Throws where staging it again would be wrong.
   */
  async function stagingProblem(
    ctx: RequestContext,
    device: BlockDevice | undefined,
    staging: string | undefined,
    access: Access,
    refuse: (problem: string) => StatusError,
  ): Promise<string | undefined> {
    const mounted = staging === undefined ? undefined : mountsAt(await mountTable(host), staging).at(-1);
    const relation = mounted === undefined ? undefined : await relationOf(host, mounted, device);
    if (device?.encrypts !== undefined && device.encrypts.beneath === undefined) {
      return "its encryption is of a device that has gone";
    }
    if (access.type === "block") {
      if (relation === "ours") throw refuse(`it is staged at "${staging}" as a file system, not as a block device`);
      return undefined;
    }
    if (mounted === undefined) return "nothing is mounted at the staging path";
    if (relation === "dead") return `${describeMount(mounted)} at the staging path has lost its device`;
    if (device === undefined || relation !== "ours" || mounted.root !== "/") {
      throw refuse(`${describeMount(mounted)} is mounted at the staging path, which is not this volume`);
    }
    if (access.fsType !== undefined && access.fsType !== mounted.fsType) {
      throw refuse(`it is staged as ${mounted.fsType}, the request wants ${access.fsType}`);
    }
    const readOnly = isReaderOnly(access.mode) || parseMountFlags(access.mountFlags).readOnly;
    return await checkMount(host, ctx, device, { mount: mounted, readOnly });
  }

  /** Unmounts what is at `path`. A question that the volume has not answered keeps its mount busy, and that passes. */
  async function takeDownUnlessOwed(
    ctx: RequestContext,
    path: string,
    device: BlockDevice | undefined,
    uuid: string,
    action: string,
  ): Promise<void> {
    try {
      await unmountAll(host, ctx.doing(action), path, device);
    } catch (error) {
      if (hasCode(error, "FAILED_PRECONDITION")) host.pending.assertNothingOwed(ctx.doing(action), uuid);
      throw error;
    }
  }

  /** Throws while a device on top of the namespace uses it, which an unmount does not end. */
  async function refuseHeld(uuid: string, action: string): Promise<void> {
    const device = await findDevice(host, uuid);
    const users = device === undefined ? [] : await usersOf(host, device);
    if (device === undefined || users.length === 0) return;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ${device.path} is in use by ${users.join(", ")}, which has to end first`,
    );
  }

  async function bind(
    ctx: RequestContext,
    source: string,
    target: string,
    readOnly: boolean,
    refuse: (problem: string) => StatusError,
  ): Promise<void> {
    const args = ["-o", readOnly ? "bind,ro" : "bind", source, target];
    const result = await host.run("mount", args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
    if (result.code === 0) return;
    const { code, message } = refuse(`mount failed with exit ${result.code} (${reasonOf("mount", result)})`);
    // Read-only takes it two steps. A final answer would make the orchestrator forget the first.
    const isThere = mountsAt(await mountTable(host), target).length > 0;
    throw new StatusError(isThere ? "UNAVAILABLE" : code, message);
  }

  /**
   * Makes the kernel refuse writes to the device, or take them again. A read-only bind mount of a device node does not
   * keep anybody from writing to the device behind it.
   */
  async function setReadOnly(
    ctx: RequestContext,
    device: BlockDevice,
    readOnly: boolean,
    isKnown = false,
  ): Promise<void> {
    if (device.readOnly === readOnly && !isKnown) return;
    const result = await host.run("blockdev", [readOnly ? "--setro" : "--setrw", device.path], {
      signal: ctx.signal,
      onAbort: "finish",
      log: ctx.log,
    });
    if (result.code === 0) return;
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot make ${device.path} ${readOnly ? "read-only" : "writable"}: ${reasonOf("blockdev", result)}`,
    );
  }

  /** What a path shows of the volume; throws NOT_FOUND when that is nothing. */
  async function showing(action: string, id: VolumeOnNode, given: string): Promise<Shown> {
    const refuse = (problem: string) => new StatusError("NOT_FOUND", `Cannot ${action}: ${problem}`);
    const path = given.startsWith("/") ? await canonicalPath(host, given) : undefined;
    if (path === undefined) throw refuse(`"${given}" is not there`);
    const device = await deviceOf(id);
    const mount = mountsAt(await mountTable(host), path).at(-1);
    if (mount !== undefined) {
      const relation = await relationOf(host, mount, device);
      if (device !== undefined && relation === "ours") return { kind: "mount", device, mount };
      if (device !== undefined && relation === "our node") return { kind: "block", device };
      if (relation === "dead") return { kind: "dead", mount };
    } else if (device !== undefined && await host.blockNumber(path) === device.number) {
      return { kind: "block", device };
    }
    throw refuse(
      device === undefined ? `this node has no block device of it` : `"${given}" does not show ${device.path}`,
    );
  }

  async function stats(ctx: RequestContext, action: string, id: VolumeOnNode, given: string) {
    const shown = await showing(action, id, given);
    const { usage, condition } = shown.kind === "mount"
      ? await probe.ofMount(ctx, shown.device, shown.mount)
      : shown.kind === "block"
      ? await probe.ofDevice(ctx, shown.device)
      : await probe.ofDeadMount(ctx, id.uuid, shown.mount);
    const volumeCondition = { abnormal: condition !== undefined, message: condition?.message ?? "healthy" };
    // Kubelet shows a condition to those only who have switched that on.
    if (condition !== undefined) {
      ctx.log.warning("found a volume in trouble", { path: given, error: condition.message });
    }
    if (usage === undefined) {
      // Kubelet passes over a condition that comes without any usage.
      const total = shown.kind === "dead" ? [] : [{ unit: Unit.BYTES, total: shown.device.sizeBytes }];
      return { usage: total, volumeCondition };
    }
    return {
      usage: [
        {
          unit: Unit.BYTES,
          total: usage.totalBytes,
          available: usage.availableBytes,
          used: usage.totalBytes - usage.freeBytes,
        },
        {
          unit: Unit.INODES,
          total: usage.totalInodes,
          available: usage.freeInodes,
          used: usage.totalInodes - usage.freeInodes,
        },
      ],
      volumeCondition,
    };
  }

  /** The device, once the kernel shows at least `requiredBytes`. */
  async function grownDevice(
    ctx: RequestContext,
    device: BlockDevice,
    requiredBytes: bigint,
    action: string,
  ): Promise<BlockDevice> {
    const started = performance.now();
    let rescanned = false;
    for (;;) {
      const now = await recheckDevice(host, ctx.doing(action), device);
      if (now.sizeBytes >= requiredBytes) return now;
      if (!rescanned && performance.now() - started >= announcedMs) {
        rescanned = true;
        await rescanNamespaces(host, ctx, device.subsystemNqn);
        continue;
      }
      try {
        await sleep(50, ctx.signal);
      } catch (error) {
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot ${action}: ${now.path} still has ${now.sizeBytes} bytes, ${requiredBytes} are wanted; the cluster has ` +
            `not shown this node a larger size`,
          { cause: error },
        );
      }
    }
  }
}

type Shown =
  | { readonly kind: "mount"; readonly device: BlockDevice; readonly mount: Mount }
  | { readonly kind: "block"; readonly device: BlockDevice }
  | { readonly kind: "dead"; readonly mount: Mount };

/** Where the volume's namespace is, by its publish context; undefined: another driver made that. */
function placeOf(
  action: string,
  { uuid }: VolumeOnNode,
  publishContext: Readonly<Record<string, string>>,
): RemoteNamespace | undefined {
  const namespace = fromPublishContext(publishContext);
  if (namespace === undefined || namespace.uuid === uuid) return namespace;
  throw new StatusError(
    "INVALID_ARGUMENT",
    `Cannot ${action} ${uuid}: the publish context is of namespace ${namespace.uuid}`,
  );
}

/** Throws when the volume is published at this target in another way than is asked for. */
function assertSamePublish(
  action: string,
  mount: Mount,
  relation: "ours" | "our node",
  access: Access,
  readOnly: boolean,
): void {
  const differences: string[] = [];
  const type = relation === "ours" ? "mount" : "block";
  if (type !== access.type) differences.push(`as ${type} instead of ${access.type}`);
  const isReadOnly = mount.options.includes("ro");
  if (isReadOnly !== readOnly) {
    differences.push(`${isReadOnly ? "read-only" : "writable"} instead of ${readOnly ? "read-only" : "writable"}`);
  }
  if (differences.length === 0) return;
  throw new StatusError(
    "ALREADY_EXISTS",
    `Cannot ${action}: it is published there already, ${differences.join(", ")}`,
  );
}

/**
 * Throws when another target of the volume on this node forbids this one (docs/reference/csi.md 7.5). SINGLE_NODE_WRITER allows
 * it: orchestrators that do not know SINGLE_NODE_MULTI_WRITER mean that, and two pods of a node share the volume.
 */
function assertSingleTarget(
  access: Access,
  others: readonly Mount[],
  readOnly: boolean,
  refuse: (problem: string) => StatusError,
): void {
  // A directory of the volume that kubelet shows to a container (subPath) is not a target.
  const target = others.find((mount) => mount.root === "/" || mount.fsType === "devtmpfs" || access.type === "block");
  if (target === undefined) return;
  if (access.mode === Mode.SINGLE_NODE_SINGLE_WRITER || access.mode === Mode.SINGLE_NODE_READER_ONLY) {
    throw refuse(
      `it is published at "${target.path}", and access mode ${Mode[access.mode]} allows one target on a node`,
    );
  }
  if (access.type === "block" && target.options.includes("ro") !== readOnly) {
    throw refuse(
      `it is published at "${target.path}" ${readOnly ? "for writing" : "read-only"}, and a block device is either ` +
        `read-only or writable for all its users on a node`,
    );
  }
}

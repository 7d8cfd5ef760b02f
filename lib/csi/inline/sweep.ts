/** The removal of leftover inline volumes: volumes of this node whose pod ended while the node was down. */
import { sleep } from "../../timing.ts";
import { backgroundContext, type RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { mountTable } from "../../host/mount_table.ts";
import { allControllers } from "../../host/nvme/controllers.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { mountedSomewhere, mountsOf } from "../../host/volume_mounts.ts";
import type { Logger } from "../../log.ts";
import { hostNqn } from "../../namespace.ts";
import type { InlineVolume, InlineVolumeStore } from "../../storage/backend.ts";
import { inlineLock } from "./inline_id.ts";
import { type InlineOptions, inlineStore, type InlineVolumes } from "./options.ts";
import { removeInlineVolume } from "./removal.ts";

const firstDelayMs = 5000;
const longestDelayMs = 300_000;
const longestSweepMs = 300_000;

/**
 * Sweeps until a sweep is complete, or `signal` aborts; never rejects. For the start of the node service: what a node
 * leaves behind when it dies is found when it is back.
 */
export async function sweepUntilSettled(inline: InlineVolumes, log: Logger, signal: AbortSignal): Promise<void> {
  const action = "remove leftover inline volumes";
  for (let delayMs = firstDelayMs;; delayMs = Math.min(delayMs * 2, longestDelayMs)) {
    try {
      if (await inline.sweep(backgroundContext(action, log, longestSweepMs, signal))) return;
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

/** One sweep over all volumes of this node. Answers whether it is complete, or must be repeated later. */
export async function sweepInlineVolumes(options: InlineOptions, ctx: RequestContext): Promise<boolean> {
  const store = inlineStore(options);
  if (typeof store === "string") return true;
  const { volumes, problems } = await store.listVolumes(ctx, options.nodeId);
  for (const error of problems) ctx.log.warning("could not look for leftover inline volumes", { error });
  let isComplete = problems.length === 0;
  for (const volume of volumes) {
    try {
      if (!await sweepVolume(options, ctx, store, volume)) isComplete = false;
    } catch (error) {
      ctx.signal.throwIfAborted();
      // ABORTED: its pod is being started or ended at this moment.
      if (!hasCode(error, "ABORTED")) {
        ctx.log.warning("could not remove a leftover inline volume", {
          name: volume.volumeId,
          error: messageOf(error),
        });
      }
      isComplete = false;
    }
  }
  return isComplete;
}

/** Why a sweep keeps a volume, and whether that answer is final. */
interface ReasonToKeep {
  readonly reason: string;
  readonly isFinal: boolean;
}

/** Removes one volume if it is a leftover. Answers whether that decision is final. */
async function sweepVolume(
  options: InlineOptions,
  ctx: RequestContext,
  store: InlineVolumeStore,
  seen: InlineVolume,
): Promise<boolean> {
  const { volumeId } = seen;
  const sweeping = ctx.with({ volume: seen.uuid, name: volumeId })
    .doing(`remove the leftover inline volume ${volumeId}`);
  const { log } = sweeping;
  // Without the lock at first, so that this does not delay the calls for volumes in use.
  const first = await reasonToKeep(options, seen);
  if (first !== undefined) return keep(log, first);
  using _held = options.locks.take(inlineLock(volumeId), "the removal of leftovers");
  // Found again, because a publish or unpublish may have ended in the meantime.
  const volume = await store.findVolume(ctx, volumeId);
  if (volume === undefined || volume.nodeId !== options.nodeId) return true;
  const second = await reasonToKeep(options, volume);
  if (second !== undefined) return keep(log, second);
  await removeInlineVolume(options, sweeping, volume.uuid, volume);
  log.info("removed a leftover inline volume", { path: volume.targetPath ?? "" });
  return true;
}

function keep(log: Logger, { reason, isFinal }: ReasonToKeep): boolean {
  if (isFinal) log.debug("kept an inline volume", { error: reason });
  else log.warning("kept an inline volume that may be a leftover", { error: reason });
  return isFinal;
}

/** Why a volume of this node is not a leftover, or may not be one; undefined when it certainly is. */
async function reasonToKeep(
  { host, nodeId }: InlineOptions,
  { targetPath, pod, uuid, connectedHosts }: InlineVolume,
): Promise<ReasonToKeep | undefined> {
  const doubt = (reason: string) => ({ reason, isFinal: false });
  // If kubelet's directory is missing or is another one, every target path seems to have gone.
  const podAt = targetPath === undefined || pod.uid === "" ? -1 : targetPath.indexOf(`/${pod.uid}/`);
  if (targetPath === undefined || podAt < 0) return doubt("its labels do not tell the path of its pod");
  const pods = targetPath.slice(0, podAt);
  if (await host.kindOf(pods) !== "directory") return doubt(`${pods}, where its pod was, is not here`);
  // Kubelet removes the directory of the target when it has forgotten the volume.
  if (await canonicalPath(host, targetPath) !== undefined) {
    return { reason: `the directory of "${targetPath}" is there`, isFinal: true };
  }
  const device = await findDevice(host, uuid);
  if (device !== undefined) return await useOf(host, device);
  const ours = hostNqn(nodeId);
  if (!connectedHosts.includes(ours)) return undefined;
  const isConnected = (await allControllers(host)).some((controller) => controller.hostNqn === ours);
  // Either a connection from before a restart that the cluster has not dropped yet, or a second machine with this node
  // ID.
  return isConnected ? undefined : doubt(`a host of this node's name is connected to it, and this machine is not`);
}

async function useOf(host: Host, device: BlockDevice): Promise<ReasonToKeep | undefined> {
  const [mount] = await mountsOf(host, await mountTable(host), device);
  if (mount !== undefined) return { reason: `it is mounted at "${mount.path}"`, isFinal: true };
  const fsType = await mountedSomewhere(host, device);
  if (fsType === undefined) return undefined;
  return { reason: `${fsType} of ${device.path} is mounted where this process cannot see it`, isFinal: false };
}

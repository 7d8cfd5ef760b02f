/**
 * The health calls of CSI 1.13 on the node (docs/reference/csi.md section 20): what is wrong with a volume, and with the connections
 * to the storage, as this machine sees them. See health.ts for why they are behind a switch.
 *
 * Connections are told from sysfs; volumes are asked as NodeGetVolumeStats asks them, so no question hangs.
 */
import { type Node, StorageHealthErrorType as StorageStatus } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { StatusError } from "../../error.ts";
import type { Handlers } from "../../grpc/server.ts";
import type { Host } from "../../host/host.ts";
import { findMapper } from "../../host/mapper.ts";
import { canonicalPath } from "../../host/mount_point.ts";
import { type Mount, mountsAt, mountTable } from "../../host/mount_table.ts";
import { allControllers, controllersOf, type NvmeController } from "../../host/nvme/controllers.ts";
import { type BlockDevice, findDevice } from "../../host/nvme/devices.ts";
import { relationOf } from "../../host/volume_mounts.ts";
import type { AbnormalCondition } from "../../storage/backend.ts";
import type { VolumeId } from "../../volume_id.ts";
import { clipped, toVolumeHealth } from "../controller/health.ts";
import { inlineUuid, isInlineId } from "../inline/inline_volumes.ts";
import { longestVolumeId, requireText } from "../request.ts";
import type { ConditionProbe, MountReport } from "./condition.ts";

export interface NodeHealthOptions {
  readonly host: Host;
  /** The one of NodeGetVolumeStats, so that a volume that does not answer is not asked twice. */
  readonly probe: ConditionProbe;
  /** Tells connections of this driver from others of the machine. */
  readonly hostNqn: string;
  /** Reads a volume ID; throws NOT_FOUND for one that is not this driver's. */
  readonly parseId: (text: string) => Pick<VolumeId, "uuid" | "hostEncryption">;
}

/** NodeGetVolumeHealth and NodeGetStorageHealth. */
export function nodeHealthHandlers({ host, probe, hostNqn, parseId }: NodeHealthOptions) {
  return {
    /**
     * CSI specification 1.13, "NodeGetVolumeHealth". It may come for a volume whose stage or publish was tried only; one
     * that has neither a device nor a path here is NOT_FOUND.
     */
    async nodeGetVolumeHealth(request, call) {
      const action = "tell the health of the volume";
      const volumeId = requireText(action, "volume_id", request.volumeId, longestVolumeId);
      const paths = Object.entries({
        volume_publish_path: request.volumePublishPath,
        staging_target_path: request.stagingTargetPath,
      }).filter(([, path]) => path !== "").map(([field, path]) => requireText(action, field, path, 4095));
      const { uuid, hostEncryption } = isInlineId(volumeId)
        ? { uuid: await inlineUuid(host, volumeId, request.volumePublishPath), hostEncryption: undefined }
        : parseId(volumeId);
      const ctx = call.with({ volume: uuid });
      const device = await (hostEncryption === undefined ? findDevice(host, uuid) : findMapper(host, uuid));
      const conditions = await troublesOf(ctx, `${action} ${uuid}`, uuid, device, paths);
      for (const { message } of conditions) ctx.log.warning("found a volume in trouble", { error: message });
      return { volumeHealth: toVolumeHealth(volumeId, conditions) };
    },

    /** CSI specification 1.13, "NodeGetStorageHealth". A node that is connected to nothing has nothing to tell. */
    async nodeGetStorageHealth() {
      const ours = (await allControllers(host)).filter((controller) =>
        controller.hostNqn === hostNqn && !controller.isDiscovery
      );
      const lost: string[] = [];
      const reduced: string[] = [];
      for (const subsystemNqn of new Set(ours.map((controller) => controller.subsystemNqn))) {
        const controllers = ours.filter((controller) => controller.subsystemNqn === subsystemNqn);
        const down = downOf(controllers);
        if (down.length === 0) continue;
        const list = `${subsystemNqn} (${statesOf(down)})`;
        if (down.length === controllers.length) lost.push(list);
        else reduced.push(list);
      }
      // One entry each: status and reason together may occur once.
      return {
        backendHealth: [
          ...(lost.length === 0 ? [] : [{
            status: StorageStatus.STORAGE_UNREACHABLE,
            reason: "NoLivePath",
            message: clipped(`this node has no live connection to ${lost.join(", ")}`),
          }]),
          ...(reduced.length === 0 ? [] : [{
            status: StorageStatus.STORAGE_DEGRADED,
            reason: "PathsDown",
            message: clipped(`this node has lost some of its connections to ${reduced.join(", ")}`),
          }]),
        ],
      };
    },
  } satisfies Handlers<typeof Node>;

  async function troublesOf(
    ctx: RequestContext,
    action: string,
    uuid: string,
    device: BlockDevice | undefined,
    paths: readonly string[],
  ): Promise<readonly AbnormalCondition[]> {
    const table = await mountTable(host);
    let ours: Mount | undefined;
    let dead: Mount | undefined;
    let wasTried = false;
    for (const given of paths) {
      const path = given.startsWith("/") ? await canonicalPath(host, given) : undefined;
      if (path === undefined) continue;
      const mount = mountsAt(table, path).at(-1);
      // What is mounted is not looked at, it may not answer.
      wasTried ||= mount !== undefined || await host.kindOf(path) !== "absent";
      const relation = mount === undefined ? undefined : await relationOf(host, mount, device);
      if (relation === "dead") dead ??= mount;
      if (relation === "ours") ours ??= mount;
    }
    const conditions: AbnormalCondition[] = [];
    const add = ({ condition }: MountReport) => condition === undefined ? undefined : conditions.push(condition);
    if (dead !== undefined) {
      add(await probe.ofDeadMount(ctx, uuid, dead));
    } else if (device !== undefined) {
      add(ours === undefined ? await probe.ofDevice(ctx, device) : await probe.ofMount(ctx, device, ours));
    } else {
      const problem = "this node has no block device of it";
      if (!wasTried) throw new StatusError("NOT_FOUND", `Cannot ${action}: ${problem}, and none of the paths is there`);
      conditions.push({ usable: false, reason: "NoDevice", message: problem });
    }
    if (device !== undefined) {
      const controllers = await controllersOf(host, device.subsystemNqn);
      const down = downOf(controllers);
      if (down.length > 0 && down.length < controllers.length) {
        conditions.push({
          usable: true,
          reason: "PathsDown",
          message: `${down.length} of ${controllers.length} connections to ${device.subsystemNqn} are not live ` +
            `(${statesOf(down)}): reads and writes go on`,
        });
      }
    }
    return conditions;
  }
}

function downOf(controllers: readonly NvmeController[]): readonly NvmeController[] {
  return controllers.filter(({ state }) => state !== "live");
}

/** `nvme0 connecting, nvme1 resetting`. */
function statesOf(controllers: readonly NvmeController[]): string {
  return controllers.map(({ name, state }) => `${name} ${state}`).join(", ");
}

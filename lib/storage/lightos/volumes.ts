/** Reads, changes and describes LightOS volumes (facts: docs/reference/lightos-api.md sections 6.6 to 6.8). */
import {
  DurosAPI,
  ProtectionStateEnum as Protection,
  type Volume as LightosVolume,
  Volume_StateEnum as State,
} from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import { formatVolumeId, type VolumeId } from "../../volume_id.ts";
import type { AbnormalCondition, Volume } from "../backend.ts";
import { growingDelays } from "../polling.ts";
import { hostsIn, volumeAcl } from "./acl.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import { pause, unknownStateError } from "./waiting.ts";

/** States of volumes that do not exist (any more): being deleted, or left over from a failed creation. */
export const goneStates: readonly State[] = [State.Deleting, State.Deleted, State.Failed];

/** The volume; throws NOT_FOUND when it is absent, being deleted, or left over from a failed creation. */
export async function readVolume(ctx: RequestContext, cluster: Cluster, id: VolumeId): Promise<LightosVolume> {
  const volume = await cluster.call(ctx, DurosAPI.method.getVolume, { UUID: id.uuid, projectName: id.project ?? "" });
  if (goneStates.includes(volume.state)) {
    throw ctx.error("NOT_FOUND", `LightOS shows the volume as ${State[volume.state]}`);
  }
  return volume;
}

/** The fields of UpdateVolume that are to change. */
export interface VolumeUpdate {
  readonly acl?: { readonly values: string[] };
  /** Bytes, decimal. */
  readonly size?: string;
  /** `true` or `false`. */
  readonly compression?: string;
  readonly qosPolicyID?:
    | { readonly case: "qosPolicyName"; readonly value: string }
    | { readonly case: "qosPolicyUUID"; readonly value: string };
}

/** How `changeVolume` changes a volume. */
export interface ChangeOptions {
  /** What to change of the volume as it is; undefined: nothing. */
  readonly decide: (volume: LightosVolume) => VolumeUpdate | undefined;
  /** Whether a change that LightOS confirmed counts as done, or only one that it shows. */
  readonly confirmation: "look again" | "trust the answer";
}

/**
 * Reads the volume, lets `decide` say what to change, and changes it under the ETag of what was read; begins again when
 * another change came first, the volume is in between states, or the answer was lost. Returns the volume that needs no
 * more change; with "trust the answer", the one that was read before a change which LightOS confirmed.
 */
export async function changeVolume(
  ctx: RequestContext,
  cluster: Cluster,
  id: VolumeId,
  { decide, confirmation }: ChangeOptions,
): Promise<LightosVolume> {
  const delays = growingDelays();
  let isConfirmed = false;
  for (;;) {
    const volume = await readVolume(ctx, cluster, id);
    const change = decide(volume);
    if (change === undefined) return volume;
    switch (volume.state) {
      case State.Available:
      case State.Migrating:
        if (!isConfirmed) break;
        isConfirmed = false;
        await pause(ctx, delays, "LightOS has taken the change and does not show it");
        continue;
      case State.Creating:
      case State.Updating:
      case State.Rollback:
      case State.Unknown:
        await pause(ctx, delays, `LightOS shows the volume as ${State[volume.state]}`);
        continue;
      default:
        throw unknownStateError(ctx, "volume", volume);
    }
    try {
      const request = { UUID: id.uuid, projectName: id.project ?? "", ...change };
      await cluster.call(ctx, DurosAPI.method.updateVolume, request, { "if-match": volume.ETag });
      if (confirmation === "trust the answer") return volume;
      isConfirmed = true;
    } catch (error) {
      // FAILED_PRECONDITION means another ETag or another state: both are seen by reading again.
      const isWorthAnother = error instanceof LightosError &&
        (error.outcomeUnknown || hasCode(error, "FAILED_PRECONDITION", "ABORTED", "UNAVAILABLE"));
      if (!isWorthAnother) throw error;
      await pause(ctx, delays, messageOf(error));
    }
  }
}

/** A volume as the controller sees it; `id` is its ID there. */
export function toVolume(id: VolumeId, volume: LightosVolume): Volume {
  return {
    id: formatVolumeId(id),
    uuid: id.uuid,
    name: volume.name,
    capacityBytes: volume.size,
    hosts: hostsIn(volumeAcl(volume)),
    condition: volumeCondition(volume),
  };
}

/**
 * What is wrong with a volume now; undefined when nothing is. LightOS counts a volume that accepts no writes as one that
 * cannot be used (docs/reference/lightos-api.md section 6.6).
 */
export function volumeCondition(
  { state, protectionState, rebuildProgress }: LightosVolume,
): AbnormalCondition | undefined {
  const rebuild = rebuildProgress === "" || rebuildProgress === "None" ? "" : `, rebuild ${rebuildProgress}`;
  switch (protectionState) {
    case Protection.Degraded:
      return {
        usable: true,
        reason: "ReplicaMissing",
        message: `a replica is missing: reads and writes go on (LightOS: Degraded${rebuild})`,
      };
    case Protection.ReadOnly:
      return {
        usable: false,
        reason: "ReadOnly",
        message: `too few replicas are left: writes fail (LightOS: ReadOnly${rebuild})`,
      };
    case Protection.NotAvailable:
      return {
        usable: false,
        reason: "NotAvailable",
        message: `no replica can be reached: reads and writes fail (LightOS: NotAvailable${rebuild})`,
      };
    default:
      if (state !== State.Rollback) return undefined;
      return {
        usable: false,
        reason: "Rollback",
        message: "its content is being set back to a snapshot (LightOS: Rollback)",
      };
  }
}

/**
 * What all parts of the LightOS backend know of a volume: how to read, change and describe one, and how to wait for it
 * (facts: docs/reference/lightos-api.md sections 6.6 to 6.8).
 */
import { type RequestContext, sleep } from "../../context.ts";
import { hasCode, isFinal, messageOf, type StatusCode, StatusError } from "../../error.ts";
import { formatVolumeId, type VolumeId } from "../../volume_id.ts";
import {
  DurosAPI,
  ProtectionStateEnum as Protection,
  type Volume as LightosVolume,
  Volume_StateEnum as State,
} from "../../../proto/gen/lightos_pb.ts";
import type { AbnormalCondition, Volume } from "../backend.ts";
import { type Cluster, codeOf, LightosError } from "./cluster.ts";

/** The volume; throws NOT_FOUND when it is absent, being deleted, or the husk of a failed creation. */
export async function readVolume(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: VolumeId,
): Promise<LightosVolume> {
  const volume = await cluster.call(ctx, action, DurosAPI.method.getVolume, {
    UUID: id.uuid,
    projectName: id.project ?? "",
  });
  if ([State.Deleting, State.Deleted, State.Failed].includes(volume.state)) {
    throw new StatusError("NOT_FOUND", `Cannot ${action}: LightOS shows the volume as ${State[volume.state]}`);
  }
  return volume;
}

/** What UpdateVolume is to change. */
export interface Change {
  readonly acl?: { readonly values: string[] };
  /** Bytes, decimal. */
  readonly size?: string;
  /** `true` or `false`. */
  readonly compression?: string;
  readonly qosPolicyID?:
    | { readonly case: "qosPolicyName"; readonly value: string }
    | { readonly case: "qosPolicyUUID"; readonly value: string };
}

/**
 * Reads the volume, lets `decide` say what to change, and changes it under the ETag of what was read; begins anew when
 * somebody else was quicker, the volume is in between states, or the answer was lost. Answers the volume that needs no
 * change any more; with "trust the answer", the one that was read before a change which LightOS confirmed.
 */
export async function changeVolume(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: VolumeId,
  decide: (volume: LightosVolume) => Change | undefined,
  confirmation: "look again" | "trust the answer" = "look again",
): Promise<LightosVolume> {
  const delays = growingDelays();
  let isConfirmed = false;
  for (;;) {
    const volume = await readVolume(ctx, cluster, action, id);
    const change = decide(volume);
    if (change === undefined) return volume;
    switch (volume.state) {
      case State.Available:
      case State.Migrating:
        if (!isConfirmed) break;
        isConfirmed = false;
        await pause(ctx, delays, action, "LightOS has taken the change and does not show it");
        continue;
      case State.Creating:
      case State.Updating:
      case State.Rollback:
      case State.Unknown:
        await pause(ctx, delays, action, `LightOS shows the volume as ${State[volume.state]}`);
        continue;
      default:
        throw unknownState(action, "volume", volume);
    }
    try {
      const request = { UUID: id.uuid, projectName: id.project ?? "", ...change };
      await cluster.call(ctx, action, DurosAPI.method.updateVolume, request, { "if-match": volume.ETag });
      if (confirmation === "trust the answer") return volume;
      isConfirmed = true;
    } catch (error) {
      // FAILED_PRECONDITION is another ETag or another state: both are seen by reading again.
      const worthAnother = error instanceof LightosError &&
        (error.outcomeUnknown || hasCode(error, "FAILED_PRECONDITION", "ABORTED", "UNAVAILABLE"));
      if (!worthAnother) throw error;
      await pause(ctx, delays, action, messageOf(error));
    }
  }
}

/** A volume as the controller sees it; `id` is how it is called there. */
export function toVolume(id: VolumeId, volume: LightosVolume): Volume {
  return {
    id: formatVolumeId(id),
    uuid: id.uuid,
    name: volume.name,
    capacityBytes: volume.size,
    hosts: hostsIn(aclOf(volume)),
    condition: conditionOf(volume),
  };
}

/**
 * What is wrong with a volume now; undefined when it is well. LightOS counts a volume that takes no writes as one that
 * cannot be used (docs/reference/lightos-api.md section 6.6).
 */
export function conditionOf({ state, protectionState, rebuildProgress }: LightosVolume): AbnormalCondition | undefined {
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

/** A volume or a snapshot. Their states have the same numbers as far as both have them (docs/reference/lightos-api.md 6.6). */
interface Made {
  readonly UUID: string;
  readonly projectName: string;
  readonly state: number;
}

/**
 * Waits until a new volume or snapshot can be used; undefined when it went away meanwhile.
 *
 * @throws StatusError UNAVAILABLE when its creation failed: the husk cannot be deleted and does not block the name, so the
 *   repeat makes another; and when nobody can look at it any more
 */
export async function waitUntilSettled<T extends Made>(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  what: "volume" | "snapshot",
  made: T,
  delays: Iterator<number, never>,
  look: (made: T) => Promise<T>,
): Promise<T | undefined> {
  for (let now = made;;) {
    switch (now.state) {
      case State.Available:
      case State.Updating:
      case State.Migrating:
        return now;
      case State.Deleting:
      case State.Deleted:
        return undefined;
      case State.Failed:
        throw new StatusError(
          "UNAVAILABLE",
          `Cannot ${action}: LightOS at ${cluster.lastAddress} could not make it (${what} ${now.UUID} is Failed), ` +
            `the next attempt makes another`,
        );
      case State.Creating:
      case State.Rollback:
      case State.Unknown:
        break;
      default:
        throw unknownState(action, what, now);
    }
    await pause(ctx, delays, action, `LightOS shows ${what} ${now.UUID} as ${State[now.state]}`);
    try {
      now = await look(now);
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return undefined;
      // It is made: a caller that forgets it now would leave it behind.
      throw error instanceof LightosError && (isFinal(error) || isOverload(error)) ? repeatable(error) : error;
    }
  }
}

/**
 * Looks for what an earlier call may have made.
 *
 * @throws StatusError UNAVAILABLE, which is not final, when the server fails with INTERNAL or is asked too much
 *   (RESOURCE_EXHAUSTED); else what `look` throws
 */
export async function lookAgainLater<T>(look: () => Promise<T>): Promise<T> {
  try {
    return await look();
  } catch (error) {
    const isServers = error instanceof LightosError && (error.code === "INTERNAL" || isOverload(error));
    throw isServers ? repeatable(error) : error;
  }
}

/** Whether a look was refused for the server's sake: csi-provisioner gives up a volume after RESOURCE_EXHAUSTED. */
function isOverload({ code }: LightosError): boolean {
  return code === "RESOURCE_EXHAUSTED";
}

/** The error with a code after which a caller repeats its call. */
function repeatable(error: LightosError): StatusError {
  return new StatusError("UNAVAILABLE", `${error.message}; repeat the call`, { cause: error });
}

/** INTERNAL for a state that this driver does not know. */
export function unknownState(
  action: string,
  what: "volume" | "snapshot",
  { UUID, state }: Pick<Made, "UUID" | "state">,
): StatusError {
  return new StatusError("INTERNAL", `Cannot ${action}: LightOS shows ${what} ${UUID} in unknown state ${state}`);
}

/** Waits before the next look; at the deadline the error tells what was last seen. */
export async function pause(
  ctx: RequestContext,
  delays: Iterator<number, never>,
  action: string,
  seen: string,
): Promise<void> {
  try {
    await sleep(delays.next().value, ctx.signal);
  } catch (reason) {
    throw new StatusError(codeOf(ctx.signal), `Cannot ${action} in time: ${seen}; repeat the call`, { cause: reason });
  }
}

/** Delays between looks at a state that is about to change. */
export function* growingDelays(): Generator<number, never> {
  for (let ms = 100;; ms = Math.min(ms * 1.5, 2000)) yield ms;
}

/**
 * What is found by `look` after the cluster has refused to make something of a name.
 *
 * @throws the refusal when the look is refused for the same reason; UNAVAILABLE, which is not final, when nobody can tell
 *   whether it is there
 */
export async function afterRefusal<T>(action: string, refusal: LightosError, look: () => Promise<T>): Promise<T> {
  try {
    return await look();
  } catch (error) {
    if (!(error instanceof LightosError)) throw error;
    if (error.code === "DEADLINE_EXCEEDED" || error.code === "CANCELLED") throw error;
    // A server that fails, or is asked too often, does not tell that nothing was made.
    const isRefusedToo = error.code === refusal.code && isFinal(error) && !refusal.outcomeUnknown;
    if (isRefusedToo || (error.code === refusal.code && error.code === "UNAVAILABLE")) throw refusal;
    const words = error.message.replace(`Cannot ${action}: `, "");
    throw new StatusError(
      "UNAVAILABLE",
      `${refusal.message}; and whether it is there already cannot be seen: ${words}`,
      {
        cause: error,
      },
    );
  }
}

/** Codes that the cluster gives before it begins anything. */
export const notDoneCodes: ReadonlySet<StatusCode> = new Set(
  [
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "RESOURCE_EXHAUSTED",
  ] satisfies StatusCode[],
);

/** What an access list holds that lets no host in, and one that lets any host in (docs/reference/lightos-api.md section 1). */
export const aclNone = "ALLOW_NONE";
export const aclAny = "ALLOW_ANY";

/** The access list, sorted, each entry once. */
export function aclOf(volume: LightosVolume): readonly string[] {
  return [...new Set(volume.acl?.values ?? [])].sort();
}

/** The host NQNs of an access list. */
export function hostsIn(acl: readonly string[]): readonly string[] {
  return acl.filter((entry) => entry !== aclNone && entry !== aclAny);
}

/**
 * Waiting for what LightOS makes, and looking for it after an unclear answer (facts: docs/reference/lightos-api.md
 * sections 6.6 to 6.8). After any failure that leaves the outcome open, what the cluster shows decides.
 */
import { Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, isFinal, type StatusCode, StatusError } from "../../error.ts";
import { abortCode, lateError, pause as pauseUnlessLate } from "../polling.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";

/** Codes that the cluster answers before it begins anything. */
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

/**
 * A volume or a snapshot. Their states have the same numbers as far as both have them (docs/reference/lightos-api.md
 * 6.6).
 */
interface StatefulObject {
  readonly UUID: string;
  readonly projectName: string;
  readonly state: number;
}

/** How to wait for a new volume or snapshot. */
export interface CreationWait<T extends StatefulObject> {
  readonly what: "volume" | "snapshot";
  /** The object as it was created or found. */
  readonly created: T;
  readonly delays: Iterator<number, never>;
  /** Reads the object again. */
  readonly read: (created: T) => Promise<T>;
}

/**
 * Waits until a new volume or snapshot can be used; undefined when it has disappeared meanwhile.
 *
 * @throws StatusError UNAVAILABLE when its creation failed (what is left cannot be deleted and does not block the name,
 *   so the next attempt makes another), and when it cannot be read any more
 */
export async function waitUntilSettled<T extends StatefulObject>(
  ctx: RequestContext,
  cluster: Cluster,
  { what, created, delays, read }: CreationWait<T>,
): Promise<T | undefined> {
  for (let now = created;;) {
    switch (now.state) {
      case State.Available:
      case State.Updating:
      case State.Migrating:
        return now;
      case State.Deleting:
      case State.Deleted:
        return undefined;
      case State.Failed:
        throw ctx.error(
          "UNAVAILABLE",
          `LightOS at ${cluster.lastAddress} could not make it (${what} ${now.UUID} is Failed), ` +
            `the next attempt makes another`,
        );
      case State.Creating:
      case State.Rollback:
      case State.Unknown:
        break;
      default:
        throw unknownStateError(ctx, what, now);
    }
    await pause(ctx, delays, `LightOS shows ${what} ${now.UUID} as ${State[now.state]}`);
    try {
      now = await read(now);
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return undefined;
      // It exists: a caller that forgets it now would leave it behind.
      throw error instanceof LightosError && isFinal(error) ? repeatableError(error) : error;
    }
  }
}

/**
 * Looks for what an earlier call may have made.
 *
 * @throws StatusError UNAVAILABLE, which is not final, when the server fails with INTERNAL; else what `look` throws
 */
export async function lookForEarlier<T>(look: () => Promise<T>): Promise<T> {
  try {
    return await look();
  } catch (error) {
    throw error instanceof LightosError && error.code === "INTERNAL" ? repeatableError(error) : error;
  }
}

/**
 * Looks for an object of some name after the cluster has rejected its creation.
 *
 * @throws the rejection when the look is rejected for the same reason; UNAVAILABLE, which is not final, when it stays
 *   unclear whether the object exists
 */
export async function lookAfterRejection<T>(
  ctx: RequestContext,
  rejection: LightosError,
  look: () => Promise<T>,
): Promise<T> {
  try {
    return await look();
  } catch (error) {
    if (!(error instanceof LightosError)) throw error;
    if (error.code === "DEADLINE_EXCEEDED" || error.code === "CANCELLED") throw error;
    // A server that fails, or is overloaded, does not say that nothing was made.
    const isRejectedToo = error.code === rejection.code && isFinal(error) && !rejection.outcomeUnknown;
    if (isRejectedToo || (error.code === rejection.code && error.code === "UNAVAILABLE")) throw rejection;
    const words = error.message.replace(`Cannot ${ctx.action}: `, "");
    throw new StatusError(
      "UNAVAILABLE",
      `${rejection.message}; and whether it is there already cannot be seen: ${words}`,
      { cause: error },
    );
  }
}

/** INTERNAL for a state that this driver does not know. */
export function unknownStateError(
  ctx: RequestContext,
  what: "volume" | "snapshot",
  { UUID, state }: Pick<StatefulObject, "UUID" | "state">,
): StatusError {
  return ctx.error("INTERNAL", `LightOS shows ${what} ${UUID} in unknown state ${state}`);
}

/** Waits before the next look; when the call ends first, the error says what was `seen` last. */
export async function pause(ctx: RequestContext, delays: Iterator<number, never>, seen: string): Promise<void> {
  await pauseUnlessLate(ctx, delays, (reason) => lateError(ctx, abortCode(ctx.signal), seen, reason));
}

/** The error with a code after which a caller repeats its call. */
function repeatableError(error: LightosError): StatusError {
  return new StatusError("UNAVAILABLE", `${error.message}; repeat the call`, { cause: error });
}

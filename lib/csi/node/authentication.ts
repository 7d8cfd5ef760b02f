/** The DH-HMAC-CHAP keys that a node connects a volume with. */
import { type DhchapKeys, givenKeys, keysFor } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode } from "../../error.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import { hostNqn, type RemoteNamespace } from "../../namespace.ts";
import type { Secrets } from "../../secrets.ts";
import type { Authentication } from "../../storage/backend.ts";

/** How this node connects, under which name, and where it can read keys. */
export interface KeySources {
  readonly attacher: Attacher;
  readonly nodeId: string;
  readonly authentication?: Authentication | undefined;
}

/** The volume to connect, and the secrets of the call. */
export interface KeyRequest {
  readonly volumeId: string;
  readonly namespace: RemoteNamespace;
  readonly secrets: Secrets;
}

/**
 * The keys in the secrets of a call (`dhchap-key`, `dhchap-ctrl-key`), else the cluster's. Undefined when the volume
 * asks for none, or when the program that connects it has its own.
 *
 * @throws StatusError INVALID_ARGUMENT for a bad key, FAILED_PRECONDITION when there is none
 */
export async function connectionKeys(
  { attacher, nodeId, authentication }: KeySources,
  ctx: RequestContext,
  { volumeId, namespace: { inBandAuth: kind }, secrets }: KeyRequest,
): Promise<DhchapKeys | undefined> {
  if (kind === undefined || !attacher.takesKeys) return undefined;
  try {
    return await keysFor(kind, givenKeys(secrets), () => {
      if (authentication !== undefined) {
        return authentication.keysOf(ctx, secrets, volumeId, { hostNqn: hostNqn(nodeId), kind });
      }
      throw ctx.error("FAILED_PRECONDITION", "the node-stage secret of the call brings no key");
    });
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    throw ctx.error("INVALID_ARGUMENT", error.message.replace(/^Cannot /, "cannot "));
  }
}

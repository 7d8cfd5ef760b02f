/** The keys that a node connects a volume with. */
import type { RequestContext, Secrets } from "../../context.ts";
import { type DhchapKeys, givenKeys, keysFor } from "../../auth_key.ts";
import { hasCode, StatusError } from "../../error.ts";
import type { Attacher } from "../../host/attach/attacher.ts";
import { hostNqn, type RemoteNamespace } from "../../namespace.ts";
import type { Authentication } from "../../storage/backend.ts";

/** Who connects, under which name, and who can be asked for keys. */
export interface KeySources {
  readonly attacher: Attacher;
  readonly nodeId: string;
  readonly authentication?: Authentication | undefined;
}

/**
 * The keys in the secrets of a call (`dhchap-key`, `dhchap-ctrl-key`), else the cluster's; undefined when the volume asks for
 * none, or who connects it has keys of its own.
 *
 * @throws StatusError INVALID_ARGUMENT for a bad key, FAILED_PRECONDITION when nobody has one
 */
export async function connectionKeys(
  ctx: RequestContext,
  action: string,
  volumeId: string,
  { inBandAuth: kind }: RemoteNamespace,
  secrets: Secrets,
  { attacher, nodeId, authentication }: KeySources,
): Promise<DhchapKeys | undefined> {
  if (kind === undefined || !attacher.takesKeys) return undefined;
  try {
    return await keysFor(kind, givenKeys(secrets), () => {
      if (authentication !== undefined) {
        return authentication.keysOf(ctx, secrets, volumeId, { hostNqn: hostNqn(nodeId), kind });
      }
      throw new StatusError("FAILED_PRECONDITION", `Cannot ${action}: the node-stage secret of the call brings no key`);
    });
  } catch (error) {
    if (!hasCode(error, "INVALID_ARGUMENT")) throw error;
    throw new StatusError("INVALID_ARGUMENT", `Cannot ${action}: ${error.message.replace(/^Cannot /, "cannot ")}`);
  }
}

/**
 * How a full cluster is reported, call by call.
 *
 * RESOURCE_EXHAUSTED is not final for most sidecars: they repeat the same request until it succeeds, and until then the
 * object can neither be changed nor deleted. So only CreateVolume keeps that code, because csi-provisioner treats it as
 * final there. LightOS may mean overload by this code too: what only reads gets UNAVAILABLE for it (lightos/endpoints.ts),
 * because a read needs no space. The reasons for each code are in docs/reference/csi.md 2.5.
 */
import { hasCode, type StatusCode, StatusError } from "../../error.ts";

/**
 * The result of `work`. An error RESOURCE_EXHAUSTED, which storage clusters return before they begin anything, gets the
 * code `code` instead, and `advice` after its message.
 */
export async function withFullClusterCode<T>(code: StatusCode, advice: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (!hasCode(error, "RESOURCE_EXHAUSTED")) throw error;
    throw new StatusError(code, `${error.message}${advice}`, { cause: error });
  }
}

/**
 * How a full cluster is reported, call by call.
 *
 * RESOURCE_EXHAUSTED is not final for most sidecars: they repeat the same request until it succeeds, and let nobody change
 * or delete what was asked for until then. So only CreateVolume keeps it, which csi-provisioner takes for final. The reasons
 * for each code are in docs/reference/csi.md 2.5.
 */
import { hasCode, type StatusCode, StatusError } from "../../error.ts";

/**
 * Answers what `work` answers. RESOURCE_EXHAUSTED, which storage clusters give before they begin anything, becomes `code`, and
 * `advice` follows its message.
 */
export async function whenFull<T>(code: StatusCode, advice: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (!hasCode(error, "RESOURCE_EXHAUSTED")) throw error;
    throw new StatusError(code, `${error.message}${advice}`, { cause: error });
  }
}

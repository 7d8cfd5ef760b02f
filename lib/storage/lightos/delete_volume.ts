/** DeleteVolume on LightOS (facts: docs/reference/lightos-api.md section 6.7). */
import { DurosAPI, type Volume as LightosVolume, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, messageOf } from "../../error.ts";
import type { VolumeId } from "../../volume_id.ts";
import { growingDelays } from "../polling.ts";
import { hostsIn, nameHosts, volumeAcl } from "./acl.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import { removeHelpersOf } from "./helper_snapshots.ts";
import { readVolume } from "./volumes.ts";
import { notDoneCodes, pause, unknownStateError } from "./waiting.ts";

/** Deletes a volume; absent: done. Throws FAILED_PRECONDITION that names the hosts that may still connect to it. */
export async function deleteVolume(call: RequestContext, cluster: Cluster, id: VolumeId): Promise<void> {
  const ctx = call.doing(`delete volume ${id.uuid}`);
  const delays = growingDelays();
  for (;;) {
    let volume: LightosVolume;
    try {
      volume = await readVolume(ctx, cluster, id);
    } catch (error) {
      // Being deleted, deleted, or left over from a failed creation, which LightOS does not allow to be deleted.
      if (hasCode(error, "NOT_FOUND")) return;
      throw error;
    }
    if (![State.Available, State.Migrating].includes(volume.state)) {
      if (State[volume.state] === undefined) throw unknownStateError(ctx, "volume", volume);
      await pause(ctx, delays, `LightOS shows it as ${State[volume.state]}`);
      continue;
    }
    const hosts = hostsIn(volumeAcl(volume));
    if (hosts.length > 0) {
      throw ctx.error(
        "FAILED_PRECONDITION",
        `${nameHosts(hosts)} may still connect to it, detach it there first`,
      );
    }
    // Before the volume: once it is gone, no call comes back for them.
    await removeHelpersOf(ctx, cluster, volume, id.project);
    try {
      await cluster.call(ctx, DurosAPI.method.deleteVolume, { UUID: id.uuid, projectName: id.project ?? "" });
      return;
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return;
      if (!(error instanceof LightosError) || notDoneCodes.has(error.code)) throw error;
      // Older servers answer INTERNAL for a volume that is gone: the next look shows it.
      await pause(ctx, delays, messageOf(error));
    }
  }
}

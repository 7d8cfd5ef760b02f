/** Write protection of a raw block volume on this node. */
import type { RequestContext } from "../../context.ts";
import { reasonOf } from "../../host/command_reason.ts";
import type { Host } from "../../host/host.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";

/**
 * Makes the kernel refuse writes to the device, or accept them again, unless it does so already. A read-only bind mount
 * of a device node is not enough: it does not prevent writes to the device behind the node.
 *
 * @param options.force runs the command whatever the kernel shows of the device
 * @throws StatusError FAILED_PRECONDITION when blockdev fails
 */
export async function setReadOnly(
  host: Host,
  ctx: RequestContext,
  device: BlockDevice,
  { readOnly, force = false }: { readonly readOnly: boolean; readonly force?: boolean },
): Promise<void> {
  if (device.readOnly === readOnly && !force) return;
  const result = await host.run("blockdev", [readOnly ? "--setro" : "--setrw", device.path], {
    signal: ctx.signal,
    onAbort: "finish",
    log: ctx.log,
  });
  if (result.code === 0) return;
  throw ctx.doing(`make ${device.path} ${readOnly ? "read-only" : "writable"}`)
    .error("FAILED_PRECONDITION", reasonOf("blockdev", result));
}

/** `lbcsi detach`: undoes `lbcsi attach`. */
import type { RequestContext } from "../context.ts";
import { defineCommand } from "./command.ts";
import { assertDiscoveryDirectory } from "./discovery_directory.ts";
import { exitStatusText, volumeOptions } from "./option_groups.ts";
import type { Settings } from "./options.ts";
import { runShellCommand } from "./shell_command.ts";
import { openVolumeRequest } from "./volume_request.ts";

const helpText = `usage: lbcsi detach VOLUME_ID --node-id ID [--mount DIR] ...
       lbcsi detach --uuid UUID --nqn NQN --node-id ID [--mount DIR] ...

Undoes lbcsi attach with the same VOLUME_ID (or --uuid and --nqn), --mount, --attach and --node-id: unmounts, disconnects
unless another volume of the subsystem is here, and revokes this host's access. It fails while anything else uses the
volume, removes any partial result, and may be repeated.

${exitStatusText}`;

/** `lbcsi detach`. */
export const detachCommand = defineCommand(volumeOptions, run, helpText);

async function run(settings: Settings<typeof volumeOptions>): Promise<number> {
  assertDiscoveryDirectory(settings["discovery-dir"]);
  return await runShellCommand("detach the volume", settings, (ctx) => detach(ctx, settings));
}

async function detach(ctx: RequestContext, settings: Settings<typeof volumeOptions>): Promise<void> {
  await using opened = await openVolumeRequest(settings, ctx.log);
  const { machine, request } = opened;
  const { allControllers } = await import("../host/nvme/controllers.ts");
  const isConnected = (await allControllers(machine.host)).some(({ hostNqn }) => hostNqn === machine.hostNqn);
  const { assertReady, mountPrograms } = await import("./readiness.ts");
  await assertReady(ctx, machine.host, {
    rights: settings.attach === "direct" || settings.mount !== undefined,
    // A machine with connections has the module, and without connections there is nothing to do.
    nvme: false,
    programs: {
      ...(settings.attach === "direct" && isConnected ? { "nvme-cli": ["nvme"] } : {}),
      ...(settings.mount === undefined ? {} : mountPrograms(undefined)),
    },
  });
  const { detachVolume } = await import("./detach_volume.ts");
  await detachVolume(ctx, machine, request, settings.mount);
}

/** `lbcsi list`: shows the volumes on this machine. */
import type { RequestContext } from "../context.ts";
import { defineCommand } from "./command.ts";
import { assertDiscoveryDirectory } from "./discovery_directory.ts";
import { hostOptions, shellLogOptions, volumeOptions } from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";
import { runShellCommand } from "./shell_command.ts";

const listOptions = {
  uuid: { ...volumeOptions.uuid, meaning: "this volume only; exit status 1 when it is not here" },
  all: { meaning: "also volumes and connections over TCP that other programs have made", schema: switchSchema },
  json: { meaning: "print JSON", schema: switchSchema },
  "discovery-dir": hostOptions["discovery-dir"],
  sysfs: hostOptions.sysfs,
  dev: hostOptions.dev,
  ...shellLogOptions,
} as const satisfies Options;

const helpText =
  `Shows volumes with device, paths and mounts, from sysfs and the mount table. It does not hang on a dead path: a device is
read only when it has a live one, for two seconds at most. With --dev and --sysfs it shows the volumes of that device tree.

Exit status: 0, or 1 when it failed or --uuid names a volume that is not here, 2 for bad options.`;

/** `lbcsi list`. */
export const listCommand = defineCommand(listOptions, run, helpText);

async function run(settings: Settings<typeof listOptions>): Promise<number> {
  assertDiscoveryDirectory(settings["discovery-dir"]);
  return await runShellCommand("list volumes", { ...settings, timeout: 60 }, (ctx) => list(ctx, settings));
}

async function list(ctx: RequestContext, settings: Settings<typeof listOptions>): Promise<void> {
  const { createLinuxHost } = await import("../host/linux_host.ts");
  const { listVolumes } = await import("./list_volumes.ts");
  const { listAsJson, listAsText } = await import("./list_report.ts");
  const { describeCheck, findMissing } = await import("./readiness.ts");
  const host = createLinuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
  // It shows what there is even on a machine that is not ready.
  for (const check of await findMissing(host, { rights: true, nvme: true, programs: {} })) {
    console.error(`lbcsi list: ${describeCheck(check)}`);
  }
  const listed = await listVolumes(ctx, {
    host,
    uuid: settings.uuid,
    all: settings.all,
    discoveryDirectory: settings["discovery-dir"],
  });
  if (settings.uuid !== undefined && listed.volumes.length === 0) {
    throw ctx.doing(`list volume ${settings.uuid}`).error("NOT_FOUND", "it is not on this machine");
  }
  console.log(settings.json ? listAsJson(listed) : listAsText(listed));
}

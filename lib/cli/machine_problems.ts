/** Logs the problems of this machine that `lbcsi doctor` would find, before the first volume meets them. */
import { unlessAborted } from "../timing.ts";
import { backgroundContext } from "../context.ts";
import { messageOf } from "../error.ts";
import type { Logger } from "../log.ts";
import { attachMode, isSubsystemOf } from "./backends.ts";
import {
  type controllerAndNodeOptions,
  hostOptions,
  kubeletDirectoryOption,
  type maxVolumesOption,
  type serviceOptions,
} from "./option_groups.ts";
import type { Settings } from "./options.ts";

/** The settings of the node service that the checks depend on. */
export type MachineSettings =
  & Pick<Settings<typeof serviceOptions>, "backend">
  & Pick<Settings<typeof controllerAndNodeOptions>, "default-fs">
  & Settings<typeof hostOptions>
  & Settings<typeof maxVolumesOption>;

const checksMs = 60_000;

/**
 * Logs one warning for each problem of this machine. The node service starts it and does not wait for it. It throws
 * nothing: checks that fail are logged too.
 */
export async function logMachineProblems(settings: MachineSettings, log: Logger, signal: AbortSignal): Promise<void> {
  try {
    const { runMachineChecks } = await import("./doctor/machine.ts");
    const { logProblems } = await import("./readiness.ts");
    const { createLinuxHost } = await import("../host/linux_host.ts");
    const { sysfs, dev, backend } = settings;
    const ctx = backgroundContext("check this machine", log, checksMs, signal);
    const running = runMachineChecks(ctx, {
      // Without metrics: the commands of these checks are not part of the driver's work.
      host: createLinuxHost({ log, sysfsRoot: sysfs, devRoot: dev }),
      nodeId: settings["node-id"],
      attach: attachMode(settings),
      discoveryDirectory: settings["discovery-dir"],
      kubeletDirectory: Deno.env.get("LB_CSI_KUBELET_DIR") ?? kubeletDirectoryOption["kubelet-dir"].fallback,
      maxVolumes: settings["max-volumes"],
      isOurs: isSubsystemOf(backend),
      defaultFsType: settings["default-fs"],
    });
    // A mount that does not answer must not hold back the other results.
    const checks = await unlessAborted(running, ctx.signal);
    // A simulated machine has no kernel modules.
    const isThisMachine = sysfs === hostOptions.sysfs.fallback && dev === hostOptions.dev.fallback;
    logProblems(log, checks.filter(({ name }) => isThisMachine || name !== "NVMe/TCP"));
  } catch (error) {
    if (!signal.aborted) log.warning("could not check this machine for problems", { error: messageOf(error) });
  }
}

/** `lbcsi identity`: serves the CSI identity service alone. */
import { createLogger } from "../log.ts";
import { defineCommand, type ListCommands } from "./command.ts";
import { assertBackendOptions } from "./compose.ts";
import { serviceOptions } from "./option_groups.ts";
import type { Settings } from "./options.ts";
import { assertPermitted } from "./permissions.ts";
import { serveCsi } from "./serve_csi.ts";
import { serveMetrics } from "./serve_metrics.ts";
import { warnOfUnknownVariables } from "./unknown_variables.ts";

/** `lbcsi identity`. */
export const identityCommand = defineCommand(serviceOptions, run);

async function run(settings: Settings<typeof serviceOptions>, listCommands: ListCommands): Promise<number> {
  assertBackendOptions(settings.backend, settings);
  assertPermitted(settings);
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "identity" });
  await warnOfUnknownVariables(log, serviceOptions, listCommands);
  const metrics = await serveMetrics(settings, "identity", settings.backend, log);
  return await serveCsi({ settings, log, services: [], metrics });
}

/** `lbcsi controller`: serves the CSI identity and controller services. */
import { createLogger } from "../log.ts";
import { defineCommand, type ListCommands } from "./command.ts";
import { openBackend } from "./compose.ts";
import {
  clusterFileOption,
  controllerAndNodeOptions,
  serviceOptions,
  tokenOption,
  trustOptions,
} from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";
import { assertPermitted } from "./permissions.ts";
import { serveCsi } from "./serve_csi.ts";
import { serveMetrics } from "./serve_metrics.ts";
import { warnOfUnknownVariables } from "./unknown_variables.ts";

/** The options of `lbcsi controller`. */
export const controllerOptions = {
  ...serviceOptions,
  ...controllerAndNodeOptions,
  ...tokenOption,
  "jwt-for-any-endpoint": {
    env: ["LB_CSI_JWT_FOR_ANY_ENDPOINT"],
    meaning:
      "send the token of --jwt-path to every endpoint that a StorageClass or volume ID names, also over clear text; " +
      "default: over TLS only, to clusters of --config and to servers whose certificate --mgmt-ca verifies",
    schema: switchSchema,
  },
  ...trustOptions,
  ...clusterFileOption,
} as const satisfies Options;

/** `lbcsi controller`. */
export const controllerCommand = defineCommand(controllerOptions, run);

async function run(settings: Settings<typeof controllerOptions>, listCommands: ListCommands): Promise<number> {
  assertPermitted(settings);
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "controller" });
  await warnOfUnknownVariables(log, controllerOptions, listCommands);
  const { controllerHandlers, nodeServiceOfController } = await import("../csi/controller/service.ts");
  const { snapshotMetadataHandlers } = await import("../csi/controller/changed_blocks.ts");
  const { KeyedLock } = await import("../lock.ts");
  const { service } = await import("../grpc/server.ts");
  const { Controller, Node, SnapshotMetadata } = await import("../../proto/gen/csi_pb.ts");
  const metrics = await serveMetrics(settings, "controller", settings.backend, log);
  await using backend = await openBackend(settings, log, metrics);
  const handlers = controllerHandlers({
    backend,
    locks: new KeyedLock(),
    defaultFsType: settings["default-fs"],
    nodeIdSuffix: settings["node-id-suffix"],
    volumeHealth: settings["csi-1.13"],
  });
  const services = [service(Controller, handlers), service(Node, nodeServiceOfController)];
  if (settings["snapshot-metadata"] && backend.changedBlocks !== undefined) {
    services.push(service(SnapshotMetadata, snapshotMetadataHandlers(backend.changedBlocks)));
  }
  return await serveCsi({ settings, log, services, metrics });
}

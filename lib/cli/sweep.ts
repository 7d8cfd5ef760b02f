/** `lbcsi sweep`: lists or removes the inline volumes of a node that is dead. */
import * as z from "zod";
import { backgroundContext, type RequestContext } from "../context.ts";
import { messageOf } from "../error.ts";
import { createLogger } from "../log.ts";
import { hostNqn, nodeIdProblem } from "../namespace.ts";
import type { InlineVolume, InlineVolumeStore } from "../storage/backend.ts";
import { defineCommand } from "./command.ts";
import { openLightos } from "./compose.ts";
import { logOptions, trustOptions } from "./option_groups.ts";
import { switchSchema } from "./option_schemas.ts";
import { type Options, type Settings, UsageError } from "./options.ts";

const sweepOptions = {
  config: {
    short: "c",
    env: ["LB_CSI_CONFIG"],
    value: "FILE",
    meaning: "cluster file",
    schema: z.string({ error: "is missing" }).startsWith("/", "is not an absolute path"),
  },
  "node-id": { short: "n", value: "ID", meaning: "the dead node", schema: z.string({ error: "is missing" }) },
  delete: { meaning: "remove these volumes; without this, they are only listed", schema: switchSchema },
  "even-if-connected": {
    meaning:
      "also remove volumes that the cluster shows as connected to the node, because the connection ended with the node",
    schema: switchSchema,
  },
  ...trustOptions,
  ...logOptions,
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
} as const satisfies Options;

const helpText =
  `The inline volume of a pod is removed by the node that created it, after the pod, or when the node service starts again. A
node that never comes back leaves its volumes behind. This command lists them, and with --delete removes them and all data
on them.

Make sure that the node is dead, and not just out of Kubernetes' sight: a pod that still runs there loses its data. A volume
that the cluster shows as connected to the node is not removed. Before a volume is removed, the node's access is revoked.`;

/** How long one run may take. */
const sweepMs = 600_000;

/** `lbcsi sweep`. */
export const sweepCommand = defineCommand(sweepOptions, run, helpText);

async function run(settings: Settings<typeof sweepOptions>): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "sweep" });
  const nodeId = settings["node-id"];
  const problem = nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  await using backend = await openLightos(settings, log);
  const { inline } = backend;
  const obstacle = inline?.obstacle();
  if (inline === undefined || obstacle !== undefined) {
    throw new UsageError(`--config "${settings.config}": ${obstacle}`);
  }
  const ctx = backgroundContext(`sweep the inline volumes of ${nodeId}`, log, sweepMs);
  const { volumes, problems } = await inline.listVolumes(ctx, nodeId);
  let failures = problems.length;
  for (const text of problems) console.error(`lbcsi sweep: ${text}`);
  for (const volume of volumes) {
    const { uuid, place, pod, capacityBytes } = volume;
    const isConnected = volume.connectedHosts.includes(hostNqn(nodeId));
    const failure = settings.delete
      ? await removeVolume(ctx, inline, volume, isConnected && !settings["even-if-connected"])
      : undefined;
    if (failure !== undefined) failures++;
    const outcome = failure ??
      `${isConnected ? "connected to the node, " : ""}${settings.delete ? "removed" : "left alone"}`;
    console.log(`${uuid}  ${capacityBytes} bytes  ${place}  pod ${pod.namespace}/${pod.name}: ${outcome}`);
  }
  console.log(
    `${volumes.length} inline volumes of ${nodeId}${settings.delete ? "" : ", nothing was changed (--delete)"}`,
  );
  return failures === 0 ? 0 : 1;
}

/** Removes a volume unless it is in use. The result is why it could not be removed; undefined: it has been removed. */
async function removeVolume(
  ctx: RequestContext,
  inline: InlineVolumeStore,
  volume: InlineVolume,
  isInUse: boolean,
): Promise<string | undefined> {
  if (isInUse) return "not removed: the node is connected to it (--even-if-connected)";
  try {
    await inline.removeVolume(ctx, volume);
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}

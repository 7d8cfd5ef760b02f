/** `lbcsi doctor`: says what is wrong with this machine and the cluster. */
import * as z from "zod";
import type { Check } from "../check.ts";
import type { RequestContext } from "../context.ts";
import { hostNqn, nodeIdProblem } from "../namespace.ts";
import { Secrets } from "../secrets.ts";
import type { SystemReport } from "../storage/backend.ts";
import { type Endpoint, parseEndpoints, schemes } from "../volume_id.ts";
import { attachMode, type BackendName, isSubsystemOf } from "./backends.ts";
import { defineCommand } from "./command.ts";
import {
  assertBackendOptions,
  assertPoseidonOptions,
  lightosOptions,
  readPoseidonSystems,
  removeProxyVariables,
} from "./compose.ts";
import type { MachineCheckOptions } from "./doctor/machine.ts";
import {
  clusterFileOption,
  controllerAndNodeOptions,
  hostOptions,
  kubeletDirectoryOption,
  maxVolumesOption,
  serviceOptions,
  shellLogOptions,
  trustOptions,
  volumeOptions,
} from "./option_groups.ts";
import { switchSchema, wholeNumber } from "./option_schemas.ts";
import { type Options, type Settings, UsageError } from "./options.ts";
import { readSecretFile } from "./secret_file.ts";
import { runShellCommand, writeOut } from "./shell_command.ts";

/** Management endpoints, as a StorageClass names them. */
const endpointsSchema: z.ZodType<readonly Endpoint[], string> = z.string().transform((text, check) => {
  const endpoints = parseEndpoints(text);
  if (typeof endpoints !== "string") return endpoints;
  check.addIssue(endpoints);
  return z.NEVER;
});

/** The options of `lbcsi doctor`. */
export const doctorOptions = {
  checks: {
    fallback: "all",
    value: "WHAT",
    meaning: "what is checked: machine, cluster (on a machine that attaches no volumes), all",
    schema: z.enum(["all", "machine", "cluster"], { error: "is not all, machine or cluster" }),
  },
  backend: serviceOptions.backend,
  "node-id": { ...hostOptions["node-id"], schema: z.string().optional() },
  attach: hostOptions.attach,
  "discovery-dir": hostOptions["discovery-dir"],
  ...kubeletDirectoryOption,
  sysfs: hostOptions.sysfs,
  dev: hostOptions.dev,
  "default-fs": {
    ...controllerAndNodeOptions["default-fs"],
    meaning: "the file system that this node has to support",
  },
  "max-volumes": maxVolumesOption["max-volumes"],
  config: { ...clusterFileOption.config, meaning: "cluster file: the clusters to check" },
  "mgmt-endpoint": {
    value: "LIST",
    meaning: "instead of all clusters of --config: host:port of management endpoints (PoseidonOS: of DAgent)",
    schema: endpointsSchema.optional(),
  },
  "mgmt-scheme": {
    fallback: "grpcs",
    value: "SCHEME",
    meaning: "with --mgmt-endpoint: grpcs is TLS, grpc clear text",
    schema: z.enum(schemes, { error: `is not one of ${schemes.join(", ")}` }),
  },
  "jwt-path": volumeOptions["jwt-path"],
  secrets: volumeOptions.secrets,
  ...trustOptions,
  timeout: {
    value: "SECONDS",
    fallback: "60",
    meaning: "how long all checks may take together; what does not answer is given up earlier",
    schema: wholeNumber(1, 600),
  },
  json: { meaning: "print JSON", schema: switchSchema },
  ...shellLogOptions,
  // What is worth a warning is what it prints.
  "log-level": { ...shellLogOptions["log-level"], fallback: "error" },
} as const satisfies Options;

const helpText =
  `Checks this machine, and with --config or --mgmt-endpoint the storage cluster, and says what is wrong with them and what to
do. Give it the options of the node service; in the container of the node they are set already, as environment variables.

It changes nothing: it writes no file, connects to no subsystem, opens no block device, and runs tools only to print their
versions. From the cluster it reads what the token permits; to data and discovery addresses it opens a TCP connection and
closes it.

  problem       volumes do not work here, or not safely, until something is done
  warning       they work, but something is missing that only some of them need, or something will soon stop them
  not checked   it is not visible from here

Exit status: 0 no problem, 1 problems or a failure, 2 bad options.`;

/** `lbcsi doctor`. */
export const doctorCommand = defineCommand(doctorOptions, run, helpText);

type DoctorSettings = Settings<typeof doctorOptions>;

async function run(settings: DoctorSettings): Promise<number> {
  const machine = settings.checks === "cluster" ? undefined : machineOptions(settings);
  return await runShellCommand("check this machine", settings, async (ctx) => {
    const { runChecks } = await import("./doctor/checks.ts");
    const { doctorAsJson, doctorAsText, countVerdicts } = await import("./doctor/report.ts");
    const { createLinuxHost } = await import("../host/linux_host.ts");
    const host = createLinuxHost({ log: ctx.log, sysfsRoot: settings.sysfs, devRoot: settings.dev });
    const reports = settings.checks === "machine" ? Promise.resolve([]) : systemReports(settings, ctx);
    const sections = await runChecks(ctx, machine === undefined ? undefined : { host, ...machine }, reports);
    await writeOut(`${settings.json ? doctorAsJson(sections) : doctorAsText(sections)}\n`);
    return countVerdicts(sections).problem === 0 ? 0 : 1;
  });
}

function machineOptions(settings: DoctorSettings): Omit<MachineCheckOptions, "host"> {
  const { backend, "node-id": nodeId } = settings;
  const problem = nodeId === undefined ? undefined : nodeIdProblem(nodeId);
  if (problem !== undefined) throw new UsageError(`--node-id "${nodeId}": ${problem}`);
  assertBackendOptions(backend, { attach: settings.attach });
  return {
    nodeId,
    attach: attachMode(settings),
    discoveryDirectory: settings["discovery-dir"],
    kubeletDirectory: settings["kubelet-dir"],
    maxVolumes: settings["max-volumes"],
    isOurs: isSubsystemOf(backend),
    defaultFsType: settings["default-fs"],
  };
}

/** What the storage systems that the options name report of themselves. */
async function systemReports(settings: DoctorSettings, ctx: RequestContext): Promise<readonly SystemReport[]> {
  const { backend, config, "mgmt-endpoint": endpoints } = settings;
  if (config === undefined && endpoints === undefined) {
    if (settings.checks === "cluster") throw new UsageError("--checks cluster needs --config or --mgmt-endpoint");
    const check = {
      name: "cluster",
      verdict: "not checked",
      found: "neither --config nor --mgmt-endpoint is given",
    } as const satisfies Check;
    return [{
      name: "cluster",
      checks: [check],
      addresses: [],
      discovery: [],
      connected: undefined,
      inBandAuth: undefined,
    }];
  }
  return await clusterReports[backend](settings, ctx);
}

const clusterReports: Readonly<
  Record<BackendName, (settings: DoctorSettings, ctx: RequestContext) => Promise<readonly SystemReport[]>>
> = { lightos: lightosReport, poseidon: poseidonReport };

async function poseidonReport(settings: DoctorSettings, ctx: RequestContext): Promise<readonly SystemReport[]> {
  // A node may not have a cluster file with PoseidonOS, but here it names the systems to check.
  const { "node-id": _node, ...others } = settings;
  assertPoseidonOptions(others);
  removeProxyVariables();
  const { poseidonReports } = await import("../storage/poseidon/checks.ts");
  const [endpoint, ...surplus] = settings["mgmt-endpoint"] ?? [];
  if (surplus.length > 0) throw new UsageError("--mgmt-endpoint: a PoseidonOS has one DAgent");
  return await poseidonReports(ctx, await readPoseidonSystems(settings.config, ctx.log), endpoint);
}

async function lightosReport(settings: DoctorSettings, ctx: RequestContext): Promise<readonly SystemReport[]> {
  const { "mgmt-endpoint": endpoints, "node-id": nodeId } = settings;
  const { lightosReports } = await import("../storage/lightos/checks.ts");
  const options = await lightosOptions(settings, ctx.log);
  // A token that comes through a pipe (/dev/stdin) can be read once only.
  const jwt = options.globalJwt();
  return await lightosReports(
    ctx,
    { ...options, globalJwt: () => jwt },
    {
      target: endpoints === undefined ? undefined : { endpoints, scheme: settings["mgmt-scheme"] },
      secrets: new Secrets(settings.secrets === undefined ? {} : readSecretFile(settings.secrets)),
      hostNqn: nodeId === undefined ? undefined : hostNqn(nodeId),
    },
  );
}

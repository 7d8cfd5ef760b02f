/** `lbcsi simulate`: runs a simulated storage cluster. */
import * as z from "zod";
import { createLogger, type Logger } from "../log.ts";
import { schemes } from "../volume_id.ts";
import type { BackendName } from "./backends.ts";
import { defineCommand } from "./command.ts";
import { logOptions, simulatedBackendOption } from "./option_groups.ts";
import { absolutePath, switchSchema, wholeNumber } from "./option_schemas.ts";
import type { Options, Settings } from "./options.ts";
import { waitForStopSignal } from "./stop_signals.ts";

/** `10Gi`, `2Ti` or bytes. */
const sizeSchema = z.string().regex(/^[1-9]\d{0,17}(?:[KMGTP]i)?$/, "is not a size such as 500Gi, 16Ti or bytes")
  .transform((text) => {
    const power = " KMGTP".indexOf(text.replace(/[\di]/g, "") || " ");
    return BigInt(text.replace(/\D/g, "")) << BigInt(10 * power);
  });

const port = wholeNumber(0, 65535);
const delayMs = wholeNumber(0, 3_600_000);

const simulateOptions = {
  ...simulatedBackendOption,
  data: {
    fallback: "none",
    value: "PLANE",
    meaning: "none: management only; loop: volumes are files behind loop devices of this machine (root); nvmet: " +
      "namespaces of this kernel's NVMe/TCP target (root)",
    schema: z.enum(["none", "loop", "nvmet"], { error: "is not none, loop or nvmet" }),
  },
  state: {
    value: "DIR",
    meaning: "keep the state of the cluster here; without this, it is lost at the end",
    schema: absolutePath.optional(),
  },
  host: { fallback: "127.0.0.1", value: "IP", meaning: "address of the management API", schema: z.string() },
  schemes: {
    fallback: "grpc,grpcs",
    value: "LIST",
    meaning: "what the management API is served over: grpc, grpcs, or both",
    schema: z.string().transform((list) => list.split(","))
      .pipe(z.array(z.enum(schemes, { error: `is not of ${schemes.join(", ")}` }))),
  },
  servers: { fallback: "3", value: "COUNT", meaning: "storage servers, 1 to 16", schema: wholeNumber(1, 16) },
  "grpc-port": {
    fallback: "0",
    value: "PORT",
    meaning: "first server's clear-text port, the others follow; 0: free ones",
    schema: port,
  },
  "grpcs-port": { fallback: "0", value: "PORT", meaning: "the same for TLS", schema: port },
  "control-port": { fallback: "0", value: "PORT", meaning: "port of the control port on 127.0.0.1", schema: port },
  name: { fallback: "simulated", value: "TEXT", meaning: "name of the cluster", schema: z.string() },
  projects: {
    fallback: "default",
    value: "LIST",
    meaning: "projects, separated by commas",
    schema: z.string().transform((list) => list.split(",")),
  },
  capacity: {
    fallback: "16Ti",
    value: "SIZE",
    meaning: "space of the cluster; a volume takes its size times its replicas",
    schema: sizeSchema,
  },
  arrays: {
    fallback: "POSArray",
    value: "LIST",
    meaning: "PoseidonOS: arrays, separated by commas, each with --capacity",
    schema: z.string().transform((list) => list.split(",")),
  },
  "dagent-port": { fallback: "0", value: "PORT", meaning: "PoseidonOS: port of DAgent; 0: a free one", schema: port },
  "call-ms": { fallback: "0", value: "MS", meaning: "PoseidonOS: least duration of each call", schema: delayMs },
  "no-auth": { meaning: "accept calls without a token", schema: switchSchema },
  "in-band-auth": {
    meaning: "enable in-band authentication: with --data nvmet only trusted hosts connect, with their keys",
    schema: switchSchema,
  },
  "creation-ms": { fallback: "50", value: "MS", meaning: "how long a new volume is Creating", schema: delayMs },
  "deletion-ms": { fallback: "50", value: "MS", meaning: "how long a deleted volume is Deleting", schema: delayMs },
  "update-ms": { fallback: "0", value: "MS", meaning: "how long a changed volume is Updating", schema: delayMs },
  "discovery-dir": {
    value: "DIR",
    meaning: "directory that the simulated Discovery-Client watches; default: in the state",
    schema: absolutePath.optional(),
  },
  dev: { value: "DIR", meaning: "where block devices appear; default: in the state", schema: absolutePath.optional() },
  sysfs: {
    value: "DIR",
    meaning: "where the sysfs tree of these devices appears; default: in the state",
    schema: absolutePath.optional(),
  },
  ...logOptions,
  "log-level": { ...logOptions["log-level"], fallback: "warning" },
} as const satisfies Options;

const helpText =
  `Simulates a LightOS cluster for trials and tests: the management API over gRPC and TLS, tokens, projects, asynchronous
creation and deletion, and (with --data loop) a machine whose block devices are loop devices.

It prints one line of JSON with everything that is needed to use it, and runs until SIGTERM or Ctrl-C:
  grpc, grpcs            management endpoints: join them with commas for the StorageClass parameter mgmt-endpoint
  jwt, adminJwt          tokens: the key "jwt" of the StorageClass' secrets, or a file for --jwt-path
  ca                     certificate to trust for mgmt-scheme grpcs: key "mgmt-ca.crt", or a file for --mgmt-ca
  discoveryDir, devRoot, sysfsRoot
                         with --data loop: start the node with --discovery-dir, --dev and --sysfs set to these
  programs               with --data loop: directory with an nvme for --attach=direct, to be first in the node's PATH
  control                control port, on this machine only: counters, faults, delays, states, devices; for example
                           curl CONTROL/model                    everything the cluster holds
                           curl CONTROL/calls                    how often each RPC was called
                           curl CONTROL/faults -d '{"rpc":"CreateVolume","code":"UNAVAILABLE","count":2}'
                           curl CONTROL/faults -d '{"rpc":"UpdateVolume","drop":true,"when":"after"}'
                           curl -X PATCH CONTROL/volumes/UUID -d '{"protection":"Degraded"}'
                           curl CONTROL/endpoints/stop -d '{"server":0}'
                           curl CONTROL/paths/down -d '{"server":0}'      (with --data nvmet)
                         (all of them: the start of lib/simulator/control.ts)

  lbcsi simulate --data loop --state /var/tmp/cluster &
  lbcsi controller --endpoint unix:///tmp/controller.sock &
  lbcsi node --endpoint unix:///tmp/node.sock --node-id here.node --discovery-dir DIR --dev DIR --sysfs DIR &

With --backend poseidon it simulates PoseidonOS: DAgent's REST API, arrays of volumes, status codes, and exports that are
lost at each restart. --servers, --schemes, ports for gRPC, --projects, --no-auth and the times of states do not apply. Its
line of JSON has
  dagent, arrays, targetAddress, transportServiceId
                         for the StorageClass: provisionerIP and provisionerPort, arrayName, and the two of these names
  devRoot, sysfsRoot, programs
                         with --data loop: start the node with --dev, --sysfs, and the directory programs first in PATH:
                         its nvme connects to the simulated machine's devices
  control                the same as above, with the events of PoseidonOS for codes:
                           curl CONTROL/faults -d '{"rpc":"MountVolume","event":"VOL_MGR_BUSY","count":2}'
                           curl -X PATCH CONTROL/arrays/POSArray -d '{"state":"OFFLINE"}'
                           curl -X POST CONTROL/restart          loses exports, as PoseidonOS does
                         (all of them: the start of lib/simulator/poseidon/control.ts)

lbcsi demo does all of this by itself.`;

/** `lbcsi simulate`. */
export const simulateCommand = defineCommand(simulateOptions, run, helpText);

type SimulateSettings = Settings<typeof simulateOptions>;

async function run(settings: SimulateSettings): Promise<number> {
  const log = createLogger(settings["log-level"], settings["log-fmt"]).with({ role: "simulator" });
  const stopSignal = waitForStopSignal();
  const simulator = await starters[settings.backend](settings, log);
  console.log(JSON.stringify(simulator.addresses));
  await stopSignal;
  await simulator.stop();
  return 0;
}

const starters = { lightos: startLightos, poseidon: startPoseidon } as const satisfies Readonly<
  Record<BackendName, unknown>
>;

async function startPoseidon(settings: SimulateSettings, log: Logger) {
  const { defaultPoseidonSettings, simulatePoseidon } = await import("../simulator/poseidon/simulator.ts");
  return await simulatePoseidon({
    ...defaultPoseidonSettings,
    host: settings.host,
    port: settings["dagent-port"],
    controlPort: settings["control-port"],
    arrays: settings.arrays,
    capacityBytes: settings.capacity,
    behaviour: { callMs: settings["call-ms"] },
    data: settings.data,
    stateDir: settings.state,
    devRoot: settings.dev,
    sysfsRoot: settings.sysfs,
  }, log);
}

async function startLightos(settings: SimulateSettings, log: Logger) {
  const { defaultSimulateSettings, simulate } = await import("../simulator/lightos/simulator.ts");
  return await simulate({
    ...defaultSimulateSettings,
    host: settings.host,
    schemes: settings.schemes,
    servers: settings.servers,
    grpcPort: settings["grpc-port"],
    grpcsPort: settings["grpcs-port"],
    controlPort: settings["control-port"],
    clusterName: settings.name,
    projects: settings.projects,
    capacityBytes: settings.capacity,
    authentication: !settings["no-auth"],
    inBandAuth: settings["in-band-auth"],
    behaviour: {
      creationMs: settings["creation-ms"],
      deletionMs: settings["deletion-ms"],
      updateMs: settings["update-ms"],
    },
    data: settings.data,
    stateDir: settings.state,
    discoveryDir: settings["discovery-dir"],
    devRoot: settings.dev,
    sysfsRoot: settings.sysfs,
  }, log);
}

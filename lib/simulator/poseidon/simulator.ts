/**
 * A simulated PoseidonOS as one object: DAgent's REST API, control port and data plane over one model.
 *
 * With a state directory it keeps its volumes and their contents. Like PoseidonOS it loses exports, subsystems and listeners
 * at a restart.
 */
import { join } from "node:path";
import { StatusError } from "../../error.ts";
import type { Logger } from "../../log.ts";
import { isArrayName } from "../../volume_id.ts";
import type { DataPlane } from "../data_plane/data_plane.ts";
import { openDataPlane } from "../data_plane/open.ts";
import { createFaults } from "../faults.ts";
import { lockFile } from "../state_file.ts";
import { createPoseidonControl, type PoseidonControl, servePoseidonControl } from "./control.ts";
import { serveDAgent } from "./dagent.ts";
import { defaultPosBehaviour, type PosBehaviour, PoseidonModel } from "./system.ts";

/** Settings of a simulated PoseidonOS; `defaultPoseidonSettings` has a value for each. */
export interface PoseidonSimulatorSettings {
  /** Address that DAgent listens on. */
  readonly host: string;
  /** DAgent's port; 0 takes a free one. */
  readonly port: number;
  /** Port of the control port, which is always on 127.0.0.1; 0 takes a free one. */
  readonly controlPort: number;
  /** Names of the arrays, which are mounted and empty at first. */
  readonly arrays: readonly string[];
  /** Space of each array in bytes. */
  readonly capacityBytes: bigint;
  readonly behaviour: Partial<PosBehaviour>;
  readonly data: DataPlane["kind"];
  readonly stateDir: string | undefined;
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
}

export const defaultPoseidonSettings: PoseidonSimulatorSettings = {
  host: "127.0.0.1",
  port: 0,
  controlPort: 0,
  arrays: ["POSArray"],
  capacityBytes: 16n << 40n,
  behaviour: {},
  data: "none",
  stateDir: undefined,
  devRoot: undefined,
  sysfsRoot: undefined,
};

/** What a user of the simulator needs; printed as one line of JSON. */
export interface PoseidonAddresses {
  readonly backend: "poseidon";
  /** DAgent, `host:port`. */
  readonly dagent: string;
  readonly arrays: readonly string[];
  /** Where volumes are served, under the names of StorageClass parameters. */
  readonly targetAddress: string;
  readonly transportServiceId: string;
  /** Control port, `http://127.0.0.1:port`. */
  readonly control: string;
  readonly data: DataPlane["kind"];
  readonly stateDir: string | undefined;
  /** The next three are absent without a simulated machine (`data` is not `loop`). */
  readonly devRoot: string | undefined;
  readonly sysfsRoot: string | undefined;
  /** Directory of the machine's `nvme`, to be first on the node's PATH. */
  readonly programs: string | undefined;
}

export interface PoseidonSimulator {
  readonly addresses: PoseidonAddresses;
  /** The control port's functions, for callers in this process. */
  readonly control: PoseidonControl;
  /** Ends everything, removes its devices, and deletes what is not in a state directory. */
  stop(): Promise<void>;
}

const targetAddress = "127.0.0.1";
const transportServiceId = "1158";

/** Starts a simulated PoseidonOS; throws what simulate throws. */
export async function simulatePoseidon(settings: PoseidonSimulatorSettings, log: Logger): Promise<PoseidonSimulator> {
  const bad = settings.arrays.filter((name) => !isArrayName(name));
  if (settings.arrays.length === 0 || bad.length > 0) {
    throw new StatusError("INVALID_ARGUMENT", `Cannot simulate arrays "${settings.arrays.join('", "')}": bad names`);
  }
  await using stack = new AsyncDisposableStack();
  const { stateDir } = settings;
  if (stateDir !== undefined) {
    await Deno.mkdir(stateDir, { recursive: true, mode: 0o700 });
    stack.use(await lockFile(join(stateDir, "lock"), stateDir));
  }
  const target = `${targetAddress}:${transportServiceId}`;
  const identity = {
    uuid: crypto.randomUUID(),
    name: "simulated",
    // Not used: each export has a subsystem of its own.
    subsystemNqn: "nqn.2019-04.pos:simulated",
    servers: [{ uuid: "", nodeUuid: "", name: "pos", nvmeEndpoint: target, discoveryEndpoint: target }],
  };
  const planeSettings = { ...settings, discoveryDir: undefined };
  const { plane, devRoot, sysfsRoot, programs } = stack.use(await openDataPlane(planeSettings, identity, stack, log));
  const model = await PoseidonModel.open({
    arrays: settings.arrays,
    capacityBytes: settings.capacityBytes,
    behaviour: { ...defaultPosBehaviour, ...settings.behaviour },
    targetAddresses: [target],
    dataPlane: plane,
    file: stateDir === undefined ? undefined : join(stateDir, "poseidon.json"),
  });
  const faults = createFaults();
  const api = stack.use(
    await serveDAgent({ model, faults, host: settings.host, port: settings.port, log }),
  );
  const controls = createPoseidonControl(model, api, faults);
  const port = stack.use(
    await servePoseidonControl(controls, () => addresses, { host: "127.0.0.1", port: settings.controlPort, log }),
  );
  const addresses: PoseidonAddresses = {
    backend: "poseidon",
    dagent: api.address,
    arrays: settings.arrays,
    targetAddress,
    transportServiceId,
    control: port.url,
    data: settings.data,
    stateDir,
    devRoot,
    sysfsRoot,
    programs,
  };
  const parts = stack.move();
  let stopped: Promise<void> | undefined;
  return { addresses, control: controls, stop: () => stopped ??= parts.disposeAsync() };
}

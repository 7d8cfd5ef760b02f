import { createLogger } from "../../lib/log.ts";
import {
  defaultPoseidonSettings,
  type PoseidonSimulator,
  type PoseidonSimulatorSettings,
  simulatePoseidon,
} from "../../lib/simulator/poseidon/simulator.ts";
import { defaultPosBehaviour } from "../../lib/simulator/poseidon/system.ts";

/** A simulated PoseidonOS in this process. Dispose it, with `await using`, to end it and remove every file of its own. */
export type TestPoseidon = PoseidonSimulator & AsyncDisposable;

/** Starts one on free ports, with one array of 16 GiB and no output. */
export async function startPoseidon(overrides: Partial<PoseidonSimulatorSettings> = {}): Promise<TestPoseidon> {
  const simulator = await simulatePoseidon({
    ...defaultPoseidonSettings,
    capacityBytes: 16n << 30n,
    ...overrides,
    behaviour: { ...defaultPosBehaviour, ...overrides.behaviour },
  }, createLogger("error", "text", () => {}));
  return { ...simulator, [Symbol.asyncDispose]: () => simulator.stop() };
}

/** The parameters of a StorageClass for it. */
export function poseidonParameters({ addresses }: Pick<PoseidonSimulator, "addresses">): Record<string, string> {
  const [provisionerIP = "", provisionerPort = ""] = addresses.dagent.split(":");
  return {
    provisionerIP,
    provisionerPort,
    arrayName: addresses.arrays[0] ?? "",
    transportType: "tcp",
    targetAddress: addresses.targetAddress,
    transportServiceId: addresses.transportServiceId,
  };
}

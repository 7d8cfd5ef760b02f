import { createLogger } from "../../lib/log.ts";
import {
  defaultSimulateSettings,
  type LightosSimulatorSettings,
  simulate,
  type Simulator,
} from "../../lib/simulator/lightos/simulator.ts";

/** A simulator in this process. Dispose it, with `await using`, to end it and remove every file of its own. */
export type TestSimulator = Simulator & AsyncDisposable;

const documented = Deno.env.get("SIMULATOR_AS_DOCUMENTED") === "true"
  ? { asDocumented: true, snapshotWaitsForClones: false }
  : {};

/**
 * Starts a simulator on free ports, with delays of a few milliseconds and no output.
 *
 * With the environment variable SIMULATOR_AS_DOCUMENTED=true it answers as the REST documentation says, where LightOS is
 * known to answer differently: the driver passes its tests with both.
 *
 * `sim.addresses` has the management endpoints (`grpc`, `grpcs`), `ca`, `jwt`, `adminJwt`, and with `data: "loop"` the
 * directories `discoveryDir`, `devRoot` and `sysfsRoot`; `sim.control` injects faults, counts calls and shows leftovers.
 */
export async function startSimulator(overrides: Partial<LightosSimulatorSettings> = {}): Promise<TestSimulator> {
  const settings: LightosSimulatorSettings = {
    ...defaultSimulateSettings,
    ...overrides,
    behaviour: { creationMs: 0, deletionMs: 5, rollbackMs: 5, ...documented, ...overrides.behaviour },
  };
  const simulator = await simulate(settings, createLogger("error"));
  return { ...simulator, [Symbol.asyncDispose]: () => simulator.stop() };
}

/** The `mgmt-endpoint` StorageClass parameter for a simulator. */
export function managementEndpoints(simulator: Simulator, scheme: "grpc" | "grpcs" = "grpc"): string {
  return simulator.addresses[scheme].join(",");
}

/** Resolves when `condition` returns anything but false or undefined; rejects after `timeoutMs`. */
export async function eventually<T>(
  what: string,
  condition: () => T | Promise<T>,
  timeoutMs = 60_000,
): Promise<Exclude<T, false | undefined>> {
  const until = Date.now() + timeoutMs;
  for (;;) {
    const result = await condition();
    if (result !== false && result !== undefined) return result as Exclude<T, false | undefined>;
    if (Date.now() > until) throw new Error(`${what} did not happen within ${timeoutMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

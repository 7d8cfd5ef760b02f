/** A simulator in a process of its own, with two volumes on this machine; prints their devices, then waits to be killed. */
import { join } from "node:path";
import { createLogger } from "../../lib/log.ts";
import { defaultSimulateSettings, simulate } from "../../lib/simulator/lightos/simulator.ts";
import { eventually } from "./simulator.ts";

const [stateDir = "", host = ""] = Deno.args;
const settings = { ...defaultSimulateSettings, data: "loop", stateDir, behaviour: { creationMs: 0 } } as const;
const sim = await simulate(settings, createLogger("error"));
for (const name of ["kept", "gone"]) {
  await sim.control.cluster.createVolume({
    project: "default",
    name,
    size: "32 mib",
    replicaCount: 1,
    compression: "",
    acl: [host],
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
  });
}
const { discoveryDir = "", subsystemNqn } = sim.addresses;
await Deno.writeTextFile(join(discoveryDir, "tmp.dc.1"), `-t tcp -a 127.0.0.1 -s 8009 -q ${host} -n ${subsystemNqn}\n`);
await Deno.rename(join(discoveryDir, "tmp.dc.1"), join(discoveryDir, "1"));
const [kept, gone] = await eventually("both devices appear", async () => {
  await sim.control.waitUntilSettled();
  const { devices } = sim.control.machine();
  return devices.length === 2 ? devices : undefined;
});
console.log(JSON.stringify({ kept, gone, path: kept?.path }));

/** A volume of a simulated LightOS cluster. */
import { eventually, type TestSimulator } from "./simulator.ts";

export async function createAvailableVolume(simulator: TestSimulator, name = "v1", sizeMib = 64) {
  const volume = await simulator.control.cluster.createVolume({
    project: "default",
    name,
    size: `${sizeMib} mib`,
    replicaCount: 1,
    compression: "",
    acl: undefined,
    ipAcl: undefined,
    sectorSizeBytes: 0,
    sourceSnapshot: { uuid: "", name: "" },
    qosPolicy: { uuid: "", name: "" },
    labels: [],
  });
  await eventually(`volume ${name} is Available`, () => volume.state === "Available");
  return { volume, id: `mgmt:${simulator.addresses.grpc.join(",")}|nguid:${volume.uuid}|proj:default|scheme:grpc` };
}

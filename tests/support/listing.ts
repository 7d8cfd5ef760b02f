/** A controller with a cluster file in front of a simulated cluster, for tests of lists. */
import { Controller } from "../../proto/gen/csi_pb.ts";
import { clusterFileEntry, type Creation, startControlledCluster, volumeCreation } from "./controller_service.ts";
import type { startSimulator, TestSimulator } from "./simulator.ts";

const method = Controller.method;

/** A cluster of the file, as YAML flow. */
export function entry(name: string, simulator: TestSimulator, more = `projects: default, jwt: /jwt-${name}`): string {
  return clusterFileEntry(name, simulator, more);
}

/** A CreateVolume request for a volume of 1 GiB. */
export function creation(simulator: TestSimulator, name: string, project = "default"): Creation {
  return volumeCreation(simulator, { name }, { "project-name": project });
}

/** A controller with one cluster of its own, and its lists. Dispose it, with `await using`. */
export async function startListing(overrides: Parameters<typeof startSimulator>[0] = {}, more?: string) {
  const env = await startControlledCluster({
    simulator: overrides,
    controller: (simulator) => ({
      clusterFile: `clusters: [${entry("a", simulator, more)}]`,
      files: { "/jwt-a": simulator.addresses.jwt, "/admin": simulator.addresses.adminJwt },
    }),
  });
  const { call } = env;
  return {
    ...env,
    create: async (name: string, project = "default"): Promise<string> =>
      (await env.createVolume({ name }, { "project-name": project })).volumeId,
    snapshot: async (name: string, sourceVolumeId: string): Promise<string> =>
      (await env.createSnapshot(name, sourceVolumeId)).snapshotId,
    async listed(request: { maxEntries?: number; startingToken?: string } = {}) {
      const { entries, nextToken } = await call(method.listVolumes, request);
      return { ids: entries.map(({ volume }) => volume?.volumeId ?? ""), entries, nextToken };
    },
    async snapshots(
      request: {
        maxEntries?: number;
        startingToken?: string;
        snapshotId?: string;
        sourceVolumeId?: string;
        secrets?: Record<string, string>;
      } = {},
    ) {
      const { entries, nextToken } = await call(method.listSnapshots, request);
      return { ids: entries.map(({ snapshot }) => snapshot?.snapshotId ?? ""), entries, nextToken };
    },
  };
}

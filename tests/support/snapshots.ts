/**
 * A controller with a token of its own in front of a simulated cluster, for tests of snapshots, restores and clones.
 */
import { ok } from "node:assert/strict";
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { SimVolume } from "../../lib/simulator/lightos/model.ts";
import { parseVolumeId } from "../../lib/volume_id.ts";
import type { VolumeContentSourceSchema } from "../../proto/gen/csi_pb.ts";
import { gib, openLightos } from "./backends.ts";
import { type Creation, startControlledCluster } from "./controller_service.ts";
import type { TestSimulator } from "./simulator.ts";

type Source = MessageInitShape<typeof VolumeContentSourceSchema>;

export const fromSnapshot = (snapshotId: string): Source => ({ type: { case: "snapshot", value: { snapshotId } } });
export const fromVolume = (volumeId: string): Source => ({ type: { case: "volume", value: { volumeId } } });
export const uuidOf = (id: string) => parseVolumeId(id).uuid;

/** The controller, the cluster, and what tests ask of both. Dispose it, with `await using`. */
export async function startSnapshots(behaviour: Parameters<TestSimulator["control"]["behave"]>[0] = {}) {
  const env = await startControlledCluster({
    controller: (simulator) => ({ backend: () => openLightos(simulator) }),
  });
  const { control } = env.simulator;
  control.behave({ creationMs: 0, ...behaviour });
  const { cluster } = control;
  const create = (name: string, changes: Creation = {}) => env.createVolume({ name, ...changes });
  return {
    ...env,
    control,
    cluster,
    parameters: (changes: Record<string, string> = {}) => env.creation({}, changes).parameters ?? {},
    /** The answer of CreateVolume, for 1 GiB unless `changes` say otherwise. */
    create,
    /** The ID of a new volume. */
    volume: async (name: string, changes: Creation = {}) => (await create(name, changes)).volumeId,
    snapshot: env.createSnapshot,
    found: (id: string): SimVolume => {
      const volume = cluster.volumes.find(({ uuid }) => uuid === uuidOf(id));
      ok(volume, `no volume ${id}`);
      return volume;
    },
    /** The names of the snapshots that are neither deleted nor failed. */
    kept: () =>
      cluster.snapshots.filter(({ state }) => state !== "Deleting" && state !== "Failed").map(({ name }) => name),
  };
}

export const absentUuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

/** The ID of a volume or snapshot that is not on the cluster. */
export const absentAt = (env: { simulator: TestSimulator }, project = "default") =>
  `mgmt:${env.simulator.addresses.grpc.join(",")}|nguid:${absentUuid}|proj:${project}|scheme:grpc`;

export interface Sources {
  readonly volumeId: string;
  readonly snapshotId: string;
}

/** A volume of 2 GiB and a snapshot of it. */
export async function makeSources(env: Awaited<ReturnType<typeof startSnapshots>>): Promise<Sources> {
  const volumeId = await env.volume("origin", { capacityRange: { requiredBytes: 2n * gib } });
  const { snapshotId } = await env.snapshot("origin-snapshot", volumeId);
  return { volumeId, snapshotId };
}

/**
 * PoseidonOS behind the StorageBackend contract, through DAgent's REST API (facts: docs/reference/poseidonos-api.md sections 5 to 7, 11 and 12).
 *
 * Three things decide how the parts of this backend work:
 * - Every answer can be lost, and some failures are only half true. So each change is followed by a look, and what is
 *   found there is the result (converge.ts).
 * - Names are used again, so a volume is recognised by a UUID that the driver derives itself (volumes.ts).
 * - An array that is not mounted looks empty. A volume counts as gone only when the array was mounted at that moment.
 *
 * What PoseidonOS does not have is absent here too: snapshots, copies and growth (docs/reference/poseidonos-api.md
 * 11.6).
 */
import type { RequestContext } from "../../context.ts";
import type { Logger } from "../../log.ts";
import type { Metrics } from "../../metrics.ts";
import { nodeIdOf, type RemoteNamespace } from "../../namespace.ts";
import type { Secrets } from "../../secrets.ts";
import { type Endpoint, parsePoseidonId } from "../../volume_id.ts";
import type { Capacity, Grant, Listing, Modification, StorageBackend, Volume, VolumeRequest } from "../backend.ts";
import type { KnownSystems } from "./cluster_file.ts";
import { converge, type Next } from "./converge.ts";
import { type Dagent, Dagents } from "./dagent.ts";
import { exportVolume, unexportVolume } from "./exports.ts";
import { readSubsystems } from "./inventory.ts";
import { poseidonCapacity, poseidonListing } from "./listing.ts";
import { parseContext, parseMutable, parseParameters, qosDifferences, volumeSize } from "./parameters.ts";
import { createVolume, deleteVolume, findVolume, lookUpVolume, qosStep, toVolume } from "./volumes.ts";

/** The settings of the process for PoseidonOS. */
export interface PoseidonOptions {
  readonly log: Logger;
  /** The systems of the cluster file; undefined: no cluster file. */
  readonly systems?: KnownSystems | undefined;
  readonly metrics?: Metrics | undefined;
}

/** The PoseidonOS backend. */
export function poseidonBackend(options: PoseidonOptions): StorageBackend {
  return new PoseidonBackend(options);
}

class PoseidonBackend implements StorageBackend {
  readonly name = "poseidon";
  readonly oneHostOnly =
    "PoseidonOS shows a volume in one place to every host that connects there, so it could not be taken from " +
    "one node and left to another";
  readonly #dagents: Dagents;
  readonly #systems: KnownSystems | undefined;
  readonly modification: Modification;
  readonly listing?: Listing;
  readonly capacity?: Capacity;

  constructor({ systems, metrics }: PoseidonOptions) {
    this.#dagents = new Dagents(metrics);
    this.#systems = systems;
    this.modification = poseidonModification((endpoint) => this.#dagentAt(endpoint));
    if (systems === undefined) return;
    this.listing = poseidonListing(this.#dagents, systems);
    this.capacity = poseidonCapacity(this.#dagents, systems);
  }

  uuidOf(volumeId: string): string {
    return parsePoseidonId(volumeId).uuid;
  }

  async createVolume(call: RequestContext, _secrets: Secrets, request: VolumeRequest): Promise<Volume> {
    const ctx = call.doing(`create volume "${request.name}"`);
    const parameters = parseParameters(ctx, request.parameters);
    const sizeBytes = volumeSize(ctx, request);
    const dagent = this.#dagentAt(parameters.endpoint);
    return await dagent.exclusively(
      ctx,
      `creating volume "${request.name}"`,
      () => createVolume(ctx, dagent, { request, parameters, sizeBytes }),
    );
  }

  async deleteVolume(call: RequestContext, _secrets: Secrets, volumeId: string): Promise<void> {
    const id = parsePoseidonId(volumeId);
    const ctx = call.doing(`delete volume ${id.uuid}`);
    const dagent = this.#dagentAt(id.endpoint);
    await dagent.exclusively(ctx, `deleting volume ${id.uuid}`, () => deleteVolume(ctx, dagent, id));
  }

  async getVolume(call: RequestContext, _secrets: Secrets, volumeId: string): Promise<Volume> {
    const id = parsePoseidonId(volumeId);
    const ctx = call.doing(`read volume ${id.uuid}`);
    const dagent = this.#dagentAt(id.endpoint);
    const { array, volume } = await findVolume(ctx, dagent, id);
    return toVolume(id, array, volume, await readSubsystems(ctx, dagent));
  }

  async grantAccess(
    call: RequestContext,
    _secrets: Secrets,
    volumeId: string,
    { hostNqn, volumeContext = {} }: Grant,
  ): Promise<RemoteNamespace> {
    const id = parsePoseidonId(volumeId);
    const ctx = call.doing(`give ${nodeIdOf(hostNqn)} access to volume ${id.uuid}`);
    const dagent = this.#dagentAt(id.endpoint);
    return await dagent.exclusively(ctx, `exporting volume ${id.uuid}`, async () => {
      // An unknown volume is reported before a bad context.
      const { volume } = await findVolume(ctx, dagent, id);
      const addresses = parseContext(ctx, volumeContext);
      return await exportVolume(ctx, dagent, { array: id.array, volume }, { host: hostNqn, addresses });
    });
  }

  async revokeAccess(
    call: RequestContext,
    _secrets: Secrets,
    volumeId: string,
    hostNqn: string | undefined,
  ): Promise<void> {
    const id = parsePoseidonId(volumeId);
    const who = hostNqn === undefined ? "every host" : nodeIdOf(hostNqn);
    const ctx = call.doing(`take access to volume ${id.uuid} from ${who}`);
    const dagent = this.#dagentAt(id.endpoint);
    await dagent.exclusively(
      ctx,
      `un-exporting volume ${id.uuid}`,
      () => unexportVolume(ctx, dagent, id, { host: hostNqn, find: () => lookUpVolume(ctx, dagent, id) }),
    );
  }

  /** The DAgent behind an endpoint of today or of former times. */
  #dagentAt(endpoint: Endpoint): Dagent {
    return this.#dagents.at(this.#systems?.owning(endpoint)?.endpoint ?? endpoint);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#dagents[Symbol.asyncDispose]();
  }
}

/** The modification part of the PoseidonOS backend: limits of speed. */
function poseidonModification(dagentAt: (endpoint: Endpoint) => Dagent): Modification {
  return {
    merge(ctx, parameters, mutable) {
      parseMutable(ctx, mutable);
      return { ...parameters, ...mutable };
    },
    async modifyVolume(call, _secrets, volumeId, mutable) {
      const limits = parseMutable(call.doing("modify the volume"), mutable);
      const id = parsePoseidonId(volumeId);
      const ctx = call.doing(`modify volume ${id.uuid}`);
      const dagent = dagentAt(id.endpoint);
      await dagent.exclusively(ctx, `changing the limits of volume ${id.uuid}`, () =>
        converge(ctx, dagent, {
          look: () => findVolume(ctx, dagent, id),
          next: ({ volume }): Next<void> =>
            qosDifferences(limits, volume).length === 0 ? { done: undefined } : qosStep(id.array, volume, limits),
        }));
    },
  };
}

/**
 * LightOS behind the StorageBackend contract, through its gRPC management API (facts: docs/reference/lightos-api.md
 * sections 3, 6, 15).
 *
 * Three things decide how the parts of this backend work:
 * - Every answer can be lost. So after any failure that leaves the outcome open, the cluster is looked at again before
 *   anything is repeated; the object that is found there, not the answer, is the result.
 * - Names do not identify for ever. A volume that is being deleted, and what is left of a failed creation, keep their
 *   name without blocking it; both are ignored.
 * - Changes are made with the ETag of what was read (`if-match`), so two racing changes cannot both win.
 */
import { givenKeys } from "../../auth_key.ts";
import type { RequestContext } from "../../context.ts";
import { KeyedLock } from "../../lock.ts";
import { nodeIdOf, type RemoteNamespace } from "../../namespace.ts";
import type { Secrets } from "../../secrets.ts";
import { parseVolumeId } from "../../volume_id.ts";
import type {
  Authentication,
  Capacity,
  ChangedBlocks,
  Expansion,
  Grant,
  InlineVolumeStore,
  Listing,
  Modification,
  Snapshots,
  StorageBackend,
  Volume,
  VolumeRequest,
} from "../backend.ts";
import { assertCapacityRange } from "../capacity_range.ts";
import { allowHost, disallowHost, remoteNamespace } from "./access.ts";
import { lightosCapacity } from "./capacity.ts";
import { lightosChangedBlocks } from "./changed_blocks.ts";
import type { LightosOptions } from "./cluster.ts";
import { originOf, withCleanup } from "./content_source.ts";
import { createVolume } from "./create_volume.ts";
import { deleteVolume } from "./delete_volume.ts";
import { lightosExpansion } from "./expand_volume.ts";
import { lightosInlineVolumes } from "./inline.ts";
import { lightosListing, lightosSnapshotList } from "./listing.ts";
import { lightosModification } from "./modification.ts";
import { parseAuthKind, parseCapacityParameters, parseParameters } from "./parameters.ts";
import { ClusterPool } from "./pool.ts";
import { volumeSize } from "./size.ts";
import { lightosSnapshots } from "./snapshots.ts";
import { assertSameTrust } from "./trust.ts";
import { ensureTrusted, lightosAuthentication } from "./trusted_hosts.ts";
import { readVolume, toVolume } from "./volumes.ts";

/**
 * The LightOS backend. Its connections are made on first use, shared by all calls, and closed after ten idle minutes.
 */
export function lightosBackend(options: LightosOptions): StorageBackend & { readonly authentication: Authentication } {
  return new LightosBackend(options);
}

class LightosBackend implements StorageBackend {
  readonly name = "lightos";
  readonly #options: LightosOptions;
  readonly #clusters: ClusterPool;
  readonly #locks = new KeyedLock();
  readonly #capacity: Capacity;
  readonly expansion: Expansion;
  readonly authentication: Authentication;
  readonly snapshots: Snapshots;
  readonly changedBlocks: ChangedBlocks;
  readonly modification: Modification;
  readonly listing?: Listing;
  readonly inline?: InlineVolumeStore;

  constructor(options: LightosOptions) {
    this.#options = options;
    const clusters = this.#clusters = new ClusterPool(options);
    const known = options.clusters;
    const snapshots = lightosSnapshots(clusters);
    this.expansion = lightosExpansion(clusters);
    this.authentication = lightosAuthentication(clusters);
    this.snapshots = { ...snapshots, listSnapshots: lightosSnapshotList(clusters, known, snapshots.getSnapshot) };
    this.changedBlocks = lightosChangedBlocks(clusters);
    this.modification = lightosModification(clusters);
    this.#capacity = lightosCapacity(clusters, known, parseCapacityParameters);
    if (known === undefined) return;
    // Lists come without secrets: only clusters of the file have a token for them.
    this.listing = lightosListing(clusters, known);
    this.inline = lightosInlineVolumes(this, clusters, known);
  }

  /**
   * Space is asked for without secrets, but with parameters that name a cluster: a token of the process is enough. It
   * may come, or be taken away, later than the process starts (docs/reference/lightos-api.md 3.5).
   */
  get capacity(): Capacity | undefined {
    const { clusters, globalJwt } = this.#options;
    return clusters === undefined && (globalJwt() ?? "").trim() === "" ? undefined : this.#capacity;
  }

  uuidOf(volumeId: string): string {
    return parseVolumeId(volumeId).uuid;
  }

  async createVolume(call: RequestContext, secrets: Secrets, request: VolumeRequest): Promise<Volume> {
    const ctx = call.doing(`create volume "${request.name}"`);
    const parameters = parseParameters(ctx, request.parameters);
    const { endpoints, scheme, trust } = parameters;
    assertSameTrust(ctx, trust, this.#clusters.trust(secrets, endpoints, scheme));
    const cluster = this.#clusters.open(secrets, endpoints, scheme);
    if (request.source === undefined) {
      const leastBytes = volumeSize(ctx, request);
      return await createVolume(ctx, cluster, { request, parameters, leastBytes });
    }
    assertCapacityRange(ctx, request);
    const origin = originOf(ctx, cluster, request.source, { ...parameters, name: request.name });
    return await withCleanup(ctx, origin, () =>
      createVolume(ctx, cluster, {
        request,
        parameters: { ...parameters, project: origin.project },
        leastBytes: request.requiredBytes,
        origin,
      }));
  }

  async deleteVolume(ctx: RequestContext, secrets: Secrets, volumeId: string): Promise<void> {
    const id = parseVolumeId(volumeId);
    await deleteVolume(ctx, this.#clusters.open(secrets, id.endpoints, id.scheme), id);
  }

  async getVolume(call: RequestContext, secrets: Secrets, volumeId: string): Promise<Volume> {
    const id = parseVolumeId(volumeId);
    const ctx = call.doing(`read volume ${id.uuid}`);
    const cluster = this.#clusters.open(secrets, id.endpoints, id.scheme);
    return toVolume(id, await readVolume(ctx, cluster, id));
  }

  async grantAccess(
    call: RequestContext,
    secrets: Secrets,
    volumeId: string,
    { hostNqn, shared, volumeContext = {} }: Grant,
  ): Promise<RemoteNamespace> {
    const id = parseVolumeId(volumeId);
    const ctx = call.doing(`give ${nodeIdOf(hostNqn)} access to volume ${id.uuid}`);
    const cluster = this.#clusters.open(secrets, id.endpoints, id.scheme);
    const kind = parseAuthKind(ctx, volumeContext);
    if (kind !== undefined) {
      const host = { project: id.project ?? "", hostNqn };
      await ensureTrusted(ctx, cluster, host, { kind, given: givenKeys(secrets), locks: this.#locks });
    }
    await allowHost(ctx, cluster, id, { hostNqn, shared });
    return await remoteNamespace(ctx, cluster, id.uuid, kind);
  }

  async revokeAccess(
    call: RequestContext,
    secrets: Secrets,
    volumeId: string,
    hostNqn: string | undefined,
  ): Promise<void> {
    const id = parseVolumeId(volumeId);
    const who = hostNqn === undefined ? "every host" : nodeIdOf(hostNqn);
    const ctx = call.doing(`take access to volume ${id.uuid} from ${who}`);
    const cluster = this.#clusters.open(secrets, id.endpoints, id.scheme);
    await disallowHost(ctx, cluster, id, hostNqn);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#clusters[Symbol.asyncDispose]();
  }
}

/**
 * LightOS behind the StorageBackend contract, through its gRPC management API (facts: docs/reference/lightos-api.md sections 3, 6, 15).
 *
 * Three things decide the flows below:
 * - Every answer can be lost. So after any failure that leaves the outcome open, the cluster is looked at again before
 *   anything is repeated; the object that is found there, not the answer that we got, is the result.
 * - Names do not identify for ever. A volume that is being deleted, and the husk of a failed creation, keep their name
 *   without blocking it; both are looked through.
 * - Changes are made with the ETag of what was read (`if-match`), so two racing changes cannot both win.
 *
 * CreateVolume is tried before looking for the name: a new volume then costs one call and one look at its state, and the
 * cluster itself, not a gap between two calls of ours, decides whether the name is taken.
 */
import type { Logger, RequestContext } from "../../context.ts";
import { type AuthKind, givenKeys } from "../../auth_key.ts";
import { hasCode, isFinal, messageOf, StatusError } from "../../error.ts";
import { parseVolumeId, type VolumeId } from "../../volume_id.ts";
import { KeyedLock } from "../../lock.ts";
import { inBandAuthKey, nodeIdOf, parseAddress, type RemoteNamespace, type TransportAddress } from "../../namespace.ts";
import { DurosAPI, type Volume as LightosVolume, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import type { Authentication, StorageBackend, Volume, VolumeRequest } from "../backend.ts";
import { lightosBlocks } from "./changed_blocks.ts";
import { quoted } from "./answers.ts";
import { type Cluster, ClusterPool, LightosError, type LightosOptions } from "./cluster.ts";
import { lightosInlineVolumes } from "./inline.ts";
import { ensureTrusted, trustedKeys } from "./hosts.ts";
import { lightosCapacity, lightosListing, lightosSnapshotList } from "./listing.ts";
import { lightosModification, qosPolicyLike } from "./modification.ts";
import {
  checkRange,
  type Parameters,
  parseAuthKind,
  parseCapacityParameters,
  parseParameters,
  sizeWithSource,
  volumeSize,
} from "./parameters.ts";
import {
  encryptionLabels,
  encryptionOf,
  isMadeByUs,
  lightosSnapshots,
  type Origin,
  originOf,
  removeHelpersOf,
  sourceDifference,
  volumeLabels,
  withCleanup,
} from "./snapshots.ts";
import { assertSameTrust } from "./trust.ts";
import {
  aclAny,
  aclNone,
  aclOf,
  afterRefusal,
  changeVolume,
  growingDelays,
  hostsIn,
  lookAgainLater,
  notDoneCodes,
  pause,
  readVolume,
  toVolume,
  unknownState,
  waitUntilSettled,
} from "./volumes.ts";

/** The LightOS backend. Its connections are made on first use, shared by all calls, and closed after ten idle minutes. */
export function lightosBackend(options: LightosOptions): StorageBackend & { readonly authentication: Authentication } {
  const clusters = new ClusterPool(options);
  const locks = new KeyedLock();
  const idOf = (volumeId: string) => parseVolumeId(volumeId);
  const known = options.clusters;
  const eachSnapshot = lightosSnapshots(clusters);
  const snapshots = {
    ...eachSnapshot,
    listSnapshots: lightosSnapshotList(clusters, known, eachSnapshot.getSnapshot),
  };
  // Both are for calls without secrets. Space is asked for with parameters that name a cluster, so a token is enough.
  const listing = known === undefined ? {} : { listing: lightosListing(clusters, known) };
  const capacity = lightosCapacity(clusters, known, parseCapacityParameters);
  const backend: ReturnType<typeof lightosBackend> = {
    name: "lightos",
    uuidOf: (volumeId) => idOf(volumeId).uuid,
    async createVolume(ctx, secrets, wanted) {
      const action = `create volume "${wanted.name}"`;
      const parameters = parseParameters(action, wanted.parameters);
      const { endpoints, scheme, trust } = parameters;
      assertSameTrust(action, trust, clusters.trust(secrets, endpoints, scheme));
      const cluster = clusters.open(secrets, endpoints, scheme);
      if (wanted.source === undefined) {
        return await createVolume(ctx, cluster, action, wanted, parameters, volumeSize(action, wanted));
      }
      checkRange(action, wanted);
      const origin = originOf(cluster, action, wanted.name, wanted.source, parameters);
      const inItsProject = { ...parameters, project: origin.project };
      return await withCleanup(
        ctx,
        origin,
        () => createVolume(ctx, cluster, action, wanted, inItsProject, wanted.requiredBytes, origin),
      );
    },
    async deleteVolume(ctx, secrets, volumeId) {
      const id = idOf(volumeId);
      await deleteVolume(ctx, clusters.open(secrets, id.endpoints, id.scheme), id);
    },
    async getVolume(ctx, secrets, volumeId) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      return toVolume(id, await readVolume(ctx, cluster, `read volume ${id.uuid}`, id));
    },
    async grantAccess(ctx, secrets, volumeId, { hostNqn, shared, volumeContext = {} }) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const action = `give ${nodeIdOf(hostNqn)} access to volume ${id.uuid}`;
      const kind = parseAuthKind(action, volumeContext);
      if (kind !== undefined) {
        const place = { project: id.project ?? "", hostNqn };
        await ensureTrusted(ctx, cluster, action, place, kind, givenKeys(secrets), locks);
      }
      await changeAcl(ctx, cluster, action, id, (acl) => aclWith(action, acl, hostNqn, shared));
      return await remoteNamespace(ctx, cluster, action, id.uuid, kind);
    },
    async revokeAccess(ctx, secrets, volumeId, hostNqn) {
      const id = idOf(volumeId);
      const cluster = clusters.open(secrets, id.endpoints, id.scheme);
      const who = hostNqn === undefined ? "every host" : nodeIdOf(hostNqn);
      try {
        await changeAcl(
          ctx,
          cluster,
          `take access to volume ${id.uuid} from ${who}`,
          id,
          (acl) => aclWithout(acl, hostNqn),
        );
      } catch (error) {
        if (!hasCode(error, "NOT_FOUND")) throw error;
      }
    },
    expansion: {
      async expandVolume(ctx, secrets, volumeId, range) {
        const id = idOf(volumeId);
        const action = `expand volume ${id.uuid}`;
        const sizeBytes = volumeSize(action, range);
        const cluster = clusters.open(secrets, id.endpoints, id.scheme);
        const grown = await changeVolume(ctx, cluster, action, id, (volume) => {
          if (volume.size < sizeBytes) return { size: String(sizeBytes) };
          if (range.limitBytes === 0n || volume.size <= range.limitBytes) return undefined;
          throw new StatusError(
            "OUT_OF_RANGE",
            `Cannot ${action}: it has ${volume.size} bytes, above limit_bytes ${range.limitBytes}, and is never shrunk`,
          );
        }, "trust the answer");
        // As it was read before LightOS confirmed that it has grown, or after.
        const size = grown.size < sizeBytes ? sizeBytes : grown.size;
        return toVolume(id, { ...grown, size });
      },
    },
    authentication: {
      async keysOf(ctx, secrets, volumeId, hostNqn, kind) {
        const id = idOf(volumeId);
        const cluster = clusters.open(secrets, id.endpoints, id.scheme);
        const action = `read the keys of ${nodeIdOf(hostNqn)} for volume ${id.uuid}`;
        return await trustedKeys(ctx, cluster, action, { project: id.project ?? "", hostNqn }, kind);
      },
    },
    snapshots,
    changedBlocks: lightosBlocks(clusters),
    modification: lightosModification(clusters),
    ...listing,
    // The token may come, or be taken away, later than the process starts (docs/reference/lightos-api.md 3.5).
    get capacity() {
      return known === undefined && (options.globalJwt() ?? "").trim() === "" ? undefined : capacity;
    },
    async [Symbol.asyncDispose]() {
      await clusters[Symbol.asyncDispose]();
    },
  };
  // Added to the same object: a copy would keep what its getters say now.
  return Object.assign(
    backend,
    known === undefined ? {} : { inline: lightosInlineVolumes(backend, clusters, known) },
  );
}

// ---------------------------------------------------------------------------------------------------------- volumes

/** @param leastBytes the smallest volume of this name that fits the wish; without `origin`, the size of a new one */
async function createVolume(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  wanted: VolumeRequest,
  parameters: Parameters,
  leastBytes: bigint,
  origin?: Origin,
): Promise<Volume> {
  const projectName = parameters.project ?? "";
  const delays = growingDelays();
  for (;;) {
    // With a source, a look comes first: a snapshot would be taken for nothing, and the source may be gone by now.
    const look = () => findByName(ctx, cluster, action, wanted.name, projectName);
    let found = origin === undefined ? undefined : await lookAgainLater(look);
    let isOurs = false;
    if (found === undefined) {
      const beginning = await origin?.begin(ctx, (sourceBytes) => sizeWithSource(action, wanted, sourceBytes));
      try {
        found = await cluster.call(ctx, action, DurosAPI.method.createVolume, {
          name: wanted.name,
          size: `${beginning?.sizeBytes ?? leastBytes}b`,
          acl: { values: [aclNone] },
          compression: String(parameters.compression),
          replicaCount: parameters.replicaCount,
          projectName,
          labels: volumeLabels(wanted.madeFor, { ...encryptionLabels(parameters.hostEncryption), ...origin?.labels }),
          ...(beginning === undefined ? {} : { sourceSnapshotUUID: beginning.snapshotUuid }),
          ...(parameters.qosPolicy === undefined ? {} : { qosPolicyID: parameters.qosPolicy }),
        });
        isOurs = true;
      } catch (error) {
        if (!(error instanceof LightosError)) throw error;
        // It was not sent, and will be repeated.
        if (!error.outcomeUnknown && !isFinal(error) && error.code !== "RESOURCE_EXHAUSTED") throw error;
        // Whatever the refusal: an earlier call for this name may have made the volume, and clusters do not all look for
        // the name before they look for space. A volume that is refused and there would belong to nobody.
        found = await afterRefusal(action, error, look);
        if (found === undefined) {
          // Nobody has the name. Where the cluster said so a moment ago, or the answer was lost, trying again is right.
          if (!isWorthAnother(error)) throw error;
          await pause(ctx, delays, action, messageOf(error));
          continue;
        }
      }
    }
    const created = await waitUntilSettled(
      ctx,
      cluster,
      action,
      "volume",
      found,
      delays,
      ({ UUID, projectName }) => cluster.call(ctx, action, DurosAPI.method.getVolume, { UUID, projectName }),
    );
    if (created === undefined) continue;
    assertSameVolume(action, cluster.lastAddress, created, {
      name: wanted.name,
      ...(isOurs && origin === undefined ? { leastBytes, limitBytes: wanted.limitBytes } : {}),
    });
    const differences = differencesOf(created, wanted, parameters, leastBytes);
    if (!isOurs) {
      const difference = origin === undefined
        ? created.sourceSnapshotUUID === "" ? undefined : sourceDifference(created, "none")
        : await origin.differenceOf(ctx, created);
      if (difference !== undefined) differences.push(difference);
    }
    const id: VolumeId = {
      endpoints: parameters.endpoints,
      uuid: created.UUID.toLowerCase(),
      project: created.projectName === "" ? parameters.project : created.projectName,
      scheme: parameters.scheme,
      hostEncryption: parameters.hostEncryption,
    };
    const { inBandAuth } = parameters;
    if (differences.length === 0) {
      return {
        ...toVolume(id, created),
        ...(inBandAuth === undefined ? {} : { context: { [inBandAuthKey]: inBandAuth } }),
      };
    }
    if (isOurs && origin !== undefined) {
      // Whether a copy can have other properties than its source is LightOS' affair. Left there, it would block the name.
      await deleteVolume(ctx, cluster, id);
      throw new StatusError(
        "INVALID_ARGUMENT",
        `Cannot ${action}: LightOS at ${cluster.lastAddress} made it from its source in another way than asked: ` +
          `${differences.join("; ")}; a StorageClass that fits the source is needed`,
      );
    }
    throw new StatusError(
      "ALREADY_EXISTS",
      `Cannot ${action}: volume ${created.UUID} has that name and differs: ${differences.join("; ")}`,
    );
  }
}

/**
 * Throws INTERNAL for a volume that cannot be the one that LightOS has made for this name.
 *
 * @param address of the endpoint that shows it
 * @param asked with sizes when it was made just now and empty: else the size is another request's, or its source's
 */
function assertSameVolume(
  action: string,
  address: string,
  created: LightosVolume,
  asked: { readonly name: string; readonly leastBytes?: bigint; readonly limitBytes?: bigint },
): void {
  const refuse = (problem: string) =>
    new StatusError(
      "INTERNAL",
      `Cannot ${action}: LightOS at ${address} shows the new volume ${created.UUID} with ${problem}`,
    );
  const { name, leastBytes = 0n, limitBytes = 0n } = asked;
  if (created.name !== name) throw refuse(`name ${quoted(created.name)}`);
  if (created.size < leastBytes) throw refuse(`${created.size} bytes, asked are ${leastBytes}`);
  if (limitBytes !== 0n && created.size > limitBytes) {
    throw refuse(`${created.size} bytes, asked are at most ${limitBytes}`);
  }
}

/** Whether to send a creation again whose volume is not there after all. */
function isWorthAnother({ code, outcomeUnknown, elsewhere }: LightosError): boolean {
  // A server that said by itself that it cannot may still be right when there is no other one to ask.
  return code === "ALREADY_EXISTS" || (outcomeUnknown && (code !== "UNAVAILABLE" || elsewhere));
}

/** The living volume of this name: neither one that is being deleted nor the husk of a failed creation. */
async function findByName(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  name: string,
  projectName: string,
): Promise<LightosVolume | undefined> {
  const { volumes } = await cluster.call(ctx, action, DurosAPI.method.listVolumes, { name, projectName });
  const living = volumes.filter((volume) =>
    volume.name === name && ![State.Deleting, State.Deleted, State.Failed].includes(volume.state)
  );
  return living.find((volume) => volume.state !== State.Creating) ?? living[0];
}

/** How a volume differs from the wish, its source apart. */
function differencesOf(
  found: LightosVolume,
  wanted: VolumeRequest,
  parameters: Parameters,
  leastBytes: bigint,
): string[] {
  const differences: string[] = [];
  const differ = (what: string, is: unknown, asked: unknown) => differences.push(`${what} is ${is}, asked is ${asked}`);
  if (found.size < leastBytes) differ("size", `${found.size} bytes`, `${leastBytes} bytes`);
  else if (wanted.limitBytes !== 0n && found.size > wanted.limitBytes) {
    differ("size", `${found.size} bytes`, `at most ${wanted.limitBytes} bytes`);
  }
  if (found.replicaCount !== parameters.replicaCount) {
    differ("replica-count", found.replicaCount, parameters.replicaCount);
  }
  const compressed = found.compression.toLowerCase() === "true";
  if (compressed !== parameters.compression) differ("compression", compressed, parameters.compression);
  if (parameters.project !== undefined && found.projectName !== parameters.project) {
    differ("project-name", `"${found.projectName}"`, `"${parameters.project}"`);
  }
  const { qosPolicy, hostEncryption } = parameters;
  // Only this driver writes the label: of others' volumes nothing is known.
  const encryption = encryptionOf(found.labels);
  if (isMadeByUs(found.labels) && encryption !== hostEncryption) {
    differ("host-encryption", encryption ?? "disabled", hostEncryption ?? "disabled");
  }
  if (qosPolicy !== undefined && qosPolicyLike(qosPolicy, found) !== qosPolicy.value) {
    const key = qosPolicy.case === "qosPolicyName" ? "qos-policy-name" : "qos-policy-uuid";
    differ(key, `"${qosPolicyLike(qosPolicy, found)}"`, `"${qosPolicy.value}"`);
  }
  return differences;
}

async function deleteVolume(ctx: RequestContext, cluster: Cluster, id: VolumeId): Promise<void> {
  const action = `delete volume ${id.uuid}`;
  const delays = growingDelays();
  for (;;) {
    let volume: LightosVolume;
    try {
      volume = await readVolume(ctx, cluster, action, id);
    } catch (error) {
      // Deleting, deleted, or a husk that LightOS does not let anybody delete.
      if (hasCode(error, "NOT_FOUND")) return;
      throw error;
    }
    if (![State.Available, State.Migrating].includes(volume.state)) {
      if (State[volume.state] === undefined) throw unknownState(action, "volume", volume);
      await pause(ctx, delays, action, `LightOS shows it as ${State[volume.state]}`);
      continue;
    }
    const hosts = hostsIn(aclOf(volume));
    if (hosts.length > 0) {
      throw new StatusError(
        "FAILED_PRECONDITION",
        `Cannot ${action}: ${nameHosts(hosts)} may still connect to it, detach it there first`,
      );
    }
    // First, for once the volume is gone nobody comes back for them.
    await removeHelpersOf(ctx, cluster, action, volume, id.project);
    try {
      await cluster.call(ctx, action, DurosAPI.method.deleteVolume, {
        UUID: id.uuid,
        projectName: id.project ?? "",
      });
      return;
    } catch (error) {
      if (hasCode(error, "NOT_FOUND")) return;
      if (!(error instanceof LightosError) || notDoneCodes.has(error.code)) throw error;
      // INTERNAL is what older servers answer for a volume that is gone; the next look tells.
      const lastWords = messageOf(error);
      await pause(ctx, delays, action, lastWords);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- ACL

// An access list does not say with which access mode a host got in, so a shared request joins a host that has the volume
// for itself. Orchestrators use one mode for each volume: Kubernetes derives it from the PersistentVolume, where it cannot
// change. A label that remembers the mode, written with the list, was considered and left out: LightOS keeps 16 labels of
// which some are the owner's, older versions do not change them, and a volume of the incumbent driver has none.

/** Hosts for a message, which thousands of them would make longer than anybody reads. */
function nameHosts(hosts: readonly string[]): string {
  const named = hosts.slice(0, 10).map(nodeIdOf).join(", ");
  return hosts.length <= 10 ? named : `${named} and ${hosts.length - 10} others`;
}

/** The ACL with this host in it, or undefined when it needs no change. */
function aclWith(
  action: string,
  acl: readonly string[],
  hostNqn: string,
  shared: boolean,
): readonly string[] | undefined {
  if (acl.includes(aclAny)) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: its access list is open to any host (${aclAny}), set it to ${aclNone} on LightOS first`,
    );
  }
  const hosts = hostsIn(acl);
  const others = hosts.filter((host) => host !== hostNqn);
  if (!shared && others.length > 0) {
    throw new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: ${nameHosts(others)} has it, and its access mode is for one node; ` +
        `it must be detached there first`,
    );
  }
  if (hosts.includes(hostNqn) && !acl.includes(aclNone)) return undefined;
  return [...new Set([...hosts, hostNqn])].sort();
}

/** The ACL without this host (undefined: without any), or undefined when it needs no change. */
function aclWithout(acl: readonly string[], hostNqn: string | undefined): readonly string[] | undefined {
  // An open list was never made by us; taking one host from it means nothing, taking every host does.
  if (hostNqn !== undefined && !acl.includes(hostNqn) && acl.length > 0) return undefined;
  if (acl.length === 1 && acl[0] === aclNone) return undefined;
  const left = hostNqn === undefined ? [] : acl.filter((entry) => entry !== hostNqn);
  return left.length === 0 ? [aclNone] : left;
}

async function changeAcl(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  id: VolumeId,
  decide: (acl: readonly string[]) => readonly string[] | undefined,
): Promise<void> {
  await changeVolume(ctx, cluster, action, id, (volume) => {
    const values = decide(aclOf(volume));
    return values === undefined ? undefined : { acl: { values: [...values] } };
  }, "trust the answer");
}

async function remoteNamespace(
  ctx: RequestContext,
  cluster: Cluster,
  action: string,
  uuid: string,
  inBandAuth: AuthKind | undefined,
): Promise<RemoteNamespace> {
  const info = await cluster.info(ctx, action);
  const addresses = toAddresses(ctx.log, info.nvmeEndpoints);
  const discovery = toAddresses(ctx.log, info.discoveryEndpoints);
  if (addresses.length === 0 && discovery.length === 0) {
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${action}: LightOS at ${cluster.lastAddress} names no NVMe and no discovery endpoint`,
    );
  }
  const place = { uuid, subsystemNqn: info.subsystemNQN, addresses, discovery };
  return inBandAuth === undefined ? place : { ...place, inBandAuth };
}

function toAddresses(log: Logger, endpoints: readonly string[]): readonly TransportAddress[] {
  return [...new Set(endpoints)].sort().flatMap((text) => {
    const address = parseAddress(text);
    if (address === undefined) log.warning("passed over an endpoint that is not an IP address", { address: text });
    return address === undefined ? [] : [address];
  });
}

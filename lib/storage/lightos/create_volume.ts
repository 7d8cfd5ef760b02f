/**
 * CreateVolume on LightOS (facts: docs/reference/lightos-api.md sections 6.7, 9.3 and 15).
 *
 * The creation is tried before looking for the name: a new volume then costs one call and one look at its state, and the
 * cluster itself, not a gap between two calls of ours, decides whether the name is taken.
 */
import { DurosAPI, type Volume as LightosVolume, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { isFinal, messageOf } from "../../error.ts";
import { inBandAuthKey } from "../../namespace.ts";
import type { VolumeId } from "../../volume_id.ts";
import type { Volume, VolumeRequest } from "../backend.ts";
import { growingDelays } from "../polling.ts";
import { aclNone } from "./acl.ts";
import { quoted } from "./answer_check.ts";
import { LightosError } from "./api_error.ts";
import type { Cluster } from "./cluster.ts";
import { type Origin, sourceDifference } from "./content_source.ts";
import { deleteVolume } from "./delete_volume.ts";
import { encryptionLabels, encryptionOf, isMadeByUs, volumeLabels } from "./labels.ts";
import { qosPolicyLike } from "./modification.ts";
import type { LightosParameters } from "./parameters.ts";
import { sizeWithSource } from "./size.ts";
import { goneStates, toVolume } from "./volumes.ts";
import { lookAfterRejection, lookForEarlier, pause, waitUntilSettled } from "./waiting.ts";

/** A volume that is to be created. */
export interface VolumeCreation {
  readonly request: VolumeRequest;
  readonly parameters: LightosParameters;
  /** The smallest volume of this name that meets the request; without `origin`, the size of a new one. */
  readonly leastBytes: bigint;
  /** Where it gets its content from; undefined: it begins empty. */
  readonly origin?: Origin | undefined;
}

/**
 * Creates a volume, or finds the one that an earlier call for the same name has created.
 *
 * @throws StatusError ALREADY_EXISTS that lists each difference when the volume of this name is another one;
 *   INVALID_ARGUMENT when a copy cannot be as the parameters say; UNAVAILABLE when the creation failed or its outcome
 *   is unclear
 */
export async function createVolume(ctx: RequestContext, cluster: Cluster, creation: VolumeCreation): Promise<Volume> {
  const { request, parameters, leastBytes, origin } = creation;
  const delays = growingDelays();
  for (;;) {
    const found = await findOrCreate(ctx, cluster, creation, delays);
    if (found === undefined) continue;
    const { volume, isNew } = found;
    const created = await waitUntilSettled(ctx, cluster, {
      what: "volume",
      created: volume,
      delays,
      read: ({ UUID, projectName }) => cluster.call(ctx, DurosAPI.method.getVolume, { UUID, projectName }),
    });
    if (created === undefined) continue;
    assertSameVolume(ctx, cluster.lastAddress, created, {
      name: request.name,
      ...(isNew && origin === undefined ? { leastBytes, limitBytes: request.limitBytes } : {}),
    });
    const differences = differencesOf(created, creation);
    if (!isNew) {
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
    if (differences.length === 0) {
      const { inBandAuth } = parameters;
      const context = inBandAuth === undefined ? {} : { context: { [inBandAuthKey]: inBandAuth } };
      return { ...toVolume(id, created), ...context };
    }
    if (isNew && origin !== undefined) {
      // LightOS decides whether a copy can have other properties than its source. Left there, the copy would block the
      // name.
      await deleteVolume(ctx, cluster, id);
      throw ctx.error(
        "INVALID_ARGUMENT",
        `LightOS at ${cluster.lastAddress} made it from its source in another way than asked: ` +
          `${differences.join("; ")}; a StorageClass that fits the source is needed`,
      );
    }
    throw ctx.error("ALREADY_EXISTS", `volume ${created.UUID} has that name and differs: ${differences.join("; ")}`);
  }
}

/** The volume of this name, new or not; undefined when there is none and the creation has to be tried again. */
async function findOrCreate(
  ctx: RequestContext,
  cluster: Cluster,
  { request, parameters, leastBytes, origin }: VolumeCreation,
  delays: Iterator<number, never>,
): Promise<{ readonly volume: LightosVolume; readonly isNew: boolean } | undefined> {
  const projectName = parameters.project ?? "";
  const find = () => findByName(ctx, cluster, request.name, projectName);
  // With a source, the look comes first: otherwise a snapshot might be taken for nothing, and the source may be gone by
  // now.
  const earlier = origin === undefined ? undefined : await lookForEarlier(find);
  if (earlier !== undefined) return { volume: earlier, isNew: false };
  const source = await origin?.begin(ctx, (sourceBytes) => sizeWithSource(ctx, request, sourceBytes));
  try {
    const volume = await cluster.call(ctx, DurosAPI.method.createVolume, {
      name: request.name,
      size: `${source?.sizeBytes ?? leastBytes}b`,
      acl: { values: [aclNone] },
      compression: String(parameters.compression),
      replicaCount: parameters.replicaCount,
      projectName,
      labels: volumeLabels(request.owner, { ...encryptionLabels(parameters.hostEncryption), ...origin?.labels }),
      ...(source === undefined ? {} : { sourceSnapshotUUID: source.snapshotUuid }),
      ...(parameters.qosPolicy === undefined ? {} : { qosPolicyID: parameters.qosPolicy }),
    });
    return { volume, isNew: true };
  } catch (error) {
    if (!(error instanceof LightosError)) throw error;
    // It was not sent, and will be repeated.
    if (!error.outcomeUnknown && !isFinal(error) && error.code !== "RESOURCE_EXHAUSTED") throw error;
    // Whatever the reason: an earlier call for this name may have made the volume, and not every cluster looks for the
    // name before it looks for space. A volume that is rejected and exists would be left behind.
    const volume = await lookAfterRejection(ctx, error, find);
    if (volume !== undefined) return { volume, isNew: false };
    // The name is free. Where the cluster said otherwise a moment ago, or the answer was lost, trying again is right.
    if (!isWorthAnother(error)) throw error;
    await pause(ctx, delays, messageOf(error));
    return undefined;
  }
}

/** Whether to send a creation again whose volume does not exist after all. */
function isWorthAnother({ code, outcomeUnknown, elsewhere }: LightosError): boolean {
  // A server that answered that it cannot may still be right when there is no other one to ask.
  return code === "ALREADY_EXISTS" || (outcomeUnknown && (code !== "UNAVAILABLE" || elsewhere));
}

/** The existing volume of this name: neither one that is being deleted nor one left over from a failed creation. */
async function findByName(
  ctx: RequestContext,
  cluster: Cluster,
  name: string,
  projectName: string,
): Promise<LightosVolume | undefined> {
  const { volumes } = await cluster.call(ctx, DurosAPI.method.listVolumes, { name, projectName });
  const existing = volumes.filter((volume) => volume.name === name && !goneStates.includes(volume.state));
  return existing.find((volume) => volume.state !== State.Creating) ?? existing[0];
}

/**
 * Throws INTERNAL for a volume that cannot be the one that LightOS has made for this name.
 *
 * @param address of the endpoint that shows it
 * @param asked with sizes when the volume was made just now and empty: else its size comes from another request, or its
 *   source
 */
function assertSameVolume(
  ctx: RequestContext,
  address: string,
  created: LightosVolume,
  asked: { readonly name: string; readonly leastBytes?: bigint; readonly limitBytes?: bigint },
): void {
  const mismatch = (problem: string) =>
    ctx.error("INTERNAL", `LightOS at ${address} shows the new volume ${created.UUID} with ${problem}`);
  const { name, leastBytes = 0n, limitBytes = 0n } = asked;
  if (created.name !== name) throw mismatch(`name ${quoted(created.name)}`);
  if (created.size < leastBytes) throw mismatch(`${created.size} bytes, asked are ${leastBytes}`);
  if (limitBytes !== 0n && created.size > limitBytes) {
    throw mismatch(`${created.size} bytes, asked are at most ${limitBytes}`);
  }
}

/** How a volume differs from the request, its source apart. */
function differencesOf(found: LightosVolume, { request, parameters, leastBytes }: VolumeCreation): string[] {
  const differences: string[] = [];
  const differ = (what: string, is: unknown, asked: unknown) => differences.push(`${what} is ${is}, asked is ${asked}`);
  if (found.size < leastBytes) differ("size", `${found.size} bytes`, `${leastBytes} bytes`);
  else if (request.limitBytes !== 0n && found.size > request.limitBytes) {
    differ("size", `${found.size} bytes`, `at most ${request.limitBytes} bytes`);
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
  // Only this driver writes the label: nothing is known of the volumes of others.
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

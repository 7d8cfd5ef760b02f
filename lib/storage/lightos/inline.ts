/**
 * Inline volumes of pods on LightOS: made and removed by the node itself, on the clusters of the cluster file that have
 * the key `ephemeral` (facts: docs/reference/csi.md section 15; docs/reference/lightos-api.md sections 9.4, 14 and
 * 15.1).
 *
 * Later calls know of such a volume only its CSI volume ID. So that is its name on LightOS, which lets a repeated call
 * find it; and a label has it too, which distinguishes our volume from a foreign one of that name. Other labels say for
 * which node, pod and path it was made: that is how leftovers of a dead node are found.
 *
 * Two tokens. A pod's own may pay for the creation, and is not available when the volume has to be removed; so
 * everything else is done with the token of the cluster file, and a volume that this one cannot see is removed at once,
 * with the pod's.
 */
import * as z from "zod";
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import type { RequestContext } from "../../context.ts";
import { hasCode, isFinal, messageOf, StatusError } from "../../error.ts";
import { hostNqn, type RemoteNamespace } from "../../namespace.ts";
import { Secrets } from "../../secrets.ts";
import type { InlineVolume, InlineVolumeRequest, InlineVolumeStore, StorageBackend } from "../backend.ts";
import type { KnownCluster, KnownClusters } from "./cluster_file.ts";
import {
  type InlineCluster,
  type InlinePlace,
  type InlineVolumeSpec,
  parseInlineAttributes,
} from "./inline_attributes.ts";
import { describePlace, idLabel, inlineLabels, toInlineVolume } from "./inline_labels.ts";
import { readAll } from "./paging.ts";
import type { ClusterPool } from "./pool.ts";
import { goneStates } from "./volumes.ts";

type VolumeBackend = Pick<StorageBackend, "createVolume" | "deleteVolume" | "grantAccess" | "revokeAccess">;

/** The inline volumes of the LightOS backend. */
export function lightosInlineVolumes(
  backend: VolumeBackend,
  clusters: ClusterPool,
  known: KnownClusters,
): InlineVolumeStore {
  return new LightosInlineVolumes(backend, clusters, known);
}

/** No secrets: ClusterPool then takes the token of the cluster file. */
const operator = new Secrets();

/** Volumes with a certain name: ours, or the UUID of one that is not. */
interface Namesakes {
  readonly own: InlineVolume | undefined;
  readonly foreign: string | undefined;
}

/** An inline volume that is to be made. */
interface InlineCreation {
  readonly request: InlineVolumeRequest;
  readonly spec: InlineVolumeSpec;
  /** The token of the pod; undefined: it has none, and the operator's is used. */
  readonly podSecrets: Secrets | undefined;
  /** Called before anything is made. */
  readonly onBegin: () => void;
}

class LightosInlineVolumes implements InlineVolumeStore {
  readonly #backend: VolumeBackend;
  readonly #clusters: ClusterPool;
  readonly #known: KnownClusters;

  constructor(backend: VolumeBackend, clusters: ClusterPool, known: KnownClusters) {
    this.#backend = backend;
    this.#clusters = clusters;
    this.#known = known;
  }

  obstacle(): string | undefined {
    if (this.#inlineClusters().length > 0) return undefined;
    return "no cluster of the cluster file allows them, the key ephemeral is needed";
  }

  async makeVolume(call: RequestContext, secrets: Secrets, request: InlineVolumeRequest): Promise<RemoteNamespace> {
    const ctx = call.doing(`make the inline volume ${request.volumeId}`);
    const spec = parseInlineAttributes(ctx, request.attributes, this.#inlineClusters());
    const podSecrets = podToken(secrets);
    let mayExist = request.isRepeat;
    const onBegin = () => {
      mayExist = true;
    };
    try {
      const own = await this.#ensure(ctx, { request, spec, podSecrets, onBegin });
      return await this.#backend.grantAccess(ctx, operator, own.storageId, {
        hostNqn: hostNqn(request.nodeId),
        shared: false,
      });
    } catch (error) {
      if (!isFinal(error) || !mayExist) throw error;
      // After a final answer the orchestrator never asks for the removal of what may exist all the same.
      let left: string;
      try {
        const found = await this.findVolume(ctx, request.volumeId);
        if (found === undefined) throw error;
        left = `volume ${found.uuid} is there and is removed with the pod`;
      } catch (second) {
        if (second === error) throw error;
        left = `whether something of it is left is unknown (${messageOf(second)})`;
      }
      throw new StatusError("UNAVAILABLE", `${messageOf(error)}; ${left}`, { cause: error });
    }
  }

  async findVolume(call: RequestContext, volumeId: string): Promise<InlineVolume | undefined> {
    const ctx = call.doing(`find the inline volume ${volumeId}`);
    const looks = await Promise.all(
      this.#places().map(async (place) => {
        try {
          return await this.#namesakes(ctx, place, operator, volumeId);
        } catch (error) {
          return { own: undefined, problem: `${describePlace(place)}: ${messageOf(error)}` };
        }
      }),
    );
    const found = looks.find(({ own }) => own !== undefined)?.own;
    if (found !== undefined) return found;
    const problems = looks.flatMap((look) => "problem" in look ? [look.problem] : []);
    if (problems.length === 0) return undefined;
    throw ctx.error("UNAVAILABLE", `some clusters cannot be asked (${problems.join("; ")})`);
  }

  async removeVolume(ctx: RequestContext, { storageId, nodeId }: InlineVolume): Promise<void> {
    if (nodeId !== undefined) await this.#backend.revokeAccess(ctx, operator, storageId, hostNqn(nodeId));
    await this.#backend.deleteVolume(ctx, operator, storageId);
  }

  async listVolumes(
    call: RequestContext,
    nodeId: string,
  ): Promise<{ readonly volumes: readonly InlineVolume[]; readonly problems: readonly string[] }> {
    const ctx = call.doing(`list the inline volumes of ${nodeId}`);
    const problems: string[] = [];
    const found = await Promise.all(
      this.#places().map(async (place) => {
        try {
          return await this.#allIn(ctx, place);
        } catch (error) {
          problems.push(`${describePlace(place)}: ${messageOf(error)}`);
          return [];
        }
      }),
    );
    return { volumes: found.flat().filter((volume) => volume.nodeId === nodeId), problems };
  }

  #inlineClusters(): readonly InlineCluster[] {
    return this.#known.all().filter(allowsInline);
  }

  #places(): readonly InlinePlace[] {
    return this.#inlineClusters().flatMap((cluster) =>
      cluster.inline.projects.map((project) => ({ cluster, project }))
    );
  }

  /** The volume, created unless it exists: ours, and visible with the operator's token. */
  async #ensure(ctx: RequestContext, { request, spec, podSecrets, onBegin }: InlineCreation): Promise<InlineVolume> {
    const { place } = spec;
    const { volumeId } = request;
    // A volume that only the pod's token can see could not be removed with the pod.
    const undo = async (reason: unknown) => {
      if (podSecrets !== undefined) await this.#undo(ctx, place, podSecrets, { volumeId, reason });
    };
    const lookAsOperator = async () => {
      try {
        return await this.#namesakes(ctx, place, operator, volumeId);
      } catch (error) {
        // This call, or an earlier one while this token was still valid, may have made it.
        if (isFinal(error)) await undo(error);
        throw error;
      }
    };
    const before = await lookAsOperator();
    if (before.own !== undefined) return before.own;
    if (before.foreign !== undefined) throw foreignError(ctx, before.foreign);
    onBegin();
    await this.#backend.createVolume(ctx, podSecrets ?? operator, {
      name: volumeId,
      requiredBytes: spec.sizeBytes,
      limitBytes: 0n,
      parameters: spec.parameters,
      owner: inlineLabels(request),
    });
    const after = await lookAsOperator();
    if (after.own !== undefined) return after.own;
    if (after.foreign !== undefined) throw foreignError(ctx, after.foreign);
    const unseen = ctx.error(
      "FAILED_PRECONDITION",
      `the token of the cluster file (${place.cluster.jwtPath}) does not see what the pod's token made in ` +
        `${
          describePlace(place)
        }, so it could not be removed later; a token with a right to that project is needed there`,
    );
    await undo(unseen);
    throw unseen;
  }

  /** Removes what a pod's token made and the operator's cannot see; throws UNAVAILABLE when that is not possible now. */
  async #undo(
    ctx: RequestContext,
    place: InlinePlace,
    podSecrets: Secrets,
    { volumeId, reason }: { readonly volumeId: string; readonly reason: unknown },
  ): Promise<void> {
    try {
      const { own } = await this.#namesakes(ctx, place, podSecrets, volumeId);
      if (own === undefined) return;
      await this.#backend.deleteVolume(ctx, podSecrets, own.storageId);
      ctx.log.info("removed a volume that no later call could remove", { volume: own.uuid, name: volumeId });
    } catch (error) {
      // A token without any right has not made anything either.
      if (hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) return;
      throw new StatusError(
        "UNAVAILABLE",
        `${messageOf(reason)}; what was made cannot be removed now (${messageOf(error)})`,
        { cause: error },
      );
    }
  }

  /** The volumes with the name of this volume in a project, as the token in `secrets` sees them. */
  async #namesakes(ctx: RequestContext, place: InlinePlace, secrets: Secrets, volumeId: string): Promise<Namesakes> {
    const { endpoints, scheme } = place.cluster;
    const cluster = this.#clusters.open(secrets, endpoints, scheme);
    const request = { name: volumeId, projectName: place.project };
    const { volumes } = await cluster.call(ctx, DurosAPI.method.listVolumes, request);
    const existing = volumes.filter(({ name, state }) => name === volumeId && !goneStates.includes(state));
    const own = existing.map((volume) => toInlineVolume(place, volume)).find((volume) => volume?.volumeId === volumeId);
    return { own, foreign: own === undefined ? existing[0]?.UUID : undefined };
  }

  async #allIn(ctx: RequestContext, place: InlinePlace): Promise<readonly InlineVolume[]> {
    const { endpoints, scheme } = place.cluster;
    const cluster = this.#clusters.open(operator, endpoints, scheme);
    const found: InlineVolume[] = [];
    const listed = readAll(async (range) =>
      (await cluster.call(ctx, DurosAPI.method.listVolumes, { projectName: place.project, ...range })).volumes
    );
    for await (const volume of listed) {
      const own = goneStates.includes(volume.state) ? undefined : toInlineVolume(place, volume);
      if (own !== undefined) found.push(own);
    }
    return found;
  }
}

function allowsInline(cluster: KnownCluster): cluster is InlineCluster {
  return cluster.inline !== undefined;
}

function foreignError(ctx: RequestContext, uuid: string): StatusError {
  return ctx.error(
    "FAILED_PRECONDITION",
    `volume ${uuid} has that name and not the label ${idLabel} with it, so it is not ours; it is left ` +
      `alone, and has to go or be renamed on LightOS`,
  );
}

/** The token that a pod brings, and nothing else of its secrets: a pod does not decide which server is trusted. */
function podToken(secrets: Secrets): Secrets | undefined {
  const { jwt } = secrets.parse(z.object({ jwt: z.string().optional() }));
  return jwt === undefined ? undefined : new Secrets({ jwt });
}

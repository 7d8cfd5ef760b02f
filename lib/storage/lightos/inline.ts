/**
 * Inline volumes of pods on LightOS: made and removed by the node itself, on the clusters of the cluster file that have the
 * key `ephemeral` (facts: docs/reference/csi.md section 15; docs/reference/lightos-api.md sections 9.4, 14 and 15.1).
 *
 * All that is known of such a volume afterwards is its CSI volume ID. So that is its name on LightOS, which makes the
 * repeat of a call find it; and it is in a label too, which tells our volume from one that anybody else gave that name.
 * Other labels say for which node, pod and path it was made: that is how leftovers of a dead node are found.
 *
 * Two tokens. A pod's own may pay for the making, and is not there when the volume has to go; so everything else is done
 * with the token of the cluster file, and a volume that this one does not see is removed on the spot, by the pod's.
 */
import { Buffer } from "node:buffer";
import * as z from "zod";
import { type RequestContext, Secrets } from "../../context.ts";
import { hasCode, isFinal, messageOf, StatusError } from "../../error.ts";
import { formatEndpoints, formatVolumeId } from "../../volume_id.ts";
import { hostNqn } from "../../namespace.ts";
import { parseQuantity } from "../../quantity.ts";
import { DurosAPI, type Volume as LightosVolume, Volume_StateEnum as State } from "../../../proto/gen/lightos_pb.ts";
import type { InlineVolume, InlineVolumeRequest, InlineVolumeStore, StorageBackend } from "../backend.ts";
import { type ClusterPool, readInParts } from "./cluster.ts";
import type { InlineRules, KnownCluster, KnownClusters } from "./cluster_file.ts";
import { qosPolicyOf } from "./modification.ts";
import { parametersSchema, problemsOf, volumeSize } from "./parameters.ts";

type Backend = Pick<StorageBackend, "createVolume" | "deleteVolume" | "grantAccess" | "revokeAccess">;

/** A cluster that allows inline volumes. */
type Open = KnownCluster & { readonly ephemeral: InlineRules };

/** A project of such a cluster. */
interface Place {
  readonly cluster: Open;
  readonly project: string;
}

/** No secrets: ClusterPool then takes the token of the cluster file. */
const operator = new Secrets();

/** The inline volumes of the LightOS backend. */
export function lightosInlineVolumes(backend: Backend, clusters: ClusterPool, known: KnownClusters): InlineVolumeStore {
  const openClusters = () => known.all().filter(isOpen);
  const places = (): readonly Place[] =>
    openClusters().flatMap((cluster) => cluster.ephemeral.projects.map((project) => ({ cluster, project })));

  const self: InlineVolumeStore = {
    obstacle: () =>
      openClusters().length > 0 ? undefined : "no cluster of the cluster file allows them, the key ephemeral is needed",

    async makeVolume(ctx, secrets, wanted) {
      const action = `make the inline volume ${wanted.volumeId}`;
      const wish = readAttributes(action, wanted.attributes, openClusters());
      const paying = ownToken(secrets);
      let mayBeThere = wanted.isRepeat;
      try {
        const own = await ensure(ctx, action, wish, paying, wanted, () => mayBeThere = true);
        return await backend.grantAccess(ctx, operator, own.storageId, {
          hostNqn: hostNqn(wanted.nodeId),
          shared: false,
        });
      } catch (error) {
        if (!isFinal(error) || !mayBeThere) throw error;
        // The orchestrator takes a final answer as a reason never to ask for the removal of what is there all the same.
        let left: string;
        try {
          const found = await self.findVolume(ctx, wanted.volumeId);
          if (found === undefined) throw error;
          left = `volume ${found.uuid} is there and is removed with the pod`;
        } catch (second) {
          if (second === error) throw error;
          left = `whether something of it is left cannot be told (${messageOf(second)})`;
        }
        throw new StatusError("UNAVAILABLE", `${messageOf(error)}; ${left}`, { cause: error });
      }
    },

    async findVolume(ctx, volumeId) {
      const action = `find the inline volume ${volumeId}`;
      const looks = await Promise.all(
        places().map(async (place) => {
          try {
            return await look(ctx, action, place, operator, volumeId);
          } catch (error) {
            return { own: undefined, problem: `${describe(place)}: ${messageOf(error)}` };
          }
        }),
      );
      const found = looks.find(({ own }) => own !== undefined)?.own;
      if (found !== undefined) return found;
      const problems = looks.flatMap((look) => "problem" in look ? [look.problem] : []);
      if (problems.length === 0) return undefined;
      throw new StatusError("UNAVAILABLE", `Cannot ${action}: some clusters cannot be asked (${problems.join("; ")})`);
    },

    async removeVolume(ctx, { storageId, nodeId }) {
      if (nodeId !== undefined) await backend.revokeAccess(ctx, operator, storageId, hostNqn(nodeId));
      await backend.deleteVolume(ctx, operator, storageId);
    },

    async listVolumes(ctx, nodeId) {
      const action = `list the inline volumes of ${nodeId}`;
      const problems: string[] = [];
      const found = await Promise.all(
        places().map(async (place) => {
          try {
            return await allIn(ctx, action, place);
          } catch (error) {
            problems.push(`${describe(place)}: ${messageOf(error)}`);
            return [];
          }
        }),
      );
      return { volumes: found.flat().filter((volume) => volume.nodeId === nodeId), problems };
    },
  };
  return self;

  /** The volume, made if need be: ours, and seen with the operator's token. Tells by `begins` that it is to be made. */
  async function ensure(
    ctx: RequestContext,
    action: string,
    wish: Wish,
    paying: Secrets | undefined,
    wanted: InlineVolumeRequest,
    begins: () => void,
  ): Promise<InlineVolume> {
    const { place } = wish;
    let before: Look;
    try {
      before = await look(ctx, action, place, operator, wanted.volumeId);
    } catch (error) {
      // An earlier call may have made it when this token was still good.
      if (paying !== undefined && isFinal(error)) await undo(ctx, action, place, paying, wanted.volumeId, error);
      throw error;
    }
    if (before.own !== undefined) return before.own;
    if (before.foreign !== undefined) throw notOurs(action, before.foreign);
    begins();
    await backend.createVolume(ctx, paying ?? operator, {
      name: wanted.volumeId,
      requiredBytes: wish.sizeBytes,
      limitBytes: 0n,
      parameters: wish.parameters,
      madeFor: labelsOf(wanted),
    });
    let after: Look;
    try {
      after = await look(ctx, action, place, operator, wanted.volumeId);
    } catch (error) {
      if (paying !== undefined && isFinal(error)) await undo(ctx, action, place, paying, wanted.volumeId, error);
      throw error;
    }
    if (after.own !== undefined) return after.own;
    if (after.foreign !== undefined) throw notOurs(action, after.foreign);
    const unseen = new StatusError(
      "FAILED_PRECONDITION",
      `Cannot ${action}: the token of the cluster file (${place.cluster.jwtPath}) does not see what the pod's token made in ` +
        `${describe(place)}, so nobody could remove it; a token with a right to that project is needed there`,
    );
    if (paying !== undefined) await undo(ctx, action, place, paying, wanted.volumeId, unseen);
    throw unseen;
  }

  /** Removes what a pod's token made and the operator's does not see; throws UNAVAILABLE when that cannot be done now. */
  async function undo(
    ctx: RequestContext,
    action: string,
    place: Place,
    paying: Secrets,
    volumeId: string,
    reason: unknown,
  ): Promise<void> {
    try {
      const { own } = await look(ctx, action, place, paying, volumeId);
      if (own === undefined) return;
      await backend.deleteVolume(ctx, paying, own.storageId);
      ctx.log.info("removed a volume that nobody could remove later", { volume: own.uuid, name: volumeId });
    } catch (error) {
      // A token that may nothing at all has made nothing either.
      if (hasCode(error, "UNAUTHENTICATED", "PERMISSION_DENIED")) return;
      throw new StatusError(
        "UNAVAILABLE",
        `${messageOf(reason)}; what was made cannot be removed now (${messageOf(error)})`,
        { cause: error },
      );
    }
  }

  /** What has the name of this volume in a project, as the token in `secrets` sees it. */
  async function look(
    ctx: RequestContext,
    action: string,
    place: Place,
    secrets: Secrets,
    volumeId: string,
  ): Promise<Look> {
    const { endpoints, scheme } = place.cluster;
    const cluster = clusters.open(secrets, endpoints, scheme);
    const request = { name: volumeId, projectName: place.project };
    const { volumes } = await cluster.call(ctx, action, DurosAPI.method.listVolumes, request);
    const living = volumes.filter(({ name, state }) => name === volumeId && !dead.includes(state));
    const own = living.map((volume) => toEphemeral(place, volume)).find((volume) => volume?.volumeId === volumeId);
    return { own, foreign: own === undefined ? living[0]?.UUID : undefined };
  }

  async function allIn(ctx: RequestContext, action: string, place: Place): Promise<readonly InlineVolume[]> {
    const { endpoints, scheme } = place.cluster;
    const cluster = clusters.open(operator, endpoints, scheme);
    const found: InlineVolume[] = [];
    for (let offsetUUID = "";;) {
      const { volumes } = await readInParts(longestPage, (limit) => {
        const request = { projectName: place.project, offsetUUID, limit: BigInt(limit) };
        return cluster.call(ctx, action, DurosAPI.method.listVolumes, request);
      });
      const last = volumes.at(-1)?.UUID;
      // Whether LightOS counts what it leaves out towards the limit is not documented, so only an empty page is the end.
      if (last === undefined || last === offsetUUID) return found;
      for (const volume of volumes) {
        const own = dead.includes(volume.state) ? undefined : toEphemeral(place, volume);
        if (own !== undefined) found.push(own);
      }
      offsetUUID = last;
    }
  }
}

/** Most objects in one of LightOS' pages (docs/reference/lightos-api.md section 15.1). */
const longestPage = 1000;

/** Volumes with a certain name: ours, or the UUID of one that is not. */
interface Look {
  readonly own: InlineVolume | undefined;
  readonly foreign: string | undefined;
}

const dead = [State.Deleting, State.Deleted, State.Failed];

function isOpen(cluster: KnownCluster): cluster is Open {
  return cluster.ephemeral !== undefined;
}

function describe({ cluster, project }: Place): string {
  return `cluster "${cluster.name}", project "${project}"`;
}

function notOurs(action: string, uuid: string): StatusError {
  return new StatusError(
    "FAILED_PRECONDITION",
    `Cannot ${action}: volume ${uuid} has that name and not the label ${idLabel} with it, so it is not ours; it is left ` +
      `alone, and has to go or be renamed on LightOS`,
  );
}

/** The token that a pod brings, and nothing else of its secrets: with whom to talk is not for it to say. */
function ownToken(secrets: Secrets): Secrets | undefined {
  const { jwt } = secrets.parse(z.object({ jwt: z.string().optional() }));
  return jwt === undefined ? undefined : new Secrets({ jwt });
}

// ----------------------------------------------------------------------------------------------------------- attributes

interface Wish {
  readonly place: Place;
  readonly sizeBytes: bigint;
  /** As in a StorageClass. */
  readonly parameters: Readonly<Record<string, string>>;
}

const { shape } = parametersSchema;
const attributesSchema = z.strictObject({
  "cluster": z.string().optional(),
  "size": z.string({ error: "is missing, give a size such as 10Gi" }).transform((text, check) => {
    const bytes = parseQuantity(text);
    if (bytes !== undefined) return bytes;
    check.addIssue("is not a size such as 10Gi");
    return z.NEVER;
  }),
  "project-name": shape["project-name"],
  "replica-count": shape["replica-count"].optional(),
  "compression": shape.compression,
  "qos-policy-name": shape["qos-policy-name"],
  "qos-policy-uuid": shape["qos-policy-uuid"],
  "host-encryption": shape["host-encryption"]
    .refine((enabled) => !enabled, "is enabled, but inline volumes have no secret of their own to be encrypted with"),
  // For the node, which checks it.
  "mkfs-options": z.string().optional(),
});

/** What a StorageClass or a Secret says and a pod must not: its author would send the operator's token anywhere. */
const forbidden = /^(?:mgmt-.*|jwt)$/;

function readAttributes(action: string, given: Readonly<Record<string, string>>, open: readonly Open[]): Wish {
  const refuse = (problem: string, code: "INVALID_ARGUMENT" | "OUT_OF_RANGE" = "INVALID_ARGUMENT") =>
    new StatusError(code, `Cannot ${action}: volume attribute ${problem}`);
  const whereabouts = Object.keys(given).filter((key) => forbidden.test(key));
  if (whereabouts.length > 0) {
    throw refuse(
      `${
        whereabouts.map((key) => `"${key}"`).join(", ")
      } is not for pods: the cluster file of the node says where clusters ` +
        `are, "cluster" names one of them`,
    );
  }
  const parsed = attributesSchema.safeParse(given);
  if (!parsed.success) {
    throw refuse(problemsOf(parsed.error, given, Object.keys(attributesSchema.shape)).join("; "));
  }
  const { cluster: name, size, "project-name": asked, ...rest } = parsed.data;
  qosPolicyOf(action, rest);

  const names = open.map((cluster) => cluster.name).join(", ");
  const cluster = name === undefined && open.length === 1 ? open[0] : open.find((cluster) => cluster.name === name);
  if (cluster === undefined) {
    throw refuse(
      name === undefined
        ? `"cluster" is missing, give one of ${names}`
        : `"cluster" "${name}" is not one that allows inline volumes (${names})`,
    );
  }
  const { projects, maxSizeBytes } = cluster.ephemeral;
  const project = asked ?? (projects.length === 1 ? projects[0] : undefined);
  if (project === undefined) throw refuse(`"project-name" is missing, give one of ${projects.join(", ")}`);
  if (!projects.includes(project)) {
    throw refuse(
      `"project-name" "${project}" is not one that cluster "${cluster.name}" allows (${projects.join(", ")})`,
    );
  }
  const sizeBytes = volumeSize(action, { requiredBytes: size, limitBytes: 0n });
  if (sizeBytes > maxSizeBytes) {
    throw refuse(
      `"size" "${given["size"]}" is ${sizeBytes} bytes in whole GiB, cluster "${cluster.name}" allows ${maxSizeBytes}`,
      "OUT_OF_RANGE",
    );
  }
  const passedOn = ["replica-count", "compression", "qos-policy-name", "qos-policy-uuid"].flatMap((key) => {
    const value = given[key];
    return value === undefined ? [] : [[key, value] as const];
  });
  return {
    place: { cluster, project },
    sizeBytes,
    parameters: {
      "replica-count": "1",
      ...Object.fromEntries(passedOn),
      "mgmt-endpoint": formatEndpoints(cluster.endpoints),
      "mgmt-scheme": cluster.scheme,
      "project-name": project,
    },
  };
}

// --------------------------------------------------------------------------------------------------------------- labels

// Only letters: LightOS keeps no more of a label's key than what follows its last "-" or "." (docs/reference/lightos-api.md section 14).
const idLabel = "ephemeral";
const nodeLabel = "node";
const podLabels = { namespace: "namespace", name: "pod", uid: "poduid" };
/** A value has 253 characters at most, and a path more; LightOS takes 16 labels. */
const pathLabels = ["target", "targetb", "targetc", "targetd", "targete", "targetf"];
const pathLabelLength = 252;

function labelsOf({ volumeId, nodeId, targetPath, pod }: InlineVolumeRequest): Readonly<Record<string, string>> {
  // A path has characters that a label cannot have.
  const encoded = Buffer.from(targetPath).toString("base64url");
  const parts = pathLabels.map((key, at) =>
    [key, encoded.slice(at * pathLabelLength, (at + 1) * pathLabelLength)] as const
  ).filter(([, part]) => part !== "");
  // A path that does not fit is left out: half a path is never there, and would make the volume look forgotten.
  const fits = encoded.length <= pathLabels.length * pathLabelLength;
  return {
    [idLabel]: volumeId,
    [nodeLabel]: nodeId,
    [podLabels.namespace]: pod.namespace,
    [podLabels.name]: pod.name,
    [podLabels.uid]: pod.uid,
    ...(fits ? Object.fromEntries(parts) : {}),
  };
}

/** The inline volume that this is; undefined for any other volume. */
function toEphemeral(place: Place, volume: LightosVolume): InlineVolume | undefined {
  const labels = new Map(volume.labels.map(({ key, value }) => [key, value]));
  const volumeId = labels.get(idLabel);
  // A clone or a restored volume has the labels of its origin, and another name.
  if (volumeId === undefined || volumeId !== volume.name) return undefined;
  const { cluster, project } = place;
  const uuid = volume.UUID.toLowerCase();
  const encoded = pathLabels.map((key) => labels.get(key) ?? "").join("");
  return {
    volumeId,
    storageId: formatVolumeId({
      endpoints: cluster.endpoints,
      uuid,
      project: volume.projectName === "" ? project : volume.projectName,
      scheme: cluster.scheme,
      hostEncryption: undefined,
    }),
    uuid,
    capacityBytes: volume.size,
    place: describe(place),
    nodeId: labels.get(nodeLabel),
    targetPath: encoded === "" ? undefined : Buffer.from(encoded, "base64url").toString(),
    pod: {
      namespace: labels.get(podLabels.namespace) ?? "",
      name: labels.get(podLabels.name) ?? "",
      uid: labels.get(podLabels.uid) ?? "",
    },
    connectedHosts: volume.connectedHosts,
  };
}

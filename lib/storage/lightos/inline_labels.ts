/**
 * Labels of inline volumes on LightOS: they identify a volume as ours, and say for which node, pod and path it was made.
 *
 * LightOS keeps of a label's key only what follows its last "-" or "." (docs/reference/lightos-api.md section 14), so
 * the keys here have letters only.
 */
import { Buffer } from "node:buffer";
import type { Volume as LightosVolume } from "../../../proto/gen/lightos_pb.ts";
import { formatVolumeId } from "../../volume_id.ts";
import type { InlineVolume, InlineVolumeRequest } from "../backend.ts";
import type { InlinePlace } from "./inline_attributes.ts";

/** The label with the CSI volume ID. */
export const idLabel = "ephemeral";
const nodeLabel = "node";
const podLabels = { namespace: "namespace", name: "pod", uid: "poduid" };
/** A value has 253 characters at most, and a path may have more; LightOS takes 16 labels. */
const pathLabels = ["target", "targetb", "targetc", "targetd", "targete", "targetf"];
const pathLabelLength = 252;

/** The labels of a new inline volume. */
export function inlineLabels(
  { volumeId, nodeId, targetPath, pod }: InlineVolumeRequest,
): Readonly<Record<string, string>> {
  // A path has characters that a label cannot have.
  const encoded = Buffer.from(targetPath).toString("base64url");
  const parts = pathLabels.map((key, at) =>
    [key, encoded.slice(at * pathLabelLength, (at + 1) * pathLabelLength)] as const
  ).filter(([, part]) => part !== "");
  // A path that does not fit is left out: half a path never exists, and would make the volume look like a leftover.
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

/** The inline volume in `place` that these labels describe; undefined for any other volume. */
export function toInlineVolume(place: InlinePlace, volume: LightosVolume): InlineVolume | undefined {
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
    place: describePlace(place),
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

/** A place for messages. */
export function describePlace({ cluster, project }: InlinePlace): string {
  return `cluster "${cluster.name}", project "${project}"`;
}

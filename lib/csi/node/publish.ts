/** NodePublishVolume: shows the staged volume at the target path of a pod. */
import { type NodePublishVolumeRequest, VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import type { RequestContext } from "../../context.ts";
import { reasonOf } from "../../host/command_reason.ts";
import { parseMountFlags } from "../../host/filesystem/mount_flags.ts";
import type { Host } from "../../host/host.ts";
import { canonicalPath, makeMountPoint } from "../../host/mount_point.ts";
import { describeMount, type Mount, mountsAt, mountsElsewhere, mountTable } from "../../host/mount_table.ts";
import type { BlockDevice } from "../../host/nvme/devices.ts";
import { recheckDevice } from "../../host/nvme/recheck.ts";
import { unmount, unmountAll } from "../../host/unmount.ts";
import { mountsOf, relationOf } from "../../host/volume_mounts.ts";
import { Secrets } from "../../secrets.ts";
import { isInlineId } from "../inline/inline_id.ts";
import { type Access, isReaderOnly, longestVolumeId, parseCapability, requirePath, requireText } from "../request.ts";
import { assertMountPath } from "./mount_path.ts";
import type { NodeParts } from "./options.ts";
import { setReadOnly } from "./read_only.ts";
import { ensureStaged } from "./repair.ts";
import { assertNotMounted } from "./staging.ts";
import { parseRemoteNamespace } from "./volume.ts";

/**
 * CSI specification, "NodePublishVolume" (docs/reference/csi.md 7.5). Stages the volume again where its staging is
 * broken.
 */
export async function nodePublishVolume(node: NodeParts, request: NodePublishVolumeRequest, call: RequestContext) {
  const { host } = node;
  const parsing = call.doing("publish the volume");
  const volumeId = requireText(parsing, "volume_id", request.volumeId, longestVolumeId);
  if (isInlineId(volumeId)) {
    await node.inline.publish(request, call);
    return {};
  }
  const givenTarget = requirePath(parsing, "target_path", request.targetPath);
  const access = parseCapability(parsing, request.volumeCapability);
  const readOnly = request.readonly || isReaderOnly(access.mode) ||
    (access.type === "mount" && parseMountFlags(access.mountFlags).readOnly);
  if (request.stagingTargetPath === "") {
    throw parsing.error(
      "FAILED_PRECONDITION",
      "staging_target_path is missing, the volume has to be staged first",
    );
  }
  const givenStaging = requirePath(parsing, "staging_target_path", request.stagingTargetPath);
  const id = node.parseId(volumeId);
  const ctx = call.with({ volume: id.uuid }).doing(`publish the volume ${id.uuid}`);
  const namespace = parseRemoteNamespace(ctx, id, request.publishContext);
  using _held = node.locks.take(`volume ${id.uuid}`, "NodePublishVolume");
  host.pending.assertAnswering(ctx, id.uuid);

  const { target, staging } = await resolvePaths(node, ctx, givenTarget, givenStaging);
  const secrets = new Secrets(request.secrets);
  const staged = { volumeId, id, access, namespace, secrets, mkfsOptions: "", isRepair: true };
  const device = await ensureStaged(node, ctx, staged, staging);
  await showAtTarget(host, ctx, { device, access, readOnly, target, staging, source: staging ?? givenStaging });
  return {};
}

/** A volume that is staged, and how it is to be shown. */
interface Publication {
  readonly device: BlockDevice;
  readonly access: Access;
  readonly readOnly: boolean;
  /** Free of symbolic links, as is the next one. */
  readonly target: string;
  /** Undefined: the directory of the staging path is missing, which does not matter for a raw block device. */
  readonly staging: string | undefined;
  /** The staging path of a file system. */
  readonly source: string;
}

/** The paths of a publish without symbolic links; throws for one where no volume may be mounted. */
async function resolvePaths(
  { host, allowSystemPaths = false }: NodeParts,
  ctx: RequestContext,
  givenTarget: string,
  givenStaging: string,
): Promise<{ readonly target: string; readonly staging: string | undefined }> {
  const target = await canonicalPath(host, givenTarget);
  if (target === undefined) {
    throw ctx.error("FAILED_PRECONDITION", `the directory of the target path "${givenTarget}" is missing`);
  }
  const staging = await canonicalPath(host, givenStaging);
  assertMountPath(ctx, "target_path", target, allowSystemPaths);
  if (target === staging) {
    throw ctx.error("INVALID_ARGUMENT", `target_path and staging_target_path are both "${target}"`);
  }
  if (staging !== undefined) assertMountPath(ctx, "staging_target_path", staging, allowSystemPaths);
  return { target, staging };
}

/** Binds the volume to its target, unless it is there already. */
async function showAtTarget(host: Host, ctx: RequestContext, publication: Publication): Promise<void> {
  const { device, access, readOnly, target, staging, source } = publication;
  const table = await mountTable(host);
  const there = mountsAt(table, target).at(-1);
  const relation = there === undefined ? undefined : await relationOf(host, there, device);
  if (there !== undefined && (relation === "ours" || relation === "our device node")) {
    assertSamePublish(ctx, there, relation, publication);
    // An unpublish that was cut off may have made the device writable under a read-only mount.
    if (relation === "our device node") await setReadOnly(host, ctx, device, { readOnly });
    return;
  }
  assertSingleTarget(ctx, mountsElsewhere(table, await mountsOf(host, table, device), staging, target), publication);
  if (access.type === "block") {
    await assertNotMounted(host, ctx.doing(`${ctx.action} as a block device`), device);
  }
  // A dead mount shows the pod nothing but errors and is removed; a foreign one is an error.
  if (there !== undefined) await unmountAll(host, ctx, target, device);

  if (access.type === "block") {
    await makeMountPoint(host, ctx, target, "file");
    await recheckDevice(host, ctx, device);
    await setReadOnly(host, ctx, device, { readOnly });
    await bind(host, ctx, { source: device.path, target, readOnly });
  } else {
    await makeMountPoint(host, ctx, target, "directory");
    await bind(host, ctx, { source, target, readOnly });
  }
  await assertShown(host, ctx, publication);
}

/** Throws ALREADY_EXISTS when the volume is published at this target in another way than requested. */
function assertSamePublish(
  ctx: RequestContext,
  mount: Mount,
  relation: "ours" | "our device node",
  { access, readOnly, target }: Publication,
): void {
  const differences: string[] = [];
  const type = relation === "ours" ? "mount" : "block";
  if (type !== access.type) differences.push(`as ${type} instead of ${access.type}`);
  const isReadOnly = mount.options.includes("ro");
  if (isReadOnly !== readOnly) {
    differences.push(`${isReadOnly ? "read-only" : "writable"} instead of ${readOnly ? "read-only" : "writable"}`);
  }
  if (differences.length === 0) return;
  throw ctx.doing(`${ctx.action} at "${target}"`)
    .error("ALREADY_EXISTS", `it is published there already, ${differences.join(", ")}`);
}

/**
 * Throws FAILED_PRECONDITION when another target of the volume on this node forbids this one (docs/reference/csi.md
 * 7.5). SINGLE_NODE_WRITER does not forbid it: orchestrators that do not know SINGLE_NODE_MULTI_WRITER use it in that
 * sense, and two pods of a node share the volume.
 */
function assertSingleTarget(
  ctx: RequestContext,
  others: readonly Mount[],
  { access, readOnly }: Publication,
): void {
  // A directory of the volume that kubelet shows to a container (subPath) is not a target.
  const target = others.find((mount) => mount.root === "/" || mount.fsType === "devtmpfs" || access.type === "block");
  if (target === undefined) return;
  if (access.mode === Mode.SINGLE_NODE_SINGLE_WRITER || access.mode === Mode.SINGLE_NODE_READER_ONLY) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `it is published at "${target.path}", and access mode ${Mode[access.mode]} allows one target on a node`,
    );
  }
  if (access.type === "block" && target.options.includes("ro") !== readOnly) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `it is published at "${target.path}" ${readOnly ? "for writing" : "read-only"}, and a block device is either ` +
        `read-only or writable for all its users on a node`,
    );
  }
}

async function bind(
  host: Host,
  ctx: RequestContext,
  { source, target, readOnly }: { readonly source: string; readonly target: string; readonly readOnly: boolean },
): Promise<void> {
  const args = ["-o", readOnly ? "bind,ro" : "bind", source, target];
  const result = await host.run("mount", args, { signal: ctx.signal, onAbort: "finish", log: ctx.log });
  if (result.code === 0) return;
  // A read-only bind mount takes two steps. A final answer after the first would make the orchestrator forget the
  // mount.
  const isThere = mountsAt(await mountTable(host), target).length > 0;
  throw ctx.error(
    isThere ? "UNAVAILABLE" : "FAILED_PRECONDITION",
    `mount failed with exit ${result.code} (${reasonOf("mount", result)})`,
  );
}

/** Throws UNAVAILABLE when the bind mount does not show the volume's device. */
async function assertShown(
  host: Host,
  ctx: RequestContext,
  { device, access, target }: Publication,
): Promise<void> {
  const mount = mountsAt(await mountTable(host), target).at(-1);
  const relation = mount === undefined ? undefined : await relationOf(host, mount, device);
  if (relation === (access.type === "block" ? "our device node" : "ours")) return;
  // Another namespace took the device name in the meantime. If the mount stayed, every call for either volume would
  // find a foreign mount at the target.
  if (access.type === "block" && mount?.root.endsWith(`/${device.name}`)) {
    await unmount(host, ctx, target);
  }
  throw ctx.error(
    "UNAVAILABLE",
    `after the bind mount, ${
      mount === undefined ? "nothing" : describeMount(mount)
    } is at "${target}" instead of ${device.path}`,
  );
}

/** Calls of the node service without a socket, for tests. */
import assert from "node:assert/strict";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { requestContext } from "../../lib/context.ts";
import { inlineVolumes } from "../../lib/csi/inline/inline_volumes.ts";
import type { NodeOptions } from "../../lib/csi/node/options.ts";
import { nodeHandlers } from "../../lib/csi/node/service.ts";
import { type StatusCode, StatusError } from "../../lib/error.ts";
import type { CallContext, Handlers } from "../../lib/grpc/server.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { createLogger, type Logger } from "../../lib/log.ts";
import { toPublishContext } from "../../lib/namespace.ts";
import type { InlineVolumeStore } from "../../lib/storage/backend.ts";
import { parseVolumeId } from "../../lib/volume_id.ts";
import {
  Node,
  NodeExpandVolumeRequestSchema,
  NodeGetInfoRequestSchema,
  NodeGetVolumeStatsRequestSchema,
  NodePublishVolumeRequestSchema,
  NodeStageVolumeRequestSchema,
  NodeUnpublishVolumeRequestSchema,
  NodeUnstageVolumeRequestSchema,
  VolumeCapability_AccessMode_Mode as Mode,
  type VolumeCapabilitySchema,
} from "../../proto/gen/csi_pb.ts";
import { subsystemNqn } from "./loop_machine.ts";

export type Capability = MessageInitShape<typeof VolumeCapabilitySchema>;

export function volumeId(uuid: string): string {
  return `mgmt:192.0.2.1:443|nguid:${uuid}|proj:default|scheme:grpcs`;
}

export function mountCapability(fsType = "", mode = Mode.SINGLE_NODE_WRITER, mountFlags: string[] = []): Capability {
  return { accessMode: { mode }, accessType: { case: "mount", value: { fsType, mountFlags } } };
}

export function blockCapability(mode = Mode.SINGLE_NODE_WRITER): Capability {
  return { accessMode: { mode }, accessType: { case: "block", value: {} } };
}

export function publishContext(uuid: string): Record<string, string> {
  return toPublishContext({
    uuid,
    subsystemNqn,
    addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }],
    discovery: [{ traddr: "192.0.2.1", trsvcid: "8009" }],
  });
}

export function callContext(signal = new AbortController().signal, log: Logger = createLogger("error")): CallContext {
  return { ...requestContext(signal, new Date(Date.now() + 120_000), log), header: () => undefined };
}

type Request<S extends Parameters<typeof create>[0]> = MessageInitShape<S>;

/** The node service's RPCs, each with what a usual request has filled in. */
export function nodeCalls(
  given: Partial<Omit<NodeOptions, "inline">> & Pick<NodeOptions, "host" | "attacher"> & {
    readonly volumes?: InlineVolumeStore | undefined;
  },
) {
  const options = {
    locks: new KeyedLock(),
    nodeId: "n1.node",
    defaultFsType: "ext4" as const,
    parseId: (text: string) => parseVolumeId(text),
    canExpand: true,
    volumes: undefined,
    ...given,
  };
  const inline = inlineVolumes(options);
  const handlers: Handlers<typeof Node> = nodeHandlers({ ...options, inline });
  const { nodeStageVolume, nodeUnstageVolume, nodePublishVolume, nodeUnpublishVolume } = handlers;
  const { nodeGetVolumeStats, nodeExpandVolume, nodeGetInfo } = handlers;
  assert(nodeStageVolume && nodeUnstageVolume && nodePublishVolume && nodeUnpublishVolume);
  assert(nodeGetVolumeStats && nodeExpandVolume && nodeGetInfo);
  return {
    handlers,
    inline,
    stage: (request: Request<typeof NodeStageVolumeRequestSchema>, call = callContext()) =>
      nodeStageVolume(create(NodeStageVolumeRequestSchema, request), call),
    unstage: (request: Request<typeof NodeUnstageVolumeRequestSchema>, call = callContext()) =>
      nodeUnstageVolume(create(NodeUnstageVolumeRequestSchema, request), call),
    publish: (request: Request<typeof NodePublishVolumeRequestSchema>, call = callContext()) =>
      nodePublishVolume(create(NodePublishVolumeRequestSchema, request), call),
    unpublish: (request: Request<typeof NodeUnpublishVolumeRequestSchema>, call = callContext()) =>
      nodeUnpublishVolume(create(NodeUnpublishVolumeRequestSchema, request), call),
    stats: (request: Request<typeof NodeGetVolumeStatsRequestSchema>, call = callContext()) =>
      nodeGetVolumeStats(create(NodeGetVolumeStatsRequestSchema, request), call),
    expand: (request: Request<typeof NodeExpandVolumeRequestSchema>, call = callContext()) =>
      nodeExpandVolume(create(NodeExpandVolumeRequestSchema, request), call),
    info: () => nodeGetInfo(create(NodeGetInfoRequestSchema), callContext()),
  };
}

/** Asserts that `promise` rejects with a StatusError of this code, whose message matches. */
export async function rejects(promise: Promise<unknown>, code: StatusCode, message: RegExp): Promise<void> {
  await assert.rejects(promise, (error) => {
    assert(error instanceof StatusError, `not a StatusError: ${error instanceof Error ? error.stack : error}`);
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return true;
  });
}

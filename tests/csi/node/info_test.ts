/** NodeGetInfo and NodeGetCapabilities. */
import assert from "node:assert/strict";
import { create } from "@bufbuild/protobuf";
import { NodeGetCapabilitiesRequestSchema, NodeServiceCapability_RPC_Type as Rpc } from "../../../proto/gen/csi_pb.ts";
import { node, nodeTest } from "../../support/loop_node.ts";
import { callContext } from "../../support/node_calls.ts";

nodeTest("NodeGetInfo and NodeGetCapabilities answer what the node was started with", async () => {
  await using n = await node();

  assert.deepEqual(await n.info(), { nodeId: "n1.node", maxVolumesPerNode: 0n });
  const answer = await n.handlers.nodeGetCapabilities?.(create(NodeGetCapabilitiesRequestSchema), callContext());
  const types = answer?.capabilities?.map(({ type }) => type?.case === "rpc" ? Rpc[type.value.type ?? 0] : "");
  assert.deepEqual(types, [
    "STAGE_UNSTAGE_VOLUME",
    "GET_VOLUME_STATS",
    "VOLUME_CONDITION",
    "EXPAND_VOLUME",
    "SINGLE_NODE_MULTI_WRITER",
  ]);
});

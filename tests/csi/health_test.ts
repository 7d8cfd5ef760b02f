/** Which health calls of CSI 1.13 the program announces, by its options. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { Channel } from "../../lib/grpc/client.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as ControllerRpc,
  Node,
  NodeServiceCapability_RPC_Type as NodeRpc,
} from "../../proto/gen/csi_pb.ts";
import { eventually } from "../support/simulator.ts";

const nodeId = "a.node";
const controller = Controller.method;
const node = Node.method;

/** The names of the health capabilities that a process with these options and variables announces. */
async function announcedBy(role: "controller" | "node", args: readonly string[], env: Record<string, string>) {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-health-" });
  const main = fileURLToPath(new URL("../../main.ts", import.meta.url));
  const process = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", main, role, ...args],
    env: { CSI_ENDPOINT: `unix://${directory}/csi.sock`, LB_CSI_1_13: "", LB_CSI_NODE_ID: nodeId, ...env },
    stdout: "null",
    stderr: "null",
  }).spawn();
  try {
    using channel = new Channel({ address: `unix://${directory}/csi.sock` });
    return await eventually(`the ${role} answers`, async () => {
      const options = { signal: AbortSignal.timeout(5000), deadline: new Date(Date.now() + 5000) };
      try {
        if (role === "node") {
          const { capabilities } = await channel.call(node.nodeGetCapabilities, {}, options);
          return capabilities.map(({ type }) => type.case === "rpc" ? NodeRpc[type.value.type] : "");
        }
        const { capabilities } = await channel.call(controller.controllerGetCapabilities, {}, options);
        return capabilities.map(({ type }) => type.case === "rpc" ? ControllerRpc[type.value.type] : "");
      } catch {
        return undefined;
      }
    }, 30_000).then((names) => names.filter((name) => name?.endsWith("_HEALTH")));
  } finally {
    process.kill("SIGTERM");
    await process.status;
    await Deno.remove(directory, { recursive: true });
  }
}

for (
  const [what, role, args, env, announced] of [
    ["controller", "controller", [], {}, []],
    ["controller --csi-1.13", "controller", ["--csi-1.13"], {}, ["GET_VOLUME_HEALTH"]],
    ["node", "node", [], {}, []],
    ["node with LB_CSI_1_13=true", "node", [], { LB_CSI_1_13: "true" }, ["GET_VOLUME_HEALTH", "GET_STORAGE_HEALTH"]],
  ] as const
) {
  Deno.test(`lbcsi ${what} announces ${announced.join(" and ") || "no health"}`, async () => {
    assert.deepEqual(await announcedBy(role, args, env), announced);
  });
}

/** The CSI calls that the demo makes for a volume, each with the checks that follow it. */
import { join } from "node:path";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { Controller, Node } from "../../proto/gen/csi_pb.ts";
import { hostNqn } from "../namespace.ts";
import { kindOf } from "./machine.ts";
import { hostsIn, Scenario } from "./scenario.ts";

/** The node that the demo publishes its volumes to. */
export const nodeId = "demo-1.node";

const otherNodeId = "demo-2.node";

const gib = 1n << 30n;

type Capability = MessageInitShape<typeof Node.method.nodeStageVolume.input>["volumeCapability"];

/** A volume of the demo, with everything that an orchestrator remembers about it. */
export interface DemoVolume {
  readonly name: string;
  readonly capability: NonNullable<Capability>;
  readonly staging: string;
  readonly target: string;
  id: string;
  publishContext: Record<string, string>;
  volumeContext: Record<string, string>;
}

/** Makes the directories of a volume that an orchestrator makes. */
export async function prepareVolume(
  scenario: Scenario,
  name: string,
  capability: NonNullable<Capability>,
): Promise<DemoVolume> {
  const staging = join(scenario.testbed.home, "staging", name);
  const pod = join(scenario.testbed.home, "pods", name);
  // The orchestrator makes the staging directory and the parent of the target path; the driver makes the target path.
  for (const directory of [staging, pod]) await Deno.mkdir(directory, { recursive: true, mode: 0o750 });
  return { name, capability, staging, target: join(pod, "volume"), id: "", publishContext: {}, volumeContext: {} };
}

type Repeat = "again" | undefined;

/** Creates the volume and resolves with its size in bytes. */
export async function create(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<bigint> {
  const answer = await scenario.call(scenario.testbed.controller, Controller.method.createVolume, {
    name: volume.name,
    capacityRange: { requiredBytes: gib },
    volumeCapabilities: [volume.capability],
    parameters: scenario.testbed.parameters,
    secrets: scenario.testbed.secrets,
  }, { unchanged: repeat === "again" });
  const made = answer.volume;
  const listed = scenario.inventory.volumes.filter(({ name, state }) => name === volume.name && state === "Available");
  scenario.check(
    "the cluster has exactly one such volume, of the size that the answer says",
    listed.length === 1 && made !== undefined && listed[0]?.sizeBytes === made.capacityBytes &&
      made.capacityBytes >= gib,
    `${listed.length} volumes, ${listed[0]?.sizeBytes} bytes, answer ${made?.capacityBytes}`,
  );
  if (repeat === "again") scenario.check("the answer is the same volume", made?.volumeId === volume.id, made?.volumeId);
  volume.id = made?.volumeId ?? "";
  volume.volumeContext = made?.volumeContext ?? {};
  return made?.capacityBytes ?? 0n;
}

function controllerPublishRequest(scenario: Scenario, volume: DemoVolume, node: string) {
  return {
    volumeId: volume.id,
    nodeId: node,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
    secrets: scenario.testbed.secrets,
  };
}

/** Publishes the volume to the node `nodeId`. */
export async function publish(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  const answer = await scenario.call(
    scenario.testbed.controller,
    Controller.method.controllerPublishVolume,
    controllerPublishRequest(scenario, volume, nodeId),
    { unchanged: repeat === "again" },
  );
  const acl = scenario.inventory.volumes.find(({ name }) => name === volume.name)?.acl ?? [];
  scenario.check(`${nodeId} alone may connect`, acl.length === 1 && acl[0] === hostNqn(nodeId), acl.join(", "));
  volume.publishContext = answer.publishContext;
}

/** Publishes the volume to a second node, which must fail. */
export async function publishToSecondNodeFails(scenario: Scenario, volume: DemoVolume): Promise<void> {
  await scenario.callFails(
    scenario.testbed.controller,
    Controller.method.controllerPublishVolume,
    controllerPublishRequest(scenario, volume, otherNodeId),
    { code: "FAILED_PRECONDITION", named: nodeId, name: `ControllerPublishVolume ${otherNodeId}` },
  );
}

/** Stages the volume on the node. */
export async function stage(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.node, Node.method.nodeStageVolume, {
    volumeId: volume.id,
    publishContext: volume.publishContext,
    stagingTargetPath: volume.staging,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
  }, { unchanged: repeat === "again", free: true });
}

/** Publishes the volume at its target path on the node. */
export async function nodePublish(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.node, Node.method.nodePublishVolume, {
    volumeId: volume.id,
    publishContext: volume.publishContext,
    stagingTargetPath: volume.staging,
    targetPath: volume.target,
    volumeCapability: volume.capability,
    volumeContext: volume.volumeContext,
  }, { unchanged: repeat === "again", free: true });
  scenario.check(
    "exactly one mount is at the target",
    scenario.inventory.mounts.filter(({ at }) => at === volume.target).length === 1,
  );
}

/** Ends the use of the volume on the node `nodeId`: removes it from its target path, unstages it, and unpublishes it. */
export async function takeFromNode(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await nodeUnpublish(scenario, volume, repeat);
  await unstage(scenario, volume, repeat);
  await unpublish(scenario, volume, repeat);
}

/** Removes the volume from its target path. */
async function nodeUnpublish(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.node, Node.method.nodeUnpublishVolume, {
    volumeId: volume.id,
    targetPath: volume.target,
  }, { unchanged: repeat === "again", free: true });
  scenario.check("the target is gone", await kindOf(volume.target) === "absent", await kindOf(volume.target));
}

/** Unstages the volume on the node. */
async function unstage(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.node, Node.method.nodeUnstageVolume, {
    volumeId: volume.id,
    stagingTargetPath: volume.staging,
  }, { unchanged: repeat === "again", free: true });
  scenario.check(
    "nothing is mounted there, and the Discovery-Client has no entry of it",
    scenario.mountAt(volume.staging) === undefined &&
      !scenario.inventory.entries.some((entry) => volume.id.includes(entry)),
    scenario.inventory.entries.join(", "),
  );
}

/** Unpublishes the volume from the node `nodeId`. */
export async function unpublish(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.controller, Controller.method.controllerUnpublishVolume, {
    volumeId: volume.id,
    nodeId,
    secrets: scenario.testbed.secrets,
  }, { unchanged: repeat === "again" });
  const acl = scenario.inventory.volumes.find(({ name }) => name === volume.name)?.acl;
  scenario.check("no host may connect", acl !== undefined && hostsIn(acl).length === 0, acl?.join(", "));
}

/** Deletes the volume, and after the first call the directories that the orchestrator made. */
export async function remove(scenario: Scenario, volume: DemoVolume, repeat?: Repeat): Promise<void> {
  await scenario.call(scenario.testbed.controller, Controller.method.deleteVolume, {
    volumeId: volume.id,
    secrets: scenario.testbed.secrets,
  }, { unchanged: repeat === "again" });
  const live = scenario.inventory.volumes.filter(({ name, state }) => name === volume.name && state !== "Deleting");
  scenario.check(
    "the cluster has it no more, or is deleting it",
    live.length === 0,
    live.map(({ state }) => state).join(),
  );
  // The orchestrator removes the directories that it made. This fails unless they are empty.
  if (repeat === "again") return;
  await Deno.remove(volume.staging);
  await Deno.remove(join(scenario.testbed.home, "pods", volume.name));
}

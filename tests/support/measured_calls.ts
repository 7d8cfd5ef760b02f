/**
 * What CSI calls cost: calls of the management API, counted by the simulator, and programs started on the node, counted by
 * wrappers around every program on PATH. Neither number comes from the driver.
 */
import { basename, join } from "node:path";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import type { DemoFsType as FsType } from "../../lib/demo/demo.ts";
import { countsBetween, Testbed } from "../../lib/demo/testbed.ts";
import type { Channel } from "../../lib/grpc/client.ts";
import { Controller, Node, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";

export type { FsType };

/** The cost of one call. */
export interface Cost {
  /** `NodeStageVolume, new ext4 volume`. */
  readonly call: string;
  /** Calls of the management API, one entry each. */
  readonly managementCalls: readonly string[];
  /** Programs that were started, in their order. */
  readonly programs: readonly string[];
  /** The same programs from the node's log. */
  readonly logged: readonly string[];
}

/** The label of the volume whose calls must connect first. */
export const firstVolume = "first volume";

/** The highest cost of a call over an open connection, by its RPC. Programs are counted on the node only. */
export const bounds: Readonly<
  Record<string, { readonly managementCalls: number; readonly programs: number | undefined }>
> = {
  CreateVolume: { managementCalls: 2, programs: undefined },
  DeleteVolume: { managementCalls: 2, programs: undefined },
  ControllerPublishVolume: { managementCalls: 2, programs: undefined },
  ControllerUnpublishVolume: { managementCalls: 2, programs: undefined },
  NodeStageVolume: { managementCalls: 0, programs: 4 },
  NodePublishVolume: { managementCalls: 0, programs: 1 },
  NodeGetVolumeStats: { managementCalls: 0, programs: 0 },
  NodeUnpublishVolume: { managementCalls: 0, programs: 1 },
  NodeUnstageVolume: { managementCalls: 0, programs: 1 },
};

const nodeId = "bounds.node";

/**
 * Takes volumes through their lives and measures each call.
 *
 * @param fsTypes file systems to measure the node with; empty: the controller alone, which needs neither root nor loop
 *   devices
 */
export async function measureCalls(
  program: readonly string[],
  fsTypes: readonly FsType[],
  signal: AbortSignal,
): Promise<readonly Cost[]> {
  const home = await Deno.makeTempDir({ prefix: "lbcsi-bounds-" });
  const testbed = new Testbed(home, program);
  try {
    return await runLives(testbed, fsTypes, signal);
  } finally {
    const left = (await testbed.cleanUp(false)).filter(({ done }) => !done);
    for (const { what } of left) console.error(`could not clean up: ${what}`);
  }
}

async function runLives(testbed: Testbed, fsTypes: readonly FsType[], signal: AbortSignal): Promise<readonly Cost[]> {
  const withNode = fsTypes.length > 0;
  await testbed.startSimulator(withNode ? "loop" : "none", signal);
  await testbed.startController(signal);
  const programs = withNode ? await wrapPrograms(testbed.home) : undefined;
  if (programs !== undefined) await testbed.startNode(nodeId, signal, { PATH: programs.directory });
  const costs: Cost[] = [];
  const meter = async <I extends DescMessage, O extends DescMessage>(
    call: string,
    channel: Channel,
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
  ): Promise<MessageShape<O>> => {
    await programs?.started();
    await testbed.newLogLines();
    const before = await testbed.managementCalls();
    const answer = await channel.call(method, request, { signal, deadline: new Date(Date.now() + 60_000) });
    const counts = countsBetween(before, await testbed.managementCalls());
    const log = await testbed.newLogLines();
    costs.push({
      call: `${method.name}, ${call}`,
      managementCalls: Object.entries(counts).flatMap(([rpc, count]) => Array<string>(count).fill(rpc)),
      programs: await programs?.started() ?? [],
      logged: log.filter(({ event }) => event === "ran a command" || event === "ran a probe")
        .map(({ command = "" }) => basename(command.split(" ", 1)[0] ?? "")),
    });
    return answer;
  };

  // The first calls make the connection, check the API version and ask for the cluster information, kept for a minute.
  await runLife(testbed, meter, { label: firstVolume });
  await runLife(testbed, meter, { label: "volume" });
  for (const fsType of fsTypes) await runLife(testbed, meter, { label: `${fsType} volume`, fsType });
  if (withNode) await runLife(testbed, meter, { label: "block volume", type: "block" });
  return costs;
}

type Meter = <I extends DescMessage, O extends DescMessage>(
  label: string,
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
) => Promise<MessageShape<O>>;

/** A volume to measure. */
interface MeasuredVolume {
  readonly label: string;
  /** Default `mount`. */
  readonly type?: "mount" | "block";
  /** Undefined: the volume is not used on the node, unless it is a block volume. */
  readonly fsType?: FsType;
}

/** Takes a volume from creation to deletion. */
async function runLife(
  testbed: Testbed,
  meter: Meter,
  { label, type = "mount", fsType }: MeasuredVolume,
): Promise<void> {
  const { addresses, controller } = testbed;
  const secrets = { jwt: addresses.jwt };
  const volumeCapability: NonNullable<MessageInitShape<typeof Node.method.nodeStageVolume.input>["volumeCapability"]> =
    {
      accessType: type === "block"
        ? { case: "block", value: {} }
        : { case: "mount", value: { fsType: fsType ?? "ext4" } },
      accessMode: { mode: Mode.SINGLE_NODE_MULTI_WRITER },
    };
  const { volume } = await meter(label, controller, Controller.method.createVolume, {
    name: `bounds-${label.replaceAll(" ", "-")}`,
    capacityRange: { requiredBytes: 1n << 30n },
    volumeCapabilities: [volumeCapability],
    parameters: {
      "mgmt-endpoint": addresses.grpcs.join(","),
      "mgmt-scheme": "grpcs",
      "project-name": addresses.projects[0] ?? "",
      "replica-count": "1",
    },
    secrets,
  });
  const volumeId = volume?.volumeId ?? "";
  const { publishContext } = await meter(label, controller, Controller.method.controllerPublishVolume, {
    volumeId,
    nodeId,
    volumeCapability,
    secrets,
  });
  if (type === "block" || fsType !== undefined) {
    const staging = await Deno.makeTempDir({ dir: testbed.home, prefix: "staging-" });
    const pod = await Deno.makeTempDir({ dir: testbed.home, prefix: "pod-" });
    const target = join(pod, "target");
    for (const state of ["new", "known"]) {
      const what = `${state} ${label}`;
      await meter(what, testbed.node, Node.method.nodeStageVolume, {
        volumeId,
        publishContext,
        stagingTargetPath: staging,
        volumeCapability,
      });
      await meter(what, testbed.node, Node.method.nodePublishVolume, {
        volumeId,
        publishContext,
        stagingTargetPath: staging,
        targetPath: target,
        volumeCapability,
      });
      await meter(what, testbed.node, Node.method.nodeGetVolumeStats, { volumeId, volumePath: target });
      await meter(what, testbed.node, Node.method.nodeUnpublishVolume, { volumeId, targetPath: target });
      await meter(what, testbed.node, Node.method.nodeUnstageVolume, { volumeId, stagingTargetPath: staging });
    }
  }
  await meter(label, controller, Controller.method.controllerUnpublishVolume, { volumeId, nodeId, secrets });
  await meter(label, controller, Controller.method.deleteVolume, { volumeId, secrets });
}

/** A directory with a wrapper for every program on PATH, which records the program's name and runs it. */
async function wrapPrograms(
  home: string,
): Promise<{ readonly directory: string; started(): Promise<readonly string[]> }> {
  const directory = join(home, "programs");
  const wrapper = join(home, "wrapper");
  const notes = join(home, "started");
  const path = Deno.env.get("PATH") ?? "";
  await Deno.mkdir(directory);
  await Deno.writeTextFile(notes, "");
  await Deno.writeTextFile(
    wrapper,
    `#!/bin/sh\nname=\${0##*/}\necho "$name" >>'${notes}'\nPATH='${path}' exec "$name" "$@"\n`,
    { mode: 0o755 },
  );
  const names = new Set<string>();
  for (const place of path.split(":")) {
    try {
      for (const { name } of Deno.readDirSync(place)) names.add(name);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory)) throw error;
    }
  }
  for (const name of names) Deno.symlinkSync(wrapper, join(directory, name));
  let read = 0;
  return {
    directory,
    async started() {
      const lines = (await Deno.readTextFile(notes)).trimEnd().split("\n").filter((line) => line !== "");
      const fresh = lines.slice(read);
      read = lines.length;
      return fresh;
    },
  };
}

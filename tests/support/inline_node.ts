/** A node that makes inline volumes on a simulated cluster, with everything of its pods in a directory of its own. */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { volumeLimit } from "../../lib/csi/node/limit.ts";
import { createDirectAttacher } from "../../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { createLogger } from "../../lib/log.ts";
import { isSubsystemOf } from "../../lib/cli/backends.ts";
import { hostNqn } from "../../lib/namespace.ts";
import type { ConfigFiles } from "../../lib/storage/cluster_file.ts";
import { lightosBackend } from "../../lib/storage/lightos/backend.ts";
import { knownClusters } from "../../lib/storage/lightos/cluster_file.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { lightosOptions } from "./backends.ts";
import { needs } from "./needs.ts";
import { callContext, mountCapability, nodeCalls } from "./node_calls.ts";
import { eventually, startSimulator, type TestSimulator } from "./simulator.ts";

export const inlineNodeId = "n1.node";
export const inlineHost = hostNqn(inlineNodeId);

/** The ID that kubelet would give the `n`th inline volume. */
export function inlineId(n = 1): string {
  return `csi-${n.toString(16).padStart(64, "0")}`;
}

export function podUid(n = 1): string {
  return `0b5c7f2e-0000-4000-8000-${String(n).padStart(12, "0")}`;
}

/** One entry of a cluster file, for a simulator; its token is in the file `/jwt`. */
export function clusterEntry(sim: TestSimulator, more: Readonly<Record<string, unknown>> = {}) {
  return {
    name: "rack1",
    endpoints: sim.addresses.grpc,
    scheme: "grpc",
    jwt: "/jwt",
    ephemeral: { projects: ["default"], maxSize: "2Gi" },
    ...more,
  };
}

/** Files in memory, the cluster file `/clusters.yaml` among them; what is changed is seen at the next use. */
export function filesOf(clusters: readonly unknown[], jwt: string) {
  const contents: Record<string, string> = { "/jwt": jwt, "/clusters.yaml": JSON.stringify({ clusters }) };
  const files: ConfigFiles = {
    stamp: (path) => contents[path] ?? "",
    read(path) {
      const text = contents[path];
      if (text === undefined) throw new Error(`ENOENT: ${path}`);
      return text;
    },
  };
  return { contents, files };
}

/** The inline volumes of a backend that knows the clusters of these files. */
export function openInline(files: ConfigFiles, write: (line: string) => void = () => {}) {
  const log = createLogger("debug", "json", write);
  const backend = lightosBackend({
    ...lightosOptions,
    log,
    clusters: knownClusters("/clusters.yaml", files, log),
  });
  assert(backend.inline !== undefined);
  return { backend, volumes: backend.inline, log };
}

/** What kubelet sends for the `n`th inline volume at `targetPath`. */
export function inlineRequest(
  targetPath: string,
  attributes: Readonly<Record<string, string>> = { size: "1Gi" },
  n = 1,
) {
  return {
    volumeId: inlineId(n),
    targetPath,
    volumeCapability: mountCapability("ext4", Mode.SINGLE_NODE_WRITER),
    volumeContext: {
      ...attributes,
      "csi.storage.k8s.io/ephemeral": "true",
      "csi.storage.k8s.io/pod.name": `pod${n}`,
      "csi.storage.k8s.io/pod.namespace": "team-a",
      "csi.storage.k8s.io/pod.uid": podUid(n),
      "csi.storage.k8s.io/serviceAccount.name": "default",
    },
  };
}

export interface InlineNodeSettings {
  readonly data?: "none" | "loop";
  /** Changes of the cluster file's entry. */
  readonly entry?: Readonly<Record<string, unknown>>;
  readonly strategy?: "discovery-client" | "direct";
  /** How many volumes the node may have; any number if absent. */
  readonly maxVolumes?: number;
  /** In place of the simulator's machine. */
  readonly host?: (sim: TestSimulator) => Host & { readonly discoveryDirectory: string };
}

/** See the head of this file. Dispose it, with `await using`. */
export async function inlineNode(
  { data = "loop", entry, strategy, maxVolumes = 0, host: hostOf }: InlineNodeSettings = {},
) {
  await using stack = new AsyncDisposableStack();
  const sim = stack.use(await startSimulator({ data }));
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-inline-" }));
  const mounts = async () =>
    parseMountTable(await Deno.readTextFile("/proc/self/mountinfo")).filter(({ path }) => path.startsWith(directory));
  stack.defer(async () => {
    // Never through a mount into a file system.
    for (const { path } of (await mounts()).toReversed()) {
      await new Deno.Command("umount", { args: [path] }).output();
    }
    assert.deepEqual(await mounts(), []);
    await Deno.remove(directory, { recursive: true });
  });
  const lines: string[] = [];
  const { contents, files } = filesOf([clusterEntry(sim, entry)], sim.addresses.jwt);
  const { discoveryDir = "", sysfsRoot = "", devRoot = "" } = sim.addresses;
  const host = hostOf?.(sim) ?? createLinuxHost({ log: createLogger("error"), sysfsRoot, devRoot });
  const inDirectory = "discoveryDirectory" in host ? String(host.discoveryDirectory) : discoveryDir;
  const locks = new KeyedLock();
  const attacher = strategy === "direct"
    ? createDirectAttacher({ host, hostNqn: inlineHost, hostId: podUid(0), locks })
    : createDiscoveryClientAttacher({ host, directory: inDirectory, hostNqn: inlineHost });
  const { backend, volumes, log } = openInline(files, (line) => lines.push(line));
  stack.use(backend);
  const limit = volumeLimit(host, maxVolumes, isSubsystemOf("lightos"));
  const calls = nodeCalls({ host, attacher, locks, volumes, nodeId: inlineNodeId, limit });
  const parts = stack.move();
  return {
    ...calls,
    sim,
    host,
    attacher,
    volumes,
    directory,
    contents,
    lines,
    mounts,
    /** The context of a call whose log lines are in `lines`. */
    call: (signal?: AbortSignal) => callContext(signal, log),
    /** The target path of the `n`th volume; its directory is made, as kubelet does. */
    async target(n = 1): Promise<string> {
      const target = join(directory, "pods", podUid(n), "volumes/kubernetes.io~csi/scratch/mount");
      await Deno.mkdir(dirname(target), { recursive: true });
      return target;
    },
    /** What kubelet does when a pod has gone. */
    async forget(n = 1): Promise<void> {
      await Deno.remove(join(directory, "pods", podUid(n)), { recursive: true });
    },
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

export type InlineNode = Awaited<ReturnType<typeof inlineNode>>;

const ignore = !needs("root", "loop", "mkfs.ext4");

/** A test that needs root, loop devices and ext4, and `more` programs. */
export function inlineTest(name: string, fn: () => Promise<void>, ...more: string[]): void {
  Deno.test({ name, ignore: ignore || !needs(...more), fn });
}

/** Asserts that nothing is left of any volume, on the cluster or on the machine. */
export async function assertNothingLeft(n: InlineNode): Promise<void> {
  await eventually("the volumes go", () => n.sim.control.leftovers().volumes.length === 0);
  await n.sim.control.waitUntilSettled();
  assert.deepEqual(n.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
  assert.deepEqual(await n.mounts(), []);
  assert.deepEqual([...Deno.readDirSync(n.sim.addresses.discoveryDir ?? "")], []);
}

/** Whether something is at a path; symbolic links are not followed. */
export async function exists(path: string): Promise<boolean> {
  try {
    await Deno.lstat(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** A node service on a machine of loop devices (see loop_machine.ts), and the requests that kubelet would send it. */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { Attacher } from "../../lib/host/attach/attacher.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import type { Host } from "../../lib/host/host.ts";
import type { KeyedLock } from "../../lib/lock.ts";
import { loopMachine } from "./loop_machine.ts";
import { needs } from "./needs.ts";
import { type Capability, mountCapability, nodeCalls, publishContext, volumeId } from "./node_calls.ts";

export const mib = 1 << 20;
export const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
export const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";

const ignore = !needs("root", "loop", "mkfs.ext4");

/** A test that needs root, loop devices and ext4; `skip` for a reason of its own. */
export function nodeTest(name: string, fn: () => Promise<void>, skip = false): void {
  Deno.test({ name, ignore: ignore || skip, fn });
}

export interface LoopNodeOptions {
  /** Size of the namespace in MiB; 64 when absent. */
  readonly sizeMib?: number;
  readonly attach?: Attacher;
  readonly locks?: KeyedLock;
  /** The directory, below the machine's, of the staging and target paths; the machine's own when absent. */
  readonly base?: string;
  /** Changes the machine for the node service. */
  readonly host?: (host: Host) => Host;
}

/** A node with one namespace, a staging path, and the directory of a pod; all calls at hand. */
export async function node(options: LoopNodeOptions = {}) {
  const machine = await loopMachine();
  try {
    const namespace = await machine.addNamespace(uuid, (options.sizeMib ?? 64) * mib);
    const discovery = join(machine.directory, "discovery.d");
    await Deno.mkdir(discovery);
    const base = options.base === undefined ? machine.directory : join(machine.directory, options.base);
    await Deno.mkdir(base, { recursive: true });
    const staging = join(base, "globalmount");
    await Deno.mkdir(staging);
    const host = options.host === undefined ? machine.host : options.host(machine.host);
    const attacher = options.attach ??
      createDiscoveryClientAttacher({ host, directory: discovery, hostNqn: "nqn.h:n1" });
    const calls = nodeCalls({ host, attacher, ...(options.locks === undefined ? {} : { locks: options.locks }) });
    const target = join(base, "pod1");
    const stageRequest = (
      volumeCapability: Capability = mountCapability(),
      volumeContext = {},
      stagingTargetPath = staging,
    ) => ({
      volumeId: volumeId(uuid),
      stagingTargetPath,
      publishContext: publishContext(uuid),
      volumeCapability,
      volumeContext,
    });
    const publishRequest = (
      volumeCapability: Capability = mountCapability(),
      readonly = false,
      targetPath = target,
      stagingTargetPath = staging,
    ) => ({
      volumeId: volumeId(uuid),
      stagingTargetPath,
      targetPath,
      publishContext: publishContext(uuid),
      volumeCapability,
      readonly,
    });
    const unstageRequest = { volumeId: volumeId(uuid), stagingTargetPath: staging };
    const unpublishRequest = { volumeId: volumeId(uuid), targetPath: target };
    return {
      ...calls,
      host,
      machine,
      namespace,
      base,
      staging,
      target,
      discovery,
      stageRequest,
      publishRequest,
      unstageRequest,
      unpublishRequest,
      [Symbol.asyncDispose]: () => machine[Symbol.asyncDispose](),
    };
  } catch (error) {
    await machine[Symbol.asyncDispose]();
    throw error;
  }
}

/** Whether this process may grow a mounted ext4: containers may lack CAP_SYS_RESOURCE although they run as root. */
export function canGrowMountedExt4(): boolean {
  const hex = /CapEff:\s*(\w+)/.exec(Deno.readTextFileSync("/proc/self/status"))?.[1] ?? "0";
  const can = (BigInt(`0x${hex}`) & (1n << 24n)) !== 0n;
  if (!can) console.warn("skipped, this machine has no CAP_SYS_RESOURCE: growing a mounted ext4");
  return can;
}

/** The machine as a container sees it that may not grow a mounted ext4. */
export function withoutSysResource(host: Host): Host {
  return {
    ...host,
    readText: (path) =>
      path === "/proc/self/status" ? Promise.resolve("CapEff:\t000001fffeffffff\n") : host.readText(path),
  };
}

export function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

export async function sha256(path: string): Promise<string> {
  const { code, stdout } = await new Deno.Command("sha256sum", { args: [path] }).output();
  assert.equal(code, 0);
  return new TextDecoder().decode(stdout).slice(0, 64);
}

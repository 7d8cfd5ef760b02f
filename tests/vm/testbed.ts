/**
 * The test bed inside the guest: commands, kernel files, and the program's processes, which are a simulated cluster over the
 * kernel's NVMe/TCP target, a controller, and a node that attaches directly. A scenario acts as the orchestrator. Nothing of
 * this runs on the host.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import type { ServiceProcess } from "../../lib/demo/process.ts";
import { type Backend, Testbed } from "../../lib/demo/testbed.ts";
import { CallError, type Channel } from "../../lib/grpc/client.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { uuidInId } from "../../lib/volume_id.ts";
import { Controller, Node, VolumeCapability_AccessMode_Mode as Mode } from "../../proto/gen/csi_pb.ts";
import { enter } from "../support/image_root.ts";
import { codeAt } from "./code.ts";

/** What the host has made ready: see code.ts. */
const code = codeAt(Deno.env.get("LBCSI_VM_CODE") ?? "");

/** What starts the program. */
export const program: readonly string[] = [Deno.execPath(), ...code.program];

/** How long a process may take to start; on a quiet machine it takes 5 s. */
const patienceMs = 600_000;

export const nodeId = "guest.node";

export interface Finished {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a command to its end; a non-zero exit is an answer. */
export async function run(command: string, ...args: readonly string[]): Promise<Finished> {
  const { code, stdout, stderr } = await new Deno.Command(command, { args: [...args], env: { LC_ALL: "C" } }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** What a command prints; throws with its words when it fails. */
export async function tool(command: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await run(command, ...args);
  if (code === 0) return stdout;
  throw new Error(`${[command, ...args].join(" ")}: exit ${code}\n${stderr}\n${stdout}`.trimEnd());
}

/** Resolves as soon as `look` gives something; rejects after `seconds`. */
export async function until<T>(
  what: string,
  look: () => T | undefined | false | Promise<T | undefined | false>,
  seconds = 20,
): Promise<T> {
  const began = performance.now();
  for (;;) {
    const passedMs = performance.now() - began;
    const found = await look();
    if (found !== undefined && found !== false) return found;
    if (passedMs > seconds * 1000) throw new Error(`not within ${seconds} s: ${what}`);
    // Polling takes CPU time from the processes that are waited for.
    await new Promise((resolve) => setTimeout(resolve, Math.min(250, Math.max(10, passedMs / 20))));
  }
}

/** The text of a file without blanks at its ends; undefined when it is not there. */
export function read(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch {
    return undefined;
  }
}

/** Sorted names in a directory; none when it is not there. */
export function names(directory: string): readonly string[] {
  try {
    return [...Deno.readDirSync(directory)].map(({ name }) => name).sort();
  } catch {
    return [];
  }
}

/** Loads what nearly all checks need, so that none of them pays for it. */
export async function modulesLoaded(): Promise<void> {
  await tool("modprobe", "-a", "nvme-tcp", "nvmet", "nvmet-tcp", "loop", "ext4", "dm-mod");
}

// ---------------------------------------------------------------------------------------- the kernel, as it is

/** Names of block devices with this namespace UUID: read from sysfs, without the driver's help. */
export function devicesWith(uuid: string): readonly string[] {
  return names("/sys/block").filter((name) =>
    /^nvme\d+n\d+$/.test(name) && read(`/sys/block/${name}/wwid`) === `uuid.${uuid}`
  );
}

/** The only block device with this UUID. */
export function deviceOf(uuid: string): string {
  const [name, ...more] = devicesWith(uuid);
  assert(name !== undefined && more.length === 0, `devices of ${uuid}: ${[name, ...more].join(", ")}`);
  return `/dev/${name}`;
}

export interface ControllerState {
  readonly name: string;
  readonly state: string;
  readonly address: string;
  readonly hostNqn: string;
}

/** NVMe/TCP controllers of the guest's initiator. */
export function controllers(): readonly ControllerState[] {
  return names("/sys/class/nvme").filter((name) => read(`/sys/class/nvme/${name}/transport`) === "tcp").map((name) => ({
    name,
    state: read(`/sys/class/nvme/${name}/state`) ?? "gone",
    address: read(`/sys/class/nvme/${name}/address`) ?? "",
    hostNqn: read(`/sys/class/nvme/${name}/hostnqn`) ?? "",
  }));
}

/** Directories of all namespaces in the target's part of configfs. */
function targets(): readonly string[] {
  const subsystems = "/sys/kernel/config/nvmet/subsystems";
  return names(subsystems).flatMap((nqn) => {
    const namespaces = join(subsystems, nqn, "namespaces");
    return names(namespaces).map((nsid) => join(namespaces, nsid));
  });
}

/** Paths at which something is mounted below a directory. */
export function mountsBelow(directory: string): readonly string[] {
  return parseMountTable(Deno.readTextFileSync("/proc/self/mountinfo")).map(({ path }) => path)
    .filter((path) => path === directory || path.startsWith(`${directory}/`));
}

// ------------------------------------------------------------------------------------------------- the orchestrator

export interface VmVolumeRequest {
  /** Default `ext4`; `block` for a raw block volume. */
  readonly use?: "ext4" | "xfs" | "btrfs" | "block" | "";
  readonly sizeBytes?: bigint;
  readonly mode?: Mode;
  readonly mountFlags?: readonly string[];
  readonly parameters?: Readonly<Record<string, string>>;
  readonly source?: NonNullable<
    MessageInitShape<typeof Controller.method.createVolume.input>["volumeContentSource"]
  >["type"];
}

export type Capability = NonNullable<MessageInitShape<typeof Node.method.nodeStageVolume.input>["volumeCapability"]>;

/** What an orchestrator says of a volume's use in every call. */
export function capabilityOf(
  use: NonNullable<VmVolumeRequest["use"]>,
  mode = Mode.SINGLE_NODE_WRITER,
  mountFlags: readonly string[] = [],
): Capability {
  if (use === "block") return { accessMode: { mode }, accessType: { case: "block", value: {} } };
  return { accessMode: { mode }, accessType: { case: "mount", value: { fsType: use, mountFlags: [...mountFlags] } } };
}

/** What an orchestrator knows of a new volume. */
export interface VolumeFacts {
  readonly id: string;
  readonly context: Record<string, string>;
  readonly directory: string;
  readonly capability: Capability;
}

/** A volume and the calls that an orchestrator makes for it. Each may be repeated. */
export class Volume {
  readonly testbed: GuestTestbed;
  readonly id: string;
  readonly uuid: string;
  /** What is at the volume's paths on the node is in here. */
  readonly directory: string;
  readonly staging: string;
  readonly target: string;
  readonly capability: Capability;
  /** What CreateVolume has answered, for every later call. */
  readonly context: Record<string, string>;
  publishContext: Record<string, string> = {};
  /** For ControllerPublishVolume, beside the token. */
  publishSecrets: Record<string, string> = {};
  /** For NodeStageVolume. */
  stageSecrets: Record<string, string> = {};
  /** For NodePublishVolume: what mends the volume when its device was lost. */
  nodePublishSecrets: Record<string, string> = {};

  constructor(testbed: GuestTestbed, { id, context, directory, capability }: VolumeFacts) {
    this.testbed = testbed;
    this.id = id;
    this.uuid = uuidInId(id) ?? "";
    this.context = context;
    this.directory = directory;
    this.staging = join(directory, "staging");
    this.target = join(directory, "target");
    this.capability = capability;
    Deno.mkdirSync(this.staging, { recursive: true });
  }

  get device(): string {
    return deviceOf(this.uuid);
  }

  /** ControllerPublishVolume: the node is on the access list afterwards. */
  async grant(node = nodeId): Promise<void> {
    const { publishContext } = await this.testbed.controllerCall(Controller.method.controllerPublishVolume, {
      volumeId: this.id,
      nodeId: node,
      volumeCapability: this.capability,
      volumeContext: this.context,
      secrets: { ...this.testbed.secrets, ...this.publishSecrets },
    });
    this.publishContext = publishContext;
    // The simulator answers before its target has changed, and rejects a first connection meanwhile.
    await this.testbed.processes.ask("GET", "/settled");
  }

  /** ControllerUnpublishVolume: the fence. */
  async revoke(node = nodeId): Promise<void> {
    await this.testbed.controllerCall(Controller.method.controllerUnpublishVolume, {
      volumeId: this.id,
      nodeId: node,
      secrets: this.testbed.secrets,
    });
  }

  async stage(seconds?: number): Promise<void> {
    await this.testbed.nodeCall(Node.method.nodeStageVolume, {
      volumeId: this.id,
      volumeContext: this.context,
      publishContext: this.publishContext,
      stagingTargetPath: this.staging,
      volumeCapability: this.capability,
      secrets: this.stageSecrets,
    }, seconds);
  }

  async publish(seconds?: number): Promise<void> {
    await this.testbed.nodeCall(Node.method.nodePublishVolume, {
      volumeId: this.id,
      publishContext: this.publishContext,
      stagingTargetPath: this.staging,
      targetPath: this.target,
      volumeCapability: this.capability,
      volumeContext: this.context,
      secrets: this.nodePublishSecrets,
    }, seconds);
  }

  async unpublish(seconds?: number): Promise<void> {
    const request = { volumeId: this.id, targetPath: this.target };
    await this.testbed.nodeCall(Node.method.nodeUnpublishVolume, request, seconds);
  }

  async unstage(seconds?: number): Promise<void> {
    const request = { volumeId: this.id, stagingTargetPath: this.staging };
    await this.testbed.nodeCall(Node.method.nodeUnstageVolume, request, seconds);
  }

  async stats(path = this.target) {
    return await this.testbed.nodeCall(Node.method.nodeGetVolumeStats, { volumeId: this.id, volumePath: path });
  }

  /** ControllerExpandVolume and NodeExpandVolume; the size that the node has measured. */
  async expand(requiredBytes: bigint, path = this.target): Promise<bigint> {
    await this.testbed.controllerCall(Controller.method.controllerExpandVolume, {
      volumeId: this.id,
      capacityRange: { requiredBytes },
      secrets: this.testbed.secrets,
      volumeCapability: this.capability,
    });
    const { capacityBytes } = await this.testbed.nodeCall(Node.method.nodeExpandVolume, {
      volumeId: this.id,
      volumePath: path,
      capacityRange: { requiredBytes },
    });
    return capacityBytes;
  }

  async delete(): Promise<void> {
    this.testbed.forget(this);
    const request = { volumeId: this.id, secrets: this.testbed.secrets };
    await this.testbed.controllerCall(Controller.method.deleteVolume, request);
  }

  /** The end of its life, from whatever state; nothing of it is left on node and cluster. */
  async end(): Promise<void> {
    await this.unpublish();
    await this.unstage();
    await this.revoke();
    await this.delete();
  }
}

/**
 * Asserts that the driver answers a call with this code and message. The driver answers 250 ms before the caller's
 * deadline, and the emulated machine may need longer to bring the answer: then the call is made again, as kubelet does.
 */
export async function assertCallFails(
  call: () => Promise<unknown>,
  code: CallError["code"],
  message: RegExp,
): Promise<void> {
  for (let attempts = 1;; attempts++) {
    const error = await call().then(() => undefined, (error) => error);
    assert(error instanceof CallError, `not an answer with an error: ${error}`);
    const isLate = error.code === "DEADLINE_EXCEEDED" && error.origin !== "server";
    if (isLate && attempts < 3) continue;
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return;
  }
}

// ----------------------------------------------------------------------------------------------------- the test bed

export interface StartOptions {
  /** Default `lightos`. */
  readonly backend?: Backend;
  /** More options of `lbcsi node`. */
  readonly node?: readonly string[];
  /** More options of `lbcsi simulate`. */
  readonly simulator?: readonly string[];
  /** Runs controller and node in the root file system of the image, as a container does. */
  readonly image?: boolean;
  /** Keeps the cluster and the directories of volumes on the disk that outlives a boot. */
  readonly onDisk?: boolean;
}

/** What the checks of one boot share: the processes, and the volumes that are alive. */
export class GuestTestbed {
  /** A directory in memory; sockets belong here. */
  readonly home = Deno.makeTempDirSync({ dir: "/tmp", prefix: "testbed-" });
  processes = new Testbed(this.home, program, { startLimitMs: patienceMs });
  readonly #measured: (name: string, text: string) => void;
  /** Of what runs; undefined: nothing does. */
  #options: StartOptions | undefined;
  #starts = 0;
  #volumes = 0;
  readonly #alive = new Set<Volume>();

  constructor(measured: (name: string, text: string) => void) {
    this.#measured = measured;
  }

  /** Prints a figure. */
  measured(name: string, text: string): void {
    this.#measured(name, text);
  }

  get secrets(): Record<string, string> {
    return this.processes.secrets;
  }

  /** Starts a new cluster, the controller and the node; first it stops those that run. */
  async start(options: StartOptions): Promise<void> {
    await this.stop();
    this.#options = options;
    this.#starts++;
    const { backend = "lightos" } = options;
    if (backend !== this.processes.backend) {
      this.processes = new Testbed(this.home, program, { backend, startLimitMs: patienceMs });
    }
    if (options.image === true) {
      // Not below /tmp, which the image sees.
      const places = { "/deno-bin": "/deno", [code.directory]: code.directory };
      const { words } = await enter("/image", "/run/image", ["/tmp"], places);
      const inside = [...words, "/deno/deno", ...program.slice(1)];
      this.processes = new Testbed(this.home, inside, { simulator: program, backend, startLimitMs: patienceMs });
    }
    await this.startSimulator();
    const signal = AbortSignal.timeout(patienceMs);
    await Promise.all([this.processes.startController(signal), this.startNode()]);
  }

  /** Whether what runs was started with these options. */
  isStarted(options: StartOptions): boolean {
    return JSON.stringify(this.#options) === JSON.stringify(options);
  }

  get isIdle(): boolean {
    return this.#options === undefined;
  }

  /** Ends whatever runs, in order. */
  async stop(): Promise<void> {
    if (this.#options === undefined) return;
    this.#options = undefined;
    await this.processes.stopAll();
  }

  /** The cluster's memory and contents: not in memory, where sparse files cannot be zeroed in place. */
  get state(): string {
    return this.#options?.onDisk ? "/disk/cluster" : `/var/lib/cluster${this.#starts}`;
  }

  /** The node's log and the controller's, as they are now. */
  logOf(name: "node" | "controller" | "simulator"): string {
    return read(join(this.home, `${name}.log`)) ?? "";
  }

  /** Starts the cluster, or a new one of the same state after the old one ended. */
  async startSimulator(): Promise<ServiceProcess> {
    const { simulator = [] } = this.#options ?? {};
    const servers = this.processes.backend === "lightos" ? ["--schemes", "grpc", "--servers", "2"] : [];
    const options = ["--state", this.state, ...servers, ...simulator];
    return await this.processes.startSimulator("nvmet", AbortSignal.timeout(patienceMs), options);
  }

  /** Starts the node, or a new one after the old one ended; `more` options of `lbcsi node` for this one only. */
  async startNode(more: readonly string[] = []): Promise<ServiceProcess> {
    const options = ["--attach", "direct", ...this.#options?.node ?? [], ...more];
    return await this.processes.startNode(nodeId, AbortSignal.timeout(patienceMs), {}, options);
  }

  async nodeCall<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    seconds = 60,
  ): Promise<MessageShape<O>> {
    return await call(this.processes.node, method, request, seconds);
  }

  async controllerCall<I extends DescMessage, O extends DescMessage>(
    method: DescMethodUnary<I, O>,
    request: MessageInitShape<I>,
    seconds = 60,
  ): Promise<MessageShape<O>> {
    return await call(this.processes.controller, method, request, seconds);
  }

  /** CreateVolume and, unless `grant` is false, ControllerPublishVolume. */
  async volume(request: VmVolumeRequest = {}, grant = true): Promise<Volume> {
    const { use = "ext4", sizeBytes = 1n << 30n, mode = Mode.SINGLE_NODE_WRITER, mountFlags = [] } = request;
    const capability = capabilityOf(use, mode, mountFlags);
    const name = `volume-${++this.#volumes}-${crypto.randomUUID().slice(0, 8)}`;
    const { backend, addresses, parameters } = this.processes;
    // Without TLS, which the emulated machine is slow at, and one replica, so that sizes add up.
    const plain = { "mgmt-endpoint": addresses.grpc.join(","), "mgmt-scheme": "grpc", "replica-count": "1" };
    const { volume } = await this.controllerCall(Controller.method.createVolume, {
      name,
      capacityRange: { requiredBytes: sizeBytes },
      volumeCapabilities: [capability],
      parameters: { ...parameters, ...(backend === "lightos" ? plain : {}), ...request.parameters },
      ...(request.source === undefined ? {} : { volumeContentSource: { type: request.source } }),
      secrets: this.secrets,
    });
    const { volumeId = "", volumeContext = {} } = volume ?? {};
    const directory = join(this.#options?.onDisk ? "/disk/volumes" : this.home, name);
    const made = new Volume(this, { id: volumeId, context: volumeContext, directory, capability });
    this.#alive.add(made);
    if (grant) await made.grant();
    return made;
  }

  /** Takes a volume off the list of those that cleanUp deletes. */
  forget(volume: Volume): void {
    this.#alive.delete(volume);
  }

  /** After a check that failed: heals the target, and ends what is left of the volumes, so that the next check has a chance. */
  async cleanUp(): Promise<void> {
    const quietly = (step: () => Promise<unknown>) => step().catch((error) => console.log(`clean-up: ${error}`));
    for (const server of [0, 1]) {
      await quietly(() => this.processes.ask("POST", "/paths/up", { server }));
      await quietly(() => this.processes.ask("POST", "/paths/ana", { server, state: "optimized" }));
    }
    for (const directory of targets()) await quietly(() => Deno.writeTextFile(join(directory, "enable"), "1"));
    for (const volume of this.#alive) {
      await quietly(() => volume.unpublish(20));
      await quietly(() => volume.unstage(20));
      await quietly(() => volume.revoke());
      await quietly(() => volume.delete());
    }
  }

  /** The directory of a volume's namespace in the target's part of configfs. */
  targetOf(uuid: string): string {
    const found = targets().find((directory) => read(join(directory, "device_uuid")) === uuid);
    assert(found !== undefined, `the target has no namespace ${uuid}`);
    return found;
  }

  /** The file that holds what is on a volume, on the cluster's side. */
  contentOf(uuid: string): string {
    return join(this.state, "content/volumes", `${uuid}.img`);
  }

  /** Asserts that nothing is left of any volume: on the cluster, in the mount table, of devices and connections. */
  async nothingLeft(): Promise<void> {
    const left = await this.processes.clusterWhenIdle(AbortSignal.timeout(30_000));
    assert.deepEqual(Object.values(left).flat(), []);
    assert.deepEqual(mountsBelow(this.home), []);
    // The node looks after connections without a namespace every 10 s, when the last volume went before its neighbours'
    // devices did.
    const ours = () => controllers().filter((controller) => controller.hostNqn === hostNqn(nodeId));
    await until("no connection is left", () => ours().length === 0, 60);
  }

  /** What helps to understand a failure: the ends of the logs, the connections, the mounts. */
  async evidence(): Promise<string> {
    const parts: string[] = [];
    for (const name of names(this.home).filter((name) => name.endsWith(".log"))) {
      const lines = (read(join(this.home, name)) ?? "").split("\n").filter((line) => !line.includes('"rpc":"Probe"'));
      parts.push(`--- ${name}\n${lines.slice(-12).join("\n")}`);
    }
    parts.push(`--- controllers\n${controllers().map((one) => JSON.stringify(one)).join("\n")}`);
    const devices = names("/sys/block").filter((name) => name.startsWith("nvme")).map((name) => {
      const at = (attribute: string) => read(`/sys/block/${name}/${attribute}`);
      return `${name} ${at("wwid")} nsid ${at("nsid")} ${at("ana_state") ?? ""}`;
    });
    parts.push(`--- devices\n${devices.join("\n")}`);
    for (const nqn of names("/sys/kernel/config/nvmet/subsystems")) {
      const target = `/sys/kernel/config/nvmet/subsystems/${nqn}`;
      const shown = names(`${target}/namespaces`).map((nsid) => {
        const at = (attribute: string) => read(`${target}/namespaces/${nsid}/${attribute}`);
        return `nsid ${nsid} ${at("device_uuid")} ${at("device_path")} enable ${at("enable")}`;
      });
      parts.push(`--- target ${nqn}, for ${names(`${target}/allowed_hosts`).join(" ")}\n${shown.join("\n")}`);
    }
    parts.push(`--- mounts\n${mountsBelow(this.home).join("\n")}`);
    parts.push(`--- kernel\n${(await run("dmesg")).stdout.split("\n").slice(-40).join("\n")}`);
    return parts.join("\n");
  }
}

async function call<I extends DescMessage, O extends DescMessage>(
  channel: Channel,
  method: DescMethodUnary<I, O>,
  request: MessageInitShape<I>,
  seconds: number,
): Promise<MessageShape<O>> {
  const limit = AbortSignal.timeout(seconds * 1000 + 30_000);
  return await channel.call(method, request, { signal: limit, deadline: new Date(Date.now() + seconds * 1000) });
}

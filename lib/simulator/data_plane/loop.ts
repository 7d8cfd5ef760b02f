/**
 * A data plane of sparse files behind loop devices. It simulates one machine: the kernel's NVMe driver, the Discovery-Client
 * and nvme-cli. File systems on it are real, and the machine needs no NVMe.
 *
 * - Each namespace that a connected host may access has a device node `nvmeXnY` with the loop device's number, an entry in a
 *   tree like sysfs, and the link that udev would make. They appear and disappear with the ACL.
 * - A device that disappears under a mount leaves a dead mount, as in the kernel: the old loop device keeps its own file,
 *   which is truncated, so that every read and write fails; the volume continues in a copy. Writes in flight at that moment
 *   may or may not be in the copy, in any order. A deleted volume leaves a dead mount too.
 * - Controllers that the Discovery-Client made stay, because removing one of its files has no effect. Those of nvme-cli end
 *   with `nvme disconnect`, together with the devices that have no other path.
 * - After a crash, a simulator with the same directories adopts the loop devices of its volumes, with their names and
 *   mounts, and detaches the rest. A loop device belongs to the simulator when its backing file does.
 */
import { join } from "node:path";
import { messageOf, StatusError } from "../../error.ts";
import { formatAddress, parseAddress, type TransportAddress } from "../../namespace.ts";
import { Contents, copySparse, exists, removeFile } from "./contents.ts";
import { type DataPlane, type ExposedNamespace, type Machine, mayAccess, type ShownDevice } from "./data_plane.ts";
import { type DiscoveryEntry, watchDiscoveryDirectory } from "./discovery_client.ts";
import { FilePlane } from "./file_plane.ts";
import { attachLoop, attachWritableLoop, backingFile, deviceNumber } from "./loop_device.ts";
import {
  type AdoptableLoop,
  adoptableLoops,
  clearNodes,
  type LoopOptions,
  marker,
  prepareMachine,
} from "./loop_setup.ts";
import { type CommandResult, serveNvmeProgram } from "./nvme_program.ts";
import { output, run } from "./run_command.ts";
import { type SysfsController, type SysfsSubsystem, SysfsTree } from "./sysfs.ts";

interface Attached {
  readonly namespace: ExposedNamespace;
  readonly name: string;
  /** `/dev/loop5`. */
  readonly loop: string;
  /** `7:5`. */
  readonly number: string;
  /** Names of the controllers that have a path to it. */
  readonly paths: string;
  readonly damage?: { readonly how: "unreadable" | "empty"; readonly loop: string; readonly file: string };
}

/**
 * Opens the data plane with the contents of its directories.
 *
 * @throws StatusError FAILED_PRECONDITION that names what is missing on this machine, or a directory that holds
 *   something else
 */
export async function openLoopPlane(options: LoopOptions): Promise<DataPlane> {
  await using held = new AsyncDisposableStack();
  await prepareMachine(options, held);
  const contents = await Contents.open(options.contentDir);
  return await LoopPlane.open({ ...options, contentDir: contents.directory }, contents, held);
}

class LoopPlane extends FilePlane implements DataPlane {
  readonly kind = "loop";
  readonly machine: Machine;
  readonly #options: LoopOptions;
  readonly #tree: SysfsTree;
  /** Namespaces without a device although a host may access them, with the name that the device had. */
  readonly #removed = new Map<string, string>();
  readonly #givenNames = new Map<string, string>();
  readonly #attached = new Map<string, Attached>();
  readonly #controllers: SysfsController[] = [];
  /** Loop devices of an earlier run that may be taken over, by volume UUID. */
  readonly #adoptable: Map<string, AdoptableLoop>;
  /** Names of devices that are gone but still open in some process. */
  readonly #zombies = new Map<string, string>();
  readonly #machineId = crypto.randomUUID();
  readonly #held: AsyncDisposableStack;
  #watch: AsyncDisposable | undefined;
  #program: AsyncDisposable | undefined;
  #cuts = 0;

  /** @param held the locks of the directories; the plane releases them at its end */
  static async open(options: LoopOptions, contents: Contents, held: AsyncDisposableStack): Promise<LoopPlane> {
    const adoptable = await adoptableLoops(options);
    const plane = new LoopPlane(options, contents, adoptable, held.move());
    try {
      const report = (entries: readonly DiscoveryEntry[]) => plane.#connect(entries);
      plane.#watch = await watchDiscoveryDirectory(options.discoveryDir, options.log, report);
      plane.#program = await serveNvmeProgram(options.programs, options.log, (args) => plane.#nvme(args));
    } catch (error) {
      await plane[Symbol.asyncDispose]();
      throw error;
    }
    return plane;
  }

  private constructor(
    options: LoopOptions,
    contents: Contents,
    adoptable: Map<string, AdoptableLoop>,
    held: AsyncDisposableStack,
  ) {
    super(contents, options.log);
    this.#options = options;
    this.#held = held;
    this.#adoptable = adoptable;
    this.#tree = new SysfsTree(options.sysfsRoot);
    clearNodes(options.devRoot);
    Deno.mkdirSync(join(options.devRoot, "disk/by-id"), { recursive: true });
    this.machine = this.#createMachine();
  }

  #createMachine(): Machine {
    const deviceOf = (uuid: string) => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) return device;
      throw new StatusError("NOT_FOUND", `Cannot change the device of namespace ${uuid}: it has none`);
    };
    const devices = () => [...this.#attached.values()].map((device) => shown(this.#options.devRoot, device));
    return {
      get devices() {
        return devices();
      },
      remove: (uuid) =>
        this.enqueue(async () => {
          const device = deviceOf(uuid);
          this.#removed.set(uuid, device.name);
          await this.#detach(device, true);
        }),
      restore: (uuid, name) =>
        this.enqueue(async () => {
          const old = this.#removed.get(uuid);
          if (old === undefined) {
            throw new StatusError("NOT_FOUND", `Cannot restore the device of namespace ${uuid}: it was not removed`);
          }
          this.#removed.delete(uuid);
          this.#givenNames.set(uuid, name ?? this.#freeName(this.#instanceOf(uuid), old));
          await this.reconcile();
          return shown(this.#options.devRoot, deviceOf(uuid));
        }),
      swap: (uuid, otherUuid) =>
        this.enqueue(async () => {
          const one = deviceOf(uuid);
          const two = deviceOf(otherUuid);
          for (const device of [one, two]) this.#hideDevice(device);
          await this.#showDevice({ ...one, name: two.name });
          await this.#showDevice({ ...two, name: one.name });
        }),
      damage: (uuid, how) => this.enqueue(() => this.#damage(deviceOf(uuid), how)),
      heal: (uuid) => this.enqueue(() => this.#heal(deviceOf(uuid))),
    };
  }

  // ------------------------------------------------------------------------------------------------------- contents

  deleteVolume(uuid: string): Promise<void> {
    this.exposed.delete(uuid);
    return this.enqueue(async () => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) await this.#detach(device, false);
      this.#removed.delete(uuid);
      this.#givenNames.delete(uuid);
      const adoptable = this.#adoptable.get(uuid);
      this.#adoptable.delete(uuid);
      if (adoptable !== undefined) await this.#release(adoptable.loop, uuid, false);
      await this.contents.deleteVolume(uuid);
    });
  }

  rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void> {
    return this.enqueue(async () => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) await this.#detach(device, false);
      await this.contents.rollbackVolume(uuid, snapshotUuid, sizeBytes);
    });
  }

  connectedHosts() {
    const nqns = new Set(this.#controllers.map(({ hostNqn }) => hostNqn));
    return [...nqns].map((hostNqn) => ({ hostNqn, address: "127.0.0.1", hostname: Deno.hostname() }));
  }

  async start(): Promise<void> {
    this.isStarted = true;
    await this.enqueue(async () => {
      await this.reconcile();
      // Not needed by any volume: the namespace was deleted or hidden while no simulator ran.
      for (const [uuid, { loop }] of this.#adoptable) await this.#release(loop, uuid, true);
      this.#adoptable.clear();
    });
  }

  clear(): Promise<void> {
    this.exposed.clear();
    return this.enqueue(async () => {
      for (const device of [...this.#attached.values()]) await this.#detach(device, false);
      this.#removed.clear();
      this.#givenNames.clear();
      await this.contents.clear();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#watch?.[Symbol.asyncDispose]();
    await this.#program?.[Symbol.asyncDispose]();
    await this.enqueue(async () => {
      for (const device of [...this.#attached.values()]) {
        this.#hideDevice(device);
        if (device.damage !== undefined) await this.#dropDamage(device.damage);
        // A process that still uses it keeps its content until it closes the device.
        await this.#free(device.loop);
      }
      this.#attached.clear();
      this.#tree.clear();
      clearNodes(this.#options.devRoot);
      for (const root of [this.#options.devRoot, this.#options.sysfsRoot]) await removeFile(join(root, marker));
    });
    await this.#held.disposeAsync();
  }

  // -------------------------------------------------------------------------------------------------------- inside

  #connect(entries: readonly DiscoveryEntry[]): void {
    const { identity } = this.#options;
    for (const { traddr, trsvcid, hostNqn, subsystemNqn, hostId } of entries) {
      const address = traddr.includes(":") ? `[${traddr}]:${trsvcid}` : `${traddr}:${trsvcid}`;
      const known = identity.servers.some(({ discoveryEndpoint }) => discoveryEndpoint === address);
      if (!known || subsystemNqn !== identity.subsystemNqn) {
        this.log.warning("discovery client found no such subsystem", { address, subsystem: subsystemNqn });
        continue;
      }
      const isConnected = this.#controllers.some((controller) =>
        controller.hostNqn === hostNqn && controller.subsystem.nqn === subsystemNqn
      );
      if (isConnected) continue;
      for (const { nvmeEndpoint } of identity.servers) {
        const endpoint = parseAddress(nvmeEndpoint) ?? { traddr: nvmeEndpoint, trsvcid: "4420" };
        this.#addController(subsystemNqn, hostNqn, hostId, endpoint);
      }
    }
    this.reconcileSoon();
  }

  #addController(nqn: string, hostNqn: string, hostId: string | undefined, at: TransportAddress): void {
    const subsystem = this.#controllers.find((controller) => controller.subsystem.nqn === nqn)?.subsystem ??
      this.#newSubsystem(nqn);
    const names = this.#controllers.map(({ name }) => name);
    let number = 0;
    while (names.includes(`nvme${number}`)) number++;
    const controller = { name: `nvme${number}`, subsystem, hostNqn, hostId: hostId ?? this.#machineId, ...at };
    this.#controllers.push(controller);
    this.#tree.addController(controller);
  }

  /** A number that no subsystem has, and no device that outlived its subsystem. */
  #newSubsystem(nqn: string): SysfsSubsystem {
    const taken = new Set([
      ...this.#controllers.map(({ subsystem }) => subsystem.instance),
      ...[...this.#zombies.keys()].map((name) => Number(/^nvme(\d+)n/.exec(name)?.[1])),
    ]);
    let instance = 0;
    while (taken.has(instance)) instance++;
    return { instance, nqn, model: "lbcsi simulator" };
  }

  /** Runs a command of the machine's `nvme`. */
  async #nvme(args: readonly string[]): Promise<CommandResult> {
    const option = (name: string) => args.find((arg) => arg.startsWith(`--${name}=`))?.slice(name.length + 3) ?? "";
    switch (args[0]) {
      case "connect":
        return await this.#nvmeConnect(option("nqn"), option("hostnqn"), option("hostid"), {
          traddr: option("traddr"),
          trsvcid: option("trsvcid"),
        });
      case "disconnect": {
        const controller = this.#controllers.find(({ name }) => name === option("device"));
        if (controller === undefined) return { status: 1, message: `Did not find device ${option("device")}` };
        await this.enqueue(async () => {
          this.#controllers.splice(this.#controllers.indexOf(controller), 1);
          // The devices first, while their place in the tree still exists.
          await this.reconcile();
          this.#tree.removeController(controller);
        });
        return { status: 0, message: "" };
      }
      case "ns-rescan":
        return { status: 0, message: "" };
      default:
        return { status: 1, message: `Invalid command "${args.join(" ")}"` };
    }
  }

  /** The error texts are those of nvme-cli 2.3. */
  async #nvmeConnect(nqn: string, hostNqn: string, hostId: string, at: TransportAddress): Promise<CommandResult> {
    const address = formatAddress(at);
    const { identity } = this.#options;
    if (!identity.servers.some(({ nvmeEndpoint }) => nvmeEndpoint === address)) {
      return { status: 1, message: "failed to write to nvme-fabrics device: Connection refused" };
    }
    // A subsystem other than the cluster's exists while it exposes a namespace, and for the hosts that may access one.
    const isKnown = nqn === identity.subsystemNqn ||
      [...this.exposed.values()].some((namespace) =>
        namespace.subsystemNqn === nqn && mayAccess(namespace.acl, hostNqn)
      );
    if (!isKnown) return { status: 1, message: "failed to write to nvme-fabrics device: Input/output error" };
    const isConnected = this.#controllers.some((controller) =>
      controller.subsystem.nqn === nqn && formatAddress(controller) === address
    );
    if (isConnected) return { status: 1, message: "already connected" };
    await this.enqueue(async () => {
      this.#addController(nqn, hostNqn, hostId, at);
      await this.reconcile();
    });
    return { status: 0, message: "" };
  }

  /** Attaches and detaches devices until the machine shows what the ACLs admit. */
  protected override async reconcile(): Promise<void> {
    const visible = [...this.exposed.values()]
      .filter(({ uuid }) => !this.#removed.has(uuid) && this.#pathsTo(uuid).length > 0)
      .sort((a, b) => a.nsid - b.nsid);
    for (const device of [...this.#attached.values()]) {
      const { uuid, subsystemNqn } = device.namespace;
      const isThere = visible.some((namespace) => namespace.uuid === uuid && namespace.subsystemNqn === subsystemNqn);
      if (!isThere) await this.#detach(device, true);
    }
    for (const namespace of visible) {
      try {
        const device = this.#attached.get(namespace.uuid);
        if (device === undefined) await this.#attach(namespace);
        else await this.#refresh(device, namespace);
      } catch (error) {
        this.log.error("could not show a namespace", { volume: namespace.uuid, error: messageOf(error) });
      }
    }
  }

  #pathsTo(uuid: string): SysfsController[] {
    const namespace = this.exposed.get(uuid);
    if (namespace === undefined) return [];
    return this.#controllers.filter(({ hostNqn, subsystem }) =>
      subsystem.nqn === namespace.subsystemNqn && mayAccess(namespace.acl, hostNqn)
    );
  }

  #pathText(uuid: string): string {
    return this.#pathsTo(uuid).map(({ name }) => name).join();
  }

  async #attach(namespace: ExposedNamespace): Promise<void> {
    const { uuid, sectorSizeBytes } = namespace;
    const adopted = this.#adoptable.get(uuid);
    this.#adoptable.delete(uuid);
    await this.contents.finishGrowth(uuid, namespace.sizeBytes);
    const loop = adopted?.loop ??
      await attachWritableLoop(this.#volumeFile(uuid), sectorSizeBytes);
    if (adopted !== undefined) await output("losetup", "-c", loop);
    const name = this.#givenNames.get(uuid) ?? adopted?.name ?? this.#freeName(this.#instanceOf(uuid));
    this.#givenNames.delete(uuid);
    await this.#showDevice({ namespace, name, loop, number: deviceNumber(loop), paths: "" });
    this.log.info("showed a namespace", { volume: uuid, device: name });
  }

  async #refresh(device: Attached, namespace: ExposedNamespace): Promise<void> {
    if (namespace.sizeBytes !== device.namespace.sizeBytes) {
      await output("losetup", "-c", device.loop);
      if (device.damage === undefined) this.#tree.setSize(device.name, namespace.sizeBytes);
    }
    const changed = { ...device, namespace, paths: this.#pathText(namespace.uuid) };
    this.#attached.set(namespace.uuid, changed);
    if (changed.paths !== device.paths) this.#tree.putNamespace(this.#sysfsOf(changed));
  }

  /** Makes a device visible in the order of the kernel: sysfs, then the node, then udev's link. */
  async #showDevice(device: Attached): Promise<void> {
    const { namespace: { uuid }, name } = device;
    this.#attached.set(uuid, { ...device, paths: this.#pathText(uuid) });
    this.#tree.putNamespace(this.#sysfsOf(device));
    await this.#makeNode(device);
    const link = this.#linkOf(uuid);
    await removeFile(link);
    await Deno.symlink(`../../${name}`, link);
  }

  async #makeNode(device: Attached): Promise<void> {
    const [major = "", minor = ""] = (device.damage === undefined ? device.number : deviceNumber(device.damage.loop))
      .split(":");
    const node = join(this.#options.devRoot, device.name);
    await removeFile(`${node}~`);
    await output("mknod", "-m", "0660", `${node}~`, "b", major, minor);
    await Deno.rename(`${node}~`, node);
  }

  #hideDevice(device: Attached): void {
    this.#attached.delete(device.namespace.uuid);
    this.#tree.removeNamespace(device.name);
    for (const path of [this.#linkOf(device.namespace.uuid), join(this.#options.devRoot, device.name)]) {
      if (exists(path)) Deno.removeSync(path);
    }
  }

  #sysfsOf({ namespace, name, number, damage }: Attached) {
    return {
      ...namespace,
      name,
      number: damage === undefined ? number : deviceNumber(damage.loop),
      sizeBytes: damage?.how === "empty" ? 0n : namespace.sizeBytes,
      controllers: this.#pathsTo(namespace.uuid),
    };
  }

  async #detach(device: Attached, keepContent: boolean): Promise<void> {
    this.#hideDevice(device);
    if (device.damage !== undefined) await this.#dropDamage(device.damage);
    await this.#release(device.loop, device.namespace.uuid, keepContent, device.name);
    this.log.info("took a namespace away", { volume: device.namespace.uuid, device: device.name });
  }

  /** Detaches a loop device. One that is in use loses its content; the volume keeps it when `keepContent`. */
  async #release(loop: string, uuid: string, keepContent: boolean, name?: string): Promise<void> {
    const file = this.#volumeFile(uuid);
    await this.#free(loop);
    // A process that only inspects the device, such as blkid, closes it after a moment.
    for (let tries = 0; tries < 20; tries++) {
      if (backingFile(loop)?.startsWith(file) !== true) return;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    if (name !== undefined) this.#zombies.set(name, loop);
    await this.#cut(loop, file, keepContent);
  }

  /** Detaches a loop device, now or when its last user closes it, unless it is no longer ours. */
  async #free(loop: string): Promise<void> {
    if (backingFile(loop)?.startsWith(this.#options.contentDir)) await run("losetup", "-d", loop);
  }

  async #cut(loop: string, file: string, keepContent: boolean): Promise<void> {
    const dead = `${file}.dead${++this.#cuts}`;
    await Deno.link(file, dead);
    if (keepContent) {
      await copySparse(file, `${file}.new`);
      await Deno.rename(`${file}.new`, file);
    } else {
      await removeFile(file);
    }
    await Deno.truncate(dead, 0);
    await run("losetup", "-c", loop);
    await removeFile(dead);
  }

  /** The number of the subsystem that shows a namespace. */
  #instanceOf(uuid: string): number {
    return this.#pathsTo(uuid)[0]?.subsystem.instance ?? 0;
  }

  /** The lowest device name in a subsystem that no device has, dead mounts included. */
  #freeName(instance: number, except?: string): string {
    for (const [name, loop] of this.#zombies) {
      if (backingFile(loop)?.startsWith(this.#options.contentDir) !== true) this.#zombies.delete(name);
    }
    const taken = new Set([...this.#attached.values()].map(({ name }) => name));
    for (const { name } of this.#adoptable.values()) if (name !== undefined) taken.add(name);
    for (let head = 1;; head++) {
      const name = `nvme${instance}n${head}`;
      if (!taken.has(name) && !this.#zombies.has(name) && name !== except) return name;
    }
  }

  async #damage(device: Attached, how: "unreadable" | "empty"): Promise<void> {
    if (device.damage !== undefined) await this.#heal(device);
    const { uuid, sizeBytes, sectorSizeBytes } = device.namespace;
    const file = join(this.#options.contentDir, "volumes", `${uuid}.damaged`);
    await Deno.writeFile(file, new Uint8Array());
    if (how === "unreadable") await Deno.truncate(file, Number(sizeBytes));
    const loop = await attachLoop(file, sectorSizeBytes);
    // A loop device keeps its size when its file is truncated; what lies past the end cannot be read.
    await Deno.truncate(file, 0);
    if (how === "unreadable" && await canRead(loop)) {
      await run("losetup", "-d", loop);
      await removeFile(file);
      throw new StatusError("UNIMPLEMENTED", "Cannot make a device unreadable: this kernel's loop driver reads zeros");
    }
    const damaged = { ...device, damage: { how, loop, file } };
    this.#attached.set(uuid, damaged);
    this.#tree.putNamespace(this.#sysfsOf(damaged));
    await this.#makeNode(damaged);
  }

  async #heal(device: Attached): Promise<{ readonly written: boolean }> {
    const { damage, ...healthy } = device;
    if (damage === undefined) return { written: false };
    this.#attached.set(device.namespace.uuid, healthy);
    this.#tree.putNamespace(this.#sysfsOf(healthy));
    await this.#makeNode(healthy);
    return await this.#dropDamage(damage);
  }

  async #dropDamage({ loop, file }: NonNullable<Attached["damage"]>): Promise<{ readonly written: boolean }> {
    await this.#free(loop);
    const { size } = await Deno.stat(file);
    await removeFile(file);
    return { written: size > 0 };
  }

  #volumeFile(uuid: string): string {
    return this.contents.volumeFile(uuid);
  }

  #linkOf(uuid: string): string {
    return join(this.#options.devRoot, "disk/by-id", `nvme-uuid.${uuid}`);
  }
}

function shown(devRoot: string, { namespace: { uuid }, name, loop, number }: Attached): ShownDevice {
  return { uuid, name, path: join(devRoot, name), loop, number };
}

async function canRead(path: string): Promise<boolean> {
  using file = await Deno.open(path);
  try {
    await file.read(new Uint8Array(4096));
    return true;
  } catch {
    return false;
  }
}

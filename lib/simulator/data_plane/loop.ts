/**
 * A data plane of sparse files behind loop devices, which plays one machine: its kernel's NVMe driver, its
 * Discovery-Client and its nvme-cli. File systems on it are real, and no NVMe is needed.
 *
 * - For each namespace that a connected host may see there is a device node `nvmeXnY` with the loop device's number, an
 *   entry in a tree like sysfs, and the link that udev would make. They come and go with the access list.
 * - A device that vanishes under a mount leaves a dead mount, as in the kernel: the old loop device keeps a file of its
 *   own, which is emptied, so that every read and write of it fails; the volume lives on in a copy. Writes that are on
 *   their way at that moment may be in the copy or not, in any order. So does a deleted volume.
 * - Controllers that the Discovery-Client made stay, for removing one of its files does nothing. Those of nvme-cli go with
 *   `nvme disconnect`, and the devices that nobody has a path to any more go with them.
 * - An adopted device: after a crash, a simulator with the same directories takes over loop devices that still stand for
 *   its volumes, names and mounts included, and detaches the rest. A loop device is ours when its backing file is.
 */
import { basename, dirname, join } from "node:path";
import type { Logger } from "../../context.ts";
import { messageOf, StatusError } from "../../error.ts";
import { formatAddress, parseAddress, type TransportAddress } from "../../namespace.ts";
import type { ClusterIdentity } from "../lightos/model.ts";
import { Contents, copySparse, exists, removeFile } from "./contents.ts";
import { type DataPlane, type ExposedNamespace, mayAccess, type ShownDevice } from "./data_plane.ts";
import { type DiscoveryEntry, watchDiscoveryDirectory } from "./discovery_client.ts";
import { lockFile } from "../state_file.ts";
import { type ProgramEnd, serveNvmeProgram } from "./nvme_program.ts";
import { nameInTree, type SysfsController, type SysfsSubsystem, type SysfsTree, sysfsTree } from "./sysfs.ts";
import { output, readText, run } from "./run_command.ts";

export interface LoopOptions {
  /** Where the contents live. */
  readonly contentDir: string;
  readonly discoveryDir: string;
  readonly devRoot: string;
  readonly sysfsRoot: string;
  /** Where the machine's `nvme` is put. */
  readonly programs: string;
  readonly identity: ClusterIdentity;
  readonly log: Logger;
}

/** Marks a directory whose contents the simulator may remove, and is locked by the one that uses it. */
const marker = ".lbcsi-simulator";

interface Attached {
  readonly namespace: ExposedNamespace;
  readonly name: string;
  /** `/dev/loop5`. */
  readonly loop: string;
  /** `7:5`. */
  readonly number: string;
  /** Controllers that have a path to it, by name. */
  readonly paths: string;
  readonly damage?: { readonly how: "unreadable" | "empty"; readonly loop: string; readonly file: string };
}

/**
 * Opens the data plane, with the contents that are in its directories.
 *
 * @throws StatusError FAILED_PRECONDITION that names what is missing on this machine, or a directory that holds
 *   something else
 */
export async function openLoopPlane(options: LoopOptions): Promise<DataPlane> {
  await using held = new AsyncDisposableStack();
  await checkMachine(options, held);
  const contents = await Contents.open(options.contentDir);
  return await LoopPlane.open({ ...options, contentDir: contents.directory }, contents, held);
}

class LoopPlane implements DataPlane {
  readonly kind = "loop";
  readonly machine: NonNullable<DataPlane["machine"]>;
  readonly #options: LoopOptions;
  readonly #contents: Contents;
  readonly #log: Logger;
  readonly #tree: SysfsTree;
  readonly #exposed = new Map<string, ExposedNamespace>();
  /** Namespaces that are kept away although a host may see them. */
  readonly #removed = new Map<string, string>();
  readonly #wantedNames = new Map<string, string>();
  readonly #attached = new Map<string, Attached>();
  readonly #controllers: SysfsController[] = [];
  /** Loop devices of an earlier run that may be taken over, with the names they had. */
  readonly #adoptable: Map<string, { readonly loop: string; readonly name: string | undefined }>;
  /** Names whose device is gone and still held open by somebody. */
  readonly #zombies = new Map<string, string>();
  readonly #machineId = crypto.randomUUID();
  readonly #held: AsyncDisposableStack;
  #watch: AsyncDisposable | undefined;
  #program: AsyncDisposable | undefined;
  #queue: Promise<unknown> = Promise.resolve();
  #reconcilePending = false;
  #started = false;
  #cuts = 0;

  /** @param held what keeps the directories from other simulators; taken over */
  static async open(options: LoopOptions, contents: Contents, held: AsyncDisposableStack): Promise<LoopPlane> {
    const adoptable = await leftovers(options);
    const plane = new LoopPlane(options, contents, adoptable, held.move());
    try {
      const report = (entries: readonly DiscoveryEntry[]) => plane.#connect(entries);
      plane.#watch = await watchDiscoveryDirectory(options.discoveryDir, options.log, report);
      plane.#program = await serveNvmeProgram(options.programs, options.log, (words) => plane.#nvme(words));
    } catch (error) {
      await plane[Symbol.asyncDispose]();
      throw error;
    }
    return plane;
  }

  private constructor(
    options: LoopOptions,
    contents: Contents,
    adoptable: Map<string, { readonly loop: string; readonly name: string | undefined }>,
    held: AsyncDisposableStack,
  ) {
    this.#options = options;
    this.#contents = contents;
    this.#held = held;
    this.#log = options.log;
    this.#adoptable = adoptable;
    this.#tree = sysfsTree(options.sysfsRoot);
    clearNodes(options.devRoot);
    Deno.mkdirSync(join(options.devRoot, "disk/by-id"), { recursive: true });
    const deviceOf = (uuid: string) => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) return device;
      throw new StatusError("NOT_FOUND", `Cannot change the device of namespace ${uuid}: it has none`);
    };
    const machine: NonNullable<DataPlane["machine"]> = {
      devices: [],
      remove: (uuid) =>
        this.#enqueue(async () => {
          const device = deviceOf(uuid);
          this.#removed.set(uuid, device.name);
          await this.#detach(device, true);
        }),
      restore: (uuid, name) =>
        this.#enqueue(async () => {
          const old = this.#removed.get(uuid);
          if (old === undefined) {
            throw new StatusError("NOT_FOUND", `Cannot restore the device of namespace ${uuid}: it was not removed`);
          }
          this.#removed.delete(uuid);
          this.#wantedNames.set(uuid, name ?? this.#freeName(this.#instanceOf(uuid), old));
          await this.#reconcile();
          return shown(this.#options.devRoot, deviceOf(uuid));
        }),
      swap: (uuid, otherUuid) =>
        this.#enqueue(async () => {
          const one = deviceOf(uuid);
          const two = deviceOf(otherUuid);
          for (const device of [one, two]) this.#hideDevice(device);
          await this.#showDevice({ ...one, name: two.name });
          await this.#showDevice({ ...two, name: one.name });
        }),
      damage: (uuid, how) => this.#enqueue(() => this.#damage(deviceOf(uuid), how)),
      heal: (uuid) => this.#enqueue(() => this.#heal(deviceOf(uuid))),
    };
    Object.defineProperty(machine, "devices", {
      get: () => [...this.#attached.values()].map((device) => shown(options.devRoot, device)),
      enumerable: true,
    });
    this.machine = machine;
  }

  // ------------------------------------------------------------------------------------------------------- contents

  createVolume(uuid: string, sizeBytes: bigint, sourceSnapshotUuid: string | undefined): Promise<void> {
    return this.#enqueue(() => this.#contents.createVolume(uuid, sizeBytes, sourceSnapshotUuid));
  }

  resizeVolume(uuid: string, sizeBytes: bigint): Promise<void> {
    return this.#enqueue(() => this.#contents.resizeVolume(uuid, sizeBytes));
  }

  deleteVolume(uuid: string): Promise<void> {
    this.#exposed.delete(uuid);
    return this.#enqueue(async () => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) await this.#detach(device, false);
      this.#removed.delete(uuid);
      this.#wantedNames.delete(uuid);
      const adoptable = this.#adoptable.get(uuid);
      this.#adoptable.delete(uuid);
      if (adoptable !== undefined) await this.#release(adoptable.loop, uuid, false);
      await this.#contents.deleteVolume(uuid);
    });
  }

  createSnapshot(uuid: string, volumeUuid: string): Promise<void> {
    return this.#enqueue(() => this.#contents.createSnapshot(uuid, volumeUuid));
  }

  hasSnapshot(uuid: string): Promise<boolean> {
    return Promise.resolve(this.#contents.hasSnapshot(uuid));
  }

  deleteSnapshot(uuid: string): Promise<void> {
    return this.#enqueue(() => this.#contents.deleteSnapshot(uuid));
  }

  rollbackVolume(uuid: string, snapshotUuid: string, sizeBytes: bigint): Promise<void> {
    return this.#enqueue(async () => {
      const device = this.#attached.get(uuid);
      if (device !== undefined) await this.#detach(device, false);
      await this.#contents.rollbackVolume(uuid, snapshotUuid, sizeBytes);
    });
  }

  changedRuns(snapshotUuid: string, baseUuid: string | undefined, blockSizeBytes: number, start: bigint) {
    return this.#contents.changedRuns(snapshotUuid, baseUuid, blockSizeBytes, start);
  }

  // --------------------------------------------------------------------------------------------------------- hosts

  expose(namespace: ExposedNamespace): void {
    this.#exposed.set(namespace.uuid, namespace);
    this.#changed();
  }

  hide(uuid: string): void {
    if (this.#exposed.delete(uuid)) this.#changed();
  }

  connectedHosts() {
    const nqns = new Set(this.#controllers.map(({ hostNqn }) => hostNqn));
    return [...nqns].map((hostNqn) => ({ hostNqn, address: "127.0.0.1", hostname: Deno.hostname() }));
  }

  async start(): Promise<void> {
    this.#started = true;
    await this.#enqueue(async () => {
      await this.#reconcile();
      // What no volume needs any more: its namespace was deleted, or taken away, while nobody watched.
      for (const [uuid, { loop }] of this.#adoptable) await this.#release(loop, uuid, true);
      this.#adoptable.clear();
    });
  }

  async settled(): Promise<void> {
    await this.#queue;
  }

  clear(): Promise<void> {
    this.#exposed.clear();
    return this.#enqueue(async () => {
      for (const device of [...this.#attached.values()]) await this.#detach(device, false);
      this.#removed.clear();
      this.#wantedNames.clear();
      await this.#contents.clear();
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#watch?.[Symbol.asyncDispose]();
    await this.#program?.[Symbol.asyncDispose]();
    await this.#enqueue(async () => {
      for (const device of [...this.#attached.values()]) {
        this.#hideDevice(device);
        if (device.damage !== undefined) await this.#dropDamage(device.damage);
        // Without cutting off who still uses it: its content stays whole until the last of them is gone.
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

  /** Runs `step` after everything that was asked for before. */
  #enqueue<T>(step: () => Promise<T>): Promise<T> {
    const result = this.#queue.then(step);
    this.#queue = result.catch(() => {});
    return result;
  }

  #changed(): void {
    if (this.#reconcilePending || !this.#started) return;
    this.#reconcilePending = true;
    this.#enqueue(async () => {
      this.#reconcilePending = false;
      await this.#reconcile();
    }).catch((error) => this.#log.error("could not show the namespaces", { error: messageOf(error) }));
  }

  #connect(entries: readonly DiscoveryEntry[]): void {
    const { identity } = this.#options;
    for (const { traddr, trsvcid, hostNqn, subsystemNqn, hostId } of entries) {
      const address = traddr.includes(":") ? `[${traddr}]:${trsvcid}` : `${traddr}:${trsvcid}`;
      const known = identity.servers.some(({ discoveryEndpoint }) => discoveryEndpoint === address);
      if (!known || subsystemNqn !== identity.subsystemNqn) {
        this.#log.warning("discovery client found nobody", { address, subsystem: subsystemNqn });
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
    this.#changed();
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

  /** What the machine's `nvme` does. */
  async #nvme(words: readonly string[]): Promise<ProgramEnd> {
    const option = (name: string) => words.find((word) => word.startsWith(`--${name}=`))?.slice(name.length + 3) ?? "";
    switch (words[0]) {
      case "connect":
        return await this.#nvmeConnect(option("nqn"), option("hostnqn"), option("hostid"), {
          traddr: option("traddr"),
          trsvcid: option("trsvcid"),
        });
      case "disconnect": {
        const controller = this.#controllers.find(({ name }) => name === option("device"));
        if (controller === undefined) return { status: 1, words: `Did not find device ${option("device")}` };
        await this.#enqueue(async () => {
          this.#controllers.splice(this.#controllers.indexOf(controller), 1);
          // The devices first, as long as their place in the tree is there.
          await this.#reconcile();
          this.#tree.removeController(controller);
        });
        return { status: 0, words: "" };
      }
      case "ns-rescan":
        return { status: 0, words: "" };
      default:
        return { status: 1, words: `Invalid command "${words.join(" ")}"` };
    }
  }

  /** The words for failures are those of nvme-cli 2.3. */
  async #nvmeConnect(nqn: string, hostNqn: string, hostId: string, at: TransportAddress): Promise<ProgramEnd> {
    const address = formatAddress(at);
    const { identity } = this.#options;
    if (!identity.servers.some(({ nvmeEndpoint }) => nvmeEndpoint === address)) {
      return { status: 1, words: "failed to write to nvme-fabrics device: Connection refused" };
    }
    // Subsystems of their own are there as long as they show something, and to whom they show it.
    const isKnown = nqn === identity.subsystemNqn ||
      [...this.#exposed.values()].some((namespace) =>
        namespace.subsystemNqn === nqn && mayAccess(namespace.acl, hostNqn)
      );
    if (!isKnown) return { status: 1, words: "failed to write to nvme-fabrics device: Input/output error" };
    const isConnected = this.#controllers.some((controller) =>
      controller.subsystem.nqn === nqn && formatAddress(controller) === address
    );
    if (isConnected) return { status: 1, words: "already connected" };
    await this.#enqueue(async () => {
      this.#addController(nqn, hostNqn, hostId, at);
      await this.#reconcile();
    });
    return { status: 0, words: "" };
  }

  /** Makes the devices of the machine what the access lists say. */
  async #reconcile(): Promise<void> {
    const wanted = [...this.#exposed.values()]
      .filter(({ uuid }) => !this.#removed.has(uuid) && this.#pathsTo(uuid).length > 0)
      .sort((a, b) => a.nsid - b.nsid);
    for (const device of [...this.#attached.values()]) {
      const { uuid, subsystemNqn } = device.namespace;
      const isThere = wanted.some((namespace) => namespace.uuid === uuid && namespace.subsystemNqn === subsystemNqn);
      if (!isThere) await this.#detach(device, true);
    }
    for (const namespace of wanted) {
      try {
        const device = this.#attached.get(namespace.uuid);
        if (device === undefined) await this.#attach(namespace);
        else await this.#refresh(device, namespace);
      } catch (error) {
        this.#log.error("could not show a namespace", { volume: namespace.uuid, error: messageOf(error) });
      }
    }
  }

  #pathsTo(uuid: string): SysfsController[] {
    const namespace = this.#exposed.get(uuid);
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
    await this.#contents.finishGrowth(uuid, namespace.sizeBytes);
    const loop = adopted?.loop ??
      await output("losetup", "-f", "--show", "-b", String(sectorSizeBytes), this.#volumeFile(uuid));
    if (adopted !== undefined) await output("losetup", "-c", loop);
    // The kernel keeps a loop device read-only that an earlier user made so, even through a detach.
    else await output("blockdev", "--setrw", loop);
    const name = this.#wantedNames.get(uuid) ?? adopted?.name ?? this.#freeName(this.#instanceOf(uuid));
    this.#wantedNames.delete(uuid);
    await this.#showDevice({ namespace, name, loop, number: numberOf(loop), paths: "" });
    this.#log.info("showed a namespace", { volume: uuid, device: name });
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

  /** Everything of a device that can be seen: first sysfs, then the node, then udev's link, as the kernel does. */
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
    const [major = "", minor = ""] = (device.damage === undefined ? device.number : numberOf(device.damage.loop))
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
      number: damage === undefined ? number : numberOf(damage.loop),
      sizeBytes: damage?.how === "empty" ? 0n : namespace.sizeBytes,
      controllers: this.#pathsTo(namespace.uuid),
    };
  }

  async #detach(device: Attached, keepContent: boolean): Promise<void> {
    this.#hideDevice(device);
    if (device.damage !== undefined) await this.#dropDamage(device.damage);
    await this.#release(device.loop, device.namespace.uuid, keepContent, device.name);
    this.#log.info("took a namespace away", { volume: device.namespace.uuid, device: device.name });
  }

  /** Detaches a loop device; one that is in use loses its content, while the volume keeps it when `keepContent`. */
  async #release(loop: string, uuid: string, keepContent: boolean, name?: string): Promise<void> {
    const file = this.#volumeFile(uuid);
    await this.#free(loop);
    // Whoever only looked at the device, as blkid does, has let go of it in a moment.
    for (let tries = 0; tries < 20; tries++) {
      if (backingFile(loop)?.startsWith(file) !== true) return;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    if (name !== undefined) this.#zombies.set(name, loop);
    await this.#cut(loop, file, keepContent);
  }

  /** Detaches a loop device, now or when its last user is gone, unless somebody else has it by now. */
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

  /** The number of the subsystem that a namespace is seen in. */
  #instanceOf(uuid: string): number {
    return this.#pathsTo(uuid)[0]?.subsystem.instance ?? 0;
  }

  /** The lowest name in a subsystem that no device has, and no mount of a device that is gone. */
  #freeName(instance: number, butNot?: string): string {
    for (const [name, loop] of this.#zombies) {
      if (backingFile(loop)?.startsWith(this.#options.contentDir) !== true) this.#zombies.delete(name);
    }
    const taken = new Set([...this.#attached.values()].map(({ name }) => name));
    for (const { name } of this.#adoptable.values()) if (name !== undefined) taken.add(name);
    for (let head = 1;; head++) {
      const name = `nvme${instance}n${head}`;
      if (!taken.has(name) && !this.#zombies.has(name) && name !== butNot) return name;
    }
  }

  async #damage(device: Attached, how: "unreadable" | "empty"): Promise<void> {
    if (device.damage !== undefined) await this.#heal(device);
    const { uuid, sizeBytes, sectorSizeBytes } = device.namespace;
    const file = join(this.#options.contentDir, "volumes", `${uuid}.damaged`);
    await Deno.writeFile(file, new Uint8Array());
    if (how === "unreadable") await Deno.truncate(file, Number(sizeBytes));
    const loop = await output("losetup", "-f", "--show", "-b", String(sectorSizeBytes), file);
    // A loop device keeps its size when its file is emptied behind its back; what lies past the end cannot be read.
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
    return this.#contents.volumeFile(uuid);
  }

  #linkOf(uuid: string): string {
    return join(this.#options.devRoot, "disk/by-id", `nvme-uuid.${uuid}`);
  }
}

function shown(devRoot: string, { namespace: { uuid }, name, loop, number }: Attached): ShownDevice {
  return { uuid, name, path: join(devRoot, name), loop, number };
}

// -------------------------------------------------------------------------------------------------------- the machine

async function checkMachine(options: LoopOptions, held: AsyncDisposableStack): Promise<void> {
  const refuse = (problem: string, cause?: unknown) =>
    new StatusError("FAILED_PRECONDITION", `Cannot use data plane "loop": ${problem}`, { cause });
  if (Deno.build.os !== "linux") throw refuse("loop devices need Linux");
  if (Deno.uid() !== 0) throw refuse("it needs root, this process has user ID " + Deno.uid());
  if (!exists("/dev/loop-control")) throw refuse("/dev/loop-control is missing, load the module loop");
  await Contents.open(options.contentDir);
  for (const root of [options.devRoot, options.sysfsRoot]) {
    await Deno.mkdir(root, { recursive: true });
    const names = [...Deno.readDirSync(root)].map(({ name }) => name);
    if (names.length > 0 && !names.includes(marker)) {
      throw refuse(`directory ${root} holds ${names[0]}, an empty one or one of its own is needed`);
    }
    held.use(await lockFile(join(root, marker), root));
  }
  // The real thing is tried once: containers forbid any of these steps, each in its own way.
  const file = join(options.contentDir, `probe-${crypto.randomUUID()}`);
  const node = join(options.devRoot, `probe-${crypto.randomUUID()}`);
  let loop: string | undefined;
  try {
    await Deno.writeFile(file, new Uint8Array(4096));
    loop = await output("losetup", "-f", "--show", file).catch((cause) => {
      throw refuse(`no loop device can be set up (${messageOf(cause)})`, cause);
    });
    const [major = "", minor = ""] = numberOf(loop).split(":");
    await output("mknod", node, "b", major, minor).catch((cause) => {
      throw refuse(`no device node can be made in ${options.devRoot} (${messageOf(cause)})`, cause);
    });
    try {
      (await Deno.open(node)).close();
    } catch (cause) {
      throw refuse(`device nodes in ${options.devRoot} cannot be opened, it must not be mounted "nodev"`, cause);
    }
  } finally {
    if (loop !== undefined) await run("losetup", "-d", loop);
    await removeFile(node);
    await removeFile(file);
  }
}

/**
 * Loop devices that an earlier run left behind, by the UUID of their volume. What cannot be taken over (its volume is
 * gone, or it was given up already) is detached as far as possible.
 */
async function leftovers(
  { contentDir, sysfsRoot, log }: LoopOptions,
): Promise<Map<string, { readonly loop: string; readonly name: string | undefined }>> {
  const found = new Map<string, { readonly loop: string; readonly name: string | undefined }>();
  const volumes = join(contentDir, "volumes");
  for (const { name: device } of Deno.readDirSync("/sys/block")) {
    if (!/^loop\d+$/.test(device)) continue;
    const loop = `/dev/${device}`;
    const file = backingFile(loop);
    if (file === undefined || dirname(file) !== volumes) continue;
    const uuid = /^([0-9a-f-]{36})\.img$/.exec(basename(file))?.[1];
    const givenUp = readText(`/sys/block/${device}/loop/autoclear`) === "1";
    if (uuid !== undefined && !givenUp && exists(file) && !found.has(uuid)) {
      found.set(uuid, { loop, name: nameInTree(sysfsRoot, numberOf(loop)) });
      continue;
    }
    log.info("detaches a loop device of an earlier run", { device: loop });
    await run("losetup", "-d", loop);
    if (uuid === undefined || !exists(file)) continue;
    if (backingFile(loop) !== file) continue;
    // Somebody still has it mounted: the volume goes on in a copy, so that two devices never write to one file.
    await Deno.link(file, `${file}.dead`);
    await copySparse(file, `${file}.new`);
    await Deno.rename(`${file}.new`, file);
    await Deno.truncate(`${file}.dead`, 0);
    await run("losetup", "-c", loop);
    await removeFile(`${file}.dead`);
  }
  return found;
}

function clearNodes(devRoot: string): void {
  for (const { name } of Deno.readDirSync(devRoot)) {
    if (/^(nvme\d+n\d+|probe-.*)~?$/.test(name)) Deno.removeSync(join(devRoot, name));
  }
  if (exists(join(devRoot, "disk"))) Deno.removeSync(join(devRoot, "disk"), { recursive: true });
}

/** Path of the file behind a loop device, `… (deleted)` when it has been removed; undefined when there is none. */
function backingFile(loop: string): string | undefined {
  return readText(`/sys/block/${basename(loop)}/loop/backing_file`);
}

function numberOf(loop: string): string {
  const number = readText(`/sys/block/${basename(loop)}/dev`);
  if (number !== undefined) return number;
  throw new StatusError("INTERNAL", `Cannot find the number of ${loop}: it is not in sysfs`);
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

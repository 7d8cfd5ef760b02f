/**
 * A directory tree in the shape of the part of sysfs where Linux shows NVMe over fabrics with native multipath.
 *
 * Layout and texts as on Linux 6.1 with real NVMe/TCP: `/sys/class/block/nvmeXnY` is the multipath head, X is the
 * number of the subsystem and not of a controller, Y is not the NSID; `nvmeXcCnY` are its paths, hidden, without a node;
 * `wwid` is `uuid.<uuid>`, `nguid` has dashes; every text ends in a newline.
 */
import { basename, join } from "node:path";

/** A subsystem that this machine is connected to. */
export interface SysfsSubsystem {
  /** The X of `nvmeXnY`. */
  readonly instance: number;
  readonly nqn: string;
  readonly model: string;
}

/** A controller: one connection of a host to one address of a subsystem. */
export interface SysfsController {
  /** `nvmeN`. */
  readonly name: string;
  readonly subsystem: SysfsSubsystem;
  readonly hostNqn: string;
  readonly hostId: string;
  readonly traddr: string;
  readonly trsvcid: string;
}

/** A namespace with its block device. */
export interface SysfsNamespace {
  /** `nvmeXnY`. */
  readonly name: string;
  readonly uuid: string;
  readonly nsid: number;
  readonly sizeBytes: bigint;
  readonly sectorSizeBytes: number;
  /** `major:minor`. */
  readonly number: string;
  /** Controllers that have a path to it. */
  readonly controllers: readonly SysfsController[];
}

const subsystemsDir = "devices/virtual/nvme-subsystem";
const controllersDir = "devices/virtual/nvme-fabrics/ctl";

/** One tree. Everything is synchronous: a reader sees each entry whole or not at all. */
export class SysfsTree {
  readonly #root: string;

  /** Makes an empty tree below `root`, after removing an earlier one. */
  constructor(root: string) {
    this.#root = root;
    this.clear();
    for (const part of ["class/block", "class/nvme", "class/nvme-subsystem", "block", "dev/block", controllersDir]) {
      Deno.mkdirSync(this.#at(part), { recursive: true });
    }
  }

  /** Shows a controller, and its subsystem if it is the first controller of it. */
  addController(controller: SysfsController): void {
    const { name, traddr, trsvcid, subsystem: { instance, nqn, model } } = controller;
    writeAttributes(this.#subsystemDir(instance), {
      subsysnqn: nqn,
      model,
      serial: "simulated",
      firmware_rev: "3.17",
      iopolicy: "numa",
    });
    link(this.#at("class/nvme-subsystem", `nvme-subsys${instance}`), `../../${subsystemsDir}/nvme-subsys${instance}`);
    const loopback = traddr.includes(":") ? "::1" : "127.0.0.1";
    writeAttributes(this.#at(controllersDir, name), {
      state: "live",
      address: `traddr=${traddr},trsvcid=${trsvcid},src_addr=${loopback}`,
      subsysnqn: nqn,
      hostnqn: controller.hostNqn,
      hostid: controller.hostId,
      transport: "tcp",
      cntlid: String(Number(name.replace(/^nvme/, "")) + 1),
      ctrl_loss_tmo: "600",
      reconnect_delay: "10",
      kato: "10",
      queue_count: "2",
    });
    link(join(this.#subsystemDir(instance), name), `../../nvme-fabrics/ctl/${name}`);
    link(this.#at("class/nvme", name), `../../${controllersDir}/${name}`);
  }

  /**
   * Removes a controller, and its subsystem if it was the last controller of it. First remove its namespaces, or give them
   * other paths.
   */
  removeController({ name, subsystem: { instance } }: SysfsController): void {
    unlink(this.#at("class/nvme", name));
    unlink(join(this.#subsystemDir(instance), name));
    removeTree(this.#at(controllersDir, name));
    if (list(this.#subsystemDir(instance)).some((entry) => /^nvme\d+$/.test(entry))) return;
    unlink(this.#at("class/nvme-subsystem", `nvme-subsys${instance}`));
    removeTree(this.#subsystemDir(instance));
  }

  /** Shows a namespace. Shown already: gives it these paths, this number and this size. */
  putNamespace(namespace: SysfsNamespace): void {
    const { name, controllers } = namespace;
    for (const { controller, path } of this.#pathsOf(name)) {
      if (controllers.some((other) => other.name === controller)) continue;
      this.#removePath(controller, path);
    }
    for (const controller of controllers) this.#putPath(namespace, controller.name);
    this.#putHead(namespace);
  }

  /** Removes a namespace. Absent: nothing. */
  removeNamespace(name: string): void {
    unlink(this.#at("class/block", name));
    unlink(this.#at("block", name));
    this.#unlinkNumbers(name, undefined);
    for (const { controller, path } of this.#pathsOf(name)) this.#removePath(controller, path);
    removeTree(join(this.#headDir(name), name));
  }

  setSize(name: string, sizeBytes: bigint): void {
    const sectors = String(sizeBytes / 512n);
    writeAttribute(join(this.#headDir(name), name, "size"), sectors);
    for (const { controller, path } of this.#pathsOf(name)) {
      writeAttribute(this.#at(controllersDir, controller, path, "size"), sectors);
    }
  }

  /** Removes everything below the root that belongs to the tree. */
  clear(): void {
    for (const part of ["class", "block", "dev", "devices"]) removeTree(this.#at(part));
  }

  /** The hidden block device of one path. */
  #putPath(namespace: SysfsNamespace, controller: string): void {
    const path = pathName(namespace.name, controller);
    const directory = this.#at(controllersDir, controller, path);
    writeAttributes(directory, {
      ...attributesOf(namespace),
      hidden: "1",
      ro: "0",
      ana_state: "optimized",
      ana_grpid: "1",
    });
    writeAttributes(join(directory, "queue"), queueOf(namespace));
    link(join(directory, "device"), `../../${controller}`);
    link(this.#at("class/block", path), `../../${controllersDir}/${controller}/${path}`);
  }

  /** The block device of a namespace, over all its paths. */
  #putHead(namespace: SysfsNamespace): void {
    const { name, number } = namespace;
    const [major, minor] = number.split(":");
    const directory = join(this.#headDir(name), name);
    const subsystem = basename(this.#headDir(name));
    writeAttributes(join(directory, "queue"), queueOf(namespace));
    writeAttributes(directory, {
      ...attributesOf(namespace),
      hidden: "0",
      dev: number,
      uevent: `MAJOR=${major}\nMINOR=${minor}\nDEVNAME=${name}\nDEVTYPE=disk`,
    });
    link(join(directory, "device"), `../../${subsystem}`);
    // What blockdev(8) does to the device shows here.
    link(join(directory, "ro"), `/sys/dev/block/${number}/ro`);
    this.#unlinkNumbers(name, number);
    link(this.#at("dev/block", number), `../../${subsystemsDir}/${subsystem}/${name}`);
    link(this.#at("block", name), `../${subsystemsDir}/${subsystem}/${name}`);
    // Last, because readers start here.
    link(this.#at("class/block", name), `../../${subsystemsDir}/${subsystem}/${name}`);
  }

  /** Removes the links from device numbers to a device, but for one number. */
  #unlinkNumbers(name: string, except: string | undefined): void {
    for (const number of list(this.#at("dev/block"))) {
      if (number === except) continue;
      if (targetOf(this.#at("dev/block", number))?.endsWith(`/${name}`)) unlink(this.#at("dev/block", number));
    }
  }

  #removePath(controller: string, path: string): void {
    unlink(this.#at("class/block", path));
    removeTree(this.#at(controllersDir, controller, path));
  }

  /** The paths to a namespace that the tree shows. */
  #pathsOf(name: string): { readonly controller: string; readonly path: string }[] {
    return list(this.#at(controllersDir)).flatMap((controller) =>
      list(this.#at(controllersDir, controller)).filter((entry) => isPathOf(entry, name))
        .map((path) => ({ controller, path }))
    );
  }

  #subsystemDir(instance: number | string): string {
    return this.#at(subsystemsDir, `nvme-subsys${instance}`);
  }

  /** The directory that holds a device; its name contains the number of the subsystem. */
  #headDir(name: string): string {
    return this.#subsystemDir(/^nvme(\d+)n/.exec(name)?.[1] ?? "");
  }

  #at(...parts: string[]): string {
    return join(this.#root, ...parts);
  }
}

/** The device name that the tree of an earlier run gave to a device number; undefined when it has none. */
export function nameInTree(root: string, number: string): string | undefined {
  return targetOf(join(root, "dev/block", number))?.replace(/^.*\//, "");
}

/** `nvme0c2n1` for head `nvme0n1` and controller `nvme2`. */
function pathName(head: string, controller: string): string {
  return head.replace(/n(\d+)$/, `c${controller.replace(/^nvme/, "")}n$1`);
}

function isPathOf(entry: string, head: string): boolean {
  return /^nvme\d+c\d+n\d+$/.test(entry) && entry.replace(/c\d+/, "") === head;
}

function attributesOf({ uuid, nsid, sizeBytes }: SysfsNamespace): Readonly<Record<string, string>> {
  return {
    uuid,
    wwid: `uuid.${uuid}`,
    nguid: uuid,
    nsid: String(nsid),
    size: String(sizeBytes / 512n),
    removable: "0",
  };
}

function queueOf({ sectorSizeBytes }: SysfsNamespace): Readonly<Record<string, string>> {
  return { logical_block_size: String(sectorSizeBytes), physical_block_size: String(sectorSizeBytes) };
}

function writeAttributes(directory: string, attributes: Readonly<Record<string, string>>): void {
  Deno.mkdirSync(directory, { recursive: true });
  for (const [name, text] of Object.entries(attributes)) writeAttribute(join(directory, name), text);
}

// Replaced, not rewritten: a reader of sysfs never sees half an attribute.
function writeAttribute(path: string, text: string): void {
  Deno.writeTextFileSync(`${path}~`, `${text}\n`);
  Deno.renameSync(`${path}~`, path);
}

function link(path: string, target: string): void {
  if (targetOf(path) === target) return;
  unlink(path);
  Deno.symlinkSync(target, path);
}

function targetOf(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

function list(directory: string): string[] {
  try {
    return [...Deno.readDirSync(directory)].map(({ name }) => name);
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
}

function unlink(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

function removeTree(path: string): void {
  try {
    Deno.removeSync(path, { recursive: true });
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

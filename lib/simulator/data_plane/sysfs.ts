/**
 * A tree that is shaped like the part of sysfs in which Linux shows NVMe over fabrics with native multipath, and the
 * device nodes that belong to it.
 *
 * Layout and texts as seen on Linux 6.1 with real NVMe/TCP: `/sys/class/block/nvmeXnY` is the multipath head, X is the
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

/** One tree. Everything is synchronous: whoever looks sees each entry whole or not at all. */
export interface SysfsTree {
  /** With its subsystem, if it is the first one of that. */
  addController(controller: SysfsController): void;
  /** With its subsystem, if it was the last one of that. Its namespaces have to be removed, or given other paths, before. */
  removeController(controller: SysfsController): void;
  /** Shows a namespace; again: with other paths, number or size. */
  putNamespace(namespace: SysfsNamespace): void;
  /** Absent: done. */
  removeNamespace(name: string): void;
  setSize(name: string, sizeBytes: bigint): void;
  /** Removes everything below the root that is ours. */
  clear(): void;
}

const subsystemsDir = "devices/virtual/nvme-subsystem";
const controllersDir = "devices/virtual/nvme-fabrics/ctl";

export function sysfsTree(root: string): SysfsTree {
  const at = (...parts: string[]) => join(root, ...parts);
  const clear = () => {
    for (const part of ["class", "block", "dev", "devices"]) removeTree(at(part));
  };
  const paths = (name: string) =>
    list(at(controllersDir)).flatMap((controller) =>
      list(at(controllersDir, controller)).filter((entry) => isPathOf(entry, name)).map((path) => ({
        controller,
        path,
      }))
    );

  const subsystemDir = (instance: number | string) => at(subsystemsDir, `nvme-subsys${instance}`);
  /** Where the device of a name is: it says the number of its subsystem. */
  const headDir = (name: string) => subsystemDir(/^nvme(\d+)n/.exec(name)?.[1] ?? "");
  const start = () => {
    clear();
    for (const part of ["class/block", "class/nvme", "class/nvme-subsystem", "block", "dev/block", controllersDir]) {
      Deno.mkdirSync(at(part), { recursive: true });
    }
  };
  start();

  return {
    addController(controller) {
      const { name, traddr, trsvcid, subsystem: { instance, nqn, model } } = controller;
      texts(subsystemDir(instance), {
        subsysnqn: nqn,
        model,
        serial: "simulated",
        firmware_rev: "3.17",
        iopolicy: "numa",
      });
      link(at("class/nvme-subsystem", `nvme-subsys${instance}`), `../../${subsystemsDir}/nvme-subsys${instance}`);
      const family = traddr.includes(":") ? "::1" : "127.0.0.1";
      texts(at(controllersDir, name), {
        state: "live",
        address: `traddr=${traddr},trsvcid=${trsvcid},src_addr=${family}`,
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
      link(join(subsystemDir(instance), name), `../../nvme-fabrics/ctl/${name}`);
      link(at("class/nvme", name), `../../${controllersDir}/${name}`);
    },

    removeController({ name, subsystem: { instance } }) {
      unlink(at("class/nvme", name));
      unlink(join(subsystemDir(instance), name));
      removeTree(at(controllersDir, name));
      if (list(subsystemDir(instance)).some((entry) => /^nvme\d+$/.test(entry))) return;
      unlink(at("class/nvme-subsystem", `nvme-subsys${instance}`));
      removeTree(subsystemDir(instance));
    },

    putNamespace(namespace) {
      const { name, uuid, number, controllers } = namespace;
      const facts = {
        uuid,
        wwid: `uuid.${uuid}`,
        nguid: uuid,
        nsid: String(namespace.nsid),
        size: String(namespace.sizeBytes / 512n),
        removable: "0",
      };
      const queue = {
        logical_block_size: String(namespace.sectorSizeBytes),
        physical_block_size: String(namespace.sectorSizeBytes),
      };
      for (const { controller, path } of paths(name)) {
        if (controllers.some((other) => other.name === controller)) continue;
        unlink(at("class/block", path));
        removeTree(at(controllersDir, controller, path));
      }
      for (const controller of controllers) {
        const path = pathName(name, controller.name);
        texts(at(controllersDir, controller.name, path), {
          ...facts,
          hidden: "1",
          ro: "0",
          ana_state: "optimized",
          ana_grpid: "1",
        });
        texts(at(controllersDir, controller.name, path, "queue"), queue);
        link(at(controllersDir, controller.name, path, "device"), `../../${controller.name}`);
        link(at("class/block", path), `../../${controllersDir}/${controller.name}/${path}`);
      }
      const [major, minor] = number.split(":");
      const home = join(headDir(name), name);
      const subsystem = basename(headDir(name));
      texts(join(home, "queue"), queue);
      texts(home, {
        ...facts,
        hidden: "0",
        dev: number,
        uevent: `MAJOR=${major}\nMINOR=${minor}\nDEVNAME=${name}\nDEVTYPE=disk`,
      });
      link(join(home, "device"), `../../${subsystem}`);
      // What blockdev(8) does to the device shows here.
      link(join(home, "ro"), `/sys/dev/block/${number}/ro`);
      for (const entry of list(at("dev/block"))) {
        if (entry !== number && targetOf(at("dev/block", entry))?.endsWith(`/${name}`)) unlink(at("dev/block", entry));
      }
      link(at("dev/block", number), `../../${subsystemsDir}/${subsystem}/${name}`);
      link(at("block", name), `../${subsystemsDir}/${subsystem}/${name}`);
      // Last, as it is where readers start.
      link(at("class/block", name), `../../${subsystemsDir}/${subsystem}/${name}`);
    },

    removeNamespace(name) {
      unlink(at("class/block", name));
      unlink(at("block", name));
      for (const entry of list(at("dev/block"))) {
        if (targetOf(at("dev/block", entry))?.endsWith(`/${name}`)) unlink(at("dev/block", entry));
      }
      for (const { controller, path } of paths(name)) {
        unlink(at("class/block", path));
        removeTree(at(controllersDir, controller, path));
      }
      removeTree(join(headDir(name), name));
    },

    setSize(name, sizeBytes) {
      text(join(headDir(name), name, "size"), String(sizeBytes / 512n));
      for (const { controller, path } of paths(name)) {
        text(at(controllersDir, controller, path, "size"), String(sizeBytes / 512n));
      }
    },

    clear,
  };
}

/** The device name that a tree from an earlier run gave to a device number, if it is still there. */
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

function texts(directory: string, files: Readonly<Record<string, string>>): void {
  Deno.mkdirSync(directory, { recursive: true });
  for (const [name, content] of Object.entries(files)) text(join(directory, name), content);
}

// Replaced and not rewritten: a reader of sysfs never sees half an attribute.
function text(path: string, content: string): void {
  Deno.writeTextFileSync(`${path}~`, `${content}\n`);
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

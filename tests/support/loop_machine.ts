/**
 * A machine for node tests: real loop devices, real tools and mounts, behind a sysfs-shaped tree and a directory of device
 * nodes in a temporary directory of its own. Dispose it, with `await using`: what the test left mounted or attached
 * there is unmounted and detached.
 */
import { join } from "node:path";
import type { CommandResult, Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { createLogger } from "../../lib/log.ts";

export const subsystemNqn = "nqn.2019-09.com.example:cluster:1";

export interface LoopNamespace {
  readonly uuid: string;
  /** `nvme0n1`. */
  readonly name: string;
  /** Its node below the machine's directory of devices. */
  readonly path: string;
  /** The sparse file behind it. */
  readonly file: string;
  /** `/dev/loop7`. */
  readonly loop: string;
}

export interface LoopMachine extends AsyncDisposable {
  readonly host: Host;
  readonly directory: string;
  /** Programs that the host has run, in order. */
  readonly commands: string[];
  /** Makes a loop device and shows it as a namespace. */
  addNamespace(uuid: string, sizeBytes: number, options?: NamespaceOptions): Promise<LoopNamespace>;
  /** Shows a device under another name, or again after `hide`. */
  show(namespace: LoopNamespace, options?: NamespaceOptions): Promise<LoopNamespace>;
  /** Takes node and sysfs entry away, as the kernel does when a namespace goes; what is mounted stays mounted. */
  hide(namespace: LoopNamespace): Promise<void>;
  /** Enlarges the file and the device, and the size in sysfs. */
  grow(namespace: LoopNamespace, sizeBytes: number): Promise<void>;
  /** Mounts of this machine's directory. */
  mounts(): Promise<readonly string[]>;
  /** Runs a command of the test itself; throws when it fails. */
  tool(program: string, ...args: string[]): Promise<string>;
}

export interface NamespaceOptions {
  readonly name?: string;
  readonly subsystemNqn?: string;
  /** Size that sysfs shows, when it shall not be the device's. */
  readonly sysfsSizeBytes?: number;
  readonly readOnly?: boolean;
}

/** See the head of this file. Needs root and loop devices. */
export async function loopMachine(): Promise<LoopMachine> {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-node-" }));
  const sysfs = join(directory, "sys");
  const dev = join(directory, "dev");
  for (const path of ["class/block", "class/nvme", "dev/block"]) {
    await Deno.mkdir(join(sysfs, path), { recursive: true });
  }
  await Deno.mkdir(dev);
  // Its loop devices are those of the machine below.
  await Deno.symlink("/sys/block", join(sysfs, "block"));
  const commands: string[] = [];
  const linux = createLinuxHost({ log: createLogger("error"), sysfsRoot: sysfs, devRoot: dev });
  const host: Host = {
    ...linux,
    run(program, args, options): Promise<CommandResult> {
      commands.push(program);
      return linux.run(program, args, options);
    },
  };
  const loops = new Set<string>();
  let count = 0;

  const machine: LoopMachine = {
    host,
    directory,
    commands,
    async addNamespace(uuid, sizeBytes, options = {}) {
      const file = join(directory, `file${++count}`);
      await Deno.writeFile(file, new Uint8Array());
      await Deno.truncate(file, sizeBytes);
      const loop = (await tool("losetup", "--show", "--find", file)).trim();
      // The kernel keeps the read-only flag of a loop device's last user.
      await tool("blockdev", "--setrw", loop);
      loops.add(loop);
      const name = options.name ?? `nvme0n${count}`;
      return await machine.show({ uuid, name, path: join(dev, name), file, loop }, options);
    },
    async show(namespace, options = {}) {
      const name = options.name ?? namespace.name;
      const shown = { ...namespace, name, path: join(dev, name) };
      const number = (await Deno.readTextFile(`/sys/class/block/${baseName(namespace.loop)}/dev`)).trim();
      const sectors = await Deno.readTextFile(`/sys/class/block/${baseName(namespace.loop)}/size`);
      const entry = join(sysfs, "class/block", name);
      await Deno.mkdir(join(entry, "device"), { recursive: true });
      const attributes = {
        "device/subsysnqn": options.subsystemNqn ?? subsystemNqn,
        uuid: namespace.uuid,
        dev: number,
        hidden: "0",
        ro: options.readOnly ? "1" : "0",
        nsid: "1",
        size: options.sysfsSizeBytes === undefined ? sectors.trim() : String(options.sysfsSizeBytes / 512),
        wwid: `uuid.${namespace.uuid}`,
      };
      for (const [path, text] of Object.entries(attributes)) await Deno.writeTextFile(join(entry, path), `${text}\n`);
      await Deno.symlink(`../../class/block/${name}`, join(sysfs, "dev/block", number));
      await tool("mknod", shown.path, "b", ...number.split(":"));
      return shown;
    },
    async hide(namespace) {
      const entry = join(sysfs, "class/block", namespace.name);
      const number = (await Deno.readTextFile(join(entry, "dev"))).trim();
      await Deno.remove(namespace.path);
      await Deno.remove(entry, { recursive: true });
      await Deno.remove(join(sysfs, "dev/block", number));
    },
    async grow(namespace, sizeBytes) {
      await Deno.truncate(namespace.file, sizeBytes);
      await tool("losetup", "--set-capacity", namespace.loop);
      await Deno.writeTextFile(join(sysfs, "class/block", namespace.name, "size"), `${sizeBytes / 512}\n`);
    },
    async mounts() {
      const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
      return table.map((mount) => mount.path).filter((path) => path.startsWith(`${directory}/`));
    },
    tool,
    async [Symbol.asyncDispose]() {
      for (const path of (await machine.mounts()).toReversed()) await tool("umount", path);
      for (const loop of loops) await tool("losetup", "--detach", loop);
      const left = await machine.mounts();
      if (left.length > 0) throw new Error(`still mounted: ${left.join(", ")}`);
      await Deno.remove(directory, { recursive: true });
    },
  };
  return machine;
}

async function tool(program: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await new Deno.Command(program, { args, env: { LC_ALL: "C" } }).output();
  if (code !== 0) {
    const text = new TextDecoder().decode(stderr) + new TextDecoder().decode(stdout);
    throw new Error(`${program} ${args.join(" ")}: ${text}`);
  }
  return new TextDecoder().decode(stdout);
}

function baseName(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

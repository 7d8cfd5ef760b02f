/** What the demo reads from this machine: what it lacks for the full demo, mounts, loop devices, processes and files. */
import { isAbsolute, join } from "node:path";
import { messageOf } from "../error.ts";

/** Something that this machine lacks, and what to do about it. */
interface Lack {
  readonly what: string;
  readonly remedy: string;
}

// Package names of Debian; most distributions use the same.
const packages: Readonly<Record<string, string>> = {
  losetup: "mount (Debian, Ubuntu) or util-linux",
  mount: "mount (Debian, Ubuntu) or util-linux",
  umount: "mount (Debian, Ubuntu) or util-linux",
  blkid: "util-linux",
  "mkfs.ext4": "e2fsprogs",
  "mkfs.xfs": "xfsprogs",
  "mkfs.btrfs": "btrfs-progs",
};

/** The parent of the demo's temporary directory. */
interface TemporaryRoot {
  readonly directory: string;
  /** Whether device nodes can be opened there. */
  readonly hasDevices: boolean;
}

/** A directory for temporary files where device nodes can be opened; some systems mount /tmp with `nodev`. */
export async function findTemporaryRoot(): Promise<TemporaryRoot> {
  const given = Deno.env.get("TMPDIR");
  const candidates = [...given !== undefined && isAbsolute(given) ? [given] : [], "/tmp", "/var/tmp"];
  const there = candidates.filter((directory) => kindOfSync(directory) === "directory");
  const options = await Promise.all(there.map(mountOptions));
  const good = there.find((_directory, at) => options[at]?.includes("nodev") === false);
  return { directory: good ?? there[0] ?? ".", hasDevices: good !== undefined };
}

/** What this machine lacks for devices and file systems. */
export async function machineLacks(place: TemporaryRoot, fsTypes: readonly string[]): Promise<readonly Lack[]> {
  if (Deno.build.os !== "linux") return [{ what: "Linux", remedy: "run it on Linux, or in a virtual machine" }];
  const lacks: Lack[] = [];
  if (Deno.uid() !== 0) lacks.push({ what: "root", remedy: "run it with sudo, or as root in a privileged container" });
  else {
    const capabilities = BigInt(
      `0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(await readText("/proc/self/status") ?? "")?.[1] ?? "0"}`,
    );
    for (const [name, bit] of [["CAP_SYS_ADMIN", 21n], ["CAP_MKNOD", 27n]] as const) {
      if ((capabilities >> bit & 1n) === 0n) {
        lacks.push({ what: `the right ${name}`, remedy: "start the container with --privileged" });
      }
    }
    const problem = await loopControlProblem();
    if (problem !== undefined) {
      const remedy = "modprobe loop; in a container also --privileged and -v /dev:/dev";
      lacks.push({ what: `loop devices (${problem})`, remedy });
    }
  }
  if (!place.hasDevices) {
    const remedy = "set TMPDIR to a directory on a file system without it";
    lacks.push({ what: "a temporary directory for device nodes (all are mounted nodev)", remedy });
  }
  for (const name of ["losetup", "mount", "umount", "blkid"]) {
    if (!isOnPath(name)) lacks.push(missingProgram(name));
  }
  for (const fsType of fsTypes) {
    const lack = fsLacks(fsType);
    if (lack !== undefined) lacks.push(lack);
  }
  return lacks;
}

async function loopControlProblem(): Promise<string | undefined> {
  try {
    (await Deno.open("/dev/loop-control", { read: true, write: true })).close();
    return undefined;
  } catch (error) {
    return messageOf(error);
  }
}

/** What this machine lacks to make and mount a file system; undefined when it lacks nothing. */
export function fsLacks(fsType: string): Lack | undefined {
  if (!isOnPath(`mkfs.${fsType}`)) return missingProgram(`mkfs.${fsType}`);
  const known = readTextSync("/proc/filesystems");
  if (known === undefined || new RegExp(`^\\s*${fsType}$`, "m").test(known)) return undefined;
  const release = readTextSync("/proc/sys/kernel/osrelease")?.trim() ?? "";
  const modules = readTextSync(`/lib/modules/${release}/modules.dep`) ?? "";
  // The kernel loads it when it is mounted.
  if (modules.includes(`/${fsType}.ko`)) return undefined;
  return { what: `${fsType} in the kernel`, remedy: `load its module, ${fsType}` };
}

function missingProgram(name: string): Lack {
  return { what: name, remedy: `install the package ${packages[name] ?? name}` };
}

function isOnPath(name: string): boolean {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  // sudo searches these directories; the PATH of an ordinary user often lacks them.
  if (Deno.uid() !== 0) path.push("/usr/local/sbin", "/usr/sbin", "/sbin");
  return path.some((directory) => kindOfSync(join(directory, name)) === "file");
}

/** A mount in the mount table of this process. */
export interface Mount {
  /** Mount point. */
  readonly at: string;
  /** Path of what is mounted, inside its file system. */
  readonly root: string;
  readonly fsType: string;
  readonly source: string;
}

/** Options of the mount that holds `path`. */
async function mountOptions(path: string): Promise<readonly string[]> {
  const real = await Deno.realPath(path);
  let best: { readonly at: string; readonly options: readonly string[] } | undefined;
  for (const { at, options } of await mountTable()) {
    const holds = at === "/" || real === at || real.startsWith(`${at}/`);
    if (holds && at.length >= (best?.at.length ?? 0)) best = { at, options };
  }
  return best?.options ?? [];
}

async function mountTable() {
  const text = await readText("/proc/self/mountinfo") ?? "";
  // proc(5): ID, parent, device, root, mount point, options, optional fields, "-", type, source, super options
  return text.split("\n").filter((line) => line !== "").map((line) => {
    const [left = "", right = ""] = line.split(" - ");
    const [, , , root = "", at = "", options = ""] = left.split(" ").map(unescapeMount);
    const [fsType = "", source = ""] = right.split(" ").map(unescapeMount);
    return { at, root, fsType, source, options: options.split(",") };
  });
}

function unescapeMount(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_match, octal) => String.fromCharCode(parseInt(octal, 8)));
}

/** Mounts below a directory, oldest first. */
export async function mountsBelow(directory: string): Promise<Mount[]> {
  return (await mountTable()).filter(({ at }) => at.startsWith(`${directory}/`))
    .map(({ at, root, fsType, source }) => ({ at, root, fsType, source }));
}

/** Loop devices whose files are below a directory, deleted ones included. */
export async function loopsBelow(directory: string): Promise<readonly string[]> {
  const found: string[] = [];
  for (const name of await listNames("/sys/block") ?? []) {
    if (!name.startsWith("loop")) continue;
    const file = await readText(`/sys/block/${name}/loop/backing_file`);
    if (file?.startsWith(`${directory}/`)) found.push(name);
  }
  return found;
}

/** Other processes whose command line contains a text, as `PID command line`. */
export async function processesNaming(text: string): Promise<readonly string[]> {
  const found: string[] = [];
  for (const pid of await listNames("/proc") ?? []) {
    if (!/^\d+$/.test(pid) || Number(pid) === Deno.pid) continue;
    const commandLine = (await readText(`/proc/${pid}/cmdline`) ?? "").replaceAll("\0", " ");
    if (commandLine.includes(text)) found.push(`${pid} ${commandLine.trim()}`);
  }
  return found;
}

/** The text of a file; undefined when it cannot be read. */
export async function readText(path: string): Promise<string | undefined> {
  try {
    return await Deno.readTextFile(path);
  } catch {
    return undefined;
  }
}

function readTextSync(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return undefined;
  }
}

/** The sorted names in a directory; undefined when it cannot be read. */
export async function listNames(directory: string): Promise<readonly string[] | undefined> {
  try {
    return (await Array.fromAsync(Deno.readDir(directory), ({ name }) => name)).sort();
  } catch {
    return undefined;
  }
}

/** What is at a path, symbolic links followed. */
type Kind = "absent" | "directory" | "file" | "block" | "other";

/** What is at a path. Rejects with the system's error when the path cannot be looked up. */
export function kindOf(path: string): Promise<Kind> {
  return Deno.stat(path).then(kind, absent);
}

/** As `kindOf`; what this process may not look up counts as absent. */
function kindOfSync(path: string): Kind {
  try {
    return kind(Deno.statSync(path));
  } catch {
    return "absent";
  }
}

function kind(found: Deno.FileInfo): Kind {
  if (found.isDirectory) return "directory";
  if (found.isBlockDevice) return "block";
  return found.isFile ? "file" : "other";
}

function absent(error: unknown): "absent" {
  if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return "absent";
  throw error;
}

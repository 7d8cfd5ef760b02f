/**
 * Makes the root file system of an image from Debian packages: the tools that the driver runs and the shared libraries
 * that those need, nothing else. No shell, no package manager, nothing that is setuid.
 *
 *   deno run -A k8s/image/root.ts node DIRECTORY [--debs DIRECTORY]         for `lbcsi`, root
 *   deno run -A k8s/image/root.ts controller DIRECTORY [--debs DIRECTORY]   for `lbcsi-controller`, user 65532
 *
 * Needs root and Debian's apt, whose release it takes; no registry, and the machine's own packages stay as they are. The
 * Containerfile uses it, and so do the tests, so that there is one list of tools. `--debs` keeps the packages there and
 * takes those of an earlier run.
 *
 * Meant for Debian 12. Its tools, and more so those of newer releases, make features that old kernels do not know (xfs
 * bigtime: Linux 5.10, ext4 orphan_file: 5.15); the driver leaves out what the node's kernel does not know.
 */
import { basename, dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { configDirectories, socketDirectories } from "./permissions.ts";

/** Programs that the driver runs, and the packages that have them. */
export const nodeTools: Readonly<Record<string, readonly string[]>> = {
  "nvme-cli": ["nvme"],
  "util-linux": ["blkid", "blockdev", "wipefs"],
  "mount": ["mount", "umount"],
  "e2fsprogs": ["mkfs.ext4", "e2fsck", "resize2fs"],
  "xfsprogs": ["mkfs.xfs", "xfs_growfs", "xfs_logprint"],
  "btrfs-progs": ["mkfs.btrfs", "btrfs"],
  "cryptsetup-bin": ["cryptsetup"],
  // Names of discovery controllers.
  "libc-bin": ["getent"],
};

/** What executables made by `deno compile` are linked with. libgcc_s is loaded by the threads of argon2 too. */
const runtime = {
  libc6: ["libdl.so.2", "librt.so.1", "libpthread.so.0", "libm.so.6", "libc.so.6"],
  "libgcc-s1": ["libgcc_s.so.1"],
};

/** Files that programs read by themselves. */
const dataFiles: Readonly<Record<string, readonly string[]>> = {
  // The features of new file systems.
  e2fsprogs: ["/etc/mke2fs.conf"],
  // What the image is made of, for who looks for known weaknesses.
  "base-files": ["/usr/lib/os-release", "/etc/debian_version"],
};

export const kinds = ["node", "controller"] as const;
export type Kind = typeof kinds[number];

/** User and group of the controller, as the manifests have it. */
const controllerUser = 65532;

const merged = ["bin", "sbin", "lib", "lib64"];

/** A reason not to go on, worded for who builds. */
class Refusal extends Error {}

async function tool(program: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await new Deno.Command(program, {
    args: [...args],
    env: { LC_ALL: "C", DEBIAN_FRONTEND: "noninteractive" },
    stdin: "null",
  }).output().catch((error) => {
    throw new Refusal(`Cannot run ${program}: ${error instanceof Error ? error.message : error}`);
  });
  if (code === 0) return new TextDecoder().decode(stdout);
  throw new Refusal(`Cannot go on: ${[program, ...args].join(" ")} exits ${code}\n${new TextDecoder().decode(stderr)}`);
}

async function exists(path: string): Promise<boolean> {
  return await Deno.lstat(path).then(() => true, () => false);
}

/** The packages of both kinds with all that they depend on, as files. */
async function packagesIn(directory: string): Promise<readonly string[]> {
  const wanted = [...Object.keys(nodeTools), ...Object.keys(runtime), ...Object.keys(dataFiles)];
  await Deno.mkdir(join(directory, "partial"), { recursive: true });
  // As if nothing was installed, so that what the machine has is fetched too.
  const status = join(directory, "status");
  await Deno.writeTextFile(status, "");
  const download = () =>
    tool(
      ...["apt-get", "-qq", "-y", "--no-install-recommends", "--download-only"] as const,
      ...["-o", `Dir::State::status=${status}`, "-o", `Dir::Cache::archives=${directory}`, "-o", "Debug::NoLocking=1"],
      // It fetches as a user of its own, who may not look into a directory of ours.
      ...["-o", "APT::Sandbox::User=root", "install", ...new Set(wanted)],
    );
  const here = () => [...Deno.readDirSync(directory)].map(({ name }) => name).filter((name) => name.endsWith(".deb"));
  if (here().length === 0) {
    await download().catch(async () => {
      await tool("apt-get", "-qq", "update");
      await download();
    });
  }
  return here().sort().map((name) => join(directory, name));
}

/** Packages unpacked over one another, without what no program needs. */
export class Tree {
  readonly #root: string;
  readonly #debs = new Map<string, string>();
  /** From paths to packages. */
  readonly #owners = new Map<string, string>();

  constructor(root: string) {
    this.#root = root;
  }

  async unpack(debs: readonly string[]): Promise<void> {
    for (const name of merged) {
      await Deno.mkdir(join(this.#root, "usr", name), { recursive: true });
      await Deno.symlink(`usr/${name}`, join(this.#root, name));
    }
    for (const deb of debs) {
      const name = (await tool("dpkg-deb", "--field", deb, "Package")).trim();
      this.#debs.set(name, deb);
      const archive = join(this.#root, "archive.tar");
      await Deno.writeFile(archive, await bytesOf("dpkg-deb", "--fsys-tarfile", deb));
      const left = ["usr/share/man", "usr/share/locale", "usr/share/i18n", "usr/share/zoneinfo", "usr/lib/python3"]
        .map((path) => `--exclude=./${path}`);
      const listed = await tool("tar", "-xvf", archive, "-C", this.#root, "--keep-directory-symlink", ...left);
      await Deno.remove(archive);
      for (const line of listed.split("\n")) {
        if (line === "" || line.endsWith("/")) continue;
        this.#owners.set(line.replace(/^\.\/(bin|sbin|lib|lib64)\//, "./usr/$1/").slice(1), name);
      }
    }
  }

  /** Where a path of the tree is outside. */
  at(path: string): string {
    return join(this.#root, path);
  }

  /** A path as it is in the tree when `/bin` and its like have gone into `/usr`. */
  static merged(path: string): string {
    return path.replace(/^\/(bin|sbin|lib|lib64)\//, "/usr/$1/");
  }

  ownerOf(path: string): string {
    const owner = this.#owners.get(path);
    if (owner === undefined) throw new Refusal(`Cannot tell which package ${path} is from`);
    return owner;
  }

  debOf(name: string): string {
    const deb = this.#debs.get(name);
    if (deb === undefined) throw new Refusal(`Cannot find the package ${name} among those that were fetched`);
    return deb;
  }

  async programAt(name: string): Promise<string> {
    for (const directory of ["/usr/sbin", "/usr/bin"]) {
      if (await exists(this.at(`${directory}/${name}`))) return `${directory}/${name}`;
    }
    throw new Refusal(`Cannot find ${name}: no package has it any more`);
  }

  async loader(): Promise<string> {
    for (const path of ["/usr/lib64/ld-linux-x86-64.so.2", "/usr/lib/ld-linux-aarch64.so.1"]) {
      if (await exists(this.at(path))) return path;
    }
    throw new Refusal("Cannot find the dynamic loader: only x86_64 and aarch64 are known");
  }

  async library(name: string): Promise<string> {
    const directory = `/usr/lib/${Deno.build.arch}-linux-gnu`;
    if (await exists(this.at(`${directory}/${name}`))) return `${directory}/${name}`;
    throw new Refusal(`Cannot find ${name} in ${directory}`);
  }

  /** The libraries that the loader gives a program, also those that libraries need. */
  async librariesOf(program: string): Promise<readonly string[]> {
    const listed = await tool("chroot", this.#root, await this.loader(), "--list", program);
    const missing = /^\s*(\S+) => not found$/m.exec(listed);
    if (missing !== null) throw new Refusal(`Cannot use ${program}: its library ${missing[1]} is in no package`);
    return [...listed.matchAll(/=> (\/\S+)/g)].map(([, path = ""]) => Tree.merged(path));
  }
}

async function bytesOf(program: string, ...args: readonly string[]): Promise<Uint8Array> {
  const { code, stdout, stderr } = await new Deno.Command(program, { args: [...args] }).output();
  if (code !== 0) throw new Refusal(`Cannot go on: ${program} ${args.join(" ")}\n${new TextDecoder().decode(stderr)}`);
  return stdout;
}

/** Copies a file, and where it is a symbolic link also what that points to; tells what it has copied. */
async function copy(tree: Tree, path: string, root: string): Promise<readonly string[]> {
  const to = join(root, path);
  if (await exists(to)) return [];
  await Deno.mkdir(dirname(to), { recursive: true });
  const { isSymlink, mode } = await Deno.lstat(tree.at(path));
  if (isSymlink) {
    const link = await Deno.readLink(tree.at(path));
    await Deno.symlink(link, to);
    const target = Tree.merged(link.startsWith("/") ? link : join(dirname(path), link));
    return [path, ...await copy(tree, target, root)];
  }
  await Deno.copyFile(tree.at(path), to);
  // mount and umount are setuid for users; here there are none.
  await Deno.chmod(to, (mode ?? 0) & 0o755);
  return [path];
}

/** The packages of a directory, which are fetched when it has none, unpacked; dispose it to remove what was unpacked. */
export async function unpacked(debs: string): Promise<Tree & AsyncDisposable> {
  const work = await Deno.makeTempDir({ prefix: "lbcsi-root-" });
  await using unfinished = new AsyncDisposableStack();
  unfinished.defer(() => Deno.remove(work, { recursive: true }));
  const tree = new Tree(work);
  await tree.unpack(await packagesIn(debs));
  const owned = unfinished.move();
  return Object.assign(tree, { [Symbol.asyncDispose]: () => owned.disposeAsync() });
}

/** Makes the root file system of one kind in an empty or absent directory; tells its packages with their versions. */
export async function makeRoot(kind: Kind, root: string, tree: Tree): Promise<readonly string[]> {
  await Deno.mkdir(root, { recursive: true });
  if ([...Deno.readDirSync(root)].length > 0) throw new Refusal(`Cannot make an image in ${root}: it is not empty`);
  const tools = kind === "node" ? Object.values(nodeTools).flat() : [];
  const programs = await Promise.all(tools.map((name) => tree.programAt(name)));
  const libraries = await Promise.all(Object.values(runtime).flat().map((name) => tree.library(name)));
  const needed = await Promise.all([...programs, ...libraries].map((path) => tree.librariesOf(path)));
  const data = Object.entries(dataFiles).flatMap(([name, paths]) =>
    kind === "node" || name === "base-files" ? paths : []
  );
  for (const name of merged) {
    await Deno.mkdir(join(root, "usr", name), { recursive: true });
    await Deno.symlink(`usr/${name}`, join(root, name));
  }
  const owners = new Set<string>();
  for (const path of [await tree.loader(), ...programs, ...libraries, ...needed.flat(), ...data]) {
    for (const copied of await copy(tree, path, root)) owners.add(tree.ownerOf(copied));
  }
  await writeSettings(kind, root);
  return await writeRecords([...owners].sort(), tree, root);
}

/** Users, names, and the directories that something is mounted at or written to. */
async function writeSettings(kind: Kind, root: string): Promise<void> {
  const files: Readonly<Record<string, string>> = {
    "etc/passwd": `root:x:0:0:root:/:/none\nlbcsi:x:${controllerUser}:${controllerUser}:lbcsi:/:/none\n`,
    "etc/group": `root:x:0:\nlbcsi:x:${controllerUser}:\n`,
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
  };
  for (const [path, text] of Object.entries(files)) await Deno.writeTextFile(join(root, path), text);
  const directories = [
    ...["dev", "proc", "run", "sys", "tmp", ...socketDirectories, ...configDirectories],
    ...kind === "node" ? ["etc/discovery-client/discovery.d", "var/lib/kubelet"] : [],
  ];
  for (const path of directories) await Deno.mkdir(join(root, path), { recursive: true });
  await Deno.chmod(join(root, "tmp"), 0o1777);
  await Deno.symlink("../usr/lib/os-release", join(root, "etc/os-release"));
  if (kind === "node") return;
  for (const path of socketDirectories) await Deno.chown(join(root, path), controllerUser, controllerUser);
}

/** What a scanner of images and a lawyer look for: each package's data, as distroless images have them, and its licence. */
async function writeRecords(owners: readonly string[], tree: Tree, root: string): Promise<readonly string[]> {
  const status = join(root, "var/lib/dpkg/status.d");
  await Deno.mkdir(status, { recursive: true });
  const versions: string[] = [];
  for (const name of owners) {
    const fields = await tool("dpkg-deb", "--field", tree.debOf(name));
    await Deno.writeTextFile(join(status, name), fields);
    versions.push(`${name} ${/^Version: (.*)$/m.exec(fields)?.[1]}`);
    const licence = `/usr/share/doc/${name}/copyright`;
    await Deno.mkdir(join(root, dirname(licence)), { recursive: true });
    // Some are links to another package's.
    await Deno.copyFile(await realPath(tree, licence), join(root, licence));
  }
  return versions;
}

async function realPath(tree: Tree, path: string): Promise<string> {
  const found = await Deno.realPath(tree.at(path));
  if (!found.startsWith(tree.at("/"))) throw new Refusal(`Cannot follow ${path}: it leads out of the packages`);
  return found;
}

async function main(): Promise<void> {
  const { values, positionals: [kindText, directory, ...more] } = parseArgs({
    args: Deno.args,
    allowPositionals: true,
    options: { debs: { type: "string" } },
  });
  const kind = kinds.find((kind) => kind === kindText);
  if (kind === undefined || directory === undefined || more.length > 0) {
    throw new Refusal("usage: root.ts node|controller DIRECTORY [--debs DIRECTORY]");
  }
  if (Deno.uid() !== 0) throw new Refusal("Cannot make a root file system: root is needed");
  const debs = values.debs ?? await Deno.makeTempDir({ prefix: "lbcsi-debs-" });
  await Deno.mkdir(debs, { recursive: true });
  try {
    await using tree = await unpacked(await Deno.realPath(debs));
    console.log((await makeRoot(kind, directory, tree)).join("\n"));
  } finally {
    if (values.debs === undefined) await Deno.remove(debs, { recursive: true });
  }
  const { 0: kib } = (await tool("du", "-sk", directory)).split("\t");
  console.log(`${basename(directory)}: ${kib} KiB`);
}

if (import.meta.main) {
  try {
    await main();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    console.error(error.message);
    Deno.exit(1);
  }
}

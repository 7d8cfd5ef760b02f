/**
 * Makes the root file system of an image from Debian packages: the tools that the driver runs and the shared libraries
 * that they need, nothing else. No shell, no package manager, no setuid program.
 *
 *   deno run -A k8s/image/root.ts node DIRECTORY [--debs DIRECTORY]         for `lbcsi`, root
 *   deno run -A k8s/image/root.ts controller DIRECTORY [--debs DIRECTORY]   for `lbcsi-controller`, user 65532
 *
 * Needs root and Debian's apt, and uses the packages of this machine's release. It needs no image registry, and does not
 * change the packages that are installed here. The Containerfile and the tests use it, so that there is one list of tools.
 * `--debs` keeps the packages in a directory, and uses those that an earlier run has left there.
 *
 * Meant for Debian 12. Its tools, and more so those of newer releases, create file systems with features that old kernels
 * do not support (xfs bigtime: Linux 5.10, ext4 orphan_file: 5.15); the driver disables what the node's kernel lacks.
 *
 * Imports nothing but its siblings and Deno's own modules, because the Containerfile runs it without a configuration.
 */
import { basename, dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { BuildError, exitOnBuildError } from "./build_error.ts";
import { configDirectories, socketDirectories } from "./permissions.ts";

/** Programs that the driver runs, by the package that contains them. */
export const nodeTools: Readonly<Record<string, readonly string[]>> = {
  "nvme-cli": ["nvme"],
  "util-linux": ["blkid", "blockdev", "wipefs"],
  "mount": ["mount", "umount"],
  "e2fsprogs": ["mkfs.ext4", "e2fsck", "resize2fs"],
  "xfsprogs": ["mkfs.xfs", "xfs_growfs", "xfs_logprint"],
  "btrfs-progs": ["mkfs.btrfs", "btrfs"],
  "cryptsetup-bin": ["cryptsetup"],
  // Resolves the names of discovery controllers.
  "libc-bin": ["getent"],
};

/** The libraries that executables of `deno compile` are linked with. The threads of argon2 also load libgcc_s. */
const runtimeLibraries = {
  libc6: ["libdl.so.2", "librt.so.1", "libpthread.so.0", "libm.so.6", "libc.so.6"],
  "libgcc-s1": ["libgcc_s.so.1"],
};

/** Other files of packages that belong in the image. */
const dataFiles: Readonly<Record<string, readonly string[]>> = {
  // The features that mkfs.ext4 enables.
  e2fsprogs: ["/etc/mke2fs.conf"],
  // The release, for scanners that look for known vulnerabilities.
  "base-files": ["/usr/lib/os-release", "/etc/debian_version"],
};

/** The images: `node` serves everything, `controller` is smaller and has fewer rights. */
export const imageKinds = ["node", "controller"] as const;
export type ImageKind = typeof imageKinds[number];

/** User and group of the controller, the same as in the manifests. */
const controllerUser = 65532;

/** Directories of `/` that are symbolic links to those in `/usr`. */
const mergedDirectories = ["bin", "sbin", "lib", "lib64"];

/** The output of a program. Throws a BuildError when it fails or cannot be started. */
async function runForBytes(program: string, ...args: readonly string[]): Promise<Uint8Array> {
  const { code, stdout, stderr } = await new Deno.Command(program, {
    args: [...args],
    env: { LC_ALL: "C", DEBIAN_FRONTEND: "noninteractive" },
    stdin: "null",
  }).output().catch((error) => {
    throw new BuildError(`Cannot run ${program}: ${error instanceof Error ? error.message : error}`);
  });
  if (code === 0) return stdout;
  const command = [program, ...args].join(" ");
  throw new BuildError(`Cannot go on: ${command} exits ${code}\n${new TextDecoder().decode(stderr)}`);
}

async function runTool(program: string, ...args: readonly string[]): Promise<string> {
  return new TextDecoder().decode(await runForBytes(program, ...args));
}

async function exists(path: string): Promise<boolean> {
  return await Deno.lstat(path).then(() => true, () => false);
}

/** The files of the packages of both images and of all that they depend on; downloads them if the directory has none. */
async function packageFiles(directory: string): Promise<readonly string[]> {
  const names = new Set([nodeTools, runtimeLibraries, dataFiles].flatMap((table) => Object.keys(table)));
  await Deno.mkdir(join(directory, "partial"), { recursive: true });
  // An empty status file means that nothing is installed, so that apt also downloads what this machine has.
  const status = join(directory, "status");
  await Deno.writeTextFile(status, "");
  const download = () =>
    runTool(
      ...["apt-get", "-qq", "-y", "--no-install-recommends", "--download-only"] as const,
      ...["-o", `Dir::State::status=${status}`, "-o", `Dir::Cache::archives=${directory}`, "-o", "Debug::NoLocking=1"],
      // Otherwise apt downloads as a user of its own, which cannot access our directory.
      ...["-o", "APT::Sandbox::User=root", "install", ...names],
    );
  const listFiles = () =>
    [...Deno.readDirSync(directory)].map(({ name }) => name).filter((name) => name.endsWith(".deb")).sort();
  if (listFiles().length === 0) {
    await download().catch(async () => {
      await runTool("apt-get", "-qq", "update");
      await download();
    });
  }
  return listFiles().map((name) => join(directory, name));
}

/** Packages that are unpacked into one directory, except for files that no program needs. */
export class PackageTree {
  readonly #root: string;
  readonly #debs = new Map<string, string>();
  /** The package of each path. */
  readonly #owners = new Map<string, string>();

  constructor(root: string) {
    this.#root = root;
  }

  async unpack(debs: readonly string[]): Promise<void> {
    for (const name of mergedDirectories) {
      await Deno.mkdir(join(this.#root, "usr", name), { recursive: true });
      await Deno.symlink(`usr/${name}`, join(this.#root, name));
    }
    for (const deb of debs) {
      const name = (await runTool("dpkg-deb", "--field", deb, "Package")).trim();
      this.#debs.set(name, deb);
      const archive = join(this.#root, "archive.tar");
      await Deno.writeFile(archive, await runForBytes("dpkg-deb", "--fsys-tarfile", deb));
      const excluded = ["usr/share/man", "usr/share/locale", "usr/share/i18n", "usr/share/zoneinfo", "usr/lib/python3"]
        .map((path) => `--exclude=./${path}`);
      const listed = await runTool("tar", "-xvf", archive, "-C", this.#root, "--keep-directory-symlink", ...excluded);
      await Deno.remove(archive);
      for (const line of listed.split("\n")) {
        if (line === "" || line.endsWith("/")) continue;
        this.#owners.set(line.replace(/^\.\/(bin|sbin|lib|lib64)\//, "./usr/$1/").slice(1), name);
      }
    }
  }

  /** The path in the host's file system of a path of the tree. */
  at(path: string): string {
    return join(this.#root, path);
  }

  /** A path with `/bin`, `/sbin`, `/lib` and `/lib64` replaced by the directories in `/usr` that they link to. */
  static merged(path: string): string {
    return path.replace(/^\/(bin|sbin|lib|lib64)\//, "/usr/$1/");
  }

  ownerOf(path: string): string {
    const owner = this.#owners.get(path);
    if (owner === undefined) throw new BuildError(`Cannot find the package of ${path}`);
    return owner;
  }

  debOf(name: string): string {
    const deb = this.#debs.get(name);
    if (deb === undefined) throw new BuildError(`Cannot find the package ${name} among those that were downloaded`);
    return deb;
  }

  async programAt(name: string): Promise<string> {
    for (const directory of ["/usr/sbin", "/usr/bin"]) {
      if (await exists(this.at(`${directory}/${name}`))) return `${directory}/${name}`;
    }
    throw new BuildError(`Cannot find ${name}: no package contains it`);
  }

  async loader(): Promise<string> {
    for (const path of ["/usr/lib64/ld-linux-x86-64.so.2", "/usr/lib/ld-linux-aarch64.so.1"]) {
      if (await exists(this.at(path))) return path;
    }
    throw new BuildError("Cannot find the dynamic loader: only x86_64 and aarch64 are known");
  }

  async library(name: string): Promise<string> {
    const directory = `/usr/lib/${Deno.build.arch}-linux-gnu`;
    if (await exists(this.at(`${directory}/${name}`))) return `${directory}/${name}`;
    throw new BuildError(`Cannot find ${name} in ${directory}`);
  }

  /** The libraries that the dynamic loader loads for a program, including those that libraries need. */
  async librariesOf(program: string): Promise<readonly string[]> {
    const listed = await runTool("chroot", this.#root, await this.loader(), "--list", program);
    const missing = /^\s*(\S+) => not found$/m.exec(listed);
    if (missing !== null) throw new BuildError(`Cannot use ${program}: its library ${missing[1]} is in no package`);
    return [...listed.matchAll(/=> (\/\S+)/g)].map(([, path = ""]) => PackageTree.merged(path));
  }
}

/** Copies a file, and the target of a symbolic link too; returns the paths that it has copied. */
async function copy(tree: PackageTree, path: string, root: string): Promise<readonly string[]> {
  const to = join(root, path);
  if (await exists(to)) return [];
  await Deno.mkdir(dirname(to), { recursive: true });
  const { isSymlink, mode } = await Deno.lstat(tree.at(path));
  if (isSymlink) {
    const link = await Deno.readLink(tree.at(path));
    await Deno.symlink(link, to);
    const target = PackageTree.merged(link.startsWith("/") ? link : join(dirname(path), link));
    return [path, ...await copy(tree, target, root)];
  }
  await Deno.copyFile(tree.at(path), to);
  // Removes setuid, which mount and umount have for users other than root.
  await Deno.chmod(to, (mode ?? 0) & 0o755);
  return [path];
}

/** Unpacks the packages of a directory, and downloads them first if it has none. Disposing removes what was unpacked. */
export async function unpackPackages(debs: string): Promise<PackageTree & AsyncDisposable> {
  const work = await Deno.makeTempDir({ prefix: "lbcsi-root-" });
  await using unfinished = new AsyncDisposableStack();
  unfinished.defer(() => Deno.remove(work, { recursive: true }));
  const tree = new PackageTree(work);
  await tree.unpack(await packageFiles(debs));
  const owned = unfinished.move();
  return Object.assign(tree, { [Symbol.asyncDispose]: () => owned.disposeAsync() });
}

/** Makes the root file system of an image in an empty or absent directory; returns its packages with their versions. */
export async function makeRoot(kind: ImageKind, root: string, tree: PackageTree): Promise<readonly string[]> {
  await Deno.mkdir(root, { recursive: true });
  if ([...Deno.readDirSync(root)].length > 0) throw new BuildError(`Cannot make an image in ${root}: it is not empty`);
  const tools = kind === "node" ? Object.values(nodeTools).flat() : [];
  const programs = await Promise.all(tools.map((name) => tree.programAt(name)));
  const libraries = await Promise.all(Object.values(runtimeLibraries).flat().map((name) => tree.library(name)));
  const needed = await Promise.all([...programs, ...libraries].map((path) => tree.librariesOf(path)));
  const data = Object.entries(dataFiles).flatMap(([name, paths]) =>
    kind === "node" || name === "base-files" ? paths : []
  );
  for (const name of mergedDirectories) {
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

/** Writes the files for user and host names, and makes the directories that are mounted or written to. */
async function writeSettings(kind: ImageKind, root: string): Promise<void> {
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

/** Writes the data of each package where image scanners look for it, as in distroless images, and its licence. */
async function writeRecords(owners: readonly string[], tree: PackageTree, root: string): Promise<readonly string[]> {
  const status = join(root, "var/lib/dpkg/status.d");
  await Deno.mkdir(status, { recursive: true });
  const versions: string[] = [];
  for (const name of owners) {
    const fields = await runTool("dpkg-deb", "--field", tree.debOf(name));
    await Deno.writeTextFile(join(status, name), fields);
    versions.push(`${name} ${/^Version: (.*)$/m.exec(fields)?.[1]}`);
    const licence = `/usr/share/doc/${name}/copyright`;
    await Deno.mkdir(join(root, dirname(licence)), { recursive: true });
    // Some licences are links to that of another package.
    await Deno.copyFile(await realPath(tree, licence), join(root, licence));
  }
  return versions;
}

/** The real path of a path of the tree. Throws when symbolic links lead out of the tree. */
async function realPath(tree: PackageTree, path: string): Promise<string> {
  const found = await Deno.realPath(tree.at(path));
  if (!found.startsWith(tree.at("/"))) throw new BuildError(`Cannot follow ${path}: it leads out of the packages`);
  return found;
}

async function main(): Promise<void> {
  const { values, positionals: [kindText, directory, ...more] } = parseArgs({
    args: Deno.args,
    allowPositionals: true,
    options: { debs: { type: "string" } },
  });
  const kind = imageKinds.find((kind) => kind === kindText);
  if (kind === undefined || directory === undefined || more.length > 0) {
    throw new BuildError("usage: root.ts node|controller DIRECTORY [--debs DIRECTORY]");
  }
  if (Deno.uid() !== 0) throw new BuildError("Cannot make a root file system: root is needed");
  const debs = values.debs ?? await Deno.makeTempDir({ prefix: "lbcsi-debs-" });
  await Deno.mkdir(debs, { recursive: true });
  try {
    await using tree = await unpackPackages(await Deno.realPath(debs));
    console.log((await makeRoot(kind, directory, tree)).join("\n"));
  } finally {
    if (values.debs === undefined) await Deno.remove(debs, { recursive: true });
  }
  const { 0: kib } = (await runTool("du", "-sk", directory)).split("\t");
  console.log(`${basename(directory)}: ${kib} KiB`);
}

if (import.meta.main) await exitOnBuildError(main);

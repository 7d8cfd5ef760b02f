/** The programs that the driver runs: whether they are installed, and in which package they are. */
import { basename } from "node:path";

/**
 * Why a program cannot be run here, as in the errors of Host.run; undefined: it is in PATH. Runs nothing. For commands that
 * report everything that is missing before they begin.
 */
export function programProblem(program: string): string | undefined {
  const path = (Deno.env.get("PATH") ?? "").split(":");
  if (path.some((directory) => isFile(`${directory}/${program}`))) return undefined;
  return `${absenceOf(program)}${needOf(program)}`;
}

/** Ends an error about a program that is missing. */
export function needOf(program: string): string {
  const name = packages[basename(program)];
  return name === undefined ? "" : `, the package ${name} is needed on this node`;
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** Where distributions install programs for root; not in PATH for other users, nor after `su` without `-`. */
const systemDirectories = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/** Why a program was not found. */
export function absenceOf(program: string): string {
  const directory = program.includes("/")
    ? undefined
    : systemDirectories.find((directory) => isFile(`${directory}/${program}`));
  if (directory === undefined) return "it is not installed";
  return `it is in ${directory}, which is not in PATH (${Deno.env.get("PATH") ?? ""})`;
}

// Names of Debian's packages; most distributions use the same.
const packages: Readonly<Record<string, string>> = {
  "blkid": "util-linux",
  "blockdev": "util-linux",
  "wipefs": "util-linux",
  "mount": "mount (util-linux)",
  "umount": "mount (util-linux)",
  "mkfs.ext4": "e2fsprogs",
  "e2fsck": "e2fsprogs",
  "resize2fs": "e2fsprogs",
  "mkfs.xfs": "xfsprogs",
  "xfs_growfs": "xfsprogs",
  "mkfs.btrfs": "btrfs-progs",
  "btrfs": "btrfs-progs",
  "nvme": "nvme-cli",
  "cryptsetup": "cryptsetup",
};

/** Paths on the node's own disk where volumes are mounted. */
import type { RequestContext } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Host } from "./host.ts";
import { mountAbove, mountTable } from "./mount_table.ts";

/**
 * `path` as the mount table shows it: its directory without symbolic links. Undefined when the directory is missing. The last
 * part is not touched, because it may be the root of a file system that does not answer.
 */
export async function canonicalPath(host: Host, path: string): Promise<string | undefined> {
  const trimmed = path.replace(/\/+$/, "");
  const slash = trimmed.lastIndexOf("/");
  const directory = slash <= 0 ? "/" : trimmed.slice(0, slash);
  const parent = await onNodeDisk(host, directory, "look at", () => host.realPath(directory));
  if (parent === undefined) return undefined;
  return `${parent === "/" ? "" : parent}/${trimmed.slice(slash + 1)}`;
}

/**
 * Makes an empty file or directory to mount on. One that is there already must be empty, because the mount would hide its
 * content.
 *
 * @param path free of symbolic links, in an existing directory
 * @throws StatusError FAILED_PRECONDITION when something else is there
 */
export async function makeMountPoint(
  host: Host,
  ctx: RequestContext,
  path: string,
  type: "file" | "directory",
): Promise<void> {
  const kind = await onNodeDisk(host, path, "look at", () => host.kindOf(path));
  if (kind === "absent") {
    const make = () => type === "file" ? host.makeFile(path) : host.makeDirectory(path);
    return await onNodeDisk(host, path, `make the ${type}`, make);
  }
  if (kind !== type) {
    throw ctx.error("FAILED_PRECONDITION", `the target path "${path}" is there already and is not a ${type}`);
  }
  if (type === "directory" && !await isEmptyDirectory(host, path)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the target path "${path}" is not a mount point but holds files of the node's own disk`,
    );
  }
}

/** Removes the empty file or directory that makeMountPoint made; does nothing when it is gone. */
export async function removeMountPoint(host: Host, path: string): Promise<void> {
  await onNodeDisk(host, path, "remove", () => host.removeEmpty(path));
}

/** Whether a directory on the node's own disk is empty or missing. */
export async function isEmptyDirectory(host: Host, path: string): Promise<boolean> {
  return (await onNodeDisk(host, path, "list", () => host.list(path)) ?? []).length === 0;
}

/**
 * Does a step with a path on the node's own disk, where kubelet keeps its directories. Errors of this disk are not bugs of the
 * driver: for a full or broken one it throws UNAVAILABLE with the path and the disk, for a name that is too long
 * INVALID_ARGUMENT.
 */
export async function onNodeDisk<T>(host: Host, path: string, verb: string, step: () => Promise<T>): Promise<T> {
  try {
    return await step();
  } catch (error) {
    const code = systemCode(error);
    if (code === undefined) throw error;
    const known = diskProblems[code];
    if (code === "ENAMETOOLONG") {
      throw new StatusError("INVALID_ARGUMENT", `Cannot ${verb} "${path}": ${known}`, { cause: error });
    }
    throw new StatusError(
      "UNAVAILABLE",
      `Cannot ${verb} "${path}", on this node's own disk (${await diskOf(host, path)}): ${
        known ?? messageOf(error)
      } (${code})`,
      { cause: error },
    );
  }
}

const diskProblems: Readonly<Record<string, string>> = {
  ENOSPC: "no space or no inode is left there",
  EDQUOT: "the quota there is used up",
  EROFS: "it is read-only",
  EACCES: "access is denied to the driver",
  EPERM: "the driver is not permitted to",
  EIO: "the disk answers with an error",
  ELOOP: "too many symbolic links are in it",
  ENAMETOOLONG: "a part of it, or the whole, is too long",
  ENOTDIR: "a part of it is not a directory",
};

/** `tmpfs at "/x"`: the mount that contains a path. */
async function diskOf(host: Host, path: string): Promise<string> {
  const above = mountAbove(await mountTable(host), path);
  return above === undefined ? "unknown" : `${above.fsType} at "${above.path}"`;
}

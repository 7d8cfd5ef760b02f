import type { RequestContext } from "../context.ts";
import { messageOf, StatusError, systemCode } from "../error.ts";
import type { Host } from "./host.ts";
import { mountAbove, mountTable } from "./mount_table.ts";

/**
 * `path` as the mount table writes it: its directory without symbolic links. Undefined when the directory is missing. The
 * last part is not looked at, for it may be the root of a file system that does not answer.
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
 * Makes an empty file or directory to mount on. What is there already must be empty, for the mount would hide it.
 *
 * @param path free of symbolic links, in an existing directory
 * @throws StatusError FAILED_PRECONDITION for something else that is there
 */
export async function makeMountPoint(
  host: Host,
  ctx: RequestContext,
  path: string,
  wanted: "file" | "directory",
): Promise<void> {
  const kind = await onNodeDisk(host, path, "look at", () => host.kindOf(path));
  if (kind === "absent") {
    const make = () => wanted === "file" ? host.makeFile(path) : host.makeDirectory(path);
    return await onNodeDisk(host, path, `make the ${wanted}`, make);
  }
  if (kind !== wanted) {
    throw ctx.error("FAILED_PRECONDITION", `the target path "${path}" is there already and is not a ${wanted}`);
  }
  if (wanted === "directory" && !await isEmptyDirectory(host, path)) {
    throw ctx.error(
      "FAILED_PRECONDITION",
      `the target path "${path}" is not a mount point but holds files of the node's own disk`,
    );
  }
}

/** Removes the empty file or directory that makeMountPoint made; gone already: done. */
export async function removeMountPoint(host: Host, path: string): Promise<void> {
  await onNodeDisk(host, path, "remove", () => host.removeEmpty(path));
}

/** Whether nothing is in a directory on the node's own disk; a missing one is empty. */
export async function isEmptyDirectory(host: Host, path: string): Promise<boolean> {
  return (await onNodeDisk(host, path, "list", () => host.list(path)) ?? []).length === 0;
}

/**
 * Does a step with a path on the node's own disk, that of kubelet. What this disk answers is nobody's bug: a full or broken
 * one is UNAVAILABLE with the path and the disk, a name that is too long INVALID_ARGUMENT.
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

/** `tmpfs at "/x"`: the mount that holds a path, as far as the mount table tells. */
async function diskOf(host: Host, path: string): Promise<string> {
  const above = mountAbove(await mountTable(host), path);
  return above === undefined ? "unknown" : `${above.fsType} at "${above.path}"`;
}

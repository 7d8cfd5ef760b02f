/** Where volumes may be mounted. A call with another path could hide files of the machine behind a volume. */
import type { RequestContext } from "../../context.ts";

// Directories of the file system hierarchy where no orchestrator keeps volumes (hier(7)). /var, /run, /opt, /srv, /mnt,
// /tmp and directories of the machine's owner are allowed.
const systemDirectories = ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "sbin", "sys", "usr"];

/**
 * Throws INVALID_ARGUMENT for a path to mount at that is the root or in a directory of the operating system. Calls that
 * unmount accept any path: they never change anything but the volume's own mounts.
 *
 * @param path free of symbolic links
 * @param allowSystemPaths whether every path is allowed (`--allow-system-paths`)
 */
export function assertMountPath(ctx: RequestContext, field: string, path: string, allowSystemPaths: boolean): void {
  if (allowSystemPaths) return;
  const [, top = ""] = path.split("/");
  if (top !== "" && !systemDirectories.includes(top)) return;
  throw ctx.error(
    "INVALID_ARGUMENT",
    `${field} "${path}" is a directory of the operating system, where no orchestrator keeps volumes; ` +
      `start the node service with --allow-system-paths if yours does`,
  );
}

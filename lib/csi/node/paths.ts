/** Where an orchestrator may have volumes mounted: a call with another path would put a volume over the machine's own files. */
import { StatusError } from "../../error.ts";

// Directories of the file system hierarchy that no orchestrator keeps volumes in (hier(7)). /var, /run, /opt, /srv, /mnt, /tmp
// and directories of the machine's owner are left to them.
const systemDirectories = ["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "root", "sbin", "sys", "usr"];

/**
 * Throws INVALID_ARGUMENT for a path to mount at that is the root or in a directory of the operating system. Calls that unmount take any path: they never touch what is not the volume's.
 *
 * @param path free of symbolic links
 * @param allowSystemPaths whether every path will do (`--allow-system-paths`)
 */
export function assertMountPath(action: string, field: string, path: string, allowSystemPaths: boolean): void {
  if (allowSystemPaths) return;
  const [, top = ""] = path.split("/");
  if (top !== "" && !systemDirectories.includes(top)) return;
  throw new StatusError(
    "INVALID_ARGUMENT",
    `Cannot ${action}: ${field} "${path}" is a directory of the operating system, where no orchestrator keeps volumes; ` +
      `start the node service with --allow-system-paths if yours does`,
  );
}

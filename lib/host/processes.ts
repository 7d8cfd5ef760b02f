/** Processes of this machine that use a device or a path, as `/proc` shows them; for error messages. */
import type { Host } from "./host.ts";
import { parseMountTable } from "./mount_table.ts";
import type { BlockDevice } from "./nvme/devices.ts";

/** How many processes or mounts are listed in one message at most. */
export const mostListed = 5;

/**
 * Processes that have a path open, run from it, or have it as their directory, where `isThere` accepts the path. At most a
 * few, in words: `process 7 (dd) with "/mnt/x"`. Finds only processes of this container unless it shares the machine's.
 */
export async function processesAt(host: Host, isThere: (place: string) => boolean): Promise<readonly string[]> {
  const found: string[] = [];
  const proc = host.roots.proc;
  for (const pid of await host.list(proc) ?? []) {
    if (found.length >= mostListed) break;
    if (!/^\d+$/.test(pid)) continue;
    const links = [`${proc}/${pid}/cwd`, `${proc}/${pid}/root`, `${proc}/${pid}/exe`];
    for (const fd of await valueOrUndefined(host.list(`${proc}/${pid}/fd`)) ?? []) {
      links.push(`${proc}/${pid}/fd/${fd}`);
    }
    for (const link of links) {
      const place = await valueOrUndefined(host.readLink(link));
      if (place === undefined || !isThere(place)) continue;
      const name = (await valueOrUndefined(host.readText(`${proc}/${pid}/comm`)))?.trim() ?? "unknown";
      found.push(`process ${pid} (${name}) with "${place}"`);
      break;
    }
  }
  return found;
}

/**
 * Mounts of a device in the mount namespaces of other processes, which our own mount table does not show. One for each
 * namespace, at most a few, in words: `the mount at "/x" of process 7 (redis)`.
 */
export async function foreignMountsOf(host: Host, device: BlockDevice): Promise<readonly string[]> {
  const proc = host.roots.proc;
  const seen = new Set([await valueOrUndefined(host.readLink(`${proc}/self/ns/mnt`))]);
  const found: string[] = [];
  for (const pid of await host.list(proc) ?? []) {
    if (found.length >= mostListed) break;
    if (!/^\d+$/.test(pid)) continue;
    const namespace = await valueOrUndefined(host.readLink(`${proc}/${pid}/ns/mnt`));
    if (namespace === undefined || seen.has(namespace)) continue;
    const table = parseMountTable(await valueOrUndefined(host.readText(`${proc}/${pid}/mountinfo`)) ?? "");
    // When a process has ended meanwhile, another process of the same namespace is read.
    if (table.length > 0) seen.add(namespace);
    // A file system is recognised by its number, btrfs by its source, a bound device node by its place in devtmpfs.
    const mount = table.find(({ number, fsType, source, root }) =>
      number === device.number || fsType === "btrfs" && source === device.path ||
      fsType === "devtmpfs" && root === `/${device.name}`
    );
    if (mount === undefined) continue;
    const name = (await valueOrUndefined(host.readText(`${proc}/${pid}/comm`)))?.trim() ?? "unknown";
    found.push(`the mount at "${mount.path}" of process ${pid} (${name})`);
  }
  return found;
}

/** The value of `promise`, or undefined when it rejects: processes end while they are read. */
export async function valueOrUndefined<T>(promise: Promise<T>): Promise<T | undefined> {
  try {
    return await promise;
  } catch {
    return undefined;
  }
}

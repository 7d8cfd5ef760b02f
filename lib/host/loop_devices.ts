/**
 * Loop devices on a volume's device node. Kubelet opens one on the target of each raw block volume and keeps it until the
 * pod has ended (Kubernetes, pkg/volume/util/volumepathhandler). Until then the target is busy, although no mount and no
 * process shows what uses it.
 */
import type { Host } from "./host.ts";
import type { Mount } from "./mount_table.ts";

/**
 * Names (`loop5`, sorted) of the loop devices whose backing file is `path`, or the device node that is bound there, under any
 * path by which that node was opened. Empty: none, or sysfs shows no loop devices.
 *
 * Paths are compared as the kernel shows them (sysfs, `block/loop5/loop/backing_file`). A backing file is never touched,
 * because it can be on a file system that does not answer.
 *
 * @param table all mounts of this process's mount namespace
 * @param path free of symbolic links: a target path, or a device node
 */
export async function loopDevicesOn(host: Host, table: readonly Mount[], path: string): Promise<readonly string[]> {
  const places = await placesOf(host, table, path);
  const found: string[] = [];
  for (const name of await host.list(`${host.roots.sysfs}/block`) ?? []) {
    if (!/^loop\d+$/.test(name)) continue;
    const text = await host.readText(`${host.roots.sysfs}/block/${name}/loop/backing_file`);
    // The kernel appends this when the node is gone: the device has gone, and the loop device still holds it.
    const file = text?.replace(/\n$/, "");
    if (file !== undefined && (places.has(file) || places.has(file.replace(/ \(deleted\)$/, "")))) found.push(name);
  }
  return found.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
}

/** `path`, and every other path on this machine that leads to the same device node. */
async function placesOf(host: Host, table: readonly Mount[], path: string): Promise<ReadonlySet<string>> {
  const places = new Set([path]);
  const bound = table.findLast((mount) => mount.path === path);
  if (bound !== undefined) {
    for (const mount of table) if (isSamePlace(mount, bound)) places.add(mount.path);
  }
  // After a deletion, a node of that name is another device.
  const node = bound === undefined || bound.root.endsWith("//deleted")
    ? path
    : `${host.roots.dev}/${nameIn(bound.root)}`;
  const number = await host.blockNumber(node);
  if (number === undefined || number !== await host.blockNumber(path)) return places;
  places.add(node);
  for (const mount of table) {
    if (nameIn(mount.root) === nameIn(node) && await host.blockNumber(mount.path) === number) places.add(mount.path);
  }
  return places;
}

function isSamePlace(a: Mount, b: Mount): boolean {
  return a.number === b.number && a.root === b.root;
}

/** `nvme0n1` of `/nvme0n1`, which mountinfo ends with `//deleted` when the node is gone. */
function nameIn(root: string): string {
  return root.replace(/\/\/deleted$/, "").replace(/^.*\//, "");
}

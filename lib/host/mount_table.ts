/**
 * The mount table: who is mounted where, on which device, and whether that device is still the one it was.
 *
 * A mount outlives its device. Measured on kernel 6.1: after the device of a namespace has gone, mountinfo goes on
 * saying `259:1 … ext4 /dev/nvme0n1 rw`, df and stat work, and writes fail at fsync only. What tells is sysfs:
 * `dev/block/<major:minor>` is gone.
 */
import { StatusError } from "../error.ts";
import type { Host } from "./host.ts";

/** One line of mountinfo (proc(5)), unescaped. */
export interface Mount {
  /** `major:minor` of the file system; of an anonymous one (btrfs, tmpfs) it is no device. */
  readonly number: string;
  /** What of the file system is mounted: `/`, a directory, or a device node of devtmpfs. */
  readonly root: string;
  readonly path: string;
  /**
   * The directory or file under the mount, whatever path leads to it: the file system that shows it and where in that. Two
   * mounts with one place are one mount seen twice, as where a bind mount shows kubelet's directory at a second path.
   */
  readonly place: string;
  /** Options of this mount alone. */
  readonly options: readonly string[];
  /** `shared:5`: what is mounted below it shows in other mount namespaces too; `master:1`: theirs shows here. */
  readonly propagation: readonly string[];
  readonly fsType: string;
  readonly source: string;
  /** Options of the file system, whoever mounts it. */
  readonly superOptions: readonly string[];
}

/** The lines of a mountinfo text, oldest first; lines that cannot be read are left out. */
export function parseMountTable(text: string): readonly Mount[] {
  const lines = text.split("\n").flatMap((line) => {
    const [before, after] = split(line, " - ");
    const [id, parent, number, root, path, options, ...propagation] = before.split(" ");
    const [fsType, source, superOptions] = after.split(" ");
    if (number === undefined || root === undefined || path === undefined || options === undefined) return [];
    if (fsType === undefined || source === undefined) return [];
    const mount = {
      number,
      root: unescapeField(root),
      path: unescapeField(path),
      options: unescapeField(options).split(","),
      propagation,
      fsType,
      source: unescapeField(source),
      superOptions: unescapeField(superOptions ?? "").split(","),
    };
    return [{ id, parent, mount }];
  });
  const byId = new Map(lines.map(({ id, mount }) => [id, mount]));
  return lines.map(({ parent, mount }) => {
    const above = byId.get(parent);
    // The parent of the process' root is not in the table.
    return { ...mount, place: above === undefined ? mount.path : placeBelow(above, mount.path) };
  });
}

/** The place of `path`, which is at or below the path of `mount`: see Mount. */
function placeBelow(mount: Omit<Mount, "place">, path: string): string {
  const rest = path.slice(mount.path === "/" ? 0 : mount.path.length);
  return `${mount.number} ${mount.root === "/" ? "" : mount.root}${rest}`;
}

function split(text: string, separator: string): readonly [string, string] {
  const at = text.indexOf(separator);
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + separator.length)];
}

/** Blank, tab, newline, backslash and hash are written as three octal digits; other bytes as they are. */
function unescapeField(text: string): string {
  if (!text.includes("\\")) return text;
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(parseInt(digits, 8)));
}

/** All mounts of this process' mount namespace, oldest first; throws UNAVAILABLE when there is no such table. */
export async function mountTable(host: Host): Promise<readonly Mount[]> {
  const path = `${host.roots.proc}/self/mountinfo`;
  const text = await host.readText(path);
  if (text === undefined) throw new StatusError("UNAVAILABLE", `Cannot read the mount table: ${path} is missing`);
  return parseMountTable(text);
}

/** The mounts stacked at `path` (free of symbolic links), lowest first. */
export function mountsAt(table: readonly Mount[], path: string): readonly Mount[] {
  return table.filter((mount) => mount.path === path);
}

/**
 * The mounts among `mounts` that are at none of these paths. What a path shows is left out wherever else it is seen too: a
 * mount that propagated to a second view of the same directory is no second use of the volume.
 *
 * @param paths free of symbolic links; undefined: none
 */
export function mountsElsewhere(
  table: readonly Mount[],
  mounts: readonly Mount[],
  ...paths: readonly (string | undefined)[]
): readonly Mount[] {
  const places = new Set(paths.flatMap((path) => path === undefined ? [] : placesAt(table, path)));
  return mounts.filter((mount) => !paths.includes(mount.path) && !places.has(mount.place));
}

/** The places of all that is mounted at `path`, and of the directory or file there when that is nothing. */
function placesAt(table: readonly Mount[], path: string): readonly string[] {
  const places = mountsAt(table, path).map((mount) => mount.place);
  const above = mountAbove(table, path);
  return above === undefined ? places : [...places, placeBelow(above, path)];
}

/** The mount that the directory of `path` is in. */
export function mountAbove(table: readonly Mount[], path: string): Mount | undefined {
  const parent = path.slice(0, path.lastIndexOf("/") + 1);
  const isAbove = (mount: Mount) => parent.startsWith(mount.path === "/" ? "/" : `${mount.path}/`);
  return table.filter(isAbove).reduce<Mount | undefined>(
    // Of two at one path, the later one is on top.
    (best, mount) => best === undefined || mount.path.length >= best.path.length ? mount : best,
    undefined,
  );
}

/** `ext4 of /dev/nvme0n1 (259:1)`. */
export function describeMount(mount: Mount): string {
  return `${mount.fsType} of ${mount.source} (${mount.number}${mount.root === "/" ? "" : `, ${mount.root}`})`;
}

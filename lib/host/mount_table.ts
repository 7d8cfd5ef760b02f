/**
 * The mount table: what is mounted where.
 *
 * A mount outlives its device. Seen on kernel 6.1: after the device of a namespace has gone, mountinfo still shows
 * `259:1 … ext4 /dev/nvme0n1 rw`, df and stat work, and writes fail at fsync only. Only sysfs shows it:
 * `dev/block/<major:minor>` is gone (volume_mounts.ts).
 */
import { StatusError } from "../error.ts";
import type { Host } from "./host.ts";

/** One line of mountinfo (proc(5)), unescaped. */
export interface Mount {
  /** `major:minor` of the file system; for an anonymous one (btrfs, tmpfs) this is not a device. */
  readonly number: string;
  /** Which part of the file system is mounted: `/`, a directory, or a device node of devtmpfs. */
  readonly root: string;
  readonly path: string;
  /**
   * The directory or file under the mount, independent of the path: a file system and a place in it. Two mounts with the same
   * place are one mount that is visible twice, for instance when a bind mount shows kubelet's directory at a second path.
   */
  readonly place: string;
  /** Options of this mount alone. */
  readonly options: readonly string[];
  /** `shared:5`: mounts below it are visible in other mount namespaces too; `master:1`: theirs are visible here. */
  readonly propagation: readonly string[];
  readonly fsType: string;
  readonly source: string;
  /** Options of the file system, which all its mounts share. */
  readonly superOptions: readonly string[];
}

/** Parses the text of mountinfo, oldest mount first; lines that are not understood are left out. */
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

/** The place (see Mount) of `path`, which is at or below the path of `mount`. */
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
 * The mounts among `mounts` that are at none of these paths. A mount at one of the paths that is visible at other paths too is
 * left out there as well: a mount that propagated to a second view of the same directory is not a second use of the volume.
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

/** The places of all mounts at `path`, and of the directory or file there itself. */
function placesAt(table: readonly Mount[], path: string): readonly string[] {
  const places = mountsAt(table, path).map((mount) => mount.place);
  const above = mountAbove(table, path);
  return above === undefined ? places : [...places, placeBelow(above, path)];
}

/** The mount that contains the directory of `path`. */
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

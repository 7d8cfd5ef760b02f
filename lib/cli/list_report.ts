/** The result of `lbcsi list`, as text and as JSON. */
import type { ListedMount, ListedPath, VolumeList } from "./list_volumes.ts";
import { columns, printable } from "./table.ts";

/** The list as JSON, for programs. Sizes are numbers of bytes; unknown values are left out. */
export function listAsJson(listed: VolumeList): string {
  return JSON.stringify(listed, (_key, value) => typeof value === "bigint" ? Number(value) : value, 2);
}

/** The list as text for people; ends without a newline. */
export function listAsText({ volumes, deadMounts, connections }: VolumeList): string {
  const lines: string[] = [];
  if (volumes.length > 0) {
    const rows = [
      ["VOLUME", "DEVICE", "SIZE", "FILE SYSTEM", "SUBSYSTEM"],
      ...volumes.map((volume) => [
        volume.uuid,
        volume.device ?? "none",
        volume.sizeBytes === undefined ? "-" : formatSize(volume.sizeBytes),
        volume.fileSystem ?? "-",
        volume.subsystemNqn ?? "-",
      ]),
    ];
    const [head = "", ...heads] = columns(rows);
    lines.push(head);
    const paths = columns(volumes.flatMap((volume) => volume.paths.map(pathCells)));
    for (const [at, volume] of volumes.entries()) {
      lines.push(heads[at] ?? "");
      for (const line of paths.splice(0, volume.paths.length)) lines.push(`  path   ${line}`);
      for (const holder of volume.holders) lines.push(`  under  ${holder}`);
      for (const mount of volume.mounts) lines.push(`  mount  ${describeMount(mount)}`);
      if (volume.device === undefined) {
        lines.push(`  asked for by ${volume.discoveryFile}, but this machine has no device of it`);
      }
    }
  }
  if (deadMounts.length > 0) {
    lines.push("", "MOUNTS WITHOUT A DEVICE (reads and writes fail; unmount them)");
    for (const mount of deadMounts) lines.push(`  ${describeMount(mount)}  was ${printable(mount.source)}`);
  }
  if (connections.length > 0) {
    lines.push("", "CONNECTIONS WITHOUT A VOLUME");
    for (const line of columns(connections.map((each) => [...pathCells(each), each.subsystemNqn]))) {
      lines.push(`  ${line}`);
    }
  }
  if (lines[0] === "") lines.shift();
  return lines.length === 0 ? "lbcsi has nothing on this machine" : lines.join("\n");
}

function pathCells({ controller, address, state, anaState }: ListedPath): string[] {
  return [controller, address, state, anaState ?? "-"];
}

function describeMount({ path, type, fileSystem, readOnly }: ListedMount): string {
  return `${printable(path)}  ${type === "block" ? "block device" : fileSystem}  ${readOnly ? "ro" : "rw"}`;
}

/** `64 MiB`, `1.5 TiB`. */
function formatSize(bytes: bigint): string {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = Number(bytes);
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at++;
  }
  return `${Number(value.toFixed(1))} ${units[at]}`;
}

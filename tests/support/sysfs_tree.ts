/** Directories in the shape of sysfs, with one namespace UUID and subsystem. */
import { join } from "node:path";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";

export const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
export const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
export const nqn = "nqn.2019-09.com.example:cluster:1";

/** Runs `act` with a machine whose sysfs has these files, as kernel 6.1 shows them. */
export async function withSysfs(
  files: Record<string, string>,
  act: (host: Host, directory: string) => Promise<void>,
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-nvme-" });
  try {
    await Deno.mkdir(join(directory, "sys/class/block"), { recursive: true });
    await Deno.mkdir(join(directory, "dev"));
    for (const [path, text] of Object.entries(files)) await writeSysfs(directory, path, text);
    const log = createLogger("error");
    await act(createLinuxHost({ log, sysfsRoot: join(directory, "sys"), devRoot: join(directory, "dev") }), directory);
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** Writes one attribute below `directory`. */
export async function writeSysfs(directory: string, path: string, text: string): Promise<void> {
  const full = join(directory, "sys", path);
  await Deno.mkdir(join(full, ".."), { recursive: true });
  await Deno.writeTextFile(full, `${text}\n`);
}

/** The attributes of the block device of a namespace. */
export function blockAttributes(
  name: string,
  attributes: Partial<Record<string, string>> = {},
): Record<string, string> {
  const all = {
    wwid: `uuid.${uuid}`,
    uuid,
    dev: "259:1",
    size: "2048",
    hidden: "0",
    ro: "0",
    "device/subsysnqn": nqn,
    ...attributes,
  };
  return Object.fromEntries(
    Object.entries(all).flatMap(([key, text]) => text === undefined ? [] : [[`class/block/${name}/${key}`, text]]),
  );
}

/** The attributes of a controller. */
export const controllerAttributes = (name: string, state: string) => ({
  [`class/nvme/${name}/subsysnqn`]: nqn,
  [`class/nvme/${name}/state`]: state,
  [`class/nvme/${name}/hostnqn`]: "nqn.host",
  [`class/nvme/${name}/transport`]: "tcp",
  [`class/nvme/${name}/address`]: `traddr=192.0.2.${name.slice(4)},trsvcid=4420,src_addr=192.0.2.200`,
});

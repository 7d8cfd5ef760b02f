/** One volume on a loop device of its own, to mount with mount.ts and to inspect from outside. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { type MountOptions, mountVolume } from "../../lib/host/filesystem/mount.ts";
import { type BlockDevice, findDevice } from "../../lib/host/nvme/devices.ts";
import { type LoopMachine, loopMachine, type LoopNamespace, subsystemNqn } from "./loop_machine.ts";
import { callContext } from "./node_calls.ts";

export const mib = 1 << 20;
export const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

/** How the disk is mounted, at the one path that it has. */
export type DiskMountOptions = Omit<MountOptions, "path">;

/** ext4, for writing, without any option. */
export const mountOptions: DiskMountOptions = {
  fsType: undefined,
  defaultFsType: "ext4",
  flags: [],
  readOnly: false,
  shared: false,
  mayFormat: true,
  mkfsOptions: "",
};

export interface Disk {
  readonly machine: LoopMachine;
  readonly namespace: LoopNamespace;
  readonly path: string;
  readonly device: () => Promise<BlockDevice>;
  readonly mount: (options: DiskMountOptions) => Promise<unknown>;
}

/** Runs `act` with a blank volume of this size, and removes it afterwards. Needs root and loop devices. */
export async function withDisk(sizeMib: number, act: (disk: Disk) => Promise<void>): Promise<void> {
  await using machine = await loopMachine();
  const namespace = await machine.addNamespace(uuid, sizeMib * mib);
  const path = join(machine.directory, "staging");
  await Deno.mkdir(path);
  const device = async () => {
    const found = await findDevice(machine.host, uuid, subsystemNqn);
    assert(found);
    return found;
  };
  const mount = async (options: DiskMountOptions) =>
    mountVolume(machine.host, callContext(), await device(), { ...options, path });
  await act({ machine, namespace, path, device, mount });
}

/** Writes bytes to a device or file, and to the disk. */
export async function write(path: string, offsetBytes: number, bytes: Uint8Array): Promise<void> {
  using file = await Deno.open(path, { write: true });
  await file.seek(offsetBytes, Deno.SeekMode.Start);
  for (let at = 0; at < bytes.length;) at += await file.write(bytes.subarray(at));
  await file.sync();
}

/** A copy of the file behind a device, to compare with `assertSame` later. */
export async function copyOf({ machine, namespace }: Disk): Promise<string> {
  const copy = join(machine.directory, "before");
  await machine.tool("sync", namespace.path);
  await machine.tool("cp", "--sparse=always", namespace.file, copy);
  return copy;
}

/** Throws when the file behind a device is not what `copyOf` copied. */
export async function assertSame({ machine, namespace }: Disk, copy: string): Promise<void> {
  await machine.tool("sync", namespace.path);
  // Fails, naming the first byte, when one differs.
  await machine.tool("cmp", copy, namespace.file);
}

/** Fake machines with one namespace. */
import assert from "node:assert/strict";
import { findDevice } from "../../lib/host/nvme/devices.ts";
import { FakeHost, type FakeNamespace } from "./fake_host.ts";
import { nqn, uuid } from "./sysfs_tree.ts";

/** Gives the name of the first device to another namespace, as a reconnect can do. */
export function giveNameTo(host: FakeHost, namespace: FakeNamespace, number?: string): void {
  const [device] = host.devices;
  assert(device);
  host.devices.splice(0, 1, { name: device.name, number: number ?? device.number, namespace });
}

/** A machine with one namespace that has an ext4. */
export async function fakeDisk() {
  const host = new FakeHost();
  const namespace = host.addNamespace(uuid, nqn);
  namespace.content = { fsType: "ext4", fsBytes: namespace.sizeBytes };
  host.connect(nqn);
  const device = await findDevice(host, uuid);
  assert(device);
  return { host, device, namespace };
}

/** A machine that is connected to one namespace. */
export function connectedHost(): FakeHost {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  host.connect(nqn);
  return host;
}

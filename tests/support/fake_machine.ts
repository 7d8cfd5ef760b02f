/** A fake machine on which volumes are attached, listed and detached. */
import { type AttachRequest, attachVolume, type LocalMachine, type MountRequest } from "../../lib/cli/attach_volume.ts";
import { detachVolume } from "../../lib/cli/detach_volume.ts";
import { listVolumes } from "../../lib/cli/list_volumes.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../lib/host/attach/direct.ts";
import { createDiscoveryClientAttacher } from "../../lib/host/attach/discovery_client.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { hostNqn, parseAddress, type TransportAddress } from "../../lib/namespace.ts";
import { FakeHost } from "./fake_host.ts";
import { callContext } from "./node_calls.ts";

/** The volume. */
export const namespaceUuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
/** Another volume. */
export const otherUuid = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
/** The subsystem of both. */
export const subsystemNqn = "nqn.2019-09.com.example:cluster:1";
/** The host NQN of the machine. */
export const ownHostNqn = hostNqn("n1.node");
/** A directory of the machine. */
export const mountPath = "/staging";
/** Mounts the volume there, and formats it when it is blank. */
export const mountRequest: MountRequest = { path: mountPath, fsType: undefined, readOnly: false, format: true };

function addresses(...list: readonly string[]): readonly TransportAddress[] {
  return list.map(parseAddress).filter((address) => address !== undefined);
}

/** The place of the volume, for which no cluster is asked. */
export const knownPlace: AttachRequest = {
  namespace: {
    uuid: namespaceUuid,
    subsystemNqn,
    addresses: addresses("192.0.2.1:4420", "192.0.2.2:4420"),
    discovery: addresses("192.0.2.1:8009"),
  },
};

/** A machine to which the volume can be attached. */
export function createFakeMachine(kind: "direct" | "discovery-client" = "direct") {
  const host = new FakeHost();
  const namespace = host.addNamespace(namespaceUuid, subsystemNqn);
  const attacher = kind === "direct"
    ? createDirectAttacher({ host, hostNqn: ownHostNqn, hostId: hostIdOf("n1.node"), locks: new KeyedLock() })
    : createDiscoveryClientAttacher({ host, hostNqn: ownHostNqn, directory: host.discoveryDirectory });
  const machine: LocalMachine = {
    host,
    attacher,
    hostNqn: ownHostNqn,
    discoveryDirectory: kind === "direct" ? host.discoveryDirectory : undefined,
  };
  return {
    host,
    namespace,
    machine,
    attach: (request: AttachRequest = knownPlace, mount?: MountRequest) =>
      attachVolume(callContext(), machine, request, mount),
    detach: (request: AttachRequest = knownPlace, mountPath?: string) =>
      detachVolume(callContext(), machine, request, mountPath),
    list: (options: { uuid?: string; all?: boolean } = {}) =>
      listVolumes(callContext(), {
        host,
        uuid: options.uuid,
        all: options.all ?? false,
        discoveryDirectory: host.discoveryDirectory,
      }),
  };
}

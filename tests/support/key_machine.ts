/** A fake machine for connections with keys (in-band authentication). */
import { type AuthKind, DhchapKey, type DhchapKeys } from "../../lib/auth_key.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import { createDirectAttacher } from "../../lib/host/attach/direct.ts";
import { KeyedLock } from "../../lib/lock.ts";
import { createLogger } from "../../lib/log.ts";
import { hostNqn, type RemoteNamespace } from "../../lib/namespace.ts";
import { FakeHost } from "./fake_host.ts";
import { subsystemNqn as nqn } from "./loop_machine.ts";
import { callContext } from "./node_calls.ts";

export const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";
export const other = "1b7e2c44-8f0a-4f3e-9d55-6c1a2b3c4d5e";
export const nodeId = "n1.node";
export const nodeNqn = hostNqn(nodeId);

/** Where the namespace is. */
export const place: RemoteNamespace = {
  uuid,
  subsystemNqn: nqn,
  addresses: [{ traddr: "192.0.2.1", trsvcid: "4420" }, { traddr: "192.0.2.2", trsvcid: "4420" }],
  discovery: [{ traddr: "192.0.2.1", trsvcid: "8009" }],
};

/** New keys of this kind. */
export function newKeys(kind: AuthKind = "unidirectional"): DhchapKeys {
  return { host: DhchapKey.generate(), controller: kind === "bidirectional" ? DhchapKey.generate() : undefined };
}

/** The keys in clear text, to compare them. */
export const revealKeys = ({ host, controller }: DhchapKeys) => ({
  host: host.reveal(),
  controller: controller?.reveal(),
});

/** A machine whose subsystem demands these keys, and a way to connect to it. */
export function keyMachine(
  keys: DhchapKeys | undefined,
  options: Partial<Parameters<typeof createDirectAttacher>[0]> = {},
) {
  const host = new FakeHost();
  host.addNamespace(uuid, nqn);
  const demand = (demanded: DhchapKeys) => host.demands.set(nqn, revealKeys(demanded));
  if (keys !== undefined) demand(keys);
  const process = () =>
    createDirectAttacher({ host, hostNqn: nodeNqn, hostId: hostIdOf(nodeId), locks: new KeyedLock(), ...options });
  const lines: string[] = [];
  const log = createLogger("debug", "json", (line) => lines.push(line));
  return {
    host,
    demand,
    process,
    attacher: process(),
    lines,
    call: () => callContext(undefined, log),
    /** Where it is connected, and with which keys. */
    connected: () => host.controllers.map(({ traddr, keys }) => [traddr, keys]),
  };
}

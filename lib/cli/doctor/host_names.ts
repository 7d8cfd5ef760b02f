import type { Finding } from "../../check.ts";
import { hostIdOf } from "../../host/attach/attacher.ts";
import { allControllers } from "../../host/nvme/controllers.ts";
import { hostNqn } from "../../namespace.ts";
import type { MachineCheckOptions } from "./machine.ts";

// -------------------------------------------------------------------------------------------------------------- names

export async function checkHostNames({ host, nodeId, attach }: MachineCheckOptions): Promise<Finding> {
  if (nodeId === undefined) return { verdict: "not checked", found: "--node-id is not given" };
  const ours = { hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId) };
  const connected = (await allControllers(host)).filter(({ hostId }) => hostId !== "");
  const otherNqn = connected.find((other) =>
    other.hostId.toLowerCase() === ours.hostId && other.hostNqn !== ours.hostNqn
  );
  // Linux 6.12 takes host NQN and host ID in pairs, and answers a second partner of either with EINVAL, which nvme-cli
  // calls "invalid arguments/configuration"; 6.1 connects (both seen).
  if (otherNqn !== undefined) {
    return {
      verdict: "problem",
      found: `${otherNqn.name} is connected with our host ID ${ours.hostId} under host NQN ${otherNqn.hostNqn}`,
      advice: "disconnect it, and give that program a host ID of its own: no two host NQNs may have one ID",
    };
  }
  const used = [...new Set(connected.filter((other) => other.hostNqn === ours.hostNqn).map(({ hostId }) => hostId))];
  const otherIds = used.filter((hostId) => hostId.toLowerCase() !== ours.hostId);
  const names = `${ours.hostNqn}, ${otherIds[0] ?? ours.hostId}`;
  if (used.length > 1) {
    return {
      verdict: "problem",
      found: `this machine is connected as ${ours.hostNqn} with ${used.length} host IDs: ${used.join(", ")}`,
      advice: "let only one program connect as this node",
    };
  }
  // A daemon connects with the ID that it was given, and lbcsi's own goes on with the one that is in use.
  if (otherIds.length === 0 || attach === "discovery-client") return { verdict: "ok", found: names };
  return {
    verdict: "problem",
    found: `this machine is connected as ${ours.hostNqn} with host ID ${
      otherIds[0]
    }, and --attach=direct takes ${ours.hostId}`,
    advice: "disconnect these volumes once (drain the node), or go on with --attach=discovery-client",
  };
}

/** What every other program connects as that names no host itself. */
export async function checkConfiguredNames(
  { host, nodeId, nvmeDirectory = "/etc/nvme" }: MachineCheckOptions,
): Promise<Finding> {
  const [nqn, id] = await Promise.all(
    ["hostnqn", "hostid"].map(async (name) => (await host.readText(`${nvmeDirectory}/${name}`))?.trim()),
  );
  if (nqn === undefined && id === undefined) {
    return { verdict: "ok", found: `none: ${nvmeDirectory}/hostnqn and hostid are not there` };
  }
  const found = `hostnqn ${nqn ?? "missing"}, hostid ${id ?? "missing"}`;
  if (nodeId === undefined) return { verdict: "not checked", found: `${found}; --node-id is not given` };
  const sameNqn = nqn === hostNqn(nodeId);
  const sameId = id?.toLowerCase() === hostIdOf(nodeId);
  if (sameNqn === sameId) return { verdict: "ok", found };
  return {
    verdict: "problem",
    found: `${found}: ${sameNqn ? "the NQN is this node's, the ID is not" : "the ID is this node's, the NQN is not"}`,
    advice: `the kernel takes them in pairs: give other programs names of their own (nvme gen-hostnqn, uuidgen)`,
  };
}

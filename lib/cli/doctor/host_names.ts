/** What `lbcsi doctor` checks of host NQNs and host IDs. */
import type { Finding } from "../../check.ts";
import { hostIdOf } from "../../host/attach/attacher.ts";
import { allControllers } from "../../host/nvme/controllers.ts";
import { hostNqn } from "../../namespace.ts";
import type { MachineCheckOptions } from "./machine.ts";

/** Checks that no connection of this machine uses our host NQN or host ID together with another one. */
export async function checkHostNames({ host, nodeId, attach }: MachineCheckOptions): Promise<Finding> {
  if (nodeId === undefined) return { verdict: "not checked", found: "--node-id is not given" };
  const own = { hostNqn: hostNqn(nodeId), hostId: hostIdOf(nodeId) };
  const connected = (await allControllers(host)).filter(({ hostId }) => hostId !== "");
  const otherNqn = connected.find((other) =>
    other.hostId.toLowerCase() === own.hostId && other.hostNqn !== own.hostNqn
  );
  // Linux 6.12 requires host NQN and host ID to be used in pairs. It fails with EINVAL for a second partner of either, which
  // nvme-cli reports as "invalid arguments/configuration". Linux 6.1 connects (both observed).
  if (otherNqn !== undefined) {
    return {
      verdict: "problem",
      found: `${otherNqn.name} is connected with our host ID ${own.hostId} under host NQN ${otherNqn.hostNqn}`,
      advice: "disconnect it, and give that program a host ID of its own: no two host NQNs may have one ID",
    };
  }
  const used = [...new Set(connected.filter((other) => other.hostNqn === own.hostNqn).map(({ hostId }) => hostId))];
  const otherIds = used.filter((hostId) => hostId.toLowerCase() !== own.hostId);
  const names = `${own.hostNqn}, ${otherIds[0] ?? own.hostId}`;
  if (used.length > 1) {
    return {
      verdict: "problem",
      found: `this machine is connected as ${own.hostNqn} with ${used.length} host IDs: ${used.join(", ")}`,
      advice: "let only one program connect as this node",
    };
  }
  // A Discovery-Client connects with the ID that it was given, and that of lbcsi continues with the one that is in use.
  if (otherIds.length === 0 || attach === "discovery-client") return { verdict: "ok", found: names };
  return {
    verdict: "problem",
    found: `this machine is connected as ${own.hostNqn} with host ID ${
      otherIds[0]
    }, and --attach=direct takes ${own.hostId}`,
    advice: "disconnect these volumes once (drain the node), or stay with --attach=discovery-client",
  };
}

/** Checks the names in /etc/nvme, which other programs connect with unless they name a host themselves. */
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
    advice: `the kernel requires them in pairs: give other programs names of their own (nvme gen-hostnqn, uuidgen)`,
  };
}

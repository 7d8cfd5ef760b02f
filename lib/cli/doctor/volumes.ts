/** What `lbcsi doctor` checks of the volumes, connections and mounts that are on this machine now. */
import { type Finding, formatCount, formatList } from "../../check.ts";
import type { Host } from "../../host/host.ts";
import { mountTable } from "../../host/mount_table.ts";
import { relationOf, volumesInUse } from "../../host/volume_mounts.ts";
import { isLivePath, pathsOf } from "../../host/nvme/paths.ts";
import { addressOf, allControllers, type NvmeController } from "../../host/nvme/controllers.ts";
import { attachedVolumes, hasNamespaces } from "../../host/nvme/devices.ts";
import { findMapper } from "../../host/mapper.ts";
import { formatAddress, isNodeHostNqn } from "../../namespace.ts";
import { isOfDeviceTree } from "../device_tree.ts";
import type { MachineCheckOptions } from "./machine.ts";

/** Checks that the node can take a further volume. */
export async function checkVolumeCount({ host, maxVolumes, isOurs }: MachineCheckOptions): Promise<Finding> {
  const [attached, used] = (await Promise.all([attachedVolumes(host), volumesInUse(host)])).map((devices) =>
    devices.filter(({ subsystemNqn }) => isOurs(subsystemNqn)).length
  );
  const here = `${attached} attached, ${used} in use`;
  if (maxVolumes === 0) return { verdict: "ok", found: `${here}; the orchestrator decides how many are allowed` };
  const found = `${here}, ${maxVolumes} allowed (--max-volumes)`;
  if ((used ?? 0) < maxVolumes) return { verdict: "ok", found };
  return { verdict: "warning", found, advice: "no further volume is taken here" };
}

/** Checks that each volume has a live path, and has lost none. */
export async function checkPaths(host: Host): Promise<Finding> {
  const controllers = await allControllers(host);
  const dead: string[] = [];
  const degraded: string[] = [];
  const devices = await attachedVolumes(host);
  for (const device of devices) {
    const devicePaths = await pathsOf(host, device, controllers);
    const lost = devicePaths.filter(({ controller }) => controller.state !== "live");
    const shown = devicePaths.map(({ controller, anaState }) =>
      `${controller.name} ${controller.state} ${anaState ?? ""}`.trim()
    );
    if (!devicePaths.some(isLivePath)) dead.push(`${device.name} (${device.uuid}): ${shown.join(", ") || "no path"}`);
    else if (lost.length > 0) degraded.push(`${device.name} (${device.uuid}): ${shown.join(", ")}`);
  }
  if (dead.length > 0) {
    return {
      verdict: "problem",
      found: `no live path to ${formatList(dead, "; ")}`,
      advice:
        "reads and writes wait; check that this machine can connect to the cluster and is on the volume's access list",
    };
  }
  if (degraded.length > 0) {
    return {
      verdict: "warning",
      found: `paths lost: ${formatList(degraded, "; ")}`,
      advice: "check the network and the cluster",
    };
  }
  return { verdict: "ok", found: devices.length === 0 ? "no volume is attached" : "all live" };
}

/** Checks that each connection shows this machine a volume. */
export async function checkConnections(host: Host): Promise<Finding> {
  const ours = (await allControllers(host)).filter(({ transport, hostNqn }) =>
    transport === "tcp" && isNodeHostNqn(hostNqn)
  );
  const idle: NvmeController[] = [];
  for (const controller of ours) {
    if (!controller.isDiscovery && !await hasNamespaces(host, controller.subsystemNqn)) idle.push(controller);
  }
  if (idle.length === 0) return { verdict: "ok", found: `${ours.length}, none without a volume` };
  const shown = idle.map((controller) => {
    const address = addressOf(controller);
    return `${controller.name} to ${controller.subsystemNqn} at ${
      address === undefined ? controller.address : formatAddress(address)
    }, ${controller.state}`;
  });
  return {
    verdict: "warning",
    found: `without a volume: ${formatList(shown, "; ")}`,
    advice:
      "lbcsi node --attach=direct and lbcsi discovery-client remove it by themselves; otherwise use nvme disconnect",
  };
}

/** Checks that no mount has lost its device. */
export async function checkMounts(host: Host): Promise<Finding> {
  const dead: string[] = [];
  const table = await mountTable(host);
  for (const mount of table) {
    const isOurs = isOfDeviceTree(host, table, mount) || mount.source.startsWith("/dev/");
    if (isOurs && await relationOf(host, mount, undefined) === "dead") {
      dead.push(`"${mount.path}" (was ${mount.source})`);
    }
  }
  if (dead.length === 0) return { verdict: "ok", found: "none has lost its device" };
  return {
    verdict: "problem",
    found: `the device has gone under ${formatList(dead)}`,
    advice: "delete the pods there; mounts that remain can be unmounted",
  };
}

/** Checks that no open encrypted volume has lost its device. */
export async function checkOpenMappers(host: Host): Promise<Finding> {
  const base = `${host.roots.sysfs}/class/block`;
  let open = 0;
  const stale: string[] = [];
  for (const name of await host.list(base) ?? []) {
    if (!/^dm-\d+$/.test(name)) continue;
    const mapper = (await host.readText(`${base}/${name}/dm/name`))?.trim() ?? "";
    const uuid = /^lb-csi-nvme-uuid\.([0-9a-f-]{36})$/.exec(mapper)?.[1];
    if (uuid === undefined) continue;
    open++;
    if ((await findMapper(host, uuid))?.encrypts?.beneath === undefined) stale.push(`${name} (${mapper})`);
  }
  if (stale.length === 0) return { verdict: "ok", found: `${formatCount(open, "volume")}` };
  return {
    verdict: "problem",
    found: `the device has gone under ${formatList(stale)}`,
    advice: "delete the pods that use it; cryptsetup close closes what remains",
  };
}

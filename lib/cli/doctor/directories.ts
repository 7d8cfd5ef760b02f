/** What `lbcsi doctor` checks of the directories that the driver shares with other programs. */
import { type Finding, formatCount } from "../../check.ts";
import { type Host, kindBehind } from "../../host/host.ts";
import { describeMount, type Mount, mountTable } from "../../host/mount_table.ts";
import { allControllers } from "../../host/nvme/controllers.ts";
import type { MachineCheckOptions } from "./machine.ts";

/** Checks that what the driver mounts in kubelet's directory is visible to kubelet. */
export async function checkKubeletDirectory({ host, kubeletDirectory }: MachineCheckOptions): Promise<Finding> {
  if (await host.kindOf(kubeletDirectory) === "absent") {
    return { verdict: "not checked", found: `${kubeletDirectory} is not there: no kubelet, or another --kubelet-dir` };
  }
  const table = await mountTable(host);
  const problems: string[] = [];
  const seen: string[] = [];
  // Staging paths and targets of block volumes; targets of file system volumes.
  for (const name of ["plugins/kubernetes.io/csi", "pods"]) {
    const path = `${kubeletDirectory}/${name}`;
    const mount = mountOf(table, await nearestRealPath(host, path));
    if (mount === undefined) problems.push(`${path} is on no mount that can be seen`);
    else if (!mount.propagation.some((field) => field.startsWith("shared:"))) {
      problems.push(`what is mounted in ${path} stays here: ${describeMount(mount)} at "${mount.path}" is not shared`);
    } else if (mount.options.includes("ro") || mount.superOptions.includes("ro")) {
      problems.push(`${path} is read-only: ${describeMount(mount)} at "${mount.path}"`);
    } else seen.push(`${name} on ${describeMount(mount)}`);
  }
  if (problems.length === 0) return { verdict: "ok", found: `${kubeletDirectory}: ${seen.join(", ")}, shared` };
  return {
    verdict: "problem",
    found: problems.join("; "),
    advice:
      "set mountPropagation: Bidirectional in the node pod, and make the mounts of the host shared (mount --make-rshared)",
  };
}

/** The real path of `path` or of its nearest parent that exists: kubelet creates the rest. */
async function nearestRealPath(host: Host, path: string): Promise<string> {
  for (let at = path; at !== ""; at = at.slice(0, at.lastIndexOf("/"))) {
    const real = await host.realPath(at);
    if (real !== undefined) return real;
  }
  return "/";
}

/** The mount that a path is on. */
function mountOf(table: readonly Mount[], path: string): Mount | undefined {
  const mounts = table.filter((mount) =>
    mount.path === "/" || path === mount.path || path.startsWith(`${mount.path}/`)
  );
  const longest = Math.max(...mounts.map((mount) => mount.path.length));
  return mounts.findLast((mount) => mount.path.length === longest);
}

/** Checks that a Discovery-Client watches its directory and is connected. */
export async function checkDiscoveryClient(
  { host, discoveryDirectory: directory }: MachineCheckOptions,
): Promise<Finding> {
  const kind = await kindBehind(host, directory);
  if (kind !== "directory") {
    return {
      verdict: "problem",
      found: `${directory} is ${kind === "absent" ? "missing" : "not a directory"}`,
      advice: "install a Discovery-Client (LightOS', or lbcsi discovery-client), or use --attach=direct",
    };
  }
  const mount = mountOf(await mountTable(host), await nearestRealPath(host, directory));
  if (mount?.options.includes("ro") || mount?.superOptions.includes("ro")) {
    return { verdict: "problem", found: `${directory} is read-only: ${describeMount(mount)} at "${mount.path}"` };
  }
  const files = (await host.list(directory) ?? []).filter((name) =>
    /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(name)
  );
  const controllers = (await allControllers(host)).filter((controller) =>
    controller.isDiscovery && controller.transport === "tcp"
  );
  const live = controllers.filter(({ state }) => state === "live");
  const found = `${directory} asks for ${formatCount(files.length, "volume")}, ` +
    `${live.length} of ${formatCount(controllers.length, "discovery connection")} live`;
  if (files.length > 0 && live.length === 0) {
    return { verdict: "problem", found, advice: "check that the Discovery-Client runs and can connect to the cluster" };
  }
  return { verdict: "ok", found };
}

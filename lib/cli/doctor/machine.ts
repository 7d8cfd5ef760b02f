/**
 * What `lbcsi doctor` looks at on this machine. Everything comes from sysfs, procfs, the mount table and directories, and
 * from tools that are asked for their version: no device is opened, no connection made, nothing written.
 */
import { type Check, reasonOf, runCheck, shortList } from "../../check.ts";
import { type RequestContext, timeLimit } from "../../context.ts";
import { messageOf } from "../../error.ts";
import { hostIdOf } from "../../host/attach/attacher.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import { type Host, kindBehind } from "../../host/host.ts";
import { hasAes } from "../../host/luks.ts";
import { findMapper } from "../../host/mapper.ts";
import { describeMount, type Mount, mountTable } from "../../host/mount_table.ts";
import { authenticationObstacle } from "../../host/nvme/authentication.ts";
import { addressOf, allControllers, type NvmeController } from "../../host/nvme/controllers.ts";
import { attachedVolumes, hasNamespaces } from "../../host/nvme/devices.ts";
import { kernelErrorNumber } from "../../host/nvme/fabrics.ts";
import { isLivePath, pathsOf } from "../../host/nvme/paths.ts";
import { relationOf, volumesInUse } from "../../host/volume_mounts.ts";
import { formatAddress, hostNqn, isNodeHostNqn } from "../../namespace.ts";
import { isOfTree } from "../listed_volumes.ts";

export interface MachineOptions {
  readonly host: Host;
  /** Undefined: not known here, then what depends on it is not checked. */
  readonly nodeId: string | undefined;
  readonly attach: "direct" | "discovery-client";
  readonly discoveryDirectory: string;
  readonly kubeletDirectory: string;
  /** How many volumes the node may have; 0: the orchestrator decides. */
  readonly maxVolumes: number;
  /** Whether a subsystem is of the driver that is meant; a node can have two. */
  readonly isOurs: (subsystemNqn: string) => boolean;
  readonly defaultFsType: FsType;
  /** Where nvme-cli keeps the host's own names. */
  readonly nvmeDirectory?: string;
  /** Where the kernel's modules are. */
  readonly modulesDirectory?: string;
}

export type Finding = Omit<Check, "name">;

/** All checks of the machine, in the order in which they are shown. */
export async function machineChecks(ctx: RequestContext, options: MachineOptions): Promise<readonly Check[]> {
  const { host } = options;
  const checks: readonly (readonly [name: string, look: () => Promise<Finding>])[] = [
    ["rights", () => rights(host)],
    ["NVMe/TCP", () => nvmeTcp(host)],
    ["native multipath", () => multipath(host)],
    ["host NQN and ID", () => hostNames(options)],
    ["names in /etc/nvme", () => namesOfOthers(options)],
    ["nvme-cli", () => nvmeCli(ctx, options)],
    ["mount tools", () => toolsFound(ctx, host, mountTools, "problem")],
    ...(["ext4", "xfs", "btrfs"] as const).flatMap((fsType) => {
      const verdict = fsType === options.defaultFsType ? "problem" : "warning";
      return [
        [`${fsType} tools`, () => toolsFound(ctx, host, fileSystemTools[fsType], verdict)],
        [`${fsType} in the kernel`, () => fileSystem(options, fsType, verdict)],
      ] as const;
    }),
    ["host encryption", () => encryption(ctx, options)],
    ["in-band authentication", () => inBandAuthentication(host)],
    ["kubelet directory", () => kubeletDirectory(options)],
    ...(options.attach === "discovery-client" ? [["Discovery-Client", () => discoveryClient(options)] as const] : []),
    ["volumes", () => volumes(options)],
    ["paths", () => paths(host)],
    ["connections", () => connections(host)],
    ["mounts", () => deadMounts(host)],
    ["open encryption", () => openMappers(host)],
  ];
  return await Promise.all(checks.map(([name, look]) => runCheck(name, look)));
}

// ------------------------------------------------------------------------------------------------------------- kernel

const capabilities = [
  // Mounting, and /dev/nvme-fabrics.
  ["CAP_SYS_ADMIN", 21n, "problem"],
  // Kubelet's directories belong to root and are closed to others.
  ["CAP_DAC_OVERRIDE", 1n, "problem"],
  // The kernel lets nobody else grow a mounted ext4.
  ["CAP_SYS_RESOURCE", 24n, "warning"],
] as const;

/** The capabilities that the driver needs. */
export async function rights(host: Host): Promise<Finding> {
  const status = await host.readText(`${host.roots.proc}/self/status`) ?? "";
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? "0"}`);
  const missing = capabilities.filter(([, bit]) => (effective & (1n << bit)) === 0n);
  if (missing.length === 0) return { verdict: "ok", found: capabilities.map(([name]) => name).join(", ") };
  return {
    verdict: missing.some(([, , verdict]) => verdict === "problem") ? "problem" : "warning",
    found: `${missing.map(([name]) => name).join(", ")} missing`,
    advice: "run it as root; in Kubernetes in a privileged container",
  };
}

/** The kernel's NVMe/TCP, and whether this process may use it. */
export async function nvmeTcp(host: Host): Promise<Finding> {
  const { sysfs, dev } = host.roots;
  const isLoaded = await host.kindOf(`${sysfs}/module/nvme_tcp`) !== "absent";
  const hasDevice = await host.kindOf(`${dev}/nvme-fabrics`) !== "absent";
  const refused = hasDevice ? await openRefusal(host, `${dev}/nvme-fabrics`) : undefined;
  if (refused !== undefined) {
    return {
      verdict: "problem",
      found: `this process may not open ${dev}/nvme-fabrics (${refused})`,
      advice: "run it as root; in a container a privileged one; see what SELinux or AppArmor forbids (kernel log)",
    };
  }
  if (isLoaded && hasDevice) return { verdict: "ok", found: `nvme_tcp is loaded, ${dev}/nvme-fabrics is there` };
  const found = isLoaded
    ? `nvme_tcp is loaded, but ${dev}/nvme-fabrics is missing`
    : `the kernel module nvme_tcp is not loaded${hasDevice ? "" : `, and ${dev}/nvme-fabrics is missing`}`;
  const advice = isLoaded
    ? `in a container: mount the host's /dev there`
    : "modprobe nvme_tcp on the host, and a file in /etc/modules-load.d so that it is loaded at each start";
  return { verdict: "problem", found, advice };
}

/** Why this process may not open a file; undefined: it may, or what goes wrong is something else. */
async function openRefusal(host: Host, path: string): Promise<string | undefined> {
  try {
    await host.readText(path);
  } catch (error) {
    if ([1, 13].includes(kernelErrorNumber(error) ?? 0)) return messageOf(error);
  }
  return undefined;
}

async function multipath(host: Host): Promise<Finding> {
  const parameter = `${host.roots.sysfs}/module/nvme_core/parameters/multipath`;
  const text = (await host.readText(parameter))?.trim();
  if (text === "Y") return { verdict: "ok", found: "on" };
  if (text === undefined && await host.kindOf(`${host.roots.sysfs}/module/nvme_core`) === "absent") {
    return { verdict: "not checked", found: "the kernel module nvme_core is not loaded" };
  }
  return {
    verdict: "problem",
    found: text === undefined ? "this kernel was built without it (CONFIG_NVME_MULTIPATH)" : "off",
    advice: text === undefined
      ? "use a kernel that has it: without, each path of a volume is a device of its own"
      : `nvme_core.multipath=Y on the kernel's command line (it is ${text} now): without, each path of a volume is a ` +
        `device of its own`,
  };
}

// -------------------------------------------------------------------------------------------------------------- names

async function hostNames({ host, nodeId, attach }: MachineOptions): Promise<Finding> {
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
async function namesOfOthers({ host, nodeId, nvmeDirectory = "/etc/nvme" }: MachineOptions): Promise<Finding> {
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

// -------------------------------------------------------------------------------------------------------------- tools

/** A program with the arguments that make it tell its version and do nothing else. */
export type Tool = readonly [program: string, ...args: readonly string[]];

export const mountTools: readonly Tool[] = ["mount", "umount", "blkid", "wipefs", "blockdev"]
  .map((program) => [program, "--version"]);

export const fileSystemTools: Readonly<Record<FsType, readonly Tool[]>> = {
  // resize2fs has no option for it, and tells when it is called without a device.
  ext4: [["mkfs.ext4", "-V"], ["e2fsck", "-V"], ["resize2fs"]],
  xfs: [["mkfs.xfs", "-V"], ["xfs_growfs", "-V"], ["xfs_logprint", "-V"]],
  btrfs: [["mkfs.btrfs", "--version"], ["btrfs", "--version"]],
};

const longestVersionMs = 5000;

/** What a tool prints about itself, or why it cannot be run. */
async function ask(
  ctx: RequestContext,
  host: Host,
  [program, ...args]: Tool,
): Promise<{ readonly text: string } | { readonly problem: string }> {
  using limit = timeLimit(ctx.signal, longestVersionMs);
  try {
    const { stdout, stderr } = await host.run(program, args, { signal: limit.signal, onAbort: "kill", log: ctx.log });
    return { text: stdout + stderr };
  } catch (error) {
    ctx.signal.throwIfAborted();
    return { problem: reasonOf(error) };
  }
}

function versionIn(text: string): string {
  return /(?<![\d.])\d+(?:\.\d+)+/.exec(text)?.[0] ?? "of unknown version";
}

async function toolsFound(
  ctx: RequestContext,
  host: Host,
  tools: readonly Tool[],
  ifMissing: "problem" | "warning",
): Promise<Finding> {
  const answers = await Promise.all(tools.map(async (tool) => ({ program: tool[0], ...await ask(ctx, host, tool) })));
  const missing = answers.flatMap((answer) => "problem" in answer ? [`${answer.program}: ${answer.problem}`] : []);
  if (missing.length > 0) {
    return { verdict: ifMissing, found: missing.join("; "), advice: "use lbcsi's image, or install what is missing" };
  }
  const byVersion = Map.groupBy(answers, (answer) => "text" in answer ? versionIn(answer.text) : "");
  return {
    verdict: "ok",
    found: [...byVersion].map(([version, same]) => `${same.map(({ program }) => program).join(", ")} ${version}`)
      .join("; "),
  };
}

async function nvmeCli(ctx: RequestContext, { host, attach }: MachineOptions): Promise<Finding> {
  const finding = await toolsFound(ctx, host, [["nvme", "version"]], attach === "direct" ? "problem" : "warning");
  if (finding.verdict === "ok" || attach === "direct") return finding;
  return { ...finding, found: `${finding.found}; lbcsi discovery-client and growing volumes need it` };
}

async function fileSystem(
  { host, modulesDirectory = "/lib/modules" }: MachineOptions,
  fsType: FsType,
  ifMissing: "problem" | "warning",
): Promise<Finding> {
  const known = await host.readText(`${host.roots.proc}/filesystems`) ?? "";
  if (new RegExp(`^\\t${fsType}$`, "m").test(known)) return { verdict: "ok", found: "there" };
  const hasModule = await hasKernelModule(host, modulesDirectory, fsType);
  if (hasModule === undefined) {
    return { verdict: "not checked", found: "not loaded; whether the host has its module cannot be seen from here" };
  }
  if (hasModule) return { verdict: "ok", found: "the kernel loads it at the first mount" };
  return { verdict: ifMissing, found: "this kernel has none", advice: "use a kernel with it, or another file system" };
}

/** Whether the kernel that runs has a module; undefined: its list is not here, as in a container. */
async function hasKernelModule(host: Host, directory: string, module: string): Promise<boolean | undefined> {
  const release = (await host.readText(`${host.roots.proc}/sys/kernel/osrelease`))?.trim();
  const lists = await Promise.all(
    ["modules.dep", "modules.builtin"].map((name) => host.readText(`${directory}/${release}/${name}`)),
  );
  if (lists.every((list) => list === undefined)) return undefined;
  return lists.some((list) => new RegExp(`/${module.replaceAll("_", "[_-]")}\\.ko\\b`).test(list ?? ""));
}

// Sector sizes, and telling a device that has gone from one that is in use.
const oldestCryptsetup = [2, 4] as const;

async function encryption(
  ctx: RequestContext,
  { host, modulesDirectory = "/lib/modules" }: MachineOptions,
): Promise<Finding> {
  const answer = await ask(ctx, host, ["cryptsetup", "--version"]);
  if ("problem" in answer) {
    return {
      verdict: "warning",
      found: `cryptsetup: ${answer.problem}`,
      advice: "volumes with host encryption need it",
    };
  }
  const version = versionIn(answer.text);
  const [major = 0, minor = 0] = version.split(".").map(Number);
  if (major < oldestCryptsetup[0] || major === oldestCryptsetup[0] && minor < oldestCryptsetup[1]) {
    return {
      verdict: "warning",
      found: `cryptsetup ${version}`,
      advice: `volumes with host encryption need ${oldestCryptsetup.join(".")} or later`,
    };
  }
  const isLoaded = await host.kindOf(`${host.roots.sysfs}/module/dm_crypt`) !== "absent" ||
    await hasKernelModule(host, modulesDirectory, "dm_crypt");
  if (isLoaded === false) {
    return {
      verdict: "warning",
      found: `cryptsetup ${version}, but this kernel has no dm-crypt`,
      advice: "volumes with host encryption need it",
    };
  }
  const kernel = isLoaded === undefined
    ? "dm-crypt is not loaded, and its module cannot be seen from here"
    : "dm-crypt";
  const found = `cryptsetup ${version}, ${kernel}`;
  if (isLoaded === undefined) return { verdict: "not checked", found };
  if (await hasAes(host) === false) {
    return {
      verdict: "warning",
      found: `${found}, but the processor has no AES instructions`,
      advice: "host encryption is slow here",
    };
  }
  return { verdict: "ok", found };
}

async function inBandAuthentication(host: Host): Promise<Finding> {
  const fabrics = `${host.roots.dev}/nvme-fabrics`;
  if (await host.kindOf(fabrics) === "absent") return { verdict: "not checked", found: `${fabrics} is missing` };
  const refused = await openRefusal(host, fabrics);
  if (refused !== undefined) return { verdict: "not checked", found: `${fabrics} cannot be opened (${refused})` };
  const obstacle = await authenticationObstacle(host, "bidirectional");
  if (obstacle === undefined) return { verdict: "ok", found: "the kernel knows DH-HMAC-CHAP" };
  return {
    verdict: "warning",
    found: obstacle,
    advice:
      "a cluster that demands it lets this node connect to nothing, and volumes with in-band-auth are refused here",
  };
}

// -------------------------------------------------------------------------------------------------------- directories

async function kubeletDirectory({ host, kubeletDirectory }: MachineOptions): Promise<Finding> {
  if (await host.kindOf(kubeletDirectory) === "absent") {
    return { verdict: "not checked", found: `${kubeletDirectory} is not there: no kubelet, or another --kubelet-dir` };
  }
  const table = await mountTable(host);
  const problems: string[] = [];
  const seen: string[] = [];
  // Staging paths and targets of block volumes; targets of file system volumes.
  for (const name of ["plugins/kubernetes.io/csi", "pods"]) {
    const path = `${kubeletDirectory}/${name}`;
    const mount = mountOver(table, await nearest(host, path));
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
    advice: "mountPropagation: Bidirectional in the node pod, shared mounts (mount --make-rshared) on the host",
  };
}

/** `path` without symbolic links, or what there is of it: kubelet makes the rest. */
async function nearest(host: Host, path: string): Promise<string> {
  for (let at = path; at !== ""; at = at.slice(0, at.lastIndexOf("/"))) {
    const real = await host.realPath(at);
    if (real !== undefined) return real;
  }
  return "/";
}

/** The mount that a path is on. */
function mountOver(table: readonly Mount[], path: string): Mount | undefined {
  const above = table.filter((mount) => mount.path === "/" || path === mount.path || path.startsWith(`${mount.path}/`));
  const longest = Math.max(...above.map((mount) => mount.path.length));
  return above.findLast((mount) => mount.path.length === longest);
}

async function discoveryClient({ host, discoveryDirectory: directory }: MachineOptions): Promise<Finding> {
  const kind = await kindBehind(host, directory);
  if (kind !== "directory") {
    return {
      verdict: "problem",
      found: `${directory} is ${kind === "absent" ? "missing" : "not a directory"}`,
      advice: "install a Discovery-Client (LightOS', or lbcsi discovery-client), or use --attach=direct",
    };
  }
  const mount = mountOver(await mountTable(host), await nearest(host, directory));
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
  const found = `${directory} asks for ${count(files.length, "volume")}, ` +
    `${live.length} of ${count(controllers.length, "discovery connection")} live`;
  if (files.length > 0 && live.length === 0) {
    return { verdict: "problem", found, advice: "see that the Discovery-Client runs and reaches the cluster" };
  }
  return { verdict: "ok", found };
}

function count(number: number, what: string): string {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

// --------------------------------------------------------------------------------------------------- what is there now

async function volumes({ host, maxVolumes, isOurs }: MachineOptions): Promise<Finding> {
  const [attached, used] = (await Promise.all([attachedVolumes(host), volumesInUse(host)])).map((devices) =>
    devices.filter(({ subsystemNqn }) => isOurs(subsystemNqn)).length
  );
  const here = `${attached} attached, ${used} in use`;
  if (maxVolumes === 0) return { verdict: "ok", found: `${here}; the orchestrator decides how many may be` };
  const found = `${here}, ${maxVolumes} allowed (--max-volumes)`;
  if ((used ?? 0) < maxVolumes) return { verdict: "ok", found };
  return { verdict: "warning", found, advice: "no further volume is taken here" };
}

/** Volumes that no read or write gets to, and those that have lost some of their ways. */
async function paths(host: Host): Promise<Finding> {
  const controllers = await allControllers(host);
  const dead: string[] = [];
  const poor: string[] = [];
  const devices = await attachedVolumes(host);
  for (const device of devices) {
    const ways = await pathsOf(host, device, controllers);
    const lost = ways.filter(({ controller }) => controller.state !== "live");
    const shown = ways.map(({ controller, anaState }) =>
      `${controller.name} ${controller.state} ${anaState ?? ""}`.trim()
    );
    if (!ways.some(isLivePath)) dead.push(`${device.name} (${device.uuid}): ${shown.join(", ") || "no path"}`);
    else if (lost.length > 0) poor.push(`${device.name} (${device.uuid}): ${shown.join(", ")}`);
  }
  if (dead.length > 0) {
    return {
      verdict: "problem",
      found: `no live path to ${shortList(dead, "; ")}`,
      advice: "reads and writes wait; see that this machine reaches the cluster and is on the volume's access list",
    };
  }
  if (poor.length > 0) {
    return {
      verdict: "warning",
      found: `paths lost: ${shortList(poor, "; ")}`,
      advice: "look at the network and the cluster",
    };
  }
  return { verdict: "ok", found: devices.length === 0 ? "no volume is attached" : "all live" };
}

async function connections(host: Host): Promise<Finding> {
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
    found: `without a volume: ${shortList(shown, "; ")}`,
    advice: "it goes by itself with lbcsi node --attach=direct and lbcsi discovery-client; else nvme disconnect",
  };
}

async function deadMounts(host: Host): Promise<Finding> {
  const dead: string[] = [];
  const table = await mountTable(host);
  for (const mount of table) {
    const isOurs = isOfTree(host, table, mount) || mount.source.startsWith("/dev/");
    if (isOurs && await relationOf(host, mount, undefined) === "dead") {
      dead.push(`"${mount.path}" (was ${mount.source})`);
    }
  }
  if (dead.length === 0) return { verdict: "ok", found: "none has lost its device" };
  return {
    verdict: "problem",
    found: `the device has gone under ${shortList(dead)}`,
    advice: "end the pods there; what is left after them can be unmounted",
  };
}

async function openMappers(host: Host): Promise<Finding> {
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
  if (stale.length === 0) return { verdict: "ok", found: `${count(open, "volume")}` };
  return {
    verdict: "problem",
    found: `the device has gone under ${shortList(stale)}`,
    advice: "end the pods that use it; cryptsetup close takes away what is left",
  };
}

/** What `lbcsi doctor` checks of the kernel: the rights of this process, NVMe/TCP, and file systems. */
import type { Finding } from "../../check.ts";
import { messageOf } from "../../error.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import type { Host } from "../../host/host.ts";
import { authenticationObstacle } from "../../host/nvme/authentication.ts";
import { kernelErrorNumber } from "../../host/nvme/fabrics.ts";
import type { MachineCheckOptions } from "./machine.ts";

/** The capabilities that the driver needs, and how bad it is when one is missing. */
const capabilities = [
  // For mounting, and for /dev/nvme-fabrics.
  ["CAP_SYS_ADMIN", 21n, "problem"],
  // The directories of kubelet belong to root and are closed to others.
  ["CAP_DAC_OVERRIDE", 1n, "problem"],
  // The kernel requires it to grow a mounted ext4.
  ["CAP_SYS_RESOURCE", 24n, "warning"],
] as const;

/** Checks the capabilities of this process. */
export async function checkRights(host: Host): Promise<Finding> {
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

/** Checks that the kernel's NVMe/TCP is loaded, and that this process may use it. */
export async function checkNvmeTcp(host: Host): Promise<Finding> {
  const { sysfs, dev } = host.roots;
  const isLoaded = await host.kindOf(`${sysfs}/module/nvme_tcp`) !== "absent";
  const hasDevice = await host.kindOf(`${dev}/nvme-fabrics`) !== "absent";
  const problem = hasDevice ? await openProblem(host, `${dev}/nvme-fabrics`) : undefined;
  if (problem !== undefined) {
    return {
      verdict: "problem",
      found: `this process may not open ${dev}/nvme-fabrics (${problem})`,
      advice:
        "run it as root, in Kubernetes in a privileged container; the kernel log shows what SELinux or AppArmor forbids",
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

/** Why this process may not open a file. Undefined: it may, or the failure has another reason. */
async function openProblem(host: Host, path: string): Promise<string | undefined> {
  try {
    await host.readText(path);
  } catch (error) {
    if ([1, 13].includes(kernelErrorNumber(error) ?? 0)) return messageOf(error);
  }
  return undefined;
}

/** Checks that the paths of a volume form one device. */
export async function checkMultipath(host: Host): Promise<Finding> {
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
      ? "use a kernel that has it: without it, each path of a volume is a device of its own"
      : `set nvme_core.multipath=Y on the kernel's command line (it is ${text} now): without it, each path of a volume is a ` +
        `device of its own`,
  };
}

/** Checks that the kernel knows a file system, or can load it. */
export async function checkFileSystemSupport(
  { host, modulesDirectory = "/lib/modules" }: MachineCheckOptions,
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

/** Whether the running kernel has a module. Undefined: the list of modules is not visible, as in a container. */
export async function hasKernelModule(host: Host, directory: string, module: string): Promise<boolean | undefined> {
  const release = (await host.readText(`${host.roots.proc}/sys/kernel/osrelease`))?.trim();
  const lists = await Promise.all(
    ["modules.dep", "modules.builtin"].map((name) => host.readText(`${directory}/${release}/${name}`)),
  );
  if (lists.every((list) => list === undefined)) return undefined;
  return lists.some((list) => new RegExp(`/${module.replaceAll("_", "[_-]")}\\.ko\\b`).test(list ?? ""));
}

/** Checks that the kernel can authenticate connections with DH-HMAC-CHAP. */
export async function checkInBandAuthentication(host: Host): Promise<Finding> {
  const fabrics = `${host.roots.dev}/nvme-fabrics`;
  if (await host.kindOf(fabrics) === "absent") return { verdict: "not checked", found: `${fabrics} is missing` };
  const problem = await openProblem(host, fabrics);
  if (problem !== undefined) return { verdict: "not checked", found: `${fabrics} cannot be opened (${problem})` };
  const obstacle = await authenticationObstacle(host, "bidirectional");
  if (obstacle === undefined) return { verdict: "ok", found: "the kernel knows DH-HMAC-CHAP" };
  return {
    verdict: "warning",
    found: obstacle,
    advice: "this node cannot connect to a cluster that demands it, and rejects volumes with in-band-auth",
  };
}

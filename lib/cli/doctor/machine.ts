/**
 * The checks of this machine. They read sysfs, procfs, the mount table and directories, and run tools that print their
 * version: no device is opened, no connection is made, and nothing is written.
 */
import { type Check, type Finding, runCheck } from "../../check.ts";
import type { RequestContext } from "../../context.ts";
import type { FsType } from "../../host/filesystem/fs_type.ts";
import type { Host } from "../../host/host.ts";
import { checkDiscoveryClient, checkKubeletDirectory } from "./directories.ts";
import { checkConfiguredNames, checkHostNames } from "./host_names.ts";
import {
  checkFileSystemSupport,
  checkInBandAuthentication,
  checkMultipath,
  checkNvmeTcp,
  checkRights,
} from "./kernel.ts";
import { checkHostEncryption, checkNvmeCli, checkTools, fileSystemTools, mountTools } from "./tools.ts";
import { checkConnections, checkMounts, checkOpenMappers, checkPaths, checkVolumeCount } from "./volumes.ts";

/** What the checks of the machine depend on. */
export interface MachineCheckOptions {
  readonly host: Host;
  /** Undefined: not known, and what depends on it is not checked. */
  readonly nodeId: string | undefined;
  readonly attach: "direct" | "discovery-client";
  readonly discoveryDirectory: string;
  readonly kubeletDirectory: string;
  /** How many volumes the node may have; 0: the orchestrator decides. */
  readonly maxVolumes: number;
  /** Whether a subsystem belongs to the driver that is checked: a node can have two. */
  readonly isOurs: (subsystemNqn: string) => boolean;
  readonly defaultFsType: FsType;
  /** Where nvme-cli keeps the host's own names. */
  readonly nvmeDirectory?: string;
  /** Where the kernel's modules are. */
  readonly modulesDirectory?: string;
}

/** Runs all checks of the machine. The result is in the order in which they are shown. */
export async function runMachineChecks(ctx: RequestContext, options: MachineCheckOptions): Promise<readonly Check[]> {
  const { host } = options;
  const checks: readonly (readonly [name: string, check: () => Promise<Finding>])[] = [
    ["rights", () => checkRights(host)],
    ["NVMe/TCP", () => checkNvmeTcp(host)],
    ["native multipath", () => checkMultipath(host)],
    ["host NQN and ID", () => checkHostNames(options)],
    ["names in /etc/nvme", () => checkConfiguredNames(options)],
    ["nvme-cli", () => checkNvmeCli(ctx, options)],
    ["mount tools", () => checkTools(ctx, host, mountTools, "problem")],
    ...(["ext4", "xfs", "btrfs"] as const).flatMap((fsType) => {
      const verdict = fsType === options.defaultFsType ? "problem" : "warning";
      return [
        [`${fsType} tools`, () => checkTools(ctx, host, fileSystemTools[fsType], verdict)],
        [`${fsType} in the kernel`, () => checkFileSystemSupport(options, fsType, verdict)],
      ] as const;
    }),
    ["host encryption", () => checkHostEncryption(ctx, options)],
    ["in-band authentication", () => checkInBandAuthentication(host)],
    ["kubelet directory", () => checkKubeletDirectory(options)],
    ...(options.attach === "discovery-client"
      ? [["Discovery-Client", () => checkDiscoveryClient(options)] as const]
      : []),
    ["volumes", () => checkVolumeCount(options)],
    ["paths", () => checkPaths(host)],
    ["connections", () => checkConnections(host)],
    ["mounts", () => checkMounts(host)],
    ["open encryption", () => checkOpenMappers(host)],
  ];
  return await Promise.all(checks.map(([name, check]) => runCheck(name, check)));
}

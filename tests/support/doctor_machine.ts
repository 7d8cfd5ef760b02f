/** A machine in a directory of its own, with real programs, for the checks of `lbcsi doctor`. */
import { dirname, join } from "node:path";
import { type MachineCheckOptions, runMachineChecks } from "../../lib/cli/doctor/machine.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { createLogger } from "../../lib/log.ts";
import { isSubsystemOf } from "../../lib/cli/backends.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { callContext } from "./node_calls.ts";

export const nodeId = "n1.node";
export const ownHostNqn = hostNqn(nodeId);
export const ownHostId = hostIdOf(nodeId);
export const subsystemNqn = "nqn.2016-01.com.lightbitslabs:uuid:6b22dbad-e9d4-4a30-a841-745a4968f4ac";
export const namespaceUuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

/** What the tools of Debian 12 print of themselves; nvme of Debian 13 knows in-band authentication. */
const toolOutputs: Readonly<Record<string, string>> = {
  "mount": "mount from util-linux 2.38.1 (libmount 2.38.1: selinux, smack, btrfs, verity, namespaces, assert, debug)",
  "umount": "umount from util-linux 2.38.1 (libmount 2.38.1: selinux, smack, btrfs, verity, namespaces, assert, debug)",
  "blkid": "blkid from util-linux 2.38.1  (libblkid 2.38.1, 04-Aug-2022)",
  "wipefs": "wipefs from util-linux 2.38.1",
  "blockdev": "blockdev from util-linux 2.38.1",
  "mkfs.ext4": "mke2fs 1.47.0 (5-Feb-2023)",
  "e2fsck": "e2fsck 1.47.0 (5-Feb-2023)",
  "resize2fs": "resize2fs 1.47.0 (5-Feb-2023)",
  "mkfs.xfs": "mkfs.xfs version 6.1.0",
  "xfs_growfs": "xfs_growfs version 6.1.0",
  "xfs_logprint": "xfs_logprint version 6.1.0",
  "mkfs.btrfs": "mkfs.btrfs, part of btrfs-progs v6.2",
  "btrfs": "btrfs-progs v6.2",
  "cryptsetup": "cryptsetup 2.6.1 flags: UDEV BLKID KEYRING KERNEL_CAPI",
  "nvme": "nvme version 2.3 (git 2.3)",
};

// As Linux 6.1 and 6.12 list them, whether they were built to authenticate or not.
export const fabricsOptions =
  "instance=-1,cntlid=-1,transport=%s,traddr=%s,trsvcid=%s,nqn=%s,dhchap_secret=%s,dhchap_ctrl_secret=%s\n";
// The addresses are zeros for processes that may not see them.
export const symbols = "0000000000000000 T nvmf_connect_admin_queue\t[nvme_fabrics]\n" +
  "0000000000000000 T nvme_auth_negotiate\t[nvme_core]\n";

/** Files of a machine on which everything is well, below its roots. */
export const wellFiles: Readonly<Record<string, string>> = {
  "proc/self/status": "Name:\tlbcsi\nCapEff:\t000001ffffffffff\n",
  "proc/self/mountinfo": "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n",
  "proc/filesystems": "nodev\tsysfs\n\text4\n\txfs\n\tbtrfs\n",
  "proc/cpuinfo": "flags\t\t: fpu sse2 aes\n",
  "proc/sys/kernel/osrelease": "6.12.9-amd64\n",
  "sys/module/nvme_tcp/refcnt": "1\n",
  "sys/module/dm_crypt/refcnt": "0\n",
  "sys/module/nvme_core/parameters/multipath": "Y\n",
  "proc/kallsyms": symbols,
  "dev/nvme-fabrics": fabricsOptions,
  "kubelet/pods/keep": "",
  "kubelet/plugins/kubernetes.io/csi/keep": "",
  "discovery.d/README": "",
};

export interface MachineChange {
  /**
   * Further files, or other texts of files, in which ROOT is the machine's directory; undefined: the file and its directory
   * are not there.
   */
  readonly files?: Readonly<Record<string, string | undefined>>;
  /** What the kernel answers to a process that opens a file, as to a user without rights: root may open everything here. */
  readonly refusals?: Readonly<Record<string, string>>;
  /** What tools print; undefined: it is not installed. */
  readonly tools?: Readonly<Record<string, string | undefined>>;
  readonly options?: Partial<MachineCheckOptions>;
}

/** A machine in a directory of its own, with real programs. */
export async function createMachine({ files, refusals = {}, tools, options }: MachineChange = {}) {
  const root = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-doctor-" }));
  for (const [path, text] of Object.entries({ ...wellFiles, ...files })) {
    if (text === undefined) continue;
    await Deno.mkdir(dirname(join(root, path)), { recursive: true });
    await Deno.writeTextFile(join(root, path), text.replaceAll("ROOT", root));
  }
  await Deno.mkdir(join(root, "bin"));
  for (const [name, output] of Object.entries({ ...toolOutputs, ...tools })) {
    if (output === undefined) continue;
    const script = `#!/bin/sh\n` +
      `echo "$0 $*" >>${root}/ran\ncat <<'END'\n${output}\nEND\n`;
    await Deno.writeTextFile(join(root, "bin", name), script, { mode: 0o755 });
  }
  const log = createLogger("error", "json", () => {});
  const linux = createLinuxHost({
    log,
    sysfsRoot: `${root}/sys`,
    devRoot: `${root}/dev`,
    procRoot: `${root}/proc`,
  });
  const host: Host = {
    ...linux,
    run: (program, args, run) => linux.run(`${root}/bin/${program}`, args, run),
    readText(path) {
      const refusal = refusals[path.slice(root.length + 1)];
      return refusal === undefined ? linux.readText(path) : Promise.reject(new Error(refusal));
    },
  };
  const all: MachineCheckOptions = {
    host,
    nodeId,
    attach: "discovery-client",
    discoveryDirectory: `${root}/discovery.d`,
    kubeletDirectory: `${root}/kubelet`,
    maxVolumes: 0,
    isOurs: isSubsystemOf("lightos"),
    defaultFsType: "ext4",
    nvmeDirectory: `${root}/etc/nvme`,
    modulesDirectory: `${root}/lib/modules`,
    ...options,
  };
  return {
    root,
    options: all,
    checks: () => runMachineChecks(callContext(), all),
    [Symbol.asyncDispose]: () => Deno.remove(root, { recursive: true }),
  };
}

/** Sysfs files of a connection. */
export function controllerFiles(name: string, given: Partial<Record<string, string>> = {}): Record<string, string> {
  const attributes = {
    subsysnqn: subsystemNqn,
    state: "live",
    hostnqn: ownHostNqn,
    hostid: ownHostId,
    cntrltype: "io",
    transport: "tcp",
    address: "traddr=192.0.2.1,trsvcid=4420",
    ...given,
  };
  return Object.fromEntries(
    Object.entries(attributes).map(([key, text]) => [`sys/class/nvme/${name}/${key}`, `${text}\n`]),
  );
}

/** Sysfs files of a namespace, and of its path over nvme0. */
export function namespaceFiles(name: string, ana = "optimized", number = "259:1"): Record<string, string> {
  const base = `sys/class/block/${name}`;
  return {
    [`${base}/wwid`]: `uuid.${namespaceUuid}\n`,
    [`${base}/dev`]: `${number}\n`,
    [`${base}/size`]: "2097152\n",
    [`${base}/hidden`]: "0\n",
    [`${base}/ro`]: "0\n",
    [`${base}/device/subsysnqn`]: `${subsystemNqn}\n`,
    [`sys/class/block/${name.replace(/n(\d+)$/, "c0n$1")}/ana_state`]: `${ana}\n`,
  };
}

export const discoveryControllerFiles = controllerFiles("nvme9", {
  subsysnqn: "nqn.2014-08.org.nvmexpress.discovery",
  cntrltype: "discovery",
});

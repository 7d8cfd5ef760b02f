/** `lbcsi doctor`: what it says of machines and clusters that lack something, and that it changes nothing. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Check, formatList, simulatorCheck } from "../../lib/check.ts";
import { runChecks } from "../../lib/cli/doctor/checks.ts";
import { type MachineCheckOptions, runMachineChecks } from "../../lib/cli/doctor/machine.ts";
import { doctorAsJson, doctorAsText } from "../../lib/cli/doctor/report.ts";
import { createLogger, Secrets } from "../../lib/context.ts";
import { serve, service } from "../../lib/grpc/server.ts";
import { hostIdOf } from "../../lib/host/attach/attacher.ts";
import type { Host } from "../../lib/host/host.ts";
import { createLinuxHost } from "../../lib/host/linux_host.ts";
import { hostNqn, isSubsystemOf } from "../../lib/namespace.ts";
import { selfSigned } from "../../lib/simulator/certificate.ts";
import type { SystemReport } from "../../lib/storage/backend.ts";
import { lightosReports } from "../../lib/storage/lightos/checks.ts";
import { knownClusters } from "../../lib/storage/lightos/cluster_file.ts";
import { poseidonBackend } from "../../lib/storage/poseidon/backend.ts";
import { poseidonReports } from "../../lib/storage/poseidon/checks.ts";
import { parseEndpoints } from "../../lib/volume_id.ts";
import {
  ClusterHealth_State as Health,
  ClusterInfo_AuthenticationMode as AuthenticationMode,
  DurosAPI,
} from "../../proto/gen/lightos_pb.ts";
import { callContext } from "../support/node_calls.ts";
import { poseidonParameters, startPoseidon } from "../support/poseidon.ts";
import { startSimulator } from "../support/simulator.ts";

const nodeId = "n1.node";
const us = hostNqn(nodeId);
const ourId = hostIdOf(nodeId);
const nqn = "nqn.2016-01.com.lightbitslabs:uuid:6b22dbad-e9d4-4a30-a841-745a4968f4ac";
const uuid = "0f2c6a5e-54d1-4c39-9a77-2b1f0c9d8e10";

// ------------------------------------------------------------------------------------------------------- the machine

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
const fabricsOptions =
  "instance=-1,cntlid=-1,transport=%s,traddr=%s,trsvcid=%s,nqn=%s,dhchap_secret=%s,dhchap_ctrl_secret=%s\n";
// The addresses are zeros for those who may not see them.
const symbols = "0000000000000000 T nvmf_connect_admin_queue\t[nvme_fabrics]\n" +
  "0000000000000000 T nvme_auth_negotiate\t[nvme_core]\n";

/** Files of a machine on which everything is well, below its roots. */
const wellFiles: Readonly<Record<string, string>> = {
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

interface Change {
  /** Files that are there besides, or have another text, in which ROOT is the machine's directory; undefined: the file and its directory are not there. */
  readonly files?: Readonly<Record<string, string | undefined>>;
  /** What the kernel answers to who opens a file, as to a user without rights (root may open all of this machine). */
  readonly refusals?: Readonly<Record<string, string>>;
  /** What tools print; undefined: it is not installed. */
  readonly tools?: Readonly<Record<string, string | undefined>>;
  readonly options?: Partial<MachineCheckOptions>;
}

/** A machine in a directory of its own, with real programs. */
async function machine({ files, refusals = {}, tools, options }: Change = {}) {
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
function controller(name: string, given: Partial<Record<string, string>> = {}): Record<string, string> {
  const attributes = {
    subsysnqn: nqn,
    state: "live",
    hostnqn: us,
    hostid: ourId,
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
function namespace(name: string, ana = "optimized", number = "259:1"): Record<string, string> {
  const base = `sys/class/block/${name}`;
  return {
    [`${base}/wwid`]: `uuid.${uuid}\n`,
    [`${base}/dev`]: `${number}\n`,
    [`${base}/size`]: "2097152\n",
    [`${base}/hidden`]: "0\n",
    [`${base}/ro`]: "0\n",
    [`${base}/device/subsysnqn`]: `${nqn}\n`,
    [`sys/class/block/${name.replace(/n(\d+)$/, "c0n$1")}/ana_state`]: `${ana}\n`,
  };
}

const discoveryController = controller("nvme9", {
  subsysnqn: "nqn.2014-08.org.nvmexpress.discovery",
  cntrltype: "discovery",
});

function named(checks: readonly Check[], name: string): Check {
  const check = checks.find((check) => check.name === name);
  ok(check, `${name} is not among ${checks.map(({ name }) => name).join(", ")}`);
  return check;
}

Deno.test("doctor finds nothing wrong with a machine that has everything", async () => {
  await using well = await machine();

  const checks = await well.checks();

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok"), []);
  ok(checks.length >= 20, `${checks.length}`);
  strictEqual(named(checks, "mount tools").found, "mount, umount, blkid, wipefs, blockdev 2.38.1");
  strictEqual(named(checks, "btrfs tools").found, "mkfs.btrfs, btrfs 6.2");
  strictEqual(named(checks, "host NQN and ID").found, `${us}, ${ourId}`);
});

/** Each change of a well machine, the one check that tells of it, and how. */
const conditions: readonly (readonly [what: string, change: Change, name: string, verdict: string, found: RegExp])[] = [
  [
    "promise 21: nvme_tcp is not loaded",
    { files: { "sys/module/nvme_tcp/refcnt": undefined, "dev/nvme-fabrics": undefined } },
    "NVMe/TCP",
    "problem",
    /the kernel module nvme_tcp is not loaded, and \S+\/dev\/nvme-fabrics is missing$/,
  ],
  [
    "a container without the host's /dev",
    { files: { "dev/nvme-fabrics": undefined } },
    "NVMe/TCP",
    "problem",
    /nvme_tcp is loaded, but \S+\/dev\/nvme-fabrics is missing$/,
  ],
  [
    "a process that may not open nvme-fabrics",
    {
      refusals: { "dev/nvme-fabrics": "Permission denied (os error 13)" },
    },
    "NVMe/TCP",
    "problem",
    /^this process may not open \S+\/dev\/nvme-fabrics \(Permission denied \(os error 13\)\)$/,
  ],
  [
    "native multipath is off",
    { files: { "sys/module/nvme_core/parameters/multipath": "N\n" } },
    "native multipath",
    "problem",
    /^off$/,
  ],
  [
    "a kernel without native multipath",
    { files: { "sys/module/nvme_core/parameters/multipath": undefined, "sys/module/nvme_core/refcnt": "1" } },
    "native multipath",
    "problem",
    /built without it \(CONFIG_NVME_MULTIPATH\)/,
  ],
  [
    "no privileges",
    { files: { "proc/self/status": "CapEff:\t0000000000000000\n" } },
    "rights",
    "problem",
    /^CAP_SYS_ADMIN, CAP_DAC_OVERRIDE, CAP_SYS_RESOURCE missing$/,
  ],
  [
    "the right to grow a mounted ext4 alone is missing",
    { files: { "proc/self/status": "CapEff:\t000001fffeffffff\n" } },
    "rights",
    "warning",
    /^CAP_SYS_RESOURCE missing$/,
  ],
  [
    "promise 21: our host ID is in use under another host NQN",
    { files: controller("nvme0", { hostnqn: "nqn.2014-08.org.example:other" }) },
    "host NQN and ID",
    "problem",
    new RegExp(`^nvme0 is connected with our host ID ${ourId} under host NQN nqn.2014-08.org.example:other$`),
  ],
  [
    "promise 21: our host NQN is in use with another host ID, and nvme-cli is to connect",
    {
      files: { ...controller("nvme0", { hostid: "11111111-2222-3333-4444-555555555555" }), ...namespace("nvme0n1") },
      options: { attach: "direct" },
    },
    "host NQN and ID",
    "problem",
    /^this machine is connected as \S+:n1\.node with host ID 11111111-\S+, and --attach=direct takes/,
  ],
  [
    "promise 21: our host NQN is in use with two host IDs",
    {
      files: {
        ...controller("nvme0"),
        ...controller("nvme1", { hostid: "11111111-2222-3333-4444-555555555555" }),
        ...namespace("nvme0n1"),
      },
    },
    "host NQN and ID",
    "problem",
    /with 2 host IDs: /,
  ],
  [
    "promise 21: another program is set up with our host NQN and an ID of its own",
    { files: { "etc/nvme/hostnqn": `${us}\n`, "etc/nvme/hostid": "11111111-2222-3333-4444-555555555555\n" } },
    "names in /etc/nvme",
    "problem",
    /: the NQN is this node's, the ID is not$/,
  ],
  [
    "promise 21: another program is set up with our host ID and an NQN of its own",
    { files: { "etc/nvme/hostnqn": "nqn.2014-08.org.example:x\n", "etc/nvme/hostid": `${ourId}\n` } },
    "names in /etc/nvme",
    "problem",
    /: the ID is this node's, the NQN is not$/,
  ],
  [
    "no nvme-cli, with --attach=direct",
    { tools: { nvme: undefined }, options: { attach: "direct" } },
    "nvme-cli",
    "problem",
    /^nvme: it is not installed, the package nvme-cli is needed on this node$/,
  ],
  [
    "no nvme-cli beside a Discovery-Client",
    { tools: { nvme: undefined } },
    "nvme-cli",
    "warning",
    /; lbcsi discovery-client and growing volumes need it$/,
  ],
  [
    "no umount",
    { tools: { umount: undefined } },
    "mount tools",
    "problem",
    /^umount: it is not installed, the package /,
  ],
  ["no xfs tools", { tools: { "mkfs.xfs": undefined } }, "xfs tools", "warning", /^mkfs\.xfs: it is not installed/],
  [
    "no tools for the default file system",
    { tools: { "mkfs.xfs": undefined }, options: { defaultFsType: "xfs" } },
    "xfs tools",
    "problem",
    /^mkfs\.xfs: it is not installed/,
  ],
  [
    "a kernel without btrfs",
    {
      files: {
        "proc/filesystems": "\text4\n\txfs\n",
        "lib/modules/6.12.9-amd64/modules.dep": "kernel/fs/xfs/xfs.ko.xz:\n",
        "lib/modules/6.12.9-amd64/modules.builtin": "kernel/fs/ext4/ext4.ko\n",
      },
    },
    "btrfs in the kernel",
    "warning",
    /^this kernel has none$/,
  ],
  [
    "an old cryptsetup",
    { tools: { cryptsetup: "cryptsetup 2.3.7" } },
    "host encryption",
    "warning",
    /^cryptsetup 2\.3\.7$/,
  ],
  [
    "a processor without AES instructions",
    { files: { "proc/cpuinfo": "flags\t: fpu sse2\n" } },
    "host encryption",
    "warning",
    /dm-crypt, but the processor has no AES instructions$/,
  ],
  [
    "a kernel without in-band authentication",
    { files: { "dev/nvme-fabrics": fabricsOptions.replace(/,dhchap.*/, "") } },
    "in-band authentication",
    "warning",
    /^the kernel cannot authenticate NVMe connections \(no dhchap_secret, dhchap_ctrl_secret among .*CONFIG_NVME_AUTH/,
  ],
  [
    "a kernel that was built without in-band authentication and lists its options",
    { files: { "proc/kallsyms": symbols.replace("nvme_auth_negotiate", "nvme_other") } },
    "in-band authentication",
    "warning",
    /^the kernel was built without the authentication of NVMe connections \(it has no nvme_auth_negotiate\), Linux 6\.0/,
  ],
  [
    "kubelet's directory on a mount that is not shared",
    { files: { "proc/self/mountinfo": "22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw\n" } },
    "kubelet directory",
    "problem",
    /what is mounted in \S+\/kubelet\/pods stays here: ext4 of \/dev\/vda1 \(254:0\) at "\/" is not shared$/,
  ],
  [
    "kubelet's directory on a read-only file system",
    {
      files: {
        "proc/self/mountinfo": `${wellFiles["proc/self/mountinfo"]}` +
          "23 22 254:1 / ROOT/kubelet/pods rw,relatime shared:2 - ext4 /dev/vdb1 ro\n",
      },
    },
    "kubelet directory",
    "problem",
    /kubelet\/pods is read-only: ext4 of \/dev\/vdb1 \(254:1\) at/,
  ],
  [
    "no Discovery-Client's directory",
    { files: { "discovery.d/README": undefined } },
    "Discovery-Client",
    "problem",
    /discovery\.d is missing$/,
  ],
  [
    "a Discovery-Client that is asked for volumes and not connected",
    { files: { [`discovery.d/${uuid}`]: "-t tcp" } },
    "Discovery-Client",
    "problem",
    /asks for 1 volume, 0 of 0 discovery connections live$/,
  ],
  [
    "promise 22: as many volumes as are allowed",
    {
      files: {
        ...controller("nvme0"),
        ...namespace("nvme0n1"),
        "sys/dev/block/259:1/size": "2097152\n",
        "proc/self/mountinfo": `${wellFiles["proc/self/mountinfo"]}` +
          "30 22 259:1 / ROOT/kubelet/pods/x rw shared:2 - ext4 /dev/nvme0n1 rw\n",
      },
      options: { maxVolumes: 1 },
    },
    "volumes",
    "warning",
    /^1 attached, 1 in use, 1 allowed \(--max-volumes\)$/,
  ],
  [
    "a volume without a live path",
    { files: { ...controller("nvme0", { state: "connecting" }), ...namespace("nvme0n1") } },
    "paths",
    "problem",
    new RegExp(`^no live path to nvme0n1 \\(${uuid}\\): nvme0 connecting optimized$`),
  ],
  [
    "a volume whose live paths are all inaccessible",
    { files: { ...controller("nvme0"), ...namespace("nvme0n1", "inaccessible") } },
    "paths",
    "problem",
    /nvme0 live inaccessible$/,
  ],
  [
    "a connection that shows no volume",
    { files: controller("nvme0") },
    "connections",
    "warning",
    new RegExp(`^without a volume: nvme0 to ${nqn} at 192\\.0\\.2\\.1:4420, live$`),
  ],
  [
    "a mount whose device has gone",
    {
      files: {
        "proc/self/mountinfo": `${wellFiles["proc/self/mountinfo"]}` +
          "30 22 259:7 / /var/lib/kubelet/x rw shared:2 - ext4 /dev/nvme0n7 rw\n",
      },
    },
    "mounts",
    "problem",
    /^the device has gone under "\/var\/lib\/kubelet\/x" \(was \/dev\/nvme0n7\)$/,
  ],
  [
    "an open mapper whose device has gone",
    {
      files: {
        "sys/class/block/dm-3/dm/name": `lb-csi-nvme-uuid.${uuid}\n`,
        "sys/class/block/dm-3/dev": "253:3\n",
        "sys/class/block/dm-3/size": "8\n",
      },
    },
    "open encryption",
    "problem",
    new RegExp(`^the device has gone under dm-3 \\(lb-csi-nvme-uuid\\.${uuid}\\)$`),
  ],
];

for (const [what, change, name, verdict, found] of conditions) {
  const isPromise = /^promise \d+: /.exec(what)?.[0] ?? "";
  Deno.test(`${isPromise}doctor says so, and nothing else, when: ${what.slice(isPromise.length)}`, async () => {
    await using ill = await machine(change);

    const checks = await ill.checks();

    const check = named(checks, name);
    strictEqual(check.verdict, verdict, check.found);
    match(check.found, found);
    const others = checks.filter((other) => other !== check && ["problem", "warning"].includes(other.verdict));
    deepStrictEqual(others, []);
  });
}

Deno.test("doctor counts volumes and discovery connections of a machine at work", async () => {
  await using busy = await machine({
    files: {
      ...controller("nvme0"),
      ...namespace("nvme0n1"),
      ...discoveryController,
      [`discovery.d/${uuid}`]: "-t tcp",
    },
    options: { maxVolumes: 5 },
  });

  const checks = await busy.checks();

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok"), []);
  strictEqual(named(checks, "volumes").found, "1 attached, 0 in use, 5 allowed (--max-volumes)");
  match(named(checks, "Discovery-Client").found, /asks for 1 volume, 1 of 1 discovery connection live$/);
  strictEqual(named(checks, "paths").found, "all live");
  strictEqual(named(checks, "connections").found, "2, none without a volume");
});

Deno.test("doctor does not judge what it cannot see", async () => {
  await using bare = await machine({
    files: {
      "proc/filesystems": "",
      "sys/module/nvme_core/parameters/multipath": undefined,
      "sys/module/dm_crypt/refcnt": undefined,
      "kubelet/pods/keep": undefined,
      "kubelet/plugins/kubernetes.io/csi/keep": undefined,
    },
    options: { nodeId: undefined },
  });

  const checks = await bare.checks();

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok").map(({ name, verdict }) => [name, verdict]), [
    ["native multipath", "not checked"],
    ["host NQN and ID", "not checked"],
    ["ext4 in the kernel", "not checked"],
    ["xfs in the kernel", "not checked"],
    ["btrfs in the kernel", "not checked"],
    ["host encryption", "not checked"],
    ["kubelet directory", "not checked"],
  ]);
});

Deno.test("doctor does not wait for a tool that hangs", async () => {
  await using slow = await machine();
  await Deno.writeTextFile(`${slow.root}/bin/wipefs`, "#!/bin/sh\nsleep 600\n", { mode: 0o755 });
  const started = performance.now();

  const check = named(await slow.checks(), "mount tools");

  strictEqual(check.verdict, "problem");
  match(check.found, /wipefs: not done within 5000 ms/);
  ok(performance.now() - started < 30_000);
});

Deno.test("doctor runs tools for their versions only, and writes nothing", async () => {
  await using well = await machine({ files: { ...controller("nvme0"), ...namespace("nvme0n1") } });
  const before = await listing(well.root);

  await well.checks();

  const after = await listing(well.root);
  const ran = (await Deno.readTextFile(`${well.root}/ran`)).trim().split("\n").map((line) => line.split("/bin/")[1]);
  deepStrictEqual(after.filter((path) => !before.includes(path)), [`${well.root}/ran`]);
  deepStrictEqual(ran.filter((line) => !/^\S+ (--version|-V|version)$|^resize2fs $/.test(line ?? "")), []);
});

async function listing(directory: string): Promise<readonly string[]> {
  const names: string[] = [];
  for await (const { name, isDirectory } of Deno.readDir(directory)) {
    const path = `${directory}/${name}`;
    names.push(path, ...isDirectory ? await listing(path) : []);
  }
  return names.sort();
}

// ------------------------------------------------------------------------------------------------------- the cluster

const options = {
  log: createLogger("error", "json", () => {}),
  globalJwt: () => undefined,
  globalJwtPath: "/etc/lb-csi/jwt",
  globalJwtFor: "any endpoint" as const,
  ca: undefined,
  verifyTls: true,
  userAgent: "lbcsi/test",
};

function endpointsOf(addresses: readonly string[]) {
  const endpoints = parseEndpoints(addresses.join(","));
  ok(typeof endpoints !== "string", String(endpoints));
  return endpoints;
}

async function lightosReport(
  addresses: readonly string[],
  secrets: Record<string, string>,
  scheme: "grpc" | "grpcs" = "grpcs",
  given: Partial<typeof options> = {},
): Promise<SystemReport> {
  const target = { endpoints: endpointsOf(addresses), scheme };
  const [report] = await lightosReports(callContext(), { ...options, ...given }, target, new Secrets(secrets), us);
  ok(report);
  return report;
}

Deno.test("doctor looks at each cluster of the cluster file, with what the file says of it", async () => {
  await using one = await startSimulator();
  await using other = await startSimulator();
  const files = new Map([
    ["/ca", one.addresses.ca ?? ""],
    ["/jwt", one.addresses.jwt],
    [
      "/clusters",
      JSON.stringify({
        clusters: [
          { name: "rack1", endpoints: one.addresses.grpcs, formerEndpoints: "192.0.2.9:443", ca: "/ca", jwt: "/jwt" },
          { name: "rack2", endpoints: other.addresses.grpcs, ca: "/none" },
        ],
      }),
    ],
  ]);
  const clusters = knownClusters("/clusters", {
    stamp: () => "unchanged",
    read(path) {
      const text = files.get(path);
      if (text === undefined) throw new Error("no such file");
      return text;
    },
  }, options.log);

  const reports = await lightosReports(callContext(), { ...options, clusters }, undefined, new Secrets({}), us);
  const former = { endpoints: endpointsOf(["192.0.2.9:443"]), scheme: "grpcs" as const };
  const [byFormer] = await lightosReports(callContext(), { ...options, clusters }, former, new Secrets({}), us);

  deepStrictEqual(reports.map(({ name }) => name), ["cluster rack1", "cluster rack2"]);
  deepStrictEqual(reports[0]?.checks.filter(({ verdict }) => verdict === "problem"), []);
  strictEqual(named(reports[0]?.checks ?? [], "token").found.split(":")[0], '/jwt of cluster "rack1"');
  deepStrictEqual(reports[1]?.checks, [
    { name: "trust", verdict: "problem", found: "its ca /none cannot be read (no such file)" },
  ]);
  strictEqual(byFormer?.name, "cluster rack1");
  deepStrictEqual(
    byFormer.checks.filter(({ name }) => name.startsWith("endpoint ")).map(({ name }) => name.slice(9)).sort(),
    [...one.addresses.grpcs].sort(),
  );
});

/** A JSON Web Token that nobody signed. */
function token(claims: Record<string, number>): string {
  const part = (value: unknown) => new TextEncoder().encode(JSON.stringify(value)).toBase64({ alphabet: "base64url" });
  return `${part({ alg: "RS256" })}.${part(claims)}.c2lnbmF0dXJl`;
}

const inSeconds = (days: number) => Math.floor(Date.now() / 1000 + days * 86_400);

Deno.test("doctor finds nothing wrong with a cluster that is well, at each of its endpoints", async () => {
  await using simulator = await startSimulator();
  const { grpcs, ca = "", adminJwt } = simulator.addresses;

  const { checks, addresses, discovery, inBandAuth, connected } = await lightosReport(grpcs, {
    "jwt": adminJwt,
    "mgmt-ca.crt": ca,
  });

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok").map(({ name }) => name), ["simulator"]);
  strictEqual(checks.filter(({ name }) => name.startsWith("endpoint ")).length, 3);
  strictEqual(checks.filter(({ name }) => name.startsWith("certificate of ")).length, 3);
  match(named(checks, `endpoint ${grpcs[0]}`).found, /^answers after \d+ ms, its certificate verified$/);
  match(named(checks, "token").found, /^key "jwt" of the call's secrets: accepted, valid until 20/);
  strictEqual(named(checks, "cluster health").found, "OK");
  deepStrictEqual([addresses.length, discovery.length, inBandAuth, connected], [3, 3, false, undefined]);
  ok(!JSON.stringify(checks).includes(adminJwt));
});

Deno.test("promise 11: doctor says plainly that a certificate is not verified, or that nothing is encrypted", async () => {
  await using simulator = await startSimulator();
  const { grpc, grpcs, jwt } = simulator.addresses;

  const unverified = await lightosReport(grpcs, { jwt }, "grpcs", { verifyTls: false });
  const clear = await lightosReport(grpc, { jwt }, "grpc");

  const first = named(unverified.checks, `endpoint ${grpcs[0]}`);
  strictEqual(first.verdict, "warning");
  match(first.found, /its certificate is NOT verified: whoever is in between can read the token$/);
  const second = named(clear.checks, `endpoint ${grpc[0]}`);
  strictEqual(second.verdict, "warning");
  match(second.found, /in clear text: whoever is in between can read the token$/);
});

Deno.test("doctor says that the cluster's CA is missing, once for each endpoint", async () => {
  await using simulator = await startSimulator();
  const { grpcs, jwt } = simulator.addresses;

  const { checks } = await lightosReport(grpcs, { jwt });

  const endpoint = named(checks, `endpoint ${grpcs[0]}`);
  strictEqual(endpoint.verdict, "problem");
  match(endpoint.found, /^self-signed certificate in certificate chain$/);
  match(
    endpoint.advice ?? "",
    /give the cluster's CA: mgmt-ca\.crt in the Secret, ca in the cluster file, or --mgmt-ca/,
  );
  strictEqual(named(checks, "token").verdict, "not checked");
});

Deno.test("promise 12: doctor names the endpoint that is dead, as a warning while others answer", async () => {
  await using simulator = await startSimulator();
  const { grpc, jwt } = simulator.addresses;
  const dead = "127.0.0.1:1";

  const one = await lightosReport([...grpc, dead], { jwt }, "grpc");
  const all = await lightosReport([dead], { jwt }, "grpc");

  match(named(one.checks, `endpoint ${dead}`).found, /ECONNREFUSED/);
  strictEqual(named(one.checks, `endpoint ${dead}`).verdict, "warning");
  strictEqual(named(all.checks, `endpoint ${dead}`).verdict, "problem");
});

Deno.test("doctor does not wait for an endpoint that never answers", async () => {
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const connections: Deno.Conn[] = [];
  const accepting = (async () => {
    for await (const connection of silent) connections.push(connection);
  })();
  const started = performance.now();

  const { checks } = await lightosReport([`127.0.0.1:${silent.addr.port}`], { jwt: "x" });

  const took = performance.now() - started;
  silent.close();
  await accepting;
  for (const connection of connections) connection.close();
  strictEqual(named(checks, `endpoint 127.0.0.1:${silent.addr.port}`).verdict, "problem");
  ok(took < 20_000, `${took}`);
});

for (
  const [what, jwt, verdict, found] of [
    [
      "none",
      undefined,
      "problem",
      /^none was given: no key "jwt" in the secrets, and none that can be read in \/etc\/lb-csi\/jwt$/,
    ],
    ["one that expired", token({ exp: inSeconds(-1) }), "problem", /^key "jwt" of the call's secrets: expired 20\S+Z$/],
    [
      "one of the future, or a clock that is behind",
      token({ iat: inSeconds(1), exp: inSeconds(2) }),
      "problem",
      /counts from 20\S+Z on, and it is 20\S+Z here$/,
    ],
    [
      "one that the cluster does not take",
      token({ exp: inSeconds(9) }),
      "problem",
      /: LightOS at \S+ answered .*UNAUTH/,
    ],
    ["something else", "hello", "problem", /, which is no JSON Web Token: LightOS at \S+ answered/],
  ] as const
) {
  Deno.test(`promise 10: doctor tells of a token what is wrong with ${what}, and not a letter of it`, async () => {
    await using simulator = await startSimulator();

    const { checks } = await lightosReport(simulator.addresses.grpc, jwt === undefined ? {} : { jwt }, "grpc");

    const check = named(checks, "token");
    strictEqual(check.verdict, verdict, check.found);
    match(check.found, found);
    if (jwt !== undefined) ok(!JSON.stringify(checks).includes(jwt));
    deepStrictEqual(
      checks.filter(({ name, verdict }) => verdict === "problem" && name !== "token"),
      [],
      "the token is not the endpoint's problem",
    );
  });
}

/** A LightOS that answers what a test wants. */
async function oddLightos(
  given: {
    readonly health?: Health;
    readonly mode?: AuthenticationMode;
    readonly certificateDays?: number;
    readonly host?: { readonly iPAddress: string; readonly hostname: string };
    readonly addresses?: readonly string[];
  },
) {
  const certificate = given.certificateDays === undefined ? undefined : await selfSigned([], given.certificateDays);
  const server = await serve({
    listen: { host: "127.0.0.1", port: 0, ...(certificate === undefined ? {} : { tls: certificate }) },
    log: options.log,
    services: [service(DurosAPI, {
      getVersion: () => Promise.resolve({ apiVersion: "v2.0" }),
      getClusterInfo: () =>
        Promise.resolve({
          subsystemNQN: nqn,
          clusterName: "odd",
          inBandAuthMode: given.mode ?? AuthenticationMode.UnKnown,
          nvmeEndpoints: [...given.addresses ?? []],
        }),
      getCluster: () => Promise.resolve({ health: { state: given.health ?? Health.OK, numInactiveNodes: 1 } }),
      getHost: ({ hostNQN }) => Promise.resolve({ hostNQN, iPAddress: "", hostname: "", ...given.host }),
    })],
  });
  const address = `127.0.0.1:${server.port}`;
  return {
    address,
    report: () =>
      lightosReport(
        [address],
        { jwt: token({ exp: inSeconds(99) }), ...(certificate === undefined ? {} : { "mgmt-ca.crt": certificate.ca }) },
        certificate === undefined ? "grpc" : "grpcs",
      ),
    [Symbol.asyncDispose]: () => server.stop(0),
  };
}

for (
  const [days, verdict, found] of [
    [10, "warning", /valid until 20\S+Z \((9|10) days\)$/],
    [-0.5, "problem", /CN=lbcsi simulator, issued by CN=lbcsi simulator CA, expired 20/],
  ] as const
) {
  Deno.test(`doctor tells of a certificate that ends in ${days} days`, async () => {
    await using lightos = await oddLightos({ certificateDays: days });

    const { checks } = await lightos.report();

    const check = named(checks, `certificate of ${lightos.address}`);
    strictEqual(check.verdict, verdict);
    match(check.found, found);
  });
}

for (const [health, verdict] of [[Health.Warning, "warning"], [Health.Error, "problem"]] as const) {
  Deno.test(`doctor passes on that the cluster's health is ${Health[health]}`, async () => {
    await using lightos = await oddLightos({ health });

    const check = named((await lightos.report()).checks, "cluster health");

    strictEqual(check.verdict, verdict);
    strictEqual(check.found, `${Health[health]}, 1 inactive nodes`);
  });
}

// --------------------------------------------------------------------------------------------------- machine and cluster

Deno.test("promise 21: doctor finds another machine that is connected as this node", async () => {
  await using here = await machine();
  await using lightos = await oddLightos({ host: { iPAddress: "192.0.2.77", hostname: "worker-9" } });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = named(sections[1]?.checks ?? [], "connected as this node");
  strictEqual(check.verdict, "problem");
  strictEqual(
    check.found,
    `another machine is connected as ${us}: 192.0.2.77 (worker-9) is not one of this machine's addresses`,
  );
});

Deno.test("doctor knows this machine when it is the one that is connected", async () => {
  await using here = await machine();
  await using lightos = await oddLightos({ host: { iPAddress: "127.0.0.1", hostname: "me" } });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = named(sections[1]?.checks ?? [], "connected as this node");
  deepStrictEqual([check.verdict, check.found], ["ok", "this machine, from 127.0.0.1 (me)"]);
});

Deno.test("doctor says that the cluster demands an authentication that this machine cannot do", async () => {
  await using here = await machine({ files: { "dev/nvme-fabrics": fabricsOptions.replace(/,dhchap.*/, "") } });
  await using lightos = await oddLightos({ mode: AuthenticationMode.Enabled });

  const sections = await runChecks(callContext(), here.options, lightos.report().then((report) => [report]));

  const check = named(sections[1]?.checks ?? [], "authentication of this node");
  strictEqual(check.verdict, "problem");
  match(check.found, /^the cluster demands DH-HMAC-CHAP, and the kernel cannot authenticate NVMe connections \(/);
});

Deno.test("doctor connects to data addresses, and names those that it does not reach", async () => {
  await using here = await machine({ options: { attach: "direct" } });
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const good = `127.0.0.1:${listener.addr.port}`;
  await using some = await oddLightos({ addresses: [good, "127.0.0.1:1"] });
  await using none = await oddLightos({ addresses: ["127.0.0.1:1"] });
  await using all = await oddLightos({ addresses: [good] });

  const checkOf = async (lightos: typeof some) =>
    named(
      (await runChecks(callContext(), here.options, lightos.report().then((report) => [report])))[1]?.checks ?? [],
      "data addresses",
    );

  const { verdict, found } = await checkOf(some);
  deepStrictEqual([verdict, found], ["warning", "1 of 2 reached; 127.0.0.1:1: ECONNREFUSED"]);
  strictEqual((await checkOf(none)).verdict, "problem");
  deepStrictEqual([(await checkOf(all)).verdict, (await checkOf(all)).found], ["ok", `${good} reached`]);
});

Deno.test("doctor knows a simulator, and does not try data addresses that nothing listens at", async () => {
  await using here = await machine({ options: { attach: "direct" } });
  await using lightos = await startSimulator();
  await using poseidon = await startPoseidon();
  const { grpcs, ca = "", adminJwt } = lightos.addresses;
  const [endpoint] = endpointsOf([poseidon.addresses.dagent]);
  const [ofPoseidon] = await poseidonReports(callContext(), undefined, endpoint);
  const reports = [await lightosReport(grpcs, { "jwt": adminJwt, "mgmt-ca.crt": ca }), ofPoseidon];
  ok(ofPoseidon !== undefined);

  const sections = await runChecks(
    callContext(),
    here.options,
    Promise.resolve(reports.filter((one) => one !== undefined)),
  );

  for (const { checks } of sections.slice(1)) {
    const { verdict, found } = named(checks, "simulator");
    strictEqual(verdict, "warning");
    match(found, /^lbcsi simulate plays this storage system, and nothing listens at its data addresses/);
    deepStrictEqual(checks.filter(({ name, verdict }) => name === "data addresses" || verdict === "problem"), []);
  }
  strictEqual(sections.length, 3);
  deepStrictEqual(simulatorCheck("lbcsi-simulator:nvmet")?.hasDataPath, true);
  strictEqual(simulatorCheck("1"), undefined);
});

Deno.test("doctor cuts a long list of the same, and says how many more there are", () => {
  const list = (count: number) => Array.from({ length: count }, (_, at) => `m${at}`);

  strictEqual(formatList(list(7)), "m0, m1, m2, m3, m4, m5, m6");
  strictEqual(formatList(list(50), "; "), "m0; m1; m2; m3; m4; m5; and 44 more");
  strictEqual(formatList([]), "");
});

Deno.test("doctor looks at PoseidonOS: DAgent, transport, arrays, and how full they are", async () => {
  await using simulator = await startPoseidon();
  const { dagent, arrays } = simulator.addresses;
  const [endpoint] = endpointsOf([dagent]);
  ok(endpoint);
  const systems = {
    all: () => [{ name: "rack1", endpoint, formerEndpoints: [], idEndpoint: endpoint, arrays: [...arrays, "none"] }],
    owning: () => undefined,
  };

  const [report] = await poseidonReports(callContext(), systems, undefined);

  const checks = report?.checks ?? [];
  strictEqual(report?.name, "system rack1");
  match(named(checks, `DAgent ${dagent}`).found, /^answers after \d+ ms, PoseidonOS v1/);
  strictEqual(named(checks, "TCP transport").verdict, "ok");
  strictEqual(named(checks, `array ${arrays[0]}`).found, `0 of 256 volumes, ${16n << 30n} bytes left`);
  deepStrictEqual([named(checks, "array none").verdict, named(checks, "management API").verdict], [
    "problem",
    "warning",
  ]);
});

Deno.test("doctor knows where PoseidonOS shows volumes now", async () => {
  await using simulator = await startPoseidon();
  const { dagent, targetAddress, transportServiceId } = simulator.addresses;
  const [endpoint] = endpointsOf([dagent]);
  await using backend = poseidonBackend({ log: options.log });
  const none = new Secrets({});
  const wish = { name: "pvc-1", requiredBytes: 1n << 20n, limitBytes: 0n, parameters: poseidonParameters(simulator) };
  const { id, context } = await backend.createVolume(callContext(), none, wish);
  await backend.grantAccess(callContext(), none, id, {
    hostNqn: us,
    shared: false,
    ...(context === undefined ? {} : { volumeContext: context }),
  });

  const [report] = await poseidonReports(callContext(), undefined, endpoint);

  deepStrictEqual(report?.addresses, [{ traddr: targetAddress, trsvcid: transportServiceId }]);
});

Deno.test("doctor says that no DAgent answers", async () => {
  const [endpoint] = endpointsOf(["127.0.0.1:1"]);

  const [report] = await poseidonReports(callContext(), undefined, endpoint);

  const check = named(report?.checks ?? [], "DAgent 127.0.0.1:1");
  strictEqual(check.verdict, "problem");
  match(check.found, /^the DAgent at 127\.0\.0\.1:1 cannot be reached/);
});

// ------------------------------------------------------------------------------------------------------------ showing

const sections = [{
  of: "machine",
  checks: [
    { name: "one", verdict: "ok", found: "well" },
    { name: "another", verdict: "problem", found: "bad\n  ok  three  \u001b[31m", advice: "mend it" },
  ],
}] as const;

Deno.test("doctorAsText has one line for each check, and lets no foreign text steer the terminal", () => {
  strictEqual(
    doctorAsText(sections),
    `machine
  ok       one      well
  PROBLEM  another  bad ok three \\u001b[31m
                    -> mend it

1 problem, 0 warnings, 1 ok, 0 not checked`,
  );
});

Deno.test("doctorAsJson has each check with what it is of", () => {
  deepStrictEqual(JSON.parse(doctorAsJson(sections)), {
    problems: 1,
    warnings: 0,
    checks: [
      { of: "machine", check: "one", result: "ok", found: "well" },
      { of: "machine", check: "another", result: "problem", found: sections[0].checks[1].found, advice: "mend it" },
    ],
  });
});

// --------------------------------------------------------------------------------------------------------- the program

const mainPath = fileURLToPath(new URL("../../main.ts", import.meta.url));

async function lbcsi(args: readonly string[], input?: string) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", mainPath, "doctor", ...args],
    env: { NO_COLOR: "1" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  if (input !== undefined) await writer.write(new TextEncoder().encode(input));
  await writer.close();
  const { code, stdout, stderr } = await child.output();
  return { code, out: new TextDecoder().decode(stdout), err: new TextDecoder().decode(stderr) };
}

Deno.test("lbcsi doctor looks at a cluster with a token from a pipe, and ends with 0 when all is well", async () => {
  await using simulator = await startSimulator();
  const { grpcs, ca = "", jwt } = simulator.addresses;
  const caPath = await Deno.makeTempFile({ prefix: "lbcsi-doctor-" });
  try {
    await Deno.writeTextFile(caPath, ca);
    const args = ["--checks", "cluster", "--mgmt-endpoint", grpcs.join(","), "--mgmt-ca", caPath];

    const { code, out, err } = await lbcsi([...args, "--jwt-path", "/dev/stdin", "--json"], `${jwt}\n`);

    strictEqual(code, 0, out + err);
    const { problems, checks } = JSON.parse(out);
    deepStrictEqual([problems, checks.length > 8], [0, true]);
    strictEqual(err, "");
    ok(!out.includes(jwt));
  } finally {
    await Deno.remove(caPath);
  }
});

Deno.test("promise 21: lbcsi doctor ends with 1 on a machine without nvme_tcp", async () => {
  const empty = await Deno.makeTempDir({ prefix: "lbcsi-doctor-" });
  try {
    const { code, out } = await lbcsi(["--node-id", nodeId, "--sysfs", empty, "--dev", empty]);

    strictEqual(code, 1);
    match(out, /^machine$/m);
    match(out, /PROBLEM +NVMe\/TCP +the kernel module nvme_tcp is not loaded/);
    match(out, /^cluster\n {2}not checked +cluster +neither --config nor --mgmt-endpoint is given$/m);
    match(out, /^\d+ problems?, \d+ warnings?, \d+ ok, \d+ not checked$/m);
  } finally {
    await Deno.remove(empty, { recursive: true });
  }
});

for (
  const [args, message] of [
    [["--checks", "cluster"], /--checks cluster needs --config or --mgmt-endpoint/],
    [["--node-id", "a b"], /--node-id "a b": only letters, digits/],
    [["--mgmt-endpoint", "nowhere"], /--mgmt-endpoint "nowhere": "nowhere" is not host:port/],
    [["--backend=poseidon", "--mgmt-endpoint", "a:1,b:1"], /--mgmt-endpoint: a PoseidonOS has one DAgent/],
    [["--backend=poseidon", "--mgmt-endpoint", "a:1", "--mgmt-ca", "/x"], /--mgmt-ca cannot be used with PoseidonOS/],
    [["--config", "/none.yaml"], /Cannot use cluster file \/none\.yaml/],
  ] as const
) {
  Deno.test(`lbcsi doctor ${args.join(" ")} ends with 2 and says why`, async () => {
    const { code, err } = await lbcsi(args);

    strictEqual(code, 2, err);
    match(err, message);
  });
}

/** What `lbcsi doctor` says of machines that lack something, and that it changes nothing. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { checkNamed } from "../../support/checks.ts";
import {
  controllerFiles,
  createMachine,
  discoveryControllerFiles,
  fabricsOptions,
  type MachineChange,
  namespaceFiles,
  namespaceUuid,
  ownHostId,
  ownHostNqn,
  subsystemNqn,
  symbols,
  wellFiles,
} from "../../support/doctor_machine.ts";

Deno.test("doctor finds nothing wrong with a machine that has everything", async () => {
  await using well = await createMachine();

  const checks = await well.checks();

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok"), []);
  ok(checks.length >= 20, `${checks.length}`);
  strictEqual(checkNamed(checks, "mount tools").found, "mount, umount, blkid, wipefs, blockdev 2.38.1");
  strictEqual(checkNamed(checks, "btrfs tools").found, "mkfs.btrfs, btrfs 6.2");
  strictEqual(checkNamed(checks, "host NQN and ID").found, `${ownHostNqn}, ${ownHostId}`);
});

/** Each fault of a healthy machine, the one check that finds it, and what it reports. */
const conditions:
  readonly (readonly [what: string, change: MachineChange, name: string, verdict: string, found: RegExp])[] = [
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
      { files: controllerFiles("nvme0", { hostnqn: "nqn.2014-08.org.example:other" }) },
      "host NQN and ID",
      "problem",
      new RegExp(`^nvme0 is connected with our host ID ${ownHostId} under host NQN nqn.2014-08.org.example:other$`),
    ],
    [
      "promise 21: our host NQN is in use with another host ID, and nvme-cli is to connect",
      {
        files: {
          ...controllerFiles("nvme0", { hostid: "11111111-2222-3333-4444-555555555555" }),
          ...namespaceFiles("nvme0n1"),
        },
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
          ...controllerFiles("nvme0"),
          ...controllerFiles("nvme1", { hostid: "11111111-2222-3333-4444-555555555555" }),
          ...namespaceFiles("nvme0n1"),
        },
      },
      "host NQN and ID",
      "problem",
      /with 2 host IDs: /,
    ],
    [
      "promise 21: another program is set up with our host NQN and an ID of its own",
      { files: { "etc/nvme/hostnqn": `${ownHostNqn}\n`, "etc/nvme/hostid": "11111111-2222-3333-4444-555555555555\n" } },
      "names in /etc/nvme",
      "problem",
      /: the NQN is this node's, the ID is not$/,
    ],
    [
      "promise 21: another program is set up with our host ID and an NQN of its own",
      { files: { "etc/nvme/hostnqn": "nqn.2014-08.org.example:x\n", "etc/nvme/hostid": `${ownHostId}\n` } },
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
      { files: { [`discovery.d/${namespaceUuid}`]: "-t tcp" } },
      "Discovery-Client",
      "problem",
      /asks for 1 volume, 0 of 0 discovery connections live$/,
    ],
    [
      "promise 22: as many volumes as are allowed",
      {
        files: {
          ...controllerFiles("nvme0"),
          ...namespaceFiles("nvme0n1"),
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
      { files: { ...controllerFiles("nvme0", { state: "connecting" }), ...namespaceFiles("nvme0n1") } },
      "paths",
      "problem",
      new RegExp(`^no live path to nvme0n1 \\(${namespaceUuid}\\): nvme0 connecting optimized$`),
    ],
    [
      "a volume whose live paths are all inaccessible",
      { files: { ...controllerFiles("nvme0"), ...namespaceFiles("nvme0n1", "inaccessible") } },
      "paths",
      "problem",
      /nvme0 live inaccessible$/,
    ],
    [
      "a connection that shows no volume",
      { files: controllerFiles("nvme0") },
      "connections",
      "warning",
      new RegExp(`^without a volume: nvme0 to ${subsystemNqn} at 192\\.0\\.2\\.1:4420, live$`),
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
          "sys/class/block/dm-3/dm/name": `lb-csi-nvme-uuid.${namespaceUuid}\n`,
          "sys/class/block/dm-3/dev": "253:3\n",
          "sys/class/block/dm-3/size": "8\n",
        },
      },
      "open encryption",
      "problem",
      new RegExp(`^the device has gone under dm-3 \\(lb-csi-nvme-uuid\\.${namespaceUuid}\\)$`),
    ],
  ];

for (const [what, change, name, verdict, found] of conditions) {
  const isPromise = /^promise \d+: /.exec(what)?.[0] ?? "";
  Deno.test(`${isPromise}doctor reports it, and nothing else, when: ${what.slice(isPromise.length)}`, async () => {
    await using ill = await createMachine(change);

    const checks = await ill.checks();

    const check = checkNamed(checks, name);
    strictEqual(check.verdict, verdict, check.found);
    match(check.found, found);
    const others = checks.filter((other) => other !== check && ["problem", "warning"].includes(other.verdict));
    deepStrictEqual(others, []);
  });
}

Deno.test("doctor counts the volumes and discovery connections of a machine in use", async () => {
  await using busy = await createMachine({
    files: {
      ...controllerFiles("nvme0"),
      ...namespaceFiles("nvme0n1"),
      ...discoveryControllerFiles,
      [`discovery.d/${namespaceUuid}`]: "-t tcp",
    },
    options: { maxVolumes: 5 },
  });

  const checks = await busy.checks();

  deepStrictEqual(checks.filter(({ verdict }) => verdict !== "ok"), []);
  strictEqual(checkNamed(checks, "volumes").found, "1 attached, 0 in use, 5 allowed (--max-volumes)");
  match(checkNamed(checks, "Discovery-Client").found, /asks for 1 volume, 1 of 1 discovery connection live$/);
  strictEqual(checkNamed(checks, "paths").found, "all live");
  strictEqual(checkNamed(checks, "connections").found, "2, none without a volume");
});

Deno.test("doctor does not judge what it cannot see", async () => {
  await using bare = await createMachine({
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
  await using slow = await createMachine();
  await Deno.writeTextFile(`${slow.root}/bin/wipefs`, "#!/bin/sh\nsleep 600\n", { mode: 0o755 });
  const started = performance.now();

  const check = checkNamed(await slow.checks(), "mount tools");

  strictEqual(check.verdict, "problem");
  match(check.found, /wipefs: not done within 5000 ms/);
  ok(performance.now() - started < 30_000);
});

Deno.test("doctor runs tools for their versions only, and writes nothing", async () => {
  await using well = await createMachine({ files: { ...controllerFiles("nvme0"), ...namespaceFiles("nvme0n1") } });
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

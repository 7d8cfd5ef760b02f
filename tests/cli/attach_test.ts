/** `lbcsi attach`, `list` and `detach` as processes, on a simulated machine. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { parseMountTable } from "../../lib/host/mount_table.ts";
import { hostNqn } from "../../lib/namespace.ts";
import { namespaceUuid, ownHostNqn, subsystemNqn } from "../support/fake_machine.ts";
import { finished, lbcsiCommand, runLbcsi } from "../support/lbcsi.ts";
import { createAvailableVolume } from "../support/lightos_volume.ts";
import { needs } from "../support/needs.ts";
import { eventually, startSimulator } from "../support/simulator.ts";

async function simulatedMachine() {
  const simulator = await startSimulator({ data: "loop" });
  const { discoveryDir = "", sysfsRoot = "", devRoot = "" } = simulator.addresses;
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-shell-" }));
  await Deno.writeTextFile(join(directory, "jwt"), simulator.addresses.jwt);
  await Deno.mkdir(join(directory, "mnt"));
  const roots = ["--discovery-dir", discoveryDir, "--sysfs", sysfsRoot, "--dev", devRoot];
  const us = ["--node-id", "n1.node", "--attach=discovery-client", "--jwt-path", join(directory, "jwt"), ...roots];
  return {
    simulator,
    directory,
    mnt: join(directory, "mnt"),
    roots,
    run: (...args: string[]) => runLbcsi([...args, ...us]),
    start: (args: string[], env: Record<string, string>) => lbcsiCommand([...args, ...us], env).spawn(),
    list: async (...args: string[]) => await runLbcsi(["list", ...roots, ...args]),
    async [Symbol.asyncDispose]() {
      const table = parseMountTable(await Deno.readTextFile("/proc/self/mountinfo"));
      for (const { path } of table.filter(({ path }) => path.startsWith(directory)).toReversed()) {
        await new Deno.Command("umount", { args: [path] }).output();
      }
      await simulator.stop();
      await Deno.remove(directory, { recursive: true });
    },
  };
}

const ignore = !needs("root", "loop", "mkfs.ext4");

Deno.test({
  name: "lbcsi attach, list and detach take a volume through its stay on a machine, and leave nothing",
  ignore,
  async fn() {
    await using m = await simulatedMachine();
    const { volume, id } = await createAvailableVolume(m.simulator);

    const blank = await m.run("attach", id, "--mount", m.mnt);
    assert.equal(blank.code, 1);
    assert.match(
      blank.err,
      /^lbcsi attach: Cannot mount namespace .* is blank, and none is made unless it is asked for/m,
    );

    const attached = await m.run("attach", id, "--mount", m.mnt, "--format");
    assert.equal(attached.err, "");
    assert.deepEqual([attached.code, attached.out], [0, `${m.simulator.addresses.devRoot}/nvme0n1 ${m.mnt}\n`]);
    await Deno.writeTextFile(join(m.mnt, "file"), "precious");
    const again = await m.run("attach", id, "--mount", m.mnt, "--format", "--json");
    const shown = JSON.parse(again.out);
    assert.deepEqual(shown.mount, { path: m.mnt, fsType: "ext4", readOnly: false });
    assert.equal(shown.uuid, volume.uuid);

    const listed = JSON.parse((await m.list("--json")).out);
    assert.equal(listed.volumes.length, 1);
    assert.equal(listed.volumes[0].fileSystem, "ext4");
    assert.equal(listed.volumes[0].sizeBytes, 64 << 20);
    assert.deepEqual(listed.volumes[0].mounts, [
      { path: m.mnt, type: "filesystem", fileSystem: "ext4", readOnly: false },
    ]);
    assert.ok(listed.volumes[0].paths.every(({ state }: { state: string }) => state === "live"));

    const busy = await m.run("detach", id);
    assert.equal(busy.code, 1);
    assert.match(busy.err, new RegExp(`is in use by the mount at "${m.mnt}"`));

    for (const _turn of ["first", "again"]) {
      assert.deepEqual(await m.run("detach", id, "--mount", m.mnt), { code: 0, out: "", err: "" });
    }
    assert.deepEqual(volume.acl.filter((nqn) => nqn === ownHostNqn), []);
    assert.deepEqual([...Deno.readDirSync(m.simulator.addresses.discoveryDir ?? "")], []);
    await eventually("the device goes", () => m.simulator.control.machine().devices.length === 0);
    assert.equal((await m.list("--uuid", volume.uuid)).code, 1);
  },
});

Deno.test({
  name: "promise 1: Ctrl-C during lbcsi attach lets a running mkfs end, exits with 130, and a repeat goes on",
  ignore,
  async fn() {
    await using m = await simulatedMachine();
    const { id } = await createAvailableVolume(m.simulator);
    const tools = join(m.directory, "tools");
    await Deno.mkdir(tools);
    // Says that it has begun, and waits in the middle for the test.
    await Deno.writeTextFile(
      join(tools, "mkfs.ext4"),
      `#!/bin/sh\ntouch '${tools}/begun'\nwhile [ ! -e '${tools}/go' ]; do sleep 0.05; done\n` +
        `PATH="\${PATH#*:}" exec mkfs.ext4 "$@"\n`,
      { mode: 0o755 },
    );
    const process = m.start(["attach", id, "--mount", m.mnt, "--format"], {
      PATH: `${tools}:${Deno.env.get("PATH")}`,
    });
    await eventually("mkfs begins", () => exists(join(tools, "begun")), 30_000);

    process.kill("SIGINT");
    await Deno.writeTextFile(join(tools, "go"), "");
    const { code, err } = await finished(process);

    assert.equal(code, 130, err);
    assert.match(err, /^lbcsi: Cannot attach the volume: interrupted, what has been done stays and may be repeated$/m);
    const [volume] = JSON.parse((await m.list("--json")).out).volumes;
    assert.equal(volume.fileSystem, "ext4", "mkfs has ended");
    assert.deepEqual(volume.mounts, []);
    assert.equal((await m.run("attach", id, "--mount", m.mnt)).code, 0);
    assert.equal((await m.run("detach", id, "--mount", m.mnt)).code, 0);
  },
});

Deno.test("promise 21: lbcsi attach and detach say at once which tools are missing, before they do anything", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-shell-" });
  // A machine that is connected as this node.
  for (
    const [name, text] of Object.entries({
      subsysnqn: subsystemNqn,
      state: "live",
      transport: "tcp",
      hostnqn: hostNqn("n1.node"),
      address: "traddr=192.0.2.1,trsvcid=4420",
    })
  ) {
    await Deno.mkdir(join(directory, "sys/class/nvme/nvme0"), { recursive: true });
    await Deno.writeTextFile(join(directory, "sys/class/nvme/nvme0", name), text);
  }
  const roots = ["--sysfs", join(directory, "sys"), "--dev", join(directory, "dev")];
  const volume = ["--uuid", namespaceUuid, "--nqn", subsystemNqn, "--node-id", "n1.node", "--mount", directory];
  const run = (...args: string[]) => runLbcsi([...args, ...volume, ...roots], { PATH: directory });

  const attached = await run("attach", "--address", "192.0.2.1", "--fs", "btrfs");
  const detached = await run("detach");

  for (const { code, err } of [attached, detached]) {
    assert.equal(code, 1, err);
    assert.match(err, /: this machine is not ready for it, .*nvme-cli: nvme: it is .*the package nvme-cli is needed/);
    assert.match(err, /; mount tools: mount: it is .*; umount: it is /);
  }
  assert.match(attached.err, /^lbcsi attach: Cannot attach the volume: .*btrfs tools: mkfs\.btrfs: it is /);
  assert.match(detached.err, /^lbcsi detach: Cannot detach the volume: /);
  await Deno.remove(directory, { recursive: true });
});

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false;
  }
}

for (
  const [args, message] of [
    [["attach"], /--node-id is missing/],
    [["attach", "--node-id", "n1"], /either VOLUME_ID or both --uuid and --nqn are needed/],
    [["attach", "--node-id", "n1", "mgmt:x", "--nqn", subsystemNqn], /either VOLUME_ID or both/],
    [
      ["attach", "--node-id", "n1", "--uuid", namespaceUuid, "--nqn", subsystemNqn],
      /--address is missing: with --nqn and --attach=direct/,
    ],
    [
      ["attach", "--node-id", "n1", "--uuid", namespaceUuid, "--nqn", subsystemNqn, "--attach", "discovery-client"],
      /--discovery is missing: with --nqn and --attach=discovery-client/,
    ],
    [["attach", "--node-id", "n1", "a", "b"], /Unexpected argument 'b'/],
    [["attach", "--node-id", "n1", "a", "--format"], /--fs, --format and --read-only are for --mount/],
    [["attach", "--node-id", "n1", "a", "--mount", "/m", "--format", "--read-only"], /exclude each other/],
    [
      ["attach", "--node-id", "n1", "--address", "a.example"],
      /--address "a\.example": "a\.example" is not an IP address/,
    ],
    [["attach", "--node-id", "n 1", "a"], /only letters, digits/],
    [["attach", "--node-id", "n1", "a", "--secrets", "/nonexistent"], /--secrets "\/nonexistent": /],
    [["detach", "--node-id", "n1", "--uuid", "x", "--nqn", subsystemNqn], /--uuid "x": is not a UUID/],
    [["completion"], /SHELL is missing/],
    [["completion", "csh"], /SHELL "csh": is not bash, zsh or fish/],
  ] as const
) {
  Deno.test(`lbcsi ${args.join(" ")} ends with status 2 and says why`, async () => {
    const { code, out, err } = await runLbcsi(args);

    assert.deepEqual([code, out], [2, ""], err);
    assert.match(err, message);
  });
}

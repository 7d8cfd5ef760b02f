/** The simulator's data plane "nvmet": what it makes of the kernel's target, and that it takes all of it away again. */
import assert from "node:assert/strict";
import { hostNqn } from "../../../lib/namespace.ts";
import { VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { scenario as of } from "../scenario.ts";
import { controllers, devicesWith, type GuestTestbed, names, program, read, run, tool, until } from "../testbed.ts";

const target = "/sys/kernel/config/nvmet";
const hostA = hostNqn("a.node");
const hostB = hostNqn("b.node");

/** Since 6.12 at the latest, the kernel takes a host NQN with one host ID only. */
const hostIdOf = (host: string) => `11111111-1111-4111-8111-${host === hostA ? "aaaaaaaaaaaa" : "bbbbbbbbbbbb"}`;

/** nvme-cli's words, without the driver. */
async function connect(testbed: GuestTestbed, host: string, traddr = "127.0.0.1") {
  return await run(
    "nvme",
    "connect",
    "--transport=tcp",
    `--traddr=${traddr}`,
    "--trsvcid=4420",
    `--nqn=${testbed.processes.addresses.subsystemNqn}`,
    `--hostnqn=${host}`,
    `--hostid=${hostIdOf(host)}`,
    "--reconnect-delay=1",
    "--ctrl-loss-tmo=60",
  );
}

async function disconnect(testbed: GuestTestbed): Promise<void> {
  await tool("nvme", "disconnect", `--nqn=${testbed.processes.addresses.subsystemNqn}`);
}

const subsystemOf = (testbed: GuestTestbed) => `${target}/subsystems/${testbed.processes.addresses.subsystemNqn}`;
const allowed = (testbed: GuestTestbed) => names(`${subsystemOf(testbed)}/allowed_hosts`);

export const scenario = of([
  {
    name: "nvmet: a granted host finds and reaches its volume by UUID and NGUID, any other is refused",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" }, false);
      await volume.grant("a.node");
      await testbed.processes.ask("GET", "/settled");
      const discover = (host: string) =>
        tool("nvme", "discover", "-t", "tcp", "-a", "127.0.0.1", "-s", "4420", "-q", host, "-I", hostIdOf(host));

      const refused = await connect(testbed, hostB);
      const accepted = await connect(testbed, hostA);
      const device = await until("the device", () => devicesWith(volume.uuid)[0]);

      assert.equal(refused.code, 1);
      assert.equal(accepted.code, 0, accepted.stderr);
      assert.equal(read(`/sys/class/block/${device}/nguid`), volume.uuid);
      assert.equal(read(`/sys/class/block/${device}/device/subsysnqn`), testbed.processes.addresses.subsystemNqn);
      assert.equal(await tool("blockdev", "--getsize64", `/dev/${device}`), String(1 << 30));
      assert((await discover(hostA)).includes(testbed.processes.addresses.subsystemNqn));
      assert(!(await discover(hostB)).includes(testbed.processes.addresses.subsystemNqn));
      await disconnect(testbed);
      await volume.revoke("a.node");
      await volume.delete();
    },
  },
  {
    name: "nvmet: hosts with the same volumes are admitted together, one with others waits its turn",
    async run(testbed) {
      const shared = await testbed.volume({ use: "block", mode: Mode.MULTI_NODE_MULTI_WRITER }, false);
      await shared.grant("a.node");
      await shared.grant("b.node");
      await testbed.processes.ask("GET", "/settled");
      assert.deepEqual(allowed(testbed), [hostA, hostB]);

      const alone = await testbed.volume({ use: "block" }, false);
      await alone.grant("b.node");
      await testbed.processes.ask("GET", "/settled");
      assert.deepEqual(allowed(testbed), [hostA]);
      assert.equal(names(`${subsystemOf(testbed)}/namespaces`).length, 1);
      await shared.revoke("a.node");
      await testbed.processes.ask("GET", "/settled");
      assert.deepEqual(allowed(testbed), [hostB]);
      assert.equal(names(`${subsystemOf(testbed)}/namespaces`).length, 2);

      for (const volume of [shared, alone]) {
        await volume.revoke("b.node");
        await volume.delete();
      }
      await testbed.processes.ask("GET", "/settled");
      assert.deepEqual(allowed(testbed), []);
    },
  },
  {
    name: "nvmet: a port goes down and comes back, and its ANA state reaches the host",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" }, false);
      await volume.grant("a.node");
      await testbed.processes.ask("GET", "/settled");
      for (const traddr of ["127.0.0.1", "127.0.0.2"]) await connect(testbed, hostA, traddr);
      const device = await until("the device", () => devicesWith(volume.uuid)[0]);
      const stateAt = (traddr: string) => controllers().find(({ address }) => address.includes(`=${traddr},`))?.state;

      await testbed.processes.ask("POST", "/paths/down", { server: 0 });
      await until("the first path is down", () => stateAt("127.0.0.1") === "connecting");
      await tool("dd", "if=/dev/zero", `of=/dev/${device}`, "bs=64k", "count=1", "oflag=direct", "status=none");
      await testbed.processes.ask("POST", "/paths/up", { server: 0 });
      await until("the first path is back", () => stateAt("127.0.0.1") === "live");
      await testbed.processes.ask("POST", "/paths/ana", { server: 1, state: "inaccessible" });
      await until(
        "the second path is inaccessible",
        () => names("/sys/block").some((name) => read(`/sys/block/${name}/ana_state`) === "inaccessible"),
      );

      await testbed.processes.ask("POST", "/paths/ana", { server: 1, state: "optimized" });
      await disconnect(testbed);
      await volume.revoke("a.node");
      await volume.delete();
    },
  },
  {
    name: "promise 24: nvmet: a host whose access is taken away is cut off at once, and does not come back",
    async run(testbed) {
      const volume = await testbed.volume({ use: "block" }, false);
      await volume.grant("a.node");
      await testbed.processes.ask("GET", "/settled");
      await connect(testbed, hostA);
      const device = await until("the device", () => devicesWith(volume.uuid)[0]);
      const file = await Deno.open(`/dev/${device}`, { read: true, write: true });

      await volume.revoke("a.node");
      await testbed.processes.ask("GET", "/settled");

      await until("the connection has ended", () => controllers().every(({ state }) => state !== "live"));
      assert.equal((await connect(testbed, hostA, "127.0.0.2")).code, 1);
      await disconnect(testbed);
      file.close();
      await until("the device is gone", () => devicesWith(volume.uuid).length === 0);
      await volume.delete();
    },
  },
  {
    name:
      "nvmet: a simulator takes away what a killed one has left, and in the end everything of its own, but nothing else",
    async run(testbed) {
      const theirs = {
        subsystem: `${target}/subsystems/nqn.2014-08.org.example:theirs`,
        host: `${target}/hosts/nqn.theirs`,
        port: `${target}/ports/7`,
      };
      const volume = await testbed.volume({ use: "block" }, false);
      await volume.grant("a.node");
      await testbed.processes.ask("GET", "/settled");
      await connect(testbed, hostA);
      await until("the device", () => devicesWith(volume.uuid)[0]);
      for (const path of Object.values(theirs)) await Deno.mkdir(path);
      const before = names(`${target}/ports`);

      await testbed.processes.running("simulator")?.end("SIGKILL", 5000);
      assert.equal(controllers()[0]?.state, "live");
      await testbed.startSimulator();

      assert.deepEqual(names(`${target}/ports`), before);
      assert.equal(names("/run/lbcsi-simulator").length, 1);
      await until("the host is connected again", () => controllers()[0]?.state === "live");
      assert.equal((await tool("losetup", "-l", "-n", "-O", "BACK-FILE")).split("\n").length, 1);
      await disconnect(testbed);
      await volume.revoke("a.node");
      await volume.delete();

      assert.equal(await testbed.processes.running("simulator")?.end("SIGTERM", 20_000), "exit 0");
      assert.deepEqual(names(`${target}/ports`), ["7"]);
      assert.deepEqual(names(`${target}/subsystems`), ["nqn.2014-08.org.example:theirs"]);
      assert.deepEqual(names(`${target}/hosts`), ["nqn.theirs"]);
      assert.deepEqual(names("/run/lbcsi-simulator"), []);
      assert.equal(await tool("losetup", "-l", "-n"), "");

      // And it rejects an address that another program has.
      for (
        const [attribute, value] of Object.entries({
          trtype: "tcp",
          adrfam: "ipv4",
          traddr: "127.0.0.1",
          trsvcid: "4420",
        })
      ) {
        await Deno.writeTextFile(`${theirs.port}/addr_${attribute}`, value);
      }
      const shown = `${theirs.port}/subsystems/nqn.2014-08.org.example:theirs`;
      await Deno.symlink(theirs.subsystem, shown);
      const [deno = "", ...words] = program;
      const started = await run(deno, ...words, "simulate", "--data", "nvmet", "--state", "/var/lib/other");

      assert.equal(started.code, 1, started.stdout);
      assert.match(started.stderr, /Cannot serve NVMe\/TCP on 127\.0\.0\.1:4420: .*is somebody else there\?/);
      assert.deepEqual(names(`${target}/ports`), ["7"]);
      assert.deepEqual(names(`${target}/subsystems`), ["nqn.2014-08.org.example:theirs"]);
      assert.deepEqual(names("/run/lbcsi-simulator"), []);
      await Deno.remove(shown);
      for (const path of Object.values(theirs)) await Deno.remove(path);
      await testbed.stop();
    },
  },
]);

/** `lbcsi doctor` on a real kernel: what its sysfs and /dev/nvme-fabrics say of modules, names, paths and leftovers. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { hostIdOf } from "../../../lib/host/attach/attacher.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import type { Check, Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import { controllers, program, run, tool, until } from "../testbed.ts";

const nodeId = "doctor.node";
const us = hostNqn(nodeId);

interface Finding {
  readonly check: string;
  readonly result: string;
  readonly found: string;
}

async function lbcsi(...args: readonly string[]) {
  const [deno = "", ...words] = program;
  return await run(deno, ...words, ...args);
}

/** What the doctor finds, by check. */
async function doctor(...options: readonly string[]): Promise<Readonly<Record<string, Finding>>> {
  const words = ["--checks", "machine", "--attach", "direct", "--node-id", nodeId, "--timeout", "300", "--json"];
  const { stdout, stderr } = await lbcsi("doctor", ...words, ...options);
  assert.equal(stderr, "");
  const { checks }: { checks: readonly Finding[] } = JSON.parse(stdout);
  return Object.fromEntries(checks.map((check) => [check.check, check]));
}

const resultsOf = (findings: Readonly<Record<string, Finding>>, ...names: readonly string[]) =>
  names.map((name) => `${name}: ${findings[name]?.result}`);

const checks: readonly Check[] = [
  {
    name: "promise 21: doctor sees modules, names, volumes and paths as the kernel shows them",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      target.offer(1);
      target.offer(2);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", nodeId];
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });
      const address = ["--address", "127.0.0.1:4421,127.0.0.1:4422", "--mount", mnt, "--format"];
      const attached = await lbcsi("attach", ...place, ...address, "--timeout", "300");
      assert.equal(attached.code, 0, attached.stderr);

      const well = await doctor("--max-volumes", "5");
      target.withdraw(2);
      await until("one path is down", () => controllers().some(({ state }) => state !== "live"), 90);
      const poor = await doctor();
      target.withdraw(1);
      await until("both are down", () => controllers().every(({ state }) => state !== "live"), 90);
      const begin = performance.now();
      const dead = await doctor();
      testbed.measured("lbcsi doctor without a path", `${Math.round(performance.now() - begin)} ms`);
      target.offer(1);
      await until("a path is back", () => controllers().some(({ state }) => state === "live"), 90);
      assert.equal((await lbcsi("detach", ...place, "--mount", mnt, "--timeout", "300")).code, 0);

      const names = ["NVMe/TCP", "native multipath", "host NQN and ID", "nvme-cli", "volumes", "paths", "connections"];
      assert.deepEqual(resultsOf(well, ...names), names.map((name) => `${name}: ok`), JSON.stringify(well));
      assert.equal(well["volumes"]?.found, "1 attached, 1 in use, 5 allowed (--max-volumes)");
      assert.equal(well["host NQN and ID"]?.found, `${us}, ${hostIdOf(nodeId)}`);
      assert.deepEqual(resultsOf(poor, "paths"), ["paths: warning"]);
      assert.match(poor["paths"]?.found ?? "", new RegExp(`${target.uuid}.*nvme\\d+ connecting`));
      assert.deepEqual(resultsOf(dead, "paths"), ["paths: problem"]);
      assert.match(dead["paths"]?.found ?? "", /^no live path to nvme\d+n\d+ /);
    },
  },
  {
    name: "promise 21: doctor finds our host ID under another host NQN, and says how the kernel reacts",
    limitSeconds: 900,
    async run(testbed) {
      const other = "nqn.2014-08.org.example:other";
      await using target = new Target(testbed.home, [us, other]);
      target.offer(1);
      target.offer(2);
      const connect = (hostNqn: string, port: string) =>
        run(
          "nvme",
          ...["connect", "--transport=tcp", "--traddr=127.0.0.1", `--trsvcid=${port}`, `--nqn=${target.nqn}`],
          ...[`--hostnqn=${hostNqn}`, `--hostid=${hostIdOf(nodeId)}`],
        );
      assert.equal((await connect(other, "4421")).code, 0);

      const findings = await doctor();
      const ours = await connect(us, "4422");

      const release = (await Deno.readTextFile("/proc/sys/kernel/osrelease")).trim();
      testbed.measured(`a host ID with a second host NQN on ${release}`, `exit ${ours.code} ${ours.stderr}`);
      assert.equal(findings["host NQN and ID"]?.result, "problem");
      assert.match(
        findings["host NQN and ID"]?.found ?? "",
        new RegExp(`^nvme\\d+ is connected with our host ID ${hostIdOf(nodeId)} under host NQN ${other}$`),
      );
    },
  },
  {
    name: "promise 21: doctor says that nvme_tcp is not loaded, and whether this kernel can authenticate",
    limitSeconds: 600,
    async run(testbed) {
      const release = (await Deno.readTextFile("/proc/sys/kernel/osrelease")).trim();
      const options = await Deno.readTextFile("/dev/nvme-fabrics");
      const config = await Deno.readTextFile(`/boot/config-${release}`).catch(() => undefined);
      // Linux 6.1 lists what it was built without; so the list decides nothing.
      testbed.measured(
        `/dev/nvme-fabrics on ${release} lists dhchap_secret`,
        String(options.includes("dhchap_secret")),
      );

      const loaded = await doctor();
      await tool("modprobe", "-r", "nvme_tcp");
      const unloaded = await doctor();
      await tool("modprobe", "nvme_tcp");

      assert.equal(unloaded["NVMe/TCP"]?.result, "problem");
      assert.match(unloaded["NVMe/TCP"]?.found ?? "", /^the kernel module nvme_tcp is not loaded/);
      assert.equal(loaded["NVMe/TCP"]?.result, "ok");
      assert.deepEqual(resultsOf(loaded, "paths", "connections", "mounts"), [
        "paths: ok",
        "connections: ok",
        "mounts: ok",
      ]);
      const canAuthenticate = config === undefined
        ? release.startsWith("6.12.")
        : /^CONFIG_NVME_(HOST_)?AUTH=y$/m.test(config);
      assert.equal(
        loaded["in-band authentication"]?.result,
        canAuthenticate ? "ok" : "warning",
        loaded["in-band authentication"]?.found ?? "",
      );
      if (!canAuthenticate) {
        assert.match(loaded["in-band authentication"]?.found ?? "", /^the kernel was built without the authentication/);
      }
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

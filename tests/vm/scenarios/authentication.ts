/**
 * In-band authentication (DH-HMAC-CHAP) against the kernel's target, where the guest's kernel has it (trixie); elsewhere
 * (bookworm) that it is rejected with the reason, and that the kernel receives no key.
 */
import assert from "node:assert/strict";
import { join } from "node:path";
import { DhchapKey, type DhchapKeys } from "../../../lib/auth_key.ts";
import { Channel } from "../../../lib/grpc/client.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { DurosAPI } from "../../../proto/gen/lightos_pb.ts";
import { type Check, impatient, type Scenario } from "../scenario.ts";
import { Target } from "../target.ts";
import {
  assertCallFails,
  controllers,
  deviceOf,
  devicesWith,
  type GuestTestbed,
  names,
  nodeId,
  program,
  read,
  run,
  tool,
  until,
} from "../testbed.ts";

const shellNode = "shell.node";
const us = hostNqn(shellNode);

/** The initiator does not show it, the target does; Debian builds its kernels with both or with none. */
async function canAuthenticate(): Promise<boolean> {
  const directory = "/sys/kernel/config/nvmet/hosts/nqn.2014-08.org.example:trial";
  await Deno.mkdir(directory, { recursive: true });
  const isThere = names(directory).includes("dhchap_key");
  await Deno.remove(directory);
  return isThere;
}

function newKeys(): Required<DhchapKeys> & { readonly controller: DhchapKey } {
  return { host: DhchapKey.generate(), controller: DhchapKey.generate() };
}

async function lbcsi(...args: readonly string[]) {
  const [deno = "", ...words] = program;
  return await run(deno, ...words, ...args);
}

/** The keys that the kernel has for each connection to a subsystem, each pair once. */
function keysInUse(nqn: string): readonly string[] {
  const used = names("/sys/class/nvme").filter((name) => read(`/sys/class/nvme/${name}/subsysnqn`) === nqn)
    .map((name) =>
      ["dhchap_secret", "dhchap_ctrl_secret"].map((key) => read(`/sys/class/nvme/${name}/${key}`)).join(" ")
    );
  return [...new Set(used)];
}

const textOf = ({ host, controller }: DhchapKeys) => `${host.reveal()} ${controller?.reveal() ?? "none"}`;

/** A controller that hangs up before it has said that it refuses a key is waited for that long; it is 60 s. */
async function hurried<T>(work: () => Promise<T>): Promise<T> {
  const timeout = "/sys/module/nvme_core/parameters/admin_timeout";
  await Deno.writeTextFile(timeout, "5");
  try {
    return await work();
  } finally {
    await Deno.writeTextFile(timeout, "60");
  }
}

const refused = /the key was refused|a key is wrong/;

/** Writes to a file without a pause while `work` goes on, and asserts that no write has failed. */
async function underLoad(directory: string, work: () => Promise<void>): Promise<void> {
  const stop = join(directory, "stop");
  const script = `n=0; while [ ! -e "$1/stop" ]; do
    dd if=/dev/zero of="$1/load" bs=64k count=8 oflag=direct conv=notrunc status=none || exit 1; n=$((n+1)); done; echo $n`;
  const load = run("sh", "-c", script, "sh", directory);
  try {
    await work();
  } finally {
    await Deno.writeTextFile(stop, "");
  }
  const { code, stdout, stderr } = await load;
  assert.equal(code, 0, stderr);
  assert(Number(stdout) > 2, `${stdout} rounds of writes`);
  await Deno.remove(stop);
}

async function withoutSupport(testbed: GuestTestbed): Promise<void> {
  const keys = newKeys();
  await using target = new Target(testbed.home, [us]);
  target.offer(1);
  const file = join(testbed.home, "unused-key");
  await Deno.writeTextFile(file, keys.host.reveal(), { mode: 0o600 });
  const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", shellNode, "--address", "127.0.0.1:4421"];

  const attached = await lbcsi("attach", ...place, "--dhchap-key-file", file);
  const simulated = await lbcsi("simulate", "--data", "nvmet", "--in-band-auth", "--state", "/var/lib/no-keys");

  assert.equal(attached.code, 1);
  assert.match(
    attached.stderr,
    /the kernel was built without the authentication of NVMe connections \(it has no nvme_auth_negotiate\)/,
  );
  assert.deepEqual(controllers(), []);
  assert.equal(simulated.code, 1);
  assert.match(simulated.stderr, /with in-band authentication: this kernel's target has none/);
  assert(!(await tool("dmesg")).includes(keys.host.reveal().slice(10, 30)));
}

/** A cluster that demands keys, as its management API says, on a machine whose kernel has none. */
async function refusedByTheNode(testbed: GuestTestbed): Promise<void> {
  await testbed.start(impatient);
  const { grpc, adminJwt } = testbed.processes.addresses;
  using admin = new Channel({ address: grpc[0] ?? "" });
  await admin.call(DurosAPI.method.enableClusterInBandAuth, {}, {
    signal: AbortSignal.timeout(60_000),
    headers: { authorization: `Bearer ${adminJwt}` },
  });
  const volume = await testbed.volume({ parameters: { "in-band-auth": "unidirectional" } });
  volume.stageSecrets = testbed.secrets;

  await assertCallFails(
    () => volume.stage(),
    "FAILED_PRECONDITION",
    /: the kernel was built without the authentication of NVMe/,
  );

  assert.deepEqual(controllers(), []);
  await volume.unstage();
  await volume.revoke();
  await volume.delete();
  await testbed.stop();
}

const checks: readonly Check[] = [
  {
    name: "authentication by hand: keys of files connect, wrong ones are refused, and keys change under I/O",
    limitSeconds: 900,
    async run(testbed) {
      if (!await canAuthenticate()) return await withoutSupport(testbed);
      const [first, second] = [newKeys(), newKeys()];
      await using target = new Target(testbed.home, [us]);
      target.demand(us, { ...first, controller: undefined });
      for (const port of [1, 2]) target.offer(port);
      const place = ["--uuid", target.uuid, "--nqn", target.nqn, "--node-id", shellNode];
      const attach = (...more: readonly string[]) =>
        lbcsi("attach", ...place, "--address", "127.0.0.1:4421,127.0.0.1:4422", "--timeout", "300", ...more);
      const files = async (name: string, keys: DhchapKeys) => {
        const written = [["--dhchap-key-file", keys.host], ["--dhchap-ctrl-key-file", keys.controller]] as const;
        return (await Promise.all(written.map(async ([option, key]) => {
          if (key === undefined) return [];
          const file = join(testbed.home, `${name}${option}`);
          await Deno.writeTextFile(file, `${key.reveal()}\n`, { mode: 0o600 });
          return [option, file];
        }))).flat();
      };
      const mnt = join(testbed.home, "mnt");
      await Deno.mkdir(mnt, { recursive: true });

      const without = await attach();
      assert.equal(without.code, 1);
      assert.match(without.stderr, /in-band authentication \(DH-HMAC-CHAP\) is demanded there, and no key is given/);
      const open = join(testbed.home, "open-key");
      await Deno.writeTextFile(open, first.host.reveal(), { mode: 0o644 });
      const readable = await attach("--dhchap-key-file", open);
      assert.deepEqual([readable.code, /other users than its owner can access it \(mode 644\)/.test(readable.stderr)], [
        2,
        true,
      ]);
      const wrong = await hurried(async () => await attach(...await files("wrong", second)));
      assert.equal(wrong.code, 1);
      assert.match(wrong.stderr, refused);
      assert.deepEqual(controllers(), []);

      const begin = performance.now();
      const one = await attach(...await files("one", { ...first, controller: undefined }), "--mount", mnt, "--format");
      testbed.measured("lbcsi attach with a key", `${Math.round(performance.now() - begin)} ms`);
      const device = deviceOf(target.uuid);
      assert.deepEqual(one, { code: 0, stdout: `${device} ${mnt}`, stderr: "" });
      assert.deepEqual(keysInUse(target.nqn), [textOf({ ...first, controller: undefined })]);
      await underLoad(mnt, async () => {
        target.demand(us, second);
        const both = await attach(...await files("two", second));
        assert.deepEqual(both, { code: 0, stdout: device, stderr: "" });
        assert.deepEqual(keysInUse(target.nqn), [textOf(second)]);
        const spoiled = await hurried(async () => await attach(...await files("wrong", newKeys())));
        assert.equal(spoiled.code, 1);
        assert.match(spoiled.stderr, refused);
      });
      assert.deepEqual(keysInUse(target.nqn), [textOf(second)]);
      assert.deepEqual(controllers().map(({ state }) => state), ["live", "live"]);
      assert.equal(deviceOf(target.uuid), device);
      const kernel = await tool("dmesg");
      for (const { host, controller } of [first, second]) {
        for (const key of [host, controller]) assert(!kernel.includes(key.reveal().slice(10, 30)));
      }

      assert.deepEqual(await lbcsi("detach", ...place, "--mount", mnt), { code: 0, stdout: "", stderr: "" });
      assert.deepEqual([devicesWith(target.uuid), controllers()], [[], []]);
    },
  },
  {
    name: "authentication by lbcsi discovery-client: it connects with its keys, and replaces what has others",
    limitSeconds: 900,
    async run(testbed) {
      await using target = new Target(testbed.home, [us]);
      target.offer(1);
      const directory = join(testbed.home, "discovery.d");
      await Deno.mkdir(directory, { recursive: true });
      const entry = `-t tcp -a 127.0.0.1 -s 4421 -q ${us} -n ${target.nqn}\n`;
      await Deno.writeTextFile(join(directory, "one"), entry);
      const log = join(testbed.home, "discovery-client.log");
      const isAble = await canAuthenticate();
      for (const keys of [newKeys(), newKeys()]) {
        if (isAble) target.demand(us, keys);
        const options: string[] = [];
        for (
          const [option, key] of [["dhchap-key-file", keys.host], ["dhchap-ctrl-key-file", keys.controller]] as const
        ) {
          const file = join(testbed.home, option);
          await Deno.writeTextFile(file, key.reveal(), { mode: 0o600 });
          options.push(`--${option}`, file);
        }
        const script = `log=$1; shift; exec "$@" 2>"$log"`;
        const args = [...program, "discovery-client", "--discovery-dir", directory, ...options];
        const daemon = new Deno.Command("sh", { args: ["-c", script, "sh", log, ...args] }).spawn();

        try {
          if (!isAble) {
            await until("it says why not", () => /was built without the authentication/.test(read(log) ?? ""), 120);
            assert.deepEqual(keysInUse(target.nqn), []);
            continue;
          }
          await until(
            "its connection has these keys and no other is left",
            () => devicesWith(target.uuid).length === 1 && keysInUse(target.nqn).join() === textOf(keys),
            120,
          );
        } finally {
          daemon.kill("SIGTERM");
          await daemon.status;
        }
      }
    },
  },
  {
    name: "authentication with LightOS' trusted hosts: a volume's life with keys it keeps, and with changed ones",
    limitSeconds: 900,
    async run(testbed) {
      if (!await canAuthenticate()) return await refusedByTheNode(testbed);
      await testbed.start({ simulator: ["--in-band-auth"], node: [...impatient.node || [], "--log-level", "debug"] });
      const { subsystemNqn } = testbed.processes.addresses;
      const secrets = async () => {
        const { trustedHosts } = await testbed.processes.ask("GET", "/model") as {
          trustedHosts: { name: string; hostSecret: string; targetSecret: string }[];
        };
        assert.deepEqual(trustedHosts.map(({ name }) => name), [nodeId]);
        return `${trustedHosts[0]?.hostSecret} ${trustedHosts[0]?.targetSecret}`;
      };
      const volume = await testbed.volume({ parameters: { "in-band-auth": "bidirectional" } });
      assert.equal(volume.publishContext["in-band-auth"], "bidirectional");
      volume.stageSecrets = testbed.secrets;
      await testbed.processes.ask("GET", "/settled");

      const begin = performance.now();
      await volume.stage();
      testbed.measured("NodeStageVolume with keys of the cluster", `${Math.round(performance.now() - begin)} ms`);
      await volume.publish();
      const kept = await secrets();
      assert.deepEqual(keysInUse(subsystemNqn), [kept]);
      assert.equal(controllers().length, 2);
      await Deno.writeTextFile(join(volume.target, "file"), "precious");

      // What the kernel connects again, and what a new process of the node does.
      await testbed.processes.ask("POST", "/paths/down", { server: 0 });
      await until("a path is down", () => controllers().some(({ state }) => state !== "live"), 60);
      await testbed.processes.ask("POST", "/paths/up", { server: 0 });
      await until("both paths are live", () => controllers().filter(({ state }) => state === "live").length === 2, 90);
      await testbed.processes.running("node")?.end("SIGKILL", 5000);
      await testbed.startNode();
      const keys = newKeys();
      await underLoad(volume.target, async () => {
        volume.publishSecrets = { "dhchap-key": keys.host.reveal(), "dhchap-ctrl-key": keys.controller.reveal() };
        await volume.grant();
        await testbed.processes.ask("GET", "/settled");
        assert.equal(await secrets(), textOf(keys));
        assert.deepEqual(keysInUse(subsystemNqn), [kept]);
        await volume.stage();
        assert.deepEqual(keysInUse(subsystemNqn), [textOf(keys)]);
        volume.stageSecrets = { "dhchap-key": newKeys().host.reveal(), "dhchap-ctrl-key": keys.controller.reveal() };
        await assert.rejects(hurried(() => volume.stage()), refused);
        assert.deepEqual(keysInUse(subsystemNqn), [textOf(keys)]);
      });
      assert.equal(await Deno.readTextFile(join(volume.target, "file")), "precious");

      const plain = await testbed.volume({ use: "block" });
      await testbed.processes.ask("GET", "/settled");
      await plain.stage();
      assert.equal(devicesWith(plain.uuid).length, 1);
      await plain.end();
      await volume.end();
      await testbed.nothingLeft();
      for (const log of [testbed.logOf("node"), testbed.logOf("controller"), await tool("dmesg")]) {
        for (const key of `${kept} ${textOf(keys)}`.split(" ")) assert(!log.includes(key.slice(10, 30)));
      }
      await testbed.stop();
    },
  },
];

export const scenario: Scenario = { boots: [checks], start: undefined };

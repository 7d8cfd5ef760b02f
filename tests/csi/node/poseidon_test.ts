/** Volumes of a simulated PoseidonOS on the machine that it plays: its nvme, its subsystems, real file systems. */
import { deepStrictEqual, match, ok, strictEqual } from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { requestContext } from "../../../lib/context.ts";
import { createLogger } from "../../../lib/log.ts";
import { hostNqn, type RemoteNamespace } from "../../../lib/namespace.ts";
import { Secrets } from "../../../lib/secrets.ts";
import { poseidonBackend } from "../../../lib/storage/poseidon/backend.ts";
import { needs } from "../../support/needs.ts";
import { poseidonParameters, startPoseidon } from "../../support/poseidon.ts";

const ignore = !needs("root", "loop", "mkfs.ext4");
const mib = 1n << 20n;
const host = hostNqn("a.node");
const none = new Secrets();

async function command(program: string, ...args: readonly string[]) {
  const { code, stdout, stderr } = await new Deno.Command(program, { args: [...args], env: { LC_ALL: "C" } }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, out: text(stdout), err: text(stderr) };
}

/** A backend before a simulated PoseidonOS with a machine, and the machine's nvme. */
async function start() {
  const sim = await startPoseidon({ data: "loop" });
  const quiet = createLogger("error", "text", () => {});
  const backend = poseidonBackend({ log: quiet });
  const within = () => requestContext(AbortSignal.timeout(30_000), new Date(Date.now() + 30_000), quiet);
  const { programs = "", sysfsRoot = "", devRoot = "" } = sim.addresses;
  const nvme = (...words: readonly string[]) => command(join(programs, "nvme"), ...words);
  const volumeContext = poseidonParameters(sim);
  return {
    sim,
    nvme,
    sysfsRoot,
    create: (name: string, requiredBytes = 64n * mib) =>
      backend.createVolume(within(), none, { name, requiredBytes, limitBytes: 0n, parameters: volumeContext }),
    grant: (id: string) => backend.grantAccess(within(), none, id, { hostNqn: host, shared: false, volumeContext }),
    revoke: (id: string) => backend.revokeAccess(within(), none, id, host),
    remove: (id: string) => backend.deleteVolume(within(), none, id),
    connect: ({ subsystemNqn, addresses: [at] }: RemoteNamespace, port = at?.trsvcid) =>
      nvme(
        ...["connect", "--transport=tcp", `--traddr=${at?.traddr}`, `--trsvcid=${port}`, `--nqn=${subsystemNqn}`],
        ...[`--hostnqn=${host}`, "--hostid=b3a1f1b0-7d7c-4f4b-9f5f-5a4c9d1f0001"],
      ),
    devices: () => sim.control.machine().devices.map(({ name }) => name).sort(),
    pathOf: (uuid: string) => {
      const device = sim.control.machine().devices.find((device) => device.uuid === uuid);
      ok(device !== undefined, `no device of ${uuid}`);
      return join(devRoot, device.name);
    },
    async [Symbol.asyncDispose]() {
      await backend[Symbol.asyncDispose]();
      await sim[Symbol.asyncDispose]();
    },
  };
}

Deno.test({
  name:
    "the machine's nvme connects to what is exported, each subsystem with a number of its own, and disconnects from it",
  ignore,
  async fn() {
    await using t = await start();
    const [one, two] = [await t.create("pvc-1"), await t.create("pvc-2")];
    const [first, second] = [await t.grant(one.id), await t.grant(two.id)];

    deepStrictEqual((await t.connect(first)).code, 0);
    deepStrictEqual((await t.connect(second)).code, 0);

    deepStrictEqual(t.devices(), ["nvme0n1", "nvme1n1"]);
    const attribute = async (path: string) => (await Deno.readTextFile(join(t.sysfsRoot, path))).trim();
    strictEqual(await attribute("class/block/nvme1n1/wwid"), `uuid.${two.uuid}`);
    strictEqual(await attribute("class/block/nvme1n1/device/subsysnqn"), second.subsystemNqn);
    strictEqual(await attribute("class/nvme/nvme1/subsysnqn"), second.subsystemNqn);
    match((await t.connect(first)).err, /already connected/);
    strictEqual((await t.nvme("disconnect", "--device=nvme0")).code, 0);
    deepStrictEqual(t.devices(), ["nvme1n1"]);
    const names = [...Deno.readDirSync(join(t.sysfsRoot, "class/nvme-subsystem"))].map(({ name }) => name);
    deepStrictEqual(names, ["nvme-subsys1"]);
    match((await t.nvme("disconnect", "--device=nvme0")).err, /Did not find device/);
    strictEqual((await t.connect(first)).code, 0);
    deepStrictEqual(t.devices(), ["nvme0n1", "nvme1n1"]);
  },
});

Deno.test({
  name: "the machine's nvme finds no server at another address, and no subsystem that is not exported",
  ignore,
  async fn() {
    await using t = await start();
    const { id } = await t.create("pvc-1");
    const namespace = await t.grant(id);

    match((await t.connect(namespace, "4420")).err, /Connection refused/);
    await t.revoke(id);
    match((await t.connect(namespace)).err, /Input\/output error/);

    deepStrictEqual(t.devices(), []);
  },
});

Deno.test({
  name: "promise 24: when revoking access returns, the device is gone, and a deletion hurts no host",
  ignore,
  async fn() {
    await using t = await start();
    const { id } = await t.create("pvc-1");
    await t.connect(await t.grant(id));
    deepStrictEqual(t.devices(), ["nvme0n1"]);

    await t.revoke(id);

    deepStrictEqual(t.devices(), []);
    await t.remove(id);
  },
});

Deno.test({
  name: "lbcsi attach and detach take a volume of PoseidonOS by its ID",
  ignore,
  async fn() {
    await using t = await start();
    const { id } = await t.create("pvc-1");
    const { devRoot = "", sysfsRoot = "", programs, targetAddress, transportServiceId } = t.sim.addresses;
    const lbcsi = async (...words: readonly string[]) => {
      const main = fileURLToPath(new URL("../../../main.ts", import.meta.url));
      const places = ["--node-id", "a.node", "--dev", devRoot, "--sysfs", sysfsRoot];
      const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
        args: ["run", "-A", "--no-check", main, ...words, ...places],
        env: { NO_COLOR: "1", PATH: `${programs}:${Deno.env.get("PATH")}` },
      }).output();
      return { code, text: new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr) };
    };

    const nowhere = await lbcsi("attach", id);
    match(nowhere.text, /volume attribute "targetAddress" is missing/);
    const attributes = `targetAddress=${targetAddress},transportServiceId=${transportServiceId}`;
    const attached = await lbcsi("attach", id, "--volume-attributes", attributes);

    deepStrictEqual([attached.code, t.devices()], [0, ["nvme0n1"]], attached.text);
    const detached = await lbcsi("detach", id);
    deepStrictEqual([detached.code, t.devices()], [0, []], detached.text);
    deepStrictEqual(t.sim.control.leftovers().access, []);
  },
});

Deno.test({
  name: "50 volumes come and go while another one is written and read, without an error or a lost byte",
  ignore,
  async fn() {
    await using t = await start();
    const { id, uuid } = await t.create("pvc-busy");
    await t.connect(await t.grant(id));
    const device = t.pathOf(uuid);
    strictEqual((await command("mkfs.ext4", "-q", device)).code, 0);
    const directory = await Deno.makeTempDir({ prefix: "lbcsi-churn-" });
    strictEqual((await command("mount", device, directory)).code, 0);
    try {
      const ended = new AbortController();
      const written = new Map<string, Uint8Array>();
      const writing = (async () => {
        for (let number = 0; !ended.signal.aborted || number === 0; number++) {
          const path = join(directory, `file${number % 40}`);
          const bytes = crypto.getRandomValues(new Uint8Array(1 << 16));
          using file = await Deno.open(path, { create: true, write: true, truncate: true });
          await file.write(bytes);
          await file.sync();
          written.set(path, bytes);
          deepStrictEqual(await Deno.readFile(path), bytes);
        }
      })();
      const life = async (number: number) => {
        const volume = await t.create(`pvc-${number}`, mib);
        await t.connect(await t.grant(volume.id));
        ok(t.pathOf(volume.uuid));
        await t.revoke(volume.id);
        await t.remove(volume.id);
      };
      for (let number = 0; number < 50; number += 10) {
        await Promise.all(Array.from({ length: 10 }, (_, more) => life(number + more)));
      }
      ended.abort();
      await writing;

      ok(written.size > 0);
      strictEqual((await command("umount", directory)).code, 0);
      strictEqual((await command("e2fsck", "-fn", device)).code, 0);
      strictEqual((await command("mount", device, directory)).code, 0);
      for (const [path, bytes] of written) deepStrictEqual(await Deno.readFile(path), bytes);
      strictEqual(t.pathOf(uuid), device);
    } finally {
      await command("umount", directory);
      await Deno.remove(directory);
    }
    await t.revoke(id);
    await t.remove(id);
    deepStrictEqual(t.sim.control.leftovers(), { volumes: [], snapshots: [], access: [], devices: [] });
  },
});

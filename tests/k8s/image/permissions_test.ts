/** The permissions that are compiled into `lbcsi-controller`: they suffice for its work and allow nothing else. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { DescMessage, DescMethodUnary, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { configDirectories, permissionsWith, socketDirectories } from "../../../k8s/image/permissions.ts";
import { driverManifests } from "../../../k8s/rendered_files.ts";
import { ServiceProcess } from "../../../lib/demo/process.ts";
import { Testbed } from "../../../lib/demo/testbed.ts";
import { Channel } from "../../../lib/grpc/client.ts";
import { hostNqn } from "../../../lib/namespace.ts";
import { Controller, Identity, VolumeCapability_AccessMode_Mode as Mode } from "../../../proto/gen/csi_pb.ts";
import { driverContainer } from "../../support/charts.ts";

const mainPath = fileURLToPath(new URL("../../../main.ts", import.meta.url));
const gib = 1n << 30n;

interface Directories {
  readonly sockets: string;
  readonly configuration: string;
  /** The command that starts lbcsi with the permissions of lbcsi-controller, but with these two directories. */
  readonly program: readonly string[];
  readonly signal: AbortSignal;
}

async function withDirectories(body: (directories: Directories) => Promise<void>): Promise<void> {
  const directory = await Deno.realPath(await Deno.makeTempDir({ prefix: "lbcsi-permissions-" }));
  const [sockets, configuration] = [join(directory, "sockets"), join(directory, "configuration")];
  await Promise.all([Deno.mkdir(sockets), Deno.mkdir(configuration)]);
  const flags = permissionsWith([sockets], [configuration]);
  const program = [Deno.execPath(), "run", "--no-check", ...flags, mainPath];
  try {
    await body({ sockets, configuration, program, signal: AbortSignal.timeout(120_000) });
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

/** Writes a file as kubelet mounts one of a Secret: behind symbolic links that change together. */
async function mounted(directory: string, name: string, text: string): Promise<string> {
  const version = join(directory, "..2026_11_21");
  await Deno.mkdir(version, { recursive: true });
  await Deno.writeTextFile(join(version, name), text);
  await Deno.symlink("..2026_11_21", join(directory, "..data")).catch(() => {});
  await Deno.symlink(`..data/${name}`, join(directory, name));
  return join(directory, name);
}

for (const backend of ["lightos", "poseidon"] as const) {
  Deno.test(`the permissions of lbcsi-controller suffice from creation to deletion of volumes, with ${backend}`, async () => {
    await withDirectories(async ({ sockets, configuration, program, signal }) => {
      const testbed = new Testbed(sockets, program, {
        simulator: [Deno.execPath(), "run", "-A", "--no-check", mainPath],
        backend,
      });
      try {
        await testbed.startSimulator("none", signal);
        const { addresses, parameters } = testbed;
        const file = backend === "poseidon"
          ? { systems: [{ name: "a", endpoint: addresses.dagent, arrays: addresses.arrays }] }
          : { clusters: [{ name: "a", endpoints: addresses.grpcs, ca: "", jwt: "", projects: addresses.projects }] };
        const options: string[] = [];
        if (backend === "lightos") {
          const ca = await mounted(configuration, "ca.pem", addresses.ca ?? "");
          const jwt = await mounted(configuration, "jwt", addresses.adminJwt);
          Object.assign(file.clusters?.[0] ?? {}, { ca, jwt });
          options.push("--mgmt-ca", ca, "--jwt-path", jwt);
        }
        options.push("--config", await mounted(configuration, "clusters.yaml", JSON.stringify(file)));
        await testbed.startService("controller", options, signal, { HTTPS_PROXY: "", all_proxy: "http://127.0.0.1:9" });
        const call = async <I extends DescMessage, O extends DescMessage>(
          method: DescMethodUnary<I, O>,
          request: MessageInitShape<I>,
        ): Promise<MessageShape<O>> => await testbed.controller.call(method, request, { signal });
        const capability = {
          accessType: { case: "block" as const, value: {} },
          accessMode: { mode: Mode.SINGLE_NODE_WRITER },
        };
        const nodeId = "n1.node";

        const { volume } = await call(Controller.method.createVolume, {
          name: "pvc-1",
          capacityRange: { requiredBytes: gib },
          volumeCapabilities: [capability],
          parameters,
        });
        const { volumeId = "", volumeContext = {} } = volume ?? {};
        const publish = { volumeId, nodeId, volumeCapability: capability, volumeContext };
        await call(Controller.method.controllerPublishVolume, publish);
        assert.deepEqual((await testbed.observe()).volumes.map(({ acl }) => acl), [[hostNqn(nodeId)]]);
        const { entries } = await call(Controller.method.listVolumes, {});
        assert.equal(entries.length, 1);
        const { availableCapacity } = await call(Controller.method.getCapacity, { parameters });
        assert(availableCapacity > gib);
        if (backend === "lightos") {
          await call(Controller.method.controllerExpandVolume, {
            volumeId,
            capacityRange: { requiredBytes: 2n * gib },
          });
          const { snapshot } = await call(Controller.method.createSnapshot, {
            name: "snapshot-1",
            sourceVolumeId: volumeId,
          });
          await call(Controller.method.deleteSnapshot, { snapshotId: snapshot?.snapshotId ?? "" });
        }
        await call(Controller.method.controllerUnpublishVolume, { volumeId, nodeId });
        await call(Controller.method.deleteVolume, { volumeId });
        const left = await testbed.clusterWhenIdle(signal);
        assert.deepEqual(Object.values(left).flat(), []);
        assert.equal(await testbed.running("controller")?.end("SIGTERM", 10_000), "exit 0");
        assert.doesNotMatch(await Deno.readTextFile(join(sockets, "controller.log")), /NotCapable/);
      } finally {
        await testbed.cleanUp(true);
      }
    });
  });
}

Deno.test("the permissions of lbcsi-controller suffice to take over the socket of a killed process", async () => {
  await withDirectories(async ({ sockets, program, signal }) => {
    const testbed = new Testbed(sockets, program);
    try {
      const first = await testbed.startService("identity", [], signal);
      await first.end("SIGKILL", 10_000);
      const socket = join(sockets, "identity.sock");
      assert((await Deno.lstat(socket)).isSocket);
      // Not with the testbed, which removes the socket.
      const command = [...program, "identity", "--endpoint", `unix://${socket}`];
      const second = new ServiceProcess("second", command, join(sockets, "second.log"));
      try {
        await second.until("its start", signal, async () => {
          const log = await Deno.readTextFile(second.log).catch(() => "");
          return log.includes('"event":"serves"') ? true : undefined;
        });
        using channel = new Channel({ address: `unix://${socket}` });
        const { name } = await channel.call(Identity.method.getPluginInfo, {}, { signal });
        assert.equal(name, "csi.lightbitslabs.com");
      } finally {
        assert.equal(await second.end("SIGTERM", 10_000), "exit 0");
      }
    } finally {
      await testbed.cleanUp(true);
    }
  });
});

const attempts: Readonly<Record<string, string>> = {
  "run a program": `new Deno.Command("/bin/true").outputSync()`,
  "run a program by node:child_process": `(await import("node:child_process")).execFileSync("/bin/true")`,
  "load a library": `Deno.dlopen("libc.so.6", {})`,
  "signal another process": `Deno.kill(1, "SIGCONT")`,
  "read a file of the machine": `Deno.readTextFileSync("/etc/passwd")`,
  "read another file of its configuration's parent": `Deno.readTextFileSync(Deno.args[0] + "/../other")`,
  "make a symbolic link": `Deno.symlinkSync("/etc/passwd", Deno.args[1] + "/link")`,
  "read /proc": `Deno.readTextFileSync("/proc/self/environ")`,
  "write into its configuration": `Deno.writeTextFileSync(Deno.args[0] + "/new", "")`,
  "write elsewhere": `Deno.writeTextFileSync("/tmp/lbcsi-permissions-must-not-be-there", "")`,
  "serve a socket elsewhere": `Deno.listen({ transport: "unix", path: "/tmp/lbcsi-permissions-must-not-be-there" })`,
  "read its whole environment": `Deno.env.toObject()`,
  "read a variable of another program": `Deno.env.get("KUBECONFIG")`,
  "read information about the system": `Deno.hostname()`,
  "load code from another place": `await import("https://" + "esm.sh/lodash")`,
};

Deno.test("the permissions of lbcsi-controller allow nothing else", async (t) => {
  await withDirectories(async ({ sockets, configuration }) => {
    await Deno.writeTextFile(join(configuration, "../other"), "secret");
    const script = join(sockets, "attempt.ts");
    for (const [action, code] of Object.entries(attempts)) {
      await t.step(`it cannot ${action}`, async () => {
        await Deno.writeTextFile(script, `${code};`);
        const run = async (...flags: readonly string[]) => {
          const { code, stderr } = await new Deno.Command(Deno.execPath(), {
            args: ["run", "--no-check", "--no-config", ...flags, script, configuration, sockets],
            env: { NO_COLOR: "1" },
          }).output();
          return { code, message: new TextDecoder().decode(stderr) };
        };

        const { code: status, message } = await run(...permissionsWith([sockets], [configuration]));

        assert.notEqual(status, 0);
        assert.match(message, /NotCapable: |Requires import access/);
      });
    }
    await assert.rejects(Deno.stat("/tmp/lbcsi-permissions-must-not-be-there"), Deno.errors.NotFound);
  });
});

for (
  const [option, path, right] of [
    ["--endpoint", "unix:///tmp/lbcsi-elsewhere.sock", "write"],
    ["--jwt-path", "/etc/other/jwt", "read"],
    ["--config", "/etc/other/clusters.yaml", "read"],
    ["--mgmt-ca", "/etc/other/ca.pem", "read"],
  ] as const
) {
  Deno.test(`lbcsi-controller controller ${option} elsewhere ends with status 2 and says why`, async () => {
    await withDirectories(async ({ sockets, configuration, program: [deno = "", ...words] }) => {
      const given = {
        "--endpoint": `unix://${sockets}/csi.sock`,
        "--jwt-path": `${configuration}/jwt`,
        [option]: path,
      };
      const { code, stderr } = await new Deno.Command(deno, {
        args: [...words, "controller", ...Object.entries(given).flat()],
        env: { NO_COLOR: "1" },
      }).output();

      assert.equal(code, 2);
      const text = path.replace("unix://", "");
      const expected = `${option} "${text}": this executable was built without the right to ${right} there`;
      assert.ok(new TextDecoder().decode(stderr).includes(expected), new TextDecoder().decode(stderr));
    });
  });
}

Deno.test("the controller of each manifest finds its socket and its files in directories that it may use", () => {
  const within = (path: string, directories: readonly string[]) =>
    directories.some((directory) => path === directory || path.startsWith(`${directory}/`));
  for (const { path } of driverManifests) {
    const { env = [] } = driverContainer(path, "controller");
    assert(env.some(({ name }) => name === "CSI_ENDPOINT"), path);
    for (const { name, value = "" } of env) {
      if (name === "CSI_ENDPOINT") assert(within(value.replace("unix://", ""), socketDirectories), value);
      else if (value.startsWith("/")) assert(within(value, configDirectories), `${name}: ${value}`);
    }
  }
});

/** The driver, started as manifests start it, creates volumes with the parameters of the examples. */
import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { render, type Values } from "../../k8s/charts.ts";
import { Channel } from "../../lib/grpc/client.ts";
import { parseVolumeId } from "../../lib/volume_id.ts";
import {
  Controller,
  ControllerServiceCapability_RPC_Type as Rpc,
  Identity,
  Node,
  VolumeCapability_AccessMode_Mode as Mode,
} from "../../proto/gen/csi_pb.ts";
import { manifestPath, readK8sFile, renderRequest, textOf } from "../support/charts.ts";
import { unlessGoLacks } from "../support/go.ts";
import { needs } from "../support/needs.ts";
import { type Container, type KubeObject, objectsOf, podOf } from "../support/objects.ts";
import { poseidonParameters, startPoseidon } from "../support/poseidon.ts";
import { eventually, managementEndpoints, startSimulator } from "../support/simulator.ts";

const objectsIn = (path: string) => objectsOf(readK8sFile(path));
const objectsInManifest = (bundleName: string) => objectsIn(manifestPath(bundleName));

const containerOf = (objects: readonly KubeObject[], role: string): Container => {
  const all = objects.flatMap((object) => podOf(object)?.spec.containers ?? []);
  const found = all.find(({ args }) => args?.[0] === role);
  assert.ok(found !== undefined);
  return found;
};

/**
 * Runs a container's command with its environment only, on the node worker-1, while `body` calls its services. Paths of
 * configuration files point into `files`.
 */
async function withRunning(
  { args = [], env = [] }: Container,
  body: (channel: Channel) => Promise<void>,
  files = "/nowhere",
): Promise<void> {
  const directory = await Deno.makeTempDir({ prefix: "lbcsi-k8s-" });
  // The modes that kubelet gives an emptyDir (controller) and the plugin's directory (node).
  await Deno.chmod(directory, args[0] === "controller" ? 0o2777 : 0o755);
  const socket = `${directory}/${args[0] === "controller" ? "lbcsi/" : ""}csi.sock`;
  const variables = Object.fromEntries(
    env.map(({ name, value = "" }) => [
      name,
      value.replace("$(KUBE_NODE_NAME)", "worker-1").replace(/^\/etc\/lb-csi-config\//, `${files}/`)
        .replace(/^unix:(\/\/\/csi|.*\/pluginproxy)\//, `unix://${directory}/`),
    ]),
  );
  const process = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-check", fileURLToPath(new URL("../../main.ts", import.meta.url)), ...args],
    clearEnv: true,
    env: { PATH: Deno.env.get("PATH") ?? "", HOME: Deno.env.get("HOME") ?? "/root", ...variables },
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const output = process.output();
  try {
    using channel = new Channel({ address: `unix://${socket}` });
    let stderrAtExit: string | undefined;
    output.then(({ stderr }) => stderrAtExit = new TextDecoder().decode(stderr));
    await eventually(
      "an answer of the driver",
      () => {
        assert.equal(stderrAtExit, undefined);
        return channel.call(Identity.method.probe, {}, { signal: AbortSignal.timeout(1000) }).catch(() => undefined);
      },
      30_000,
    );
    await body(channel);
    process.kill("SIGTERM");
    const { code, stderr } = await output;
    assert.equal(code, 0, new TextDecoder().decode(stderr));
  } finally {
    try {
      process.kill("SIGKILL");
    } catch {
      // it has already ended
    }
    await output;
    await Deno.remove(directory, { recursive: true });
  }
}

const options = () => ({ signal: AbortSignal.timeout(20_000) });

for (const name of ["lb-csi-plugin-k8s-v1.17.yaml", "lb-csi-plugin-k8s-v1.37-dc.yaml", "poscsi-k8s-v1.37.yaml"]) {
  Deno.test(`controller and node start as ${name} starts them, under the name of its CSIDriver`, async () => {
    const objects = objectsInManifest(name);
    const driver = objects.find(({ kind }) => kind === "CSIDriver")?.metadata.name;

    for (const role of ["controller", "node"]) {
      await withRunning(containerOf(objects, role), async (channel) => {
        assert.equal((await channel.call(Identity.method.getPluginInfo, {}, options())).name, driver);
        if (role === "node") {
          assert.equal((await channel.call(Node.method.nodeGetInfo, {}, options())).nodeId, "worker-1.node");
        }
      });
    }
  });
}

/** The parameters of a StorageClass as external-provisioner passes them on, with those of `--extra-create-metadata`. */
function parametersOf(path: string): Record<string, string> {
  const parameters = objectsIn(path).find(({ kind }) => kind === "StorageClass")?.parameters ?? {};
  return {
    ...Object.fromEntries(Object.entries(parameters).filter(([name]) => !name.startsWith("csi.storage.k8s.io/"))),
    "csi.storage.k8s.io/pvc/name": "example-fs-pvc",
    "csi.storage.k8s.io/pvc/namespace": "default",
    "csi.storage.k8s.io/pv/name": "pvc-1",
  };
}

const createRequest = (parameters: Record<string, string>, mutableParameters: Record<string, string> = {}) => ({
  name: "pvc-1",
  capacityRange: { requiredBytes: 1n << 30n },
  volumeCapabilities: [
    {
      accessType: { case: "mount" as const, value: { fsType: "ext4" } },
      accessMode: { mode: Mode.SINGLE_NODE_WRITER },
    },
  ],
  parameters,
  mutableParameters,
});

Deno.test("the StorageClass of the LightOS examples makes a volume, and the driver understands the attributes classes", async () => {
  await using simulator = await startSimulator();
  const endpoint = { "mgmt-endpoint": managementEndpoints(simulator), "mgmt-scheme": "grpc" };
  const parameters = { ...parametersOf("examples/secret-and-storage-class.yaml"), ...endpoint };
  const attributes = objectsIn("examples/volume-attributes-workload.yaml")
    .filter(({ kind }) => kind === "VolumeAttributesClass").map(({ parameters = {} }) => parameters);

  await withRunning(containerOf(objectsInManifest("lb-csi-plugin-k8s-v1.37.yaml"), "controller"), async (channel) => {
    const secrets = { jwt: simulator.addresses.jwt };
    const { volume } = await channel.call(
      Controller.method.createVolume,
      { ...createRequest(parameters), secrets },
      options(),
    );

    assert.equal(volume?.capacityBytes, 1n << 30n);
    const encrypted = {
      ...createRequest({ ...parametersOf("examples/encrypted-workload.yaml"), ...endpoint }),
      name: "pvc-2",
      secrets,
    };
    assert.match(
      (await channel.call(Controller.method.createVolume, encrypted, options())).volume?.volumeId ?? "",
      /hostcrypto/,
    );
    assert.equal(attributes.length, 2);
    for (const mutableParameters of attributes) {
      const request = { volumeId: volume.volumeId, secrets, mutableParameters };
      const modification = channel.call(Controller.method.controllerModifyVolume, request, options());
      // The driver knows the parameter; the policy itself is one that the reader of the example has.
      await assert.rejects(modification, /there is no QoS policy "(silver|gold)"/);
    }
  });
});

Deno.test("the StorageClass of the PoseidonOS examples makes a volume", async () => {
  await using simulator = await startPoseidon();
  const parameters = { ...parametersOf("examples/storageclass.yaml"), ...poseidonParameters(simulator) };

  await withRunning(containerOf(objectsInManifest("poscsi-k8s-v1.37.yaml"), "controller"), async (channel) => {
    const { volume } = await channel.call(Controller.method.createVolume, createRequest(parameters), options());

    assert.equal(volume?.capacityBytes, 1n << 30n);
  });
});

for (const mode of ["block", "filesystem"]) {
  Deno.test(`the volumeHandle of the preprovisioned ${mode} example is a volume ID of this driver`, () => {
    const handle = objectsIn(`examples/preprovisioned-${mode}-workload.yaml`)[0]?.spec?.csi?.volumeHandle;

    assert.equal(parseVolumeId(handle ?? "").uuid, "11111111-2222-4333-8444-555555555555");
  });
}

const configured: readonly (readonly [what: string, values: Values, roles: readonly string[]])[] = [
  ["clusters, inline volumes and certificates", {
    clusters: [{
      name: "rack1",
      endpoints: "192.0.2.1:443",
      projects: ["default"],
      jwt: "/etc/lb-csi/jwt",
      ephemeral: { projects: ["default"], maxSize: "100Gi" },
    }],
    jwtSecret: [{ name: "token" }],
    inlineVolumes: true,
    mgmtTlsVerify: false,
    volumeHealth: true,
    maxVolumes: 100,
    attach: "direct",
    nodeOptions: { LB_CSI_QUEUE_SIZE: 256, LB_CSI_LUKS_PBKDF_MEMORY: 131072, LB_CSI_LUKS_DISCARD: true },
  }, ["controller", "node"]],
  ["systems of PoseidonOS", {
    backend: "poseidon",
    systems: [{ name: "rack1", endpoint: "192.0.2.1:3000", arrays: ["POSArray"] }],
    nodeIdSuffix: ".storage",
  }, ["controller", "node"]],
];

for (const [what, values, roles] of configured) {
  Deno.test({
    name: `controller and node start with ${what} from the chart`,
    ignore: !needs("go"),
    fn: async () => {
      const rendered = await unlessGoLacks(() => render([renderRequest("lb-csi-plugin", 37, values)]));
      if (rendered === undefined) return;
      assert.deepEqual(rendered.flatMap(({ error }) => error ?? []), []);
      const objects = objectsOf(rendered.map(textOf).join("\n---\n"));
      const files = await Deno.makeTempDir({ prefix: "lbcsi-k8s-" });
      try {
        const data = objects.find(({ kind }) => kind === "ConfigMap")?.data ?? {};
        assert.deepEqual(Object.keys(data), ["clusters.yaml"]);
        for (const [name, text] of Object.entries(data)) await Deno.writeTextFile(`${files}/${name}`, text);

        for (const role of roles) {
          await withRunning(containerOf(objects, role), async (channel) => {
            if (role !== "controller") return;
            const { capabilities } = await channel.call(Controller.method.controllerGetCapabilities, {}, options());
            // LIST_VOLUMES is announced only with a cluster file, so the driver has read it.
            const types = capabilities.map(({ type }) => type.case === "rpc" ? type.value.type : undefined);
            assert.ok(types.includes(Rpc.LIST_VOLUMES));
          }, files);
        }
      } finally {
        await Deno.remove(files, { recursive: true });
      }
    },
  });
}
